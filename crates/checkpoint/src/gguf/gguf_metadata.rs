use std::collections::BTreeMap;

use kintsugi_runtime::{Error, ErrorCode, Result};

use super::header_reader::HeaderReader;

/// Arrays may hold arrays, to this depth; no known writer nests them at all.
const DEEPEST: usize = 8;

macro_rules! number_types {
    ($($variant:ident = $id:literal: $number:ty,)+) => {
        /// A value of the metadata, in the type that the file gives it.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "the variants are named after the types of the format")]
        pub enum GgufValue {
            $($variant($number),)+
            Bool(bool),
            String(String),
            Array(GgufArray),
        }

        /// An array of the metadata: all elements have one type.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "the variants are named after the types of the format")]
        pub enum GgufArray {
            $($variant(Vec<$number>),)+
            Bool(Vec<bool>),
            String(Vec<String>),
            Array(Vec<GgufArray>),
        }

        impl GgufValue {
            /// Number of the type in the file.
            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(GgufValue::$variant(_) => $id,)+
                    GgufValue::Bool(_) => BOOL,
                    GgufValue::String(_) => STRING,
                    GgufValue::Array(_) => ARRAY,
                }
            }

            fn read(id: u32, reader: &mut HeaderReader<'_>) -> Result<Self> {
                Ok(match id {
                    $($id => GgufValue::$variant(<$number>::from_le_bytes(reader.array("a value")?)),)+
                    BOOL => GgufValue::Bool(read_bool(reader)?),
                    STRING => GgufValue::String(reader.string("a value", u64::MAX)?),
                    ARRAY => GgufValue::Array(GgufArray::read(reader, 1)?),
                    other => return Err(reader.corrupt(format!("there is no type {other} of metadata values"))),
                })
            }

            /// Appends the value as it stands in the file, without its type.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(GgufValue::$variant(value) => out.extend(value.to_le_bytes()),)+
                    GgufValue::Bool(value) => out.push(u8::from(*value)),
                    GgufValue::String(text) => write_string(text, out),
                    GgufValue::Array(array) => array.write(out),
                }
            }
        }

        impl GgufArray {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(GgufArray::$variant(values) => values.len(),)+
                    GgufArray::Bool(values) => values.len(),
                    GgufArray::String(values) => values.len(),
                    GgufArray::Array(values) => values.len(),
                }
            }

            /// Memory is taken for elements that the rest of the file has bytes for.
            fn read(reader: &mut HeaderReader<'_>, depth: usize) -> Result<Self> {
                let id = reader.u32("the type of an array")?;
                let count = reader.u64("the length of an array")?;
                Ok(match id {
                    $($id => {
                        let bytes = reader.bytes(count, size_of::<$number>() as u64, "an array")?;
                        let numbers = bytes.chunks_exact(size_of::<$number>());
                        GgufArray::$variant(numbers.map(|b| {
                            <$number>::from_le_bytes(std::array::from_fn(|i| b[i]))
                        }).collect())
                    })+
                    BOOL => {
                        let bytes = reader.bytes(count, 1, "an array")?;
                        if let Some(other) = bytes.iter().find(|&&byte| byte > 1) {
                            return Err(reader.corrupt(format!("{other} is neither true nor false")));
                        }
                        GgufArray::Bool(bytes.iter().map(|&byte| byte == 1).collect())
                    }
                    STRING => {
                        reader.claim(count, 8, "an array of strings")?;
                        let read = |_| reader.string("a string of an array", u64::MAX);
                        GgufArray::String((0..count).map(read).collect::<Result<_>>()?)
                    }
                    ARRAY if depth == DEEPEST => {
                        return Err(reader.corrupt(format!("arrays are nested more than {DEEPEST} deep")));
                    }
                    ARRAY => {
                        reader.claim(count, 12, "an array of arrays")?;
                        GgufArray::Array((0..count).map(|_| Self::read(reader, depth + 1)).collect::<Result<_>>()?)
                    }
                    other => return Err(reader.corrupt(format!("there is no type {other} of array elements"))),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                let head = |id: u32, out: &mut Vec<u8>| {
                    out.extend(id.to_le_bytes());
                    out.extend((self.len() as u64).to_le_bytes());
                };
                match self {
                    $(GgufArray::$variant(values) => {
                        head($id, out);
                        values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                    })+
                    GgufArray::Bool(values) => {
                        head(BOOL, out);
                        out.extend(values.iter().map(|&value| u8::from(value)));
                    }
                    GgufArray::String(values) => {
                        head(STRING, out);
                        values.iter().for_each(|text| write_string(text, out));
                    }
                    GgufArray::Array(values) => {
                        head(ARRAY, out);
                        values.iter().for_each(|array| array.write(out));
                    }
                }
            }
        }
    };
}

