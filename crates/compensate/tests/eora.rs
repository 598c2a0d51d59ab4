//! EoRA against f64 oracles that never see a second moment: singular values of `Δ X` by Jacobi rotations, and errors
//! measured on the inputs themselves.

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{
    Compensation, CompensationMethod, CompensationOptions, Diagonal, Exact, FactorPrecision, Fast, HoldOut, Lorc,
    METHODS, OutputDirections, Residual, compensate, output_energy, residual_error,
};
use kintsugi_linalg::{MatrixView, SymmetricEigen, ThinSvd, product};
use kintsugi_runtime::{ErrorCode, Result, ThreadPool};
use kintsugi_testkit::eora_cases::{
    Damage, EORA_CASES, EoraCase, EoraInstance, ITERATED_EORA_CASES, Inputs, Random, outputs, singular_values,
};
use kintsugi_weights::{DenseMatrix, ElementType, LowRank, QuantizedMatrix};

fn calibrate(inputs: &[f32], width: usize) -> Calibration {
    let pool = ThreadPool::global();
    let mut builder = CalibrationBuilder::new(width);
    builder.push(inputs, pool).unwrap();
    builder.finish(pool)
}

fn residual(instance: &EoraInstance) -> Vec<f64> {
    let pairs = instance.weight.to_f32().into_iter().zip(instance.quantized.to_f32());
    pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect()
}

/// `Δ − B A` in f64.
fn repaired(delta: &[f64], factors: &LowRank) -> Vec<f64> {
    let (rank, columns) = (factors.rank(), factors.in_features());
    let mut out = delta.to_vec();
    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
        for l in 0..rank {
            let b = f64::from(factors.b()[row * rank + l]);
            for (value, &a) in out.iter_mut().zip(&factors.a()[l * columns..(l + 1) * columns]) {
                *value -= b * f64::from(a);
            }
        }
    }
    out
}

/// `|B| |A| |x|` for every input: what the rounding errors of the factors are multiplied with.
fn magnitudes(factors: &LowRank, inputs: &[f32]) -> Vec<f64> {
    let absolute = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).collect::<Vec<_>>();
    let (b, a, rank) = (absolute(factors.b()), absolute(factors.a()), factors.rank());
    let inputs: Vec<f32> = inputs.iter().map(|value| value.abs()).collect();
    let projected = outputs(&a, factors.in_features(), &inputs);
    let tokens = inputs.len() / factors.in_features();
    let row = |row: usize, token: usize| (0..rank).map(|l| b[row * rank + l] * projected[l * tokens + token]).sum();
    (0..factors.out_features()).flat_map(|i| (0..tokens).map(move |token| (i, token))).map(|(i, t)| row(i, t)).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn options(rank: usize, factor_type: ElementType) -> CompensationOptions {
    CompensationOptions { method: &Exact, rank, precision: FactorPrecision::Float(factor_type) }
}

fn eora(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: &Calibration,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    compensate(weight, quantized, calibration, None, options, pool)
}

/// A case and everything that its oracles need.
struct Solvable {
    instance: EoraInstance,
    calibration: Calibration,
    delta: Vec<f64>,
    /// `‖Δ X‖`
    total: f64,
    shape: (usize, usize),
}

impl Solvable {
    fn new(case: &EoraCase) -> Self {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let spoiled = outputs(&delta, case.columns, &instance.inputs);
        Solvable { instance, calibration, total: norm(&spoiled), delta, shape: (case.rows, case.columns) }
    }

    /// Singular values of `Δ X`.
    fn values(&self) -> Vec<f64> {
        let (rows, columns) = self.shape;
        let spoiled = outputs(&self.delta, columns, &self.instance.inputs);
        singular_values(&spoiled, rows, self.instance.inputs.len() / columns)
    }

    fn optimum(&self, rank: usize) -> f64 {
        let values = self.values();
        norm(&values[rank.min(values.len())..])
    }

    fn solve(&self, options: &CompensationOptions) -> Compensation {
        let (instance, pool) = (&self.instance, ThreadPool::global());
        eora(&instance.weight, &instance.quantized, &self.calibration, options, pool).unwrap()
    }

    /// `‖(Δ − B A) X‖`, measured on the inputs.
    fn left(&self, factors: Option<&LowRank>) -> f64 {
        let Some(factors) = factors else { return self.total };
        norm(&outputs(&repaired(&self.delta, factors), factors.in_features(), &self.instance.inputs))
    }
}

