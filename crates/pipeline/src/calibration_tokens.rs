use std::ops::Range;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_linalg::SplitMix64;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::calibration_source::{enough_tokens, read_tokens};
use crate::{CalibrationRecipe, CalibrationSource};

/// Fewest held out tokens that a sample is taken from.
const LEAST_HELD_OUT: usize = 256;
/// Shortest sequences of a sample, where those of the calibration are not shorter.
const LEAST_LENGTH: usize = 16;

/// The tokens that calibration runs over: sequences of one length, source by source. Behind those that statistics are
/// taken from come those that are held out: the first half of each source, then the second, so that each half of all is
/// a mixture too, of those sources at least that hold out two. Odd ones go to the halves in turns.
#[derive(Clone, Debug)]
pub struct CalibrationTokens {
    tokens: Vec<u32>,
    length: usize,
    seen: Vec<TokenSpan>,
    held_out: Vec<TokenSpan>,
}

/// Consecutive tokens of one source, whole sequences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TokenSpan {
    pub(crate) tokens: usize,
    /// What each of them counts.
    pub(crate) weight: f64,
}

impl TokenSpan {
    pub(crate) fn sum(spans: &[TokenSpan]) -> usize {
        spans.iter().map(|span| span.tokens).sum()
    }

    /// The first sequences of each of `spans` that make a sample of at most `tokens` tokens, as many of every span; at
    /// least one of each: ranges in all of them together.
    pub(crate) fn sample(spans: &[TokenSpan], tokens: usize, length: usize) -> Vec<Range<usize>> {
        let share = (tokens / spans.len().max(1) / length).max(1) * length;
        let mut first = 0;
        let take = |span: &TokenSpan| {
            let range = first..first + share.min(span.tokens);
            first += span.tokens;
            range
        };
        spans.iter().map(take).collect()
    }
}

