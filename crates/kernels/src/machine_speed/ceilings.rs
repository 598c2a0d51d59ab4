use std::hint::black_box;
use std::time::Instant;

use kintsugi_runtime::ThreadPool;

use crate::{Arithmetic, Kernels};

/// Calls of a loop for each thread that are measured together: so many that threads end at nearly the same time.
const CALLS: usize = 128;

/// Turns of a loop: some tens of microseconds, less than a scheduler gives a thread at a time.
pub(super) const TURNS: usize = 1 << 13;

/// Instructions of each kind in a turn: more than are under way at once, as many as there are registers for. Apple's
/// cores begin four in each cycle and take four cycles for each.
pub(super) const INDEPENDENT: usize = if cfg!(target_arch = "aarch64") { 24 } else { 12 };

/// What multiplications of floats and of integers in a loop come to, each of which is added to a sum.
pub(super) const F32_FACTORS: (f32, f32) = (0.5, 0.25);
pub(super) const INT8_FACTORS: (i8, i8) = (1, 3);

/// A loop that keeps the multipliers of a thread busy and does nothing else.
pub struct ArithmeticCeiling {
    arithmetic: Arithmetic,
    instructions: &'static str,
    operations: f64,
    /// Runs the loop and gives the sum of all that it has added up.
    run: fn() -> f64,
}

impl ArithmeticCeiling {
    /// Those of the level of `kernels`, one for each arithmetic that its CPU has instructions for.
    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        allow(unused_variables, reason = "only portable loops")
    )]
    pub fn of(kernels: &Kernels) -> Vec<ArithmeticCeiling> {
        #[cfg(target_arch = "x86_64")]
        let own = super::x86_loops::arithmetic_ceilings(kernels.level());
        #[cfg(target_arch = "aarch64")]
        let own = super::neon_loops::arithmetic_ceilings(kernels.level());
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let own: Option<Vec<ArithmeticCeiling>> = None;
        own.unwrap_or_else(Self::portable)
    }

    /// What compilers make of plain loops: 128 bits on every target.
    fn portable() -> Vec<ArithmeticCeiling> {
        vec![
            Self::new(Arithmetic::Int8, "portable 16-bit products and sums", 2 * PORTABLE_I16, portable_i16),
            Self::new(Arithmetic::F32, "portable f32 products and sums", 2 * PORTABLE_F32, portable_f32),
        ]
    }

    /// A loop of [`TURNS`] times [`INDEPENDENT`] instructions with so many operations each.
    pub(super) fn new(arithmetic: Arithmetic, instructions: &'static str, operations: usize, run: fn() -> f64) -> Self {
        ArithmeticCeiling { arithmetic, instructions, operations: (TURNS * INDEPENDENT * operations) as f64, run }
    }

    /// What is multiplied.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The instructions of the loop.
    pub fn instructions(&self) -> &'static str {
        self.instructions
    }

    /// Operations per second of all threads of the pool together: products and sums count one each.
    pub fn rate(&self, pool: &ThreadPool) -> f64 {
        let run = |_| {
            black_box((self.run)());
        };
        // Threads that sleep wake up before the clock starts.
        pool.for_each(pool.threads(), run);
        let calls = CALLS * pool.threads();
        let start = Instant::now();
        pool.for_each(calls, run);
        self.operations * calls as f64 / start.elapsed().as_secs_f64()
    }

    /// Operations per second of the calling thread in a single call of the loop, which a scheduler rarely interrupts.
    pub fn rate_of_one_call(&self) -> f64 {
        let start = Instant::now();
        black_box((self.run)());
        self.operations / start.elapsed().as_secs_f64()
    }
}

/// A loop that reads memory, piece by piece from the first byte to the last, and does nothing else. Products that ask for
/// what they read next can be a little faster.
pub struct ReadingCeiling {
    words: Vec<u64>,
}

impl ReadingCeiling {
    /// Words of a task: as many bytes as those of a product have.
    const PIECE: usize = (256 << 10) / size_of::<u64>();