number_types! {
    U8 = 0: u8,
    I8 = 1: i8,
    U16 = 2: u16,
    I16 = 3: i16,
    U32 = 4: u32,
    I32 = 5: i32,
    F32 = 6: f32,
    U64 = 10: u64,
    I64 = 11: i64,
    F64 = 12: f64,
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl GgufArray {
    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as whole numbers, `None` when they are something else.
    pub fn integers(&self) -> Option<Vec<i64>> {
        fn wide<T: Copy>(values: &[T]) -> Option<Vec<i64>>
        where
            i64: TryFrom<T>,
        {
            values.iter().map(|&value| i64::try_from(value).ok()).collect()
        }
        match self {
            GgufArray::U8(values) => wide(values),
            GgufArray::I8(values) => wide(values),
            GgufArray::U16(values) => wide(values),
            GgufArray::I16(values) => wide(values),
            GgufArray::U32(values) => wide(values),
            GgufArray::I32(values) => wide(values),
            GgufArray::U64(values) => wide(values),
            GgufArray::I64(values) => wide(values),
            GgufArray::Bool(values) => Some(values.iter().map(|&value| i64::from(value)).collect()),
            _ => None,
        }
    }
}

impl GgufValue {
    /// A whole number, whatever its width.
    pub fn integer(&self) -> Option<i64> {
        match *self {
            GgufValue::U8(value) => Some(value.into()),
            GgufValue::I8(value) => Some(value.into()),
            GgufValue::U16(value) => Some(value.into()),
            GgufValue::I16(value) => Some(value.into()),
            GgufValue::U32(value) => Some(value.into()),
            GgufValue::I32(value) => Some(value.into()),
            GgufValue::U64(value) => i64::try_from(value).ok(),
            GgufValue::I64(value) => Some(value),
            _ => None,
        }
    }
}

fn read_bool(reader: &mut HeaderReader<'_>) -> Result<bool> {
    let [byte] = reader.array("a value")?;
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(reader.corrupt(format!("{other} is neither true nor false"))),
    }
}

pub(crate) fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The metadata of a GGUF file: values by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufMetadata(BTreeMap<String, GgufValue>);

impl GgufMetadata {
    /// Reads `count` entries.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` for a name that stands there twice and everything that breaks the format.
    pub(crate) fn read(count: u64, reader: &mut HeaderReader<'_>) -> Result<Self> {
        /// The longest name that the format allows.
        const NAME_LIMIT: u64 = 65_535;

        // A name, a type and one byte of a value.
        reader.claim(count, 8 + 4 + 1, "the metadata")?;
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let name = reader.string("the name of a metadata value", NAME_LIMIT)?;
            let id = reader.u32("the type of a metadata value")?;
            let value = GgufValue::read(id, reader)?;
            if values.insert(name.clone(), value).is_some() {
                return Err(reader.corrupt(format!("'{name}' stands in the metadata twice")));
            }
        }
        Ok(GgufMetadata(values))
    }

    /// In the order of their names.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&String, &GgufValue)> {
        self.0.iter()
    }

    /// The value of that name.
    pub fn get(&self, name: &str) -> Option<&GgufValue> {
        self.0.get(name)
    }

    /// Sets a value.
    pub fn set(&mut self, name: impl Into<String>, value: GgufValue) {
        self.0.insert(name.into(), value);
    }

    /// Sets a text.
    pub fn set_text(&mut self, name: impl Into<String>, text: impl Into<String>) {
        self.set(name, GgufValue::String(text.into()));
    }

    /// A text, `None` where the name is missing.
    ///
    /// # Errors
    /// `ERR_CONFIG_INVALID` when the value is something else.
    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(name, "a string")),
        }
    }

    /// A whole number that is not negative.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn unsigned(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.integer().and_then(|value| u64::try_from(value).ok());
        number.map(Some).ok_or_else(|| invalid(name, "a whole number that is not negative"))
    }

    /// A number, all of them finite.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        let number = match self.get(name) {
            None => return Ok(None),
            Some(GgufValue::F32(value)) => f64::from(*value),
            Some(GgufValue::F64(value)) => *value,
            Some(other) => other.integer().map_or(f64::NAN, |value| value as f64),
        };
        if number.is_finite() { Ok(Some(number)) } else { Err(invalid(name, "a finite number")) }
    }

    /// True or false.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(invalid(name, "true or false")),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn strings(&self, name: &str) -> Result<Option<&[String]>> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::Array(GgufArray::String(texts))) => Ok(Some(texts)),
            Some(_) => Err(invalid(name, "a list of strings")),
        }
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn integers(&self, name: &str) -> Result<Option<Vec<i64>>> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::Array(array)) => {
                array.integers().map(Some).ok_or_else(|| invalid(name, "a list of integers"))
            }
            Some(_) => Err(invalid(name, "a list of integers")),
        }
    }

    /// A list of f32.
    ///
    /// # Errors
    /// As [`GgufMetadata::text`].
    pub fn floats(&self, name: &str) -> Result<Option<&[f32]>> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::Array(GgufArray::F32(values))) => Ok(Some(values)),
            Some(_) => Err(invalid(name, "a list of f32")),
        }
    }
}

/// `ERR_CONFIG_INVALID` for a metadata value that is not `expected`.
pub(crate) fn invalid(name: &str, expected: &str) -> Error {
    Error::new(ErrorCode::ConfigInvalid, format!("'{name}' of the GGUF metadata is not {expected}"))
        .subject(name)
        .hint("The file is damaged or was made by a faulty converter; take another copy")
}
