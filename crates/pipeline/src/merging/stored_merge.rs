//! Sums whose factors go from file to file in the type that they are stored in.

use kintsugi_checkpoint::AdapterWriter;
use kintsugi_merge::{StoredCat, StoredSource};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::StoredRows;

use super::merge_job::MergeJob;
use super::source_print::SourcePrint;
use super::{RankPadding, VLLM_RANKS};

impl MergeJob<'_> {
    /// Whether all factors can go from file to file as they are.
    pub(super) fn moves_bytes(&self) -> Result<bool> {
        let plan = &self.plan;
        let ranks = || plan.modules.iter().map(|module| module.rank);
        let of_one_rank = ranks().min() == ranks().max();
        let unpadded = match self.recipe.padding {
            RankPadding::None => true,
            RankPadding::Uniform => of_one_rank,
            RankPadding::Vllm => of_one_rank && ranks().all(|rank| VLLM_RANKS.contains(&rank)),
        };
        let uncut = self.folders.len() > 1 || self.recipe.options.rank.is_none();
        if !self.method.is_exact() || !unpadded || !uncut || self.options.report || self.compensation.is_some() {
            return Ok(false);
        }
        for (module, adapter) in plan.modules.iter().flat_map(|m| m.adapters.iter().map(move |&adapter| (m, adapter))) {
            let Some(factors) = self.folders[adapter].factor_rows(&module.name)? else { return Ok(false) };
            if factors.iter().any(|factor| factor.element_type() != plan.factor_type) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the factors of all adapters of a module behind each other. Gives what the adapters brought.
    pub(super) fn concatenate(
        &self,
        index: usize,
        cat: &mut StoredCat,
        writer: &mut AdapterWriter,
        pool: &ThreadPool,
    ) -> Result<Vec<SourcePrint>> {
        let module = &self.plan.modules[index];
        let mut factors = Vec::with_capacity(module.adapters.len());
        for &adapter in &module.adapters {
            factors.extend(self.folders[adapter].factor_rows(&module.name)?);
        }
        let sources: Vec<StoredSource<'_>> = (module.adapters.iter().zip(&factors))
            .map(|(&adapter, [a, b])| StoredSource {
                a,
                b,
                scaling: self.scaling(adapter, module),
                weight: self.recipe.weights[adapter],
            })
            .collect();
        writer.write_stored(|put| cat.concatenate(&module.name, &sources, self.plan.factor_type, pool, put))?;
        sources
            .iter()
            .map(|source| SourcePrint::of_module(&module.name, source.scaling, [source.a, source.b]))
            .collect()
    }
}
