#!/usr/bin/env bash
# The commands of CONTRIBUTING.md, in a fresh clone; pre-commit without mypy
# needs: tools
. "$(dirname "$0")/../environment.sh"

# Without optimisation the core compiles in a quarter of the time. pre-commit leaves out mypy, which the step
# style runs.
SKIP=mypy SKBUILD_CMAKE_BUILD_TYPE=Debug SKBUILD_CMAKE_DEFINE=NPLORA_UNITY=ON "$python" scripts/check_contributing.py | tee "$here/log"
tail -n 1 "$here/log" >"$here/commands.count"
