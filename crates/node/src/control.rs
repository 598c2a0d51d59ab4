use std::sync::Arc;

use kintsugi_runtime::{CancelToken, Progress};
use napi_derive::napi;

/// Cancels a long call and tells how far it is; read at any time from the JavaScript thread.
#[napi]
#[derive(Default)]
pub struct BindingControl {
    pub(crate) cancel: CancelToken,
    pub(crate) progress: Arc<Progress>,
}

/// One reading of the progress of a call.
#[napi(object)]
pub struct BindingProgress {
    pub phase: String,
    pub done: f64,
    pub total: f64,
    pub unit: String,
    pub seconds_left: Option<f64>,
}

#[napi]
impl BindingControl {
    /// A control for one call.
    #[napi(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the call to stop; it rejects with `ERR_CANCELLED`.
    #[napi]
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// How far the call is.
    #[napi]
    pub fn progress(&self) -> BindingProgress {
        let snapshot = self.progress.snapshot();
        BindingProgress {
            phase: snapshot.phase.to_owned(),
            done: snapshot.done as f64,
            total: snapshot.total as f64,
            unit: snapshot.unit,
            seconds_left: snapshot.seconds_left,
        }
    }
}
