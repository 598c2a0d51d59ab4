use std::collections::HashSet;
use std::time::Instant;

use kintsugi_runtime::{
    CancelToken, Error, ErrorCode, Progress, Result, ThreadPool, available_memory_bytes, last_level_cache_bytes,
};

use super::pace::Pace;
use super::rounds::{Rounds, SIZE};
use super::weight_kind::WEIGHT_KINDS;
use super::{ArithmeticCeiling, MatrixRotation, ReadingCeiling, SpeedReport};
use crate::Kernels;

/// Most rows of x.
const MAX_ROWS: usize = 4096;

/// Most threads.
const MAX_THREADS: usize = 1024;

/// What the matrices of a kind have together: beyond the caches of most machines, and no more than many have memory for.
const WORKING_SET: std::ops::RangeInclusive<u64> = 256 << 20..=1 << 30;

/// How many times the last cache they have, between those.
const CACHES: u64 = 3;

/// How many times the last cache they have in any case, where memory is short or the cache is very large: less would
/// measure the caches.
const LEAST_CACHES: u64 = 2;
const LEAST_WORKING_SET: u64 = 64 << 20;

/// What a matrix takes while it is made and packed: codes or floats, panels, and copies of some.
const PREPARATION_BYTES: u64 = 256 << 20;

/// Models that the rates of one row are translated to.
const MODEL_PARAMETERS: [u64; 3] = [1_000_000_000, 7_000_000_000, 8_000_000_000];

/// How [`measure_speed`] measures.
#[derive(Clone, Debug, PartialEq)]
pub struct SpeedOptions {
    /// Seconds that measuring may take. Every product is measured once, whatever that takes.
    pub seconds: f64,
    /// Number of threads to compare with one; `None` for those of the shared pool.
    pub threads: Option<usize>,
    /// Rows of x of the products.
    pub rows: Vec<usize>,
}

impl Default for SpeedOptions {
    fn default() -> Self {
        SpeedOptions { seconds: 12.0, threads: None, rows: vec![1, 8, 512] }
    }
}

