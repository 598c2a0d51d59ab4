use std::marker::PhantomData;

use crate::vector::{LANES, Level, Vector};

/// How the columns of 32 rows lie in a panel.
///
/// Columns come in pairs. In a 32-bit word of codes the lower half holds the even columns and the upper half the odd
/// ones, lowest first: a shift of half words then leaves a pair of neighbours in place.
pub(crate) trait Encoding<L: Level> {
    /// Columns of a step, a multiple of 4.
    const COLUMNS: usize;
    /// Bytes of a step of one panel.
    const BYTES: usize;
    /// What stays in registers from step to step.
    type State: Copy;

    /// The state of a job with this table of codes.
    fn state(level: L, table: &[f32; 16]) -> Self::State;

    /// Columns `2·PAIR` and `2·PAIR + 1` of the step. Integer codes come centred: minus half their
    /// range.
    ///
    /// # Safety
    /// `step` must point to the bytes of a step.
    unsafe fn pair<const PAIR: u32>(level: L, state: Self::State, step: *const u8) -> (L::Vector, L::Vector);
}

/// Codes of 2 bits, sixteen columns per word.
pub(crate) struct Bits2;
/// Codes of 4 bits, eight columns per word; codes of 3 bits plus 4.
pub(crate) struct Bits4;
/// Codes of 4 bits that stand for the values of a table, eight columns per word.
pub(crate) struct Table4;
/// Codes of 8 bits, four columns per word; narrower ones moved to the middle.
pub(crate) struct Bits8;
/// bfloat16, two columns per word.
pub(crate) struct Bf16;
/// binary16, column by column.
pub(crate) struct F16;
/// binary32, column by column.
pub(crate) struct F32;

impl<L: Level> Encoding<L> for Bits2 {
    const COLUMNS: usize = 16;
    const BYTES: usize = 4 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is 32 words.
        level.bits2_pair::<PAIR>(level.load_words(unsafe { &*step.cast() }))
    }
}

impl<L: Level> Encoding<L> for Bits4 {
    const COLUMNS: usize = 8;
    const BYTES: usize = 4 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is 32 words.
        level.bits4_pair::<PAIR>(level.load_words(unsafe { &*step.cast() }))
    }
}

impl<L: Level> Encoding<L> for Table4 {
    const COLUMNS: usize = 8;
    const BYTES: usize = 4 * LANES;
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

impl<L: Level> Encoding<L> for Bits8 {
    const COLUMNS: usize = 4;
    const BYTES: usize = 4 * LANES;

    type State = ();

    #[inline(always)]
    fn state(_: L, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn pair<const PAIR: u32>(level: L, (): (), step: *const u8) -> (L::Vector, L::Vector) {
        // SAFETY: a step is 32 words.
        level.bits8_pair::<PAIR>(level.load_words(unsafe { &*step.cast() }))
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
        // SAFETY: as the caller promises. Written out, because shifts by a constant need a constant pair.
        unsafe {
            multiply::<L, E, 0, ROWS, PANELS>(level, state, panels, x, sums);
            multiply::<L, E, 1, ROWS, PANELS>(level, state, panels, x, sums);
            if E::COLUMNS > 4 {
                multiply::<L, E, 2, ROWS, PANELS>(level, state, panels, x, sums);
                multiply::<L, E, 3, ROWS, PANELS>(level, state, panels, x, sums);
            }
            if E::COLUMNS > 8 {
                multiply::<L, E, 4, ROWS, PANELS>(level, state, panels, x, sums);
                multiply::<L, E, 5, ROWS, PANELS>(level, state, panels, x, sums);
                multiply::<L, E, 6, ROWS, PANELS>(level, state, panels, x, sums);
                multiply::<L, E, 7, ROWS, PANELS>(level, state, panels, x, sums);
            }
        }
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