#[test]
fn the_error_reaches_the_optimum_on_every_case() {
    let mut limited_by_factors = Vec::new();
    for case in EORA_CASES {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let spoiled = outputs(&delta, case.columns, &instance.inputs);
        let original: Vec<f64> = instance.weight.to_f32().into_iter().map(f64::from).collect();
        let original = norm(&outputs(&original, case.columns, &instance.inputs));
        let values = singular_values(&spoiled, case.rows, case.tokens);
        let optimum = norm(&values[case.rank.min(values.len())..]);
        let total = norm(&spoiled);

        let solved = eora(
            &instance.weight,
            &instance.quantized,
            &calibration,
            &options(case.rank, ElementType::F32),
            ThreadPool::global(),
        )
        .unwrap();
        let Some(factors) = &solved.factors else {
            assert_eq!(total, 0.0, "{case:?} has something to repair");
            continue;
        };
        let left = norm(&outputs(&repaired(&delta, factors), case.columns, &instance.inputs));
        // Where Δ X cancels (fewer tokens than channels), even f32 cannot hold factors of that precision.
        let rounding = f64::from(f32::EPSILON) / 2.0 * norm(&magnitudes(factors, &instance.inputs));
        assert!(
            left <= optimum * (1.0 + 1e-6) + f64::max(1e-7 * total, rounding.min(2e-7 * total)),
            "{case:?}: {left:e} instead of {optimum:e} of {total:e}, rounding of factors up to {rounding:e}"
        );
        if left > optimum * (1.0 + 1e-6) + 1e-7 * total {
            limited_by_factors.push(case);
        }

        // What the report says is what the inputs say: up to the rounding of energies, the squares of the errors.
        let near = |reported: f64, measured: f64| {
            (reported - measured / original).abs() <= 1e-6 * measured / original + 1e-7 * total / original
        };
        assert!(near(solved.error.quantized, total), "{case:?}: {:?} {}", solved.error, total / original);
        assert!(near(solved.error.compensated, left), "{case:?}: {:?} {}", solved.error, left / original);
        assert!(near(solved.error.bound, optimum), "{case:?}: {:?} {}", solved.error, optimum / original);
        let alone = residual_error(&instance.weight, &instance.quantized, &calibration, ThreadPool::global());
        assert!((alone / solved.error.quantized - 1.0).abs() < 1e-9);
    }
    assert!(limited_by_factors.len() <= 1, "{limited_by_factors:?}");
}

/// Inputs of four kinds, and none of them may come out worse with rounded factors than without.
#[test]
fn no_input_is_made_worse_after_rounding_to_bf16() {
    let mut tried = 0;
    for case in EORA_CASES {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let bf16 = options(case.rank, ElementType::Bf16);
        let solved = eora(&instance.weight, &instance.quantized, &calibration, &bf16, ThreadPool::global()).unwrap();
        let Some(factors) = &solved.factors else { continue };
        let after = repaired(&delta, factors);
        for (kind, x) in probes(case, &instance, factors) {
            let (before, after) = (norm(&outputs(&delta, case.columns, &x)), norm(&outputs(&after, case.columns, &x)));
            assert!(after <= (1.0 + 1e-3) * before, "{case:?} {kind}: {after:e} instead of {before:e}");
            tried += 1;
        }
    }
    assert!(tried >= 10_000, "only {tried} inputs were tried");
}

fn probes(case: &EoraCase, instance: &EoraInstance, factors: &LowRank) -> Vec<(&'static str, Vec<f32>)> {
    let k = case.columns;
    let mut random = Random::new(case.rows + 1000 * k);
    let mut probes = Vec::new();
    probes.extend(instance.inputs.chunks_exact(k).take(100).map(|x| ("calibration", x.to_vec())));
    for scale in [1.0, 1e-20, 1e20] {
        probes.extend((0..30).map(|_| ("gaussian", random.normals(k).iter().map(|z| (z * scale) as f32).collect())));
    }
    probes.extend((0..k).map(|j| ("one-hot", (0..k).map(|i| f32::from(u8::from(i == j))).collect())));
    for a in factors.a().chunks_exact(k) {
        // Where the correction answers loudest, and the signs that make it add up.
        probes.push(("row of A", a.to_vec()));
        probes.push(("signs of A", a.iter().map(|a| a.signum()).collect()));
    }
    probes
}

