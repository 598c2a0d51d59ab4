#!/usr/bin/env bash
# Tests the kernels on emulated 64-bit ARM CPUs: every level on one that has all of them, then the operations on one
# without I8MM and on one without dot products either. Each must find its best level by itself.
#
# Needs the target (`rustup target add aarch64-unknown-linux-gnu`), a linker for it and an emulator (Debian and Ubuntu:
# `apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross`). Arguments are filters of test names for the
# first CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
unset KINTSUGI_CPU

target=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc

on() {
  local cpu=$1 level=$2
  shift 2
  echo "== ${cpu}: best level ${level}"
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu ${cpu}" \
    KINTSUGI_BEST_LEVEL="$level" cargo test --release --target "$target" "$@"
}

on max neon-i8mm -p kintsugi-runtime -p kintsugi-kernels -- "$@"
on neoverse-n1 neon-dotprod -p kintsugi-runtime -p kintsugi-kernels --lib --test operations
on cortex-a57 neon -p kintsugi-runtime -p kintsugi-kernels --lib --test operations
