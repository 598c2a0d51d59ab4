use super::vector::Avx2;
use crate::accumulate::Accumulate;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::kernel_table;
use crate::packed_matrix::PanelEncoding;
use crate::strip::AccumulateStrip;

kernel_table! {
    level: Avx2,
    features: "avx2,fma,f16c",
    bf16: (no_bf16, no_bf16_strip),
    tile_rows: 3,
    few_row_panels: 1,
    queries: 2,
    strip: (8, 6, 1),
    shapes: [(1, 1) (2, 1) (3, 1)],
    integers: (4, 3: [1 2 3], 9, integer_strip(6, 2)),
}

fn no_bf16(_: PanelEncoding, _: usize, _: usize) -> Accumulate {
    unreachable!("bf16 products need AVX-512")
}

fn no_bf16_strip(_: PanelEncoding) -> AccumulateStrip {
    unreachable!("bf16 products need AVX-512")
}
