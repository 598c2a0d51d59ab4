use super::vector::Neon;
use crate::accumulate::Accumulate;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;
use crate::packed_matrix::PanelEncoding;
use crate::strip::AccumulateStrip;

kernel_table! {
    level: Neon,
    features: "neon",
    bf16: (no_bf16, no_bf16_strip),
    tile_rows: 2,
    few_row_panels: 1,
    queries: 2,
    strip: (6, 6, 1),
    shapes: [(1, 1) (2, 1)],
    integers: (4, 1: [1], 4, integer_strip(4, 1)),
}

fn no_bf16(_: PanelEncoding, _: usize, _: usize) -> Accumulate {
    unreachable!("bf16 products need AVX-512")
}

fn no_bf16_strip(_: PanelEncoding) -> AccumulateStrip {
    unreachable!("bf16 products need AVX-512")
}
