//! Where calibration comes from, where it is kept, and what is saved of it: none of it changes the output.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, recipe};
use kintsugi_calibration::Calibration;
use kintsugi_checkpoint::Checkpoint;
use kintsugi_model::{Block, BlockWeights, CpuBackend, DecoderSpec, TapPoint, Tokenizer, read_tokenizer};
use kintsugi_pipeline::{
    ActivationPlace, CalibrationKind, CalibrationRecipe, CalibrationSource, CalibrationStream, CalibrationTokens,
    Recipe, Report, compress, plan,
};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress};

const LENGTH: usize = 64;

/// A small job in a folder of its own.
fn scene() -> (tempfile::TempDir, Recipe) {
    let root = tempfile::tempdir().unwrap();
    let mut recipe = recipe(&assets("tinystories-656k"), &root.path().join("out"), "gptq", 3, 4);
    let calibration = recipe.calibration.as_mut().unwrap();
    (calibration.sources[0].sequences, calibration.length) = (4, LENGTH);
    (root, recipe)
}

fn run(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn refusal(recipe: &Recipe) -> Error {
    let error = compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
    assert!(!recipe.out.exists() && !recipe.out.with_file_name("out.partial").exists());
    error
}

/// The bytes of the weights and factors, and what the report says of each Linear.
fn outcome(recipe: &Recipe) -> (Vec<u8>, Vec<u8>, String) {
    let report = run(recipe);
    let read = |name: &str| fs::read(recipe.out.join(name)).unwrap();
    let found = (
        read("model.safetensors"),
        read("eora/adapter_model.safetensors"),
        serde_json::to_string(&report.linears).unwrap(),
    );
    fs::remove_dir_all(&recipe.out).unwrap();
    found
}

fn tools(source: &Path) -> (Checkpoint, DecoderSpec, Tokenizer) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let spec = DecoderSpec::of(&checkpoint).unwrap();
    let tokenizer = read_tokenizer(&checkpoint, &spec).unwrap();
    (checkpoint, spec, tokenizer)
}

fn with_file(recipe: &Recipe, file: PathBuf) -> Recipe {
    let mut recipe = recipe.clone();
    let source = &mut recipe.calibration.as_mut().unwrap().sources[0];
    source.kind = CalibrationKind::of(&file).unwrap();
    source.file = file;
    recipe
}

#[test]
fn the_same_tokens_in_any_form_give_the_same_bytes() {
    let (root, recipe) = scene();
    let (checkpoint, spec, _) = tools(&recipe.source);
    let expected = outcome(&recipe);
    let tokens = CalibrationTokens::read(recipe.calibration.as_ref().unwrap(), &checkpoint, &spec).unwrap();
    let sequences: Vec<&[u32]> = tokens.tokens().chunks(LENGTH).collect();
    let write = |name: &str, content: Vec<u8>| {
        let path = root.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let mut files = vec![
        write("ids.json", serde_json::to_vec_pretty(&sequences).unwrap()),
        write("flat.json", serde_json::to_vec(&tokens.tokens()).unwrap()),
        write(
            "ids.jsonl",
            sequences
                .iter()
                .flat_map(|ids| format!("\n  {}\n", serde_json::to_string(ids).unwrap()).into_bytes())
                .collect(),
        ),
    ];
    for (name, dtype, bytes) in [
        (
            "i32.safetensors",
            "I32",
            tokens.tokens().iter().flat_map(|&id| (id as i32).to_le_bytes()).collect::<Vec<u8>>(),
        ),
        ("i64.safetensors", "I64", tokens.tokens().iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect()),
    ] {
        let entry = serde_json::json!({ "dtype": dtype, "shape": [4, LENGTH], "data_offsets": [0, bytes.len()] });
        let header = serde_json::json!({ "input_ids": entry }).to_string();
        files.push(write(name, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes].concat()));
    }
    // Ids need no tokenizer.
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(recipe.source.join(name), source.join(name)).unwrap();
    }
    let mute = with_file(&Recipe { source, ..recipe.clone() }, files[0].clone());
    assert!(outcome(&mute) == expected);
    let statistics = root.path().join("statistics.safetensors");
    run(&Recipe { save_statistics: Some(statistics.clone()), ..mute.clone() });
    fs::remove_dir_all(&mute.out).unwrap();
    assert!(outcome(&with_file(&mute, statistics)) == expected);
    run(&Recipe { method: "rtn".into(), calibration: None, eora: None, ..mute.clone() });
    fs::remove_dir_all(&mute.out).unwrap();
    assert_eq!(refusal(&Recipe { source: mute.source, ..recipe.clone() }).code, ErrorCode::TokenizerInvalid);
    for file in files {
        let recipe = with_file(&recipe, file);
        assert_eq!(recipe.calibration.as_ref().unwrap().sources[0].kind, CalibrationKind::Tokens);
        assert!(outcome(&recipe) == expected, "{:?}", recipe.calibration);
    }
}

