use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kintsugi_weights::ElementType;

/// Deepest nesting of values; a state dict of tensors needs five.
const DEPTH: u8 = 16;
/// Most dimensions of a tensor; factors have two. Shape and strides are copied at each use of a remembered tuple.
const DIMENSIONS: usize = 8;
/// Most values on the stack; pickle fills dictionaries in batches of a thousand.
const STACK: usize = 1 << 16;

/// Where the pickle of `torch.save` says that a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TorchTensor {
    pub(crate) element_type: ElementType,
    /// Name of the storage.
    pub(crate) storage: Arc<str>,
    /// First element in the storage.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// In elements.
    pub(crate) strides: Vec<usize>,
}

/// The tensors of a pickled dictionary.
///
/// A pickle is a program for a stack machine that may call any function. This one knows the instructions that torch
/// writes for a dictionary of tensors and four names; it calls nothing, and everything else is refused. Instructions:
/// `pickletools` of the Python library.
pub(crate) fn read_state_dict(pickle: &[u8]) -> Result<BTreeMap<String, TorchTensor>, String> {
    let mut machine = Machine { input: pickle, ..Machine::default() };
    let root = machine.run()?;
    let Value::Dict(root) = root else { return Err("it is not a dictionary of tensors".into()) };
    let entries = std::mem::take(&mut machine.dicts[root]);
    // Tensors that only the memo shares are moved.
    drop(machine);
    let mut tensors = BTreeMap::new();
    for (key, value) in entries {
        match (key, value) {
            (Value::Text(name), Value::Tensor(tensor)) => {
                if tensors.insert(name.to_string(), Arc::unwrap_or_clone(tensor)).is_some() {
                    return Err(format!("the tensor '{name}' stands there twice"));
                }
            }
            _ => return Err("it is not a dictionary of tensors".into()),
        }
    }
    Ok(tensors)
}

/// What lies on the stack.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    None,
    Flag,
    Number(i64),
    Text(Arc<str>),
    Tuple(Arc<[Value]>, u8),
    /// Content that no tensor needs.
    List,
    /// Index into the dictionaries of the machine.
    Dict(usize),
    Name(Name),
    Storage(Arc<str>, ElementType),
    Tensor(Arc<TorchTensor>),
}

