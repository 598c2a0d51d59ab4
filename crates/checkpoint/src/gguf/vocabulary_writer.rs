//! A `tokenizer.json` as the vocabulary of a GGUF file.

use std::collections::HashMap;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use super::gguf_config::{integers, token_of};
use super::gguf_vocabulary::{SPACE, token_kind};
use super::pre_tokenizers::PreTokenizer;
use super::{GgufArray, GgufMetadata, GgufValue};

use token_kind::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};

/// A vocabulary on its way into the metadata.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i64>,
}

/// Puts the vocabulary of a `tokenizer.json` into `metadata`, for a model whose embedding has `rows` rows. Gives what
/// llama.cpp may do otherwise, as a sentence.
///
/// # Errors
/// `ERR_TOKENIZER_INVALID` for a tokenizer of a kind that GGUF has no name for.
pub(crate) fn set_vocabulary(
    metadata: &mut GgufMetadata,
    tokenizer: &Value,
    config: &Map<String, Value>,
    rows: usize,
    subject: &str,
) -> Result<Option<String>> {
    let refused = |message: String| {
        Error::new(ErrorCode::TokenizerInvalid, message)
            .subject(subject)
            .hint("GGUF holds byte-level BPE with a pattern of a known model, and BPE of SentencePiece")
    };
    let model = &tokenizer["model"];
    // Files of before that field named every model.
    let kind = model["type"].as_str().unwrap_or(if model["merges"].is_array() { "BPE" } else { "" });
    if kind != "BPE" {
        return Err(refused(format!("a tokenizer of the kind {kind:?} cannot be written")));
    }
    let merges = merges_of(model).ok_or_else(|| refused("the merges are no pairs of tokens".into()))?;
    let tokens = Tokens::read(tokenizer, rows).map_err(&refused)?;
    let is_spaced = contains(&tokenizer["normalizer"], "Replace", "content", SPACE)
        || contains(&tokenizer["pre_tokenizer"], "Metaspace", "replacement", SPACE);
    let mut notice = None;
    if is_spaced {
        notice = set_sentence_pieces(metadata, tokenizer, &tokens, &merges);
    } else {
        if !tokenizer["normalizer"].is_null() && !is_nothing(&tokenizer["normalizer"]) {
            return Err(refused("byte-level vocabularies of GGUF do not normalize texts, this tokenizer does".into()));
        }
        let pre = PreTokenizer::of_json(&tokenizer["pre_tokenizer"], model["ignore_merges"] == true)
            .ok_or_else(|| refused(format!("GGUF has no name for the pre-tokenizer {}", tokenizer["pre_tokenizer"])))?;
        metadata.set_text("tokenizer.ggml.model", "gpt2");
        metadata.set_text("tokenizer.ggml.pre", pre.names[0]);
        let merges = merges.iter().map(|[left, right]| format!("{left} {right}")).collect();
        metadata.set("tokenizer.ggml.merges", GgufValue::Array(GgufArray::String(merges)));
    }
    set_specials(metadata, tokenizer, config, &tokens);
    let kinds = tokens.kinds.iter().map(|&kind| kind as i32).collect();
    metadata.set("tokenizer.ggml.token_type", integers(kinds));
    metadata.set("tokenizer.ggml.tokens", GgufValue::Array(GgufArray::String(tokens.texts)));
    Ok(notice)
}

impl Tokens {
    /// The texts by their numbers, filled up to `rows`.
    fn read(tokenizer: &Value, rows: usize) -> Result<Self, String> {
        let mut texts: Vec<Option<String>> = vec![None; rows];
        let mut kinds = vec![NORMAL; rows];
        let mut place = |id: Option<u64>, text: &str| -> Result<usize, String> {
            let id = id.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
            let id = id.ok_or_else(|| format!("the number of the token {text:?} is outside of the embedding"))?;
            texts[id] = Some(text.to_owned());
            Ok(id)
        };
        let vocabulary = tokenizer["model"]["vocab"].as_object().ok_or("the vocabulary is no object")?;
        let byte_fallback = tokenizer["model"]["byte_fallback"] == true;
        for (text, id) in vocabulary {
            let id = place(id.as_u64(), text)?;
            if byte_fallback && is_byte(text) {
                kinds[id] = BYTE;
            }
        }
        for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().ok_or("an added token has no text")?;
            let id = place(added["id"].as_u64(), text)?;
            kinds[id] = if added["special"] == true { CONTROL } else { USER_DEFINED };
        }
        if let Some(id) = tokenizer["model"]["unk_token"].as_str().and_then(|unknown| vocabulary.get(unknown)?.as_u64())
        {
            kinds[id as usize] = UNKNOWN;
        }
        let fill = |(id, text): (usize, Option<String>)| text.unwrap_or_else(|| format!("[PAD{id}]"));
        for (kind, text) in kinds.iter_mut().zip(&texts) {
            if text.is_none() {
                *kind = UNUSED;
            }
        }
        Ok(Tokens { texts: texts.into_iter().enumerate().map(fill).collect(), kinds })
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.texts.iter().position(|known| known == text).map(|id| id as u32)
    }
}

