use super::vector::Neon;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;

kernel_table! {
    level: Neon,
    features: "neon",
    tile_rows: 2,
    few_row_panels: 1,
    queries: 2,
    strip: (6, 6, 1),
    shapes: [(1, 1) (2, 1)],
    integers: (4, 1: [1], 4, integer_strip(4, 1)),
}
