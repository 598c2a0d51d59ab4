//! What a `tokenizer.json` may not ask for. The tokenizers crate trusts its files: a few bytes make it reserve gigabytes,
//! multiply a text without end, or read a text at a place that is none.
//!
//! Objects are known by their fields, not by their `type`, which that crate does not need either.

use serde_json::{Map, Value};

/// Most bytes that a byte of text may become on its way through all replacements. Real files stay far below: the largest map of
/// characters that is common, nmt_nfkc, makes 33 bytes of 3.
const MOST_GROWTH: usize = 4096;
/// Most regular expressions; each may take ten megabytes when it is compiled.
const MOST_EXPRESSIONS: usize = 32;

/// Checks a document before it becomes a tokenizer.
///
/// # Errors
/// What stands against it, as a sentence.
pub(crate) fn check(document: &Value) -> Result<(), String> {
    for stage in ["normalizer", "pre_tokenizer", "decoder", "post_processor"] {
        let mut steps = Steps { growth: 1, expressions: 0 };
        steps.walk(&document[stage])?;
        if steps.growth > MOST_GROWTH {
            return Err(format!("the {stage} may make a text more than {MOST_GROWTH} times as long"));
        }
        if steps.expressions > MOST_EXPRESSIONS {
            return Err(format!("the {stage} has more than {MOST_EXPRESSIONS} regular expressions"));
        }
    }
    check_merges(&document["model"])
}

/// What the steps of a stage do to the length of a text, all of them together.
struct Steps {
    growth: usize,
    expressions: usize,
}

impl Steps {
    /// `value` is a step, or holds steps. Documents are nested no deeper than the JSON parser allows.
    fn walk(&mut self, value: &Value) -> Result<(), String> {
        match value {
            Value::Array(values) => values.iter().try_for_each(|value| self.walk(value)),
            Value::Object(fields) => {
                let factor = growth(fields)?;
                self.growth = self.growth.saturating_mul(factor);
                self.expressions += usize::from(fields.contains_key("Regex"));
                fields.values().try_for_each(|value| self.walk(value))
            }
            _ => Ok(()),
        }
    }
}

/// By how much a step may lengthen a text.
fn growth(step: &Map<String, Value>) -> Result<usize, String> {
    if let Some(map) = step.get("precompiled_charsmap").and_then(Value::as_str) {
        // What is no base64 is refused by the tokenizers crate.
        return base64(map).map_or(Ok(1), |bytes| longest_replacement(&bytes));
    }
    if step.get("type").is_some_and(|kind| kind == "FixedLength") && step.get("length") == Some(&Value::from(0)) {
        return Err("texts are cut into pieces of no length".into());
    }
    if let (Some(pattern), Some(content)) = (step.get("pattern"), step.get("content").and_then(Value::as_str)) {
        return Ok(match pattern["String"].as_str().map(str::len) {
            Some(length) if length > 0 => content.len().div_ceil(length).max(1),
            // Between all characters, it may be.
            _ => 1 + content.len(),
        });
    }
    let repeats = |template: &Value| match template {
        Value::Array(pieces) => pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count(),
        Value::String(pieces) => pieces.matches('$').count(),
        _ => 1,
    };
    let templates = ["single", "pair"].iter().filter_map(|template| step.get(*template));
    Ok(templates.map(repeats).max().unwrap_or(1).max(1))
}

