//! Products that every CPU level must get right, with the error that each may have and why.

use half::{bf16, f16};
use kintsugi_weights::{
    CodeTable, DenseMatrix, DenseValues, ElementType, FactorCodes, GroupAxis, GroupSize, LinearWeight, LowRank,
    QuantizedMatrix, WeightMatrix, reference_product,
};

use crate::{Random, matrices};

/// Numbers of rows of x to try each case with: on both sides of every tile size.
pub const ROW_COUNTS: [usize; 8] = [1, 2, 3, 5, 8, 9, 17, 33];

/// Which numbers the codes of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Grid {
    /// Integers around half their range.
    Symmetric,
    /// Integers around zero points.
    ZeroPoints,
    /// Integers, and a float offset per group.
    Offsets,
    /// A table of values, by this name.
    Table(&'static str, CodeTable),
    /// As `ZeroPoints`, with groups along the outputs.
    OutputGroups,
}

/// How the main matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    /// Plain floats.
    Dense(ElementType),
    /// Codes on an integer grid.
    Integer {
        /// Width of a code.
        bits: u8,
        /// Columns per scale.
        group_size: GroupSize,
        /// Where zero lies, or what codes stand for.
        grid: Grid,
        /// The type of the scales.
        scale_type: ElementType,
        /// Whether columns are dealt out to groups out of order.
        group_index: bool,
    },
}

/// How the factors of the compensation are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factors {
    /// Plain floats.
    Dense(ElementType),
    /// Codes on a symmetric grid, with scales in f16.
    Codes {
        /// Width of a code.
        bits: u8,
        /// Ranks (B) or inputs (A) per scale.
        group_size: usize,
    },
}

/// What is unusual about the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weights {
    /// Nothing.
    Realistic,
    /// Every third row is zero.
    ZeroRows,
    /// Smaller than the smallest normal number of the type (dense), or scales that are (integer).
    Subnormal,
}

/// What is unusual about x.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    /// Nothing: power-law channels with outliers.
    Realistic,
    /// ±60,000 in every channel.
    Large,
    /// Smaller than the smallest normal f32.
    Subnormal,
    /// One channel at 10,000, all others at 0.001.
    Spike,
}

/// The largest error that an output may have: `relative · `[`KernelCase::magnitudes`]` + absolute · columns`, and
/// for precision `exact` also `activations · Σ|w||x|`. So a case with cancellation is judged fairly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Share of the sizes of everything that is added.
    pub relative: f64,
    /// Per column.
    pub absolute: f64,
    /// Share of Σ|w||x| that is lost when x is rounded to bf16.
    pub activations: f64,
    /// Why it is that large.
    pub reason: &'static str,
}

/// One product.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelCase {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// The main matrix.
    pub format: Format,
    /// Rank of the compensation, 0 for none.
    pub rank: usize,
    /// Its factors.
    pub factors: Factors,
    /// Whether there is a bias.
    pub bias: bool,
    /// The numbers in the matrix.
    pub weights: Weights,
    /// The numbers in x.
    pub inputs: Inputs,
    /// The error that its products may have.
    pub budget: Budget,
}

/// The worst of the table is 1.2e-6 where a spike comes before many small products, and 6e-7 elsewhere.
const BUDGET: Budget = Budget {
    relative: 1.5e-6,
    absolute: 1e-45,
    activations: 1.0 / 256.0,
    reason: "f32 sums of up to 512 products, then of the blocks: about √512 · 2^−24, and one subnormal per column; \
             bf16 has 8 significant bits",
};

/// `vdpbf16ps` takes subnormal factors as zero, and products below 2^−126.
const FLUSHED: f64 = 1e-37;

impl KernelCase {
    fn new(rows: usize, columns: usize, format: Format) -> Self {
        KernelCase {
            rows,
            columns,
            format,
            rank: 0,
            factors: Factors::Dense(ElementType::Bf16),
            bias: false,
            weights: Weights::Realistic,
            inputs: Inputs::Realistic,
            budget: BUDGET,
        }
    }

    fn low_rank(self, rank: usize, factor_type: ElementType) -> Self {
        KernelCase { rank, factors: Factors::Dense(factor_type), ..self }
    }

    fn coded_low_rank(self, rank: usize, bits: u8, group_size: usize) -> Self {
        KernelCase { rank, factors: Factors::Codes { bits, group_size }, ..self }
    }

    fn with_bias(self, bias: bool) -> Self {
        KernelCase { bias, ..self }
    }

