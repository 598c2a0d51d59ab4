use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use kintsugi_checkpoint::{Checkpoint, LinearFormat};
use kintsugi_compress::{QuantizeOptions, rtn};
use kintsugi_model::{Backend, Block, BlockWeights, DecoderSpec, TapPoint};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool, replace_file};
use kintsugi_weights::{CODE_BITS, ElementType, LinearWeight, WeightMatrix};
use serde::{Deserialize, Serialize};

use crate::calibration_stream::BlockPart;
use crate::memory_plan::SAMPLE_TOKENS;
use crate::output_format::holds;
use crate::plan::grid_bits;
use crate::{CalibrationStream, CalibrationTokens, LinearOverride, Recipe};

/// Steps that the budget is divided into at most; costs are rounded up to whole steps.
const STEPS: u64 = 50_000;

/// Most bytes that are read of widths that were found before; a name and a number for each Linear.
const FILE_LIMIT: u64 = 64 << 20;

/// Code widths for all Linears of a model within a budget of bits.
///
/// Linears that servers fuse have one width: query, key and value; gate and up; all experts of a block. Each such group
/// is rounded to nearest at every width that the format holds, alone, and the damage is what that does to the output of
/// its block: the mean of `‖Δy‖² / ‖y‖²` over the first calibration tokens, of each token alone because the norm of the
/// next block makes them equal. The widths that are taken have the least sum of damages that the budget allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BitAllocation {
    /// The width of each Linear.
    bits: BTreeMap<String, u8>,
}

/// Linears that get one width.
struct Group {
    names: Vec<String>,
    /// Width, bits that the Linears take, damage; by width.
    choices: Vec<Choice>,
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    width: u8,
    bits: u64,
    damage: f64,
}

impl BitAllocation {
    const FILE_NAME: &'static str = "bit-allocation.partial";

    /// What an interrupted job had found, or what is found now and left in `folder` for a later run.
    ///
    /// # Errors
    /// Those of [`Search::find`]; `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn resume_or_find<B: Backend>(
        search: &Search<'_, B>,
        folder: &Path,
        progress: &Progress,
    ) -> Result<Self> {
        let path = folder.join(Self::FILE_NAME);
        if let Some(found) = Self::read(&path)
            && search.allows(&found)?
        {
            return Ok(found);
        }
        let found = search.find(progress)?;
        let text = serde_json::to_vec(&found)
            .map_err(|error| Error::new(ErrorCode::Internal, format!("the widths cannot be recorded: {error}")))?;
        replace_file(&path, &text)?;
        Ok(found)
    }

    /// Whether widths lie in `folder`.
    pub(crate) fn is_found(folder: &Path) -> bool {
        folder.join(Self::FILE_NAME).is_file()
    }

    /// What lies at `path`, if it is a file that can be understood. Pipes are not opened: that would wait for a writer.
    fn read(path: &Path) -> Option<Self> {
        let mut text = Vec::new();
        path.is_file().then(|| File::open(path)).and_then(Result::ok)?.take(FILE_LIMIT).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// `recipe` with the widths as overrides, in front of its own.
    pub(crate) fn applied(&self, recipe: &Recipe) -> Recipe {
        let of_linear = |(name, &bits): (&String, &u8)| LinearOverride {
            linears: name.clone(),
            bits: Some(bits),
            group_size: recipe.overrides.iter().find(|given| given.matches(name)).and_then(|given| given.group_size),
        };
        let overrides = self.bits.iter().map(of_linear).chain(recipe.overrides.iter().cloned()).collect();
        Recipe { overrides, ..recipe.clone() }
    }
}

/// What the search for widths works on.
pub(crate) struct Search<'a, B: Backend> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) spec: &'a DecoderSpec,
    pub(crate) backend: &'a B,
    pub(crate) text: &'a CalibrationTokens,
    pub(crate) format: &'static dyn LinearFormat,
    pub(crate) stored: ElementType,
    pub(crate) cancel: &'a CancelToken,
}

