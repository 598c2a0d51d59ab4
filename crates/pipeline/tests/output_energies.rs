//! Energies of outputs that a pass over the calibration finds are those that second moments say, for every Linear that
//! has them, and a job comes to the same with either.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compensate::{
    Compensation, CompensationOptions, HoldOut, OutputSquares, compensate as solve, group_scales, output_energies,
};
use kintsugi_kernels::{Arithmetic, Kernels};
use kintsugi_model::{Block, BlockWeights, CpuBackend, DecoderSpec, Precision};
use kintsugi_pipeline::{
    CalibrationKind, CalibrationStream, CalibrationTokens, CompensateRecipe, CompensationReport, EoraInputs,
    EoraRecipe, compensate, compress,
};
use kintsugi_runtime::{CancelToken, CpuFeatures, CpuLevel, Progress, ThreadPool};
use kintsugi_weights::{DenseMatrix, RowSource, StackedRows, WeightMatrix};

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-5 * expected
}

#[test]
fn energies_of_outputs_are_those_of_second_moments_in_every_family() {
    let scratch = tempfile::tempdir().unwrap();
    let text = scratch.path().join("tokens.json");
    let ids: Vec<u32> = (0..640u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect();
    fs::write(&text, serde_json::to_string(&ids).unwrap()).unwrap();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families");
    let (pool, cancel) = (ThreadPool::global(), CancelToken::new());
    let rounding = CpuBackend::with(Kernels::new(CpuLevel::best()).unwrap().with_bf16(), Precision::Exact, pool);
    let (mut plain, mut biased, mut experts, mut groups) = (0, 0, 0, 0);
    let (mut left_out, mut in_bf16) = (0, 0);
    for folder in fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = DecoderSpec::of(&checkpoint).unwrap();
        let mut settings = recipe(&folder, scratch.path(), "rtn", 4, 0).calibration.unwrap();
        settings.length = 32;
        let source = &mut settings.sources[0];
        (source.file, source.kind, source.sequences, source.hold_out) = (text.clone(), CalibrationKind::Tokens, 12, 5);
        let mut other = source.clone();
        (source.weight, other.weight, other.sequences, other.hold_out) = (0.5, 2.0, 3, 2);
        settings.sources.push(other);
        let tokens = CalibrationTokens::read(&settings, &checkpoint, &spec).unwrap();
        let mut stream = CalibrationStream::new(&checkpoint, &spec, &tokens, None).unwrap();
        let points = spec.tap_stages().concat();
        for index in 0..spec.layers {
            let weights = BlockWeights::read(&checkpoint, &spec, index).unwrap();
            let block = Block::prepare(&backend(), &spec, index, &weights).unwrap();
            let found = stream.capture(&backend(), &block, &points, &cancel).unwrap();
            let matrix = |place: usize| match &weights.linears[place].matrix {
                WeightMatrix::Dense(matrix) => matrix,
                WeightMatrix::Quantized(_) => unreachable!(),
            };
            for point in &points {
                let Some(statistics) = found.statistics.get(point) else { continue };
                let places: Vec<usize> =
                    (0..spec.linears.len()).filter(|&place| spec.linears[place].slot.tap() == *point).collect();
                let held_out = found.held_out.get(point);
                let compare = |weight: &dyn RowSource, known: &OutputSquares, name: &str| {
                    let nothing = DenseMatrix::from_f32(
                        weight.rows(),
                        weight.columns(),
                        vec![0.0; weight.rows() * weight.columns()],
                    );
                    let options = CompensationOptions { rank: 1, ..CompensationOptions::default() };
                    let of = |held_out: Option<&HoldOut>, known: Option<&OutputSquares>| -> Compensation {
                        solve(weight, &nothing, statistics, held_out, known, &options, pool).unwrap()
                    };
                    let [given, computed] = [Some(known), None].map(|known| of(held_out, known));
                    let (original, expected) = (given.profile.original, computed.profile.original);
                    assert!(original == known.calibration && near(original, expected), "{name} {original} {expected}");
                    assert!(given.factors == computed.factors, "{name}");
                    let Some((given, computed)) = given.profile.hold_out.zip(computed.profile.hold_out) else { return };
                    assert_eq!(known.held_out.len(), held_out.unwrap().tokens(), "{name}");
                    assert!(given.original == halves(&known.held_out), "{name}");
                    assert!((0..2).all(|half| near(given.original[half], computed.original[half])), "{name}");
                };
                for &place in &places {
                    let name = format!("{} {}", folder.display(), spec.linear_name(index, &spec.linears[place]));
                    let known = found.outputs.get(&place);
                    assert_eq!(known.is_some(), weights.linears[place].bias.is_none(), "{name}");
                    let Some(known) = known else {
                        biased += 1;
                        continue;
                    };
                    compare(matrix(place), known, &name);
                    plain += 1;
                    experts += usize::from(name.contains("experts"));
                }
                // Linears that share an A, with the scales that make their outputs alike.
                let known: Vec<&OutputSquares> = places.iter().filter_map(|place| found.outputs.get(place)).collect();
                if places.len() > 1 && known.len() == places.len() {
                    let matrices: Vec<&dyn RowSource> = places.iter().map(|&place| matrix(place) as _).collect();
                    let given: Vec<Option<&OutputSquares>> = known.iter().map(|&known| Some(known)).collect();
                    let scales = group_scales(&output_energies(&matrices, statistics, &given, pool));
                    let stacked = StackedRows::new(matrices.into_iter().zip(scales.iter().copied()).collect());
                    let parts: Vec<(&OutputSquares, f32)> = known.into_iter().zip(scales).collect();
                    compare(&stacked, &OutputSquares::stacked(&parts), &format!("{} {point:?}", folder.display()));
                    groups += 1;
                }
            }
            // Products that round their inputs are not those of the weights.
            let rounded = Block::prepare(&rounding, &spec, index, &weights).unwrap();
            let others = stream.capture(&rounding, &rounded, &points, &cancel).unwrap();
            let arithmetic: Vec<Arithmetic> = rounded.arithmetic(&rounding).collect();
            let is_plain = |place: usize| weights.linears[place].bias.is_none() && arithmetic[place] == Arithmetic::F32;
            let is_reached = |place: usize| others.statistics.contains_key(&spec.linears[place].slot.tap());
            let expected = (0..spec.linears.len()).filter(|&place| is_plain(place) && is_reached(place));
            assert!(others.outputs.keys().copied().eq(expected), "{}", folder.display());
            left_out += found.outputs.keys().filter(|place| !others.outputs.contains_key(place)).count();
            in_bf16 += arithmetic[..spec.linears.len()].iter().filter(|&&one| one == Arithmetic::Bf16).count();
            stream.advance(&backend(), &block, &cancel).unwrap();
        }
    }
    let rounds = CpuLevel::best() == CpuLevel::Avx512Vnni && CpuFeatures::detect().avx512_bf16;
    assert!((left_out > 100, in_bf16 > 100) == (rounds, rounds), "{left_out} {in_bf16}");
    assert!(plain > 100 && biased > 20 && experts > 20 && groups > 20, "{plain} {biased} {experts} {groups}");
}

