//! Blocks of every type against the values that llama.cpp's `gguf` package reads from them
//! (`__test__/vectors/make_gguf.py`).

use std::path::{Path, PathBuf};

use kintsugi_checkpoint::gguf::{BlockContent, GGUF_TYPES, GgufFile, GgufType};
use kintsugi_weights::WeightMatrix;

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/gguf/types").join(format!("{name}.gguf"))
}

fn types_with_codes() -> impl Iterator<Item = &'static GgufType> {
    GGUF_TYPES.iter().filter(|known| matches!(known.content, BlockContent::Codes(_)))
}

#[test]
fn values_equal_those_of_the_reference_bit_for_bit() {
    for known in types_with_codes() {
        let file = GgufFile::open(&vector(known.name)).unwrap();
        let blocks = file.matrix("blocks").unwrap();
        assert!(matches!(blocks, WeightMatrix::Quantized(_)), "{} stays in codes", known.name);
        let (found, expected) = (blocks.to_f32(), file.matrix("values").unwrap().to_f32());
        assert_eq!(found.len(), expected.len());
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // The four-bit float of this project keeps the sign of its zero, that of ggml has two zeros alike.
            let same = found.to_bits() == expected.to_bits() || (*found == 0.0 && *expected == 0.0);
            assert!(same, "{}, value {place}: {found} is not {expected}", known.name);
        }
        assert!(expected.iter().filter(|value| **value != 0.0).count() > expected.len() / 3, "{}", known.name);
    }
}