impl<B: Backend> Search<'_, B> {
    /// Whether this search could have found these widths: files are not trusted.
    fn allows(&self, found: &BitAllocation) -> Result<bool> {
        let (spec, recipe) = (self.spec, self.recipe);
        let (mut names, mut bits) = (0, 0);
        for block in 0..spec.layers {
            for places in fused_places(spec) {
                let widths = candidate_widths(recipe, spec, self.format, self.stored, block, &places)?;
                for &place in &places {
                    let name = spec.linear_name(block, &spec.linears[place]);
                    let Some(&width) = found.bits.get(&name).filter(|width| widths.contains(width)) else {
                        return Ok(false);
                    };
                    bits += bits_at(recipe, spec, self.stored, block, place, width);
                    names += 1;
                }
            }
        }
        Ok(names == found.bits.len() && bits <= budget_bits(recipe, spec))
    }

    fn find(&self, progress: &Progress) -> Result<BitAllocation> {
        let (spec, recipe) = (self.spec, self.recipe);
        let budget = budget_bits(recipe, spec);
        let sample = self.text.first(SAMPLE_TOKENS);
        let mut stream = CalibrationStream::<B>::new(self.checkpoint, spec, &sample, None)?;
        let mut groups = Vec::new();
        progress.begin("allocate bits", spec.layers as u64);
        for block in 0..spec.layers {
            self.cancel.check()?;
            progress.at("allocate bits", spec.block_name(block));
            let weights = BlockWeights::read(self.checkpoint, spec, block)?;
            let mut runnable = Block::prepare(self.backend, spec, block, &weights)?;
            let rows = stream.first_rows(SAMPLE_TOKENS)?;
            let whole = stream.forward(self.backend, &runnable, BlockPart::Whole, &rows, self.cancel)?;
            for places in fused_places(spec) {
                let names: Vec<String> =
                    places.iter().map(|&place| spec.linear_name(block, &spec.linears[place])).collect();
                let mut choices = Vec::new();
                for width in candidate_widths(recipe, spec, self.format, self.stored, block, &places)? {
                    for (&place, name) in places.iter().zip(&names) {
                        let weight = self.rounded(&weights.linears[place], name, width)?;
                        runnable.replace(place, self.backend.prepare(&weight)?);
                    }
                    let bits =
                        places.iter().map(|&place| bits_at(recipe, spec, self.stored, block, place, width)).sum();
                    let output = stream.forward(self.backend, &runnable, BlockPart::Whole, &rows, self.cancel)?;
                    choices.push(Choice { width, bits, damage: relative_damage(&whole, &output, spec.hidden_size) });
                }
                for &place in &places {
                    runnable.replace(place, self.backend.prepare(&weights.linears[place])?);
                }
                groups.push(Group { names, choices });
            }
            stream.advance(self.backend, &runnable, self.cancel)?;
            progress.advance(1);
        }
        let chosen = choose(&groups, budget)
            .ok_or_else(|| too_small(recipe, spec, groups.iter().map(Group::least).sum::<u64>()))?;
        let widths = groups.iter().zip(chosen);
        let bits = widths.flat_map(|(group, at)| group.names.iter().map(move |name| (name, group.choices[at].width)));
        Ok(BitAllocation { bits: bits.map(|(name, bits)| (name.clone(), bits)).collect() })
    }

    /// A Linear rounded to nearest at a width.
    fn rounded(&self, original: &LinearWeight, name: &str, width: u8) -> Result<LinearWeight> {
        let WeightMatrix::Dense(dense) = &original.matrix else {
            return Err(Error::new(ErrorCode::QuantizationUnsupported, "the Linear is compressed already")
                .subject(name)
                .hint("Compress the original checkpoint"));
        };
        let options = QuantizeOptions { bits: width, ..self.recipe.quantize_options(name, self.stored) };
        let matrix = WeightMatrix::Quantized(rtn(dense, None, &options, ThreadPool::global())?);
        Ok(LinearWeight { matrix, bias: original.bias.clone(), low_rank: None })
    }
}

impl Group {
    fn least(&self) -> u64 {
        self.choices.iter().map(|choice| choice.bits).min().unwrap_or(0)
    }
}

