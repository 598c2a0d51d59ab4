//! All integration tests of the crate in one program, which is linked once.

mod affine;
mod certificate;
mod common;
mod factors;
mod inputs;
mod mixed;
mod never_worse;
mod optimum;

#[test]
fn every_file_is_part_of_the_suite() {
    let suite = include_str!("suite.rs");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let module = name.strip_suffix(".rs").unwrap_or(&name);
        assert!(module == "suite" || suite.contains(&format!("mod {module};\n")), "{name} would not run");
    }
}