/// The names that a state dict of tensors refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Storage(ElementType),
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    dicts: Vec<Vec<(Value, Value)>>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            if self.stack.len() > STACK {
                return Err("it puts too many values beside each other".into());
            }
            let instruction = self.bytes(1)?[0];
            match instruction {
                0x80 => drop(self.bytes(1)?), // PROTO
                b'.' => return self.pop(),
                b'(' => self.stack.push(Value::Mark),
                b'}' => self.new_dict(),
                b']' => self.stack.push(Value::List),
                b')' => self.stack.push(Value::Tuple(Arc::new([]), 1)),
                b'N' => self.stack.push(Value::None),
                0x88 | 0x89 => self.stack.push(Value::Flag),
                b'K' => {
                    let value = self.unsigned(1)?;
                    self.stack.push(Value::Number(value.into()));
                }
                b'M' => {
                    let value = self.unsigned(2)?;
                    self.stack.push(Value::Number(value.into()));
                }
                b'J' => {
                    let value = self.unsigned(4)?;
                    self.stack.push(Value::Number((value as i32).into()));
                }
                0x8a => self.long()?,
                b'G' => {
                    self.bytes(8)?;
                    self.stack.push(Value::None);
                }
                b'X' => self.text(4)?,
                0x8c => self.text(1)?,
                b'c' => self.name()?,
                b'q' => self.remember(1)?,
                b'r' => self.remember(4)?,
                b'h' => self.recall(1)?,
                b'j' => self.recall(4)?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.tuple(items)?;
                }
                0x85..=0x87 => {
                    let count = usize::from(instruction - 0x84);
                    let start = self.stack.len().checked_sub(count).ok_or("the stack is empty")?;
                    let items = self.stack.split_off(start);
                    self.tuple(items)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(items)?;
                }
                b'a' => drop(self.pop()?),
                b'e' => drop(self.pop_to_mark()?),
                // The attributes of a dictionary (`_metadata` of a state dict).
                b'b' => {
                    self.pop()?;
                    if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                        return Err("it gives attributes to something that is no dictionary".into());
                    }
                }
                other => {
                    return Err(format!("the instruction {other:#04x} does not belong into a dictionary of tensors"));
                }
            }
        }
    }

    fn bytes(&mut self, count: usize) -> Result<&[u8], String> {
        let (taken, left) = self.input.split_at_checked(count).ok_or("it is cut off")?;
        self.input = left;
        Ok(taken)
    }

    fn unsigned(&mut self, width: usize) -> Result<u32, String> {
        Ok(self.bytes(width)?.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
    }

    /// A little-endian two's complement of up to eight bytes.
    fn long(&mut self) -> Result<(), String> {
        let width = self.unsigned(1)? as usize;
        if width > 8 {
            return Err("a number is too large".into());
        }
        let bytes = self.bytes(width)?;
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut filled = [if negative { 0xff } else { 0 }; 8];
        filled[..width].copy_from_slice(bytes);
        self.stack.push(Value::Number(i64::from_le_bytes(filled)));
        Ok(())
    }

    fn text(&mut self, width: usize) -> Result<(), String> {
        let length = self.unsigned(width)? as usize;
        let text = std::str::from_utf8(self.bytes(length)?).map_err(|_| "a name is not text")?;
        let text = Value::Text(text.into());
        self.stack.push(text);
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.input.iter().position(|&byte| byte == b'\n').ok_or("it is cut off")?;
        let line = String::from_utf8(self.bytes(end)?.to_vec()).map_err(|_| "a name is not text")?;
        self.bytes(1)?;
        Ok(line)
    }

    fn name(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        let name = match (module.as_str(), name.as_str()) {
            ("torch._utils", "_rebuild_tensor_v2") => Name::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Name::RebuildParameter,
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch", "FloatStorage") => Name::Storage(ElementType::F32),
            ("torch", "HalfStorage") => Name::Storage(ElementType::F16),
            ("torch", "BFloat16Storage") => Name::Storage(ElementType::Bf16),
            _ => {
                return Err(format!(
                    "it refers to '{module}.{name}', which a dictionary of float tensors does not need"
                ));
            }
        };
        self.stack.push(Value::Name(name));
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        match self.stack.pop() {
            Some(Value::Mark) | None => Err("the stack is empty".into()),
            Some(value) => Ok(value),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or("a mark is missing")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn tuple(&mut self, items: Vec<Value>) -> Result<(), String> {
        let inside = items.iter().map(|item| if let Value::Tuple(_, depth) = item { *depth } else { 0 }).max();
        let depth = inside.unwrap_or(0) + 1;
        // Values are dropped recursively, so nesting must not be deep.
        if depth > DEPTH {
            return Err("its values are nested too deeply".into());
        }
        self.stack.push(Value::Tuple(items.into(), depth));
        Ok(())
    }

    fn remember(&mut self, width: usize) -> Result<(), String> {
        let slot = self.unsigned(width)?;
        let value = self.stack.last().cloned().ok_or("the stack is empty")?;
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Result<(), String> {
        let slot = self.unsigned(width)?;
        let value = self.memo.get(&slot).cloned().ok_or("it recalls what it has not remembered")?;
        self.stack.push(value);
        Ok(())
    }

    fn new_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn set(&mut self, items: Vec<Value>) -> Result<(), String> {
        let Some(&Value::Dict(dict)) = self.stack.last() else { return Err("it fills what is no dictionary".into()) };
        if !items.len().is_multiple_of(2) {
            return Err("a key has no value".into());
        }
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            self.dicts[dict].push((key, value));
        }
        Ok(())
    }

    /// `('storage', type, name, device, count)`.
    fn storage(&mut self) -> Result<(), String> {
        let Value::Tuple(parts, _) = self.pop()? else { return Err("a storage is described wrongly".into()) };
        let storage = match &*parts {
            [
                Value::Text(kind),
                Value::Name(Name::Storage(element_type)),
                Value::Text(name),
                Value::Text(_),
                Value::Number(_),
            ] if &**kind == "storage" => Value::Storage(Arc::clone(name), *element_type),
            _ => return Err("a storage is described wrongly".into()),
        };
        self.stack.push(storage);
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (Value::Tuple(arguments, _), Value::Name(name)) = (self.pop()?, self.pop()?) else {
            return Err("it calls what is no function".into());
        };
        match (name, &*arguments) {
            (Name::OrderedDict, []) => {
                self.new_dict();
                Ok(())
            }
            (Name::RebuildParameter, [Value::Tensor(tensor), ..]) => {
                self.stack.push(Value::Tensor(Arc::clone(tensor)));
                Ok(())
            }
            (
                Name::RebuildTensor,
                [
                    Value::Storage(storage, element_type),
                    Value::Number(offset),
                    Value::Tuple(shape, _),
                    Value::Tuple(strides, _),
                    ..,
                ],
            ) => {
                let tensor = TorchTensor {
                    element_type: *element_type,
                    storage: Arc::clone(storage),
                    offset: size(*offset)?,
                    shape: sizes(shape)?,
                    strides: sizes(strides)?,
                };
                if tensor.shape.len() != tensor.strides.len() {
                    return Err("a tensor has a wrong number of strides".into());
                }
                self.stack.push(Value::Tensor(Arc::new(tensor)));
                Ok(())
            }
            _ => Err("a tensor is described wrongly".into()),
        }
    }
}

fn size(value: i64) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| "a size is negative".into())
}

