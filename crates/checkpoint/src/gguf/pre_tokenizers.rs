//! How byte-level vocabularies cut a text before they merge: `tokenizer.ggml.pre` names the regular expressions, which
//! are those of the `tokenizer.json` of the models.

use serde_json::{Value, json};

/// A way of cutting.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`; the first is written.
    pub(crate) names: &'static [&'static str],
    /// Each cuts the pieces of the one before: its matches, and what lies between them.
    pub(crate) patterns: &'static [&'static str],
    /// A piece that is a token is not put together by merges.
    pub(crate) ignore_merges: bool,
    /// Whether a start token is added where the metadata does not say.
    pub(crate) adds_start: bool,
}

/// The pattern of GPT-2, which the byte-level step of `tokenizer.json` knows by itself.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const DIGITS: &str = r"\p{N}";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";

/// Every way that is known.
pub(crate) const PRE_TOKENIZERS: &[PreTokenizer] = &[
    plain(&["gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo", "jais"], &[GPT2]),
    PreTokenizer {
        ignore_merges: true,
        adds_start: true,
        ..plain(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3])
    },
    plain(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    plain(&["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"], &[QWEN2]),
    plain(&["gpt-4o", "llama4"], &[GPT4O]),
    PreTokenizer { ignore_merges: true, adds_start: true, ..plain(&["tekken"], &[TEKKEN]) },
    plain(&["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"], &[DIGITS, GPT2]),
    plain(&["falcon"], &[PUNCTUATION, GPT2, "[0-9][0-9][0-9]"]),
    plain(&["default"], &[PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, patterns, ignore_merges: false, adds_start: false }
}

impl PreTokenizer {
    /// The one of that name in the metadata.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        PRE_TOKENIZERS.iter().find(|known| known.names.contains(&name))
    }

    /// As `tokenizer.json` says it.
    pub(crate) fn to_json(&self) -> Value {
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex });
        if self.patterns == [GPT2] {
            return byte_level(true);
        }
        let split = |pattern: &&str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let steps: Vec<Value> = self.patterns.iter().map(split).chain([byte_level(false)]).collect();
        json!({ "type": "Sequence", "pretokenizers": steps })
    }

    /// The one that a `tokenizer.json` asks for, with the name to write.
    pub(crate) fn of_json(pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static Self> {
        let patterns = patterns_of(pre_tokenizer)?;
        let same =
            |known: &&PreTokenizer| known.patterns.iter().map(|pattern| normal(pattern)).eq(patterns.iter().cloned());
        let mut candidates = PRE_TOKENIZERS.iter().filter(same);
        let first = candidates.next()?;
        if first.ignore_merges == ignore_merges {
            return Some(first);
        }
        // Most vocabularies give the same tokens either way, so one that differs in this only will do.
        candidates.find(|known| known.ignore_merges == ignore_merges).or(Some(first))
    }
}

/// The patterns of the steps of a pre-tokenizer, `None` for one that has other steps.
fn patterns_of(step: &Value) -> Option<Vec<String>> {
    match step["type"].as_str()? {
        "Sequence" => {
            let steps = step["pretokenizers"].as_array()?.iter().map(patterns_of);
            Some(steps.collect::<Option<Vec<_>>>()?.concat())
        }
        "ByteLevel" if step["add_prefix_space"] == true => None,
        "ByteLevel" if step["use_regex"] == false => Some(Vec::new()),
        "ByteLevel" => Some(vec![normal(GPT2)]),
        "Digits" if step["individual_digits"] == true => Some(vec![normal(DIGITS)]),
        "Split" if step["invert"] != true && matches!(step["behavior"].as_str(), Some("Isolated" | "Removed")) => {
            Some(vec![normal(step["pattern"]["Regex"].as_str()?)])
        }
        _ => None,
    }
}

/// Spellings of one pattern that mean the same.
fn normal(pattern: &str) -> String {
    pattern
        .replace("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
        .replace("(?i:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_recognized() {
        for known in PRE_TOKENIZERS {
            let found = PreTokenizer::of_json(&known.to_json(), known.ignore_merges).unwrap();
            assert_eq!(found.names[0], known.names[0]);
        }
        assert!(PreTokenizer::of_json(&json!({ "type": "Whitespace" }), false).is_none());
    }
}
