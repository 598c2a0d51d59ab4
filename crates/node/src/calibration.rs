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
        let mut sources: Vec<CalibrationSource> = self.sources.iter().map(Self::source).collect::<Result<_>>()?;
        let texts = sources.iter().filter(|source| !source.is_statistics()).count();
        for (source, given) in sources.iter_mut().zip(&self.sources) {
            source.hold_out = match given.hold_out {
                Some(given) => given as usize,
                None if compensates => CalibrationSource::usual_hold_out(source.sequences, self.length as usize, texts),
                None => 0,
            };
        }
        Ok(CalibrationRecipe {
            sources,
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

    /// A source without what is held out.
    fn source(source: &BindingCalibrationSource) -> Result<CalibrationSource> {
        let (file, kind) = match (&source.text, &source.file) {
            (None, Some(file)) => (file.clone(), CalibrationKind::of(file.as_ref())?),
            (text, _) => (text.clone().unwrap_or_default(), CalibrationKind::Text),
        };
        Ok(CalibrationSource {
            file: file.into(),
            kind,
            field: source.field.clone(),
            sequences: source.sequences as usize,
            seed: source.seed.map(|seed| seed as u64),
            hold_out: 0,
            weight: source.weight,
        })
    }
}