#[test]
fn the_metric_of_the_inputs_beats_the_plain_svd() {
    for case in EORA_CASES.iter().filter(|case| matches!(case.inputs, Inputs::Outliers(factor) if factor < 1e4)) {
        let instance = case.instance();
        let delta = residual(&instance);
        let real = calibrate(&instance.inputs, case.columns);
        // White inputs make the second moment the identity: then EoRA is the truncated SVD of the residual.
        let identity: Vec<f32> =
            (0..case.columns * case.columns).map(|i| f32::from(u8::from(i % (case.columns + 1) == 0))).collect();
        let white = calibrate(&identity, case.columns);
        let solve = |calibration: &Calibration| {
            let options = options(case.rank, ElementType::F32);
            eora(&instance.weight, &instance.quantized, calibration, &options, ThreadPool::global()).unwrap()
        };
        let plain = solve(&white);
        let values = singular_values(&delta, case.rows, case.columns);
        let plain_residual = repaired(&delta, plain.factors.as_ref().unwrap());
        let optimum = norm(&values[case.rank.min(values.len())..]);
        assert!((norm(&plain_residual) - optimum).abs() <= 1e-6 * norm(&delta), "{case:?}");

        let left = |delta: &[f64]| norm(&outputs(delta, case.columns, &instance.inputs));
        let weighted = repaired(&delta, solve(&real).factors.as_ref().unwrap());
        assert!(left(&weighted) <= left(&plain_residual), "{case:?}");
        if !matches!(case.damage, Damage::LowRank(_)) && case.rank < case.rows.min(case.columns) {
            assert!(left(&weighted) < 0.999 * left(&plain_residual), "{case:?}");
            assert!(norm(&weighted) > norm(&plain_residual), "{case:?}: both metrics cannot be optimal at once");
        }
    }
}

#[test]
fn a_prefix_is_the_solution_of_the_smaller_rank() {
    for case in EORA_CASES.iter().filter(|case| case.rank >= 8) {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        for factor_type in [ElementType::Bf16, ElementType::F32] {
            let solve = |rank| {
                let options = options(rank, factor_type);
                eora(&instance.weight, &instance.quantized, &calibration, &options, ThreadPool::global()).unwrap()
            };
            let (large, small) = (solve(case.rank), solve(3));
            let (large, small) = (large.factors.unwrap(), small.factors.unwrap());
            assert_eq!(large.prefix(small.rank()), small, "{case:?}");
            for column in 0..small.rank() {
                let column = small.b().iter().skip(column).step_by(small.rank());
                let (top, bottom) = column.fold((0.0f32, 0.0f32), |(top, bottom), &v| (v.max(top), v.min(bottom)));
                assert!(top >= -bottom, "signs are fixed");
            }
        }
    }
}

#[test]
fn ranks_are_clamped_to_what_the_residual_has() {
    let find = |damage: Damage| *EORA_CASES.iter().find(|case| case.damage == damage).unwrap();
    let rank = |case: EoraCase| {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let options = options(case.rank, ElementType::F32);
        let solved = eora(&instance.weight, &instance.quantized, &calibration, &options, ThreadPool::global()).unwrap();
        solved.factors.unwrap().rank()
    };
    let few_tokens = EORA_CASES.iter().find(|case| case.tokens < case.rank && case.tokens > 5).unwrap();
    assert_eq!(rank(EoraCase { rank: 1000, ..find(Damage::Rounded(2)) }), 96);
    assert_eq!(rank(EoraCase { rows: 6, rank: 1000, ..find(Damage::Rounded(2)) }), 6);
    assert_eq!(rank(EoraCase { columns: 1, rank: 1000, ..find(Damage::Rounded(2)) }), 1);
    // Noise directions above the clamp may stay, but not all that were asked for.
    assert!(rank(EoraCase { rank: 90, ..find(Damage::LowRank(5)) }) < 60);
    assert!(rank(*few_tokens) >= few_tokens.tokens);
}