/// The bytes of the longest text in a map of characters, the `precompiled_charsmap` of SentencePiece: bytes of a table,
/// the table (a trie as a double array of 32-bit units), and texts that end with a zero.
///
/// # Errors
/// When a way through the table leads out of it, or to a place that is not the start of a text.
fn longest_replacement(map: &[u8]) -> Result<usize, String> {
    let (length, rest) = map.split_first_chunk().ok_or("the map of characters is cut off")?;
    let length = u32::from_le_bytes(*length) as usize / 4 * 4;
    let (table, texts) = rest.split_at_checked(length).ok_or("the map of characters is cut off")?;
    let (table, _) = table.as_chunks::<4>();
    let texts = std::str::from_utf8(texts).map_err(|_| "the texts of the map of characters are not UTF-8")?;
    // From each place to the zero behind it.
    let mut left = vec![0; texts.len() + 1];
    for (place, &byte) in texts.as_bytes().iter().enumerate().rev() {
        left[place] = if byte == 0 { 0 } else { left[place + 1] + 1 };
    }

    let unit = |place: usize| u32::from_le_bytes(table[place]) as usize;
    let offset = |unit: usize| (unit >> 10) << ((unit & 1 << 9) >> 6);
    let outside = || "the map of characters leads out of its table".to_owned();
    let mut seen = vec![false; table.len()];
    let mut longest = 1;
    let mut ways = vec![if table.is_empty() { return Err(outside()) } else { offset(unit(0)) }];
    while let Some(base) = ways.pop() {
        // The units of all bytes that may come next.
        if base | 0xff >= table.len() {
            return Err(outside());
        }
        if std::mem::replace(&mut seen[base], true) {
            continue;
        }
        for byte in 1..=0xff {
            let next = unit(base ^ byte);
            if next & (1 << 31 | 0xff) != byte {
                continue;
            }
            let target = base ^ byte ^ offset(next);
            if next >> 8 & 1 == 1 {
                let place = unit(*Some(&target).filter(|&&target| target < table.len()).ok_or_else(outside)?);
                let place = place & ((1 << 31) - 1);
                if !texts.is_char_boundary(place) {
                    return Err("the map of characters leads to a place without a text".into());
                }
                longest = longest.max(left[place]);
            }
            ways.push(target);
        }
    }
    Ok(longest)
}

/// The second half of each merge loses as many bytes as the prefix of continued words has.
fn check_merges(model: &Value) -> Result<(), String> {
    let prefix = model["continuing_subword_prefix"].as_str().map_or(0, str::len);
    let merges = model["merges"].as_array().filter(|_| prefix > 0);
    for merge in merges.into_iter().flatten() {
        let second = match merge {
            Value::String(both) => both.split_once(' ').map(|(_, second)| second),
            both => both[1].as_str(),
        };
        if second.is_some_and(|second| !second.is_char_boundary(prefix)) {
            return Err(format!("the merge {merge} does not begin with the prefix of continued words"));
        }
    }
    Ok(())
}

