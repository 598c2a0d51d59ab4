use super::vector::Scalar;
use crate::accumulate::Accumulate;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;
use crate::packed_matrix::PanelEncoding;
use crate::strip::AccumulateStrip;

kernel_table! {
    level: Scalar,
    bf16: (no_bf16, no_bf16_strip),
    tile_rows: 4,
    few_row_panels: 1,
    queries: 1,
    strip: (8, 2, 1),
    shapes: [(1, 1) (2, 1) (3, 1) (4, 1)],
    integers: (4, 2: [1 2], 3, integer_strip(4, 1)),
}

fn no_bf16(_: PanelEncoding, _: usize, _: usize) -> Accumulate {
    unreachable!("bf16 products need AVX-512")
}

fn no_bf16_strip(_: PanelEncoding) -> AccumulateStrip {
    unreachable!("bf16 products need AVX-512")
}