#[test]
fn nothing_to_repair_gives_no_factors() {
    let case = EORA_CASES[0];
    let instance = case.instance();
    let pool = ThreadPool::global();
    let calibration = calibrate(&instance.inputs, case.columns);
    let same = DenseMatrix::from_f32(case.rows, case.columns, instance.quantized.to_f32());
    let solved = eora(&same, &instance.quantized, &calibration, &CompensationOptions::default(), pool).unwrap();
    assert!(solved.factors.is_none());
    assert_eq!((solved.error.quantized, solved.error.compensated, solved.error.bound), (0.0, 0.0, 0.0));

    // Inputs that are all zero: no output, no error, and no division by it.
    let silent = calibrate(&vec![0.0; 10 * case.columns], case.columns);
    let solved = eora(&instance.weight, &instance.quantized, &silent, &CompensationOptions::default(), pool).unwrap();
    assert!(solved.factors.is_none());
    assert_eq!((solved.error.quantized, solved.error.compensated, solved.error.bound), (0.0, 0.0, 0.0));

    // Rank zero reports the error and nothing else.
    let solved =
        eora(&instance.weight, &instance.quantized, &calibration, &options(0, ElementType::Bf16), pool).unwrap();
    assert!(solved.factors.is_none());
    assert!(solved.error.quantized > 0.0 && solved.error.compensated == solved.error.quantized);
    assert!((solved.error.bound / solved.error.quantized - 1.0).abs() < 1e-9);

    // A weight without output whose compressed form has some: the absolute error stands.
    let zero = DenseMatrix::from_f32(case.rows, case.columns, vec![0.0; case.rows * case.columns]);
    let solved = eora(&zero, &instance.quantized, &calibration, &CompensationOptions::default(), pool).unwrap();
    let energy = output_energy(&instance.quantized.to_f32(), case.rows, &calibration, pool);
    assert!((solved.error.quantized / energy.sqrt() - 1.0).abs() < 1e-9);
}

#[test]
fn input_that_does_not_belong_together_or_is_broken_is_refused() {
    let case = EORA_CASES[0];
    let instance = case.instance();
    let pool = ThreadPool::global();
    let calibration = calibrate(&instance.inputs, case.columns);
    let code = |weight: &DenseMatrix, calibration: &Calibration, factor_type| {
        let options = options(4, factor_type);
        eora(weight, &instance.quantized, calibration, &options, pool).err().map(|error| error.code)
    };
    let bf16 = ElementType::Bf16;
    assert_eq!(code(&instance.weight, &calibration, bf16), None);
    let mut values = instance.weight.to_f32();
    let narrow = DenseMatrix::from_f32(case.rows, case.columns - 1, values[case.rows..].to_vec());
    assert_eq!(code(&narrow, &calibration, bf16), Some(ErrorCode::ShapeMismatch));
    let narrow = calibrate(&[1.0; 40], 40);
    assert_eq!(code(&instance.weight, &narrow, bf16), Some(ErrorCode::ShapeMismatch));
    let large = values.iter().map(|value| value * 1e8).collect();
    let large = DenseMatrix::from_f32(case.rows, case.columns, large);
    assert_eq!(code(&large, &calibration, ElementType::F16), Some(ErrorCode::ValueNotFinite));
    assert_eq!(code(&large, &calibration, bf16), None);
    values[7] = f32::NAN;
    let broken = DenseMatrix::from_f32(case.rows, case.columns, values);
    assert_eq!(code(&broken, &calibration, bf16), Some(ErrorCode::ValueNotFinite));
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in EORA_CASES.iter().filter(|case| case.rows.max(case.columns) >= 130) {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let solve = |threads| {
            let pool = ThreadPool::with_threads(threads);
            let options = options(case.rank, ElementType::F32);
            let solved = eora(&instance.weight, &instance.quantized, &calibration, &options, &pool).unwrap();
            (solved.factors, solved.error)
        };
        let one = solve(1);
        assert_eq!(one, solve(2));
        assert_eq!(one, solve(5));
    }
}

