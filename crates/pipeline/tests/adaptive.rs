//! Choices that are made per Linear: the axis of the groups (AdaDim), and widths under a bit budget.

use std::path::Path;

use crate::common::{assets, backend, perplexity, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compress::AxisRule;
use kintsugi_model::DecoderSpec;
use kintsugi_pipeline::{LinearOverride, Recipe, Report, compress, plan};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress};
use kintsugi_weights::{GroupAxis, WeightMatrix};

/// A job on few calibration tokens.
fn short(source: &Path, out: &Path, method: &str, bits: u8) -> Recipe {
    let mut recipe = recipe(source, out, method, bits, 0);
    recipe.calibration.as_mut().unwrap().sources[0].sequences = 8;
    recipe
}

fn run(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

#[test]
fn the_better_axis_of_each_linear_is_written_and_read() {
    let root = tempfile::tempdir().unwrap();
    let source = assets("tinystories-656k");
    for method in ["rtn", "gptq"] {
        let along = |group_axis: AxisRule| {
            let out = root.path().join(format!("{method}-{group_axis:?}"));
            let recipe = Recipe { group_axis, group_size: Some(32), ..short(&source, &out, method, 3) };
            (run(&recipe), out)
        };
        let [(inputs, _), (outputs, _), (adaptive, out)] =
            [AxisRule::Input, AxisRule::Output, AxisRule::Adaptive].map(along);
        assert_eq!((inputs.summary.format.as_str(), adaptive.summary.format.as_str()), ("gptq_v2", "kintsugi"));
        let axes: Vec<GroupAxis> = adaptive.linears.iter().map(|linear| linear.group_axis).collect();
        assert!(axes.contains(&GroupAxis::Input) && axes.contains(&GroupAxis::Output), "{method}: {axes:?}");
        // The first block reads the same inputs in all three jobs, so its errors can be compared.
        let first = |report: &Report, at: usize| report.linears[at].error.unwrap().quantized;
        for at in 0..7 {
            let [input, output, chosen] = [&inputs, &outputs, &adaptive].map(|report| first(report, at));
            assert_eq!(chosen, if axes[at] == GroupAxis::Input { input } else { output }, "{method} {at}");
        }
        let checkpoint = Checkpoint::open(&out).unwrap();
        for (linear, axis) in adaptive.linears.iter().zip(&axes) {
            let WeightMatrix::Quantized(matrix) = checkpoint.linear(&linear.name).unwrap().matrix else { panic!() };
            assert_eq!((matrix.group_axis(), matrix.stored_bits()), (*axis, linear.stored_bits));
        }
    }
}

/// Bits per weight of what is written, factors aside.
fn bits_per_weight(report: &Report) -> f64 {
    report.linears.iter().map(|linear| linear.stored_bits).sum::<u64>() as f64 / report.summary.quantized_weights as f64
}

#[test]
fn a_bit_budget_is_kept_and_spent_where_it_does_most_good() {
    let root = tempfile::tempdir().unwrap();
    let source = assets("llama-7m");
    let budget = |source: &Path, name: &str, bits: f64, change: &dyn Fn(&mut Recipe)| {
        let mut recipe = short(source, &root.path().join(name), "rtn", 4);
        recipe.bit_budget = Some(bits);
        change(&mut recipe);
        recipe
    };
    let uniform = run(&short(&source, &root.path().join("uniform"), "rtn", 3));
    let asked = budget(&source, "mixed", bits_per_weight(&uniform), &|_| {});
    assert!(plan(&asked).unwrap().linears.iter().all(|linear| linear.bits.is_none()));
    let mixed = run(&asked);
    let spent = bits_per_weight(&mixed);
    assert!(spent <= bits_per_weight(&uniform) && spent > 0.97 * bits_per_weight(&uniform), "{spent}");
    let widths: Vec<u8> = mixed.linears.iter().map(|linear| linear.bits).collect();
    assert!(widths.iter().any(|&bits| bits < 3) && widths.iter().any(|&bits| bits > 3), "{widths:?}");
    // Linears that servers fuse have one width.
    let spec = DecoderSpec::of(&Checkpoint::open(&source).unwrap()).unwrap();
    for block in widths.chunks(spec.linears.len()) {
        assert!(block[0] == block[1] && block[1] == block[2] && block[4] == block[5], "{block:?}");
    }
    let of = |path: &Path| perplexity(path, "eval-stories.txt", 256);
    let (before, after) = (of(&root.path().join("uniform")), of(&root.path().join("mixed")));
    assert!(after < before, "{after} at the same bits as {before}");

    // Overrides go before the budget, and the same job gives the same bytes.
    let pinned = budget(&assets("tinystories-656k"), "pinned", 5.0, &|recipe| {
        recipe.overrides = vec![LinearOverride { linears: "*.down_proj".into(), bits: Some(8), group_size: Some(32) }];
    });
    let report = run(&pinned);
    assert!(bits_per_weight(&report) <= 5.0);
    for linear in report.linears.iter().filter(|linear| linear.name.ends_with("down_proj")) {
        assert_eq!((linear.bits, linear.group_size), (8, Some(32)));
    }
    let again = Recipe { out: root.path().join("again"), ..pinned.clone() };
    run(&again);
    let weights = |recipe: &Recipe| std::fs::read(recipe.out.join("model.safetensors")).unwrap();
    assert!(weights(&pinned) == weights(&again));
}

#[test]
fn budgets_and_axes_that_cannot_be_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let base = short(&assets("llama-7m"), &out, "gptq", 4);
    let refuse = |recipe: Recipe, code: ErrorCode, subject: &str| {
        let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (code, subject), "{error}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing stays behind");
    };
    let invalid = ErrorCode::OptionInvalid;
    refuse(Recipe { bit_budget: Some(f64::NAN), ..base.clone() }, invalid, "bitBudget");
    refuse(Recipe { bit_budget: Some(2.2), ..base.clone() }, invalid, "bitBudget");
    refuse(
        Recipe { bit_budget: Some(3.0), method: "rtn".into(), calibration: None, ..base.clone() },
        invalid,
        "bitBudget",
    );
    let awq = Recipe { bit_budget: Some(4.5), format: "awq".into(), ..base.clone() };
    refuse(awq, ErrorCode::QuantizationUnsupported, "bitBudget");
    let along = Recipe { group_axis: AxisRule::Output, ..base.clone() };
    refuse(Recipe { method: "awq".into(), ..along.clone() }, invalid, "groupAxis");
    refuse(Recipe { group_size: None, ..along.clone() }, invalid, "groupSize");
    let packed = Recipe { format: "gptq_v2".into(), ..along };
    refuse(packed, ErrorCode::QuantizationUnsupported, "model.layers.0.self_attn.q_proj");
}
