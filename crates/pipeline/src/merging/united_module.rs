use std::collections::BTreeMap;

use kintsugi_checkpoint::{AdapterFolder, AdapterModule, ModuleKind};
use kintsugi_runtime::{Error, ErrorCode, Result};

/// What all adapters together have for one module.
pub(crate) struct UnitedModule {
    pub(crate) kind: ModuleKind,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) adapters: Vec<usize>,
    pub(crate) ranks: Vec<usize>,
    pub(crate) compensation_rank: usize,
    /// Of the factors as they are stored.
    pub(crate) bytes: u64,
}

/// The modules of all adapters and of the compensation, in name order.
///
/// # Errors
/// `ERR_SHAPE_MISMATCH`.
pub(crate) fn union<'a>(
    folders: &'a [AdapterFolder],
    compensation: Option<&'a AdapterFolder>,
) -> Result<BTreeMap<&'a str, UnitedModule>> {
    let mut modules: BTreeMap<&str, UnitedModule> = BTreeMap::new();
    let places = folders.iter().enumerate().map(|(index, folder)| (folder, Some(index)));
    for (folder, index) in places.chain(compensation.map(|folder| (folder, None))) {
        for module in folder.modules() {
            let AdapterModule { kind, out_features, in_features, rank, .. } = *module;
            let united = modules.entry(&module.name).or_insert_with(|| UnitedModule {
                kind,
                out_features,
                in_features,
                adapters: Vec::new(),
                ranks: Vec::new(),
                compensation_rank: 0,
                bytes: 0,
            });
            if (united.kind, united.out_features, united.in_features) != (kind, out_features, in_features) {
                let message = format!(
                    "'{}' is {out_features}×{in_features} here and {}×{} in another adapter",
                    module.name, united.out_features, united.in_features
                );
                return Err(Error::new(ErrorCode::ShapeMismatch, message)
                    .subject(folder.path().display())
                    .hint("Merge adapters that were trained on the same base model"));
            }
            match index {
                Some(index) => {
                    united.adapters.push(index);
                    united.ranks.push(rank);
                }
                None => united.compensation_rank = rank,
            }
            united.bytes += (rank * (out_features + in_features) * module.element_type.bits() / 8) as u64;
        }
    }
    Ok(modules)
}
