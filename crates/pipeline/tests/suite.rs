//! All integration tests of the crate in one program, which is linked once.

mod adaptive;
mod affine;
mod awq;
mod bad_input;
mod calibration;
mod common;
mod compensation;
mod conversion;
mod families;
mod folding;
mod formats;
mod gguf_output;
mod grouped;
mod grouped_jobs;
mod merge_change;
mod merge_compensation;
mod merge_corruptions;
mod merges;
mod merging;
mod mixed_inputs;
mod mixtures;
mod output_energies;
mod rank_ablation;
mod reference;
mod resume;
mod round_trip;
mod whole_modules;

#[test]
fn every_file_is_part_of_the_suite() {
    let suite = include_str!("suite.rs");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let module = name.strip_suffix(".rs").unwrap_or(&name);
        assert!(module == "suite" || suite.contains(&format!("mod {module};\n")), "{name} would not run");
    }
}
