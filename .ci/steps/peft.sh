#!/usr/bin/env bash
# The tests that were skipped, now with torch, PEFT and transformers
# needs: tests docs examples
. "$(dirname "$0")/../environment.sh"

with_packages user bench
"$work/user/bin/python" -c 'import peft, torch'
cat "$work"/{tests,docs,examples}/skipped >"$here/skipped"
run_tests "@$here/skipped" | tee "$here/pytest.count"
