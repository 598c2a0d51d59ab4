use crate::codec::{Bits2, Bits4, Bits8, Table4};
use crate::integer_level::IntegerLevel;

/// How codes lie in a panel whose products are computed in int8.
///
/// A step is a word per row. Columns `4·q + i` of it are field q of byte i: four neighbours are one mask away from
/// the four bytes that integer products take, and x stays in its own order.
pub(crate) trait IntegerEncoding<L: IntegerLevel> {
    /// Groups of four columns in a step.
    const QUADS: usize;
    /// Groups of four columns whose products fit into a partial sum.
    const RUN: usize;
    /// What is to be subtracted from unpacked codes; products start with this times the sum of x.
    const CENTRE: i32;
    /// What stays in registers from step to step.
    type State: Copy;
    /// Sums of a run.
    type Partial: Copy;

    /// The state of a job with this table of codes.
    fn state(level: L, table: &[i8; 16]) -> Self::State;
    /// Columns `4·QUAD` to `4·QUAD + 3` of a step, one to a byte.
    fn unpack<const QUAD: u32>(level: L, state: Self::State, words: L::Codes) -> L::Codes;
    /// What a run that follows `sums` starts with.
    fn open(level: L, sums: L::Sums) -> Self::Partial;
    /// Adds the products with four columns of x.
    fn multiply(level: L, partial: Self::Partial, codes: L::Codes, x: u32) -> Self::Partial;
    /// `sums` and the run that was opened with them.
    fn close(level: L, sums: L::Sums, partial: Self::Partial) -> L::Sums;
}

/// The encodings of unsigned codes below 16.
macro_rules! fields {
    ($encoding:ty, $bits:literal) => {
        impl<L: IntegerLevel> IntegerEncoding<L> for $encoding {
            const QUADS: usize = 8 / $bits;
            const RUN: usize = L::RUN_LIMIT / ((1 << $bits) - 1);
            const CENTRE: i32 = 1 << ($bits - 1);
            type State = ();
            type Partial = L::Partial;

            #[inline(always)]
            fn state(_: L, _: &[i8; 16]) {}

            #[inline(always)]
            fn unpack<const QUAD: u32>(level: L, (): (), words: L::Codes) -> L::Codes {
                level.fields::<$bits, QUAD>(words)
            }

            #[inline(always)]
            fn open(level: L, sums: L::Sums) -> L::Partial {
                level.open(sums)
            }

            #[inline(always)]
            fn multiply(level: L, partial: L::Partial, codes: L::Codes, x: u32) -> L::Partial {
                level.multiply_fields(partial, codes, x)
            }

            #[inline(always)]
            fn close(level: L, sums: L::Sums, partial: L::Partial) -> L::Sums {
                level.close(sums, partial)
            }
        }
    };
}

fields!(Bits2, 2);
fields!(Bits4, 4);

impl<L: IntegerLevel> IntegerEncoding<L> for Bits8 {
    const QUADS: usize = 1;
    const RUN: usize = usize::MAX;
    const CENTRE: i32 = L::BYTE_CENTRE;
    type State = ();
    type Partial = L::Sums;

    #[inline(always)]
    fn state(_: L, _: &[i8; 16]) {}

    #[inline(always)]
    fn unpack<const QUAD: u32>(level: L, (): (), words: L::Codes) -> L::Codes {
        level.bytes(words)
    }

    #[inline(always)]
    fn open(_: L, sums: L::Sums) -> L::Sums {
        sums
    }

    #[inline(always)]
    fn multiply(level: L, partial: L::Sums, codes: L::Codes, x: u32) -> L::Sums {
        level.multiply_bytes(partial, codes, x)
    }

    #[inline(always)]
    fn close(_: L, _: L::Sums, partial: L::Sums) -> L::Sums {
        partial
    }
}

impl<L: IntegerLevel> IntegerEncoding<L> for Table4 {
    const QUADS: usize = 2;
    const RUN: usize = usize::MAX;
    const CENTRE: i32 = L::BYTE_CENTRE;
    type State = L::Codes;
    type Partial = L::Sums;

    #[inline(always)]
    fn state(level: L, table: &[i8; 16]) -> L::Codes {
        level.byte_table(table)
    }

    #[inline(always)]
    fn unpack<const QUAD: u32>(level: L, table: L::Codes, words: L::Codes) -> L::Codes {
        level.look_up(table, level.fields::<4, QUAD>(words))
    }

    #[inline(always)]
    fn open(_: L, sums: L::Sums) -> L::Sums {
        sums
    }

    #[inline(always)]
    fn multiply(level: L, partial: L::Sums, codes: L::Codes, x: u32) -> L::Sums {
        level.multiply_bytes(partial, codes, x)
    }

    #[inline(always)]
    fn close(_: L, _: L::Sums, partial: L::Sums) -> L::Sums {
        partial
    }
}
