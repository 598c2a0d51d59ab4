use super::bf16_codec::{Bf16Encoding, Bf16Products};
use super::bf16_strip::{TILE_ROWS, accumulate_strip as accumulate_bf16_strip};
use super::vector::Avx512;
use crate::accumulate::Accumulate;
use crate::codec::{Bf16, Bits2, Bits4, Bits8};
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::{kernel_table, product_shapes};
use crate::packed_matrix::PanelEncoding;
use crate::strip::{AccumulateStrip, StripJob};

kernel_table! {
    level: Avx512,
    features: "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    bf16: (bf16, bf16_strip),
    tile_rows: 8,
    few_row_panels: 2,
    queries: 4,
    strip: (9, TILE_ROWS, 2),
    shapes: [(1, 2) (1, 1) (2, 2) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1)],
    integers: (2, 8: [1 2 3 4 5 6 7 8], 9, integer_strip(12, 2)),
}

product_shapes!(
    bf16_products,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16",
    [(1, 2)(1, 1)(2, 2)(2, 1)(3, 1)(4, 1)(5, 1)(6, 1)(7, 1)(8, 1)]
);

fn bf16(encoding: PanelEncoding, rows: usize, panels: usize) -> Accumulate {
    match encoding {
        PanelEncoding::Bits2 => bf16_products::<Bf16Products<Bits2>>(rows, panels),
        PanelEncoding::Bits4 => bf16_products::<Bf16Products<Bits4>>(rows, panels),
        PanelEncoding::Bits8 => bf16_products::<Bf16Products<Bits8>>(rows, panels),
        PanelEncoding::Bf16 => bf16_products::<Bf16Products<Bf16>>(rows, panels),
        PanelEncoding::Table4 | PanelEncoding::F32 | PanelEncoding::F16 => {
            unreachable!("{encoding:?} has no bf16 products")
        }
    }
}

fn bf16_strip(encoding: PanelEncoding) -> AccumulateStrip {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
    unsafe fn product<E: Bf16Encoding>(job: &StripJob<'_>) {
        // SAFETY: the caller has the level and a sound job.
        unsafe { accumulate_bf16_strip::<E>(job) }
    }
    match encoding {
        PanelEncoding::Bits2 => product::<Bits2>,
        PanelEncoding::Bits4 => product::<Bits4>,
        PanelEncoding::Bits8 => product::<Bits8>,
        PanelEncoding::Bf16 => product::<Bf16>,
        PanelEncoding::Table4 | PanelEncoding::F32 | PanelEncoding::F16 => {
            unreachable!("{encoding:?} has no bf16 products")
        }
    }
}
