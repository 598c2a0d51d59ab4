use std::hint::black_box;
use std::time::Instant;

use kintsugi_runtime::ThreadPool;

use crate::{Arithmetic, Kernels};

/// Calls of a loop that are measured together.
const CALLS: usize = 256;

/// Turns of a loop: some tens of microseconds, less than a scheduler gives a thread at a time.
pub(super) const TURNS: usize = 1 << 13;

/// Instructions of each kind in a turn: more than are under way at once.
pub(super) const INDEPENDENT: usize = 12;

/// A loop that keeps the multipliers of a thread busy and does nothing else: no product of that arithmetic is faster.
pub struct ArithmeticCeiling {
    arithmetic: Arithmetic,
    instructions: &'static str,
    operations: f64,
    run: fn(),
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
    pub(super) fn new(arithmetic: Arithmetic, instructions: &'static str, operations: usize, run: fn()) -> Self {
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
        let start = Instant::now();
        pool.for_each(CALLS, |_| (self.run)());
        self.operations * CALLS as f64 / start.elapsed().as_secs_f64()
    }

    /// Operations per second of the calling thread in a single call of the loop, which a scheduler rarely interrupts.
    pub fn rate_of_one_call(&self) -> f64 {
        let start = Instant::now();
        (self.run)();
        self.operations / start.elapsed().as_secs_f64()
    }
}

/// A loop that only reads memory: no product gets its weights faster.
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
        let start = Instant::now();
        pool.for_each(self.words.len() / Self::PIECE, |piece| {
            let piece = &self.words[piece * Self::PIECE..][..Self::PIECE];
            #[cfg(target_arch = "x86_64")]
            if super::x86_loops::read(piece) {
                return;
            }
            black_box(piece.iter().fold(0u64, |sum, value| sum.wrapping_add(*value)));
        });
        self.bytes() as f64 / start.elapsed().as_secs_f64()
    }
}

/// Lanes of a portable instruction, which a compiler makes of vectors of 128 bits.
const PORTABLE_I16: usize = 8;
const PORTABLE_F32: usize = 4;

/// Products of int8 fit into 16 bits.
fn portable_i16() {
    let (a, b) = black_box((3i16, 5i16));
    let mut sums = [1i16; PORTABLE_I16 * INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = sum.wrapping_mul(a).wrapping_add(b);
        }
    }
    black_box(sums);
}

fn portable_f32() {
    let (a, b) = black_box((0.5f32, 0.25f32));
    let mut sums = [1.0f32; PORTABLE_F32 * INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    black_box(sums);
}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::CpuLevel;

    use super::*;

    #[test]
    fn loops_of_every_level_run_on_this_machine() {
        let pool = ThreadPool::with_threads(2);
        for level in CpuLevel::available() {
            let ceilings = ArithmeticCeiling::of(&Kernels::new(level).unwrap());
            for arithmetic in [Arithmetic::Int8, Arithmetic::F32] {
                let of_it: Vec<_> = ceilings.iter().filter(|ceiling| ceiling.arithmetic() == arithmetic).collect();
                assert_eq!(of_it.len(), 1, "{} in {arithmetic:?}", level.name());
                assert!(of_it[0].rate(&pool).is_finite() && of_it[0].rate_of_one_call().is_finite());
            }
        }
        let reading = ReadingCeiling::new(1);
        assert_eq!(reading.bytes(), 256 << 10);
        assert!(reading.rate(&pool).is_finite());
    }
}
