#!/usr/bin/env bash
# Compiles the tests of the kernels and of the threads for musl, the C library of Alpine Linux, and runs them.
#
#   scripts/cross/test_musl.sh [ARCHITECTURE [BUILD_DIRECTORY]]
#
# ARCHITECTURE is x86_64 or aarch64. The programs are static, so this machine runs them as Alpine would, and
# qemu-aarch64 those of the other architecture. The environment is that of build.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

architecture=${1:-$(uname -m)}
build=${2:-build/cross/musl-$architecture}
scripts/cross/build.sh "musl-$architecture" "$build" kernel_tests pool_tests
runner=()
[ "$architecture" = "$(uname -m)" ] || runner=("qemu-$architecture" -cpu max)
for name in kernel_tests pool_tests; do
  program=$build/tests/cpp/$name
  if readelf -d "$program" | grep -q NEEDED; then
    printf '%s is not static\n' "$program" >&2
    exit 1
  fi
  "${runner[@]}" "$program"
done
