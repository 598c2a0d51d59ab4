use crate::vector::LANES;

/// Where the codes of a step lie in its words.
///
/// A word is cut into units: its four bytes in panels of products in int8, its two halves in the others. Column `c` of
/// a step is code `c / units` of unit `c % units`. A unit holds as many whole codes as it has room for, the first in
/// its lowest bits. What is left at its top is less than a code, and is put together with what is left of the same unit
/// in the other words of the step: the last codes consist of these bits, from the top down. So no bit is lost, and most
/// codes are a shift and a mask away. Codes of 3 and of 6 bits in bytes, from the highest bit to the lowest:
///
/// ```text
///          3 bits, 32 columns     6 bits, 16 columns
/// word 0   6 6 1 1 1 0 0 0        3 3 0 0 0 0 0 0
/// word 1   6 7 3 3 3 2 2 2        3 3 1 1 1 1 1 1
/// word 2   7 7 5 5 5 4 4 4        3 3 2 2 2 2 2 2
/// ```
#[derive(Clone, Copy)]
pub(crate) struct CodeFields {
    bits: u32,
    /// Bits of a unit.
    unit: u32,
}

/// Bits of a code that lie side by side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// The word of the step.
    pub(crate) word: usize,
    /// How much higher the bits are in their unit than in the code.
    pub(crate) shift: u32,
    /// The bits of the code.
    pub(crate) mask: u32,
}

/// The pieces of a code, of which whole codes have one.
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    list: [Piece; Self::MOST],
    count: usize,
}

impl CodeFields {
    /// Most words of a step of any width.
    pub(crate) const MOST_WORDS: usize = 5;
    /// Most columns of a step of any width.
    pub(crate) const MOST_COLUMNS: usize = 32;

    /// Codes of `bits` bits in bytes.
    pub(crate) const fn of_bytes(bits: u32) -> Self {
        CodeFields { bits, unit: 8 }
    }

    /// Codes of `bits` bits in half words.
    pub(crate) const fn of_halves(bits: u32) -> Self {
        CodeFields { bits, unit: 16 }
    }

    /// Words of a step of a row: as few as whole codes fill.
    pub(crate) const fn words(self) -> usize {
        (self.bits >> self.bits.trailing_zeros()) as usize
    }

    /// Bytes of a step of a panel.
    pub(crate) const fn step_bytes(self) -> usize {
        self.words() * 4 * LANES
    }

    /// Columns of a step.
    pub(crate) const fn columns(self) -> usize {
        self.words() * 32 / self.bits as usize
    }

    /// Codes of a unit in a step.
    pub(crate) const fn codes(self) -> usize {
        self.columns() / self.units()
    }

    /// Units of a word.
    pub(crate) const fn units(self) -> usize {
        (32 / self.unit) as usize
    }

    /// Bits of a unit.
    pub(crate) const fn unit_bits(self) -> u32 {
        self.unit
    }

    /// Where a code lies. That of a code beyond the last means nothing.
    pub(crate) const fn pieces(self, code: usize) -> Pieces {
        let (whole, left) = ((self.unit / self.bits) as usize, self.unit % self.bits);
        let mut pieces = Pieces { list: [Piece { word: 0, shift: 0, mask: 0 }; Pieces::MOST], count: 0 };
        if code < whole * self.words() || left == 0 {
            let shift = (code % whole) as u32 * self.bits;
            pieces.list[0] = Piece { word: code / whole, shift, mask: (1 << self.bits) - 1 };
            pieces.count = 1;
            return pieces;
        }
        // From the top down, among the bits that are left of the words, one word after another.
        let mut at = (code - whole * self.words()) as u32 * self.bits;
        let mut open = self.bits;
        while open > 0 {
            let of_word = at % left;
            let count = if left - of_word < open { left - of_word } else { open };
            open -= count;
            let shift = self.unit - of_word - count - open;
            pieces.list[pieces.count] = Piece { word: (at / left) as usize, shift, mask: ((1 << count) - 1) << open };
            pieces.count += 1;
            at += count;
        }
        pieces
    }
}

impl Pieces {
    /// Most pieces of any code.
    const MOST: usize = 5;

    /// How many there are.
    pub(crate) const fn count(self) -> usize {
        self.count
    }

    /// How far all of them can go to the right together.
    pub(crate) const fn least_shift(self) -> u32 {
        let (mut least, mut index) = (self.list[0].shift, 1);
        while index < self.count {
            if self.list[index].shift < least {
                least = self.list[index].shift;
            }
            index += 1;
        }
        least
    }

    /// One of them.
    #[inline(always)]
    pub(crate) const fn get(self, index: usize) -> Piece {
        self.list[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTHS: [u32; 6] = [2, 3, 4, 5, 6, 8];

    #[test]
    fn every_bit_of_a_step_belongs_to_one_bit_of_one_code() {
        for fields in WIDTHS.map(CodeFields::of_bytes).into_iter().chain(WIDTHS.map(CodeFields::of_halves)) {
            let (bits, unit) = (fields.bits, fields.unit);
            let mut taken = vec![0u32; fields.words()];
            for code in 0..fields.codes() {
                let pieces = fields.pieces(code);
                let mut of_code = 0u32;
                for piece in (0..pieces.count()).map(|index| pieces.get(index)) {
                    assert_eq!(of_code & piece.mask, 0, "{bits} {unit} {piece:?}");
                    of_code |= piece.mask;
                    let in_unit = piece.mask << piece.shift;
                    assert_eq!(taken[piece.word] & in_unit, 0, "{bits} {unit}");
                    taken[piece.word] |= in_unit;
                }
                assert_eq!(of_code, (1 << bits) - 1, "{bits} {unit}");
                assert!(pieces.least_shift() + bits <= unit, "{bits} {unit}");
            }
            assert!(taken.iter().all(|&word| word == u32::MAX >> (32 - unit)), "{bits} {unit}");
            assert!(fields.words() <= CodeFields::MOST_WORDS && fields.columns() <= CodeFields::MOST_COLUMNS);
            assert_eq!(fields.columns() * bits as usize, 32 * fields.words());
        }
    }
}
