use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use kintsugi_checkpoint::{AdapterFolder, WholeTensor};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result};
use kintsugi_weights::ElementType;

use crate::WholeModuleRule;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// What becomes of the modules that adapters hold whole. They replace a module of the base, so that there is nothing to
/// add up: one is carried over, or several are averaged.
pub(crate) struct WholeModules {
    tensors: Vec<WholeTensor>,
    /// The adapters that hold each, with their share of the mean.
    sources: BTreeMap<String, Vec<(usize, f64)>>,
    names: Vec<String>,
}

impl WholeModules {
    /// Decides, by the headers alone where one adapter has a module, else by the bytes.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the rule does not allow what is there, `ERR_SHAPE_MISMATCH`, `ERR_OPTION_INVALID` for
    /// weights that give no mean, `ERR_CANCELLED`.
    pub(crate) fn plan(
        folders: &[AdapterFolder],
        weights: &[f64],
        rule: WholeModuleRule,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let mut names = BTreeSet::new();
        let mut found: BTreeMap<String, (WholeTensor, Vec<(usize, f64)>)> = BTreeMap::new();
        for (index, folder) in folders.iter().enumerate() {
            names.extend(folder.modules_to_save().iter().cloned());
            for tensor in folder.whole_tensors() {
                let (first, sources) = found.entry(tensor.name.clone()).or_insert_with(|| (tensor.clone(), Vec::new()));
                if first.shape != tensor.shape || first.element_type != tensor.element_type {
                    let (one, other) = (describe(first), describe(tensor));
                    let message = format!("'{}' is {other} here and {one} in another adapter", tensor.name);
                    return Err(Error::new(ErrorCode::ShapeMismatch, message)
                        .subject(folder.path().display())
                        .hint("Merge adapters that were trained on the same base model"));
                }
                sources.push((index, weights[index]));
            }
        }
        let refused = |name: &str, message: &str| {
            Err(Error::new(ErrorCode::AdapterInvalid, format!("'{name}' is saved whole {message}"))
                .subject(name)
                .hint("Average them with modulesToSave \"mean\" (--modules-to-save mean), or leave adapters out"))
        };
        let mut whole =
            WholeModules { tensors: Vec::new(), sources: BTreeMap::new(), names: names.into_iter().collect() };
        for (name, (tensor, mut sources)) in found {
            match rule {
                // Who refuses them opens no adapters that have some.
                WholeModuleRule::Equal | WholeModuleRule::Refuse => {
                    if !equal(folders, &tensor, &sources, cancel)? {
                        return refused(&name, "by several adapters, and differs");
                    }
                    sources.truncate(1);
                    sources[0].1 = 1.0;
                }
                WholeModuleRule::Mean => {
                    let total: f64 = sources.iter().map(|(_, weight)| weight).sum();
                    if sources.iter().any(|(_, weight)| *weight < 0.0) || total <= 0.0 {
                        let message = format!("the weights of those that hold '{name}' whole give no mean");
                        return Err(Error::new(ErrorCode::OptionInvalid, message)
                            .subject("weights")
                            .hint("Give weights that are not negative, one of them above 0"));
                    }
                    sources.iter_mut().for_each(|(_, weight)| *weight /= total);
                    // The order of the adapters is no part of the content: equal sums for every order.
                    sources.sort_by(|(left, one), (right, other)| {
                        one.total_cmp(other).then_with(|| folders[*left].path().cmp(folders[*right].path()))
                    });
                }
            }
            whole.sources.insert(name, sources);
            whole.tensors.push(tensor);
        }
        Ok(whole)
    }

    /// What will be written.
    pub(crate) fn tensors(&self) -> &[WholeTensor] {
        &self.tensors
    }

    /// `modules_to_save` of all adapters.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Hands the bytes of a tensor on.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` for NaN and infinite values, `ERR_CANCELLED`, and what reading and `put` report.
    pub(crate) fn copy(
        &self,
        folders: &[AdapterFolder],
        tensor: &WholeTensor,
        cancel: &CancelToken,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let sources = self.sources.get(&tensor.name).map_or(&[][..], Vec::as_slice);
        let mut bytes = vec![0; PIECE];
        for start in (0..tensor.bytes).step_by(PIECE) {
            cancel.check()?;
            let length = (tensor.bytes - start).min(PIECE as u64) as usize;
            let mut mean = vec![0.0; length * 8 / tensor.element_type.bits()];
            for &(adapter, share) in sources {
                folders[adapter].read_whole(&tensor.name, start, &mut bytes[..length])?;
                let values = tensor.element_type.widen(&bytes[..length]);
                if values.iter().any(|value| !value.is_finite()) {
                    return Err(Error::new(
                        ErrorCode::AdapterInvalid,
                        "the tensor has values that are NaN or infinite",
                    )
                    .subject(&tensor.name)
                    .hint("The adapter is damaged or its training has diverged; take an earlier step"));
                }
                mean.iter_mut().zip(&values).for_each(|(sum, &value)| *sum += share * f64::from(value));
            }
            match sources {
                [_] => put(&bytes[..length])?,
                _ => put(&narrow(&mean, tensor.element_type))?,
            }
        }
        Ok(())
    }
}

fn describe(tensor: &WholeTensor) -> String {
    format!("{} {:?}", tensor.element_type.name(), tensor.shape)
}

/// Whether all adapters hold the same bytes.
fn equal(
    folders: &[AdapterFolder],
    tensor: &WholeTensor,
    sources: &[(usize, f64)],
    cancel: &CancelToken,
) -> Result<bool> {
    let (mut first, mut other) = (vec![0; PIECE], vec![0; PIECE]);
    for start in (0..tensor.bytes).step_by(PIECE) {
        if sources.len() == 1 {
            break;
        }
        cancel.check()?;
        let length = (tensor.bytes - start).min(PIECE as u64) as usize;
        folders[sources[0].0].read_whole(&tensor.name, start, &mut first[..length])?;
        for &(adapter, _) in &sources[1..] {
            folders[adapter].read_whole(&tensor.name, start, &mut other[..length])?;
            if first[..length] != other[..length] {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn narrow(values: &[f64], element_type: ElementType) -> Vec<u8> {
    let values = values.iter().map(|&value| value as f32);
    match element_type {
        ElementType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        ElementType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        ElementType::Bf16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}