impl CalibrationTokens {
    /// Reads the files of `recipe`, checks them, and cuts what each holds into sequences: the first ones, or with a seed
    /// those that chance chooses, always the same. No sequence overlaps another.
    ///
    /// # Errors
    /// `ERR_TEXT_UNREADABLE`, `ERR_TEXT_TOO_SHORT`, `ERR_CONTEXT_EXCEEDED`; `ERR_TOKENIZER_INVALID` for text.
    pub fn read(recipe: &CalibrationRecipe, checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Self> {
        let length = recipe.length;
        if length > spec.context_length {
            let message =
                format!("calibration sequences of {length} tokens exceed the context of {}", spec.context_length);
            return Err(Error::new(ErrorCode::ContextExceeded, message)
                .subject("calibration.length")
                .hint(format!("Use a length of at most {}", spec.context_length)));
        }
        let mut read = CalibrationTokens { tokens: Vec::new(), length, seen: Vec::new(), held_out: Vec::new() };
        let mut halves = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        let mut odd = 0;
        for source in recipe.texts() {
            let (mut tokens, seen) = read_source(source, checkpoint, spec, length)?;
            let held_out = tokens.split_off(seen);
            read.seen.push(TokenSpan { tokens: seen, weight: source.weight });
            read.tokens.extend(tokens);
            let count = held_out.len() / length;
            odd += count % 2;
            let (first, second) = held_out.split_at((count + odd % 2) / 2 * length);
            for ((tokens, spans), part) in halves.iter_mut().zip([first, second]) {
                tokens.extend_from_slice(part);
                spans.push(TokenSpan { tokens: part.len(), weight: source.weight });
            }
        }
        for (tokens, spans) in halves {
            read.tokens.extend(tokens);
            read.held_out.extend(spans.into_iter().filter(|span| span.tokens > 0));
        }
        Ok(read)
    }

    /// The first sequences that together have at most `tokens` tokens, as many of each source; at least one of each.
    pub(crate) fn first(&self, tokens: usize) -> Self {
        let ranges = TokenSpan::sample(&self.seen, tokens, self.length);
        let taken = |(span, range): (&TokenSpan, &Range<usize>)| TokenSpan { tokens: range.len(), ..*span };
        CalibrationTokens {
            tokens: ranges.iter().flat_map(|range| self.tokens[range.clone()].iter().copied()).collect(),
            length: self.length,
            seen: self.seen.iter().zip(&ranges).map(taken).collect(),
            held_out: Vec::new(),
        }
    }

    /// At most `most` tokens that an ablation runs over, and whether they are held out: they come from the first half of
    /// the held out ones, the half that decides, or from those that statistics are taken from where that is small. As many
    /// of each source whatever its weight; sequences may be cut short.
    pub(crate) fn sample(&self, most: usize) -> (Self, bool) {
        let half = self.held_out() / 2;
        let is_held_out = half >= LEAST_HELD_OUT.min(most);
        let (spans, first, end) = match is_held_out {
            true => (&self.held_out, self.seen(), self.seen() + half),
            false => (&self.seen, 0, self.seen()),
        };
        // Where each source lies, and its part of the sample.
        let mut sources = Vec::new();
        let mut start = first;
        for span in spans {
            let range = start..(start + span.tokens).min(end);
            start += span.tokens;
            if range.len() >= LEAST_LENGTH.min(self.length) {
                sources.push((range, *span));
            }
        }
        sources.truncate((most / LEAST_LENGTH).max(1));
        let share = most / sources.len().max(1);
        let shortest = sources.iter().map(|(range, _)| range.len()).min().unwrap_or(0);
        let length = self.length.min(share).min(shortest);
        let (mut tokens, mut seen) = (Vec::new(), Vec::new());
        for (range, span) in sources {
            let starts = range.clone().step_by(self.length).filter(|start| start + length <= range.end);
            let before = tokens.len();
            for start in starts.take(share / length.max(1)) {
                tokens.extend_from_slice(&self.tokens[start..start + length]);
            }
            seen.push(TokenSpan { tokens: tokens.len() - before, ..span });
        }
        (CalibrationTokens { tokens, length, seen, held_out: Vec::new() }, is_held_out)
    }

    /// All tokens, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of them, at the end, take no part in statistics.
    pub fn held_out(&self) -> usize {
        TokenSpan::sum(&self.held_out)
    }

    /// How many of them, at the beginning, statistics are taken from.
    pub fn seen(&self) -> usize {
        TokenSpan::sum(&self.seen)
    }

    /// The spans of the sources: of those that statistics are taken from, and of those that are held out.
    pub(crate) fn spans(&self) -> (&[TokenSpan], &[TokenSpan]) {
        (&self.seen, &self.held_out)
    }

    /// Tokens of a sequence.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// The sequences of one source, and how many of their tokens statistics are taken from.
fn read_source(
    source: &CalibrationSource,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    length: usize,
) -> Result<(Vec<u32>, usize)> {
    let tokens = read_tokens(source, checkpoint, spec, enough_tokens(source, length))?;
    if tokens.len() < length {
        let message = format!("the file has {} tokens, less than one sequence of {length}", tokens.len());
        return Err(Error::new(ErrorCode::TextTooShort, message)
            .subject(source.file.display())
            .hint("Give more of it or a smaller calibration.length"));
    }
    let (seen, held_out) = divide(tokens.len() / length, source.sequences, source.hold_out);
    Ok((choose(tokens, seen + held_out, length, source.seed), seen * length))
}

/// How many of the sequences that are there statistics are taken from, and how many are held out: what is asked for, or
/// of a short file an eighth held out, if there are two.
fn divide(there: usize, sequences: usize, hold_out: usize) -> (usize, usize) {
    if there >= sequences.saturating_add(hold_out) {
        return (sequences, hold_out);
    }
    let least = usize::from(there > 1);
    let held_out = hold_out.min((there / 8).max(least));
    (sequences.min(there - held_out), held_out)
}

/// At most `sequences` sequences out of `tokens`. With a seed the cuts begin at a random place before the first whole
/// sequence, and a shuffle says which are taken, in which order.
fn choose(mut tokens: Vec<u32>, sequences: usize, length: usize, seed: Option<u64>) -> Vec<u32> {
    let Some(seed) = seed else {
        tokens.truncate((tokens.len() / length).min(sequences) * length);
        return tokens;
    };
    let mut random = SplitMix64::new(seed);
    let count = tokens.len() / length;
    let offset = below(&mut random, tokens.len() % length + 1);
    let mut order: Vec<usize> = (0..count).collect();
    for i in 0..count.min(sequences) {
        order.swap(i, i + below(&mut random, count - i));
    }
    let start = |sequence: &usize| offset + sequence * length;
    order.iter().take(sequences).map(start).flat_map(|start| tokens[start..start + length].to_vec()).collect()
}

/// A number below `limit`, which is far below 2³².
fn below(random: &mut SplitMix64, limit: usize) -> usize {
    ((u128::from(random.bits()) * limit as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_file_holds_out_an_eighth() {
        assert_eq!(divide(136, 128, 8), (128, 8));
        assert_eq!(divide(1000, 128, 8), (128, 8));
        assert_eq!(divide(130, 128, 8), (122, 8));
        assert_eq!(divide(20, 128, 8), (18, 2));
        assert_eq!(divide(3, 128, 1), (2, 1));
        assert_eq!(divide(1, 128, 1), (1, 0));
        assert_eq!(divide(20, 20, 0), (20, 0));
    }

    #[test]
    fn a_sample_has_as_many_tokens_of_each_source() {
        let span = |tokens| TokenSpan { tokens, weight: 1.0 };
        assert_eq!(TokenSpan::sample(&[span(100)], 64, 10), vec![0..60]);
        assert_eq!(TokenSpan::sample(&[span(100)], 5, 10), vec![0..10]);
        assert_eq!(TokenSpan::sample(&[span(100), span(20), span(50)], 90, 10), vec![0..30, 100..120, 120..150]);
    }

    #[test]
    fn an_ablation_sees_the_deciding_half_of_what_is_held_out_or_what_is_seen() {
        let tokens = |length: usize, seen: &[usize], held_out: &[usize]| {
            let spans = |counts: &[usize]| -> Vec<TokenSpan> {
                counts.iter().map(|&count| TokenSpan { tokens: count * length, weight: 1.0 }).collect()
            };
            let (seen, held_out) = (spans(seen), spans(held_out));
            let count = TokenSpan::sum(&seen) + TokenSpan::sum(&held_out);
            CalibrationTokens { tokens: (0..count as u32).collect(), length, seen, held_out }
        };
        let ranges = |(sample, held_out): (CalibrationTokens, bool)| {
            assert_eq!(sample.seen(), sample.tokens.len());
            let starts: Vec<u32> = sample.tokens.iter().copied().step_by(sample.length).collect();
            (starts, sample.length, held_out)
        };
        // One sequence is cut; of many the first half is taken.
        assert_eq!(ranges(tokens(2048, &[9], &[1]).sample(1024)), (vec![9 * 2048], 1024, true));
        assert_eq!(
            ranges(tokens(256, &[9], &[8]).sample(1024)),
            ([9, 10, 11, 12].map(|i| i * 256).to_vec(), 256, true)
        );
        // The halves of two sources.
        let two = tokens(512, &[4, 6], &[1, 1, 1, 1]).sample(1024);
        assert_eq!(two.0.seen.len(), 2);
        assert_eq!(ranges(two), (vec![10 * 512, 11 * 512], 512, true));
        // Too little is held out: all sources, as much of each.
        let seen = tokens(128, &[20, 1], &[2, 1]).sample(1024);
        assert_eq!(seen.0.seen.iter().map(|span| span.tokens).collect::<Vec<_>>(), [512, 128]);
        assert_eq!(ranges(seen), (vec![0, 128, 256, 384, 20 * 128], 128, false));
        assert_eq!(ranges(tokens(4, &[3], &[]).sample(1024)), (vec![0, 4, 8], 4, false));
    }

    #[test]
    fn without_a_seed_the_first_sequences_are_taken() {
        let tokens: Vec<u32> = (0..23).collect();
        assert_eq!(choose(tokens.clone(), 2, 5, None), (0..10).collect::<Vec<_>>());
        assert_eq!(choose(tokens, 9, 5, None), (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn a_seed_chooses_whole_sequences_that_do_not_overlap_and_always_the_same() {
        let tokens: Vec<u32> = (0..10_007).collect();
        let (length, sequences) = (10, 300);
        let mut offsets = std::collections::HashSet::new();
        for seed in 0..50 {
            let chosen = choose(tokens.clone(), sequences, length, Some(seed));
            assert_eq!(chosen, choose(tokens.clone(), sequences, length, Some(seed)));
            assert_eq!(chosen.len(), sequences * length);
            assert!(chosen.chunks(length).all(|sequence| sequence.windows(2).all(|pair| pair[1] == pair[0] + 1)));
            let mut starts: Vec<u32> = chosen.iter().step_by(length).copied().collect();
            offsets.insert(starts[0] % length as u32);
            assert!(starts.windows(2).any(|pair| pair[1] < pair[0]), "they are shuffled");
            starts.sort_unstable();
            assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= length as u32));
            let late = starts.iter().filter(|&&start| start > 5000).count();
            assert!((90..210).contains(&late), "{late} of 300 from the second half");
        }
        assert_eq!(offsets.len(), 8, "7 tokens are left over");
        assert_eq!(choose(tokens[..25].to_vec(), 9, 10, Some(1)).len(), 20);
    }
}
