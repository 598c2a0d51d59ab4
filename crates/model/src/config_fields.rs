use kintsugi_kernels::Activation;
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

/// Largest size that a field of `config.json` may claim; far above any real model, far below an overflow.
pub(crate) const LARGEST_SIZE: usize = 1 << 24;

/// Most blocks of a decoder: names and plans of all of them are made before the first weight is read. The largest models
/// have some two hundred.
pub(crate) const MOST_LAYERS: usize = 4096;

/// Names of activations in `config.json`.
const ACTIVATIONS: [(&str, Activation); 6] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
];

/// An object of `config.json`, read field by field. `null` reads as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn value(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn object(self, name: &str) -> Option<Fields<'a>> {
        self.value(name).and_then(Value::as_object).map(Fields)
    }

    pub(crate) fn optional_size(self, name: &str) -> Result<Option<usize>> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(size) if size > 0 && size <= LARGEST_SIZE as u64 => Ok(Some(size as usize)),
                _ => Err(invalid(name, format!("{value} is not a size between 1 and {LARGEST_SIZE}"))),
            },
        }
    }

    pub(crate) fn size(self, name: &str) -> Result<usize> {
        self.optional_size(name)?.ok_or_else(|| missing(name))
    }

    pub(crate) fn positive(self, name: &str) -> Result<Option<f64>> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(invalid(name, format!("{value} is not a positive number"))),
            },
        }
    }

    pub(crate) fn required_positive(self, name: &str) -> Result<f64> {
        self.positive(name)?.ok_or_else(|| missing(name))
    }

    /// `count` positive numbers.
    pub(crate) fn positives(self, name: &str, count: usize) -> Result<Vec<f64>> {
        let values = self.value(name).ok_or_else(|| missing(name))?;
        let numbers: Option<Vec<f64>> = values
            .as_array()
            .and_then(|values| values.iter().map(Value::as_f64).collect())
            .filter(|numbers: &Vec<f64>| numbers.iter().all(|number| *number > 0.0 && number.is_finite()));
        numbers
            .filter(|numbers| numbers.len() == count)
            .ok_or_else(|| invalid(name, format!("it is not a list of {count} positive numbers")))
    }

    pub(crate) fn flag(self, name: &str) -> Option<bool> {
        self.value(name).and_then(Value::as_bool)
    }

    pub(crate) fn text(self, name: &str) -> Option<&'a str> {
        self.value(name).and_then(Value::as_str)
    }

    /// The activation that `name` asks for.
    pub(crate) fn activation(self, name: &str) -> Result<Option<Activation>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match ACTIVATIONS.iter().find(|(known, _)| *known == text) {
            Some((_, activation)) => Ok(Some(*activation)),
            None => Err(unsupported(name, format!("the activation '{text}'"))),
        }
    }
}

pub(crate) fn missing(field: &str) -> Error {
    invalid(field, "the field is missing".into())
}

pub(crate) fn invalid(field: &str, message: String) -> Error {
    Error::new(ErrorCode::ConfigInvalid, format!("config.json: {field}: {message}"))
        .subject(field)
        .hint("Take config.json from the folder that the weights come from")
}

pub(crate) fn unsupported(field: &str, what: String) -> Error {
    Error::new(ErrorCode::ConfigUnsupported, format!("config.json asks for {what}, which is not supported"))
        .subject(field)
        .hint("Use a checkpoint without it")
}
