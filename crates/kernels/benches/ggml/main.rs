//! Products beside those of ggml, in one process and in turn.
//!
//! `cargo bench -p kintsugi-kernels --bench ggml -- FOLDER LIBRARY [ROWS]... [inputs=N]`, where FOLDER holds
//! `libggml-base.so` and `libggml.v*.so` as the npm package `@node-llama-cpp/linux-x64` ships them (`bench/kernels`
//! installs it), LIBRARY is one of the `libggml-cpu-*.so` in it, N is 4096 if not given, and `KINTSUGI_THREADS` is the
//! number of threads of both. Without arguments it does nothing.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]
#![allow(unsafe_code, reason = "ggml is a C library")]

#[cfg(unix)]
mod comparison;

#[cfg(unix)]
fn main() {
    comparison::run();
}

#[cfg(not(unix))]
fn main() {
    println!("ggml is loaded with dlopen: this bench is for Unix");
}