/// Refuses a budget that not even the narrowest codes keep, before anything runs.
///
/// # Errors
/// `ERR_OPTION_INVALID`; `ERR_QUANTIZATION_UNSUPPORTED` where the format holds no common width of fused Linears.
pub(crate) fn check_budget(
    recipe: &Recipe,
    spec: &DecoderSpec,
    format: &dyn LinearFormat,
    stored: ElementType,
) -> Result<()> {
    if recipe.bit_budget.is_none() {
        return Ok(());
    }
    let mut least = 0;
    for block in 0..spec.layers {
        for places in fused_places(spec) {
            let of_all =
                |width| -> u64 { places.iter().map(|&place| bits_at(recipe, spec, stored, block, place, width)).sum() };
            let widths = candidate_widths(recipe, spec, format, stored, block, &places)?;
            least += widths.into_iter().map(of_all).min().unwrap_or(0);
        }
    }
    if least <= budget_bits(recipe, spec) { Ok(()) } else { Err(too_small(recipe, spec, least)) }
}

/// The widths that may be chosen for fused Linears: those that the format holds for all of them, or the one that an
/// override names.
fn candidate_widths(
    recipe: &Recipe,
    spec: &DecoderSpec,
    format: &dyn LinearFormat,
    stored: ElementType,
    block: usize,
    places: &[usize],
) -> Result<Vec<u8>> {
    let linears: Vec<(String, (usize, usize))> = places
        .iter()
        .map(|&place| &spec.linears[place])
        .map(|linear| (spec.linear_name(block, linear), (linear.rows, linear.columns)))
        .collect();
    let asked = |(name, _): &(String, _)| {
        recipe.overrides.iter().find(|given| given.matches(name)).and_then(|given| given.bits)
    };
    let mut asked: Vec<u8> = linears.iter().filter_map(asked).collect();
    asked.dedup();
    if asked.len() > 1 {
        let names: Vec<&str> = linears.iter().map(|(name, _)| name.as_str()).collect();
        let message = format!("servers fuse {}, and overrides give them several widths", names.join(", "));
        return Err(Error::new(ErrorCode::OptionInvalid, message)
            .subject("overrides")
            .hint("Under a bit budget, give Linears that are fused one width, or none"));
    }
    let widths = asked.first().map_or(CODE_BITS.to_vec(), |&width| vec![width]);
    let held =
        |width: &u8| linears.iter().all(|(name, shape)| holds(format, &recipe.with_bits(*width), name, *shape, stored));
    let widths: Vec<u8> = widths.into_iter().filter(held).collect();
    if widths.is_empty() {
        let names: Vec<&str> = linears.iter().map(|(name, _)| name.as_str()).collect();
        let message = format!("the format {} holds no common width of these Linears", format.name());
        return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
            .subject(names.join(", "))
            .hint("Choose another format, or other groups"));
    }
    Ok(widths)
}

/// Bits that a Linear takes at a width.
fn bits_at(recipe: &Recipe, spec: &DecoderSpec, stored: ElementType, block: usize, place: usize, width: u8) -> u64 {
    let linear = &spec.linears[place];
    let usual = recipe.quantize_options(&spec.linear_name(block, linear), stored);
    let options = QuantizeOptions { bits: width, ..usual };
    grid_bits(&options, (linear.rows, linear.columns), recipe.has_group_index())
}

/// Bits that codes, scales and zero points of all Linears may take.
fn budget_bits(recipe: &Recipe, spec: &DecoderSpec) -> u64 {
    let per_weight = recipe.bit_budget.unwrap_or(f64::INFINITY);
    (per_weight * spec.linear_parameters() as f64) as u64
}

fn too_small(recipe: &Recipe, spec: &DecoderSpec, least: u64) -> Error {
    let least = least as f64 / spec.linear_parameters() as f64;
    let asked = recipe.bit_budget.unwrap_or_default();
    let message = format!("{asked} bits per weight are less than the {least:.3} that the narrowest codes take");
    Error::new(ErrorCode::OptionInvalid, message).subject("bitBudget").hint("Allow more bits, or use larger groups")
}

