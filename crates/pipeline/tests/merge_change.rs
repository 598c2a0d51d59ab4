//! Sources that join an earlier merge or leave it: what comes out is the merge that never knew better.

use std::fs;
use std::path::{Path, PathBuf};

use crate::merges::{recipe, refused, run, vectors};
use kintsugi_merge::RankRule;
use kintsugi_pipeline::{MergeChange, changed_recipe};
use kintsugi_runtime::{Error, ErrorCode};
use serde_json::{Value, json};

fn copies(folder: &Path, names: &[&str]) -> Vec<PathBuf> {
    let copy = |name: &&str| {
        let to = folder.join(name);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(vectors().join(name)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
        to
    };
    names.iter().map(copy).collect()
}

fn bytes(folder: &Path) -> [Vec<u8>; 2] {
    ["adapter_model.safetensors", "adapter_config.json"].map(|file| fs::read(folder.join(file)).unwrap())
}

fn change(merged: &Path, add: &[(&PathBuf, f64)], remove: &[&str], out: &Path) -> MergeChange {
    MergeChange {
        merged: merged.to_path_buf(),
        add: add.iter().map(|(path, weight)| ((*path).clone(), *weight)).collect(),
        remove: remove.iter().map(ToString::to_string).collect(),
        out: out.to_path_buf(),
    }
}

#[test]
fn what_comes_out_is_the_merge_of_the_sources_that_stay_and_join() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let all = copies(&path("sources"), &["first", "second", "third", "small"]);
    for method in ["svd", "cat", "lego", "ties", "lego-gauge-free"] {
        let of = |name: &str| path(&format!("{method}-{name}"));
        let mut whole = recipe(&all[..3], &[1.0, 0.5, 0.25], method, &of("whole"));
        whole.options.rank = Some(RankRule::Fixed(5));
        whole.options.seed = 7;
        run(&whole).unwrap();
        // Without the second, with the small one: as if it had been asked for.
        let changed = changed_recipe(&change(&of("whole"), &[(&all[3], -0.5)], &["second"], &of("changed"))).unwrap();
        run(&changed).unwrap();
        let mut expected =
            recipe(&[all[0].clone(), all[2].clone(), all[3].clone()], &[1.0, 0.25, -0.5], method, &of("x"));
        expected.options = whole.options.clone();
        run(&expected).unwrap();
        assert_eq!(bytes(&of("changed")), bytes(&of("x")), "{method}");
        // And back.
        let back = change(&of("changed"), &[(&all[1], 0.5)], &[all[3].to_str().unwrap()], &of("back"));
        run(&changed_recipe(&back).unwrap()).unwrap();
        assert_eq!(bytes(&of("back")), bytes(&of("whole")), "{method}");
    }
}

#[test]
fn a_removed_source_may_be_gone_and_one_that_stays_must_be_what_it_was() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let all = copies(&path("sources"), &["first", "second", "third"]);
    run(&recipe(&all, &[1.0; 3], "svd", &path("whole"))).unwrap();
    fs::remove_dir_all(&all[1]).unwrap();
    run(&changed_recipe(&change(&path("whole"), &[], &["second"], &path("two"))).unwrap()).unwrap();

    let refusal = |of: &MergeChange| -> Error { changed_recipe(of).unwrap_err() };
    let gone = refusal(&change(&path("whole"), &[], &["first"], &path("x")));
    assert_eq!((gone.code, gone.subject), (ErrorCode::AdapterInvalid, all[1].display().to_string()));

    // Another state of the training: the same header, other numbers.
    let weights = all[2].join("adapter_model.safetensors");
    let mut changed = fs::read(&weights).unwrap();
    let start = 8 + u64::from_le_bytes(changed[..8].try_into().unwrap()) as usize;
    for value in changed[start..].chunks_exact_mut(4) {
        let number = f32::from_le_bytes(value.try_into().unwrap());
        value.copy_from_slice(&(number * 1.001).to_le_bytes());
    }
    fs::write(&weights, changed).unwrap();
    let recipe = changed_recipe(&change(&path("two"), &[(&vectors().join("small"), 1.0)], &[], &path("x"))).unwrap();
    let error = refused(&recipe, ErrorCode::AdapterInvalid);
    assert_eq!(error.subject, all[2].display().to_string());
    assert!(error.message.contains("changed"), "{error}");
}

