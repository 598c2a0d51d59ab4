use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Counters that a job moves forward and anybody may read at any time without waiting for the job.
#[derive(Debug)]
pub struct Progress {
    done: AtomicU64,
    /// Of those the ones that an earlier run had finished: they tell nothing about the pace.
    before: AtomicU64,
    total: AtomicU64,
    stage: Mutex<Stage>,
}

#[derive(Debug, Clone)]
struct Stage {
    phase: &'static str,
    unit: String,
    started: Instant,
}

/// One reading of [`Progress`].
#[derive(Debug, Clone, PartialEq)]
pub struct ProgressSnapshot {
    /// What the job is doing, one of a few fixed words (`calibrate`, `compress`, `write`, …).
    pub phase: &'static str,
    /// Units of work finished.
    pub done: u64,
    /// Units of work in all; 0 while it is not known.
    pub total: u64,
    /// What is being worked on now, e.g. `model.layers.3`.
    pub unit: String,
    /// Estimate from the mean pace of this run; `None` before its first unit is done.
    pub seconds_left: Option<f64>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            done: AtomicU64::new(0),
            before: AtomicU64::new(0),
            total: AtomicU64::new(0),
            stage: Mutex::new(Stage { phase: "start", unit: String::new(), started: Instant::now() }),
        }
    }
}

impl Progress {
    /// Counters at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a count of `total` units under the name `phase`.
    pub fn begin(&self, phase: &'static str, total: u64) {
        let mut stage = self.lock();
        self.done.store(0, Ordering::Relaxed);
        self.before.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        *stage = Stage { phase, unit: String::new(), started: Instant::now() };
    }

    /// Changes the phase and names what is worked on, without touching the count.
    pub fn at(&self, phase: &'static str, unit: impl Into<String>) {
        let mut stage = self.lock();
        stage.phase = phase;
        stage.unit = unit.into();
    }

    /// Counts `units` as finished by an earlier run.
    pub fn resume(&self, units: u64) {
        self.before.fetch_add(units, Ordering::Relaxed);
        self.done.fetch_add(units, Ordering::Relaxed);
    }

    /// Counts `units` as finished.
    pub fn advance(&self, units: u64) {
        self.done.fetch_add(units, Ordering::Relaxed);
    }

    /// The state now.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let stage = self.lock().clone();
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let now = done.saturating_sub(self.before.load(Ordering::Relaxed));
        let seconds_left = (now > 0 && total >= done)
            .then(|| stage.started.elapsed().as_secs_f64() / now as f64 * (total - done) as f64);
        ProgressSnapshot { phase: stage.phase, done, total, unit: stage.unit, seconds_left }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_names() {
        let progress = Progress::new();
        assert_eq!(progress.snapshot().seconds_left, None);
        progress.begin("compress", 4);
        progress.at("compress", "model.layers.0");
        progress.advance(1);
        let snapshot = progress.snapshot();
        assert_eq!((snapshot.phase, snapshot.done, snapshot.total), ("compress", 1, 4));
        assert_eq!(snapshot.unit, "model.layers.0");
        assert!(snapshot.seconds_left.is_some());
    }

    #[test]
    fn the_pace_is_that_of_this_run() {
        let progress = Progress::new();
        progress.begin("compress", 1001);
        progress.resume(999);
        let snapshot = progress.snapshot();
        assert_eq!((snapshot.done, snapshot.seconds_left), (999, None));
        std::thread::sleep(std::time::Duration::from_millis(20));
        progress.advance(1);
        // One unit took at least 20 ms, one is left.
        assert!(progress.snapshot().seconds_left.unwrap() >= 0.02);
    }
}
