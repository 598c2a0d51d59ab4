use crate::vector::Level;

/// What products of int8 activations with codes need of a CPU level, a register at a time.
///
/// A register holds a word of each of `ROWS` rows of a panel: codes as they are stored, or four columns unpacked to
/// a byte each. Four columns of x lie in a word as i8 from −127 to 127, in the same order.
pub(crate) trait IntegerLevel: Level {
    /// Words of `ROWS` rows.
    type Codes: Copy;
    /// Sums of the products of a short run of columns, perhaps narrower than i32.
    type Partial: Copy;
    /// Sums of the products of a block, i32.
    type Sums: Copy;
    /// f32 for each row of a register.
    type Floats: Copy;
    /// Rows of a register; those of a panel are a multiple.
    const ROWS: usize;
    /// How large the sum of the largest code of each step of four columns may be in a run.
    const RUN_LIMIT: usize;
    /// How many sums must grow side by side to keep the multipliers busy.
    const SUMS_UNDER_WAY: usize;
    /// Whether steps and registers are written out one after another. Compilers unroll loops over them where they know
    /// the instructions, but take `asm!` for long.
    const WRITTEN_OUT: bool = false;
    /// What [`bytes`](Self::bytes) and [`look_up`](Self::look_up) add to the number that they stand for.
    const BYTE_CENTRE: i32;

    /// # Safety
    /// `words` must point to a word of each row, little-endian, of any alignment.
    unsafe fn load_codes(self, words: *const u8) -> Self::Codes;
    /// # Safety
    /// `out` must have room for a word of each row.
    unsafe fn store_codes(self, codes: Self::Codes, out: *mut u8);
    /// Each byte shifted to the right by `shift`, and of it the bits of `mask` alone. Those that come from another byte
    /// must not be among them.
    fn masked_bytes(self, words: Self::Codes, shift: u32, mask: u8) -> Self::Codes;
    fn or_bytes(self, a: Self::Codes, b: Self::Codes) -> Self::Codes;
    /// Codes of 8 bits, centred as [`multiply_bytes`](Self::multiply_bytes) takes them.
    fn bytes(self, words: Self::Codes) -> Self::Codes;
    /// What codes of 4 bits stand for, in a register.
    fn byte_table(self, values: &[i8; 16]) -> Self::Codes;
    /// The values of fields of 4 bits, centred as [`multiply_bytes`](Self::multiply_bytes) takes them.
    fn look_up(self, table: Self::Codes, fields: Self::Codes) -> Self::Codes;

    fn splat_sum(self, value: i32) -> Self::Sums;
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// What a run that follows `sums` starts with.
    fn open(self, sums: Self::Sums) -> Self::Partial;
    /// The products of unsigned codes up to 63 with four columns of x.
    fn multiply_fields(self, partial: Self::Partial, codes: Self::Codes, x: u32) -> Self::Partial;
    /// `sums` and the run that was opened with them.
    fn close(self, sums: Self::Sums, partial: Self::Partial) -> Self::Sums;
    /// The products of bytes with four columns of x.
    fn multiply_bytes(self, sums: Self::Sums, bytes: Self::Codes, x: u32) -> Self::Sums;

    /// Sums as f32, exact below 2^24.
    fn floats(self, sums: Self::Sums) -> Self::Floats;
    /// `values − zero_points · x_sum`, exact below 2^24.
    ///
    /// # Safety
    /// `zero_points` must point to a value for each row.
    unsafe fn subtract(self, values: Self::Floats, zero_points: *const f32, x_sum: f32) -> Self::Floats;
    /// `totals += values · (scales · x_scale)`, with one rounding for the product of the scales and one for the sum:
    /// the same bits at every level.
    ///
    /// # Safety
    /// `scales` and `totals` must point to a value for each row.
    unsafe fn add_scaled(self, values: Self::Floats, scales: *const f32, x_scale: f32, totals: *mut f32);
    /// `totals += values · factor`, with one rounding.
    ///
    /// # Safety
    /// `values` and `totals` must point to a value for each row.
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32);
}
