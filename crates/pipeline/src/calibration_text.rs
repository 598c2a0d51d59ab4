use kintsugi_model::{DecoderSpec, Tokenizer};
use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::CalibrationRecipe;

/// The tokens that calibration runs over: whole sequences from the beginning of the text.
#[derive(Clone, Debug)]
pub struct CalibrationText {
    tokens: Vec<u32>,
    length: usize,
}

impl CalibrationText {
    /// Reads, checks and tokenizes the text of `recipe`.
    ///
    /// # Errors
    /// `ERR_TEXT_UNREADABLE`, `ERR_TEXT_TOO_SHORT`, `ERR_CONTEXT_EXCEEDED`.
    pub fn read(recipe: &CalibrationRecipe, tokenizer: &Tokenizer, spec: &DecoderSpec) -> Result<Self> {
        let subject = recipe.text.display();
        if recipe.length > spec.context_length {
            let message = format!(
                "calibration sequences of {} tokens exceed the context of {}",
                recipe.length, spec.context_length
            );
            return Err(Error::new(ErrorCode::ContextExceeded, message)
                .subject("calibration.length")
                .hint(format!("Use a length of at most {}", spec.context_length)));
        }
        let bytes = std::fs::read(&recipe.text).map_err(|error| {
            Error::io(ErrorCode::TextUnreadable, &recipe.text, &error).hint("Give the path of a UTF-8 text file")
        })?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Error::new(ErrorCode::TextUnreadable, format!("the text is not UTF-8 at byte {at}"))
                .subject(subject.to_string())
                .hint("Convert the file to UTF-8")
        })?;
        let tokens = tokenizer.encode(&text, false)?;
        let sequences = (tokens.len() / recipe.length).min(recipe.sequences);
        if sequences == 0 {
            let message = format!("the text has {} tokens, less than one sequence of {}", tokens.len(), recipe.length);
            return Err(Error::new(ErrorCode::TextTooShort, message)
                .subject(subject.to_string())
                .hint("Give a longer text or a smaller calibration.length"));
        }
        let mut tokens = tokens;
        tokens.truncate(sequences * recipe.length);
        Ok(CalibrationText { tokens, length: recipe.length })
    }

    /// All tokens, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of a sequence.
    pub fn length(&self) -> usize {
        self.length
    }
}