/// The bytes of a text in base64 (RFC 4648, with padding); `None` when it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut bits = 0;
        for (place, digit) in group.iter().enumerate() {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits |= u32::from(value) << (18 - 6 * place);
        }
        bytes.extend(&bits.to_be_bytes()[1..][..group.len() * 6 / 8]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn replacements_may_lengthen_a_text_but_not_without_end() {
        let tenfold = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaaaa" });
        let sequence = |count| json!({ "normalizer": { "normalizers": vec![tenfold.clone(); count] } });
        assert_eq!(check(&sequence(3)), Ok(()));
        assert!(check(&sequence(4)).unwrap_err().contains("normalizer"));
        let metaspace = json!({ "pattern": { "String": " " }, "content": "▁" });
        let prefix = json!({ "decoder": [metaspace, { "pattern": { "Regex": " {2,}" }, "content": " " }] });
        assert_eq!(check(&prefix), Ok(()));
        let everywhere = json!({ "pattern": { "Regex": "" }, "content": "x".repeat(5000) });
        assert!(check(&json!({ "decoder": everywhere })).unwrap_err().contains("decoder"));
        let twice = json!({ "single": [{ "Sequence": { "id": "A" } }, { "Sequence": { "id": "A" } }] });
        assert_eq!(check(&json!({ "post_processor": vec![twice.clone(); 12] })), Ok(()));
        assert!(check(&json!({ "post_processor": vec![twice; 13] })).is_err());
    }

    #[test]
    fn merges_lose_whole_characters() {
        let model =
            |prefix: &str, merge: Value| json!({ "model": { "continuing_subword_prefix": prefix, "merges": [merge] } });
        assert_eq!(check(&model("##", json!("a ##b"))), Ok(()));
        assert_eq!(check(&model("", json!("a é"))), Ok(()));
        for merge in [json!("a é"), json!(["a", "é"]), json!(["a", ""])] {
            assert!(check(&model("#", merge)).is_err());
        }
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(base64(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64("Zm9*"), None);
    }

    /// The seeds of the fuzz target: every kind of step and model.
    fn seeds() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/tokenizer");
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
    }

    #[test]
    fn the_seeds_are_tokenizers() {
        for (number, seed) in seeds().iter().enumerate() {
            let tokenizer =
                crate::Tokenizer::from_json(seed, "seed").unwrap_or_else(|error| panic!("{number}: {error}"));
            assert!(tokenizer.vocabulary_size() > 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

        /// Values swapped for others of the document, or for hostile ones, end in a tokenizer or in an error.
        #[test]
        fn changed_documents_never_crash(
            seed in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..4),
        ) {
            let mut document: Value = serde_json::from_slice(seed.get::<Vec<u8>>(&seeds())).unwrap();
            for (place, value) in changes {
                let mut values = vec![json!(0), json!(-1), json!(u64::MAX), json!(""), json!("é"), json!([]), json!({}), Value::Null];
                collect(&document, &mut values);
                let value = value.get(&values).clone();
                let mut places = values.len() - 8;
                places = place.index(places);
                replace(&mut document, &mut places, &value);
            }
            if let Ok(tokenizer) = crate::Tokenizer::from_json(document.to_string().as_bytes(), "changed")
                && let Ok(ids) = tokenizer.encode("Once upon a time, 日本 — 12 34\n", true)
            {
                let _ = tokenizer.decode(&ids, false);
            }
        }
    }

    /// All values inside of `value`, itself first.
    fn collect(value: &Value, values: &mut Vec<Value>) {
        values.push(value.clone());
        match value {
            Value::Array(inside) => inside.iter().for_each(|value| collect(value, values)),
            Value::Object(inside) => inside.values().for_each(|value| collect(value, values)),
            _ => {}
        }
    }

    /// Puts `new` where counting as [`collect`] does has arrived at zero.
    fn replace(value: &mut Value, left: &mut usize, new: &Value) -> bool {
        if *left == 0 {
            *value = new.clone();
            return true;
        }
        *left -= 1;
        match value {
            Value::Array(inside) => inside.iter_mut().any(|value| replace(value, left, new)),
            Value::Object(inside) => inside.values_mut().any(|value| replace(value, left, new)),
            _ => false,
        }
    }

    /// A map of one character: `a` becomes the text at `place` of `texts`.
    fn map(place: u32, texts: &[u8]) -> Vec<u8> {
        // The root branches to block 0 of the table, 'a' has a leaf, which lies where 'a' leads to: at its own place.
        let mut units = vec![0u32; 512];
        units[0] = 256 << 10;
        units[256 ^ 0x61] = 0x61 | 1 << 8 | 0x61 << 10;
        units[256] = place | 1 << 31;
        let table: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        [&(table.len() as u32).to_le_bytes()[..], &table, texts].concat()
    }

    #[test]
    fn maps_of_characters_stay_inside_of_themselves() {
        let texts = "bc\0déf\0".as_bytes();
        assert_eq!(longest_replacement(&map(0, texts)), Ok(2));
        assert_eq!(longest_replacement(&map(3, texts)), Ok(4));
        assert_eq!(longest_replacement(&map(8, texts)), Ok(1));
        assert!(longest_replacement(&map(5, texts)).is_err(), "inside of a character");
        assert!(longest_replacement(&map(9, texts)).is_err(), "behind the texts");
        let sound = map(0, texts);
        for length in 0..4 + 512 * 4 {
            assert!(longest_replacement(&sound[..length]).is_err(), "{length}");
        }
        let mut astray = sound.clone();
        astray[4..8].copy_from_slice(&(512u32 << 10).to_le_bytes());
        assert!(longest_replacement(&astray).unwrap_err().contains("out of its table"));
        let mut circle = sound;
        circle[4 + 4 * (256 ^ 0x61)..][..4].copy_from_slice(&0x61u32.to_le_bytes());
        assert!(longest_replacement(&circle).is_ok());
    }
}
