//! Typed access to the fields of a `quantization_config`, with errors that name the field.

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use crate::FORMATS;

/// The object that `value` must be.
///
/// # Errors
/// `ERR_CONFIG_INVALID`.
pub(crate) fn object<'a>(value: &'a Value, field: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| invalid(field, "an object"))
}

/// A field of text, `default` where it is missing or null.
///
/// # Errors
/// `ERR_CONFIG_INVALID`.
pub(crate) fn string_or<'a>(map: &'a Map<String, Value>, field: &str, default: &'a str) -> Result<&'a str> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(invalid(field, "a string")),
    }
}

/// A field with a whole number, `None` where it is missing or null.
///
/// # Errors
/// `ERR_CONFIG_INVALID`.
pub(crate) fn integer(map: &Map<String, Value>, field: &str) -> Result<Option<i64>> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_i64().map(Some).ok_or_else(|| invalid(field, "an integer")),
    }
}

/// A field that is true or false, `default` where it is missing or null.
///
/// # Errors
/// `ERR_CONFIG_INVALID`.
pub(crate) fn bool_or(map: &Map<String, Value>, field: &str, default: bool) -> Result<bool> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_bool().ok_or_else(|| invalid(field, "true or false")),
    }
}

/// A list of texts, empty where it is missing or null.
///
/// # Errors
/// `ERR_CONFIG_INVALID`.
pub(crate) fn strings(map: &Map<String, Value>, field: &str) -> Result<Vec<String>> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| entry.as_str().map(str::to_string).ok_or_else(|| invalid(field, "a list of strings")))
            .collect(),
        Some(_) => Err(invalid(field, "a list of strings")),
    }
}

/// Refuses a field that stands for something that is not read, unless it is missing, null or `{}`.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED`.
pub(crate) fn require_empty(map: &Map<String, Value>, field: &str) -> Result<()> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(_) => Err(unsupported(field, "set")),
    }
}

/// `ERR_QUANTIZATION_UNSUPPORTED` for a value of a field that no format of the table means.
pub(crate) fn unsupported(field: &str, value: &str) -> Error {
    let formats: Vec<&str> = FORMATS.iter().map(|format| format.name()).collect();
    Error::new(ErrorCode::QuantizationUnsupported, format!("the checkpoint is quantized with {field} {value}"))
        .subject(field)
        .hint(format!(
            "Supported are {} with integer weights of 2, 3, 4, 5, 6 or 8 bits; start from the unquantized checkpoint",
            formats.join(", ")
        ))
}

/// `ERR_CONFIG_INVALID` for a field that is not `expected`.
pub(crate) fn invalid(field: &str, expected: &str) -> Error {
    Error::new(ErrorCode::ConfigInvalid, format!("'{field}' of the quantization config is not {expected}"))
        .subject(field)
        .hint("config.json is damaged; download it again")
}
