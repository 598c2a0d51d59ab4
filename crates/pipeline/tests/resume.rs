//! A job that was interrupted goes on where it was and writes the same bytes; what does not belong to it is refused.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, bytes_of, disturbed, recipe};
use kintsugi_pipeline::{Recipe, Report, compress};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, ProgressSnapshot, Result};

/// A copy of a checkpoint with eight blocks, and a job that takes a moment.
fn scene() -> (tempfile::TempDir, Recipe) {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(assets("llama-7m")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
    }
    let mut recipe = recipe(&source, &root.path().join("out"), "gptq", 3, 4);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.sources[0].sequences = 2;
    calibration.length = 128;
    (root, recipe)
}

/// Runs until `blocks` blocks are done, then cancels.
fn interrupt_after(recipe: &Recipe, blocks: u64) -> Result<Report> {
    interrupt_when(recipe, |reading| reading.done >= blocks)
}

/// Runs until the progress has come to a point, then cancels.
fn interrupt_when(recipe: &Recipe, there: impl Fn(&ProgressSnapshot) -> bool + Sync) -> Result<Report> {
    disturbed(there, CancelToken::cancel, |cancel, progress| compress(recipe, &backend(), cancel, progress))
}

fn finish(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

/// Everything of the report but times and memory.
fn facts_of(report: &Report) -> (String, u64) {
    (serde_json::to_string(&report.linears).unwrap(), report.summary.bytes)
}

fn partial(recipe: &Recipe) -> PathBuf {
    recipe.out.with_file_name("out.partial")
}

#[test]
fn an_interrupted_job_ends_in_the_bytes_of_an_undisturbed_one() {
    let (_root, recipe) = scene();
    let report = finish(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    assert!(undisturbed.len() > 5);
    for blocks in [1, 3, 7] {
        fs::remove_dir_all(&recipe.out).unwrap();
        let error = interrupt_after(&recipe, blocks).unwrap_err();
        assert_eq!(error.code, ErrorCode::Cancelled);
        assert!(partial(&recipe).join("ledger.jsonl").is_file());
        let resumed = finish(&recipe);
        assert!(bytes_of(&recipe.out) == undisturbed, "after {blocks} blocks");
        assert_eq!(resumed.linears.len(), report.linears.len());
        assert_eq!(resumed.summary.bytes, report.summary.bytes);
        assert_eq!(resumed.summary.mean_error, report.summary.mean_error);
        assert!(!partial(&recipe).exists());
    }
}

#[test]
fn a_job_that_folds_scales_ends_in_the_same_bytes_too() {
    let (_root, mut recipe) = scene();
    recipe.method = "awq".to_owned();
    recipe.clip = true;
    let report = finish(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    fs::remove_dir_all(&recipe.out).unwrap();
    assert_eq!(interrupt_after(&recipe, 3).unwrap_err().code, ErrorCode::Cancelled);
    let resumed = finish(&recipe);
    assert!(bytes_of(&recipe.out) == undisturbed);
    assert_eq!(facts_of(&resumed), facts_of(&report));
    assert!(resumed.linears.iter().all(|linear| linear.alpha.is_some()));
}

#[test]
fn a_job_with_a_bit_budget_keeps_the_widths_that_it_found() {
    let (root, mut recipe) = scene();
    let statistics = root.path().join("statistics.safetensors");
    (recipe.bit_budget, recipe.eora) = (Some(3.5), None);
    recipe.save_statistics = Some(statistics.clone());
    let report = finish(&recipe);
    assert!(report.recipe.overrides.is_empty(), "the report has what was asked");
    let (undisturbed, saved) = (bytes_of(&recipe.out), fs::read(&statistics).unwrap());
    let restart = || {
        fs::remove_dir_all(&recipe.out).unwrap();
        fs::remove_file(&statistics).unwrap();
    };
    let widths = partial(&recipe).join("bit-allocation.partial");
    // What an earlier run found is used if this job could have found it, and whatever else lies there is not.
    let spoil: [fn(&Path); 4] = [
        |_| {},
        |widths| fs::write(widths, "{\"bits\":{}}").unwrap(),
        |widths| fs::write(widths, fs::read_to_string(widths).unwrap().replace(":3", ":7")).unwrap(),
        |widths| {
            fs::write(widths, fs::read_to_string(widths).unwrap().replace(":2", ":8").replace(":3", ":8")).unwrap()
        },
    ];
    for (round, spoil) in spoil.into_iter().enumerate() {
        restart();
        // During the search nothing is kept, behind it the widths are.
        let error =
            interrupt_when(&recipe, |reading| reading.phase == "allocate bits" && reading.done >= 2).unwrap_err();
        assert_eq!(error.code, ErrorCode::Cancelled);
        assert!(!partial(&recipe).exists());
        let blocks = if round == 0 { 0 } else { 2 };
        let error =
            interrupt_when(&recipe, |reading| reading.phase == "compress" && reading.done >= blocks).unwrap_err();
        assert_eq!(error.code, ErrorCode::Cancelled);
        spoil(&widths);
        finish(&recipe);
        assert!(bytes_of(&recipe.out) == undisturbed, "{round}");
        assert!(fs::read(&statistics).unwrap() == saved, "{round}");
    }
}

#[test]
fn a_job_that_was_stopped_while_it_sealed_goes_on() {
    let (_root, recipe) = scene();
    finish(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    fs::remove_dir_all(&recipe.out).unwrap();
    interrupt_after(&recipe, 7).unwrap_err();
    // What a run that was killed may leave: files that were being written.
    for name in ["model.safetensors.partial", "activations-1.partial", "unit-00008.part", "config.json.partial"] {
        fs::write(partial(&recipe).join(name), b"half").unwrap();
    }
    fs::create_dir(partial(&recipe).join("factors-00007")).unwrap();
    finish(&recipe);
    assert!(bytes_of(&recipe.out) == undisturbed);
}

#[test]
fn another_recipe_or_changed_input_is_named_and_refused_until_it_is_discarded() {
    let (_root, recipe) = scene();
    interrupt_after(&recipe, 2).unwrap_err();
    let refused = |recipe: &Recipe, part: &str| {
        let error = compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::ResumeMismatch, "{error}");
        assert!(error.message.contains(part) && error.hint.contains("--fresh"), "{error}");
        assert!(partial(recipe).join("ledger.jsonl").is_file(), "what was left is still there");
    };
    refused(&Recipe { bits: 4, ..recipe.clone() }, "recipe.bits 3, this one has 4");
    refused(&Recipe { eora: None, ..recipe.clone() }, "recipe.eora");

    let text = recipe.calibration.as_ref().unwrap().sources[0].file.clone();
    let other = recipe.source.join("other.txt");
    fs::write(&other, fs::read_to_string(&text).unwrap().replacen("the", "THE", 50)).unwrap();
    let mut changed = recipe.clone();
    changed.calibration.as_mut().unwrap().sources[0].file = other;
    refused(&changed, "recipe.calibration.sources[0].file");

    let config = recipe.source.join("config.json");
    let before = fs::read(&config).unwrap();
    fs::write(&config, [&before[..], b"\n"].concat()).unwrap();
    refused(&recipe, "config.json");

    let report = finish(&Recipe { fresh: true, ..recipe.clone() });
    assert_eq!(report.recipe.bits, 3);
    assert!(!partial(&recipe).exists());
}

#[test]
fn a_lost_part_starts_the_job_anew() {
    let (_root, recipe) = scene();
    finish(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    fs::remove_dir_all(&recipe.out).unwrap();
    interrupt_after(&recipe, 3).unwrap_err();
    let part = partial(&recipe).join("unit-00002.part");
    let bytes = fs::read(&part).unwrap();
    fs::write(&part, &bytes[..bytes.len() / 2]).unwrap();
    finish(&recipe);
    assert!(bytes_of(&recipe.out) == undisturbed);
}

#[test]
fn a_source_that_is_truncated_while_it_is_read_is_named() {
    let (_root, recipe) = scene();
    let weights = recipe.source.join("model.safetensors");
    let length = fs::metadata(&weights).unwrap().len();
    // The header stays whole; every block lies behind the cut.
    let cut = |_: &CancelToken| {
        fs::File::options().write(true).open(&weights).unwrap().set_len(length / 50).unwrap();
    };
    let job = |cancel: &CancelToken, progress: &Progress| compress(&recipe, &backend(), cancel, progress);
    let error = disturbed(|reading| reading.done >= 2, cut, job).unwrap_err();
    assert_eq!(error.code, ErrorCode::CheckpointCorrupt, "{error}");
    assert!(error.message.contains("became shorter") && error.subject.contains("model.safetensors"), "{error}");
    assert!(!partial(&recipe).exists(), "work on input that has changed is worth nothing");
}

#[test]
fn input_that_is_removed_is_named_and_what_was_done_stays() {
    let (root, recipe) = scene();
    let mut recipe = recipe;
    let text = root.path().join("text.txt");
    fs::copy(&recipe.calibration.as_ref().unwrap().sources[0].file, &text).unwrap();
    recipe.calibration.as_mut().unwrap().sources[0].file = text.clone();
    interrupt_after(&recipe, 2).unwrap_err();
    let refused = |code: ErrorCode, subject: &str| {
        let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.subject.contains(subject) && !error.hint.is_empty(), "{error}");
        assert!(partial(&recipe).join("ledger.jsonl").is_file());
    };
    let aside = root.path().join("aside");
    fs::rename(&text, &aside).unwrap();
    refused(ErrorCode::TextUnreadable, "text.txt");
    fs::write(&text, fs::read_to_string(&aside).unwrap().replacen("the", "THE", 50)).unwrap();
    refused(ErrorCode::ResumeMismatch, "out.partial");
    fs::rename(&aside, &text).unwrap();

    let weights = recipe.source.join("model.safetensors");
    fs::rename(&weights, &aside).unwrap();
    refused(ErrorCode::CheckpointNotFound, "source");
    fs::rename(&aside, &weights).unwrap();
    finish(&recipe);
}

#[test]
fn a_job_goes_on_with_other_memory_and_other_places() {
    let (root, mut recipe) = scene();
    recipe.save_statistics = Some(root.path().join("statistics.safetensors"));
    finish(&recipe);
    let (undisturbed, statistics) =
        (bytes_of(&recipe.out), fs::read(root.path().join("statistics.safetensors")).unwrap());
    fs::remove_dir_all(&recipe.out).unwrap();
    fs::remove_file(root.path().join("statistics.safetensors")).unwrap();
    let with = |activations| {
        let mut recipe = recipe.clone();
        recipe.calibration.as_mut().unwrap().activations = activations;
        recipe
    };
    use kintsugi_pipeline::ActivationPlace::{Disk, Memory};
    interrupt_after(&with(Memory), 2).unwrap_err();
    interrupt_after(&with(Disk), 2).unwrap_err();
    interrupt_after(&with(Memory), 6).unwrap_err();
    assert!(root.path().join("statistics.safetensors.partial").is_file());
    finish(&with(Disk));
    assert!(bytes_of(&recipe.out) == undisturbed);
    assert!(fs::read(root.path().join("statistics.safetensors")).unwrap() == statistics);

    // Statistics that were lost meanwhile would be zeros of the blocks that are done.
    fs::remove_dir_all(&recipe.out).unwrap();
    interrupt_after(&recipe, 2).unwrap_err();
    fs::remove_file(root.path().join("statistics.safetensors.partial")).unwrap();
    for attempt in 0..2 {
        let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::ResumeMismatch, "{attempt}: {error}");
        assert!(error.message.contains("statistics"), "{error}");
        assert!(partial(&recipe).join("ledger.jsonl").is_file(), "the rest may still be of use");
        assert!(!root.path().join("statistics.safetensors.partial").exists());
    }
}

#[test]
fn two_jobs_do_not_save_statistics_in_one_file() {
    let (root, mut recipe) = scene();
    let statistics = root.path().join("statistics.safetensors");
    recipe.save_statistics = Some(statistics.clone());
    interrupt_after(&recipe, 2).unwrap_err();
    let being_written = root.path().join("statistics.safetensors.partial");
    let before = fs::read(&being_written).unwrap();
    let other = fs::File::open(&being_written).unwrap();
    other.lock().unwrap();
    let elsewhere = Recipe { out: root.path().join("elsewhere"), ..recipe.clone() };
    for recipe in [&recipe, &elsewhere] {
        let error = compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::OutputBusy, "{error}");
        assert!(error.subject.contains("statistics.safetensors"), "{error}");
        assert!(fs::read(&being_written).unwrap() == before, "what the other job has written is there");
    }
    drop(other);
    finish(&recipe);
    assert!(statistics.is_file() && !being_written.exists());
}

/// A disk of its own, where the system lets this process have one.
#[cfg(target_os = "linux")]
struct SmallDisk(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount(mebibytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={mebibytes}m");
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(SmallDisk(folder))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_named_and_the_job_goes_on_when_there_is_space() {
    let (_root, mut recipe) = scene();
    finish(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    let Some(disk) = SmallDisk::mount(20) else { return };
    recipe.out = disk.0.path().join("out");
    let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::OutputSpace, "{error}");
    assert!(!partial(&recipe).exists());
    drop(disk);

    let disk = SmallDisk::mount(200).unwrap();
    recipe.out = disk.0.path().join("out");
    let filler = disk.0.path().join("filler");
    // Until nothing more fits.
    let fill = |_: &CancelToken| {
        let _ = std::io::copy(&mut std::io::repeat(0), &mut fs::File::create(&filler).unwrap());
    };
    let job = |cancel: &CancelToken, progress: &Progress| compress(&recipe, &backend(), cancel, progress);
    let error = disturbed(|reading| reading.done >= 3, fill, job).unwrap_err();
    assert_eq!(error.code, ErrorCode::OutputUnwritable, "{error}");
    assert!(error.message.contains("space") && error.subject.contains("out.partial"), "{error}");
    fs::remove_file(filler).unwrap();
    finish(&recipe);
    assert!(bytes_of(&recipe.out) == undisturbed);
}
