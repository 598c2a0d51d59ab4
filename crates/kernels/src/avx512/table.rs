use super::bf16_codec::{Bf16Encoding, Bf16Products};
use super::bf16_strip::{TILE_ROWS, accumulate_strip as accumulate_bf16_strip};
use super::vector::Avx512;
use crate::accumulate::Accumulate;
use crate::codec::Bf16;
use crate::integer_strip::accumulate_strip as integer_strip;
use crate::kernel_table::{kernel_table, of_width, product_shapes};
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

/// An expression in which `$type` is the type of an encoding whose values are exact in bf16.
macro_rules! of_bf16_encoding {
    ($encoding:expr, $type:ident => $value:expr) => {
        match $encoding {
            PanelEncoding::Bf16 => {
                type $type = Bf16;
                $value
            }
            PanelEncoding::Table4 | PanelEncoding::F32 | PanelEncoding::F16 => {
                unreachable!("{:?} has no bf16 products", $encoding)
            }
            integers => of_width!(integers, $type => $value),
        }
    };
}

fn bf16(encoding: PanelEncoding, rows: usize, panels: usize) -> Accumulate {
    of_bf16_encoding!(encoding, E => bf16_products::<Bf16Products<E>>(rows, panels))
}

fn bf16_strip(encoding: PanelEncoding) -> AccumulateStrip {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
    unsafe fn product<E: Bf16Encoding>(job: &StripJob<'_>) {
        // SAFETY: the caller has the level and a sound job.
        unsafe { accumulate_bf16_strip::<E>(job) }
    }
    of_bf16_encoding!(encoding, E => product::<E>)
}
