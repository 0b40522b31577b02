#!/usr/bin/env bash
# One case of each benchmark: results are checked, then timed, with nothing beside it
# needs: peft
# processors: 2
. "$(dirname "$0")/../environment.sh"

PATH=$work/user/bin:$PATH python -m bench --quick --wheel "$(echo "$work"/wheel/nplora-*.whl)"
