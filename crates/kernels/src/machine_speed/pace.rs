use std::time::Instant;

use kintsugi_runtime::Progress;

/// Rounds that are enough, whatever time is left.
const MOST_ROUNDS: usize = 51;

/// What progress counts to.
const HUNDREDTHS: u64 = 100;

/// How much of the time has gone, and how many rounds it is still good for.
pub(super) struct Pace<'a> {
    progress: &'a Progress,
    start: Instant,
    /// Seconds that measuring takes.
    seconds: f64,
    /// Hundredths of it that progress has counted.
    counted: u64,
    /// Seconds since the start.
    section_start: f64,
    section_end: f64,
}

impl<'a> Pace<'a> {
    /// Measuring takes so many seconds.
    pub(super) fn begin(progress: &'a Progress, seconds: f64) -> Self {
        progress.begin("measure", HUNDREDTHS);
        Pace { progress, start: Instant::now(), seconds, counted: 0, section_start: 0.0, section_end: seconds }
    }

    /// What follows is about products of `rows` rows, and ends so many seconds after the start.
    pub(super) fn section(&mut self, end: f64, rows: usize) {
        (self.section_start, self.section_end) = (self.elapsed(), end);
        self.progress.at("measure", format!("{rows} {}", if rows == 1 { "row" } else { "rows" }));
    }

    /// Whether there is time for one more round: for the first there always is.
    pub(super) fn another(&self, rounds: usize) -> bool {
        let elapsed = self.elapsed();
        let mean = (elapsed - self.section_start) / rounds as f64;
        rounds == 0 || rounds < MOST_ROUNDS && elapsed + mean <= self.section_end
    }

    /// Tells the progress.
    pub(super) fn tick(&mut self) {
        let now = ((self.elapsed() / self.seconds * HUNDREDTHS as f64) as u64).min(HUNDREDTHS);
        self.progress.advance(now - self.counted);
        self.counted = now;
    }

    fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_round_is_always_measured_and_progress_ends_at_its_total() {
        let progress = Progress::new();
        let mut pace = Pace::begin(&progress, 0.005);
        pace.section(0.0, 8);
        assert!(pace.another(0));
        assert!(!pace.another(1));
        std::thread::sleep(std::time::Duration::from_millis(10));
        pace.tick();
        pace.tick();
        let snapshot = progress.snapshot();
        assert_eq!((snapshot.done, snapshot.total, snapshot.unit.as_str()), (100, 100, "8 rows"));
    }

    #[test]
    fn rounds_come_to_an_end_before_the_time_does() {
        let progress = Progress::new();
        let pace = Pace::begin(&progress, 1e6);
        assert!(pace.another(1));
        assert!(!pace.another(MOST_ROUNDS));
    }
}
