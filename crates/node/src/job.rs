use std::panic::{AssertUnwindSafe, catch_unwind};

use kintsugi_runtime::{Error, ErrorCode, Result};
use napi::Env;
use napi::bindgen_prelude::{Object, ToNapiValue};

use crate::error::to_napi;

/// Runs `work` on a thread of its own and returns a promise of its result.
///
/// libuv's pool stays free for the files and sockets of the host; heavy work inside shares the engine's pool.
pub(crate) fn spawn<'env, T: ToNapiValue + Send + 'static>(
    env: &'env Env,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> napi::Result<Object<'env>> {
    let (deferred, promise) = env.create_deferred()?;
    std::thread::Builder::new()
        .name("kintsugi-job".into())
        .spawn(move || match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(value)) => deferred.resolve(move |_| Ok(value)),
            Ok(Err(error)) => deferred.reject(to_napi(&error)),
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("no message");
                let error = Error::new(ErrorCode::Internal, format!("a defect in the engine: {text}"))
                    .hint("Please report this with the output of 'kintsugi doctor'");
                deferred.reject(to_napi(&error));
            }
        })
        .map_err(|error| to_napi(&Error::new(ErrorCode::Io, format!("no thread could be started: {error}"))))?;
    Ok(promise)
}

/// A serializable result as the plain object that JavaScript gets.
pub(crate) fn to_json(value: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorCode::Internal, format!("the result cannot be converted: {error}")))
}
