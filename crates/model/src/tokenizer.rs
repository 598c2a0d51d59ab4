use std::fmt::Display;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::Value;
use tokenizers::Decoder;

use crate::contained::contained;
use crate::tokenizer_document;

/// Text to token numbers and back, as `tokenizer.json` of a checkpoint says.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens such as `<0xE2>` stand for single bytes.
    byte_fallback: bool,
    vocabulary_size: usize,
    subject: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Truncation, padding and merge dropout that it may ask for are left out: they belong to
    /// training. `subject` names the file in errors.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID`.
    pub fn from_json(bytes: &[u8], subject: &str) -> Result<Self> {
        let invalid = |message: String| {
            Error::new(ErrorCode::TokenizerInvalid, message)
                .subject(subject)
                .hint("Take tokenizer.json from the folder that the weights come from")
        };
        // Syntax first: the reader of the tokenizers crate panics on some documents that end too early.
        let mut json: Value = serde_json::from_slice(bytes).map_err(|error| invalid(format!("not JSON: {error}")))?;
        if let Some(top) = json.as_object_mut() {
            top.insert("truncation".to_owned(), Value::Null);
            top.insert("padding".to_owned(), Value::Null);
            if let Some(dropout) = top.get_mut("model").and_then(|model| model.get_mut("dropout")) {
                *dropout = Value::Null;
            }
        }
        tokenizer_document::check(&json).map_err(invalid)?;
        let byte_fallback = has_byte_fallback(&json["decoder"]);
        let inner: tokenizers::Tokenizer = contained(|| serde_json::from_value(json))
            .map_err(|panic| invalid(format!("not a tokenizer: {panic}")))?
            .map_err(|error| invalid(format!("not a tokenizer: {error}")))?;
        let largest = inner.get_vocab(true).into_values().max();
        let vocabulary_size = largest.map_or(0, |id| id as usize + 1);
        if vocabulary_size == 0 {
            return Err(invalid("the vocabulary is empty".to_owned()));
        }
        Ok(Tokenizer { inner, byte_fallback, vocabulary_size, subject: subject.to_owned() })
    }

    /// The largest token number plus one, added tokens included: the rows that an embedding needs.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// Token numbers of `text`; `add_special` adds what the model expects around a prompt (a start token).
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` when the text has a part for which the vocabulary has no token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = contained(|| self.inner.encode_fast(text, add_special))
            .map_err(|panic| self.failure(&panic))?
            .map_err(|error| self.failure(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`. Numbers without a token are left out, as are special tokens if `skip_special`; bytes that are
    /// not UTF-8 become U+FFFD, without harm to valid characters beside them.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` when the decoder of the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut tokens: Vec<String> = ids.iter().filter_map(|&id| self.visible_token(id, skip_special)).collect();
        if self.byte_fallback {
            tokens = join_bytes(tokens);
        }
        match self.inner.get_decoder() {
            Some(decoder) => contained(|| decoder.decode(tokens))
                .map_err(|panic| self.failure(&panic))?
                .map_err(|error| self.failure(&error)),
            None => Ok(tokens.join(" ")),
        }
    }

    fn visible_token(&self, id: u32, skip_special: bool) -> Option<String> {
        // By number, not by text: the text of an added token comes back normalized, with a space in front or the like.
        match self.inner.get_added_tokens_decoder().get(&id) {
            Some(added) => (!skip_special || !added.special).then(|| added.content.clone()),
            None => self.inner.id_to_token(id),
        }
    }

    fn failure(&self, error: &dyn Display) -> Error {
        Error::new(ErrorCode::TokenizerInvalid, error.to_string())
            .subject(&self.subject)
            .hint("Take tokenizer.json from the folder that the weights come from")
    }
}

/// Whether a decoder of `tokenizer.json` turns byte tokens into bytes.
fn has_byte_fallback(decoder: &Value) -> bool {
    match decoder["type"].as_str() {
        Some("ByteFallback") => true,
        Some("Sequence") => decoder["decoders"].as_array().is_some_and(|list| list.iter().any(has_byte_fallback)),
        _ => false,
    }
}

