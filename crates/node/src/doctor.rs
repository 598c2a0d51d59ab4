use kintsugi_kernels::{Kernels, self_check};
use kintsugi_runtime::{CpuFeatures, CpuLevel, ThreadPool};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::job::spawn;

/// What this machine offers, and whether the kernels compute correctly on it.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn doctor(env: &Env) -> napi::Result<Object<'_>> {
    spawn(env, || {
        let pool = ThreadPool::global();
        let mut checks = Vec::new();
        for level in CpuLevel::available() {
            checks.extend(self_check(&Kernels::new(level)?, pool).into_iter().map(|check| {
                serde_json::json!({
                    "case": check.case,
                    "level": check.level.name(),
                    "precision": format!("{:?}", check.precision).to_lowercase(),
                    "error": check.error,
                    "budget": check.budget,
                    "ok": check.ok,
                })
            }));
        }
        let features = CpuFeatures::detect();
        Ok(serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {
                "selected": CpuLevel::selected()?.name(),
                "best": CpuLevel::best().name(),
                "levels": CpuLevel::available().map(CpuLevel::name).collect::<Vec<_>>(),
                "features": if features.avx512_bf16 { vec!["avx512bf16"] } else { vec![] },
            },
            "threads": pool.threads(),
            "selfCheck": checks,
        }))
    })
}
