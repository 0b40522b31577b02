#!/usr/bin/env bash
# One case of each benchmark: results are checked, then timed (beside other steps: the times say little)
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages torch test,bench,serve
PATH=$work/environments/torch/bin:$PATH python -m bench --quick --wheel "$(echo "$work"/wheel/nplora-*.whl)"