#[test]
fn records_are_tokenized_apart_and_joined() {
    let (root, recipe) = scene();
    let (checkpoint, spec, tokenizer) = tools(&recipe.source);
    let texts = ["Once upon a time", " there was a cat.", "The end."];
    let path = root.path().join("records.jsonl");
    let lines: Vec<String> =
        texts.iter().map(|text| serde_json::json!({ "n": 1, "story": text }).to_string()).collect();
    fs::write(&path, lines.join("\n")).unwrap();
    let mut recipe = with_file(&recipe, path);
    let calibration = recipe.calibration.as_mut().unwrap();
    assert_eq!(calibration.sources[0].kind, CalibrationKind::Jsonl);
    calibration.length = 2;
    (calibration.sources[0].field, calibration.sources[0].sequences) = ("story".to_owned(), 100);
    let expected: Vec<u32> = texts.iter().flat_map(|text| tokenizer.encode(text, false).unwrap()).collect();
    let read = |calibration: &CalibrationRecipe| CalibrationTokens::read(calibration, &checkpoint, &spec);
    assert_eq!(read(calibration).unwrap().tokens(), &expected[..expected.len() / 2 * 2]);

    // A seed shuffles the same tokens.
    calibration.sources[0].seed = Some(7);
    let (once, again) = (read(calibration).unwrap(), read(calibration).unwrap());
    assert_eq!(once.tokens(), again.tokens());
    assert_eq!(once.tokens().len(), expected.len() / 2 * 2);
}

#[test]
fn what_a_calibration_file_cannot_mean_is_named_with_its_place() {
    let (root, recipe) = scene();
    let cases: [(&str, &str, ErrorCode, &str); 14] = [
        ("broken.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n", ErrorCode::TextUnreadable, "line 3 is not JSON"),
        (
            "field.jsonl",
            "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n",
            ErrorCode::TextUnreadable,
            "line 2 has no field 'text'",
        ),
        ("number.jsonl", "{\"text\": 5}\n", ErrorCode::TextUnreadable, "line 1 is not a text"),
        ("short.jsonl", "{\"text\": \"a\"}\n", ErrorCode::TextTooShort, "less than one sequence of 64"),
        ("ids.json", "[[1, 2],\n [3, 99999999]]", ErrorCode::TextUnreadable, "99999999"),
        ("minus.json", "[[1, -2]]", ErrorCode::TextUnreadable, "-2"),
        ("fraction.jsonl", "[1, 2]\n[1.5]", ErrorCode::TextUnreadable, "line 2 has 1.5"),
        ("words.json", "[\"a\"]", ErrorCode::TextUnreadable, "\"a\""),
        ("mixed.json", "[[1,2],3,{\"a\":1}]", ErrorCode::TextUnreadable, "the file has 3 beside arrays"),
        ("mixed.jsonl", "[1]\n[[1,2],{\"a\":1}]", ErrorCode::TextUnreadable, "line 2 has {\"a\":1} beside arrays"),
        ("object.json", "{}", ErrorCode::TextUnreadable, "not an array of token ids"),
        ("broken.json", "[[1, 2],\n [3", ErrorCode::TextUnreadable, "line 2 is not JSON"),
        ("few.json", "[[1, 2]]", ErrorCode::TextTooShort, "2 tokens"),
        ("empty.json", "[]", ErrorCode::TextTooShort, "0 tokens"),
    ];
    for (name, content, code, part) in cases {
        let path = root.path().join(name);
        fs::write(&path, content).unwrap();
        let error = refusal(&with_file(&recipe, path));
        assert_eq!(error.code, code, "{name}: {error}");
        assert!(error.message.contains(part) && error.subject.contains(name), "{error}");
        assert!(!error.hint.is_empty());
    }
    let missing = CalibrationKind::of(&root.path().join("missing.jsonl")).unwrap_err();
    assert_eq!(missing.code, ErrorCode::TextUnreadable);
    let folder = root.path().join("folder.jsonl");
    fs::create_dir(&folder).unwrap();
    assert_eq!(CalibrationKind::of(&folder).unwrap_err().code, ErrorCode::TextUnreadable);
    let mut in_folder = recipe.clone();
    in_folder.calibration.as_mut().unwrap().sources[0].file = folder;
    assert_eq!(refusal(&in_folder).code, ErrorCode::TextUnreadable);
    #[cfg(unix)]
    {
        let pipe = root.path().join("pipe.jsonl");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(CalibrationKind::of(&pipe).unwrap_err().code, ErrorCode::TextUnreadable);
    }
    let damaged = root.path().join("damaged.safetensors");
    fs::write(&damaged, b"no header").unwrap();
    assert_eq!(CalibrationKind::of(&damaged).unwrap_err().code, ErrorCode::CheckpointCorrupt);
}

