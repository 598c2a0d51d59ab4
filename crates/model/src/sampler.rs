use std::cmp::Ordering;
use std::hash::{BuildHasher, Hasher, RandomState};

use kintsugi_runtime::{Error, ErrorCode, Result};

/// How a token is picked from the logits. The default is greedy.
///
/// The options apply in the order in which they stand here, which is that of Hugging Face transformers:
/// repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Logits of tokens that occurred are divided by it when positive, multiplied when negative; 1 is off.
    pub repetition_penalty: f32,
    /// Logits are divided by it; 0 picks the largest logit (greedy).
    pub temperature: f32,
    /// Only that many most likely tokens stay; 0 is off.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability stay; 1 is off.
    pub top_p: f32,
    /// Only tokens with at least this share of the largest probability stay; 0 is off.
    pub min_p: f32,
    /// The same seed gives the same tokens; `None` takes one from the operating system.
    pub seed: Option<u64>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        SamplingOptions { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: None }
    }
}

impl SamplingOptions {
    /// Checks every range.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` with the name of the option.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f32, fits: bool, hint: &str| {
            if fits {
                return Ok(());
            }
            Err(Error::new(ErrorCode::OptionInvalid, format!("{name} is {value}")).subject(name).hint(hint))
        };
        let penalty = self.repetition_penalty;
        let temperature = self.temperature;
        check("repetitionPenalty", penalty, penalty > 0.0 && penalty.is_finite(), "Use a number above 0; 1 is off")?;
        check(
            "temperature",
            temperature,
            temperature >= 0.0 && temperature.is_finite(),
            "Use 0 (greedy) or a positive number",
        )?;
        check(
            "topP",
            self.top_p,
            self.top_p > 0.0 && self.top_p <= 1.0,
            "Use a number above 0 and at most 1; 1 is off",
        )?;
        check("minP", self.min_p, (0.0..=1.0).contains(&self.min_p), "Use a number from 0 to 1; 0 is off")
    }
}

/// Picks one token after another.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: SplitMix64,
    candidates: Vec<Candidate>,
    seen: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
    /// `exp((logit − largest) / temperature)`: the probability times a constant.
    weight: f64,
}

/// Most likely first; equal logits in the order of their tokens.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

impl Sampler {
    /// A sampler with valid options ([`SamplingOptions::validate`]).
    pub fn new(options: SamplingOptions) -> Self {
        // The hasher of the standard library is keyed by the operating system's entropy.
        let seed = options.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        Sampler { options, random: SplitMix64(seed), candidates: Vec::new(), seen: Vec::new() }
    }

