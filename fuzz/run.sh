#!/usr/bin/env bash
# Runs a fuzz target on stable Rust: fuzz/run.sh TARGET [RUNS]. Stops at the first crash, hang or large allocation.
set -euo pipefail
cd "$(dirname "$0")"
target="${1:?give the name of a target in fuzz/targets}"
runs="${2:-1000000}"
host="$(rustc -vV | sed -n 's/^host: //p')"
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$PWD/target"
export RUSTFLAGS="-Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
cargo build --release --quiet --target "$host" --bin "$target"
mkdir -p "target/corpus/$target" artifacts
# New inputs go to target/, seeds stay as they are. A file of a megabyte may not make a reader take a gigabyte.
exec "target/$host/release/$target" "target/corpus/$target" "corpus/$target" \
  -runs="$runs" -max_len=65536 -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=256 \
  -artifact_prefix=artifacts/ -print_final_stats=1
