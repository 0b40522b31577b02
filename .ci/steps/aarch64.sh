#!/usr/bin/env bash
# Kernels for aarch64, cross-compiled and run under qemu; their machine code
# needs: tools
. "$(dirname "$0")/../environment.sh"

system_packages aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user
aarch64-linux-gnu-g++ --version | head -n 1
build aarch64 . kernel_tests planted_bug
tests=$here/aarch64/tests/cpp/kernel_tests
check_symbols aarch64-linux-gnu- "$here/aarch64"
python tests/inner_loops.py --prefix aarch64-linux-gnu- "$tests" | tee "$here/loops.count"
# 16 x 2 accumulators leave no register for anything else: the check must find that.
{
  sed 's/kTileRows = 12/kTileRows = 16/; /products-inl.h/q' csrc/kernels/isa_neon.cpp
  echo 'template void nplora::kernels::neon::gemm_tokens_in_lanes<float>('
  echo '    size_t, size_t, size_t, const Panels<float>&, const float*, float*, bool);'
} >"$here/spilling.cpp"
aarch64-linux-gnu-g++ -std=c++20 -O3 -g1 -fPIC -shared -Icsrc -ffp-contract=fast -fno-schedule-insns "$here/spilling.cpp" \
  -o "$here/spilling.so"
must_find 'gemm_tokens_in_lanes_fixed<float> .*spilled vectors' \
  python tests/inner_loops.py --prefix aarch64-linux-gnu- "$here/spilling.so"
# The oldest emulated processor lacks dot products, and the second one lacks BF16. Nobody takes the generic
# kernels on aarch64, except with NPLORA_ISA=generic: they are compiled, not run. One of eight shapes is
# enough, because the code that divides shapes into tiles runs on all of them in the step `kernels`.
qemu-aarch64 -cpu cortex-a72 "$tests" 2 5 8 | tee "$here/neon.count"
qemu-aarch64 -cpu cortex-a76 "$tests" 3 5 8 | tee "$here/neondot.count"
qemu-aarch64 -cpu max "$tests" 4 5 8 | tee "$here/neonbf16.count"
qemu-aarch64 -cpu max "$tests" 5 5 8 | tee "$here/neoni8mm.count"
for isa in neon neondot neonbf16 neoni8mm; do
  [ "$(awk '$3 == "kernels," {print $1}' "$here/$isa.count")" = "$isa" ] || fail "$isa did not run"
done
