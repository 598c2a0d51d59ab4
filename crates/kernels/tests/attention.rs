//! Paged causal attention against f64, at every level.

mod every_kernels;

use every_kernels::every_kernels;
use kintsugi_kernels::{AttentionSegment, Kernels, KvPages, PAGE_POSITIONS, Scores};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::Random;

/// One sequence: `positions` rows of q, k and v.
struct Sequence {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    cap: Option<f32>,
    window: Option<usize>,
}

impl Sequence {
    fn new(seed: u64, heads: usize, kv_heads: usize, head_dim: usize, positions: usize) -> Self {
        let mut random = Random::new(seed);
        let mut values = |count: usize| -> Vec<f32> { (0..count).map(|_| random.normal() as f32).collect() };
        let (q, kv) = (positions * heads * head_dim, positions * kv_heads * head_dim);
        Sequence {
            heads,
            kv_heads,
            head_dim,
            positions,
            q: values(q),
            k: values(kv),
            v: values(kv),
            cap: None,
            window: None,
        }
    }

    fn scores(&self) -> Scores {
        Scores { scale: 1.0 / (self.head_dim as f32).sqrt(), cap: self.cap, window: self.window }
    }

    fn pages_needed(&self) -> usize {
        self.positions.div_ceil(PAGE_POSITIONS)
    }

