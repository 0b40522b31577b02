#!/usr/bin/env bash
# The wheel's kernels on this machine, and on an emulated one without AVX; their machine code
# needs: wheel
. "$(dirname "$0")/../environment.sh"

tests=$work/wheel/native/tests/cpp/kernel_tests
kernel_tests "$tests"
check_symbols '' "$work/wheel/native"
python tests/inner_loops.py "$tests" | tee "$here/loops.count"
# The generic unit and the dispatcher must hold no newer instruction. The same program ran above: one of 8
# shapes is enough.
if [ "$(uname -m)" = x86_64 ]; then
  system_packages qemu-x86_64:qemu-user
  qemu-x86_64 -cpu Nehalem "$tests" 1 1 8 | tee "$here/old.count"
fi
