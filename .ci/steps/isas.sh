#!/usr/bin/env bash
# The arithmetic again, on each instruction set but the best
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
isas=$("$work/environments/user/bin/python" -c 'from nplora import _core; print(*_core.available_isas()[:-1])')
for isa in $isas; do
  # Quantisers are the same code on every instruction set: one run over a real model's weights is enough.
  NPLORA_ISA=$isa run_tests user -q -p no:cacheprovider -k 'not real_weights_are_quantised' tests/{core,lora,nn} \
    tests/weights/test_frozen_weight.py >"$here/$isa.count" 2>&1 || { cat "$here/$isa.count"; fail "the tests on $isa"; }
  echo "$isa: $(tail -n 1 "$here/$isa.count")"
done