    /// Picks a token. `logits` has one value per token and holds the penalized ones afterwards; `history` are the
    /// tokens so far, prompt included. NaN is never picked, of equal logits the lower token comes first.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when no logit is above −∞.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.penalize(logits, history);
        let largest = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((best, &largest)) = largest else {
            return Err(Error::new(ErrorCode::ValueNotFinite, "no logit is a number above minus infinity")
                .subject("logits")
                .hint("The weights or activations of the model overflow"));
        };
        if self.options.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.collect(logits, largest);
        self.keep_top_k();
        self.keep_top_p();
        self.keep_min_p();
        Ok(self.draw())
    }

    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        self.seen.clear();
        self.seen.extend_from_slice(history);
        self.seen.sort_unstable();
        self.seen.dedup();
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }

    fn collect(&mut self, logits: &[f32], largest: f32) {
        let temperature = f64::from(self.options.temperature);
        self.candidates.clear();
        let possible = (0u32..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        self.candidates.extend(possible.map(|(token, &logit)| {
            // Equality first, because ∞ − ∞ is not a number.
            let weight =
                if logit == largest { 1.0 } else { ((f64::from(logit) - f64::from(largest)) / temperature).exp() };
            Candidate { token, logit, weight }
        }));
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_likelihood);
            self.candidates.truncate(k);
            // Sums run in one order, whatever the selection did to it.
            self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        }
    }

    /// Keeps a token when those before it, by likelihood, have less than `top_p` together.
    fn keep_top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let target = f64::from(self.options.top_p) * self.total();
        let all = self.candidates.len();
        // Few tokens hold most of the probability: sort a growing head instead of the whole vocabulary.
        let mut head = all.min(256);
        loop {
            if head < all {
                self.candidates.select_nth_unstable_by(head - 1, by_likelihood);
            }
            self.candidates[..head].sort_unstable_by(by_likelihood);
            let mut sum = 0.0;
            let kept = self.candidates[..head].iter().take_while(|candidate| {
                let keep = sum < target;
                sum += candidate.weight;
                keep
            });
            let kept = kept.count();
            if kept < head || head == all {
                self.candidates.truncate(kept.max(1));
                return;
            }
            head = all.min(head * 4);
        }
    }

    fn keep_min_p(&mut self) {
        if self.options.min_p > 0.0 {
            // The largest weight is 1.
            let least = f64::from(self.options.min_p);
            self.candidates.retain(|candidate| candidate.weight >= least);
        }
    }

    fn draw(&mut self) -> u32 {
        let target = self.random.next_unit() * self.total();
        let mut sum = 0.0;
        let mut picked = 0;
        for candidate in self.candidates.iter().filter(|candidate| candidate.weight > 0.0) {
            picked = candidate.token;
            sum += candidate.weight;
            if sum > target {
                break;
            }
        }
        picked
    }

    fn total(&self) -> f64 {
        self.candidates.iter().map(|candidate| candidate.weight).sum()
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): a Weyl sequence
/// through a mixing function. Every seed has the full period of 2^64.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn next_unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OPTIONS: SamplingOptions =
        SamplingOptions { repetition_penalty: 1.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(7) };
    const DRAWS: usize = 200_000;

    /// Relative frequencies of `DRAWS` tokens.
    fn frequencies(options: SamplingOptions, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options);
        let mut counts = vec![0u32; logits.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(&mut logits.to_vec(), history).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    /// Five standard deviations of a frequency, so that a right sampler fails once in a million seeds; tokens that
    /// must not occur have to be absent.
    fn assert_distribution(frequencies: &[f64], expected: &[f64]) {
        for (token, (&frequency, &p)) in frequencies.iter().zip(expected).enumerate() {
            let tolerance = 5.0 * (p * (1.0 - p) / DRAWS as f64).sqrt();
            assert!((frequency - p).abs() <= tolerance, "token {token}: {frequency} instead of {p}");
        }
    }

    fn logarithms<const N: usize>(probabilities: [f32; N]) -> [f32; N] {
        probabilities.map(f32::ln)
    }

    #[test]
    fn draws_follow_the_softmax_and_the_temperature() {
        let logits = logarithms([0.5, 0.25, 0.2, 0.05]);
        assert_distribution(&frequencies(OPTIONS, &logits, &[]), &[0.5, 0.25, 0.2, 0.05]);
        let squared = [0.25, 0.0625, 0.04, 0.0025].map(|p| p / 0.355);
        assert_distribution(&frequencies(SamplingOptions { temperature: 0.5, ..OPTIONS }, &logits, &[]), &squared);
    }

    #[test]
    fn filters_cut_and_renormalize() {
        let logits = logarithms([0.05, 0.5, 0.25, 0.2]);
        let top_k = SamplingOptions { top_k: 2, ..OPTIONS };
        assert_distribution(&frequencies(top_k, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
        // 0.5 + 0.25 does not reach 0.8, so the token that crosses it stays.
        let top_p = SamplingOptions { top_p: 0.8, ..OPTIONS };
        let expected = [0.0, 0.5 / 0.95, 0.25 / 0.95, 0.2 / 0.95];
        assert_distribution(&frequencies(top_p, &logits, &[]), &expected);
        let min_p = SamplingOptions { min_p: 0.45, ..OPTIONS };
        assert_distribution(&frequencies(min_p, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
        // Top-p sees the probabilities that top-k left: 2/3 alone reaches 0.6.
        let both = SamplingOptions { top_k: 2, top_p: 0.6, ..OPTIONS };
        assert_distribution(&frequencies(both, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
        // Temperature comes before min-p: (0.25 / 0.5)² is below 0.45.
        let warm = SamplingOptions { temperature: 0.5, min_p: 0.45, ..OPTIONS };
        assert_distribution(&frequencies(warm, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_beyond_the_sorted_head() {
        // 4096 equal tokens: half of the probability is the first 2048.
        let options = SamplingOptions { top_p: 0.5, ..OPTIONS };
        let mut sampler = Sampler::new(options);
        let drawn: Vec<u32> = (0..20_000).map(|_| sampler.sample(&mut vec![1.0; 4096], &[]).unwrap()).collect();
        assert!(drawn.iter().all(|&token| token < 2048));
        assert!(drawn.iter().any(|&token| token > 1900));
    }

    #[test]
    fn repetition_penalty_counts_each_token_once() {
        let logits = [2.0, -1.0, 1.0];
        // 2 / 2 = 1 and −1 · 2 = −2; token 9 is not in the vocabulary.
        let options = SamplingOptions { repetition_penalty: 2.0, ..OPTIONS };
        let total = 1f64.exp() + (-2f64).exp() + 1f64.exp();
        let expected = [1f64.exp() / total, (-2f64).exp() / total, 1f64.exp() / total];
        assert_distribution(&frequencies(options, &logits, &[0, 1, 0, 0, 9]), &expected);
    }

    #[test]
    fn ties_go_to_the_lowest_token() {
        let mut greedy = Sampler::new(SamplingOptions::default());
        assert_eq!(greedy.sample(&mut [1.0, 3.0, 3.0, 2.0], &[]).unwrap(), 1);
        let mut first_of_three = Sampler::new(SamplingOptions { top_k: 1, ..OPTIONS });
        for _ in 0..100 {
            assert_eq!(first_of_three.sample(&mut [0.0, 2.0, 2.0, 2.0], &[]).unwrap(), 1);
        }
    }

    #[test]
    fn what_is_not_a_number_is_never_picked() {
        for temperature in [0.0, 1.0] {
            let options = SamplingOptions { temperature, ..OPTIONS };
            let mut sampler = Sampler::new(options.clone());
            for _ in 0..100 {
                let token = sampler.sample(&mut [f32::NAN, f32::NEG_INFINITY, -5.0, f32::NAN], &[]).unwrap();
                assert_eq!(token, 2);
                assert_eq!(sampler.sample(&mut [1e30, f32::INFINITY, f32::NAN], &[]).unwrap(), 1);
            }
            for mut hopeless in [vec![], vec![f32::NAN; 3], vec![f32::NEG_INFINITY; 2]] {
                let error = Sampler::new(options.clone()).sample(&mut hopeless, &[]).unwrap_err();
                assert_eq!(error.code, ErrorCode::ValueNotFinite);
            }
        }
        // A temperature this small must not overflow into an infinite logit.
        let mut cold = Sampler::new(SamplingOptions { temperature: f32::MIN_POSITIVE, ..OPTIONS });
        assert_eq!(cold.sample(&mut [3.0, 1e4, 9e3], &[]).unwrap(), 1);
    }

    #[test]
    fn a_seed_fixes_the_tokens() {
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingOptions { seed, ..OPTIONS });
            (0..64).map(|_| sampler.sample(&mut [0.0; 1000], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(Some(1)), draw(Some(1)));
        assert_ne!(draw(Some(1)), draw(Some(2)));
        assert_ne!(draw(None), draw(None));
    }

    #[test]
    fn the_generator_is_splitmix64() {
        // First outputs for seed 1234567 of the reference implementation (Vigna, splitmix64.c).
        let mut random = SplitMix64(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next(), random.next(), random.next()], expected);
    }

    #[test]
    fn options_out_of_range_are_named() {
        let wrong = [
            ("temperature", SamplingOptions { temperature: -0.1, ..OPTIONS }),
            ("temperature", SamplingOptions { temperature: f32::NAN, ..OPTIONS }),
            ("topP", SamplingOptions { top_p: 0.0, ..OPTIONS }),
            ("topP", SamplingOptions { top_p: 1.1, ..OPTIONS }),
            ("minP", SamplingOptions { min_p: -1.0, ..OPTIONS }),
            ("minP", SamplingOptions { min_p: f32::NAN, ..OPTIONS }),
            ("repetitionPenalty", SamplingOptions { repetition_penalty: 0.0, ..OPTIONS }),
            ("repetitionPenalty", SamplingOptions { repetition_penalty: f32::INFINITY, ..OPTIONS }),
        ];
        for (name, options) in wrong {
            let error = options.validate().unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, name));
        }
        SamplingOptions::default().validate().unwrap();
        OPTIONS.validate().unwrap();
    }

    proptest! {
        #[test]
        fn greedy_is_argmax(logits in prop::collection::vec(-10f32..10.0, 1..50)) {
            let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            let mut greedy = Sampler::new(SamplingOptions::default());
            prop_assert_eq!(greedy.sample(&mut logits.clone(), &[]).unwrap() as usize, best);
            let mut single = Sampler::new(SamplingOptions { top_k: 1, ..OPTIONS });
            prop_assert_eq!(single.sample(&mut logits.clone(), &[]).unwrap() as usize, best);
        }

        #[test]
        fn a_drawn_token_passes_every_filter(
            logits in prop::collection::vec(-6f32..6.0, 1..400),
            top_k in 0usize..50,
            top_p in 0.01f32..1.0,
            min_p in 0f32..0.5,
            seed: u64,
        ) {
            let options = SamplingOptions { top_k, top_p, min_p, seed: Some(seed), ..OPTIONS };
            let token = Sampler::new(options).sample(&mut logits.clone(), &[]).unwrap() as usize;
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            if top_k > 0 {
                order.truncate(top_k);
            }
            let weight = |token: usize| f64::from(logits[token]).exp();
            let total: f64 = order.iter().map(|&token| weight(token)).sum();
            let rank = order.iter().position(|&other| other == token);
            prop_assert!(rank.is_some(), "token {token} is not among the {top_k} most likely");
            let before: f64 = order[..rank.unwrap()].iter().map(|&token| weight(token)).sum();
            prop_assert!(before <= f64::from(top_p) * total * (1.0 + 1e-12));
            prop_assert!(weight(token) >= f64::from(min_p) * weight(order[0]) * (1.0 - 1e-12));
        }
    }
}
