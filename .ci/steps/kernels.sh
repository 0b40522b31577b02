#!/usr/bin/env bash
# The wheel's kernels on this machine, and on an emulated one without AVX; their machine code
# needs: wheel
. "$(dirname "$0")/../environment.sh"

tests=$work/wheel/native/tests/cpp/kernel_tests
kernel_tests 1 "$tests"
check_symbols '' "$work/wheel/native"
python tests/inner_loops.py "$tests" | tee "$here/loops.count"
# The generic unit and the dispatcher must hold no newer instruction: none of AVX in the machine code, and
# none that an emulated older processor stops at. The same program ran above: one of 8 shapes is enough there.
if [ "$(uname -m)" = x86_64 ]; then
  objects=("$work"/wheel/native/CMakeFiles/nplora_kernels.dir/csrc/kernels/{isa_generic,dispatch}.cpp.o)
  objdump -d --no-show-raw-insn "${objects[@]}" >"$here/generic.s"
  grep -q 'mulps' "$here/generic.s" || fail 'the machine code of the generic unit was not found'
  if grep -m5 -P '\tv[a-z]' "$here/generic.s"; then fail 'the generic unit holds instructions of AVX'; fi
  system_packages qemu-x86_64:qemu-user
  qemu-x86_64 -cpu Nehalem "$tests" 1 1 8 | tee "$here/old.count"
fi
