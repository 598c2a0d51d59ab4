//! Merging whole PEFT folders: against peft itself, against each other, and against what must not be written.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::merges::{assets, recipe, refused, relative, run, run_on, sum, updates, vectors, write_adapter};
use kintsugi_checkpoint::{AdapterFolder, ModuleKind};
use kintsugi_merge::{Coordinates, Gauge, METHODS, MergeOptions, RankRule, SignElection};
use kintsugi_pipeline::{MergeRecipe, RankPadding, merge_adapters, plan_merge};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, ThreadPool};
use kintsugi_weights::ElementType;
use serde_json::Value;

#[test]
fn every_merge_of_peft_is_reached() {
    let cases: Value = serde_json::from_slice(&fs::read(vectors().join("cases.json")).unwrap()).unwrap();
    let (rank, density) = (cases["rank"].as_u64().unwrap() as usize, cases["density"].as_f64().unwrap());
    let out = tempfile::tempdir().unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() >= 24);
    for case in cases {
        let kind = case["kind"].as_str().unwrap();
        let (method, dense_kind) = kind.strip_suffix("_svd").map_or((kind, kind == "svd"), |method| (method, true));
        let name = case["expected"].as_str().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let folders: Vec<PathBuf> =
            case["adapters"].as_array().unwrap().iter().map(|name| vectors().join(text(name))).collect();
        let weights: Vec<f64> = case["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).collect();
        let mut recipe = recipe(&folders, &weights, &method.replace('_', "-"), &out.path().join(name));
        recipe.options.density = density;
        recipe.options.rank = dense_kind.then_some(RankRule::Fixed(rank));
        recipe.options.coordinates = (!dense_kind).then_some(Coordinates::Factors);
        if case["election"] == "frequency" {
            recipe.options.sign_election = SignElection::Frequency;
        }
        run(&recipe).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (found, expected) = (updates(&recipe.out), updates(&vectors().join("expected").join(name)));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        for (module, expected) in &expected {
            let error = relative(&found[module], expected);
            assert!(error <= 1e-5, "{name} {module}: {error:e}");
        }
        if matches!(kind, "linear" | "ties" | "magnitude_prune") {
            let [found, expected] = [recipe.out.clone(), vectors().join("expected").join(name)]
                .map(|folder| AdapterFolder::open(&folder).unwrap());
            for module in found.modules() {
                let [found, expected] = [&found, &expected].map(|folder| folder.factors(&module.name).unwrap());
                for (found, expected) in [(found.a(), expected.a()), (found.b(), expected.b())] {
                    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
                    assert!(relative(&wide(found), &wide(expected)) <= 1e-6, "{name} {}", module.name);
                }
            }
        }
    }
}

#[test]
fn scalings_are_those_that_peft_computes() {
    let scaling = |adapter: &str, module: &str| {
        let folder = AdapterFolder::open(&vectors().join(adapter)).unwrap();
        let module = folder.modules().iter().find(|found| found.name.ends_with(module)).cloned().unwrap();
        (module.scaling, module.rank, module.kind)
    };
    assert_eq!(scaling("first", "q_proj"), (2.0, 4, ModuleKind::Linear));
    assert_eq!(scaling("stable", "v_proj"), (6.0 / 3f64.sqrt(), 3, ModuleKind::Linear));
    assert_eq!(scaling("patterns", "q_proj"), (0.75, 4, ModuleKind::Linear));
    assert_eq!(scaling("patterns", "v_proj"), (4.0, 2, ModuleKind::Linear));
    assert_eq!(scaling("embedding", "embed_tokens"), (2.0, 3, ModuleKind::Embedding));
    assert_eq!(scaling("binary", "q_proj"), (2.0, 2, ModuleKind::Linear));
}

#[test]
fn adapters_of_any_ranks_targets_and_scalings_add_up() {
    let folders: Vec<PathBuf> =
        ["first", "stable", "small", "patterns", "embedding", "binary"].map(|name| vectors().join(name)).to_vec();
    let weights = [1.0, 0.25, -0.5, 2.0, 0.7, 1.0];
    let expected = sum(&folders, &weights);
    let out = tempfile::tempdir().unwrap();
    for (method, rank) in [("cat", None), ("svd", Some(18)), ("lego-gauge-free", Some(18))] {
        for padding in [RankPadding::Uniform, RankPadding::Vllm, RankPadding::None] {
            let path = out.path().join(format!("{method}-{padding:?}"));
            let mut recipe = recipe(&folders, &weights, method, &path);
            recipe.options.rank = rank.map(RankRule::Fixed);
            recipe.padding = padding;
            let report = run(&recipe).unwrap();
            assert!(report.summary.error.unwrap() <= 1e-6);
            let found = updates(&path);
            assert_eq!(found.len(), expected.len());
            for (module, expected) in &expected {
                let error = relative(&found[module], expected);
                assert!(error <= 1e-6, "{method} {padding:?} {module}: {error:e}");
            }
            let folder = AdapterFolder::open(&path).unwrap();
            let ranks: Vec<usize> = folder.modules().iter().map(|module| module.rank).collect();
            assert!(folder.modules().iter().all(|module| module.scaling == 1.0));
            match padding {
                RankPadding::Uniform => assert!(ranks.iter().all(|&rank| rank == report.summary.rank)),
                // 18 units of the largest module, or 12 directions.
                RankPadding::Vllm => assert_eq!(ranks, [if method == "svd" { 16 } else { 32 }; 5]),
                RankPadding::None => assert!(ranks.iter().any(|&rank| rank < report.summary.rank)),
            }
        }
    }
}