    fn hostile(self, weights: Weights, inputs: Inputs) -> Self {
        let mut case = KernelCase { weights, inputs, ..self };
        if weights == Weights::Subnormal || inputs == Inputs::Subnormal {
            let reason = "bf16 products take subnormal factors and products below 2^−126 as zero";
            case.budget = Budget { absolute: FLUSHED, reason, ..case.budget };
        }
        case
    }

    /// What the case is, in a line.
    pub fn name(&self) -> String {
        let mut name = match self.format {
            Format::Dense(element) => element.name().to_string(),
            Format::Integer { bits, group_size, grid, scale_type, group_index } => {
                let group = match group_size {
                    GroupSize::Columns(columns) => columns.to_string(),
                    GroupSize::WholeRow => "row".to_string(),
                };
                let grid = match grid {
                    Grid::Symmetric => "symmetric",
                    Grid::ZeroPoints => "asymmetric",
                    Grid::Offsets => "offsets",
                    Grid::Table(name, _) => name,
                    Grid::OutputGroups => "along outputs",
                };
                let order = if group_index { " group index" } else { "" };
                format!("int{bits} group {group} {grid} {} scales{order}", scale_type.name())
            }
        };
        if self.rank > 0 {
            name += &match self.factors {
                Factors::Dense(element) => format!(" rank {} {}", self.rank, element.name()),
                Factors::Codes { bits, group_size } => format!(" rank {} int{bits} group {group_size}", self.rank),
            };
        }
        if self.bias {
            name += " bias";
        }
        if (self.weights, self.inputs) != (Weights::Realistic, Inputs::Realistic) {
            name += &format!(" weights {:?} inputs {:?}", self.weights, self.inputs);
        }
        format!("{name} {}×{}", self.rows, self.columns)
    }

    /// The Linear.
    pub fn weight(&self) -> LinearWeight {
        let seed = (self.rows * 1000 + self.columns) as u64;
        let matrix = match self.format {
            Format::Dense(element) => WeightMatrix::Dense(self.dense(seed, element)),
            Format::Integer { bits, group_size, grid, scale_type, group_index } => {
                let matrix = matrices::quantized(
                    seed,
                    self.rows,
                    self.columns,
                    bits,
                    group_size,
                    !matches!(grid, Grid::ZeroPoints | Grid::OutputGroups),
                    scale_type,
                    group_index,
                );
                WeightMatrix::Quantized(self.spoil(grid.apply(matrix)))
            }
        };
        let bias = self.bias.then(|| matrices::activations(seed + 1, 1, self.rows));
        let low_rank = (self.rank > 0).then(|| self.factors.matrices(seed + 2, self.rows, self.columns, self.rank));
        LinearWeight { matrix, bias, low_rank }
    }

    /// `count` rows of x.
    pub fn input(&self, count: usize) -> Vec<f32> {
        let mut random = Random::new(99);
        let mut sign = || if random.bits() & 1 == 0 { 1.0 } else { -1.0 };
        match self.inputs {
            Inputs::Realistic => matrices::activations(5, count, self.columns),
            Inputs::Large => (0..count * self.columns).map(|_| sign() * 6e4).collect(),
            Inputs::Subnormal => matrices::activations(5, count, self.columns).iter().map(|x| x * 1e-39).collect(),
            Inputs::Spike => (0..count * self.columns)
                .map(|i| sign() * if i % self.columns == self.columns / 2 { 1e4 } else { 1e-3 })
                .collect(),
        }
    }

    /// The product in f64, with the activations of the main matrix rounded to `activations` first.
    pub fn expected(weight: &LinearWeight, x: &[f32], activations: ElementType) -> Vec<f64> {
        if activations == ElementType::F32 {
            return reference_product(weight, x);
        }
        let rounded: Vec<f32> = x.iter().map(|&x| activations.round(x)).collect();
        Self::expected_of_rounded(weight, x, &rounded)
    }

    /// The product in f64, of the main matrix with `rounded` and of the low-rank part with `x`.
    pub fn expected_of_rounded(weight: &LinearWeight, x: &[f32], rounded: &[f32]) -> Vec<f64> {
        let whole = reference_product(weight, x);
        let main = LinearWeight { low_rank: None, ..weight.clone() };
        let main_rounded = reference_product(&main, rounded);
        let main = reference_product(&main, x);
        whole.iter().zip(main).zip(main_rounded).map(|((whole, main), rounded)| whole - main + rounded).collect()
    }