#[test]
fn the_iterated_solver_is_within_its_certificate_of_the_optimum() {
    let mut typical = 0;
    for case in ITERATED_EORA_CASES {
        let problem = Solvable::new(case);
        let options = CompensationOptions { method: &Fast, ..options(case.rank, ElementType::F32) };
        let solved = problem.solve(&options);
        let (left, optimum, total) = (problem.left(solved.factors.as_ref()), problem.optimum(case.rank), problem.total);
        let factors = solved.factors.as_ref().unwrap();
        // What f32 cannot hold of factors whose product cancels on the inputs.
        let rounding = f64::from(f32::EPSILON) / 2.0 * norm(&magnitudes(factors, &problem.instance.inputs));
        let slack = 1e-7 * total + rounding;
        assert!(left <= optimum * (1.0 + 1e-3) + slack, "{case:?}: {left:e}, {optimum:e} of {total:e}");
        typical += usize::from(left <= optimum * (1.0 + 1e-4) + slack);
        let certificate = solved.certificate.unwrap();
        assert!(certificate.holds, "{case:?}: {certificate:?}");
        // The bound that it proves is one: below the optimum, and no lower than it says.
        let original: Vec<f64> = problem.instance.weight.to_f32().into_iter().map(f64::from).collect();
        let original = norm(&outputs(&original, case.columns, &problem.instance.inputs));
        let (bound, reached) = (certificate.bound * original, certificate.solved * original);
        // Energies in f32 are relative to what there was.
        let rounding = if case.columns >= 512 && optimum > 0.2 * total { 1e-5 * total } else { 1e-7 * total };
        assert!(bound <= optimum + rounding, "{case:?}: {bound:e} above {optimum:e}");
        assert!(reached <= optimum * (1.0 + 1e-3) + rounding && reached >= optimum - rounding, "{case:?}");
    }
    assert!(typical * 10 >= ITERATED_EORA_CASES.len() * 9, "{typical}");
}

#[test]
fn every_method_reaches_its_own_optimum_and_eora_is_the_best_of_them() {
    for case in ITERATED_EORA_CASES.iter().chain(EORA_CASES.iter().step_by(3)) {
        let problem = Solvable::new(case);
        let solve = |method: &'static dyn CompensationMethod| {
            problem.solve(&CompensationOptions { method, ..options(case.rank, ElementType::F32) })
        };
        let best = problem.left(solve(&Exact).factors.as_ref());
        for method in METHODS {
            let solved = solve(method);
            let left = problem.left(solved.factors.as_ref());
            let slack = 3e-7 * problem.total;
            assert!(best <= left * (1.0 + 1e-9) + slack, "{case:?} {}: {left:e} {best:e}", method.name());
            assert!(left <= problem.total * (1.0 + 1e-9), "{case:?} {}", method.name());
            assert!(solved.error.bound <= solved.error.compensated, "{case:?} {}", method.name());
            assert_eq!(solved.certificate.is_some(), method.is_optimal());
        }
        // The baselines are the optimum where inputs are what they believe: every channel with its energy, or with one.
        let energies = problem.calibration.energies();
        let believed = |scale: &dyn Fn(usize) -> f64| {
            let scaled: Vec<f64> =
                problem.delta.iter().enumerate().map(|(at, value)| value * scale(at % case.columns)).collect();
            let values = singular_values(&scaled, case.rows, case.columns);
            (norm(&values[case.rank.min(values.len())..]), scaled)
        };
        for (method, scale) in [
            (&Diagonal as &dyn CompensationMethod, &(|j: usize| energies[j].sqrt()) as &dyn Fn(usize) -> f64),
            (&Lorc, &|_| 1.0),
        ] {
            let (optimum, scaled) = believed(scale);
            let Some(factors) = solve(if method.name() == "lorc" { &Lorc } else { &Diagonal }).factors else {
                continue;
            };
            let left = repaired(&problem.delta, &factors);
            let left: Vec<f64> = left.iter().enumerate().map(|(at, v)| v * scale(at % case.columns)).collect();
            let (left, total) = (norm(&left), norm(&scaled));
            assert!(left <= optimum * (1.0 + 1e-3) + 1e-6 * total, "{case:?} {}: {left:e} {optimum:e}", method.name());
        }
    }
}