#[test]
fn neither_the_place_of_the_activations_nor_the_memory_changes_a_bit() {
    let (root, mut recipe) = scene();
    // A text so short that reading it is not what needs most.
    let text = fs::read(&recipe.calibration.as_ref().unwrap().sources[0].file).unwrap();
    let short = root.path().join("short.txt");
    fs::write(&short, &text[..4096]).unwrap();
    recipe = with_file(&recipe, short);
    let expected = outcome(&recipe);
    let in_place = |activations| {
        let mut recipe = recipe.clone();
        recipe.calibration.as_mut().unwrap().activations = activations;
        recipe
    };
    for activations in [ActivationPlace::Memory, ActivationPlace::Disk] {
        assert!(outcome(&in_place(activations)) == expected, "{activations:?}");
    }
    // The least memory that is accepted takes activations from disk and statistics in turns.
    let full = plan(&recipe).unwrap().memory;
    assert!(!full.activations_on_disk && full.passes == 1);
    let (mut least, mut enough) = (0, full.peak_bytes);
    while enough - least > 1 {
        let middle = least + (enough - least) / 2;
        match plan(&Recipe { memory: Some(middle), ..recipe.clone() }) {
            Ok(_) => enough = middle,
            Err(error) => {
                assert_eq!(error.code, ErrorCode::MemoryExceeded);
                assert!(error.message.contains("MiB") && error.message.contains("weights"), "{error}");
                assert!(error.hint.contains("--memory"), "{error}");
                least = middle;
            }
        }
    }
    let tight = Recipe { memory: Some(enough), ..recipe.clone() };
    let memory = plan(&tight).unwrap().memory;
    assert!(memory.activations_on_disk && memory.passes > 1, "{memory:?}");
    assert!(memory.peak_bytes <= enough && memory.budget_bytes == enough);
    assert!(outcome(&tight) == expected);
    assert_eq!(refusal(&Recipe { memory: Some(least), ..recipe }).code, ErrorCode::MemoryExceeded);
}

#[test]
fn what_a_file_cannot_hold_is_not_planned_for() {
    let (root, recipe) = scene();
    let ids = root.path().join("ids.jsonl");
    fs::write(&ids, format!("{}\n", serde_json::json!(vec![1234; 3 * LENGTH])).repeat(2)).unwrap();
    let mut recipe = with_file(&recipe, ids);
    recipe.calibration.as_mut().unwrap().sources[0].sequences = usize::MAX;
    let planned = plan(&recipe).unwrap();
    assert!(planned.memory.parts.activations <= 16 * LENGTH as u64 * 2 * 128, "{:?}", planned.memory);
    assert_eq!(planned.memory.parts.text, 0, "lines are read one at a time");
    assert_eq!(run(&recipe).summary.calibration_tokens, 6 * LENGTH as u64);

    // Of a text no more than is used; chance chooses among all of it.
    let mut recipe = scene().1;
    let text = plan(&recipe).unwrap().memory;
    recipe.calibration.as_mut().unwrap().sources[0].seed = Some(1);
    let whole = plan(&recipe).unwrap().memory;
    assert_eq!(whole.parts.text, 128 * fs::metadata(assets("text/calibration-wikipedia.txt")).unwrap().len());
    assert!(text.parts.text >= 4 * LENGTH as u64 * 128 && text.parts.text < whole.parts.text / 10);
    assert!(whole.peak_bytes >= whole.parts.base + whole.parts.text);
}