    /// Whether precision `fast` takes activations as int8: codes stand for integers.
    pub fn has_integer_codes(&self) -> bool {
        match self.format {
            Format::Dense(_) => false,
            Format::Integer { grid, .. } => !matches!(grid, Grid::OutputGroups | Grid::Table("nf4", _)),
        }
    }

    /// Σ|w||x| of each output, low-rank part and bias included.
    pub fn products(weight: &LinearWeight, x: &[f32]) -> Vec<f64> {
        Self::absolute_product(weight, weight.matrix.to_f32(), x)
    }

    /// What is added for each output: Σ|w||x|, but on grids with zero points or offsets `scale · |code − centre|` and
    /// the distance from that centre to zero in place of |w|, because kernels multiply x with both separately.
    pub fn magnitudes(weight: &LinearWeight, x: &[f32]) -> Vec<f64> {
        let matrix = match &weight.matrix {
            WeightMatrix::Quantized(matrix) if matrix.zero_points().is_some() || matrix.offsets().is_some() => {
                let centre = f32::from(1u16 << (matrix.bits() - 1));
                let mut sizes = Vec::with_capacity(matrix.codes().len());
                for (i, &code) in matrix.codes().iter().enumerate() {
                    let at = matrix.scale_index(i / matrix.columns(), i % matrix.columns());
                    let scale = matrix.scales()[at];
                    let origin = match matrix.offsets() {
                        Some(offsets) => centre.mul_add(scale, offsets[at]),
                        None => (centre - f32::from(matrix.zero_point(at))) * scale,
                    };
                    sizes.push((f32::from(code) - centre).abs() * scale.abs() + origin.abs());
                }
                sizes
            }
            matrix => matrix.to_f32(),
        };
        Self::absolute_product(weight, matrix, x)
    }

    /// The product of the absolute values, with another matrix in place of the weight's own.
    fn absolute_product(weight: &LinearWeight, matrix: Vec<f32>, x: &[f32]) -> Vec<f64> {
        let absolute = |values: &[f32]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
        let (rows, columns) = (weight.matrix.rows(), weight.matrix.columns());
        let magnitudes = LinearWeight {
            matrix: WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, absolute(&matrix))),
            bias: weight.bias.as_ref().map(|bias| absolute(bias)),
            low_rank: weight.low_rank.as_ref().map(|factors| {
                let (b, a) = (absolute(factors.b()), absolute(factors.a()));
                LowRank::new(rows, columns, factors.rank(), b, a, ElementType::F32)
            }),
        };
        reference_product(&magnitudes, &absolute(x))
    }

    fn dense(&self, seed: u64, element: ElementType) -> DenseMatrix {
        let mut values = matrices::weights(seed, self.rows, self.columns);
        for (row, values) in values.chunks_exact_mut(self.columns).enumerate() {
            for value in values {
                match self.weights {
                    Weights::Realistic => {}
                    Weights::ZeroRows => *value *= f32::from(u8::from(!row.is_multiple_of(3))),
                    Weights::Subnormal if element == ElementType::F16 => *value *= 1e-4,
                    Weights::Subnormal => *value *= 1e-38,
                }
            }
        }
        let values = match element {
            ElementType::F32 => DenseValues::F32(values),
            ElementType::F16 => DenseValues::F16(values.into_iter().map(f16::from_f32).collect()),
            ElementType::Bf16 => DenseValues::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        };
        DenseMatrix::new(self.rows, self.columns, values)
    }

    fn spoil(&self, matrix: QuantizedMatrix) -> QuantizedMatrix {
        let (groups, scale_type) = (matrix.groups(), matrix.scale_type());
        let mut parts = matrix.into_parts();
        for (i, scale) in parts.scales.iter_mut().enumerate() {
            match self.weights {
                Weights::Realistic => {}
                Weights::ZeroRows => *scale *= f32::from(u8::from(!(i / groups).is_multiple_of(3))),
                Weights::Subnormal if scale_type == ElementType::F16 => *scale = scale_type.round(*scale * 1e-3),
                Weights::Subnormal => *scale = scale_type.round(*scale * 1e-37),
            }
        }
        QuantizedMatrix::new(parts).expect("only scales have changed")
    }
}

