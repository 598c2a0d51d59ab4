//! The tokens of texts that llama.cpp recorded for vocabularies of three kinds (`assets/gguf-vocab`).

use std::path::{Path, PathBuf};

use kintsugi_checkpoint::gguf::{GgufFile, tokenizer_of};
use kintsugi_model::Tokenizer;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/gguf-vocab").join(name)
}

fn tokenizer(name: &str) -> Tokenizer {
    let file = GgufFile::open(&asset(&format!("ggml-vocab-{name}.gguf"))).unwrap();
    let json = tokenizer_of(file.metadata()).unwrap();
    Tokenizer::from_json(json.to_string().as_bytes(), name).unwrap()
}

/// Texts with their tokens, without those that stand around a text.
fn recorded(name: &str) -> Vec<(String, Vec<u32>)> {
    let read = |end: &str| std::fs::read_to_string(asset(&format!("ggml-vocab-{name}.gguf.{end}"))).unwrap();
    let (texts, tokens) = (read("inp"), read("out"));
    let texts: Vec<&str> = texts.strip_suffix(SEPARATOR).unwrap().split(SEPARATOR).collect();
    let tokens: Vec<&str> = tokens.lines().collect();
    assert_eq!(texts.len(), tokens.len(), "{name}");
    let ids = |line: &&str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    texts.iter().map(|text| (*text).to_owned()).zip(tokens.iter().map(ids)).collect()
}

fn assert_same(name: &str) {
    let tokenizer = tokenizer(name);
    let cases = recorded(name);
    assert!(cases.len() > 40, "{}", cases.len());
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|(text, ids)| {
            let found = tokenizer.encode(text, false).unwrap();
            (found != *ids).then(|| format!("{text:?}\n  {found:?}\n  {ids:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} texts:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn byte_level_vocabulary_of_gpt_2() {
    assert_same("gpt-2");
}

#[test]
fn sentence_pieces_of_phi_3() {
    assert_same("phi-3");
}

#[test]
fn word_pieces_of_bge() {
    assert_same("bert-bge");
}
