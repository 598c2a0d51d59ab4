use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use kintsugi_checkpoint::{Checkpoint, TensorFile};
use kintsugi_model::{DecoderSpec, read_tokenizer};
use kintsugi_runtime::{Error, ErrorCode, Result, nearest};
use serde::Serialize;
use serde_json::Value;

use crate::CalibrationSource;
use crate::calibration_statistics::STATISTICS_KEY;

/// The tensor of token ids in a safetensors file.
const IDS_TENSOR: &str = "input_ids";

/// What a calibration file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CalibrationKind {
    /// UTF-8 text.
    Text,
    /// A JSON object with a text per line.
    Jsonl,
    /// Token ids: JSON arrays, one of arrays or one per line, or the tensor `input_ids` of a safetensors file.
    Tokens,
    /// Statistics that an earlier job saved.
    Statistics,
}

impl CalibrationKind {
    /// What the file at `path` holds by its ending and what it begins with.
    ///
    /// # Errors
    /// `ERR_TEXT_UNREADABLE` when it cannot be read, `ERR_CHECKPOINT_CORRUPT` for a damaged safetensors file.
    pub fn of(path: &Path) -> Result<Self> {
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        Ok(match ending.to_str() {
            Some("jsonl" | "ndjson") if starts_with_bracket(path)? => CalibrationKind::Tokens,
            Some("jsonl" | "ndjson") => CalibrationKind::Jsonl,
            Some("json") => CalibrationKind::Tokens,
            Some("safetensors") if TensorFile::open(path)?.metadata().contains_key(STATISTICS_KEY) => {
                CalibrationKind::Statistics
            }
            Some("safetensors") => CalibrationKind::Tokens,
            _ => CalibrationKind::Text,
        })
    }
}

/// Bytes that a tokenizer keeps for a byte of text while it encodes all of it: offsets of every normalized byte, pieces,
/// tokens. Measured: 93 to 137.
const ENCODING_BYTES: u64 = 128;

/// Bytes that are read of a text at first for each token that is asked for; twice as many until there are enough.
const BYTES_PER_TOKEN: usize = 8;

/// Tokens at the end of a part of a text that are not those of the whole text: the last word is cut.
const CUT_TOKENS: usize = 256;

/// Most tokens that the file of `source` can hold, by its length alone.
pub(crate) fn most_tokens(source: &CalibrationSource) -> usize {
    let bytes = file_bytes(source);
    let tokens = match source.kind {
        CalibrationKind::Text | CalibrationKind::Jsonl => bytes,
        CalibrationKind::Tokens if is_safetensors(&source.file) => bytes / 4,
        // A digit and what separates it from the next.
        CalibrationKind::Tokens => bytes / 2 + 1,
        CalibrationKind::Statistics => 0,
    };
    usize::try_from(tokens).unwrap_or(usize::MAX)
}

/// Memory that reading the tokens of the file takes, about. Lines are read one at a time, and of a text no more than is
/// used.
pub(crate) fn reading_bytes(source: &CalibrationSource, length: usize) -> u64 {
    let bytes = file_bytes(source);
    match source.kind {
        CalibrationKind::Text => {
            bytes.min(beginning(enough_tokens(source, length)) as u64).saturating_mul(ENCODING_BYTES)
        }
        CalibrationKind::Tokens if is_safetensors(&source.file) => bytes.saturating_mul(4),
        // Ids of three digits and a comma.
        CalibrationKind::Tokens if is_json(&source.file) => (bytes / 4).saturating_mul(size_of::<Value>() as u64),
        _ => 0,
    }
}

/// Tokens after which reading sequences of `length` may stop: chance chooses among all of them, without it the first are taken.
pub(crate) fn enough_tokens(source: &CalibrationSource, length: usize) -> usize {
    let sequences = source.sequences.saturating_add(source.hold_out);
    if source.seed.is_some() { usize::MAX } else { sequences.saturating_mul(length) }
}

/// Bytes at the beginning of a text that hold so many tokens, by experience.
fn beginning(tokens: usize) -> usize {
    tokens.saturating_add(CUT_TOKENS).saturating_mul(BYTES_PER_TOKEN)
}

fn file_bytes(source: &CalibrationSource) -> u64 {
    fs::metadata(&source.file).map_or(0, |metadata| metadata.len())
}

fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors"))
}

fn is_json(path: &Path) -> bool {
    path.extension().is_none_or(|ending| ending.eq_ignore_ascii_case("json"))
}