impl Factors {
    /// Factors of an update of that shape.
    pub fn matrices(self, seed: u64, rows: usize, columns: usize, rank: usize) -> LowRank {
        match self {
            Factors::Dense(element) => {
                let (b, a) = (matrices::weights(seed, rows, rank), matrices::weights(seed + 1, rank, columns));
                LowRank::new(rows, columns, rank, b, a, element)
            }
            Factors::Codes { bits, group_size } => {
                let codes = |seed, rows, columns| {
                    let group_size = GroupSize::Columns(group_size);
                    matrices::quantized(seed, rows, columns, bits, group_size, true, ElementType::F16, false)
                };
                LowRank::of_codes(FactorCodes { b: codes(seed, rows, rank), a: codes(seed + 1, rank, columns) })
            }
        }
    }
}

impl Grid {
    /// Turns a matrix on a plain grid into one of this kind.
    fn apply(self, matrix: QuantizedMatrix) -> QuantizedMatrix {
        let mut parts = matrix.into_parts();
        match self {
            Grid::Symmetric | Grid::ZeroPoints => {}
            Grid::Offsets => {
                // Zero at a different place of each group, outside of the range at times.
                let origin = |(i, &scale): (usize, &f32)| parts.scale_type.round(scale * ((i % 7) as f32 * -1.7 - 0.3));
                parts.offsets = Some(parts.scales.iter().enumerate().map(origin).collect());
            }
            Grid::Table(_, table) => {
                let largest = table.values().iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                parts.scales.iter_mut().for_each(|scale| *scale = parts.scale_type.round(*scale * 8.0 / largest));
                parts.code_table = Some(table);
            }
            Grid::OutputGroups => {
                parts.group_axis = GroupAxis::Output;
                let count = parts.scale_count();
                parts.scales = parts.scales.iter().copied().cycle().take(count).collect();
                parts.zero_points = parts.zero_points.map(|zeros| zeros.iter().copied().cycle().take(count).collect());
            }
        }
        QuantizedMatrix::new(parts).expect("the parts are made to fit")
    }
}

const F32: ElementType = ElementType::F32;
const F16: ElementType = ElementType::F16;
const BF16: ElementType = ElementType::Bf16;

const fn integer(bits: u8, group_size: GroupSize, symmetric: bool, scale_type: ElementType) -> Format {
    let grid = if symmetric { Grid::Symmetric } else { Grid::ZeroPoints };
    Format::Integer { bits, group_size, grid, scale_type, group_index: false }
}

const fn on_grid(bits: u8, group_size: usize, grid: Grid, scale_type: ElementType) -> Format {
    Format::Integer { bits, group_size: GroupSize::Columns(group_size), grid, scale_type, group_index: false }
}

const fn reordered(bits: u8, group_size: usize, symmetric: bool, scale_type: ElementType) -> Format {
    let grid = if symmetric { Grid::Symmetric } else { Grid::ZeroPoints };
    Format::Integer { bits, group_size: GroupSize::Columns(group_size), grid, scale_type, group_index: true }
}

/// One of each kind of encoding and of arithmetic.
const FORMATS: [Format; 14] = [
    Format::Dense(F32),
    Format::Dense(F16),
    Format::Dense(BF16),
    integer(2, GroupSize::Columns(64), true, F16),
    integer(3, GroupSize::Columns(32), false, BF16),
    integer(3, GroupSize::WholeRow, true, F16),
    integer(4, GroupSize::Columns(32), false, F16),
    integer(5, GroupSize::Columns(64), true, F16),
    integer(6, GroupSize::Columns(128), false, BF16),
    integer(8, GroupSize::WholeRow, false, F32),
    on_grid(4, 32, Grid::Offsets, F32),
    on_grid(6, 16, Grid::Symmetric, F32),
    on_grid(4, 16, Grid::Table("fp4", CodeTable::FP4), F32),
    on_grid(4, 64, Grid::OutputGroups, F16),
];

