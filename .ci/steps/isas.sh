#!/usr/bin/env bash
# The arithmetic again, on each instruction set but the best
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
isas=$("$work/environments/user/bin/python" -c 'from nplora import _core; print(*_core.available_isas()[:-1])')
for isa in $isas; do
  # Without what is the same on every instruction set: quantisers, and pages of memory. Random blocks take the
  # place of a real model's.
  NPLORA_ISA=$isa run_tests user -q -p no:cacheprovider -k 'not real_weights and not real_model' \
    --ignore tests/core/test_huge_pages.py tests/{core,lora,nn} \
    tests/weights/test_frozen_weight.py >"$here/$isa.count" 2>&1 || { cat "$here/$isa.count"; fail "the tests on $isa"; }
  echo "$isa: $(tail -n 1 "$here/$isa.count")"
done