#[test]
fn cat_moves_the_same_numbers_with_and_without_report() {
    let out = tempfile::tempdir().unwrap();
    let named = |names: &[&str]| names.iter().map(|name| vectors().join(name)).collect::<Vec<PathBuf>>();
    let equal = [assets().join("shakespeare"), assets().join("python")].to_vec();
    let sets =
        [equal, named(&["first", "second", "third"]), named(&["first", "stable", "patterns", "embedding", "binary"])];
    for (i, folders) in sets.iter().enumerate() {
        for weights in [vec![1.0; folders.len()], (1..=folders.len()).map(|w| 0.3 * w as f64).collect()] {
            for factor_type in [None, Some(ElementType::Bf16)] {
                for padding in [RankPadding::Uniform, RankPadding::Vllm, RankPadding::None] {
                    let bytes = [true, false].map(|report| {
                        let path = out.path().join(format!("{i}-{padding:?}-{}-{factor_type:?}-{report}", weights[0]));
                        let mut recipe = recipe(folders, &weights, "cat", &path);
                        (recipe.options.report, recipe.padding, recipe.factor_type) = (report, padding, factor_type);
                        run(&recipe).unwrap();
                        assert_eq!(path.join("report.svg").exists(), report);
                        let files = ["adapter_model.safetensors", "adapter_config.json"];
                        files.map(|file| fs::read(path.join(file)).unwrap())
                    });
                    assert!(bytes[0] == bytes[1], "{i} {weights:?} {factor_type:?} {padding:?}");
                }
            }
        }
    }
}

#[test]
fn an_energy_target_decides_the_rank_of_each_module() {
    let folders = [assets().join("shakespeare"), assets().join("python")];
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe(&folders, &[0.5, 0.5], "svd", &out.path().join("energy"));
    recipe.options.rank = Some(RankRule::Energy { share: 0.9, most: 16 });
    recipe.padding = RankPadding::None;
    let report = run(&recipe).unwrap();
    assert!(report.modules.iter().all(|module| module.kept.as_ref().unwrap().error <= 0.1f64.sqrt() + 1e-6));
    let ranks: Vec<usize> = report.modules.iter().map(|module| module.rank).collect();
    assert!(ranks.iter().min() < ranks.iter().max() && ranks.iter().all(|&rank| rank < 16), "{ranks:?}");
    let written = AdapterFolder::open(&recipe.out).unwrap();
    assert_eq!(written.modules().iter().map(|module| module.rank).collect::<Vec<_>>(), ranks);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1);
}

#[test]
fn an_energy_target_is_not_a_rank_that_vllm_must_serve() {
    let out = tempfile::tempdir().unwrap();
    let folders = ["left", "right"].map(|name| out.path().join(name));
    folders.iter().for_each(|folder| write_adapter(folder, None, false, 520, 3));
    let mut recipe = recipe(&folders, &[1.0, 0.5], "magnitude-prune", &out.path().join("out"));
    recipe.options.rank = Some(RankRule::Energy { share: 0.5, most: 1 << 16 });
    recipe.options.density = 0.9;
    recipe.padding = RankPadding::Vllm;
    assert_eq!(plan_merge(&recipe, &CancelToken::new()).unwrap().modules[0].rank, 512);
    assert_eq!(run(&recipe).unwrap().summary.rank, 8);
    recipe.out = out.path().join("fixed");
    recipe.options.rank = Some(RankRule::Fixed(515));
    assert_eq!(refused(&recipe, ErrorCode::OptionInvalid).subject, "padding");
}

