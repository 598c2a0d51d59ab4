use kintsugi_pipeline::{ActivationPlace, CalibrationKind, CalibrationRecipe};
use kintsugi_runtime::Result;
use napi_derive::napi;

use crate::error::invalid_option;

/// Where calibration statistics come from; `src/calibration.ts` fills in the defaults and gives one of both files.
#[napi(object, object_to_js = false)]
pub struct BindingCalibration {
    /// Plain text, whatever its name.
    pub text: Option<String>,
    /// A file whose ending says what it holds.
    pub file: Option<String>,
    pub field: String,
    pub sequences: u32,
    pub length: u32,
    pub seed: Option<f64>,
    /// Sequences that take no part in the statistics; the usual number by default.
    pub hold_out: Option<u32>,
    /// `auto`, `memory` or `disk`.
    pub activations: String,
    pub subset: bool,
}

impl BindingCalibration {
    /// The calibration of a job that compensates, or does not. Looks into the file where its ending does not say all.
    pub(crate) fn recipe(&self, compensates: bool) -> Result<CalibrationRecipe> {
        let (file, kind) = match (&self.text, &self.file) {
            (None, Some(file)) => (file.clone(), CalibrationKind::of(file.as_ref())?),
            (text, _) => (text.clone().unwrap_or_default(), CalibrationKind::Text),
        };
        let (sequences, length) = (self.sequences as usize, self.length as usize);
        let hold_out = match self.hold_out {
            Some(given) => given as usize,
            None if compensates => CalibrationRecipe::usual_hold_out(sequences, length),
            None => 0,
        };
        Ok(CalibrationRecipe {
            file: file.into(),
            kind,
            field: self.field.clone(),
            sequences,
            length,
            seed: self.seed.map(|seed| seed as u64),
            hold_out,
            subset: self.subset,
            activations: match self.activations.as_str() {
                "auto" => ActivationPlace::Auto,
                "memory" => ActivationPlace::Memory,
                "disk" => ActivationPlace::Disk,
                other => return Err(invalid_option("calibration.activations", other, &["auto", "memory", "disk"])),
            },
        })
    }
}