#[test]
fn the_published_formula_gives_the_same_product() {
    let mut compared = 0;
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES) {
        let calm = matches!(case.inputs, Inputs::White | Inputs::PowerLaw(_)) && case.dead == 0;
        if !calm || case.tokens < 3 * case.columns || matches!(case.damage, Damage::LowRank(_)) {
            continue;
        }
        let problem = Solvable::new(case);
        let (m, k, rank) = (case.rows, case.columns, case.rank.min(case.rows).min(case.columns));
        // Of equal singular values any directions would do.
        let values = problem.values();
        let (edge, next) = (values[rank - 1], values.get(rank).copied().unwrap_or(0.0));
        if next > 0.98 * edge {
            continue;
        }
        // B' A' = [Δ Q Λ^½]_r, A = A' Λ^−½ Qᵀ (arXiv 2410.21271, algorithm 1).
        let eigen = SymmetricEigen::new(&problem.calibration.second_moment().to_symmetric(), k).unwrap();
        let root = |power: f64| -> Vec<f64> {
            (0..k * k).map(|at| eigen.vectors[at % k * k + at / k] * eigen.values[at % k].powf(power)).collect()
        };
        let pool = ThreadPool::global();
        let (up, down) = (root(0.5), root(-0.5));
        let mut whitened = vec![0.0; m * k];
        product(MatrixView::new(&problem.delta, m, k), MatrixView::new(&up, k, k), &mut whitened, pool);
        let svd = ThinSvd::new(&whitened, m, k).unwrap();
        let mut truncated = vec![0.0; m * k];
        for l in 0..rank {
            for (at, value) in truncated.iter_mut().enumerate() {
                *value += svd.left[l * m + at / k] * svd.values[l] * svd.right[l * k + at % k];
            }
        }
        let mut expected = vec![0.0; m * k];
        product(MatrixView::new(&truncated, m, k), MatrixView::new(&down, k, k).transposed(), &mut expected, pool);
        let Some(factors) = problem.solve(&options(case.rank, ElementType::F32)).factors else { continue };
        let kept = repaired(&problem.delta, &factors);
        let error: Vec<f64> = (0..m * k).map(|at| problem.delta[at] - kept[at] - expected[at]).collect();
        assert!(norm(&error) <= 1e-5 * norm(&expected), "{case:?}: {:e}", norm(&error) / norm(&expected));
        compared += 1;
    }
    assert!(compared >= 10, "{compared}");
}

/// `‖· X‖²` of independent errors of up to half a step in every value of both factors.
fn rounding_energy(factors: &LowRank, problem: &Solvable) -> f64 {
    let codes = factors.codes().unwrap();
    let (rank, columns) = (factors.rank(), factors.in_features());
    let energies = problem.calibration.energies();
    let a: Vec<f64> = factors.a().iter().map(|&value| f64::from(value)).collect();
    let tokens = problem.instance.inputs.len() / columns;
    let projected = outputs(&a, columns, &problem.instance.inputs);
    let of_direction: Vec<f64> = projected.chunks(tokens).map(|row| norm(row).powi(2)).collect();
    let step = |factor: &QuantizedMatrix, row, column| f64::from(factor.scales()[factor.scale_index(row, column)]);
    let of_a: f64 =
        (0..rank * columns).map(|at| step(&codes.a, at / columns, at % columns).powi(2) * energies[at % columns]).sum();
    let rows = factors.out_features();
    let of_b: f64 =
        (0..rows * rank).map(|at| step(&codes.b, at / rank, at % rank).powi(2) * of_direction[at % rank]).sum();
    (of_a + of_b) / 12.0
}

#[test]
fn coded_factors_cost_little_and_stay_nested() {
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES) {
        let problem = Solvable::new(case);
        let float = problem.solve(&options(case.rank, ElementType::Bf16));
        for bits in [8, 4] {
            let precision = FactorPrecision::Codes(bits);
            let solved = problem.solve(&CompensationOptions { precision, ..options(case.rank, ElementType::Bf16) });
            let Some(factors) = &solved.factors else { continue };
            let codes = factors.codes().unwrap();
            assert_eq!((codes.b.bits(), codes.a.bits(), factors.factor_type()), (bits, bits, ElementType::Bf16));
            let (left, total) = (problem.left(Some(factors)), problem.total);
            let float_left = problem.left(float.factors.as_ref());
            let allowed = float_left.powi(2) + 4.0 * rounding_energy(factors, &problem);
            assert!(left.powi(2) <= allowed, "{case:?} {bits}: {left} instead of {float_left}");
            assert!(
                left < total && (solved.error.compensated * total / solved.error.quantized - left).abs() < 1e-6 * total
            );
            // Every prefix is a compensation too, and the profile says what it leaves.
            for rank in [1, factors.rank() / 2, factors.rank()] {
                let energy = solved.profile.calibration[rank];
                let measured = problem.left(Some(&factors.prefix(rank)));
                assert!((energy.sqrt() - measured).abs() <= 1e-6 * total, "{case:?} {rank}: {energy:e} {measured:e}");
            }
        }
    }
}