/// Replaces each run of byte tokens by its text.
///
/// The decoder of the tokenizers crate gives up a whole run for one wrong byte, so that text which is complete could
/// still change; here, as in SentencePiece, the valid characters of a run stay.
fn join_bytes(tokens: Vec<String>) -> Vec<String> {
    let mut joined = Vec::with_capacity(tokens.len());
    let mut run = Vec::new();
    for token in tokens {
        if let Some(byte) = byte_of(&token) {
            run.push(byte);
            continue;
        }
        if !run.is_empty() {
            joined.push(String::from_utf8_lossy(&run).into_owned());
            run.clear();
        }
        joined.push(token);
    }
    if !run.is_empty() {
        joined.push(String::from_utf8_lossy(&run).into_owned());
    }
    joined
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_byte { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Tokens whose text a new token may depend on: the spaces around it, and the bytes of a character that it completes
/// (at most three before its own).
const CONTEXT_TOKENS: usize = 4;

/// Turns tokens into text one by one, special tokens left out.
///
/// A piece ends at the end of a character. The pieces of all tokens and [`TextStream::finish`] together are
/// [`Tokenizer::decode`] of all tokens. The work per token does not grow with the text, because only the last
/// few tokens are decoded again.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    window: Vec<u32>,
    /// Bytes of the window's text that were returned before.
    returned: usize,
}

impl TextStream {
    /// A stream at the start of a text, where some tokenizers drop a leading space.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stream that goes on after the text of `prompt`, so that a leading space stays.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32]) -> Result<Self> {
        let visible = prompt.iter().rev().filter(|&&id| tokenizer.visible_token(id, true).is_some());
        let mut window: Vec<u32> = visible.take(CONTEXT_TOKENS).copied().collect();
        window.reverse();
        let returned = tokenizer.decode(&window, true)?.len();
        Ok(TextStream { window, returned })
    }

    /// Takes the next token and returns the text that is complete now and was not before.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        if tokenizer.visible_token(id, true).is_none() {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = tokenizer.decode(&self.window, true)?;
        let complete = complete_len(&text);
        let Some(piece) = text.get(self.returned..complete) else {
            return Ok(String::new());
        };
        self.returned = complete;
        if self.window.len() >= 2 * CONTEXT_TOKENS {
            self.shorten(tokenizer, text.len() - complete)?;
        }
        Ok(piece.to_owned())
    }

    /// The rest, once no more tokens come: U+FFFD for a character that was not completed. Starts the stream anew.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.window, true)?;
        let rest = text.get(self.returned..).unwrap_or_default().to_owned();
        *self = TextStream::new();
        Ok(rest)
    }

    /// Forgets all but the last tokens, if their text ends in the same `held` bytes and something before them (a
    /// leading space may be dropped from it).
    fn shorten(&mut self, tokenizer: &Tokenizer, held: usize) -> Result<()> {
        let rest = &self.window[self.window.len() - CONTEXT_TOKENS..];
        let text = tokenizer.decode(rest, true)?;
        let complete = complete_len(&text);
        if complete > 0 && text.len() - complete == held {
            self.window = rest.to_vec();
            self.returned = complete;
        }
        Ok(())
    }
}

