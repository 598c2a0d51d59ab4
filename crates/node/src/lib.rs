//! The Node binding: `Binding*` types and conversions only. Everything worth a test lives in the crates behind it.
#![allow(unsafe_code, reason = "what the `#[napi]` macros expand to")]
#![allow(missing_docs, reason = "the macros generate public items; hand-written ones are documented")]
#![allow(unreachable_pub, reason = "exported items are reached through Node-API, not through Rust paths")]
#![cfg_attr(test, allow(dead_code, reason = "the `#[napi]` macros export nothing in tests"))]

mod calibration;
mod checkpoint;
mod compensate;
mod compress;
mod control;
mod convert;
mod doctor;
mod eora;
mod error;
mod fold;
mod generation;
mod job;
mod machine_speed;
mod merge;
mod model;
mod quantized_linear;
