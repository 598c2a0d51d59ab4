use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, WeightMatrix};

/// Outputs of the matrices.
const OUTPUTS: usize = 4096;
const ROUNDS: usize = 9;
const RTLD_NOW_GLOBAL: c_int = 0x102;

type Pointer = *mut c_void;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> Pointer;
    fn dlsym(library: Pointer, name: *const c_char) -> Pointer;
}

#[repr(C)]
struct InitParams {
    mem_size: usize,
    mem_buffer: Pointer,
    no_alloc: bool,
}

/// A function of a library by its name.
macro_rules! function {
    ($library:expr, $name:literal: ($($argument:ty),*) $(-> $result:ty)?) => {{
        let name = CString::new($name).expect("names have no zero bytes");
        // SAFETY: the library is open, and the function has this signature in ggml's headers.
        unsafe {
            let symbol = dlsym($library, name.as_ptr());
            assert!(!symbol.is_null(), "there is no {}", $name);
            std::mem::transmute::<Pointer, unsafe extern "C" fn($($argument),*) $(-> $result)?>(symbol)
        }
    }};
}

/// ggml's CPU backend.
struct Ggml {
    base: Pointer,
    backend: Pointer,
    repack: Option<Pointer>,
}

/// Products with matrices in one of ggml's formats.
struct GgmlProducts<'a> {
    ggml: &'a Ggml,
    matrices: Vec<Pointer>,
    inputs: usize,
}

fn open(path: &Path) -> Pointer {
    let name = CString::new(path.to_str().expect("a path in UTF-8")).expect("paths have no zero bytes");
    // SAFETY: the name is a string; what the library does when it is loaded is ggml's affair.
    let library = unsafe { dlopen(name.as_ptr(), RTLD_NOW_GLOBAL) };
    assert!(!library.is_null(), "{} cannot be opened", path.display());
    library
}

impl Ggml {
    fn open(folder: &Path, library: &str, threads: usize) -> Ggml {
        let base = open(&folder.join("libggml-base.so"));
        let loader = std::fs::read_dir(folder)
            .expect("the folder of ggml's libraries")
            .filter_map(|entry| entry.ok())
            .find(|entry| entry.file_name().to_string_lossy().starts_with("libggml.v"))
            .expect("libggml.v*.so");
        let loader = open(&loader.path());
        let path = CString::new(folder.join(library).to_str().expect("a path in UTF-8")).expect("no zero bytes");
        let load = function!(loader, "ggml_backend_load": (*const c_char) -> Pointer);
        let device_of = function!(base, "ggml_backend_reg_dev_get": (Pointer, usize) -> Pointer);
        let procedure = function!(base, "ggml_backend_reg_get_proc_address": (Pointer, *const c_char) -> Pointer);
        let init = function!(base, "ggml_backend_dev_init": (Pointer, *const c_char) -> Pointer);
        let name_of = function!(base, "ggml_backend_buft_name": (Pointer) -> *const c_char);
        // SAFETY: the order of calls is that of ggml's own programs, and the types are those of its headers.
        unsafe {
            let registry = load(path.as_ptr());
            assert!(!registry.is_null(), "{library} does not run on this CPU");
            let device = device_of(registry, 0);
            let backend = init(device, std::ptr::null());
            let set_threads = procedure(registry, c"ggml_backend_set_n_threads".as_ptr());
            std::mem::transmute::<Pointer, unsafe extern "C" fn(Pointer, c_int)>(set_threads)(
                backend,
                threads as c_int,
            );
            let types = procedure(registry, c"ggml_backend_dev_get_extra_bufts".as_ptr());
            let mut types =
                std::mem::transmute::<Pointer, unsafe extern "C" fn(Pointer) -> *const Pointer>(types)(device);
            let mut repack = None;
            while !types.is_null() && !(*types).is_null() {
                if CStr::from_ptr(name_of(*types)) == c"CPU_REPACK" {
                    repack = Some(*types);
                }
                types = types.add(1);
            }
            Ggml { base, backend, repack }
        }
    }

    fn context(&self) -> Pointer {
        let init = function!(self.base, "ggml_init": (InitParams) -> Pointer);
        // SAFETY: ggml allocates the memory.
        unsafe { init(InitParams { mem_size: 16 << 20, mem_buffer: std::ptr::null_mut(), no_alloc: true }) }
    }