#[test]
fn saved_statistics_give_the_bytes_of_the_job_that_saved_them() {
    let (root, mut recipe) = scene();
    let expected = outcome(&recipe);
    let file = root.path().join("statistics.safetensors");
    recipe.save_statistics = Some(file.clone());
    assert!(outcome(&recipe) == expected, "saving changes nothing");
    let saved = fs::read(&file).unwrap();
    assert!(outcome(&recipe) == expected);
    assert!(fs::read(&file).unwrap() == saved, "same job, same statistics");

    recipe.save_statistics = None;
    let again = with_file(&recipe, file.clone());
    assert_eq!(again.calibration.as_ref().unwrap().sources[0].kind, CalibrationKind::Statistics);
    assert!(outcome(&again) == expected);
    assert_eq!(run(&again).summary.calibration_tokens, 4 * LENGTH as u64);
    fs::remove_dir_all(&again.out).unwrap();
    // Other widths and methods use them too.
    run(&Recipe { method: "rtn".into(), bits: 4, eora: None, ..again.clone() });
    fs::remove_dir_all(&again.out).unwrap();

    let awq = refusal(&Recipe { method: "awq".into(), ..again.clone() });
    assert_eq!((awq.code, awq.subject.as_str()), (ErrorCode::OptionInvalid, "calibration.file"));
    let other = refusal(&Recipe { source: assets("llama-7m"), ..again.clone() });
    assert_eq!(other.code, ErrorCode::StatisticsMismatch, "{other}");
    assert!(other.message.contains("of 8 blocks"), "{other}");
    let twice = refusal(&Recipe { save_statistics: Some(root.path().join("copy")), ..again.clone() });
    assert_eq!(twice.subject, "saveStatistics");
    fs::write(&file, &saved[..saved.len() - 8]).unwrap();
    assert_eq!(refusal(&again).code, ErrorCode::CheckpointCorrupt);
    let mut broken = saved.clone();
    let end = broken.len();
    broken[end - 2000..end - 1000].fill(0xff);
    fs::write(&file, &broken).unwrap();
    assert_eq!(refusal(&again).code, ErrorCode::CheckpointNotFinite);
    for tokens in [0i64, -1] {
        let mut none = saved.clone();
        none[end - 8..].copy_from_slice(&tokens.to_le_bytes());
        fs::write(&file, &none).unwrap();
        let error = refusal(&again);
        assert_eq!(error.code, ErrorCode::CheckpointCorrupt, "{error}");
        assert!(error.message.contains(&format!("of {tokens} tokens")), "{error}");
    }
    fs::write(&file, saved).unwrap();
    run(&again);
}

#[test]
fn statistics_of_a_relative_with_the_same_norms_are_refused() {
    let (root, mut recipe) = scene();
    let file = root.path().join("statistics.safetensors");
    recipe.save_statistics = Some(file.clone());
    run(&recipe);
    fs::remove_dir_all(&recipe.out).unwrap();
    recipe.save_statistics = None;
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(&recipe.source).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
    }
    let again = with_file(&Recipe { source: source.clone(), ..recipe }, file);
    run(&again);
    fs::remove_dir_all(&again.out).unwrap();

    let (_, spec, _) = tools(&source);
    let last = spec.layers - 1;
    let names = spec.linears.iter().map(|linear| spec.linear_name(last, linear));
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&weights[8..8 + length]).unwrap();
    let outside = [spec.name(spec.family.embedding), spec.family.head].map(str::to_owned);
    let stored: Vec<String> =
        names.chain(outside).filter(|name| header.get(format!("{name}.weight")).is_some()).collect();
    assert!(stored.len() > spec.linears.len());
    for name in stored {
        let offset = header[format!("{name}.weight")]["data_offsets"][0].as_u64().unwrap() as usize;
        let mut changed = weights.clone();
        // The lowest bit of a weight.
        changed[8 + length + offset] ^= 1;
        fs::write(source.join("model.safetensors"), changed).unwrap();
        assert_eq!(refusal(&again).code, ErrorCode::StatisticsMismatch, "{name}");
    }
}

