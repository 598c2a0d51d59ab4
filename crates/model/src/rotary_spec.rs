use std::borrow::Cow;
use std::f64::consts::PI;

use kintsugi_runtime::Result;

use crate::config_fields::{Fields, invalid, unsupported};

/// Rotary position embedding as `config.json` describes it: by which angles pairs of dimensions turn.
///
/// Scalings are those of `modeling_rope_utils` in Hugging Face transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct RotarySpec {
    /// Radians per position, one for each pair of dimensions.
    frequencies: Vec<f64>,
    /// What cosines and sines are multiplied with.
    scale: f64,
    longer: Option<Longer>,
    /// Longest context that the scaling is made for, where it is more than `config.json` says elsewhere.
    pub(crate) extended_context: usize,
}

/// Other frequencies, for all positions of sequences that reach more than `beyond` positions.
#[derive(Clone, Debug, PartialEq)]
struct Longer {
    beyond: usize,
    frequencies: LongFrequencies,
}

#[derive(Clone, Debug, PartialEq)]
enum LongFrequencies {
    /// LongRoPE (arXiv 2402.13753): a second set.
    Fixed(Vec<f64>),
    /// "Dynamic NTK": a base that grows with the length.
    Dynamic { theta: f64, factor: f64 },
}

impl RotarySpec {
    /// [`RotarySpec::parse`], whose result must be numbers.
    pub(crate) fn read(scaling: Option<Fields<'_>>, defaults: &RotaryDefaults) -> Result<Self> {
        let spec = Self::parse(scaling, defaults)?;
        let longest = spec.frequencies(defaults.context.max(spec.extended_context));
        let finite = |values: &[f64]| values.iter().all(|value| value.is_finite());
        if finite(&spec.frequencies) && finite(&longest) && spec.scale.is_finite() {
            return Ok(spec);
        }
        Err(invalid("rope_parameters", "the parameters of rotary embedding lead to no finite angles".into()))
    }

    /// Reads `scaling`, an object like `rope_parameters` or `rope_scaling`, with `defaults` for what it leaves out.
    ///
    /// # Errors
    /// `ERR_CONFIG_UNSUPPORTED` for an unknown kind, `ERR_CONFIG_INVALID` for missing or impossible parameters.
    fn parse(scaling: Option<Fields<'_>>, defaults: &RotaryDefaults) -> Result<Self> {
        let empty = serde_json::Map::new();
        let scaling = scaling.unwrap_or(Fields(&empty));
        let theta = scaling.positive("rope_theta")?.unwrap_or(defaults.theta);
        let share = scaling.positive("partial_rotary_factor")?.unwrap_or(defaults.rotated_share);
        let dimensions = (defaults.head_dim as f64 * share) as usize;
        if dimensions == 0 || dimensions > defaults.head_dim || !dimensions.is_multiple_of(2) {
            let message = format!("rotary embedding needs an even part of the head, not {dimensions} dimensions");
            return Err(invalid("head_dim", message));
        }
        let plain = plain_frequencies(theta, dimensions);
        let context = defaults.context;
        let original = || -> Result<usize> {
            let own = scaling.optional_size("original_max_position_embeddings")?;
            Ok(defaults.original_context.or(own).unwrap_or(context))
        };
        let spec = |frequencies| RotarySpec { frequencies, scale: 1.0, longer: None, extended_context: context };
        match scaling.text("rope_type").or_else(|| scaling.text("type")).unwrap_or("default") {
            "default" => Ok(spec(plain)),
            "linear" => {
                let factor = scaling.required_positive("factor")?;
                let frequencies = plain.iter().map(|frequency| frequency / factor).collect();
                Ok(RotarySpec { extended_context: (context as f64 * factor) as usize, ..spec(frequencies) })
            }
            "dynamic" => {
                let factor = scaling.required_positive("factor")?;
                if dimensions == 2 {
                    return Err(invalid("head_dim", "dynamic scaling needs more than 2 rotary dimensions".into()));
                }
                let frequencies = LongFrequencies::Dynamic { theta, factor };
                Ok(RotarySpec {
                    longer: Some(Longer { beyond: context, frequencies }),
                    extended_context: (context as f64 * factor) as usize,
                    ..spec(plain)
                })
            }
            "llama3" => {
                let bands = [
                    scaling.required_positive("factor")?,
                    scaling.required_positive("low_freq_factor")?,
                    scaling.required_positive("high_freq_factor")?,
                ];
                let original = original()? as f64;
                Ok(spec(plain.iter().map(|&frequency| llama3_frequency(frequency, bands, original)).collect()))
            }
            "yarn" => {
                let original = original()?;
                let factor = scaling.positive("factor")?.unwrap_or(context as f64 / original as f64);
                let frequencies = yarn_frequencies(scaling, &plain, theta, factor, original as f64)?;
                Ok(RotarySpec {
                    scale: yarn_scale(scaling, factor)?,
                    extended_context: context.max((original as f64 * factor) as usize),
                    ..spec(frequencies)
                })
            }
            // "su" is the first name of LongRoPE, in the configurations of Phi-3.
            "longrope" | "su" => {
                let original = original()?;
                let factor = scaling.positive("factor")?.unwrap_or(context as f64 / original as f64);
                let recommended = (1.0 + factor.max(1.0).ln() / (original as f64).ln()).sqrt();
                let divided = |name: &str| -> Result<Vec<f64>> {
                    let factors = scaling.positives(name, plain.len())?;
                    Ok(plain.iter().zip(factors).map(|(frequency, factor)| frequency / factor).collect())
                };
                let frequencies = LongFrequencies::Fixed(divided("long_factor")?);
                Ok(RotarySpec {
                    scale: scaling.positive("attention_factor")?.unwrap_or(recommended),
                    longer: Some(Longer { beyond: original, frequencies }),
                    ..spec(divided("short_factor")?)
                })
            }
            other => Err(unsupported("rope_type", format!("the rotary scaling '{other}'"))),
        }
    }

