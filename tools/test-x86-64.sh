#!/usr/bin/env bash
# Tests the kernels on emulated x86-64 CPUs: AVX-512 (VNNI and BF16) on a Sapphire Rapids, AVX-VNNI on an Arrow Lake. Each
# must find its best level by itself, and runs that one alone.
#
# Bochs emulates whole machines: a Linux boots with the tests in its first file system, and its serial port is what this
# prints. Needs
# - Bochs 3.0 or later, `./configure --enable-x86-64 --enable-avx --enable-evex --enable-all-optimizations --with-nogui`
#   and `make install`: `bochs` on the path, and its BIOS in /usr/local/share/bochs or where BXSHARE says;
# - a Linux kernel: the newest of /boot, or the file that LINUX names (unpacked from a package will do);
# - Debian and Ubuntu: `apt-get install busybox-static isolinux syslinux-common xorriso cpio`.
#
# Arguments go to every test binary: filters of test names, `--skip`. BINARIES names some of them (`code_widths products`)
# and CPUS some of the CPUs, both all by default. A hundred million instructions a second are much, and one of AVX-512
# with floats counts for many: code_widths takes minutes, the tests of products that go through every case far longer.
set -euo pipefail
cd "$(dirname "$0")/.."

linux=${LINUX:-$(find /boot -name 'vmlinuz-*' | sort -V | tail -n 1)}
share=${BXSHARE:-/usr/local/share/bochs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Lays out a file system of busybox, what the tests link to, the tests, and `init`, which runs them with these arguments.
file_system() {
  local level=$1 root=$work/root binary arguments
  shift
  printf -v arguments ' %q' "$@"
  rm -rf "$root"
  mkdir -p "$root"/{bin,dev,lib64,proc,sys,tests,tmp}
  cp "$(command -v busybox)" "$root/bin/busybox"
  for binary in "${binaries[@]}"; do
    ldd "$binary" | grep -o '/[^ ]*' | xargs -I '{}' cp -Lu '{}' "$root/lib64/"
    strip -o "$root/tests/$(name_of "$binary")" "$binary"
  done
  cat > "$root/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib64 KINTSUGI_CPU=$level KINTSUGI_BEST_LEVEL=$level KINTSUGI_PRODUCTS=100
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
exec > /dev/ttyS0 2>&1
grep -m 1 -o -w -E 'avx2|avx_vnni|avx512_(vnni|bf16)' /proc/cpuinfo | sort -u
for test in /tests/*; do
  echo "== \$test, $level"
  \$test --test-threads=1$arguments && echo "== passed"
done
sleep 5 # until the serial port has sent it all
poweroff -f
END
  chmod +x "$root/init"
}

name_of() {
  local name=${1##*/}
  echo "${name%-*}"
}

# A CD with the file system in `$work/root`. Without fast strings (an MSR that Bochs lacks says that they are off) some
# kernels take FSRM alone for granted and move bytes beyond the end: feature 580 has to go.
image() {
  local cd=$work/cd
  mkdir -p "$cd"
  (cd "$work/root" && find . | cpio --quiet -o -H newc | gzip -1) > "$cd/initrd"
  cp "$linux" "$cd/vmlinuz"
  cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$cd/"
  cat > "$cd/isolinux.cfg" <<'END'
DEFAULT tests
LABEL tests
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0,115200 loglevel=1 mitigations=off nokaslr clearcpuid=580 random.trust_cpu=on panic=-1
END
  xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$cd" 2> /dev/null
}

# Boots it, prints what it writes, and fails unless every binary passed.
boot() {
  local cpu=$1 serial=$work/serial emulator
  : > "$serial"
  cat > "$work/bochsrc" <<END
display_library: nogui
cpu: model=$cpu, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=$share/BIOS-bochs-latest
vgaromimage: file=$share/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$serial
clock: sync=none
panic: action=fatal
log: $work/log
END
  bochs -q -f "$work/bochsrc" < /dev/null > "$work/out" 2>&1 &
  emulator=$!
  tail -n +1 -f --pid="$emulator" "$serial" | tr -d '\r'
  wait "$emulator" || true
  [ "$(grep -c '^== passed' "$serial")" -eq "${#binaries[@]}" ] && return
  # What the emulator has to say, where it is that which failed.
  tail -n 5 "$work/out" "$work/log" >&2
  return 1
}

on() {
  local cpu=$1 level=$2
  shift 2
  [[ " ${CPUS:-$cpu} " == *" $cpu "* ]] || return 0
  echo "== ${cpu}: best level ${level}"
  file_system "$level" "$@"
  image
  boot "$cpu"
}

built=$(cargo test --release -p kintsugi-runtime -p kintsugi-kernels --no-run 2>&1) || { echo "$built"; exit 1; }
binaries=()
while read -r binary; do
  name=$(name_of "$binary")
  [[ " ${BINARIES:-$name} " == *" $name "* ]] && binaries+=("$binary")
done < <(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' <<< "$built")

on sapphire_rapids avx512vnni "$@"
on arrow_lake avxvnni "$@"
