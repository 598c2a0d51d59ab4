use std::path::Path;

use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_compensate::{AblatedLinear, AblationFit, RankProfile};
use kintsugi_model::{
    Backend, Block, BlockWeights, DecoderSpec, Embedding, Head, LinearSlot, LinearSpec, attach_compensation,
    mean_divergences,
};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result};
use kintsugi_weights::{Adapter, LinearWeight, LowRank};
use serde::{Deserialize, Serialize};

use crate::calibration_stream::BlockPart;
use crate::eora_unit::EoraUnit;
use crate::ledger_unit::LedgerUnit;
use crate::solved_factors::SolvedFactors;
use crate::{CalibrationStream, CalibrationTokens, EoraRecipe};

/// Most bands of depth.
const BANDS: usize = 4;

/// The Linears of a model in groups that are ablated: each type of Linear, experts of one kind together, and each of up
/// to four bands of blocks that follow each other.
pub(crate) struct AblationGroups {
    /// Names of the types inside a block, `*` in place of the number of an expert.
    types: Vec<String>,
    /// The type of each place in [`DecoderSpec::linears`].
    type_of: Vec<usize>,
    layers: usize,
}

/// What each group is worth: how far the predictions are from those of the model that has all factors, of the largest
/// rank, when the factors of the group are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AblationCosts {
    /// Tokens whose predictions were compared.
    tokens: usize,
    /// Whether they took no part in the calibration.
    held_out: bool,
    /// Mean divergences in nats, by type.
    types: Vec<f64>,
    /// The same by band.
    bands: Vec<f64>,
}

/// What ablations say about the worth of factors, and what weights of energies were made of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AblationReport {
    /// Whether weights were fitted; else there was nothing to learn, and they are those of the outputs.
    pub fitted: bool,
    /// Tokens whose predictions were compared.
    pub tokens: usize,
    /// Whether they took no part in the calibration.
    pub held_out: bool,
    /// The types of Linears.
    pub types: Vec<AblatedGroup>,
    /// Blocks that follow each other.
    pub bands: Vec<AblatedGroup>,
}

/// Linears that lost their factors together.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AblatedGroup {
    /// What their names have in common; `*` stands for any number, and `+` between those that share an A.
    pub name: String,
    /// Energy that their factors remove, relative to the outputs of each Linear: the sum over the Linears.
    pub removed: f64,
    /// Mean divergence `KL(P ‖ Q)` in nats of the predictions Q without these factors from those with all.
    pub cost: f64,
    /// What energies of the group count: the weight of a Linear is the product of those of its type and its band. The mean
    /// over the energies is 1.
    pub factor: f64,
}

/// What the energies of each Linear count beside being relative.
pub(crate) struct AblationWeights {
    /// Of all Linears, block by block.
    pub(crate) factors: Vec<f64>,
    pub(crate) report: AblationReport,
}

impl AblationGroups {
    /// Most tokens that run through the models.
    pub(crate) const TOKENS: usize = 1024;

    /// Those of a model whose blocks have such units: Linears that share an A are ablated together.
    pub(crate) fn new(spec: &DecoderSpec, units: &[EoraUnit]) -> Self {
        let mut types: Vec<String> = Vec::new();
        let mut type_of = vec![0; spec.linears.len()];
        for unit in units {
            let names: Vec<String> = unit.places.iter().map(|&place| type_name(&spec.linears[place])).collect();
            let name = names.join(" + ");
            let known = types.iter().position(|known| *known == name).unwrap_or_else(|| {
                types.push(name);
                types.len() - 1
            });
            unit.places.iter().for_each(|&place| type_of[place] = known);
        }
        AblationGroups { types, type_of, layers: spec.layers }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.types.len() + self.bands()
    }

    fn bands(&self) -> usize {
        BANDS.min(self.layers)
    }

    fn band_of(&self, block: usize) -> usize {
        block * self.bands() / self.layers
    }

    /// `layers.0` or `layers.0-3`, as blocks are called.
    fn band_name(&self, spec: &DecoderSpec, band: usize) -> String {
        let of_band = |block: &usize| self.band_of(*block) == band;
        let first = (0..self.layers).find(of_band).unwrap_or(0);
        let last = (0..self.layers).rfind(of_band).unwrap_or(0);
        if first == last { spec.block_name(first) } else { format!("{}-{last}", spec.block_name(first)) }
    }
}

/// The name of a Linear inside its block, of experts that of all of a kind.
fn type_name(linear: &LinearSpec) -> String {
    match linear.slot {
        LinearSlot::ExpertGate(expert) | LinearSlot::ExpertUp(expert) | LinearSlot::ExpertDown(expert) => {
            linear.name.replacen(&format!(".{expert}."), ".*.", 1)
        }
        _ => linear.name.clone(),
    }
}