#[test]
fn an_output_that_may_not_be_written_is_refused_first() {
    let folders = [vectors().join("first"), vectors().join("second")];
    let out = tempfile::tempdir().unwrap();
    fs::write(out.path().join("file"), "x").unwrap();
    let mut recipe = recipe(&folders, &[1.0, 1.0], "svd", out.path());
    recipe.options.rank = Some(RankRule::Energy { share: 0.9, most: 16 });
    assert_eq!(plan_merge(&recipe, &CancelToken::new()).unwrap_err().code, ErrorCode::OutputNotEmpty);
    let progress = Progress::new();
    let error = merge_adapters(&recipe, &ThreadPool::with_threads(1), &CancelToken::new(), &progress).unwrap_err();
    assert_eq!(error.code, ErrorCode::OutputNotEmpty);
    assert_eq!(progress.snapshot().total, 0);
    recipe.out = out.path().join("file");
    refused(&recipe, ErrorCode::OutputUnwritable);
}

#[test]
fn the_report_is_about_what_is_in_the_file() {
    let folders = [assets().join("shakespeare"), assets().join("python")];
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe(&folders, &[1.0, 0.5], "lego", &out.path().join("lego"));
    recipe.options.rank = Some(RankRule::Fixed(6));
    recipe.factor_type = Some(ElementType::Bf16);
    let report = run(&recipe).unwrap();
    let (found, expected) = (updates(&recipe.out), sum(&folders, &[1.0, 0.5]));
    for module in &report.modules {
        let error = relative(&found[&module.name], &expected[&module.name]);
        let reported = module.kept.as_ref().unwrap().error;
        assert!((error - reported).abs() <= 1e-6 * error, "{error} {reported}");
        assert_eq!(module.cluster_sizes.iter().sum::<usize>(), 16);
    }
    let flat = |of: &BTreeMap<String, Vec<f64>>| of.values().flatten().copied().collect::<Vec<f64>>();
    assert!((report.summary.error.unwrap() - relative(&flat(&found), &flat(&expected))).abs() <= 1e-6);
    assert_eq!(report.summary.bytes, fs::metadata(recipe.out.join("adapter_model.safetensors")).unwrap().len());
    let stored: Value = serde_json::from_slice(&fs::read(recipe.out.join("report.json")).unwrap()).unwrap();
    assert_eq!(stored, serde_json::to_value(&report).unwrap());
    let picture = fs::read_to_string(recipe.out.join("report.svg")).unwrap();
    assert!(picture.starts_with("<svg xmlns") && picture.ends_with("</svg>\n") && picture.contains("shakespeare"));
    // A cell for each module: of its distance, and of what is left of either adapter.
    assert!(picture.matches("<rect class=\"c").count() >= 3 * report.modules.len());
    let plan = plan_merge(&MergeRecipe { out: out.path().join("plan"), ..recipe }, &CancelToken::new()).unwrap();
    assert_eq!(plan.modules.len(), report.summary.modules);
    assert!(plan.bytes < report.summary.bytes && plan.bytes > report.summary.bytes * 9 / 10);
}

#[test]
fn neither_the_order_of_the_adapters_nor_threads_change_a_byte() {
    let out = tempfile::tempdir().unwrap();
    let weights = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let names = ["first", "second", "third"];
    for method in METHODS {
        let mut results = Vec::new();
        for (i, order) in [[0, 1, 2], [2, 0, 1], [1, 2, 0]].iter().enumerate() {
            let folders: Vec<PathBuf> = order.iter().map(|&j| vectors().join(names[j])).collect();
            let shares: Vec<f64> = order.iter().map(|&j| [1.0, 0.5, 0.25][j]).collect();
            let path = out.path().join(format!("{}-{i}", method.name()));
            run_on(&recipe(&folders, &shares, method.name(), &path), [1, 2, 7][i]).unwrap();
            results.push((weights(&path), fs::read(path.join("adapter_config.json")).unwrap()));
        }
        assert!(results.iter().all(|result| *result == results[0]), "{}", method.name());
    }
}

