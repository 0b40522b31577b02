#!/usr/bin/env bash
# Kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with the format of docs/add-a-block-format.md
# needs: tools
. "$(dirname "$0")/../environment.sh"

# A copy of the sources, to which the guide's own code is added: it must compile, and pass the same tests.
rm -rf "$here/tree"
mkdir "$here/tree"
cp -rp CMakeLists.txt CMakePresets.json csrc tests "$here/tree"
python scripts/apply_guide.py docs/add-a-block-format.md "$here/tree"
build asan "$here/tree" kernel_tests planted_bug
must_find 'AddressSanitizer: heap-buffer-overflow' "$here/asan/tests/cpp/planted_bug" read
must_find 'signed integer overflow' "$here/asan/tests/cpp/planted_bug" overflow
# The step `kernels` tests all shapes, between guard pages.
kernel_tests 4 "$here/asan/tests/cpp/kernel_tests"
