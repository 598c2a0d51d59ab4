use crate::code_fields::CodeFields;
use crate::codec::{Bits, Table4};
use crate::integer_level::IntegerLevel;
use crate::vector::LANES;

/// How codes lie in a panel whose products are computed in int8.
///
/// A step is some words per row, each with those of the other rows of the panel. Columns `4·q + i` of it are code q of
/// byte i, as [`CodeFields`] tells: four neighbours are then at the same place of the four bytes that integer products
/// take, and x stays in its own order.
pub(crate) trait IntegerEncoding<L: IntegerLevel> {
    /// Bytes of a step of one panel.
    const BYTES: usize;
    /// Groups of four columns in a step: 1 or an even number.
    const QUADS: usize;
    /// Groups of four columns whose products fit into a partial sum.
    const RUN: usize;
    /// Whether [`multiply`](Self::multiply) takes two groups of four columns at once, or one.
    const IN_PAIRS: bool;
    /// What is to be subtracted from unpacked codes; products start with this times the sum of x.
    const CENTRE: i32;
    /// What stays in registers from step to step.
    type State: Copy;
    /// The words of a step of the rows of a register.
    type Words: Copy;
    /// Sums of a run.
    type Partial: Copy;

    /// The state of a job with this table of codes.
    fn state(level: L, table: &[i8; 16]) -> Self::State;
    /// # Safety
    /// `step` must point to the first word of the first of the rows, in a step.
    unsafe fn load(level: L, step: *const u8) -> Self::Words;
    /// Columns `4·QUAD` to `4·QUAD + 3` of a step, one to a byte.
    fn unpack<const QUAD: u32>(level: L, state: Self::State, words: Self::Words) -> L::Codes;
    /// What a run that follows `sums` starts with.
    fn open(level: L, sums: L::Sums) -> Self::Partial;
    /// Adds the products with some groups of four columns of x.
    fn multiply<const QUADS: usize>(
        level: L,
        partial: Self::Partial,
        codes: [L::Codes; QUADS],
        x: [u32; QUADS],
    ) -> Self::Partial;
    /// `sums` and the run that was opened with them.
    fn close(level: L, sums: L::Sums, partial: Self::Partial) -> L::Sums;
}

/// How codes of `bits` bits are loaded.
macro_rules! words {
    ($bits:literal) => {
        const BYTES: usize = CodeFields::of_bytes($bits).step_bytes();
        const QUADS: usize = CodeFields::of_bytes($bits).codes();
        type Words = [L::Codes; CodeFields::of_bytes($bits).words()];

        #[inline(always)]
        unsafe fn load(level: L, step: *const u8) -> Self::Words {
            // SAFETY: the words of a row are as many bytes apart as those of the other rows take.
            unsafe {
                let mut words = [level.load_codes(step); _];
                for word in 1..words.len() {
                    words[word] = level.load_codes(step.add(word * 4 * LANES));
                }
                words
            }
        }
    };
}

/// Codes that stand for themselves, unsigned.
macro_rules! unsigned {
    ($bits:literal) => {
        words!($bits);

        const CENTRE: i32 = 1 << ($bits - 1);
        type State = ();

        #[inline(always)]
        fn state(_: L, _: &[i8; 16]) {}

        #[inline(always)]
        fn unpack<const QUAD: u32>(level: L, (): (), words: Self::Words) -> L::Codes {
            let pieces = const { CodeFields::of_bytes($bits).pieces(QUAD as usize) };
            let first = pieces.get(0);
            let mut codes = level.masked_bytes(words[first.word], first.shift, first.mask as u8);
            for index in 1..pieces.count() {
                let piece = pieces.get(index);
                codes = level.or_bytes(codes, level.masked_bytes(words[piece.word], piece.shift, piece.mask as u8));
            }
            codes
        }
    };
}