    /// `[positions, heads · headDim]` in f64.
    fn reference(&self) -> Vec<f64> {
        let mut out = Vec::new();
        for row in 0..self.positions {
            for head in 0..self.heads {
                let kv_head = head / (self.heads / self.kv_heads);
                let q = &self.q[(row * self.heads + head) * self.head_dim..][..self.head_dim];
                let at = |position: usize| (position * self.kv_heads + kv_head) * self.head_dim;
                let first = (row + 1).saturating_sub(self.window.unwrap_or(usize::MAX));
                let scores: Vec<f64> = (first..=row)
                    .map(|position| {
                        let k = &self.k[at(position)..][..self.head_dim];
                        let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                        let score = dot * f64::from(self.scores().scale);
                        self.cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for dimension in 0..self.head_dim {
                    let sum = |(position, weight): (usize, &f64)| {
                        weight * f64::from(self.v[at(first + position) + dimension])
                    };
                    out.push(weights.iter().enumerate().map(sum).sum::<f64>() / total);
                }
            }
        }
        out
    }

    /// The rows in calls of `step` rows each, over pages that are dealt out backwards.
    fn attend(&self, kernels: &Kernels, pool: &ThreadPool, step: usize) -> Vec<f32> {
        let page_table: Vec<u32> = (0..self.pages_needed() as u32).rev().collect();
        let mut pages = KvPages::new(self.kv_heads, self.head_dim);
        pages.reserve(page_table.len());
        let mut out = vec![f32::NAN; self.q.len()];
        for first in (0..self.positions).step_by(step) {
            let count = step.min(self.positions - first);
            let segments = [AttentionSegment { rows: 0..count, first_position: first, pages: &page_table }];
            let kv = first * self.kv_heads * self.head_dim..(first + count) * self.kv_heads * self.head_dim;
            let q = first * self.heads * self.head_dim..(first + count) * self.heads * self.head_dim;
            kernels.write_kv(&mut pages, &segments, &self.k[kv.clone()], &self.v[kv]);
            let out = &mut out[q.clone()];
            kernels.attention(&self.q[q], self.heads, &pages, &segments, self.scores(), out, pool);
        }
        out
    }
}

fn assert_close(out: &[f32], expected: &[f64], place: &str) {
    for (&out, &expected) in out.iter().zip(expected) {
        // Weighted means of values of about 1: the weights carry the rounding of scores of up to some tens.
        assert!((f64::from(out) - expected).abs() <= 5e-6, "{place}: {out} {expected}");
    }
}

#[test]
fn every_shape_is_that_of_f64() {
    let pool = ThreadPool::with_threads(2);
    let shapes =
        [(1, 1, 1), (2, 1, 2), (4, 4, 8), (6, 2, 16), (8, 2, 24), (4, 1, 32), (3, 3, 33), (4, 2, 64), (4, 2, 128)];
    for (heads, kv_heads, head_dim) in shapes {
        for positions in [1, 2, 63, 64, 65, 131] {
            let sequence = Sequence::new(positions as u64, heads, kv_heads, head_dim, positions);
            let expected = sequence.reference();
            for kernels in every_kernels() {
                let place = format!("{} {heads}/{kv_heads} heads of {head_dim}", kernels.level().name());
                assert_close(&sequence.attend(&kernels, &pool, positions), &expected, &place);
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_prefill_and_decode_and_on_any_number_of_threads() {
    let sequence = Sequence::new(7, 6, 2, 40, 150);
    for kernels in every_kernels() {
        let whole = sequence.attend(&kernels, &ThreadPool::with_threads(1), 150);
        for (threads, step) in [(1, 1), (2, 1), (3, 7), (7, 64), (2, 150)] {
            let out = sequence.attend(&kernels, &ThreadPool::with_threads(threads), step);
            assert!(out == whole, "{} {threads} threads, {step} rows", kernels.level().name());
        }
    }
}

#[test]
fn windows_and_caps_are_those_of_f64_and_do_not_depend_on_how_rows_are_cut() {
    let pool = ThreadPool::with_threads(2);
    for (window, cap) in [(1, None), (2, Some(2.0)), (63, None), (64, None), (65, Some(0.5)), (100, None), (500, None)]
    {
        let mut sequence = Sequence::new(11, 6, 2, 24, 200);
        sequence.window = Some(window);
        sequence.cap = cap;
        let expected = sequence.reference();
        for kernels in every_kernels() {
            let whole = sequence.attend(&kernels, &pool, 200);
            assert_close(&whole, &expected, &format!("{} window {window}", kernels.level().name()));
            for step in [1, 7, 64] {
                assert!(sequence.attend(&kernels, &pool, step) == whole, "{} {step} rows", kernels.level().name());
            }
        }
    }
}

#[test]
fn what_left_the_window_is_not_touched() {
    let pool = ThreadPool::with_threads(1);
    let width = 2 * 16;
    for kernels in every_kernels() {
        let mut clean = Sequence::new(3, 2, 2, 16, 200);
        clean.window = Some(20);
        let expected = clean.attend(&kernels, &pool, 200);
        clean.v[70 * width..71 * width].fill(f32::NAN);
        let out = clean.attend(&kernels, &pool, 200);
        assert!(out[..70 * width] == expected[..70 * width]);
        assert!(out[70 * width..90 * width].iter().all(|value| value.is_nan()));
        assert!(out[90 * width..] == expected[90 * width..], "{}", kernels.level().name());
    }
}

#[test]
fn segments_of_a_batch_do_not_see_each_other() {
    let pool = ThreadPool::with_threads(3);
    let (a, b) = (Sequence::new(1, 4, 2, 32, 70), Sequence::new(2, 4, 2, 32, 20));
    let join = |a: &[f32], b: &[f32]| [b, a].concat();
    for kernels in every_kernels() {
        let mut pages = KvPages::new(2, 32);
        pages.reserve(4);
        let segments = [
            AttentionSegment { rows: 0..20, first_position: 0, pages: &[2] },
            AttentionSegment { rows: 20..90, first_position: 0, pages: &[3, 0] },
        ];
        let (q, k, v) = (join(&a.q, &b.q), join(&a.k, &b.k), join(&a.v, &b.v));
        kernels.write_kv(&mut pages, &segments, &k, &v);
        let mut out = vec![f32::NAN; q.len()];
        kernels.attention(&q, 4, &pages, &segments, a.scores(), &mut out, &pool);
        let (from_b, from_a) = out.split_at(b.q.len());
        assert!(from_a == a.attend(&kernels, &pool, 70), "{}", kernels.level().name());
        assert!(from_b == b.attend(&kernels, &pool, 20), "{}", kernels.level().name());
    }
}

#[test]
fn nan_spreads_forward_but_never_back() {
    let pool = ThreadPool::with_threads(2);
    let width = 2 * 16;
    for kernels in every_kernels() {
        let clean = Sequence::new(3, 2, 2, 16, 80);
        let expected = clean.attend(&kernels, &pool, 80);
        let mut in_values = Sequence::new(3, 2, 2, 16, 80);
        in_values.v[66 * width..67 * width].fill(f32::NAN);
        let mut in_keys = Sequence::new(3, 2, 2, 16, 80);
        in_keys.k[66 * width..67 * width].fill(f32::INFINITY);
        for broken in [in_values, in_keys] {
            let out = broken.attend(&kernels, &pool, 80);
            assert!(out[..66 * width] == expected[..66 * width], "{}", kernels.level().name());
        }
        let mut in_query = Sequence::new(3, 2, 2, 16, 80);
        in_query.q[5 * width] = f32::NAN;
        let out = in_query.attend(&kernels, &pool, 80);
        assert!(out[5 * width..5 * width + 16].iter().all(|value| value.is_nan()));
        assert!(out[5 * width + 16..] == expected[5 * width + 16..]);
        let mut in_values = Sequence::new(3, 2, 2, 16, 80);
        in_values.v[66 * width..67 * width].fill(f32::NAN);
        assert!(in_values.attend(&kernels, &pool, 80)[66 * width..].iter().all(|value| value.is_nan()));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let pool = ThreadPool::with_threads(1);
    let mut sequence = Sequence::new(9, 2, 1, 32, 100);
    sequence.q.iter_mut().for_each(|q| *q *= 100.0);
    sequence.k.iter_mut().for_each(|k| *k *= 100.0);
    let expected = sequence.reference();
    for kernels in every_kernels() {
        for (out, expected) in sequence.attend(&kernels, &pool, 100).iter().zip(&expected) {
            // Scores of some 100,000 carry rounding of some hundredths.
            assert!((f64::from(*out) - expected).abs() <= 0.1, "{}: {out} {expected}", kernels.level().name());
        }
    }
}

#[test]
fn pages_report_their_memory() {
    let mut pages = KvPages::new(2, 48);
    assert_eq!(pages.memory_bytes(), 0);
    pages.reserve(3);
    pages.reserve(2);
    assert_eq!(pages.page_count(), 3);
    // Values are padded from 48 to 64 dimensions.
    assert_eq!(pages.memory_bytes(), 3 * 2 * PAGE_POSITIONS * (48 + 64) * 4);
}

#[test]
#[should_panic(expected = "segments share a row")]
fn overlapping_segments_are_a_defect_of_the_caller() {
    let kernels = Kernels::selected().unwrap();
    let mut pages = KvPages::new(1, 2);
    pages.reserve(1);
    let segment = AttentionSegment { rows: 0..1, first_position: 0, pages: &[0] };
    let segments = [segment.clone(), segment];
    kernels.attention(
        &[0.0; 2],
        1,
        &pages,
        &segments,
        Scores { scale: 1.0, cap: None, window: None },
        &mut [0.0; 2],
        &ThreadPool::with_threads(1),
    );
}

#[test]
#[should_panic(expected = "need 2 pages")]
fn a_segment_without_enough_pages_is_a_defect_of_the_caller() {
    let kernels = Kernels::selected().unwrap();
    let mut pages = KvPages::new(1, 2);
    pages.reserve(1);
    let segments = [AttentionSegment { rows: 0..1, first_position: 64, pages: &[0] }];
    kernels.write_kv(&mut pages, &segments, &[0.0; 2], &[0.0; 2]);
}
