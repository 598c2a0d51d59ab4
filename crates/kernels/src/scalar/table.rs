use super::vector::Scalar;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;

kernel_table! {
    level: Scalar,
    tile_rows: 4,
    few_row_panels: 1,
    queries: 1,
    strip: (8, 2, 1),
    shapes: [(1, 1) (2, 1) (3, 1) (4, 1)],
    integers: (4, 2: [1 2], 3, integer_strip(4, 1)),
}