/// Products of unsigned codes that are so small that partial sums hold eight of four columns and more.
macro_rules! multiplied_in_runs {
    ($bits:literal) => {
        // Whole groups of eight: loops over them are written out.
        const RUN: usize = L::RUN_LIMIT / ((1 << $bits) - 1) / 8 * 8;
        const IN_PAIRS: bool = false;
        type Partial = L::Partial;

        #[inline(always)]
        fn open(level: L, sums: L::Sums) -> L::Partial {
            level.open(sums)
        }

        #[inline(always)]
        fn multiply<const QUADS: usize>(
            level: L,
            mut partial: L::Partial,
            codes: [L::Codes; QUADS],
            x: [u32; QUADS],
        ) -> L::Partial {
            for quad in 0..QUADS {
                partial = level.multiply_fields(partial, codes[quad], x[quad]);
            }
            partial
        }

        #[inline(always)]
        fn close(level: L, sums: L::Sums, partial: L::Partial) -> L::Sums {
            level.close(sums, partial)
        }
    };
}

/// Products of unsigned codes of which partial sums hold two of four columns.
macro_rules! multiplied_in_pairs {
    ($bits:literal) => {
        const RUN: usize = usize::MAX;
        const IN_PAIRS: bool = true;
        type Partial = L::Sums;

        #[inline(always)]
        fn open(_: L, sums: L::Sums) -> L::Sums {
            sums
        }

        #[inline(always)]
        fn multiply<const QUADS: usize>(level: L, sums: L::Sums, codes: [L::Codes; QUADS], x: [u32; QUADS]) -> L::Sums {
            const { assert!(QUADS * ((1 << $bits) - 1) <= L::RUN_LIMIT) };
            let mut partial = level.open(sums);
            for quad in 0..QUADS {
                partial = level.multiply_fields(partial, codes[quad], x[quad]);
            }
            level.close(sums, partial)
        }

        #[inline(always)]
        fn close(_: L, _: L::Sums, partial: L::Sums) -> L::Sums {
            partial
        }
    };
}

/// Products of centred bytes.
macro_rules! multiplied_as_bytes {
    () => {
        const RUN: usize = usize::MAX;
        const IN_PAIRS: bool = false;
        const CENTRE: i32 = L::BYTE_CENTRE;
        type Partial = L::Sums;

        #[inline(always)]
        fn open(_: L, sums: L::Sums) -> L::Sums {
            sums
        }

        #[inline(always)]
        fn multiply<const QUADS: usize>(
            level: L,
            mut sums: L::Sums,
            codes: [L::Codes; QUADS],
            x: [u32; QUADS],
        ) -> L::Sums {
            for quad in 0..QUADS {
                sums = level.multiply_bytes(sums, codes[quad], x[quad]);
            }
            sums
        }

        #[inline(always)]
        fn close(_: L, _: L::Sums, partial: L::Sums) -> L::Sums {
            partial
        }
    };
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<2> {
    unsigned!(2);
    multiplied_in_runs!(2);
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<3> {
    unsigned!(3);
    multiplied_in_runs!(3);
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<4> {
    unsigned!(4);
    multiplied_in_runs!(4);
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<5> {
    unsigned!(5);
    multiplied_in_pairs!(5);
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<6> {
    unsigned!(6);
    multiplied_in_pairs!(6);
}

impl<L: IntegerLevel> IntegerEncoding<L> for Bits<8> {
    words!(8);
    multiplied_as_bytes!();
    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[i8; 16]) {}

    #[inline(always)]
    fn unpack<const QUAD: u32>(level: L, (): (), [word]: Self::Words) -> L::Codes {
        level.bytes(word)
    }
}

impl<L: IntegerLevel> IntegerEncoding<L> for Table4 {
    words!(4);
    multiplied_as_bytes!();
    type State = L::Codes;

    #[inline(always)]
    fn state(level: L, table: &[i8; 16]) -> L::Codes {
        level.byte_table(table)
    }

    #[inline(always)]
    fn unpack<const QUAD: u32>(level: L, table: L::Codes, words: Self::Words) -> L::Codes {
        level.look_up(table, <Bits<4> as IntegerEncoding<L>>::unpack::<QUAD>(level, (), words))
    }
}
