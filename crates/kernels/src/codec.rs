use std::marker::PhantomData;

use crate::code_fields::CodeFields;
use crate::kernel_table::written_out;
use crate::vector::{LANES, Level, Vector};

/// How the columns of 32 rows lie in a panel.
///
/// Columns come in pairs. In a 32-bit word of codes the lower half holds the even columns and the upper half the odd
/// ones, as [`CodeFields`] tells: a shift of half words then leaves a pair of neighbours in place.
pub(crate) trait Encoding<L: Level> {
    /// Columns of a step, a multiple of 4.
    const COLUMNS: usize;
    /// Bytes of a step of one panel.
    const BYTES: usize;
    /// What stays in registers from step to step.
    type State: Copy;

    /// The state of a job with this table of codes.
    fn state(level: L, table: &[f32; 16]) -> Self::State;

    /// Columns `2·PAIR` and `2·PAIR + 1` of the step. Codes that stand for themselves are stored and come centred:
    /// minus half their range.
    ///
    /// # Safety
    /// `step` must point to the bytes of a step.
    unsafe fn pair<const PAIR: u32>(level: L, state: Self::State, step: *const u8) -> (L::Vector, L::Vector);
}

/// Codes of `BITS` bits, from which half their range is subtracted where products are in f32: two's complements.
pub(crate) struct Bits<const BITS: u32>;
/// Codes of 4 bits that stand for the values of a table, eight columns per word.
pub(crate) struct Table4;
/// bfloat16, two columns per word.
pub(crate) struct Bf16;
/// binary16, column by column.
pub(crate) struct F16;
/// binary32, column by column.
pub(crate) struct F32;

impl<L: Level, const BITS: u32> Encoding<L> for Bits<BITS> {
    const COLUMNS: usize = CodeFields::of_halves(BITS).columns();
    const BYTES: usize = CodeFields::of_halves(BITS).step_bytes();

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: as the caller promises.
        let (words, position) = unsafe { code_words::<L, BITS, PAIR>(level, step) };
        level.field_pair::<BITS>(words, position)
    }
}

/// Words with the codes of columns `2·PAIR` and `2·PAIR + 1` at the same position of both halves, and that position:
/// where they are put together it is as high as can be, which at the top saves the upper half a shift.
///
/// # Safety
/// `step` must point to the bytes of a step of [`Bits`].
#[inline(always)]
pub(crate) unsafe fn code_words<L: Level, const BITS: u32, const PAIR: u32>(
    level: L,
    step: *const u8,
) -> (L::Words, u32) {
    #[inline(always)]
    unsafe fn load<L: Level>(level: L, step: *const u8, word: usize) -> L::Words {
        // SAFETY: the caller's step has that many times 32 words.
        level.load_words(unsafe { &*step.add(word * 4 * LANES).cast() })
    }
    let pieces = const { CodeFields::of_halves(BITS).pieces(PAIR as usize) };
    let position = const { CodeFields::of_halves(BITS).pieces(PAIR as usize).least_shift() };
    let first = pieces.get(0);
    // SAFETY: as the caller promises.
    unsafe {
        let mut words = load(level, step, first.word);
        if pieces.count() == 1 {
            return (words, first.shift);
        }
        words = level.masked(words, first.shift - position, first.mask << position);
        for index in 1..pieces.count() {
            let piece = pieces.get(index);
            let more = level.masked(load(level, step, piece.word), piece.shift - position, piece.mask << position);
            words = level.or(words, more);
        }
        (words, position)
    }
}

impl<L: Level> Encoding<L> for Table4 {
    const COLUMNS: usize = CodeFields::of_halves(4).columns();
    const BYTES: usize = CodeFields::of_halves(4).step_bytes();
    type State = L::Table;

    #[inline(always)]
    fn state(level: L, table: &[f32; 16]) -> L::Table {
        level.table(table)
    }

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, table: L::Table, step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is 32 words.
        level.table4_pair::<PAIR>(table, level.load_words(unsafe { &*step.cast() }))
    }
}

