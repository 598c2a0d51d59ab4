//! All integration tests of the crate in one program, which is linked once.

mod adapter_attacks;
mod affine_adapters;
mod attacks;
mod cross_format;
mod fixture;
mod float8;
mod format_attacks;
mod format_golden;
mod gguf_attacks;
mod gguf_golden;
mod gguf_round_trip;
mod golden;
mod peer_vectors;
mod round_trip;
mod staged_units;

#[test]
fn every_file_is_part_of_the_suite() {
    let suite = include_str!("suite.rs");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let module = name.strip_suffix(".rs").unwrap_or(&name);
        assert!(module == "suite" || suite.contains(&format!("mod {module};\n")), "{name} would not run");
    }
}