/// Every case.
pub fn kernel_cases() -> Vec<KernelCase> {
    let mut cases = Vec::new();
    // Every grid, with the other properties in rotation.
    let ranks = [(0, BF16), (5, BF16), (16, F16), (0, F32), (16, BF16), (5, F32)];
    let mut turn = 0;
    for bits in [2, 3, 4, 5, 6, 8] {
        for group_size in [32, 64, 128, 256].map(GroupSize::Columns).into_iter().chain([GroupSize::WholeRow]) {
            for symmetric in [true, false] {
                let (rank, factor_type) = ranks[turn % ranks.len()];
                let scale_type = ElementType::ALL[turn / 2 % 3];
                let format = integer(bits, group_size, symmetric, scale_type);
                cases.push(KernelCase::new(100, 257, format).low_rank(rank, factor_type).with_bias(turn % 4 == 1));
                turn += 1;
            }
        }
        for (group_size, symmetric) in [(32, false), (32, true), (64, false), (128, true), (256, false)] {
            cases.push(KernelCase::new(33, 257, reordered(bits, group_size, symmetric, F16)).low_rank(5, BF16));
        }
        // Groups that are not whole steps of a panel.
        for group_size in [1, 3, 10, 50] {
            let group_size = GroupSize::Columns(group_size);
            cases.push(KernelCase::new(33, 100, integer(bits, group_size, false, F16)));
        }
    }
    // Groups that are cut into blocks of different lengths.
    for (rank, factor_type) in [(5, BF16), (40, F32)] {
        let uneven = [integer(4, GroupSize::Columns(192), true, F16), reordered(3, 160, false, F16)];
        cases.extend(uneven.map(|format| KernelCase::new(33, 400, format).low_rank(rank, factor_type)));
    }
    // Grids of block formats.
    for bits in [2, 3, 4, 5, 6, 8] {
        for (group_size, scale_type) in [(16, F32), (32, F16)] {
            cases.push(KernelCase::new(65, 300, on_grid(bits, group_size, Grid::Offsets, scale_type)));
            cases.push(KernelCase::new(65, 300, on_grid(bits, group_size, Grid::Symmetric, scale_type)));
        }
    }
    for (name, table) in [("fp4", CodeTable::FP4), ("nf4", CodeTable::NF4), ("iq4_nl", CodeTable::IQ4_NL)] {
        for (group_size, scale_type) in [(16, F32), (32, BF16), (64, F16)] {
            let format = on_grid(4, group_size, Grid::Table(name, table), scale_type);
            cases.push(KernelCase::new(65, 300, format).low_rank(5, BF16).with_bias(group_size == 64));
        }
    }
    // Every ragged shape.
    for format in FORMATS {
        for rows in [1, 31, 33, 100] {
            for columns in [1, 7, 33, 100, 257] {
                let rank = if (rows + columns) % 3 == 0 { 5 } else { 0 };
                cases.push(KernelCase::new(rows, columns, format).low_rank(rank, BF16).with_bias(rows == 31));
            }
        }
    }
    // Rows of several blocks, matrices of several tasks, ranks of several panels.
    for format in FORMATS {
        cases.push(KernelCase::new(300, 1100, format).low_rank(40, BF16).with_bias(true));
    }
    cases.push(KernelCase::new(64, 4096, integer(4, GroupSize::Columns(128), false, BF16)).low_rank(16, BF16));
    cases.extend(coded_factor_cases());
    // What hurts.
    for format in FORMATS {
        let case = || KernelCase::new(33, 257, format);
        cases.push(case().hostile(Weights::ZeroRows, Inputs::Realistic));
        cases.push(case().hostile(Weights::Subnormal, Inputs::Realistic));
        cases.push(case().hostile(Weights::Realistic, Inputs::Subnormal));
        cases.push(case().hostile(Weights::Realistic, Inputs::Large).low_rank(5, BF16));
        cases.push(case().hostile(Weights::Realistic, Inputs::Spike));
    }
    cases
}

/// Every width and group size of factors that are made of codes, in panels of every kind; ranks on both sides of a
/// step, a group and a panel.
pub fn coded_factor_cases() -> Vec<KernelCase> {
    let mains = [
        Format::Dense(BF16),
        integer(2, GroupSize::Columns(64), true, F16),
        integer(3, GroupSize::Columns(64), false, F16),
        integer(4, GroupSize::Columns(128), false, BF16),
        integer(5, GroupSize::Columns(32), false, F16),
        integer(6, GroupSize::Columns(128), true, BF16),
        integer(8, GroupSize::Columns(32), true, F32),
    ];
    let shapes = [(33, 257), (100, 100), (1, 65), (65, 300), (31, 129)];
    let mut turn = 0;
    let mut cases = Vec::new();
    for format in mains {
        for rank in [1, 7, 16, 33, 64, 130] {
            for (bits, group_size) in [(4, 32), (4, 64), (8, 32), (8, 64)] {
                let (rows, columns) = shapes[turn % shapes.len()];
                let case = KernelCase::new(rows, columns, format).coded_low_rank(rank, bits, group_size);
                cases.push(case.with_bias(turn % 4 == 1));
                turn += 1;
            }
        }
        // Several runs of columns, and several tasks.
        cases.push(KernelCase::new(300, 1100, format).coded_low_rank(40, 4, 32).with_bias(true));
    }
    cases
}