fn halves(values: &[f64]) -> [f64; 2] {
    let (first, second) = values.split_at(values.len() / 2);
    [first, second].map(|half| half.iter().sum())
}

/// The same file, with other energies of outputs.
fn with_energies(file: &Path, change: impl Fn(f64) -> f64) -> usize {
    let mut bytes = fs::read(file).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let mut changed = 0;
    for (name, tensor) in header.as_object().unwrap() {
        if !name.ends_with(".output_energy") {
            continue;
        }
        let at = start + tensor["data_offsets"][0].as_u64().unwrap() as usize;
        let value = f64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        bytes[at..at + 8].copy_from_slice(&change(value).to_le_bytes());
        changed += 1;
    }
    fs::write(file, bytes).unwrap();
    changed
}

#[test]
fn a_job_comes_to_the_same_with_energies_of_outputs_and_without() {
    let root = tempfile::tempdir().unwrap();
    let statistics = root.path().join("statistics.safetensors");
    let mut base = recipe(&assets("tinystories-656k"), &root.path().join("base"), "rtn", 3, 0);
    base.save_statistics = Some(statistics.clone());
    let calibration = base.calibration.as_mut().unwrap();
    (calibration.length, calibration.sources[0].sequences, calibration.sources[0].hold_out) = (64, 8, 4);
    compress(&base, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    let run = |name: &str, file: Option<&Path>, eora: EoraRecipe| -> (CompensationReport, Vec<u8>) {
        let mut job = CompensateRecipe {
            original: base.source.clone(),
            compressed: base.out.clone(),
            out: root.path().join(name),
            calibration: base.calibration.clone().unwrap(),
            eora,
            fresh: false,
            memory: None,
        };
        if let Some(file) = file {
            let source = &mut job.calibration.sources[0];
            (source.file, source.kind, source.hold_out) = (file.to_path_buf(), CalibrationKind::Statistics, 0);
        }
        let report = compensate(&job, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let factors = fs::read(job.out.join("adapter_model.safetensors")).unwrap();
        fs::remove_dir_all(&job.out).unwrap();
        (report, factors)
    };
    let [unknown, fourfold, damaged] =
        ["unknown", "fourfold", "damaged"].map(|name| root.path().join(name).with_extension("safetensors"));
    fs::copy(&statistics, &unknown).unwrap();
    let linears = with_energies(&unknown, |energy| {
        assert!(energy > 0.0);
        -1.0
    });
    fs::copy(&statistics, &fourfold).unwrap();
    with_energies(&fourfold, |energy| 4.0 * energy);
    fs::copy(&statistics, &damaged).unwrap();
    with_energies(&damaged, |_| 1e300);
    for eora in [
        EoraRecipe::uniform(4),
        EoraRecipe { grouped: true, ..EoraRecipe::uniform(4) },
        EoraRecipe { affine: true, ..EoraRecipe::uniform(4) },
    ] {
        let affine = eora.affine;
        let (known, factors) = run("known", Some(&statistics), eora.clone());
        let (computed, others) = run("computed", Some(&unknown), eora.clone());
        let (larger, _) = run("larger", Some(&fourfold), eora.clone());
        let (refused, of_refused) = run("refused", Some(&damaged), eora);
        assert_eq!(known.linears.len(), linears);
        assert!(factors == others);
        // More than the inputs can give is not taken: it is computed as if it were not there.
        assert!(of_refused == factors);
        let errors = |report: &CompensationReport| -> Vec<_> { report.linears.iter().map(|l| l.error).collect() };
        assert!(errors(&refused) == errors(&computed), "affine: {affine}");
        for ((known, computed), larger) in known.linears.iter().zip(&computed.linears).zip(&larger.linears) {
            let [known, computed, larger] = [known, computed, larger].map(|linear| linear.error.unwrap());
            let pairs = [
                (known.quantized, computed.quantized, larger.quantized),
                (known.compensated, computed.compensated, larger.compensated),
                (known.bound, computed.bound, larger.bound),
            ];
            for (known, computed, larger) in pairs {
                assert!(near(known, computed), "{known} {computed}, affine: {affine}");
                assert!(near(2.0 * larger, known), "what is given is taken: {known} {larger}, affine: {affine}");
            }
        }
    }
    // Without a file the pass over the tokens finds the energies that the file has, for mixed inputs, too. The file was
    // taken without factors, which the inputs of the second block know.
    let mixed = EoraRecipe { inputs: EoraInputs::Mixed { mismatch: 0.0 }, ..EoraRecipe::uniform(4) };
    let [deployed, mixed] =
        [("deployed", EoraRecipe::uniform(4)), ("mixed", mixed)].map(|(name, eora)| run(name, None, eora).0.linears);
    let [saved, computed] =
        [&statistics, &unknown].map(|file| run("file", Some(file), EoraRecipe::uniform(4)).0.linears);
    for (deployed, mixed) in deployed.iter().zip(&mixed) {
        assert_eq!((deployed.error, deployed.hold_out), (mixed.error, mixed.hold_out), "{}", deployed.name);
    }
    for ((deployed, saved), computed) in deployed.iter().zip(&saved).zip(&computed).take(linears / 2) {
        assert_eq!(deployed.error, saved.error, "{}", deployed.name);
        assert_ne!(deployed.error, computed.error, "roundings tell both apart: {}", deployed.name);
    }
}