fn sizes(values: &[Value]) -> Result<Vec<usize>, String> {
    if values.len() > DIMENSIONS {
        return Err(format!("a tensor has {} dimensions, at most {DIMENSIONS} are read", values.len()));
    }
    values
        .iter()
        .map(|value| if let Value::Number(value) = value { size(*value) } else { Err("a size is no number".into()) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `{'a': tensor}` as torch writes it.
    fn sound() -> Vec<u8> {
        let mut pickle = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((".to_vec();
        pickle.extend(b"X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05");
        pickle.extend(b"X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\x09\x89");
        pickle.extend(b"ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0du.");
        pickle
    }

    #[test]
    fn a_dictionary_of_tensors_is_read() {
        let tensors = read_state_dict(&sound()).unwrap();
        let expected = TorchTensor {
            element_type: ElementType::F32,
            storage: "0".into(),
            offset: 0,
            shape: vec![2, 3],
            strides: vec![3, 1],
        };
        assert_eq!(tensors.into_iter().collect::<Vec<_>>(), [("a".to_string(), expected)]);
    }

    #[test]
    fn nothing_is_called_and_nothing_else_is_understood() {
        let error = |pickle: &[u8]| read_state_dict(pickle).unwrap_err();
        assert!(error(b"cos\nsystem\n(X\x02\x00\x00\x00lstR.").contains("os.system"));
        assert!(error(b"cbuiltins\neval\n.").contains("builtins.eval"));
        assert!(error(b"\x80\x04\x95").contains("0x95"));
        assert!(error(b"i__main__\nX\n").contains("instruction"));
        assert!(read_state_dict(b"}.").unwrap().is_empty());
    }

    #[test]
    fn broken_programs_end_in_an_error() {
        let sound = sound();
        for length in 0..sound.len() {
            assert!(read_state_dict(&sound[..length]).is_err(), "{length}");
        }
        for at in 0..sound.len() {
            for flip in [1, 0x80, 0xff] {
                let mut broken = sound.clone();
                broken[at] ^= flip;
                let _ = read_state_dict(&broken);
            }
        }
        for pickle in
            [&b"t."[..], b"(K\x01.", b"h\x00.", b"Q.", b"R.", b"u.", b"s.", b"K\x01K\x02b.", b"(K\x01u.", b"("]
        {
            assert!(read_state_dict(pickle).is_err(), "{pickle:?}");
        }
        let mut deep = vec![b')'];
        deep.extend([0x85; 100_000]);
        assert!(read_state_dict(&deep).unwrap_err().contains("deep"));
    }

    #[test]
    fn what_is_remembered_does_not_multiply() {
        // The arguments of a tensor with as many sizes as bytes allow, called again and again.
        let arguments = |dimensions: usize| {
            let mut pickle = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storage".to_vec();
            pickle.extend(b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00(");
            pickle.extend(b"K\x01".repeat(dimensions));
            pickle.extend(b"tq\x02h\x02tq\x01");
            pickle
        };
        let mut many = arguments(DIMENSIONS + 1);
        many.extend(b"h\x00h\x01R");
        assert!(read_state_dict(&many).unwrap_err().contains("9 dimensions"));
        let mut called = arguments(DIMENSIONS);
        called.extend(b"h\x00h\x01Ra".repeat(10_000));
        called.extend(b"}.");
        assert!(read_state_dict(&called).unwrap().is_empty());

        for instruction in [b"(", b"}", b")", b"N"] {
            assert!(read_state_dict(&instruction.repeat(STACK + 2)).unwrap_err().contains("too many"));
        }
    }
}