fn starts_with_bracket(path: &Path) -> Result<bool> {
    for byte in BufReader::new(open(path)?).bytes() {
        let byte = byte.map_err(|error| unreadable(path, error.to_string()))?;
        if !byte.is_ascii_whitespace() {
            return Ok(byte == b'[');
        }
    }
    Ok(false)
}

/// The tokens of the file of `source` in their order; reading may stop when there are `enough`. Records of a JSONL file
/// are tokenized apart; only text asks for the tokenizer of the model.
///
/// # Errors
/// `ERR_TOKENIZER_INVALID`,
/// `ERR_TEXT_UNREADABLE` for what cannot be read or understood and for ids outside of the vocabulary, with the line.
pub(crate) fn read_tokens(
    source: &CalibrationSource,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    enough: usize,
) -> Result<Vec<u32>> {
    let path = source.file.as_path();
    match source.kind {
        CalibrationKind::Text => {
            let tokenizer = read_tokenizer(checkpoint, spec)?;
            encode_beginning(path, enough, |text| tokenizer.encode(text, false))
        }
        CalibrationKind::Jsonl => {
            let (tokenizer, mut tokens) = (read_tokenizer(checkpoint, spec)?, Vec::new());
            each_line(path, |place, line| {
                tokens.extend(tokenizer.encode(&field_of(line, &source.field, path, place)?, false)?);
                Ok(tokens.len() < enough)
            })?;
            Ok(tokens)
        }
        CalibrationKind::Tokens if is_safetensors(path) => {
            let ids = TensorFile::open(path)?.integers(IDS_TENSOR)?;
            let ids = ids.iter().map(|&id| u64::try_from(id).map_err(|_| id.to_string()));
            checked(ids, spec, path, &format!("the tensor {IDS_TENSOR}"))
        }
        CalibrationKind::Tokens => read_json_ids(path, spec, enough),
        CalibrationKind::Statistics => {
            Err(Error::new(ErrorCode::Internal, "statistics have no tokens").subject(path.display()))
        }
    }
}

/// Tokens of the text at `path`, all of them or at least `enough`: the same in either case, because the last ones of a
/// part are left out.
fn encode_beginning(path: &Path, enough: usize, encode: impl Fn(&str) -> Result<Vec<u32>>) -> Result<Vec<u32>> {
    let mut file = open(path)?;
    let (mut bytes, mut limit) = (Vec::new(), beginning(enough));
    loop {
        let more = (limit - bytes.len()) as u64;
        let read = Read::by_ref(&mut file).take(more).read_to_end(&mut bytes);
        let whole = (read.map_err(|error| unreadable(path, error.to_string()))? as u64) < more;
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            // A character that is cut in two.
            Err(error) if !whole && error.error_len().is_none() => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(error) => {
                let message = format!("the text is not UTF-8 at byte {}", error.valid_up_to());
                return Err(unreadable(path, message).hint("Convert the file to UTF-8"));
            }
        };
        let mut tokens = encode(text)?;
        if whole {
            return Ok(tokens);
        }
        tokens.truncate(tokens.len().saturating_sub(CUT_TOKENS));
        if tokens.len() >= enough {
            return Ok(tokens);
        }
        limit = limit.saturating_mul(2);
    }
}

/// Ids in JSON: one array of ids or of arrays, over any number of lines, or an array per line.
fn read_json_ids(path: &Path, spec: &DecoderSpec, enough: usize) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    let mut take = |value: &Value, place: &str| -> Result<()> {
        let Value::Array(items) = value else {
            return Err(not_ids(path, format!("{place} is not an array of token ids")));
        };
        let arrays: Vec<&[Value]> = match items.first() {
            Some(Value::Array(_)) => items.iter().map(|item| array_of_ids(item, path, place)).collect::<Result<_>>()?,
            _ => vec![items],
        };
        for ids in arrays {
            let ids = ids.iter().map(|id| id.as_u64().ok_or_else(|| id.to_string()));
            tokens.extend(checked(ids, spec, path, place)?);
        }
        Ok(())
    };
    if is_json(path) {
        let value: Value =
            serde_json::from_reader(BufReader::new(open(path)?)).map_err(|error| not_json(path, &error, 0))?;
        take(&value, "the file")?;
        return Ok(tokens);
    }
    let mut count = 0;
    each_line(path, |place, line| {
        let value: Value = serde_json::from_str(line).map_err(|error| not_json(path, &error, place))?;
        take(&value, &format!("line {place}"))?;
        count += value.as_array().map_or(0, Vec::len);
        Ok(count < enough)
    })?;
    Ok(tokens)
}