impl AblationCosts {
    /// Whether a job can have measured them.
    pub(crate) fn is_sound(&self) -> bool {
        self.types.iter().chain(&self.bands).all(|cost| cost.is_finite() && *cost >= 0.0)
    }

    /// The weights that explain these costs by what the factors of each Linear remove.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH` for costs of a model with other groups.
    pub(crate) fn weights(
        &self,
        spec: &DecoderSpec,
        units: &[EoraUnit],
        profiles: &[Option<&RankProfile>],
    ) -> Result<AblationWeights> {
        let groups = AblationGroups::new(spec, units);
        if (self.types.len(), self.bands.len()) != (groups.types.len(), groups.bands()) {
            let message = format!(
                "the ledger has costs of {} types and {} bands of Linears, the model has {} and {}",
                self.types.len(),
                self.bands.len(),
                groups.types.len(),
                groups.bands()
            );
            return Err(Error::new(ErrorCode::ResumeMismatch, message)
                .subject("ledger")
                .hint("Discard what the interrupted job left with fresh (--fresh)"));
        }
        let places = groups.type_of.len().max(1);
        let mut members = vec![1; places];
        units.iter().for_each(|unit| members[unit.places[0]] = unit.places.len());
        let linear = |(at, profile): (usize, &Option<&RankProfile>)| AblatedLinear {
            kind: groups.type_of[at % places],
            band: groups.band_of(at / places),
            removed: profile.map_or(0.0, removed) * members[at % places] as f64,
        };
        let linears: Vec<AblatedLinear> = profiles.iter().enumerate().map(linear).collect();
        let fit = AblationFit::new(&linears, &self.types, &self.bands);
        let factor = |factors: fn(&AblationFit) -> &[f64], at: usize| fit.as_ref().map_or(1.0, |fit| factors(fit)[at]);
        let removed_by = |belongs: &dyn Fn(&AblatedLinear) -> bool| {
            linears.iter().filter(|linear| belongs(linear)).map(|linear| linear.removed).sum()
        };
        let types = groups.types.iter().enumerate().map(|(at, name)| AblatedGroup {
            name: name.clone(),
            removed: removed_by(&|linear| linear.kind == at),
            cost: self.types[at],
            factor: factor(|fit| &fit.types, at),
        });
        let bands = (0..groups.bands()).map(|at| AblatedGroup {
            name: groups.band_name(spec, at),
            removed: removed_by(&|linear| linear.band == at),
            cost: self.bands[at],
            factor: factor(|fit| &fit.bands, at),
        });
        let report = AblationReport {
            fitted: fit.is_some(),
            tokens: self.tokens,
            held_out: self.held_out,
            types: types.collect(),
            bands: bands.collect(),
        };
        let weight = |linear: &AblatedLinear| fit.as_ref().map_or(1.0, |fit| fit.weight(linear.kind, linear.band));
        Ok(AblationWeights { factors: linears.iter().map(weight).collect(), report })
    }
}

/// The energy that all factors of a Linear remove, relative to its outputs.
fn removed(profile: &RankProfile) -> f64 {
    let [Some(before), Some(after)] = [profile.calibration.first(), profile.calibration.last()] else { return 0.0 };
    if profile.original > 0.0 { ((before - after) / profile.original).max(0.0) } else { 0.0 }
}

/// A run over a model whose blocks are all solved, in which several models advance together: one with all factors, and
/// for each group one without those of the group. One block is held at a time, and the residual stream of each model.
pub(crate) struct RankAblation<'a, B: Backend> {
    pub(crate) backend: &'a B,
    /// The decoder, as the factors name it.
    pub(crate) spec: &'a DecoderSpec,
    /// What the factors were solved for.
    pub(crate) deployed: &'a Checkpoint,
    /// A compensation that it has already.
    pub(crate) there: Option<&'a Adapter>,
    /// How the factors were solved.
    pub(crate) eora: &'a EoraRecipe,
    /// Where the factors lie, and what the job records of them.
    pub(crate) folder: &'a Path,
    pub(crate) units: &'a [LedgerUnit],
    pub(crate) cancel: &'a CancelToken,
    pub(crate) progress: &'a Progress,
}

/// The models that advance through the blocks.
struct Models {
    /// The residual stream of the one with all factors.
    whole: Vec<f32>,
    /// Those without the factors of a group; `None` as long as they are that of the whole one.
    without: Vec<Option<Vec<f32>>>,
}

