use kintsugi_pipeline::{ActivationPlace, CalibrationKind, CalibrationRecipe, CalibrationSource};
use kintsugi_runtime::Result;
use napi_derive::napi;

use crate::error::invalid_option;

/// Where calibration statistics come from; `src/calibration.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingCalibration {
    pub sources: Vec<BindingCalibrationSource>,
    pub length: u32,
    /// `auto`, `memory` or `disk`.
    pub activations: String,
    pub subset: bool,
}

/// One file of a calibration; `src/calibration.ts` fills in the defaults and gives one of both files.
#[napi(object, object_to_js = false)]
pub struct BindingCalibrationSource {
    /// Plain text, whatever its name.
    pub text: Option<String>,
    /// A file whose ending says what it holds.
    pub file: Option<String>,
    pub field: String,
    pub sequences: u32,
    pub seed: Option<f64>,
    /// Sequences that take no part in the statistics; the usual number by default.
    pub hold_out: Option<u32>,
    /// How often each token counts.
    pub weight: f64,
}

impl BindingCalibration {
    /// The calibration of a job that compensates, or does not. Looks into files whose ending does not say all.
    pub(crate) fn recipe(&self, compensates: bool) -> Result<CalibrationRecipe> {
        Ok(CalibrationRecipe {
            sources: self.sources.iter().map(|source| self.source(source, compensates)).collect::<Result<_>>()?,
            length: self.length as usize,
            subset: self.subset,
            activations: match self.activations.as_str() {
                "auto" => ActivationPlace::Auto,
                "memory" => ActivationPlace::Memory,
                "disk" => ActivationPlace::Disk,
                other => return Err(invalid_option("calibration.activations", other, &["auto", "memory", "disk"])),
            },
        })
    }

    fn source(&self, source: &BindingCalibrationSource, compensates: bool) -> Result<CalibrationSource> {
        let (file, kind) = match (&source.text, &source.file) {
            (None, Some(file)) => (file.clone(), CalibrationKind::of(file.as_ref())?),
            (text, _) => (text.clone().unwrap_or_default(), CalibrationKind::Text),
        };
        let sequences = source.sequences as usize;
        let hold_out = match source.hold_out {
            Some(given) => given as usize,
            None if compensates => {
                CalibrationSource::usual_hold_out(sequences, self.length as usize, self.sources.len())
            }
            None => 0,
        };
        Ok(CalibrationSource {
            file: file.into(),
            kind,
            field: source.field.clone(),
            sequences,
            seed: source.seed.map(|seed| seed as u64),
            hold_out,
            weight: source.weight,
        })
    }
}