/// Length without a U+FFFD at the end, which may stand for the beginning of a character.
fn complete_len(text: &str) -> usize {
    text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(text).len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn asset(path: &str) -> Vec<u8> {
        std::fs::read(format!("{}/../../assets/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    fn text(name: &str) -> String {
        String::from_utf8(asset(&format!("text/{name}.txt"))).unwrap()
    }

    /// Byte-level BPE without special tokens around a text.
    fn byte_level() -> Tokenizer {
        Tokenizer::from_json(&asset("llama-7m/tokenizer.json"), "llama-7m").unwrap()
    }

    /// Spaces as `▁` with one prepended, start token 1, no tokens for single bytes.
    fn stories() -> Tokenizer {
        Tokenizer::from_json(&asset("tinystories-656k/tokenizer.json"), "tinystories-656k").unwrap()
    }

    /// The same with a token for every byte, which its model and decoder are made for.
    fn metaspace() -> Tokenizer {
        let mut json: Value = serde_json::from_slice(&asset("tinystories-656k/tokenizer.json")).unwrap();
        let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
        for byte in 0..256 {
            vocabulary.insert(format!("<0x{byte:02X}>"), json!(2048 + byte));
        }
        Tokenizer::from_json(json.to_string().as_bytes(), "tinystories-656k with bytes").unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, mut stream: TextStream, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(tokenizer, id).unwrap()).collect();
        pieces.push(stream.finish(tokenizer).unwrap());
        pieces
    }

    const HARD: &str = "  Naïve café — 漢字かな交じり文, Здравствуй 🤖🦾👩‍👩‍👧!\n\n\tdef f(x):  return x\u{fffd} ▁ end ";

    #[test]
    fn token_counts_of_the_published_perplexities() {
        // (windows of 256) and (windows of 512) in the tables of assets/README.md.
        let windows = |tokenizer: &Tokenizer, name: &str, length: usize| {
            tokenizer.encode(&text(name), false).unwrap().len() / length
        };
        let byte_level = byte_level();
        assert_eq!(windows(&byte_level, "eval-wikitext", 256), 349);
        assert_eq!(windows(&byte_level, "eval-stories", 512), 108);
        assert_eq!(windows(&byte_level, "eval-shakespeare", 256), 100);
        let stories = stories();
        assert_eq!(windows(&stories, "eval-stories", 256), 189);
        assert_eq!(windows(&stories, "eval-shakespeare", 512), 59);
    }

    #[test]
    fn a_text_of_megabytes_is_one_string() {
        let long = text("eval-stories").repeat(10);
        for tokenizer in [byte_level(), metaspace()] {
            let ids = tokenizer.encode(&long, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), long);
        }
    }

    #[test]
    fn special_tokens_are_added_and_skipped_on_request() {
        let tokenizer = metaspace();
        let plain = tokenizer.encode("Once upon a time", false).unwrap();
        let prompt = tokenizer.encode("Once upon a time", true).unwrap();
        assert_eq!(prompt, [&[1], plain.as_slice()].concat());
        assert_eq!(tokenizer.decode(&prompt, true).unwrap(), "Once upon a time");
        assert!(tokenizer.decode(&prompt, false).unwrap().starts_with("<|start_story|>"));
        assert_eq!(byte_level().encode("a", true).unwrap(), byte_level().encode("a", false).unwrap());
    }

    #[test]
    fn vocabulary_reaches_the_largest_token() {
        assert_eq!(byte_level().vocabulary_size(), 4096);
        assert_eq!(stories().vocabulary_size(), 2048);
        assert_eq!(metaspace().vocabulary_size(), 2304);
        // An added token far above the rest: one token more, but 5001 rows.
        let mut json: Value = serde_json::from_slice(&asset("llama-7m/tokenizer.json")).unwrap();
        let far = json!({ "id": 5000, "content": "<far>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false });
        json["added_tokens"].as_array_mut().unwrap().push(far);
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), "edited");
        // The tokenizers crate may refuse or renumber it; either way every token that encode returns has a row.
        if let Ok(tokenizer) = tokenizer {
            let ids = tokenizer.encode("a<far>b", false).unwrap();
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocabulary_size()));
        }
    }

    #[test]
    fn training_settings_in_the_file_do_not_change_the_tokens() {
        let mut json: Value = serde_json::from_slice(&asset("llama-7m/tokenizer.json")).unwrap();
        json["truncation"] = json!({ "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0 });
        json["padding"] = json!({ "strategy": { "Fixed": 4096 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>" });
        json["model"]["dropout"] = json!(0.5);
        let edited = Tokenizer::from_json(json.to_string().as_bytes(), "edited").unwrap();
        let text = &text("eval-wikitext")[..2000];
        assert_eq!(edited.encode(text, false).unwrap(), byte_level().encode(text, false).unwrap());
    }

    #[test]
    fn damaged_files_are_refused_with_their_name() {
        let whole = asset("tinystories-656k/tokenizer.json");
        let cuts = (0..whole.len()).step_by(whole.len() / 200).map(|end| whole[..end].to_vec());
        let others = [b"null".to_vec(), b"[]".to_vec(), b"{}".to_vec(), b"\xff\xfe".to_vec()];
        let empty = br#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}"#.to_vec();
        for bytes in cuts.chain(others).chain([empty]) {
            let error = Tokenizer::from_json(&bytes, "folder/tokenizer.json").unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::TokenizerInvalid, "folder/tokenizer.json"));
            assert!(!error.hint.is_empty());
        }
    }

    #[test]
    fn fields_of_the_wrong_kind_are_refused() {
        let whole: Value = serde_json::from_slice(&asset("tinystories-656k/tokenizer.json")).unwrap();
        for field in ["version", "added_tokens", "normalizer", "post_processor", "decoder", "model"] {
            for wrong in [json!(7), json!("x"), json!([{}]), json!({ "type": "Sequence" }), json!({ "type": "BPE" })] {
                let mut json = whole.clone();
                json[field] = wrong;
                if let Err(error) = Tokenizer::from_json(json.to_string().as_bytes(), "edited") {
                    assert_eq!(error.code, ErrorCode::TokenizerInvalid, "{field}");
                }
            }
        }
    }

    #[test]
    fn pieces_are_whole_characters_and_make_up_the_text() {
        for tokenizer in [byte_level(), metaspace()] {
            let sample = HARD.replace(['\u{fffd}', '▁'], "");
            let ids = tokenizer.encode(&sample, false).unwrap();
            let pieces = pieces(&tokenizer, TextStream::new(), &ids);
            assert_eq!(pieces.concat(), sample);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
            assert_eq!(pieces.last().map(String::as_str), Some(""), "the last character was complete");
            assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 30, "the text comes bit by bit");
        }
    }

    #[test]
    fn a_character_of_several_tokens_comes_with_its_last() {
        for tokenizer in [byte_level(), metaspace()] {
            let ids = tokenizer.encode("x🤖🤖", false).unwrap();
            let all = pieces(&tokenizer, TextStream::new(), &ids);
            let robots: Vec<usize> = (0..all.len()).filter(|&at| all[at].contains('🤖')).collect();
            assert_eq!(robots.len(), 2, "{all:?}");
            assert_eq!(robots[1], ids.len() - 1, "{all:?}");
        }
    }

    #[test]
    fn the_space_after_a_prompt_stays() {
        let tokenizer = metaspace();
        let space_first = (0..2048).find(|&id| {
            let token = tokenizer.visible_token(id, true).unwrap_or_default();
            token.len() > 5 && token.starts_with('▁') && token.chars().skip(1).all(char::is_alphabetic)
        });
        let id = space_first.expect("a token that begins with a space");
        let word = tokenizer.decode(&[id], true).unwrap();
        assert!(!word.starts_with(' '), "at the start of a text the space is dropped");
        let prompt = tokenizer.encode("Once upon a time", true).unwrap();
        let after = TextStream::after(&tokenizer, &prompt).unwrap();
        assert_eq!(pieces(&tokenizer, after, &[id]).concat(), format!(" {word}"));
        assert_eq!(pieces(&tokenizer, TextStream::new(), &[1, id]).concat(), word);
        let after_nothing = TextStream::after(&tokenizer, &[1]).unwrap();
        assert_eq!(pieces(&tokenizer, after_nothing, &[id]).concat(), word);
    }

    #[test]
    fn a_wrong_byte_does_not_harm_its_neighbours() {
        let tokenizer = metaspace();
        let byte = |byte: u8| tokenizer.inner.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
        let ids = [byte(0xC3), byte(0xA9), byte(0xFF), byte(0xC3), byte(0xA9)];
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "é\u{fffd}é");
        assert_eq!(pieces(&tokenizer, TextStream::new(), &ids), ["", "é", "", "\u{fffd}", "é", ""]);
    }

    #[test]
    fn the_window_does_not_grow() {
        for tokenizer in [byte_level(), metaspace()] {
            let mut stream = TextStream::new();
            for id in (0..5000u32).map(|i| i.wrapping_mul(2_654_435_761) % 2048) {
                stream.push(&tokenizer, id).unwrap();
                assert!(stream.window.len() <= 3 * CONTEXT_TOKENS, "{}", stream.window.len());
            }
        }
    }

    #[test]
    fn byte_tokens_have_two_digits() {
        assert_eq!(byte_of("<0x0a>"), Some(10));
        for token in ["<0x+a>", "<0xa>", "<0x0aa>", "0x0a", "<0x é>"] {
            assert_eq!(byte_of(token), None, "{token}");
        }
    }

    proptest! {
        #[test]
        fn a_stream_of_any_tokens_equals_decoding_them_all(
            ids in prop::collection::vec(prop_oneof![0u32..5000, 0u32..300], 0..60),
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            prompt in prop::collection::vec(0u32..2048, 0..8),
        ) {
            for tokenizer in [&*BYTE_LEVEL, &*METASPACE] {
                prop_assert_eq!(pieces(tokenizer, TextStream::new(), &ids).concat(), tokenizer.decode(&ids, true).unwrap());
                // Continuing a prompt that ends with a whole character.
                let before = tokenizer.decode(&prompt, true).unwrap();
                if !before.ends_with('\u{fffd}') && before.len() > 2 {
                    let all = [prompt.as_slice(), &ids].concat();
                    let after = TextStream::after(tokenizer, &prompt).unwrap();
                    let continued = pieces(tokenizer, after, &ids).concat();
                    prop_assert_eq!(before + &continued, tokenizer.decode(&all, true).unwrap());
                }
            }
            let byte_tokens: Vec<u32> =
                bytes.iter().map(|byte| METASPACE.inner.token_to_id(&format!("<0x{byte:02X}>")).unwrap()).collect();
            let streamed = pieces(&METASPACE, TextStream::new(), &byte_tokens).concat();
            let whole = String::from_utf8_lossy(&bytes);
            prop_assert_eq!(&streamed, whole.strip_prefix(' ').unwrap_or(&whole));
        }
    }

    static BYTE_LEVEL: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(byte_level);
    static METASPACE: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(metaspace);
}