impl Models {
    fn of(&self, group: usize) -> &[f32] {
        self.without[group].as_deref().unwrap_or(&self.whole)
    }
}

impl<B: Backend> RankAblation<'_, B> {
    /// What each group costs on a sample of tokens, which may be held out.
    ///
    /// # Errors
    /// What reading and running the model reports; `ERR_CANCELLED`.
    pub(crate) fn run(&self, (sample, held_out): &(CalibrationTokens, bool)) -> Result<AblationCosts> {
        let groups = AblationGroups::new(self.spec, &self.eora.units(self.spec));
        let spec = DecoderSpec::of(self.deployed)?;
        self.progress.begin("weigh", spec.layers as u64);
        let positions: Vec<u32> = (0..sample.tokens().len()).map(|i| (i % sample.length()) as u32).collect();
        let whole = Embedding::read(self.deployed, &spec)?.embed(sample.tokens(), &positions)?;
        let mut models = Models { whole, without: vec![None; groups.count()] };
        let mut stream = CalibrationStream::<B>::empty(&spec, sample, None);
        for block in 0..spec.layers {
            self.cancel.check()?;
            self.progress.at("weigh", spec.block_name(block));
            self.advance(&mut models, &mut stream, &groups, &spec, block)?;
            self.progress.advance(1);
        }
        drop(stream);
        self.progress.at("weigh", spec.family.head);
        let head = Head::read(self.deployed, &spec, self.backend)?;
        let others: Vec<&[f32]> = models.without.iter().flatten().map(Vec::as_slice).collect();
        let costs = match mean_divergences(self.backend, &spec, &head, &models.whole, &others, self.cancel) {
            // A model without factors that overflows says nothing about their worth, and its job is done but for that.
            Err(error) if error.code == ErrorCode::ValueNotFinite => vec![0.0; others.len()],
            costs => costs?,
        };
        let mut costs = costs.into_iter();
        let mut types: Vec<f64> =
            models.without.iter().map(|stream| stream.as_ref().and_then(|_| costs.next()).unwrap_or(0.0)).collect();
        let bands = types.split_off(groups.types.len());
        Ok(AblationCosts { tokens: sample.tokens().len(), held_out: *held_out, types, bands })
    }

    /// Takes all models through a block.
    fn advance(
        &self,
        models: &mut Models,
        stream: &mut CalibrationStream<B>,
        groups: &AblationGroups,
        spec: &DecoderSpec,
        block: usize,
    ) -> Result<()> {
        let mut weights = BlockWeights::read(self.deployed, spec, block)?;
        if let Some(there) = self.there {
            attach_compensation(self.spec, block, &mut weights, there)?;
        }
        let factors = self.factors(block)?;
        let places: Vec<usize> = (0..factors.len()).filter(|&place| factors[place].is_some()).collect();
        let band = groups.types.len() + groups.band_of(block);
        let mut runnable = Block::prepare(self.backend, spec, block, &weights)?;
        let mut forward =
            |block: &Block<B>, rows: &[f32]| stream.forward(self.backend, block, BlockPart::Whole, rows, self.cancel);
        // Whatever nothing is left out of runs with all factors of the block.
        let mut is_whole = vec![true; groups.count()];
        if !places.is_empty() {
            models.without[band] = Some(forward(&runnable, models.of(band))?);
            is_whole[band] = false;
        }
        for &place in &places {
            runnable.replace(place, self.compensated(&weights.linears[place], &factors[place])?);
        }
        for kind in 0..groups.types.len() {
            let of_kind = || places.iter().copied().filter(|&place| groups.type_of[place] == kind);
            if of_kind().next().is_none() {
                continue;
            }
            for place in of_kind() {
                runnable.replace(place, self.backend.prepare(&weights.linears[place])?);
            }
            models.without[kind] = Some(forward(&runnable, models.of(kind))?);
            is_whole[kind] = false;
            for place in of_kind() {
                runnable.replace(place, self.compensated(&weights.linears[place], &factors[place])?);
            }
        }
        for (group, rows) in models.without.iter_mut().enumerate() {
            if let Some(rows) = rows.as_mut().filter(|_| is_whole[group]) {
                *rows = forward(&runnable, rows)?;
            }
        }
        models.whole = forward(&runnable, &models.whole)?;
        Ok(())
    }

    /// The factors of the Linears of a block.
    fn factors(&self, block: usize) -> Result<Vec<Option<LowRank>>> {
        let name = SolvedFactors::name_of(block);
        if !self.units.iter().any(|unit| unit.factors.as_ref() == Some(&name)) {
            return Ok(vec![None; self.spec.linears.len()]);
        }
        let mut adapter = read_adapter(&self.folder.join(name))?;
        let linears = self.spec.linears.iter();
        let of_linear = |linear| Some(adapter.linears.remove(&self.spec.linear_name(block, linear))?.factors);
        Ok(linears.map(of_linear).collect())
    }

    fn compensated(&self, weight: &LinearWeight, factors: &Option<LowRank>) -> Result<B::Linear> {
        let mut weight = weight.clone();
        factors.iter().for_each(|factors| weight.compensate(factors.clone()));
        self.backend.prepare(&weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(layers: usize, experts: bool) -> DecoderSpec {
        let architecture = if experts { "MixtralForCausalLM" } else { "LlamaForCausalLM" };
        let config = serde_json::json!({
            "architectures": [architecture], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers,
            "num_attention_heads": 2, "vocab_size": 32, "num_local_experts": 3, "num_experts_per_tok": 1,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        });
        DecoderSpec::from_config(config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn groups_are_types_and_bands_of_neighbours() {
        let spec = spec(6, false);
        let groups = AblationGroups::new(&spec, &EoraUnit::of_block(&spec, false));
        assert_eq!((groups.types.len(), groups.bands(), groups.count()), (7, 4, 11));
        assert_eq!(groups.types[0], "self_attn.q_proj");
        let bands: Vec<usize> = (0..6).map(|block| groups.band_of(block)).collect();
        assert_eq!(bands, [0, 0, 1, 2, 2, 3]);
        let names: Vec<String> = (0..4).map(|band| groups.band_name(&spec, band)).collect();
        assert_eq!(names, ["model.layers.0-1", "model.layers.2", "model.layers.3-4", "model.layers.5"]);
    }

    #[test]
    fn experts_of_a_kind_are_one_type() {
        let spec = spec(1, true);
        let together = AblationGroups::new(&spec, &EoraUnit::of_block(&spec, true)).types;
        assert_eq!(together.len(), 4, "{together:?}");
        assert!(together[0].matches(" + ").count() == 2 && together[2].matches(".*.").count() == 2, "{together:?}");
        let groups = AblationGroups::new(&spec, &EoraUnit::of_block(&spec, false));
        assert_eq!((groups.types.len(), groups.bands()), (4 + 3, 1), "{:?}", groups.types);
        assert!(groups.types.iter().any(|name| name.contains(".*.")), "{:?}", groups.types);
        assert_eq!(groups.type_of.len(), 4 + 9);
    }

    fn profile(before: f64, after: f64) -> RankProfile {
        let calibration = vec![before, after];
        RankProfile { original: 10.0, best: calibration.clone(), calibration, ..RankProfile::default() }
    }

    #[test]
    fn weights_are_those_that_explain_the_costs() {
        let spec = spec(2, false);
        let units = EoraUnit::of_block(&spec, false);
        let (some, none) = (profile(2.0, 1.0), RankProfile { original: 0.0, ..profile(2.0, 1.0) });
        let mut profiles: Vec<Option<&RankProfile>> = vec![Some(&some); 14];
        let mut costs = AblationCosts { tokens: 64, held_out: true, types: vec![1.0; 7], bands: vec![2.0, 6.0] };
        costs.types[2] = 4.0;
        let found = costs.weights(&spec, &units, &profiles).unwrap();
        assert!(found.report.fitted && found.report.held_out && found.report.tokens == 64);
        assert!((found.factors[2] / found.factors[1] - 4.0).abs() < 1e-9, "{:?}", found.factors);
        assert!((found.factors[8] / found.factors[1] - 3.0).abs() < 1e-9, "{:?}", found.factors);
        assert!((found.factors.iter().sum::<f64>() / 14.0 - 1.0).abs() < 1e-9);
        assert!((found.report.types[0].removed - 0.2).abs() < 1e-12);
        // Outputs without energy and unknown ones say nothing.
        (profiles[3], profiles[4]) = (Some(&none), None);
        let found = costs.weights(&spec, &units, &profiles).unwrap();
        assert!(found.report.fitted && found.factors.iter().all(|factor| factor.is_finite() && *factor > 0.0));

        costs.types = vec![0.0; 7];
        costs.bands = vec![0.0; 2];
        let found = costs.weights(&spec, &units, &profiles).unwrap();
        assert!(!found.report.fitted && found.factors == [1.0; 14]);

        costs.bands.push(1.0);
        assert_eq!(
            costs.weights(&spec, &units, &profiles).err().map(|error| error.code),
            Some(ErrorCode::ResumeMismatch)
        );
    }
}