fn array_of_ids<'a>(item: &'a Value, path: &Path, place: &str) -> Result<&'a [Value]> {
    let found = item.as_array().map(Vec::as_slice);
    found.ok_or_else(|| not_ids(path, format!("{place} has {item} beside arrays of token ids")))
}

fn checked(
    ids: impl Iterator<Item = Result<u64, String>>,
    spec: &DecoderSpec,
    path: &Path,
    place: &str,
) -> Result<Vec<u32>> {
    let outside = |id: &str| {
        let message = format!("{place} has {id}, the tokens of the model are 0 to {}", spec.vocabulary_size - 1);
        unreadable(path, message).hint("Tokenize the text with the tokenizer of this model")
    };
    let check = |id: Result<u64, String>| match id {
        Ok(id) if id < spec.vocabulary_size as u64 => Ok(id as u32),
        Ok(id) => Err(outside(&id.to_string())),
        Err(id) => Err(outside(&id)),
    };
    ids.map(check).collect()
}

/// The text in the field `field` of the record in a line.
fn field_of(line: &str, field: &str, path: &Path, place: usize) -> Result<String> {
    let record: Value = serde_json::from_str(line).map_err(|error| not_json(path, &error, place))?;
    match record.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(unreadable(path, format!("the field '{field}' in line {place} is not a text"))),
        None => {
            let names: Vec<&str> = record.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            let near = nearest(field, names.iter().copied());
            Err(unreadable(path, format!("the record in line {place} has no field '{field}'")).hint(match near {
                Some(near) => format!("Did you mean '{near}'? The fields are: {}", names.join(", ")),
                None => "Every line is an object with the text in that field".into(),
            }))
        }
    }
}

/// Calls `visit` with number and content of every line that is not blank, until it says that it has enough.
fn each_line(path: &Path, mut visit: impl FnMut(usize, &str) -> Result<bool>) -> Result<()> {
    for (index, line) in BufReader::new(open(path)?).lines().enumerate() {
        let line = line.map_err(|error| unreadable(path, format!("line {}: {error}", index + 1)))?;
        if !line.trim().is_empty() && !visit(index + 1, &line)? {
            break;
        }
    }
    Ok(())
}

/// Looks before it opens: opening a pipe would wait for a writer, and a folder would open but not read.
fn open(path: &Path) -> Result<File> {
    let metadata = fs::metadata(path).map_err(|error| unreadable(path, error.to_string()))?;
    if !metadata.is_file() {
        return Err(unreadable(path, "it is not a regular file".into()));
    }
    File::open(path).map_err(|error| unreadable(path, error.to_string()))
}

fn not_json(path: &Path, error: &serde_json::Error, line: usize) -> Error {
    let line = if line > 0 { line } else { error.line() };
    let message = format!("line {line} is not JSON, column {}: {error}", error.column());
    unreadable(path, message).hint("Every line of a JSONL file is one JSON value; a .json file is one")
}

fn not_ids(path: &Path, message: String) -> Error {
    unreadable(path, message).hint("Give arrays of token ids: [[1, 2, …], …], or one array per line in a .jsonl file")
}

fn unreadable(path: &Path, message: String) -> Error {
    Error::new(ErrorCode::TextUnreadable, message)
        .subject(path.display())
        .hint("Give a UTF-8 text, JSONL, token ids or saved statistics")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token per `size` characters.
    fn encode(text: &str, size: usize) -> Result<Vec<u32>> {
        let characters: Vec<u32> = text.chars().map(u32::from).collect();
        Ok(characters.chunks(size).map(|chunk| chunk.iter().sum()).collect())
    }

    #[test]
    fn the_beginning_of_a_text_has_the_tokens_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        let text: String = (0..40_000u32).map(|i| char::from_u32(0x61 + i * i % 3000).unwrap_or('x')).collect();
        fs::write(&path, &text).unwrap();
        for size in [1, 3, 40] {
            let whole = encode(&text, size).unwrap();
            for enough in [1, 100, 600, 999, 20_000, 1_000_000, usize::MAX] {
                let longest = std::cell::Cell::new(0);
                let tokens = encode_beginning(&path, enough, |part| {
                    longest.set(part.len());
                    encode(part, size)
                });
                let tokens = tokens.unwrap();
                assert!(tokens.len() >= enough.min(whole.len()) && whole.starts_with(&tokens), "{size} {enough}");
                assert!(enough > 600 || size > 3 || longest.get() < text.len() / 4, "{size} {enough}: {longest:?}");
            }
        }
        fs::write(&path, b"abc\xff").unwrap();
        let error = encode_beginning(&path, 1, |text| encode(text, 1)).unwrap_err();
        assert!(error.message.contains("byte 3"), "{error}");
    }
}
