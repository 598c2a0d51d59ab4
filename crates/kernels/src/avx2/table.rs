use super::vector::Avx2;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;

kernel_table! {
    level: Avx2,
    features: "avx2,fma,f16c",
    tile_rows: 3,
    few_row_panels: 1,
    queries: 2,
    strip: (8, 6, 1),
    shapes: [(1, 1) (2, 1) (3, 1)],
    integers: (4, 3: [1 2 3], 9, integer_strip(6, 2)),
}