/// The pairs, in whichever of its two spellings the file has them.
fn merges_of(model: &Value) -> Option<Vec<[String; 2]>> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(left, right)| [left.to_owned(), right.to_owned()]),
        Value::Array(parts) => match parts.as_slice() {
            [Value::String(left), Value::String(right)] => Some([left.clone(), right.clone()]),
            _ => None,
        },
        _ => None,
    };
    model["merges"].as_array()?.iter().map(pair).collect()
}

fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

fn is_nothing(normalizer: &Value) -> bool {
    normalizer["type"] == "Sequence" && normalizer["normalizers"].as_array().is_some_and(Vec::is_empty)
}

/// Whether a step of that type, or one in a sequence, has `text` in `field`.
fn contains(step: &Value, kind: &str, field: &str, text: char) -> bool {
    let inside =
        |list: &str| step[list].as_array().is_some_and(|steps| steps.iter().any(|s| contains(s, kind, field, text)));
    match step["type"].as_str() {
        Some("Sequence") => inside("normalizers") || inside("pretokenizers"),
        Some(found) => found == kind && step[field].as_str().is_some_and(|found| found.chars().eq([text])),
        None => false,
    }
}

/// Scores that order merges as the list does: of each token that of its first merge.
fn set_sentence_pieces(
    metadata: &mut GgufMetadata,
    tokenizer: &Value,
    tokens: &Tokens,
    merges: &[[String; 2]],
) -> Option<String> {
    let mut first: HashMap<String, usize> = HashMap::new();
    for (rank, [left, right]) in merges.iter().enumerate() {
        first.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |text: &String| first.get(text).map_or(-(merges.len() as f32), |&rank| -(rank as f32));
    let scores = tokens.texts.iter().zip(&tokens.kinds).map(|(text, &kind)| match kind {
        NORMAL => score(text),
        BYTE => 0.0,
        _ => -1000.0 - merges.len() as f32,
    });
    metadata.set_text("tokenizer.ggml.model", "llama");
    metadata.set_text("tokenizer.ggml.pre", "default");
    metadata.set("tokenizer.ggml.scores", GgufValue::Array(GgufArray::F32(scores.collect())));
    let prefix =
        contains(&tokenizer["normalizer"], "Prepend", "prepend", SPACE) || has_prefix(&tokenizer["pre_tokenizer"]);
    metadata.set("tokenizer.ggml.add_space_prefix", GgufValue::Bool(prefix));
    // llama.cpp merges whatever makes up a token, the list says which pairs do.
    let known: std::collections::HashSet<(&str, &str)> =
        merges.iter().map(|[left, right]| (left.as_str(), right.as_str())).collect();
    let ids: std::collections::HashSet<&str> = tokens.texts.iter().map(String::as_str).collect();
    let missing = tokens.texts.iter().zip(&tokens.kinds).filter(|&(_, &kind)| kind == NORMAL).any(|(text, _)| {
        let mut cuts = text.char_indices().skip(1).map(|(cut, _)| text.split_at(cut));
        cuts.any(|(left, right)| ids.contains(left) && ids.contains(right) && !known.contains(&(left, right)))
    });
    missing.then(|| "llama.cpp may cut some texts otherwise: it merges every pair that makes up a token".to_owned())
}

fn has_prefix(pre_tokenizer: &Value) -> bool {
    let of_steps = pre_tokenizer["pretokenizers"].as_array().is_some_and(|steps| steps.iter().any(has_prefix));
    let own = pre_tokenizer["type"] == "Metaspace"
        && (pre_tokenizer["add_prefix_space"] == true
            || matches!(pre_tokenizer["prepend_scheme"].as_str(), Some("always" | "first")));
    of_steps || own
}

/// Start, end and unknown token, and which of them stand around a text.
fn set_specials(metadata: &mut GgufMetadata, tokenizer: &Value, config: &Map<String, Value>, tokens: &Tokens) {
    let around = &tokenizer["post_processor"];
    let template = match around["processors"].as_array() {
        Some(steps) => steps.iter().find(|step| step["type"] == "TemplateProcessing"),
        None => Some(around).filter(|step| step["type"] == "TemplateProcessing"),
    };
    let single = template.and_then(|template| template["single"].as_array());
    let start = single.and_then(|steps| special_token(steps.first()?));
    let end = single.and_then(|steps| special_token(steps.last()?));
    let start_id = start.and_then(|text| tokens.id(text)).or_else(|| token_of(config, "bos_token_id"));
    let end_id = token_of(config, "eos_token_id").or_else(|| end.and_then(|text| tokens.id(text)));
    let inside = |id: &u32| (*id as usize) < tokens.texts.len();
    if let Some(id) = start_id.filter(inside) {
        metadata.set("tokenizer.ggml.bos_token_id", GgufValue::U32(id));
    }
    if let Some(id) = end_id.filter(inside) {
        metadata.set("tokenizer.ggml.eos_token_id", GgufValue::U32(id));
    }
    if let Some(id) = tokens.kinds.iter().position(|&kind| kind == UNKNOWN) {
        metadata.set("tokenizer.ggml.unknown_token_id", GgufValue::U32(id as u32));
    }
    metadata.set("tokenizer.ggml.add_bos_token", GgufValue::Bool(start.is_some()));
    metadata.set("tokenizer.ggml.add_eos_token", GgufValue::Bool(end.is_some()));
}

fn special_token(step: &Value) -> Option<&str> {
    step["SpecialToken"]["id"].as_str()
}