#[test]
fn changes_that_mean_nothing_are_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let all = copies(&path("sources"), &["first", "second"]);
    let twin = copies(&path("others"), &["first"]).remove(0);
    run(&recipe(&[all[0].clone(), all[1].clone(), twin.clone()], &[1.0; 3], "cat", &path("whole"))).unwrap();
    let merged = path("whole");
    let (other_spelling, small) = (path("sources").join("second/../first"), vectors().join("small"));
    let cases = [
        (change(&merged, &[], &[], &path("x")), ErrorCode::OptionInvalid, "add"),
        (change(&merged, &[(&all[0], 1.0)], &[], &path("x")), ErrorCode::OptionInvalid, "add"),
        (change(&merged, &[(&other_spelling, 1.0)], &[], &path("x")), ErrorCode::OptionInvalid, "add"),
        (change(&merged, &[(&small, 1.0), (&small, 0.5)], &[], &path("x")), ErrorCode::OptionInvalid, "add"),
        (change(&merged, &[], &["third"], &path("x")), ErrorCode::OptionInvalid, "remove"),
        (change(&merged, &[], &["first"], &path("x")), ErrorCode::OptionInvalid, "remove"),
        (change(&all[0], &[], &["first"], &path("x")), ErrorCode::AdapterInvalid, "report.json"),
    ];
    for (change, code, subject) in cases {
        let error = changed_recipe(&change).unwrap_err();
        assert!(error.code == code && error.subject.ends_with(subject) && !error.hint.is_empty(), "{error}");
    }
    let removed = changed_recipe(&change(&merged, &[], &[other_spelling.to_str().unwrap()], &path("x"))).unwrap();
    assert_eq!(removed.adapters, [all[1].clone(), twin.clone()]);
    // By its whole path the twin is told from the other.
    let recipe = changed_recipe(&change(&merged, &[], &[twin.to_str().unwrap()], &path("x"))).unwrap();
    assert_eq!(recipe.adapters, all);
    let none = changed_recipe(&change(
        &merged,
        &[],
        &["second", twin.to_str().unwrap(), all[0].to_str().unwrap()],
        &path("x"),
    ));
    refused(&none.unwrap(), ErrorCode::OptionInvalid);
    // A recorded recipe is no better than a given one.
    let text = fs::read_to_string(merged.join("report.json")).unwrap();
    let recorded: Value = serde_json::from_str(&text).unwrap();
    for (place, value, subject) in [
        ("/recipe/options/restarts", json!(10_001), "restarts"),
        ("/recipe/options/iterations", json!(100_001), "iterations"),
        ("/recipe/options/rank", json!({ "fixed": 65_537 }), "rank"),
        ("/recipe/options/rank", json!({ "energy": { "share": 0.5, "most": 65_537 } }), "rank"),
        ("/recipe/totalRank", json!(65_537), "totalRank"),
    ] {
        let mut edited = recorded.clone();
        edited["recipe"]["compensation"] = json!(all[0]);
        *edited.pointer_mut(place).unwrap() = value;
        fs::write(merged.join("report.json"), edited.to_string()).unwrap();
        let recipe = changed_recipe(&change(&merged, &[], &["second"], &path("x"))).unwrap();
        assert_eq!(refused(&recipe, ErrorCode::OptionInvalid).subject, subject);
    }
    fs::write(merged.join("report.json"), "{}").unwrap();
    assert_eq!(
        changed_recipe(&change(&merged, &[], &["second"], &path("x"))).unwrap_err().code,
        ErrorCode::AdapterInvalid
    );
}