    /// `count` times the same matrix, `[OUTPUTS, inputs]`; `interleaved` where ggml interleaves the rows of the format on x86.
    fn products(&self, kind: c_int, interleaved: bool, weight: &[f32], count: usize) -> GgmlProducts<'_> {
        let tensor = function!(self.base, "ggml_new_tensor_2d": (Pointer, c_int, i64, i64) -> Pointer);
        let row_size = function!(self.base, "ggml_row_size": (c_int, i64) -> usize);
        let quantize = function!(self.base, "ggml_quantize_chunk": (c_int, *const f32, Pointer, i64, i64, i64, *const f32) -> usize);
        let set = function!(self.base, "ggml_backend_tensor_set": (Pointer, *const c_void, usize, usize));
        let allocate = function!(self.base, "ggml_backend_alloc_ctx_tensors": (Pointer, Pointer) -> Pointer);
        let allocate_as =
            function!(self.base, "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, Pointer) -> Pointer);
        let (outputs, inputs) = (OUTPUTS as i64, (weight.len() / OUTPUTS) as i64);
        let context = self.context();
        // SAFETY: as in `open`; the chunk has room for the quantized matrix.
        unsafe {
            let matrices: Vec<Pointer> = (0..count).map(|_| tensor(context, kind, inputs, outputs)).collect();
            match self.repack.filter(|_| interleaved) {
                Some(repack) => allocate_as(context, repack),
                None => allocate(context, self.backend),
            };
            let mut chunk = vec![0u8; row_size(kind, inputs) * OUTPUTS];
            quantize(kind, weight.as_ptr(), chunk.as_mut_ptr().cast(), 0, outputs, inputs, std::ptr::null());
            matrices.iter().for_each(|&matrix| set(matrix, chunk.as_ptr().cast(), 0, chunk.len()));
            GgmlProducts { ggml: self, matrices, inputs: weight.len() / OUTPUTS }
        }
    }
}

impl GgmlProducts<'_> {
    /// The products of `x`, `[rows, inputs]`, with the first `count` matrices, as a function that computes them and one that
    /// gives the first.
    fn graph(&self, x: &[f32], count: usize) -> (impl Fn() + use<'_>, impl Fn() -> Vec<f32> + use<'_>) {
        let base = self.ggml.base;
        let tensor = function!(base, "ggml_new_tensor_2d": (Pointer, c_int, i64, i64) -> Pointer);
        let multiply = function!(base, "ggml_mul_mat": (Pointer, Pointer, Pointer) -> Pointer);
        let new_graph = function!(base, "ggml_new_graph": (Pointer) -> Pointer);
        let expand = function!(base, "ggml_build_forward_expand": (Pointer, Pointer));
        let allocate = function!(base, "ggml_backend_alloc_ctx_tensors": (Pointer, Pointer) -> Pointer);
        let set = function!(base, "ggml_backend_tensor_set": (Pointer, *const c_void, usize, usize));
        let get = function!(base, "ggml_backend_tensor_get": (Pointer, Pointer, usize, usize));
        let compute = function!(base, "ggml_backend_graph_compute": (Pointer, Pointer) -> c_int);
        let (context, rows) = (self.ggml.context(), x.len() / self.inputs);
        // SAFETY: as in `open`.
        let (graph, first) = unsafe {
            let input = tensor(context, 0, self.inputs as i64, rows as i64);
            let graph = new_graph(context);
            let products: Vec<Pointer> =
                self.matrices[..count].iter().map(|&matrix| multiply(context, matrix, input)).collect();
            products.iter().for_each(|&product| expand(graph, product));
            allocate(context, self.ggml.backend);
            set(input, x.as_ptr().cast(), 0, size_of_val(x));
            (graph, products[0])
        };
        let backend = self.ggml.backend;
        // SAFETY: the graph has memory and inputs.
        let run = move || assert_eq!(unsafe { compute(backend, graph) }, 0, "ggml failed");
        let result = move || {
            let mut y = vec![0.0f32; rows * OUTPUTS];
            // SAFETY: the product has as many values.
            unsafe { get(first, y.as_mut_ptr().cast(), 0, size_of_val(y.as_slice())) };
            y
        };
        (run, result)
    }
}