/// Second moments at the input of the first block and of its MLP.
fn moments(source: &Path, file: &Path) -> Vec<Calibration> {
    let (checkpoint, spec, _) = tools(source);
    let source = CalibrationSource {
        file: file.to_path_buf(),
        kind: CalibrationKind::Tokens,
        field: String::new(),
        sequences: 1000,
        seed: None,
        hold_out: 0,
        weight: 1.0,
    };
    let calibration =
        CalibrationRecipe { sources: vec![source], length: LENGTH, subset: false, activations: ActivationPlace::Auto };
    let tokens = CalibrationTokens::read(&calibration, &checkpoint, &spec).unwrap();
    let mut stream = CalibrationStream::<CpuBackend>::new(&checkpoint, &spec, &tokens, None).unwrap();
    let weights = BlockWeights::read(&checkpoint, &spec, 0).unwrap();
    let block = Block::prepare(&backend(), &spec, 0, &weights).unwrap();
    let points = [TapPoint::AttentionInput, TapPoint::MlpActivation];
    let found = stream.capture(&backend(), &block, &points, &CancelToken::new()).unwrap().statistics;
    assert_eq!(found.len(), 2);
    found.into_values().collect()
}

#[test]
fn the_order_of_the_samples_hardly_changes_the_second_moments() {
    let (root, recipe) = scene();
    let (checkpoint, spec, _) = tools(&recipe.source);
    let mut calibration = recipe.calibration.clone().unwrap();
    calibration.sources[0].sequences = 40;
    let tokens = CalibrationTokens::read(&calibration, &checkpoint, &spec).unwrap();
    let mut sequences: Vec<&[u32]> = tokens.tokens().chunks(LENGTH).collect();
    let file = root.path().join("ids.json");
    fs::write(&file, serde_json::to_vec(&sequences).unwrap()).unwrap();
    let straight = moments(&recipe.source, &file);
    for step in [7, 13, 39] {
        let shuffled: Vec<&[u32]> = (0..40).map(|i| sequences[i * step % 40]).collect();
        sequences = shuffled;
        fs::write(&file, serde_json::to_vec(&sequences).unwrap()).unwrap();
        for (one, other) in straight.iter().zip(&moments(&recipe.source, &file)) {
            assert_eq!(one.tokens(), other.tokens());
            let energies = one.energies();
            let mut changed = false;
            for i in 0..one.width() {
                for (j, (a, b)) in one.second_moment().row(i).iter().zip(other.second_moment().row(i)).enumerate() {
                    assert!((a - b).abs() <= 1e-6 * (energies[i] * energies[i + j]).sqrt(), "{i} {j}: {a} {b}");
                    changed |= a != b;
                }
            }
            assert!(changed, "the sums were made in another order");
        }
    }
}

#[test]
fn the_first_tokens_of_a_text_do_not_depend_on_how_much_of_it_is_read() {
    for model in ["llama-7m", "tinystories-656k"] {
        let (checkpoint, spec, tokenizer) = tools(&assets(model));
        let file = assets("text/calibration-wikipedia.txt");
        let whole = tokenizer.encode(&fs::read_to_string(&file).unwrap(), false).unwrap();
        for sequences in [1, 5, 20] {
            let mut calibration = scene().1.calibration.unwrap();
            (calibration.sources[0].file, calibration.sources[0].sequences) = (file.clone(), sequences);
            let tokens = CalibrationTokens::read(&calibration, &checkpoint, &spec).unwrap();
            assert_eq!(tokens.tokens(), &whole[..sequences * LENGTH], "{model} {sequences}");
        }
    }
}