#[test]
fn inputs_that_took_no_part_are_measured() {
    let case = EORA_CASES.iter().find(|case| case.damage == Damage::Feedback(3)).unwrap();
    let instance = case.instance();
    let (seen, unseen) = instance.inputs.split_at(400 * case.columns);
    let calibration = calibrate(seen, case.columns);
    let pool = ThreadPool::global();
    let hold_out = HoldOut::new(case.columns, unseen.to_vec());
    let options = options(case.rank, ElementType::Bf16);
    let solved =
        compensate(&instance.weight, &instance.quantized, &calibration, Some(&hold_out), &options, pool).unwrap();
    let profile = solved.profile.hold_out.unwrap();
    let factors = solved.factors.unwrap();
    assert_eq!((profile.tokens, profile.energies[0].len()), (100, factors.rank() + 1));
    let delta = residual(&instance);
    let weight: Vec<f64> = instance.weight.to_f32().into_iter().map(f64::from).collect();
    for (half, inputs) in unseen.chunks(100 * case.columns).enumerate() {
        let near = |found: f64, values: &[f64]| {
            let expected = norm(&outputs(values, case.columns, inputs));
            assert!((found.sqrt() - expected).abs() <= 1e-5 * expected, "{half}: {} {expected}", found.sqrt());
        };
        near(profile.original[half], &weight);
        for rank in [0, 1, factors.rank()] {
            near(profile.energies[half][rank], &repaired(&delta, &factors.prefix(rank)));
        }
    }
    let alone = eora(&instance.weight, &instance.quantized, &calibration, &options, pool).unwrap();
    assert_eq!(alone.factors.unwrap(), factors, "what is held out changes nothing");
}

#[test]
fn batches_orders_and_workers_do_not_matter() {
    for case in [EORA_CASES[7], EORA_CASES[20], ITERATED_EORA_CASES[9]] {
        let instance = case.instance();
        let pool = ThreadPool::global();
        let tokens: Vec<&[f32]> = instance.inputs.chunks_exact(case.columns).collect();
        let solve = |calibration: &Calibration| {
            let options = CompensationOptions { method: &Fast, ..options(case.rank, ElementType::F32) };
            let solved = eora(&instance.weight, &instance.quantized, calibration, &options, pool).unwrap();
            let delta = vec![0.0; case.rows * case.columns];
            repaired(&delta, &solved.factors.unwrap())
        };
        let expected = solve(&calibrate(&instance.inputs, case.columns));
        let mut variants: Vec<Calibration> = Vec::new();
        for batch in [1, 3, 8] {
            let mut builder = CalibrationBuilder::new(case.columns);
            tokens.chunks(batch).for_each(|batch| builder.push(&batch.concat(), pool).unwrap());
            variants.push(builder.finish(pool));
        }
        let reversed: Vec<f32> = tokens.iter().rev().flat_map(|row| row.iter().copied()).collect();
        variants.push(calibrate(&reversed, case.columns));
        for workers in 2..=4 {
            let parts = tokens.chunks(tokens.len().div_ceil(workers));
            let mut parts = parts.map(|part| calibrate(&part.concat(), case.columns));
            let mut sum = parts.next().unwrap();
            parts.for_each(|part| sum.merge(&part, 1.0).unwrap());
            variants.push(sum);
        }
        for calibration in &variants {
            let found = solve(calibration);
            let error: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
            assert!(norm(&error) <= 1e-6 * norm(&expected), "{case:?}: {:e}", norm(&error) / norm(&expected));
        }
    }
}

/// Says that it finds the best directions, and gives others.
struct Liar;

impl CompensationMethod for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn is_optimal(&self) -> bool {
        true
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let mut found = Fast.directions(residual, rank, pool)?;
        // The first two mixed up with the wrong sign: no longer orthogonal to each other.
        let rows = residual.rows();
        for row in 0..rows {
            found.vectors[rows + row] = 0.8 * found.vectors[rows + row] - 0.6 * found.vectors[row];
        }
        Ok(found)
    }
}

#[test]
fn a_certificate_is_about_the_directions_and_not_about_what_is_said_of_them() {
    for case in [&ITERATED_EORA_CASES[0], &ITERATED_EORA_CASES[10], &EORA_CASES[2]] {
        let problem = Solvable::new(case);
        let rank = case.rank.max(2);
        let solve = |method: &'static dyn CompensationMethod| {
            problem.solve(&CompensationOptions { method, ..options(rank, ElementType::F32) }).certificate.unwrap()
        };
        assert!(solve(&Fast).holds && solve(&Exact).holds);
        assert!(!solve(&Liar).holds, "{case:?}");
    }
}
