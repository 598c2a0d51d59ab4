use std::fs::{self, File};
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::Checkpoint;
use crate::safetensors_writer::write_synced;

/// Files beside the weights that other programs need to use the model, taken over as they are.
const COMPANIONS: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// Beginnings of file names that carry the terms of the source; they travel with the weights.
const LEGAL: &[&str] = &["LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY"];

/// Copies the files that travel with the weights of `source` to the folder `target`.
///
/// The model card of the source describes the source: it is kept under another name. A GGUF file carries its tokenizer
/// and template inside.
///
/// # Errors
/// `ERR_IO` for what cannot be read, `ERR_OUTPUT_UNWRITABLE`.
pub(crate) fn copy_companions(source: &Checkpoint, target: &Path) -> Result<()> {
    let folder = source.path();
    if source.gguf().is_some() {
        write_synced(&target.join("tokenizer.json"), &source.tokenizer_json()?)?;
        if let Some(template) = source.chat_template()? {
            write_synced(&target.join("chat_template.jinja"), template.as_bytes())?;
        }
        if !folder.is_dir() {
            return Ok(());
        }
    }
    let unreadable = |error: std::io::Error| {
        Error::io(ErrorCode::Io, folder, &error).hint("Check that the source folder may be read")
    };
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let upper = name.to_ascii_uppercase();
        let name = if COMPANIONS.contains(&name.as_str()) || LEGAL.iter().any(|start| upper.starts_with(start)) {
            name.as_str()
        } else if upper == "README.MD" {
            "ORIGINAL_README.md"
        } else {
            continue;
        };
        // Links are followed: the cache of huggingface_hub consists of them.
        if entry.path().is_file() {
            copy_file(&entry.path(), &target.join(name))?;
        }
    }
    Ok(())
}

/// Removes from `folder` what a GGUF file says itself: tokenizer, template, how text is generated.
///
/// # Errors
/// `ERR_OUTPUT_UNWRITABLE`.
pub(crate) fn remove_companions(folder: &Path) -> Result<()> {
    for path in COMPANIONS.iter().map(|name| folder.join(name)).filter(|path| path.is_file()) {
        fs::remove_file(&path).map_err(|error| Error::unwritable(&path, &error))?;
    }
    Ok(())
}

/// Copies the content only: a source that is read-only does not make the result so.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let mut input =
        File::open(from).map_err(|error| Error::io(ErrorCode::Io, from, &error).hint("Check that it may be read"))?;
    let mut copy = || {
        let mut output = File::create(to)?;
        std::io::copy(&mut input, &mut output)?;
        output.sync_all()
    };
    copy().map_err(|error| Error::unwritable(to, &error))
}
