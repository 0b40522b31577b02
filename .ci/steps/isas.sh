#!/usr/bin/env bash
# The arithmetic again, on each instruction set but the best
# needs: wheel
# processors: 1
. "$(dirname "$0")/../environment.sh"

with_test_packages
for isa in $("$work/user/bin/python" -c 'from nplora import _core; print(*_core.available_isas()[:-1])'); do
  NPLORA_ISA=$isa "$work/user/bin/pytest" -q -p no:cacheprovider tests/{core,lora,nn} tests/weights/test_frozen_weight.py \
    >"$here/$isa.count" 2>&1 || { cat "$here/$isa.count"; fail "the tests on $isa"; }
  echo "$isa: $(tail -n 1 "$here/$isa.count")"
done