impl<L: Level> Encoding<L> for Bf16 {
    const COLUMNS: usize = 4;
    const BYTES: usize = 8 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is twice 32 words.
        level.bf16_pair(level.load_words(unsafe { &*step.add(4 * LANES * PAIR as usize).cast() }))
    }
}

impl<L: Level> Encoding<L> for F16 {
    const COLUMNS: usize = 4;
    const BYTES: usize = 8 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is four times 32 halves.
        unsafe {
            let pair = step.add(4 * LANES * PAIR as usize);
            (level.load_f16(&*pair.cast()), level.load_f16(&*pair.add(2 * LANES).cast()))
        }
    }
}

impl<L: Level> Encoding<L> for F32 {
    const COLUMNS: usize = 4;
    const BYTES: usize = 16 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is four times 32 words.
        unsafe {
            let pair = step.add(8 * LANES * PAIR as usize);
            (level.f32s(level.load_words(&*pair.cast())), level.f32s(level.load_words(&*pair.add(4 * LANES).cast())))
        }
    }
}

/// An encoding together with the arithmetic of its products.
pub(crate) trait Codec {
    type Level: Level;
    /// Bytes of a step of one panel.
    const BYTES: usize;
    /// 32-bit words of a row of x that a step consumes.
    const X_WORDS: usize;
    /// What stays in registers from step to step.
    type State: Copy;

    /// The state of a job with this table of codes.
    fn state(level: Self::Level, table: &[f32; 16]) -> Self::State;

    /// Adds the products of one step with each row of x to `sums`, in column order.
    ///
    /// # Safety
    /// The CPU must have the instructions; each of `panels` must point to a step, each of `x` to the words of one.
    unsafe fn step<const ROWS: usize, const PANELS: usize>(
        level: Self::Level,
        state: Self::State,
        panels: [*const u8; PANELS],
        x: [*const u32; ROWS],
        sums: &mut [[<Self::Level as Level>::Vector; PANELS]; ROWS],
    );
}

/// Products in f32: x is f32.
pub(crate) struct F32Products<L, E>(PhantomData<(L, E)>);

impl<L: Level, E: Encoding<L>> Codec for F32Products<L, E> {
    type Level = L;
    const BYTES: usize = E::BYTES;
    const X_WORDS: usize = E::COLUMNS;
    type State = E::State;

    #[inline(always)]
    fn state(level: L, table: &[f32; 16]) -> E::State {
        E::state(level, table)
    }

    #[inline(always)]
    unsafe fn step<const ROWS: usize, const PANELS: usize>(
        level: L,
        state: E::State,
        panels: [*const u8; PANELS],
        x: [*const u32; ROWS],
        sums: &mut [[L::Vector; PANELS]; ROWS],
    ) {
        // Written out, because shifts by a constant need a constant pair.
        written_out!(PAIR < E::COLUMNS / 2 => {
            // SAFETY: as the caller promises.
            unsafe { multiply::<L, E, PAIR, ROWS, PANELS>(level, state, panels, x, sums) }
        });
    }
}

#[inline(always)]
unsafe fn multiply<L: Level, E: Encoding<L>, const PAIR: u32, const ROWS: usize, const PANELS: usize>(
    level: L,
    state: E::State,
    panels: [*const u8; PANELS],
    x: [*const u32; ROWS],
    sums: &mut [[L::Vector; PANELS]; ROWS],
) {
    let column = 2 * PAIR as usize;
    for panel in 0..PANELS {
        // SAFETY: as the caller of `step` promises.
        let (even, odd) = unsafe { E::pair::<PAIR>(level, state, panels[panel]) };
        for row in 0..ROWS {
            // SAFETY: as the caller of `step` promises.
            let (first, second) =
                unsafe { (f32::from_bits(*x[row].add(column)), f32::from_bits(*x[row].add(column + 1))) };
            let sum = even.mul_add(level.splat(first), sums[row][panel]);
            sums[row][panel] = odd.mul_add(level.splat(second), sum);
        }
    }
}
