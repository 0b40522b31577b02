#!/usr/bin/env bash
# The tests that were skipped without torch, PEFT and transformers
# needs: tests
# processors: 2
. "$(dirname "$0")/../environment.sh"

with_packages bench
"$work/user/bin/python" -c 'import peft, torch'
PATH=$work/user/bin:$PATH pytest -n 2 --dist loadfile "@$work/tests/skipped" | tee "$here/pytest.count"
