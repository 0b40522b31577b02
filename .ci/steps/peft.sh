#!/usr/bin/env bash
# The tests that were skipped, now with torch, PEFT and transformers
# needs: tests docs examples serve
. "$(dirname "$0")/../environment.sh"

with_test_packages torch test,bench,serve
install "$work/environments/torch" 'polars>=1'
"$work/environments/torch/bin/python" -c 'import peft, torch'
cat "$work"/{tests,docs,examples,serve}/skipped >"$here/skipped"
[ -s "$here/skipped" ] || fail 'no test was skipped for want of torch'
run_tests torch "@$here/skipped" | tee "$here/pytest.count"