/// Measures how fast this machine reads and multiplies, and how fast products are beside that, on one thread and on
/// all. Loops and products take turns within each round, so that both meet the machine in the same state.
///
/// # Errors
/// `ERR_OPTION_INVALID`; `ERR_MEMORY_EXCEEDED` when matrices beyond the caches do not fit; `ERR_IO` when the operating
/// system refuses to start so many threads; `ERR_CANCELLED`.
pub fn measure_speed(
    kernels: &Kernels,
    options: &SpeedOptions,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<SpeedReport> {
    let start = Instant::now();
    check(options)?;
    let cache_bytes = last_level_cache_bytes();
    let rows = options.rows.iter().copied().max().unwrap_or(1);
    let working_set = working_set(cache_bytes.unwrap_or(0), available_memory_bytes(), rows)?;

    progress.begin("prepare", WEIGHT_KINDS.len() as u64 + 1);
    let global = ThreadPool::global();
    let threads = options.threads.unwrap_or(global.threads());
    let own = (threads != global.threads()).then(|| ThreadPool::try_with_threads(threads)).transpose()?;
    let single = (threads > 1).then(|| ThreadPool::with_threads(1));
    let pools: Vec<&ThreadPool> = single.iter().chain([own.as_ref().unwrap_or(global)]).collect();
    let reading = ReadingCeiling::new(working_set);
    progress.advance(1);
    let mut rotations = Vec::with_capacity(WEIGHT_KINDS.len());
    for kind in &WEIGHT_KINDS {
        cancel.check()?;
        progress.at("prepare", kind.name());
        let packed = kernels.pack(&kind.weight(SIZE, SIZE)?, kind.precision, global)?;
        rotations.push(MatrixRotation::of_bytes(packed, working_set));
        progress.advance(1);
    }

    let rounds = Rounds { kernels, arithmetic: ArithmeticCeiling::of(kernels), reading, rotations, pools };
    let mut ceilings = rounds.no_rates();
    let mut products = Vec::new();
    let mut pace = Pace::begin(progress, options.seconds);
    for (index, &rows) in options.rows.iter().enumerate() {
        pace.section(options.seconds * (index + 1) as f64 / options.rows.len() as f64, rows);
        products.extend(rounds.measure(rows, &mut ceilings, cancel, &mut pace)?);
    }
    let one_row = products.iter().filter(|product| product.rows == 1);
    Ok(SpeedReport {
        cpu_level: kernels.level().name(),
        threads: rounds.pools.iter().map(|pool| pool.threads()).collect(),
        out_features: SIZE,
        in_features: SIZE,
        cache_bytes,
        working_set_bytes: working_set,
        ceilings: rounds.ceiling_speeds(&ceilings),
        models: one_row.flat_map(|product| MODEL_PARAMETERS.map(|parameters| product.model(parameters))).collect(),
        products,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn check(options: &SpeedOptions) -> Result<()> {
    let invalid = |subject: &str, message: String, hint: String| {
        Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
    };
    if !(options.seconds > 0.0 && options.seconds.is_finite()) {
        return invalid("seconds", format!("seconds is {}", options.seconds), "Give a time above 0".to_owned());
    }
    if let Some(threads) = options.threads.filter(|threads| !(1..=MAX_THREADS).contains(threads)) {
        return invalid("threads", format!("threads is {threads}"), format!("Give 1 to {MAX_THREADS}"));
    }
    if options.rows.is_empty() || options.rows.iter().any(|rows| !(1..=MAX_ROWS).contains(rows)) {
        let message = format!("rows is {:?}", options.rows);
        return invalid("rows", message, format!("Give one or more numbers from 1 to {MAX_ROWS}"));
    }
    let mut seen = HashSet::new();
    if let Some(twice) = options.rows.iter().find(|rows| !seen.insert(**rows)) {
        return invalid("rows", format!("rows has {twice} twice"), "Give each number once".to_owned());
    }
    Ok(())
}

/// Bytes of the matrices of a kind, beyond a cache of that size and within the memory that there is.
fn working_set(cache: u64, available: Option<u64>, rows: usize) -> Result<usize> {
    let least = LEAST_CACHES.saturating_mul(cache).max(LEAST_WORKING_SET);
    let most = least.max(*WORKING_SET.end());
    let wanted = CACHES.saturating_mul(cache).clamp(*WORKING_SET.start(), most);
    let sets = WEIGHT_KINDS.len() as u64 + 1;
    let beside = PREPARATION_BYTES + (2 * rows * SIZE * size_of::<f32>()) as u64;
    // A tenth stays free.
    let usable = available.map_or(u64::MAX, |bytes| bytes / 10 * 9);
    let fits = usable.saturating_sub(beside) / sets;
    if fits < least {
        let needed = sets.saturating_mul(least).saturating_add(beside).div_ceil(1 << 20);
        let available = available.unwrap_or(u64::MAX) >> 20;
        let message = format!(
            "matrices beyond the caches take {needed} MiB, and {available} MiB are available, of which a tenth stays free"
        );
        return Err(Error::new(ErrorCode::MemoryExceeded, message)
            .subject("memory")
            .hint("End other programs, or raise the limit of the control group or container"));
    }
    Ok(wanted.min(fits) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIBIBYTE: u64 = 1 << 30;

    #[test]
    fn matrices_are_beyond_the_cache_and_within_the_memory() {
        assert_eq!(working_set(0, None, 1).unwrap() as u64, GIBIBYTE / 4);
        assert_eq!(working_set(GIBIBYTE / 8, None, 1).unwrap() as u64, GIBIBYTE / 8 * 3);
        assert_eq!(working_set(GIBIBYTE / 2, None, 1).unwrap() as u64, GIBIBYTE);
        // Twice a cache that is larger than half of the upper end.
        assert_eq!(working_set(8 * GIBIBYTE, None, 1).unwrap() as u64, 16 * GIBIBYTE);
        let short = working_set(GIBIBYTE / 32, Some(GIBIBYTE), 512).unwrap() as u64;
        assert!((GIBIBYTE / 16..GIBIBYTE / 8).contains(&short), "{short}");
        assert!(short * 6 + PREPARATION_BYTES < GIBIBYTE);
        let error = working_set(GIBIBYTE / 8, Some(GIBIBYTE), 1).unwrap_err();
        assert_eq!(error.code, ErrorCode::MemoryExceeded);
        // Six times 256 MiB, what is beside them, and all that is there.
        assert!(error.message.contains(" 1793 MiB, and 1024 MiB "), "{}", error.message);
        assert!(!error.hint.is_empty());
        assert_eq!(working_set(u64::MAX / 2, Some(GIBIBYTE), 1).unwrap_err().code, ErrorCode::MemoryExceeded);
    }

    #[test]
    fn options_are_checked_before_anything_is_measured() {
        let kernels = Kernels::selected().unwrap();
        for (options, subject) in [
            (SpeedOptions { seconds: 0.0, ..SpeedOptions::default() }, "seconds"),
            (SpeedOptions { seconds: f64::NAN, ..SpeedOptions::default() }, "seconds"),
            (SpeedOptions { threads: Some(0), ..SpeedOptions::default() }, "threads"),
            (SpeedOptions { rows: vec![], ..SpeedOptions::default() }, "rows"),
            (SpeedOptions { rows: vec![1, 1 << 20], ..SpeedOptions::default() }, "rows"),
            (SpeedOptions { rows: vec![1, 8, 1], ..SpeedOptions::default() }, "rows"),
        ] {
            let error = measure_speed(&kernels, &options, &CancelToken::new(), &Progress::new()).unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, subject));
        }
    }
}