    /// A loop over that many bytes, rounded up to whole tasks.
    pub fn new(bytes: usize) -> Self {
        ReadingCeiling { words: vec![1; bytes.div_ceil(Self::PIECE * size_of::<u64>()).max(1) * Self::PIECE] }
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice())
    }

    /// Bytes per second of all threads of the pool together, with the widest loads of this CPU.
    pub fn rate(&self, pool: &ThreadPool) -> f64 {
        pool.for_each(pool.threads(), |_| {
            black_box(self.sum_of(0));
        });
        let start = Instant::now();
        pool.for_each(self.words.len() / Self::PIECE, |piece| {
            black_box(self.sum_of(piece));
        });
        self.bytes() as f64 / start.elapsed().as_secs_f64()
    }

    /// Reads a piece and adds it up.
    fn sum_of(&self, piece: usize) -> u64 {
        let piece = &self.words[piece * Self::PIECE..][..Self::PIECE];
        #[cfg(target_arch = "x86_64")]
        if let Some(sum) = super::x86_loops::sum(piece) {
            return sum;
        }
        piece.iter().fold(0, |sum, value| sum.wrapping_add(*value))
    }
}

/// Lanes of a portable instruction, which a compiler makes of vectors of 128 bits.
const PORTABLE_I16: usize = 8;
const PORTABLE_F32: usize = 4;

/// Products of int8 fit into 16 bits. The sum is a factor, so that the product cannot be taken out of the loop.
fn portable_i16() -> f64 {
    let (a, b) = INT8_FACTORS;
    let (one, product) = black_box((1i16, i16::from(a) * i16::from(b)));
    let mut sums = black_box([0i16; PORTABLE_I16 * INDEPENDENT]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = sum.wrapping_mul(one).wrapping_add(product);
        }
    }
    sums.into_iter().map(f64::from).sum()
}

/// As [`portable_i16`].
fn portable_f32() -> f64 {
    let (a, b) = F32_FACTORS;
    let (one, product) = black_box((1.0f32, a * b));
    let mut sums = black_box([0.0f32; PORTABLE_F32 * INDEPENDENT]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = *sum * one + product;
        }
    }
    sums.into_iter().map(f64::from).sum()
}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::CpuLevel;

    use super::*;

    /// What a loop comes to that multiplies and adds as often as it says. All numbers in it are exact.
    fn expected(ceiling: &ArithmeticCeiling) -> f64 {
        let multiplications = ceiling.operations / 2.0;
        match ceiling.arithmetic() {
            // Lanes of 16 bits that start over; see `maddubs_avx2`.
            Arithmetic::Int8 if ceiling.instructions().starts_with("vpmaddubsw") => {
                let product = |a: i8, b: i8| i16::from(a) * i16::from(b);
                let lane = (0..TURNS).fold(0i16, |sum, _| {
                    let [low, high] = sum.to_le_bytes().map(u8::cast_signed);
                    product(3, low) + product(3, high) + 0x0303
                });
                f64::from(lane) * (16 * INDEPENDENT) as f64
            }
            Arithmetic::Int8 => multiplications * 3.0,
            Arithmetic::F32 | Arithmetic::Bf16 => multiplications * 0.125,
        }
    }

    #[test]
    fn loops_of_every_level_do_what_they_are_timed_for() {
        let pool = ThreadPool::with_threads(2);
        for level in CpuLevel::available() {
            let ceilings = ArithmeticCeiling::of(&Kernels::new(level).unwrap());
            for arithmetic in [Arithmetic::Int8, Arithmetic::F32] {
                let of_it: Vec<_> = ceilings.iter().filter(|ceiling| ceiling.arithmetic() == arithmetic).collect();
                assert_eq!(of_it.len(), 1, "{} in {arithmetic:?}", level.name());
            }
            for ceiling in &ceilings {
                assert_eq!((ceiling.run)(), expected(ceiling), "{} of {}", ceiling.instructions(), level.name());
                assert!(ceiling.rate_of_one_call().is_normal());
            }
            // One is enough: an emulated CPU takes long.
            assert!(ceilings[0].rate(&pool).is_normal());
        }
    }

    #[test]
    fn the_loop_that_reads_reads_every_word() {
        let mut reading = ReadingCeiling::new((256 << 10) + 1);
        assert_eq!(reading.bytes(), 512 << 10);
        reading.words.iter_mut().zip(1..).for_each(|(word, value)| *word = value);
        let count = reading.words.len() as u64;
        assert_eq!(reading.sum_of(0) + reading.sum_of(1), count * (count + 1) / 2);
        assert!(reading.rate(&ThreadPool::with_threads(2)).is_normal());
    }
}