#[test]
fn what_cannot_be_merged_is_refused_by_name_and_nothing_is_written() {
    let out = tempfile::tempdir().unwrap();
    let (first, small) = (vectors().join("first"), vectors().join("small"));
    let path = out.path().join("out");
    let of = |adapters: &[PathBuf], weights: &[f64], method: &str| recipe(adapters, weights, method, &path);
    refused(&of(&[], &[], "svd"), ErrorCode::OptionInvalid);
    refused(&of(std::slice::from_ref(&first), &[1.0, 2.0], "svd"), ErrorCode::OptionInvalid);
    refused(&of(std::slice::from_ref(&first), &[f64::NAN], "svd"), ErrorCode::OptionInvalid);
    assert!(refused(&of(std::slice::from_ref(&first), &[1.0], "legi"), ErrorCode::OptionInvalid).hint.contains("lego"));
    refused(&of(&[first.clone(), small.clone()], &[1.0, 1.0], "linear"), ErrorCode::OptionInvalid);
    let missing = out.path().join("missing");
    refused(&of(std::slice::from_ref(&missing), &[1.0], "svd"), ErrorCode::AdapterInvalid);
    let other = of(&[first.clone(), assets().join("python")], &[1.0, 1.0], "svd");
    assert!(refused(&other, ErrorCode::AdapterInvalid).message.contains("tiny-llama"));
    let mut many = of(std::slice::from_ref(&first), &[1.0], "svd");
    many.options.rank = Some(RankRule::Fixed(0));
    refused(&many, ErrorCode::OptionInvalid);

    // One shape that does not fit: the same module of another base.
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type":"LORA","r":1,"lora_alpha":1,"target_modules":["q_proj"]}"#;
    fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let name = "base_model.model.model.layers.0.self_attn.q_proj";
    let header = format!(
        r#"{{"{name}.lora_A.weight":{{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}},"{name}.lora_B.weight":{{"dtype":"F32","shape":[3,1],"data_offsets":[8,20]}}}}"#
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 20]);
    fs::write(folder.path().join("adapter_model.safetensors"), file).unwrap();
    let error = refused(&of(&[first.clone(), folder.path().into()], &[1.0, 1.0], "svd"), ErrorCode::ShapeMismatch);
    assert!(error.message.contains("q_proj"), "{error}");

    let mut large = of(&[first.clone(), small], &[1e30, 1.0], "svd");
    large.factor_type = Some(ElementType::F16);
    refused(&large, ErrorCode::ValueNotFinite);
    let cancelled = CancelToken::new();
    cancelled.cancel();
    let error =
        merge_adapters(&of(&[first], &[1.0], "svd"), &ThreadPool::with_threads(2), &cancelled, &Progress::new());
    assert_eq!(error.unwrap_err().code, ErrorCode::Cancelled);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn bases_are_compared_whether_they_are_named_or_not() {
    let out = tempfile::tempdir().unwrap();
    let made = |name: &str, base: Option<&str>, turned: bool| {
        let folder = out.path().join(name);
        write_adapter(&folder, base, turned, 4, 1);
        folder
    };
    let (plain, turned) = (made("plain", None, false), made("turned", None, true));
    let mixed = recipe(&[plain, turned], &[1.0, 1.0], "svd", &out.path().join("mixed"));
    assert!(refused(&mixed, ErrorCode::AdapterInvalid).message.contains("fan_in_fan_out"));
    let (b, a) = (made("b", Some("model-b"), false), made("a", Some("model-a"), false));
    let configs = [[&a, &b], [&b, &a]].map(|[first, second]| {
        let path = out.path().join(first.file_name().unwrap()).join("merged");
        let mut allowed = recipe(&[first.clone(), second.clone()], &[1.0, 1.0], "svd", &path);
        refused(&allowed, ErrorCode::AdapterInvalid);
        allowed.allow_different_bases = true;
        assert_eq!(run(&allowed).unwrap().recipe.adapters[0], *first);
        fs::read_to_string(path.join("adapter_config.json")).unwrap()
    });
    assert!(configs[0] == configs[1] && configs[0].contains("model-a"), "{configs:?}");
}

#[test]
fn gauges_coordinates_and_seeds_reach_the_methods() {
    let folders = ["first", "second", "third"].map(|name| vectors().join(name));
    let out = tempfile::tempdir().unwrap();
    let mut seen: Vec<(String, Vec<u8>)> = Vec::new();
    let mut change = |name: &str, method: &str, set: &dyn Fn(&mut MergeOptions)| {
        let mut recipe = recipe(&folders, &[1.0; 3], method, &out.path().join(name));
        recipe.options.rank = Some(RankRule::Fixed(6));
        set(&mut recipe.options);
        run(&recipe).unwrap();
        let bytes = fs::read(recipe.out.join("adapter_model.safetensors")).unwrap();
        assert!(seen.iter().all(|(_, other)| *other != bytes), "{name} changes nothing");
        seen.push((name.to_string(), bytes));
    };
    change("lego", "lego", &|_| {});
    change("gauge", "lego", &|options| options.gauge = Gauge::Svd);
    change("plain", "lego", &|options| options.parameter_reweighting = false);
    change("output", "lego", &|options| options.output_reweighting = false);
    change("reference", "lego", &|options| options.reference_rank = Some(9.0));
    change("ties", "ties", &|_| {});
    change("density", "ties", &|options| options.density = 0.2);
    change("core", "ties", &|options| options.coordinates = Some(Coordinates::Core));
    change("dare", "dare-linear", &|_| {});
    change("seed", "dare-linear", &|options| options.seed = 1);
}
