use std::fmt;

/// `Result` with the error type of this workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $text:literal,)+) => {
        /// Stable, documented name of a failure. Part of the public API: `ERR_<AREA>_<CAUSE>`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl ErrorCode {
            /// Every code, in the order of `docs/errors.md`.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)+];

            /// The code as users see it.
            pub const fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)+ }
            }

            /// One sentence that says when the code appears.
            pub const fn description(self) -> &'static str {
                match self { $(ErrorCode::$variant => concat!($($doc,)+),)+ }
            }
        }
    };
}

error_codes! {
    /// An option has a value that is out of range or does not fit the other options.
    OptionInvalid = "ERR_OPTION_INVALID",
    /// An option name is not known; the nearest valid one is named.
    OptionUnknown = "ERR_OPTION_UNKNOWN",
    /// The folder or file of a checkpoint does not exist or cannot be read.
    CheckpointNotFound = "ERR_CHECKPOINT_NOT_FOUND",
    /// A shard that the index names is missing.
    CheckpointShardMissing = "ERR_CHECKPOINT_SHARD_MISSING",
    /// A file of a checkpoint is damaged: truncated, overlapping offsets, impossible sizes.
    CheckpointCorrupt = "ERR_CHECKPOINT_CORRUPT",
    /// A tensor that the architecture needs is not in the checkpoint.
    CheckpointTensorMissing = "ERR_CHECKPOINT_TENSOR_MISSING",
    /// A tensor has another shape than the configuration says.
    CheckpointShape = "ERR_CHECKPOINT_SHAPE",
    /// A tensor has a number type that is not supported in this place.
    CheckpointDtype = "ERR_CHECKPOINT_DTYPE",
    /// A tensor holds NaN or infinite values.
    CheckpointNotFinite = "ERR_CHECKPOINT_NOT_FINITE",
    /// `config.json` is missing, is not JSON, or lacks a field.
    ConfigInvalid = "ERR_CONFIG_INVALID",
    /// The architecture that `config.json` names is not supported.
    ConfigArchitecture = "ERR_CONFIG_ARCHITECTURE",
    /// `config.json` asks for a feature that is not supported (a rope scaling kind, an activation).
    ConfigUnsupported = "ERR_CONFIG_UNSUPPORTED",
    /// The checkpoint is quantized in a way that is not supported.
    QuantizationUnsupported = "ERR_QUANTIZATION_UNSUPPORTED",
    /// A conversion would change weights, and that was not allowed.
    ConversionInexact = "ERR_CONVERSION_INEXACT",
    /// `tokenizer.json` is missing, damaged, or does not fit the vocabulary of the model.
    TokenizerInvalid = "ERR_TOKENIZER_INVALID",
    /// The adapter folder is damaged or does not fit the model.
    AdapterInvalid = "ERR_ADAPTER_INVALID",
    /// No adapter of that name was loaded.
    AdapterUnknown = "ERR_ADAPTER_UNKNOWN",
    /// The calibration or evaluation text is empty or too short.
    TextTooShort = "ERR_TEXT_TOO_SHORT",
    /// A text file cannot be read or is not UTF-8.
    TextUnreadable = "ERR_TEXT_UNREADABLE",
    /// The output folder exists and is not empty.
    OutputNotEmpty = "ERR_OUTPUT_NOT_EMPTY",
    /// The output cannot be written.
    OutputUnwritable = "ERR_OUTPUT_UNWRITABLE",
    /// Another job is writing to this output.
    OutputBusy = "ERR_OUTPUT_BUSY",
    /// The disk has less space than the output and what the job keeps beside it take.
    OutputSpace = "ERR_OUTPUT_SPACE",
    /// The job needs more memory than there is or than it may take.
    MemoryExceeded = "ERR_MEMORY_EXCEEDED",
    /// What an interrupted job left belongs to another recipe, other input or another kind of machine.
    ResumeMismatch = "ERR_RESUME_MISMATCH",
    /// Saved statistics belong to another model or are of another version.
    StatisticsMismatch = "ERR_STATISTICS_MISMATCH",
    /// A vector or matrix argument has the wrong length.
    ShapeMismatch = "ERR_SHAPE_MISMATCH",
    /// An argument holds NaN or infinite values.
    ValueNotFinite = "ERR_VALUE_NOT_FINITE",
    /// A solver met a matrix that it cannot factor or decompose.
    SolverFailed = "ERR_SOLVER_FAILED",
    /// The prompt and the requested tokens do not fit into the context of the model.
    ContextExceeded = "ERR_CONTEXT_EXCEEDED",
    /// The CPU lacks what the forced level needs, or the level is not known.
    CpuLevel = "ERR_CPU_LEVEL",
    /// The work was cancelled by its caller.
    Cancelled = "ERR_CANCELLED",
    /// The handle was used after `dispose()`.
    Disposed = "ERR_DISPOSED",
    /// The operating system refused an operation that has no better code.
    Io = "ERR_IO",
    /// A defect in this library; please report it.
    Internal = "ERR_INTERNAL",
}

/// What went wrong, with what, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Stable code.
    pub code: ErrorCode,
    /// What was wrong, in one sentence.
    pub message: String,
    /// What it was wrong with: a path, a tensor name, an option name. May be empty.
    pub subject: String,
    /// How to fix it. May be empty.
    pub hint: String,
}

impl Error {
    /// An error with neither subject nor hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), subject: String::new(), hint: String::new() }
    }

    /// Says what the error is about.
    #[must_use]
    pub fn subject(mut self, subject: impl fmt::Display) -> Self {
        self.subject = subject.to_string();
        self
    }

    /// Says how to fix it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// An operating-system error with the path that it concerns.
    pub fn io(code: ErrorCode, path: &std::path::Path, error: &std::io::Error) -> Self {
        Error::new(code, error.to_string()).subject(path.display())
    }

    /// `ERR_OUTPUT_UNWRITABLE` for `path`.
    pub fn unwritable(path: &std::path::Path, error: &std::io::Error) -> Self {
        Error::io(ErrorCode::OutputUnwritable, path, error)
            .hint("Check that the folder exists, is writable and has space")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)?;
        if !self.subject.is_empty() {
            write!(f, " ({})", self.subject)?;
        }
        if !self.hint.is_empty() {
            write!(f, ". {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// The candidate with the smallest edit distance to `word`: for "did you mean" hints.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates.into_iter().min_by_key(|candidate| edit_distance(word, candidate))
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(!ca.eq_ignore_ascii_case(cb));
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_well_formed() {
        let mut seen = std::collections::HashSet::new();
        for code in ErrorCode::ALL {
            assert!(code.as_str().starts_with("ERR_"), "{code:?}");
            assert!(seen.insert(code.as_str()), "{code:?} is listed twice");
            assert!(!code.description().trim().is_empty());
        }
    }

    #[test]
    fn nearest_finds_the_typo() {
        assert_eq!(nearest("grupSize", ["bits", "groupSize", "method"]), Some("groupSize"));
        assert_eq!(nearest("x", []), None);
    }

    #[test]
    fn display_has_every_part() {
        let error =
            Error::new(ErrorCode::OptionInvalid, "bits must be 2, 3, 4, 5, 6 or 8").subject("bits").hint("Use 4");
        assert_eq!(error.to_string(), "ERR_OPTION_INVALID: bits must be 2, 3, 4, 5, 6 or 8 (bits). Use 4");
    }
}
