use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kintsugi_checkpoint::TensorFile;
use kintsugi_linalg::UpperTriangle;
use kintsugi_model::{DecoderFamily, FAMILIES, LinearSlot, TapPoint};
use kintsugi_runtime::Result;

use crate::calibration_statistics::{mismatch, place_name, read_second_moment, statistics_architecture};

/// Second moments that stay in memory: Linears of one point follow each other, those of attention in turns of two.
const KEPT: usize = 2;

/// The second moments of saved statistics, by the paths of the modules that read those inputs. The base model is not
/// needed: the file names its architecture, and that says where each Linear reads.
pub(crate) struct InputStatistics {
    file: TensorFile,
    /// Point by module.
    points: BTreeMap<String, String>,
    read: Mutex<VecDeque<(String, Arc<UpperTriangle<f64>>)>>,
}

impl InputStatistics {
    /// Opens the file at `path` and looks up what it has about `modules`, given by path and number of inputs. Modules
    /// that are in no block (embedding, head), or that no token reached, have no statistics.
    ///
    /// # Errors
    /// `ERR_STATISTICS_MISMATCH` when the file holds no statistics, none of these modules, or some of another width.
    pub(crate) fn open<'a>(path: &Path, modules: impl Iterator<Item = (&'a str, usize)>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let architecture = statistics_architecture(&file, path)?;
        let family = FAMILIES.iter().find(|family| family.architecture == architecture).ok_or_else(|| {
            mismatch(path, format!("the statistics are of the architecture '{architecture}', which is not known"))
        })?;
        let mut points = BTreeMap::new();
        for (module, width) in modules {
            let Some((block, point)) = tap_of(family, module) else { continue };
            // A checkpoint without head may lack the first part of names, an adapter has it.
            let bare = block.split_once('.').map_or(block, |(_, bare)| bare);
            let mut names = [block, bare].into_iter().map(|block| format!("{block}.{}", place_name(point)));
            let Some(name) = names.find(|name| file.shape(&format!("{name}.second_moment")).is_some()) else {
                continue;
            };
            let expected = width.checked_mul(width + 1).map(|twice| twice / 2);
            if file.shape(&format!("{name}.second_moment")).and_then(<[usize]>::first).copied() != expected {
                return Err(mismatch(path, format!("the statistics of '{module}' are not of {width} inputs")));
            }
            if file.integers(&format!("{name}.tokens"))?.first().is_some_and(|&tokens| tokens > 0) {
                points.insert(module.to_string(), name);
            }
        }
        if points.is_empty() {
            return Err(mismatch(path, "the statistics are of none of the adapters' modules".into()));
        }
        Ok(InputStatistics { file, points, read: Mutex::new(VecDeque::new()) })
    }

    /// Whether there are some about a module.
    pub(crate) fn has(&self, module: &str) -> bool {
        self.points.contains_key(module)
    }

    /// Those of the inputs of a module.
    ///
    /// # Errors
    /// What reading reports; `ERR_CHECKPOINT_NOT_FINITE`.
    pub(crate) fn second_moment(&self, module: &str, width: usize) -> Result<Option<Arc<UpperTriangle<f64>>>> {
        let Some(point) = self.points.get(module) else { return Ok(None) };
        // Held while reading: who wants the same point waits for it instead of reading it again.
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = read.iter().find(|(name, _)| name == point) {
            return Ok(Some(found.clone()));
        }
        if read.len() == KEPT {
            read.pop_front();
        }
        let found = Arc::new(read_second_moment(&self.file, point, width)?);
        read.push_back((point.clone(), found.clone()));
        Ok(Some(found))
    }
}

/// Block and point where the Linear of that path reads its input.
fn tap_of<'a>(family: &DecoderFamily, module: &'a str) -> Option<(&'a str, TapPoint)> {
    let before = |path: &'a str, name: &str| path.strip_suffix(name)?.strip_suffix('.');
    let plain = family.linears.iter().find_map(|(slot, name, _)| Some((before(module, name)?, slot.tap())));
    plain.or_else(|| {
        let rule = family.experts?;
        let kinds: [fn(u16) -> LinearSlot; 3] = [LinearSlot::ExpertGate, LinearSlot::ExpertUp, LinearSlot::ExpertDown];
        kinds.iter().zip(rule.names).find_map(|(slot, name)| {
            let (experts, number) = before(module, name)?.rsplit_once('.')?;
            Some((before(experts, rule.experts)?, slot(number.parse().ok()?).tap()))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_are_found_at_their_points() {
        let of = |architecture: &str, module| {
            let family = FAMILIES.iter().find(|family| family.architecture == architecture).unwrap();
            tap_of(family, module)
        };
        let llama = "LlamaForCausalLM";
        assert_eq!(of(llama, "model.layers.3.self_attn.k_proj"), Some(("model.layers.3", TapPoint::AttentionInput)));
        assert_eq!(of(llama, "model.layers.3.mlp.down_proj"), Some(("model.layers.3", TapPoint::MlpActivation)));
        assert_eq!(of(llama, "lm_head"), None);
        assert_eq!(of(llama, "model.embed_tokens"), None);
        let experts = "model.layers.1.mlp.experts.12.up_proj";
        assert_eq!(of("Qwen3MoeForCausalLM", experts), Some(("model.layers.1", TapPoint::ExpertInput(12))));
        assert_eq!(of("Qwen3MoeForCausalLM", "model.layers.1.mlp.experts.x.up_proj"), None);
    }
}
