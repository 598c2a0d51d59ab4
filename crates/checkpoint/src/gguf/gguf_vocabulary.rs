//! The vocabulary of a GGUF file as a `tokenizer.json` that gives the tokens of llama.cpp.

use std::collections::{HashMap, HashSet};

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value, json};

use super::GgufMetadata;
use super::pre_tokenizers::{PRE_TOKENIZERS, PreTokenizer};

/// What stands for a space in vocabularies of SentencePiece.
pub(crate) const SPACE: char = '\u{2581}';
/// Longer tokens, in bytes, are not made by merges: a bound for the work that a vocabulary asks for.
const LONGEST_MERGED: usize = 256;
/// Most merges for each token. Vocabularies in use have two or three.
const MOST_MERGES: usize = 16;
/// Longer words, in characters, are unknown.
const LONGEST_WORD: usize = 1024;

/// Kinds of tokens in `tokenizer.ggml.token_type`.
pub(crate) mod token_kind {
    pub(crate) const NORMAL: i64 = 1;
    pub(crate) const UNKNOWN: i64 = 2;
    pub(crate) const CONTROL: i64 = 3;
    pub(crate) const USER_DEFINED: i64 = 4;
    pub(crate) const UNUSED: i64 = 5;
    pub(crate) const BYTE: i64 = 6;
}

use token_kind::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};

/// The vocabulary as the metadata has it, checked.
struct Vocabulary<'a> {
    metadata: &'a GgufMetadata,
    tokens: Vec<String>,
    kinds: Vec<i64>,
}

/// The template that turns a conversation into text.
///
/// # Errors
/// `ERR_TOKENIZER_INVALID` when it is no text.
pub(crate) fn chat_template_of(metadata: &GgufMetadata) -> Result<Option<String>> {
    Ok(metadata.text("tokenizer.chat_template").map_err(as_tokenizer)?.map(str::to_owned))
}

