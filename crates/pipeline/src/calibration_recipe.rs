use std::ops::RangeInclusive;
use std::path::PathBuf;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Serialize;

use crate::CalibrationKind;
use crate::recipe::is_same_file;

/// What calibration statistics are taken from, and how: one source, or a mixture of several.
///
/// Every token of a source counts as often as its weight says: the second moments of a mixture are
/// `S = Σ weightᵢ Sᵢ`. Within a job only quotients of weights matter; statistics that are saved keep what tokens count.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CalibrationRecipe {
    /// At least one. Their order changes sums by no more than rounding.
    pub sources: Vec<CalibrationSource>,
    /// Tokens of a sequence.
    pub length: usize,
    /// Recompute the inputs of each group of Linears after those before it are compressed ("true sequential").
    pub subset: bool,
    /// Where the activations of all tokens are kept. Changes no bit of the output.
    #[serde(skip)]
    pub activations: ActivationPlace,
}

/// A file that calibration statistics are taken from, or that holds them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CalibrationSource {
    /// The file.
    pub file: PathBuf,
    /// What it holds.
    pub kind: CalibrationKind,
    /// JSONL: the field with the text.
    pub field: String,
    /// Most sequences that are taken. Statistics have theirs already.
    pub sequences: usize,
    /// Chooses the sequences by chance; `null` takes those at the beginning.
    pub seed: Option<u64>,
    /// Sequences behind those that take no part in the statistics: errors of a compensation are measured on them, too.
    pub hold_out: usize,
    /// How often each of its tokens counts.
    pub weight: f64,
}

/// Where a job keeps the calibration activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationPlace {
    /// In memory if they fit into the budget, else on disk.
    #[default]
    Auto,
    /// In memory.
    Memory,
    /// In the folder of the unfinished output.
    Disk,
}

impl CalibrationSource {
    /// Most tokens of all texts together that are held out unless more are asked for, or texts are many.
    const HELD_OUT_TOKENS: usize = 2048;
    /// What weights can be.
    const WEIGHTS: RangeInclusive<f64> = 1e-6..=1e6;

    /// The usual number of sequences that are held out of one of so many texts: an eighth of those that are not, while
    /// their tokens are few; of several texts an even number, so that each half of what is held out has as many.
    pub fn usual_hold_out(sequences: usize, length: usize, texts: usize) -> usize {
        let most = Self::HELD_OUT_TOKENS / length.max(1) / texts.max(1);
        if texts > 1 { (sequences / 8).clamp(2, most.max(2)) / 2 * 2 } else { (sequences / 8).clamp(1, most.max(1)) }
    }

    /// Whether it holds statistics, so that no forward pass runs for it.
    pub fn is_statistics(&self) -> bool {
        self.kind == CalibrationKind::Statistics
    }
}

impl CalibrationRecipe {
    /// Those that the model reads.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &CalibrationSource> {
        self.sources.iter().filter(|source| !source.is_statistics())
    }

    /// Those that hold statistics.
    pub(crate) fn statistics(&self) -> impl Iterator<Item = &CalibrationSource> {
        self.sources.iter().filter(|source| source.is_statistics())
    }

    /// Most tokens that are held out.
    pub(crate) fn most_held_out(&self) -> usize {
        self.texts().map(|source| source.hold_out.saturating_mul(self.length)).fold(0, usize::saturating_add)
    }

    /// The full name of an option of a source.
    pub(crate) fn option(&self, source: usize, name: &str) -> String {
        if self.sources.len() == 1 {
            format!("calibration.{name}")
        } else {
            format!("calibration.sources[{source}].{name}")
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, naming the option.
    pub(crate) fn validate(&self) -> Result<()> {
        let refuse = |subject: String, message: String, hint: String| {
            Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
        };
        if self.sources.is_empty() {
            let hint = "Give at least one text or file of statistics";
            return refuse("calibration.sources".into(), "there is no source of calibration".into(), hint.into());
        }
        if self.length < 2 {
            let message = format!("calibration.length is {}", self.length);
            return refuse("calibration.length".into(), message, "Use at least 2".into());
        }
        for (index, source) in self.sources.iter().enumerate() {
            if source.sequences < 1 {
                let subject = self.option(index, "sequences");
                return refuse(subject.clone(), format!("{subject} is 0"), "Use at least 1".into());
            }
            if !CalibrationSource::WEIGHTS.contains(&source.weight) {
                let message = format!("a source cannot count {} times", source.weight);
                let hint = "Use a weight between 1e-6 and 1e6; only quotients of weights matter".into();
                return refuse(self.option(index, "weight"), message, hint);
            }
            // What is held out of one would be seen by the other.
            if self.sources[..index].iter().any(|other| is_same_file(&other.file, &source.file)) {
                let message = format!("{} is named twice", source.file.display());
                return refuse(self.option(index, "file"), message, "Name it once, with a larger weight".into());
            }
        }
        Ok(())
    }
}
