/// Number of 32-bit words that `count` codes of `bits` bits take, packed densely.
pub const fn packed_words(count: usize, bits: u8) -> usize {
    (count * bits as usize).div_ceil(32)
}

/// Packs codes of `bits` bits (1–8) into little-endian words, lowest bits first, without gaps: code `i` starts at
/// bit `i·bits` and may straddle two words (the dense order of compressed-tensors).
///
/// `words` must hold [`packed_words`]`(codes.len(), bits)` words; it is overwritten.
///
/// # Panics
/// When `words` is too short or `bits` is not 1–8.
pub fn pack_codes(codes: &[u8], bits: u8, words: &mut [u32]) {
    assert!((1..=8).contains(&bits), "codes have 1 to 8 bits");
    let words = &mut words[..packed_words(codes.len(), bits)];
    match bits {
        2 => return pack_whole::<2>(codes, words),
        4 => return pack_whole::<4>(codes, words),
        8 => return pack_whole::<8>(codes, words),
        _ => words.fill(0),
    }
    for (i, &code) in codes.iter().enumerate() {
        debug_assert!(u32::from(code) < 1 << bits);
        let position = i * bits as usize;
        let shifted = u64::from(code) << (position % 32);
        words[position / 32] |= shifted as u32;
        if shifted >> 32 != 0 {
            words[position / 32 + 1] |= (shifted >> 32) as u32;
        }
    }
}

/// The inverse of [`pack_codes`]: fills `codes` from `words`.
///
/// # Panics
/// When `words` is too short or `bits` is not 1–8.
pub fn unpack_codes(words: &[u32], bits: u8, codes: &mut [u8]) {
    assert!((1..=8).contains(&bits), "codes have 1 to 8 bits");
    assert!(words.len() >= packed_words(codes.len(), bits), "too few words for the codes");
    match bits {
        2 => return unpack_whole::<2>(words, codes),
        4 => return unpack_whole::<4>(words, codes),
        8 => return unpack_whole::<8>(words, codes),
        _ => {}
    }
    let mask = (1u64 << bits) - 1;
    for (i, code) in codes.iter_mut().enumerate() {
        let position = i * bits as usize;
        let low = u64::from(words[position / 32]);
        let high = words.get(position / 32 + 1).copied().map_or(0, u64::from);
        *code = (((high << 32 | low) >> (position % 32)) & mask) as u8;
    }
}

/// [`pack_codes`] at a width that divides the word, so that a loop over whole words becomes vector code.
fn pack_whole<const BITS: usize>(codes: &[u8], words: &mut [u32]) {
    for (codes, word) in codes.chunks(32 / BITS).zip(words) {
        *word = codes.iter().enumerate().fold(0, |word, (i, &code)| {
            debug_assert!(u32::from(code) < 1 << BITS);
            word | u32::from(code) << (i * BITS)
        });
    }
}

/// The inverse of [`pack_whole`].
fn unpack_whole<const BITS: usize>(words: &[u32], codes: &mut [u8]) {
    let mask = ((1u32 << BITS) - 1) as u8;
    for (codes, &word) in codes.chunks_mut(32 / BITS).zip(words) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (word >> (i * BITS)) as u8 & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_at_every_width_and_ragged_count() {
        for bits in 1..=8u8 {
            for count in [0usize, 1, 7, 10, 11, 31, 32, 33, 64, 97] {
                let codes: Vec<u8> =
                    (0..count).map(|i| ((i * 37 + 11) % 256) as u8 & (((1u16 << bits) - 1) as u8)).collect();
                let mut words = vec![u32::MAX; packed_words(count, bits)];
                pack_codes(&codes, bits, &mut words);
                let mut back = vec![0; count];
                unpack_codes(&words, bits, &mut back);
                assert_eq!(back, codes, "{bits} bits, {count} codes");
            }
        }
    }

    #[test]
    fn four_bit_order_is_lowest_nibble_first() {
        let mut words = [0; 1];
        pack_codes(&[1, 2, 3, 4, 5, 6, 7, 8], 4, &mut words);
        assert_eq!(words, [0x8765_4321]);
    }

    #[test]
    fn three_bit_codes_straddle_words() {
        let mut words = [0; 2];
        let codes: Vec<u8> = (0..12).map(|i| i % 8).collect();
        pack_codes(&codes, 3, &mut words);
        // Code 10 (value 2 = 0b010) starts at bit 30: two bits in word 0, one in word 1.
        assert_eq!(words[0] >> 30, 0b10);
        assert_eq!(words[1] & 0b1, 0);
        assert_eq!(words[1] >> 1 & 0b111, 3);
    }
}
