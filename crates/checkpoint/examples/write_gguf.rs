//! Writes a checkpoint as GGUF: `cargo run --release --example write_gguf SOURCE OUT.gguf TYPE`.
#![allow(clippy::print_stdout, reason = "it is a command")]

use std::path::Path;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::{GgufPlan, GgufType, write_gguf};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, out, type_name] = arguments.as_slice() else {
        return Err(Error::new(ErrorCode::OptionInvalid, "give SOURCE, OUT and TYPE"));
    };
    let source = Checkpoint::open(Path::new(source))?;
    let plan = GgufPlan::new(GgufType::written(type_name)?);
    let summary = write_gguf(&source, &plan, Path::new(out), &CancelToken::new(), &Progress::new())?;
    println!("{} bytes, {:?}", summary.bytes, summary.types);
    summary.rounded.iter().for_each(|name| println!("rounded: {name}"));
    summary.notices.iter().for_each(|notice| println!("{notice}"));
    Ok(())
}
