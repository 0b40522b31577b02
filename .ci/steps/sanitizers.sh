#!/usr/bin/env bash
# Kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with the format of docs/add-a-block-format.md
# needs: tools
. "$(dirname "$0")/../environment.sh"

# A copy of the sources, to which the guide's own code is added: it must compile, and pass the same tests.
rm -rf "$here/tree"
mkdir "$here/tree"
cp -rp CMakeLists.txt CMakePresets.json csrc tests "$here/tree"
python scripts/apply_guide.py docs/add-a-block-format.md "$here/tree"
# Kernels that this processor cannot run are compiled without sanitizers, in a fraction of the time.
unrun=
for pair in avx512f:avx512 avx512_vnni:avx512vnni avx512_bf16:avx512bf16 amx_bf16:amx; do
  grep -qw "${pair%:*}" /proc/cpuinfo || unrun+="${pair#*:};"
done
build asan "$here/tree" kernel_tests planted_bug
must_find 'AddressSanitizer: heap-buffer-overflow' "$here/asan/tests/cpp/planted_bug" read
must_find 'signed integer overflow' "$here/asan/tests/cpp/planted_bug" overflow
# The step `kernels` tests all shapes, between guard pages.
kernel_tests 4 "$here/asan/tests/cpp/kernel_tests"