/// The `tokenizer.json` that says the same as the vocabulary in `metadata`.
///
/// # Errors
/// `ERR_TOKENIZER_INVALID` for a vocabulary that is missing, contradicts itself or is of a kind that is not known.
pub fn tokenizer_of(metadata: &GgufMetadata) -> Result<Value> {
    let kind = metadata.text("tokenizer.ggml.model").map_err(as_tokenizer)?;
    let vocabulary = Vocabulary::read(metadata)?;
    match kind {
        Some("llama") => vocabulary.sentence_piece(),
        Some("gpt2") => vocabulary.byte_level(),
        Some("bert") => vocabulary.word_piece(),
        Some(other) => Err(invalid(
            "tokenizer.ggml.model",
            format!("vocabularies of the kind '{other}' are not known"),
            "Known are llama, gpt2 and bert",
        )),
        None => Err(invalid("tokenizer.ggml.model", "the file holds no vocabulary".into(), "Take another copy")),
    }
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a GgufMetadata) -> Result<Self> {
        let name = "tokenizer.ggml.tokens";
        let stored = metadata.strings(name).map_err(as_tokenizer)?.unwrap_or_default();
        if stored.is_empty() {
            return Err(invalid(name, "the file holds no vocabulary".into(), "Take another copy"));
        }
        // As llama.cpp does; an empty token could not be told from nothing.
        let named =
            |(id, token): (usize, &String)| if token.is_empty() { format!("[EMPTY_{id}]") } else { token.clone() };
        let tokens: Vec<String> = stored.iter().enumerate().map(named).collect();
        let mut seen = HashSet::with_capacity(tokens.len());
        if let Some(twice) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
            return Err(invalid(name, format!("the token {twice:?} stands there twice"), "Take another copy"));
        }
        let name = "tokenizer.ggml.token_type";
        let kinds = metadata.integers(name).map_err(as_tokenizer)?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if kinds.len() != tokens.len() {
            let message = format!("{} kinds for {} tokens", kinds.len(), tokens.len());
            return Err(invalid(name, message, "The file is damaged; take another copy"));
        }
        Ok(Vocabulary { metadata, tokens, kinds })
    }

    /// Pieces with scores, spaces as `▁`: merges in the order of the score of what comes out.
    fn sentence_piece(&self) -> Result<Value> {
        let name = "tokenizer.ggml.scores";
        let scores = self.metadata.floats(name).map_err(as_tokenizer)?.unwrap_or_default();
        if scores.len() != self.tokens.len() || scores.iter().any(|score| score.is_nan()) {
            let message = format!("{} scores for {} tokens", scores.len(), self.tokens.len());
            return Err(invalid(name, message, "The file is damaged; take another copy"));
        }
        let prefix = self.flag("add_space_prefix")?.unwrap_or(true);
        let has_bytes = self.kinds.iter().filter(|&&kind| kind == BYTE).count() == 256;
        let space = SPACE.to_string();
        let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": space });
        let mut normalizers = vec![replace];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": space }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if prefix {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": space }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let unknown =
            self.token_id("unknown_token_id")?.or_else(|| self.kinds.iter().position(|&kind| kind == UNKNOWN));
        Ok(self.document(
            json!({ "type": "Sequence", "normalizers": normalizers }),
            Value::Null,
            self.around(true)?,
            json!({ "type": "Sequence", "decoders": decoders }),
            json!({
                "type": "BPE", "dropout": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "unk_token": unknown.map(|id| &self.tokens[id]), "fuse_unk": true, "byte_fallback": has_bytes,
                "ignore_merges": false, "vocab": self.ids(), "merges": self.merges_by_score(scores)?,
            }),
        ))
    }

    /// All pairs of tokens that make up a token, those with the best results first.
    fn merges_by_score(&self, scores: &[f32]) -> Result<Vec<[&str; 2]>> {
        let ids: HashMap<&str, usize> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        let mut merges: Vec<(f32, usize, [&str; 2])> = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if !matches!(self.kinds[id], NORMAL | USER_DEFINED | UNUSED) || token.len() > LONGEST_MERGED {
                continue;
            }
            for (cut, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(cut);
                if ids.contains_key(left) && ids.contains_key(right) {
                    merges.push((scores[id], id, [left, right]));
                }
            }
            if merges.len() > MOST_MERGES * self.tokens.len() {
                let message = format!("{} tokens are made by more than {} merges", self.tokens.len(), merges.len());
                return Err(invalid("tokenizer.ggml.tokens", message, "This is no vocabulary of a language model"));
            }
        }
        // Of the ways to one token the longest left part first: between equal scores the leftmost pair counts.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(b.2[0].len().cmp(&a.2[0].len())));
        Ok(merges.into_iter().map(|(_, _, pair)| pair).collect())
    }

    /// Bytes as visible characters, merged in the order of a list.
    fn byte_level(&self) -> Result<Value> {
        let name = "tokenizer.ggml.pre";
        let stated = self.metadata.text(name).map_err(as_tokenizer)?.unwrap_or("default");
        let pre_tokenizer = PreTokenizer::named(stated).ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|known| known.names).copied().collect();
            let message = format!("the way '{stated}' of cutting texts is not known");
            invalid(name, message, &format!("Known are: {}", known.join(", ")))
        })?;
        let name = "tokenizer.ggml.merges";
        let stored = self.metadata.strings(name).map_err(as_tokenizer)?.unwrap_or_default();
        let known: HashSet<&str> = self.tokens.iter().map(String::as_str).collect();
        let mut merges = Vec::with_capacity(stored.len());
        for merge in stored {
            // A token may begin with a space, but for the first character none is one.
            let cut = merge.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(cut, _)| cut);
            let Some(cut) = cut else {
                let message = format!("{merge:?} is no pair of tokens");
                return Err(invalid(name, message, "The file is damaged; take another copy"));
            };
            let (left, right) = (&merge[..cut], &merge[cut + 1..]);
            // Pairs whose parts or result are no tokens cannot come up in a text of this vocabulary.
            if known.contains(left) && known.contains(right) && known.contains(format!("{left}{right}").as_str()) {
                merges.push([left, right]);
            }
        }
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
        });
        Ok(self.document(
            Value::Null,
            pre_tokenizer.to_json(),
            self.around(pre_tokenizer.adds_start)?,
            byte_level,
            json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pre_tokenizer.ignore_merges, "vocab": self.ids(), "merges": merges,
            }),
        ))
    }

    /// Whole words with a mark in front, parts without; `tokenizer.json` marks the parts.
    fn word_piece(&self) -> Result<Value> {
        let unknown = self.token_id("unknown_token_id")?.map_or("[UNK]", |id| &self.tokens[id]);
        let plain = |token: &str| match token.strip_prefix(SPACE) {
            Some(word) => word.to_owned(),
            None if token.starts_with('[') && token.ends_with(']') => token.to_owned(),
            None => format!("##{token}"),
        };
        let mut ids = Map::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            let special = matches!(self.kinds[id], CONTROL | UNKNOWN);
            let text = if special { token.clone() } else { plain(token) };
            if ids.insert(text, json!(id)).is_some() {
                let message = format!("the token {token:?} stands there twice");
                return Err(invalid("tokenizer.ggml.tokens", message, "Take another copy"));
            }
        }
        let ends = [self.token_id("cls_token_id")?.or(self.token_id("bos_token_id")?), self.separator()?];
        Ok(self.document(
            json!({
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": true,
                "lowercase": true,
            }),
            json!({ "type": "BertPreTokenizer" }),
            self.template(ends),
            json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
            json!({
                "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
                "max_input_chars_per_word": LONGEST_WORD, "vocab": ids,
            }),
        ))
    }

    /// Tokens that stand before and behind a text.
    fn around(&self, adds_start: bool) -> Result<Value> {
        let start = self.flag("add_bos_token")?.unwrap_or(adds_start);
        let end = self.flag("add_eos_token")?.unwrap_or(false);
        let ends = [
            if start { self.token_id("bos_token_id")? } else { None },
            if end { self.token_id("eos_token_id")? } else { None },
        ];
        Ok(self.template(ends))
    }

    fn template(&self, ends: [Option<usize>; 2]) -> Value {
        if ends == [None, None] {
            return Value::Null;
        }
        let mut special = Map::new();
        let mut steps = vec![json!({ "Sequence": { "id": "A", "type_id": 0 } })];
        let mut step = |id: usize| {
            let token = &self.tokens[id];
            special.insert(token.clone(), json!({ "id": token, "ids": [id], "tokens": [token] }));
            json!({ "SpecialToken": { "id": token, "type_id": 0 } })
        };
        if let Some(id) = ends[0] {
            steps.insert(0, step(id));
        }
        if let Some(id) = ends[1] {
            steps.push(step(id));
        }
        let pair = [steps.as_slice(), &[json!({ "Sequence": { "id": "B", "type_id": 1 } })]].concat();
        json!({ "type": "TemplateProcessing", "single": steps, "pair": pair, "special_tokens": special })
    }

    /// The separator; older converters spell its name so.
    fn separator(&self) -> Result<Option<usize>> {
        Ok(match self.token_id("separator_token_id")? {
            Some(id) => Some(id),
            None => self.token_id("seperator_token_id")?.or(self.token_id("eos_token_id")?),
        })
    }

    fn document(&self, normalizer: Value, pre: Value, post: Value, decoder: Value, model: Value) -> Value {
        let added = |(id, token): (usize, &String)| {
            let special = matches!(self.kinds[id], CONTROL | UNKNOWN);
            (special || self.kinds[id] == USER_DEFINED).then(|| {
                json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special })
            })
        };
        let added: Vec<Value> = self.tokens.iter().enumerate().filter_map(added).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre, "post_processor": post, "decoder": decoder, "model": model,
        })
    }

    fn ids(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.metadata.flag(&format!("tokenizer.ggml.{name}")).map_err(as_tokenizer)
    }

    /// A token number of the metadata.
    fn token_id(&self, name: &str) -> Result<Option<usize>> {
        let name = format!("tokenizer.ggml.{name}");
        let Some(id) = self.metadata.unsigned(&name).map_err(as_tokenizer)? else { return Ok(None) };
        match usize::try_from(id) {
            Ok(id) if id < self.tokens.len() => Ok(Some(id)),
            _ => Err(invalid(&name, format!("there is no token {id}"), "The file is damaged; take another copy")),
        }
    }
}

fn invalid(subject: &str, message: String, hint: &str) -> Error {
    Error::new(ErrorCode::TokenizerInvalid, message).subject(subject).hint(hint)
}

/// The metadata is right in type or the tokenizer is wrong.
fn as_tokenizer(error: Error) -> Error {
    Error { code: ErrorCode::TokenizerInvalid, ..error }
}