/// Linears that servers fuse, as places in [`DecoderSpec::linears`].
fn fused_places(spec: &DecoderSpec) -> Vec<Vec<usize>> {
    let mut groups: Vec<(Option<TapPoint>, Vec<usize>)> = Vec::new();
    for (place, linear) in spec.linears.iter().enumerate() {
        let key = match linear.slot.tap() {
            TapPoint::ExpertInput(_) | TapPoint::ExpertActivation(_) => None,
            point => Some(point),
        };
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, places)) => places.push(place),
            None => groups.push((key, vec![place])),
        }
    }
    groups.into_iter().map(|(_, places)| places).collect()
}

/// The mean of `‖b − a‖² / ‖a‖²` over rows of `width`; the numerator alone where a row is zero.
fn relative_damage(a: &[f32], b: &[f32], width: usize) -> f64 {
    let of_row = |(a, b): (&[f32], &[f32])| {
        let (mut difference, mut energy) = (0.0, 0.0);
        for (&a, &b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a), f64::from(b));
            difference += (b - a) * (b - a);
            energy += a * a;
        }
        if energy > 0.0 { difference / energy } else { difference }
    };
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(of_row).sum::<f64>() / (a.len() / width).max(1) as f64
}

/// The choice of each group that together have the least damage within `budget`, by dynamic programming over steps of
/// the budget. `None` when not even the cheapest fit. Where a step is more than one bit, what is found may be worse than
/// the best by what one step per group could buy.
fn choose(groups: &[Group], budget: u64) -> Option<Vec<usize>> {
    let least: u64 = groups.iter().map(Group::least).sum();
    let most: u64 = groups.iter().filter_map(|group| group.choices.iter().map(|choice| choice.bits).max()).sum();
    let room = budget.min(most).checked_sub(least)?;
    if budget >= most {
        // Rounded costs could keep the last step from being bought.
        let least_damage = |group: &Group| {
            let choices = group.choices.iter().enumerate();
            choices.min_by(|(_, a), (_, b)| a.damage.total_cmp(&b.damage)).map_or(0, |(at, _)| at)
        };
        return Some(groups.iter().map(least_damage).collect());
    }
    let extra = |group: &Group, choice: &Choice| choice.bits - group.least();
    let common = groups
        .iter()
        .flat_map(|group| group.choices.iter().map(move |choice| extra(group, choice)))
        .fold(0, greatest_common_divisor);
    let step = common.max(room.div_ceil(STEPS)).max(1);
    let steps = (room / step) as usize;
    // Least damage of the groups so far when they take at most so many steps, and the choices that led there.
    let mut damage = vec![0.0f64; steps + 1];
    let mut taken: Vec<Vec<u8>> = Vec::with_capacity(groups.len());
    for group in groups {
        let mut next = vec![f64::INFINITY; steps + 1];
        let mut choices = vec![0u8; steps + 1];
        for (at, choice) in group.choices.iter().enumerate() {
            let cost = extra(group, choice).div_ceil(step) as usize;
            for used in cost..=steps {
                let sum = damage[used - cost] + choice.damage;
                if sum < next[used] {
                    (next[used], choices[used]) = (sum, at as u8);
                }
            }
        }
        damage = next;
        taken.push(choices);
    }
    let mut left = steps;
    let mut chosen = vec![0; groups.len()];
    for ((group, choices), chosen) in groups.iter().zip(&taken).zip(&mut chosen).rev() {
        *chosen = usize::from(choices[left]);
        left -= extra(group, &group.choices[*chosen]).div_ceil(step) as usize;
    }
    Some(chosen)
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use kintsugi_linalg::SplitMix64;

    use super::*;

    fn group(weights: u64, damages: &[f64]) -> Group {
        let choices = damages.iter().zip(CODE_BITS).map(|(&damage, width)| Choice {
            width,
            bits: weights * u64::from(width),
            damage,
        });
        Group { names: Vec::new(), choices: choices.collect() }
    }

    fn cost(groups: &[Group], chosen: &[usize]) -> (u64, f64) {
        let choices = groups.iter().zip(chosen).map(|(group, &at)| group.choices[at]);
        choices.fold((0, 0.0), |(bits, damage), choice| (bits + choice.bits, damage + choice.damage))
    }

    /// The least damage of all combinations.
    fn brute_force(groups: &[Group], budget: u64) -> Option<f64> {
        let count = groups[0].choices.len();
        let combinations = (0..count.pow(groups.len() as u32)).map(|mut number| {
            groups
                .iter()
                .map(|_| {
                    let at = number % count;
                    number /= count;
                    at
                })
                .collect::<Vec<_>>()
        });
        let fitting = combinations.map(|chosen| cost(groups, &chosen)).filter(|&(bits, _)| bits <= budget);
        fitting.map(|(_, damage)| damage).min_by(f64::total_cmp)
    }

    #[test]
    fn the_choice_is_the_best_of_all_combinations() {
        let mut random = SplitMix64::new(3);
        let mut unit = || (random.bits() >> 11) as f64 / (1u64 << 53) as f64;
        for round in 0..40 {
            let groups: Vec<Group> = (0..7)
                .map(|_| {
                    let scale = (unit() * 8.0).exp();
                    let damages = [16.0, 4.0, 1.0].map(|damage| damage * scale * (0.5 + unit()));
                    group(1 + (unit() * 9.0) as u64, &damages)
                })
                .collect();
            let least: u64 = groups.iter().map(Group::least).sum();
            for share in [0.9, 1.0, 1.1, 1.3, 1.7, 3.0] {
                let budget = (least as f64 * share) as u64;
                let expected = brute_force(&groups, budget);
                let found = choose(&groups, budget).map(|chosen| cost(&groups, &chosen));
                assert!(found.is_none_or(|(bits, _)| bits <= budget));
                let damage = found.map(|(_, damage)| damage);
                assert_eq!(damage.is_some(), expected.is_some(), "{round} {share}");
                if let (Some(damage), Some(expected)) = (damage, expected) {
                    assert!((damage / expected - 1.0).abs() < 1e-12, "{round} {share}: {damage} {expected}");
                }
            }
        }
    }

    #[test]
    fn costs_without_a_common_step_are_rounded_up() {
        let sizes = |i: u64| 1_000_003 + 7919 * i * i;
        let groups: Vec<Group> = (0..300)
            .map(|i| {
                let damages = [9.0, 3.0, 1.0, 0.3, 0.1, 0.01].map(|damage| damage * (1 + i % 7) as f64);
                group(sizes(i), &damages)
            })
            .collect();
        let weights: u64 = (0..300).map(sizes).sum();
        for bits in [2.0, 2.5, 3.01, 4.0, 6.7, 7.99] {
            let budget = (weights as f64 * bits) as u64;
            let (taken, damage) = cost(&groups, &choose(&groups, budget).unwrap());
            // What rounding costs is at most a step of each group.
            let slack = 300 * (budget - weights * 2).div_ceil(STEPS);
            assert!(taken <= budget, "{bits}");
            let tighter = choose(&groups, budget - slack.min(budget - weights * 2)).unwrap();
            assert!(damage <= cost(&groups, &tighter).1, "{bits}");
        }
        let widest = choose(&groups, weights * 8).unwrap();
        assert_eq!(cost(&groups, &widest).0, weights * 8);
    }

    #[test]
    fn large_models_keep_within_the_budget() {
        let groups: Vec<Group> = (0..300)
            .map(|i| {
                group(
                    1_000_003 * (1 + i % 5),
                    &[9.0, 3.0, 1.0, 0.3, 0.1, 0.01].map(|damage| damage * (1 + i % 7) as f64),
                )
            })
            .collect();
        let weights: u64 = (0..300).map(|i| 1_000_003 * (1 + i % 5)).sum();
        let mut last = f64::INFINITY;
        for bits in [2.0, 2.5, 3.01, 4.0, 6.7, 8.0, 100.0] {
            let budget = (weights as f64 * bits) as u64;
            let (taken, damage) = cost(&groups, &choose(&groups, budget).unwrap());
            assert!(taken <= budget && damage < last || bits > 8.0 && damage == last, "{bits}");
            // What is left over buys nothing: less than one step of every group.
            assert!(bits > 8.0 || budget - taken < 6_000_000 + weights / 1000, "{bits}: {}", budget - taken);
            last = damage;
        }
        assert!(choose(&groups, weights * 2 - 1).is_none());
    }
}
