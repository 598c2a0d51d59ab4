use crate::accumulate::Accumulate;
use crate::activation::{Activate, ActivateMultiply, Activation};
use crate::attention::AttentionTask;
use crate::integer_product::IntegerProducts;
use crate::norm::LayerNorm;
use crate::packed_input::QuantizedBlock;
use crate::packed_matrix::{Arithmetic, ColumnLayout, PanelEncoding};
use crate::strip::{AccumulateStrip, StripProducts};

/// The functions of one CPU level.
///
/// Every entry is compiled for the instructions of its level as a whole, loops included, and may be called only on
/// a CPU that has them.
pub(crate) struct KernelTable {
    /// Most rows of x that one call of an [`Accumulate`] takes.
    pub(crate) tile_rows: usize,
    /// Panels that an [`Accumulate`] of one or two rows takes at once, so that enough additions are under way.
    pub(crate) few_row_panels: usize,
    /// The [`Accumulate`] for so many rows and panels: up to `tile_rows` rows and one panel, or one or two rows and
    /// `few_row_panels`.
    pub(crate) accumulate: fn(PanelEncoding, Arithmetic, rows: usize, panels: usize) -> Accumulate,
    /// Products of many rows in f32 and bf16.
    pub(crate) strip: StripProducts,
    /// Products of int8 activations.
    pub(crate) integers: IntegerProducts,
    /// A row of x as f32 in the column order of a layout, and its block sums.
    pub(crate) pack_f32: unsafe fn(&ColumnLayout, &[f32], &mut [f32], &mut [f32]),
    /// The same as bf16, two columns to a word.
    pub(crate) pack_bf16: unsafe fn(&ColumnLayout, &[f32], &mut [u32], &mut [f32]),
    /// The same as i8 in a given unit, with the scale and the sum of each block.
    pub(crate) pack_i8: unsafe fn(&ColumnLayout, f32, &[f32], &mut [i8], &mut [QuantizedBlock]),
    pub(crate) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(crate) rms_norm_assign: unsafe fn(&mut [f32], &[f32], f32),
    pub(crate) layer_norm: LayerNorm,
    pub(crate) rotate: unsafe fn(&[f32], &[f32], usize, &mut [f32]),
    /// An activation of each element.
    pub(crate) activate: fn(Activation) -> Activate,
    /// An activation of the first times the second.
    pub(crate) activate_multiply: fn(Activation) -> ActivateMultiply,
    pub(crate) soft_cap: unsafe fn(f32, &mut [f32]),
    pub(crate) add_assign: unsafe fn(&mut [f32], &[f32]),
    pub(crate) attend: unsafe fn(&AttentionTask<'_>),
}

/// The table of a level: each generic body instantiated under the level's `target_feature`.
///
/// `bf16` are the products in bf16, where the level has them: of few rows and of many. `queries` is how many queries
/// attention keeps in registers, `shapes` the `(rows, panels)` of products, `strip` the fewest rows that are worth a
/// strip and the rows and halves of a panel of its tiles. `integers` is the same for products in int8: the registers of
/// a panel and the most rows that fit into registers, then the fewest rows of a strip and its body with the rows and
/// registers of its tiles.
macro_rules! kernel_table {
    (
        level: $level:ty,
        $(features: $features:literal,)?
        $(bf16: ($bf16:path, $bf16_strip:path),)?
        tile_rows: $tile_rows:literal,
        few_row_panels: $panels:literal,
        queries: $queries:literal,
        strip: ($least:literal, $strip_rows:expr, $strip_halves:literal),
        shapes: [$($shape:tt)+],
        integers: ($registers:literal, $most:literal: [$($integer_rows:literal)+], $least_strip:literal, $integer_strip:ident($tile:literal, $tile_registers:literal)),
    ) => {
        /// The functions of this level.
        pub(crate) static TABLE: $crate::kernel_table::KernelTable = $crate::kernel_table::KernelTable {
            tile_rows: $tile_rows,
            few_row_panels: $panels,
            accumulate,
            strip: $crate::strip::StripProducts {
                least_rows: $least,
                tile_rows: $strip_rows,
                accumulate: accumulate_strip,
            },
            pack_f32,
            integers: $crate::integer_product::IntegerProducts {
                least_strip_rows_of_a_word: $least_strip,
                most_rows: $most,
                accumulate: accumulate_integers,
                tile_rows: $tile,
                accumulate_strip: accumulate_integer_strip,
                centre: integer_centre,
            },
            pack_bf16,
            pack_i8,
            rms_norm,
            rms_norm_assign,
            layer_norm,
            rotate,
            activate,
            activate_multiply,
            soft_cap,
            add_assign,
            attend,
        };

        fn accumulate(
            encoding: $crate::packed_matrix::PanelEncoding,
            arithmetic: $crate::packed_matrix::Arithmetic,
            rows: usize,
            panels: usize,
        ) -> $crate::accumulate::Accumulate {
            use $crate::codec::F32Products;
            use $crate::packed_matrix::Arithmetic;
            match arithmetic {
                Arithmetic::Int8 => unreachable!("products in int8 are `accumulate_integers`"),
                Arithmetic::Bf16 => {
                    $crate::kernel_table::given_or!($crate::kernel_table::no_bf16, $($bf16)?)(encoding, rows, panels)
                }
                Arithmetic::F32 => $crate::kernel_table::of_encoding!(encoding, E => {
                    f32_products::<F32Products<$level, E>>(rows, panels)
                }),
            }
        }

        fn accumulate_strip(
            encoding: $crate::packed_matrix::PanelEncoding,
            arithmetic: $crate::packed_matrix::Arithmetic,
        ) -> $crate::strip::AccumulateStrip {
            use $crate::codec::Encoding;
            use $crate::packed_matrix::Arithmetic;
            $(#[target_feature(enable = $features)])?
            unsafe fn product<E: Encoding<$level>>(job: &$crate::strip::StripJob<'_>) {
                // SAFETY: the caller has the level and a sound job.
                unsafe { $crate::strip::accumulate_strip::<$level, E, { $strip_rows }, $strip_halves>(job) }
            }
            if arithmetic == Arithmetic::Bf16 {
                return $crate::kernel_table::given_or!($crate::kernel_table::no_bf16_strip, $($bf16_strip)?)(encoding);
            }
            $crate::kernel_table::of_encoding!(encoding, E => product::<E>)
        }

        fn accumulate_integers(
            encoding: $crate::packed_matrix::PanelEncoding,
            rows: usize,
        ) -> $crate::integer_product::AccumulateIntegers {
            use $crate::integer_encoding::IntegerEncoding;
            use $crate::integer_product::{AccumulateIntegers, IntegerJob, accumulate};
            $(#[target_feature(enable = $features)])?
            unsafe fn product<E: IntegerEncoding<$level>, const ROWS: usize>(job: &IntegerJob<'_>) {
                // SAFETY: the caller has the level and a sound job.
                unsafe { accumulate::<$level, E, ROWS, $registers>(job) }
            }
            fn of_rows<E: IntegerEncoding<$level>>(rows: usize) -> AccumulateIntegers {
                match rows {
                    $($integer_rows => product::<E, $integer_rows>,)+
                    _ => unreachable!("no product of {rows} rows"),
                }
            }
            $crate::kernel_table::of_integer_encoding!(encoding, E => of_rows::<E>(rows))
        }

        fn accumulate_integer_strip(
            encoding: $crate::packed_matrix::PanelEncoding,
        ) -> $crate::integer_strip::AccumulateIntegerStrip {
            use $crate::integer_encoding::IntegerEncoding;
            use $crate::integer_strip::IntegerStripJob;
            $(#[target_feature(enable = $features)])?
            unsafe fn product<E: IntegerEncoding<$level>>(job: &IntegerStripJob<'_>) {
                // SAFETY: the caller has the level and a sound job.
                unsafe { $integer_strip::<$level, E, $tile, $tile_registers>(job) }
            }
            $crate::kernel_table::of_integer_encoding!(encoding, E => product::<E>)
        }

        fn integer_centre(encoding: $crate::packed_matrix::PanelEncoding) -> i32 {
            use $crate::integer_encoding::IntegerEncoding;
            $crate::kernel_table::of_integer_encoding!(encoding, E => <E as IntegerEncoding<$level>>::CENTRE)
        }

        $crate::kernel_table::product_shapes!(f32_products, $($features,)? [$($shape)+]);

        $(#[target_feature(enable = $features)])?
        unsafe fn pack_f32(
            layout: &$crate::packed_matrix::ColumnLayout,
            x: &[f32],
            out: &mut [f32],
            block_sums: &mut [f32],
        ) {
            $crate::packed_input::pack_f32(layout, x, out, block_sums);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn pack_bf16(
            layout: &$crate::packed_matrix::ColumnLayout,
            x: &[f32],
            out: &mut [u32],
            block_sums: &mut [f32],
        ) {
            $crate::packed_input::pack_bf16(layout, x, out, block_sums);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn pack_i8(
            layout: &$crate::packed_matrix::ColumnLayout,
            unit: f32,
            x: &[f32],
            out: &mut [i8],
            blocks: &mut [$crate::packed_input::QuantizedBlock],
        ) {
            $crate::packed_input::pack_i8(layout, unit, x, out, blocks);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
            // SAFETY: the caller has the level.
            let level = unsafe { <$level as $crate::vector::Level>::assume() };
            $crate::norm::rms_norm(level, x, weight, epsilon, out);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn rms_norm_assign(x: &mut [f32], weight: &[f32], epsilon: f32) {
            // SAFETY: the caller has the level.
            let level = unsafe { <$level as $crate::vector::Level>::assume() };
            $crate::norm::rms_norm_assign(level, x, weight, epsilon);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
            // SAFETY: the caller has the level.
            let level = unsafe { <$level as $crate::vector::Level>::assume() };
            $crate::norm::layer_norm(level, x, weight, bias, epsilon, out);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn rotate(cosines: &[f32], sines: &[f32], head_dim: usize, heads: &mut [f32]) {
            $crate::rotary_table::rotate(cosines, sines, head_dim, heads);
        }

        fn activate(activation: $crate::activation::Activation) -> $crate::activation::Activate {
            use $crate::activation::{Activation, Gelu, GeluTanh, Lanewise, Silu};
            $(#[target_feature(enable = $features)])?
            unsafe fn each<F: Lanewise>(x: &[f32], out: &mut [f32]) {
                // SAFETY: the caller has the level.
                let level = unsafe { <$level as $crate::vector::Level>::assume() };
                $crate::activation::activate::<$level, F>(level, x, out);
            }
            match activation {
                Activation::Silu => each::<Silu>,
                Activation::Gelu => each::<Gelu>,
                Activation::GeluTanh => each::<GeluTanh>,
            }
        }

        fn activate_multiply(
            activation: $crate::activation::Activation,
        ) -> $crate::activation::ActivateMultiply {
            use $crate::activation::{Activation, Gelu, GeluTanh, Lanewise, Silu};
            $(#[target_feature(enable = $features)])?
            unsafe fn each<F: Lanewise>(gate: &[f32], up: &[f32], out: &mut [f32]) {
                // SAFETY: the caller has the level.
                let level = unsafe { <$level as $crate::vector::Level>::assume() };
                $crate::activation::multiply::<$level, F>(level, gate, up, out);
            }
            match activation {
                Activation::Silu => each::<Silu>,
                Activation::Gelu => each::<Gelu>,
                Activation::GeluTanh => each::<GeluTanh>,
            }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn soft_cap(cap: f32, x: &mut [f32]) {
            // SAFETY: the caller has the level.
            let level = unsafe { <$level as $crate::vector::Level>::assume() };
            $crate::activation::soft_cap(level, cap, x);
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn add_assign(x: &mut [f32], y: &[f32]) {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn attend(task: &$crate::attention::AttentionTask<'_>) {
            // SAFETY: the caller has the level.
            let level = unsafe { <$level as $crate::vector::Level>::assume() };
            $crate::attention::attend::<$level, $queries>(level, task);
        }
    };
}

/// A function that finds the instantiation of the product body for a shape, under a level's `target_feature`.
macro_rules! product_shapes {
    ($name:ident, $($features:literal,)? [$(($rows:literal, $panels:literal))+]) => {
        fn $name<C: $crate::codec::Codec>(rows: usize, panels: usize) -> $crate::accumulate::Accumulate {
            $(#[target_feature(enable = $features)])?
            unsafe fn product<C: $crate::codec::Codec, const ROWS: usize, const PANELS: usize>(
                job: &$crate::accumulate::PanelJob<'_>,
            ) {
                // SAFETY: the caller has the level and a sound job.
                unsafe { $crate::accumulate::accumulate::<C, ROWS, PANELS>(job) }
            }
            match (rows, panels) {
                $(($rows, $panels) => product::<C, $rows, $panels>,)+
                _ => unreachable!("no product of {rows} rows and {panels} panels"),
            }
        }
    };
}

/// An expression in which `$type` is the type of an encoding: every kind of product finds it here, or in the two macros
/// that this one goes on with.
macro_rules! of_encoding {
    ($encoding:expr, $type:ident => $value:expr) => {{
        use $crate::packed_matrix::PanelEncoding;
        match $encoding {
            PanelEncoding::F32 => {
                type $type = $crate::codec::F32;
                $value
            }
            PanelEncoding::F16 => {
                type $type = $crate::codec::F16;
                $value
            }
            PanelEncoding::Bf16 => {
                type $type = $crate::codec::Bf16;
                $value
            }
            codes => $crate::kernel_table::of_integer_encoding!(codes, $type => $value),
        }
    }};
}

/// The same for encodings of codes, which have products in int8 where codes stand for integers.
macro_rules! of_integer_encoding {
    ($encoding:expr, $type:ident => $value:expr) => {{
        use $crate::packed_matrix::PanelEncoding;
        match $encoding {
            PanelEncoding::Table4 => {
                type $type = $crate::codec::Table4;
                $value
            }
            codes => $crate::kernel_table::of_width!(codes, $type => $value),
        }
    }};
}

/// The same for encodings of codes that stand for themselves.
macro_rules! of_width {
    ($encoding:expr, $type:ident => $value:expr) => {
        $crate::kernel_table::of_width!(@ $encoding, $type, $value, Bits2 2, Bits3 3, Bits4 4, Bits5 5, Bits6 6, Bits8 8)
    };
    (@ $encoding:expr, $type:ident, $value:expr, $($variant:ident $bits:literal),+) => {
        match $encoding {
            $($crate::packed_matrix::PanelEncoding::$variant => {
                type $type = $crate::codec::Bits<$bits>;
                $value
            })+
            // All of them by name, so that the compiler asks about a new one.
            other @ ($crate::packed_matrix::PanelEncoding::Table4
            | $crate::packed_matrix::PanelEncoding::F32
            | $crate::packed_matrix::PanelEncoding::F16
            | $crate::packed_matrix::PanelEncoding::Bf16) => unreachable!("{other:?} has no codes of its own"),
        }
    };
}

/// A block that is written out for every value of a constant below a limit.
macro_rules! written_out {
    ($index:ident < $limit:expr => $body:block) => {
        $crate::kernel_table::written_out!(@ $index $limit, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $index:ident $limit:expr, $body:block, $($value:literal)+) => {
        const { assert!($limit <= [$($value),+].len()) };
        $(if $value < $limit {
            const $index: u32 = $value;
            $body
        })+
    };
}

/// The second path, or the first where there is none.
macro_rules! given_or {
    ($default:path,) => {
        $default
    };
    ($default:path, $given:path) => {
        $given
    };
}

/// What levels without products in bf16 have in their place.
pub(crate) fn no_bf16(_: PanelEncoding, _: usize, _: usize) -> Accumulate {
    unreachable!("this level has no bf16 products")
}

/// See [`no_bf16`].
pub(crate) fn no_bf16_strip(_: PanelEncoding) -> AccumulateStrip {
    unreachable!("this level has no bf16 products")
}

pub(crate) use {given_or, kernel_table, of_encoding, of_integer_encoding, of_width, product_shapes, written_out};