/// Prints how long both take.
pub(crate) fn run() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [folder, library, rows @ ..] = &arguments[..] else { return };
    let (inputs, rows): (Vec<&String>, Vec<&String>) =
        rows.iter().partition(|argument| argument.starts_with("inputs="));
    let inputs = inputs.first().map_or(4096, |inputs| inputs["inputs=".len()..].parse().expect("a number of inputs"));
    let rows: Vec<usize> = match &rows[..] {
        [] => vec![1, 2, 4, 8, 128, 512],
        rows => rows.iter().map(|rows| rows.parse().expect("a number of rows")).collect(),
    };
    const MATRICES: usize = 24;
    let pool = ThreadPool::global();
    let kernels = Kernels::selected().expect("a level of this machine");
    let weight = matrices::weights(1, OUTPUTS, inputs);
    let ours: Vec<(String, Vec<PackedMatrix>)> = [
        (Precision::Fast, 4, 128),
        (Precision::Fast, 4, 64),
        (Precision::Fast, 4, 32),
        (Precision::Exact, 4, 128),
        (Precision::F32, 4, 128),
        (Precision::Fast, 8, 32),
    ]
    .into_iter()
    .map(|(precision, bits, group)| {
        let columns = GroupSize::Columns(group);
        let matrix = matrices::quantized(1, OUTPUTS, inputs, bits, columns, true, ElementType::F16, false);
        let weight = LinearWeight::plain(WeightMatrix::Quantized(matrix));
        let packed = kernels.pack(&weight, precision, pool).expect("the matrix is well-formed");
        (format!("{precision:?} int{bits} g{group}").to_lowercase(), vec![packed; MATRICES])
    })
    .collect();
    let ggml = Ggml::open(Path::new(folder), library, pool.threads());
    let theirs = [("Q4_0", 2, true), ("Q4_K", 12, true), ("Q8_0", 8, false)]
        .map(|(name, kind, interleaved)| (name, ggml.products(kind, interleaved, &weight, MATRICES)));
    println!("{} threads, level {}, {library}", pool.threads(), kernels.level().name());
    for rows in rows {
        let count = if rows > 64 { 2 } else { MATRICES };
        let x = matrices::activations(1, rows, inputs);
        let mut y = vec![0.0; rows * OUTPUTS];
        let graphs: Vec<_> = theirs.iter().map(|(name, products)| (*name, products.graph(&x, count))).collect();
        for (name, (run, result)) in &graphs {
            run();
            let error = distance(&result(), &weight, &x);
            assert!(error < 0.4, "ggml {name} is {error} away from the product");
        }
        let mut seconds = vec![Vec::new(); ours.len() + graphs.len()];
        for _ in 0..ROUNDS {
            let (own, other) = seconds.split_at_mut(ours.len());
            for ((_, matrices), seconds) in ours.iter().zip(own) {
                let start = Instant::now();
                matrices[..count].iter().for_each(|matrix| kernels.product(matrix, &x, &mut y, pool));
                seconds.push(start.elapsed().as_secs_f64() / count as f64);
                black_box(&y);
            }
            for ((_, (run, _)), seconds) in graphs.iter().zip(other) {
                let start = Instant::now();
                run();
                seconds.push(start.elapsed().as_secs_f64() / count as f64);
            }
        }
        println!("\n{OUTPUTS}×{inputs}, {rows} rows: median, shortest, longest");
        let names =
            ours.iter().map(|(name, _)| name.clone()).chain(graphs.iter().map(|(name, _)| format!("ggml {name}")));
        let mut own = 0.0;
        for (name, seconds) in names.zip(&mut seconds) {
            seconds.sort_by(f64::total_cmp);
            let [low, median, high] = [seconds[0], seconds[ROUNDS / 2], seconds[ROUNDS - 1]].map(|value| value * 1e3);
            if own == 0.0 {
                own = median;
            }
            let rate = 2.0 * (rows * OUTPUTS * inputs) as f64 / median / 1e6;
            println!("  {name:<16} {median:8.3} ms {low:8.3} {high:8.3} {rate:7.0} GOP/s {:6.2}×", median / own);
        }
    }
}

/// How far the first outputs of the first row are from the product, as a share of their size.
fn distance(y: &[f32], weight: &[f32], x: &[f32]) -> f64 {
    let rows = y.len() / OUTPUTS;
    let (mut difference, mut size) = (0.0, 0.0);
    for (y, row) in y[..256].iter().zip(weight.chunks_exact(x.len() / rows)) {
        let exact: f64 = row.iter().zip(&x[..x.len() / rows]).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        difference += (f64::from(*y) - exact).powi(2);
        size += exact.powi(2);
    }
    (difference / size).sqrt()
}
