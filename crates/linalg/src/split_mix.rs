/// SplitMix64 (Steele, Lea and Flood 2014): the same numbers for a seed on every machine.
#[derive(Clone, Debug)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// A generator with that seed.
    pub fn new(seed: u64) -> Self {
        SplitMix64 { state: seed }
    }

    /// The generator of `seed` after `count` numbers: any place of the sequence without the numbers before it.
    pub fn at(seed: u64, count: u64) -> Self {
        SplitMix64 { state: seed.wrapping_add(Self::STEP.wrapping_mul(count)) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(Self::STEP);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly spread in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_the_published_one_from_any_place() {
        let published = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        let mut random = SplitMix64::new(1_234_567);
        for (count, expected) in published.into_iter().enumerate() {
            assert_eq!(random.bits(), expected);
            assert_eq!(SplitMix64::at(1_234_567, count as u64).bits(), expected);
        }
    }
}
