use super::vector::Scalar;
use crate::integer_level::IntegerLevel;

const ROWS: usize = 8;

impl IntegerLevel for Scalar {
    type Codes = [u32; ROWS];
    type Partial = [i32; ROWS];
    type Sums = [i32; ROWS];
    type Floats = [f32; ROWS];
    const ROWS: usize = ROWS;
    // Four products of up to 127 · 255 are added to an i32.
    const RUN_LIMIT: usize = i32::MAX as usize / (4 * 127);
    const SUMS_UNDER_WAY: usize = 1;
    const BYTE_CENTRE: i32 = 128;

    #[inline(always)]
    unsafe fn load_codes(self, words: *const u8) -> [u32; ROWS] {
        // SAFETY: the caller's pointer reaches as many words.
        unsafe { words.cast::<[u32; ROWS]>().read_unaligned() }.map(u32::from_le)
    }

    #[inline(always)]
    unsafe fn store_codes(self, codes: [u32; ROWS], out: *mut u8) {
        // SAFETY: the caller's pointer has room for as many words.
        unsafe { out.cast::<[u32; ROWS]>().write_unaligned(codes.map(u32::to_le)) }
    }

    #[inline(always)]
    fn masked_bytes(self, words: [u32; ROWS], shift: u32, mask: u8) -> [u32; ROWS] {
        let mask = u32::from(mask) * 0x0101_0101;
        words.map(|word| word >> shift & mask)
    }

    #[inline(always)]
    fn or_bytes(self, a: [u32; ROWS], b: [u32; ROWS]) -> [u32; ROWS] {
        std::array::from_fn(|row| a[row] | b[row])
    }

    #[inline(always)]
    fn bytes(self, words: [u32; ROWS]) -> [u32; ROWS] {
        words
    }

    /// The sixteen values plus 128, four to a word.
    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> [u32; ROWS] {
        let mut table = [0; ROWS];
        for (word, values) in table.iter_mut().zip(values.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(values.map(|value| (value as u8) ^ 0x80));
        }
        table
    }

    #[inline(always)]
    fn look_up(self, table: [u32; ROWS], fields: [u32; ROWS]) -> [u32; ROWS] {
        let value = |field: u8| (table[usize::from(field / 4)] >> (field % 4 * 8)) as u8;
        fields.map(|fields| u32::from_le_bytes(fields.to_le_bytes().map(value)))
    }

    #[inline(always)]
    fn splat_sum(self, value: i32) -> [i32; ROWS] {
        [value; ROWS]
    }

    #[inline(always)]
    fn add_sums(self, a: [i32; ROWS], b: [i32; ROWS]) -> [i32; ROWS] {
        std::array::from_fn(|row| a[row] + b[row])
    }

    #[inline(always)]
    fn open(self, sums: [i32; ROWS]) -> [i32; ROWS] {
        sums
    }

    #[inline(always)]
    fn multiply_fields(self, partial: [i32; ROWS], codes: [u32; ROWS], x: u32) -> [i32; ROWS] {
        self.multiply_bytes(partial, codes, x)
    }

    #[inline(always)]
    fn close(self, _: [i32; ROWS], partial: [i32; ROWS]) -> [i32; ROWS] {
        partial
    }

    #[inline(always)]
    fn multiply_bytes(self, mut sums: [i32; ROWS], bytes: [u32; ROWS], x: u32) -> [i32; ROWS] {
        // Codes are little-endian; a word of x is read as its four columns lie in memory.
        let x = x.to_ne_bytes().map(|x| i32::from(x as i8));
        for (sum, word) in sums.iter_mut().zip(bytes) {
            let codes = word.to_le_bytes().map(i32::from);
            *sum += codes[0] * x[0] + codes[1] * x[1] + codes[2] * x[2] + codes[3] * x[3];
        }
        sums
    }

    #[inline(always)]
    fn floats(self, sums: [i32; ROWS]) -> [f32; ROWS] {
        sums.map(|sum| sum as f32)
    }

    #[inline(always)]
    unsafe fn subtract(self, mut values: [f32; ROWS], zero_points: *const f32, x_sum: f32) -> [f32; ROWS] {
        for (row, value) in values.iter_mut().enumerate() {
            // SAFETY: the caller's pointer reaches as many values.
            *value -= unsafe { *zero_points.add(row) } * x_sum;
        }
        values
    }

    #[inline(always)]
    unsafe fn add_scaled(self, values: [f32; ROWS], scales: *const f32, x_scale: f32, totals: *mut f32) {
        for (row, value) in values.into_iter().enumerate() {
            // SAFETY: the caller's pointers reach as many values.
            unsafe { *totals.add(row) = value.mul_add(*scales.add(row) * x_scale, *totals.add(row)) }
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32) {
        for row in 0..ROWS {
            // SAFETY: the caller's pointers reach as many values.
            unsafe { *totals.add(row) = (*values.add(row)).mul_add(factor, *totals.add(row)) }
        }
    }
}
