use super::integer::I8mm;
use super::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;
use crate::neon::Neon;

kernel_table! {
    level: Neon<I8mm>,
    features: "neon,dotprod,i8mm",
    tile_rows: 2,
    few_row_panels: 1,
    queries: 2,
    strip: (6, 6, 1),
    shapes: [(1, 1) (2, 1)],
    integers: (4, 2: [1 2], 4, integer_strip(6, 2)),
}
