use super::integer::Dotprod;
use crate::accumulate::Accumulate;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;
use crate::neon::Neon;
use crate::packed_matrix::PanelEncoding;
use crate::strip::AccumulateStrip;

kernel_table! {
    level: Neon<Dotprod>,
    features: "neon,dotprod",
    bf16: (no_bf16, no_bf16_strip),
    tile_rows: 2,
    few_row_panels: 1,
    queries: 2,
    strip: (6, 6, 1),
    shapes: [(1, 1) (2, 1)],
    integers: (4, 2: [1 2], 6, integer_strip(6, 2)),
}

fn no_bf16(_: PanelEncoding, _: usize, _: usize) -> Accumulate {
    unreachable!("bf16 products need AVX-512")
}

fn no_bf16_strip(_: PanelEncoding) -> AccumulateStrip {
    unreachable!("bf16 products need AVX-512")
}