    /// Pairs of dimensions that turn.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// What cosines and sines are multiplied with.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Radians per position, one for each pair, in a sequence that reaches `length` positions.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f64]> {
        match &self.longer {
            Some(Longer { beyond, frequencies }) if length > *beyond => match frequencies {
                LongFrequencies::Fixed(frequencies) => Cow::Borrowed(frequencies),
                LongFrequencies::Dynamic { theta, factor } => {
                    let dimensions = 2 * self.pairs();
                    let grown = factor * length as f64 / *beyond as f64 - (factor - 1.0);
                    let theta = theta * grown.powf(dimensions as f64 / (dimensions - 2) as f64);
                    Cow::Owned(plain_frequencies(theta, dimensions))
                }
            },
            _ => Cow::Borrowed(&self.frequencies),
        }
    }
}

/// What `config.json` says about rotary embedding outside of the object with the scaling.
pub(crate) struct RotaryDefaults {
    pub(crate) theta: f64,
    /// Share of a head that turns.
    pub(crate) rotated_share: f64,
    pub(crate) head_dim: usize,
    pub(crate) context: usize,
    /// Context before it was extended.
    pub(crate) original_context: Option<usize>,
}

fn plain_frequencies(theta: f64, dimensions: usize) -> Vec<f64> {
    (0..dimensions / 2).map(|i| theta.powf(-2.0 * i as f64 / dimensions as f64)).collect()
}

/// Long waves are stretched by the factor, short ones stay, those between are blended.
fn llama3_frequency(frequency: f64, [factor, low, high]: [f64; 3], original: f64) -> f64 {
    let turns = original * frequency / (2.0 * PI);
    if turns < low {
        return frequency / factor;
    }
    if turns > high {
        return frequency;
    }
    let share = (turns - low) / (high - low);
    (1.0 - share) * frequency / factor + share * frequency
}

/// YaRN (arXiv 2309.00071): dimensions that turn often in the original context stay, slow ones are stretched.
fn yarn_frequencies(scaling: Fields<'_>, plain: &[f64], theta: f64, factor: f64, original: f64) -> Result<Vec<f64>> {
    let dimensions = 2.0 * plain.len() as f64;
    let dimension_of = |turns: f64| dimensions * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let fast = scaling.positive("beta_fast")?.unwrap_or(32.0);
    let slow = scaling.positive("beta_slow")?.unwrap_or(1.0);
    let (mut low, mut high) = (dimension_of(fast), dimension_of(slow));
    if scaling.flag("truncate").unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dimensions - 1.0));
    if low == high {
        high += 0.001;
    }
    let stretched = |(i, frequency): (usize, &f64)| {
        let share = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        frequency / factor * share + frequency * (1.0 - share)
    };
    Ok(plain.iter().enumerate().map(stretched).collect())
}

fn yarn_scale(scaling: Fields<'_>, factor: f64) -> Result<f64> {
    let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    if let Some(scale) = scaling.positive("attention_factor")? {
        return Ok(scale);
    }
    // Zero stands for absent here.
    let weight = |name: &str| scaling.value(name).and_then(serde_json::Value::as_f64).filter(|weight| *weight != 0.0);
    Ok(match (weight("mscale"), weight("mscale_all_dim")) {
        (Some(one), Some(all)) => scale(one) / scale(all),
        _ => scale(1.0),
    })
}
