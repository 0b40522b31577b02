#!/usr/bin/env bash
# Tests the wheel of build.sh in Pyodide, which runs in node or in headless Chromium.
#
#   scripts/browser/test.sh CACHE [node|chromium [ARGUMENT OF PYTEST...]]
#
# Without arguments of pytest, the script runs the fast tests in the folders that need no threads, processes
# or sockets. pytest prints why it skips a test. In node, small models are also trained both natively and in
# Pyodide, and their losses are compared; for that, PYTHON (python3) must have nplora. CHROMIUM
# (/usr/bin/chromium) is Debian's package chromium or chromium-headless-shell.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=$(cd "${1:?expected CACHE, the directory of build.sh}" && pwd)
where=${2:-node}
page=$cache/page
arguments=("${@:3}")
folders=(core lora weights nn trainer models platform)
# WebAssembly has no huge pages. NumPy has no BLAS there, so that an oracle with large products takes minutes.
left_out=(tests/core/test_huge_pages.py tests/core/test_filtered_cross_entropy.py)
[ $# -gt 2 ] || arguments=(-q -m 'not slow' "${left_out[@]/#/--ignore=}" "${folders[@]/#/tests/}")

# Packages that the tests import. They work without compiled parts.
if [ ! -e "$cache/packages" ]; then
  "$cache/venv/bin/pip" install -q --no-deps --only-binary :all: --target "$cache/packages" \
    "pytest>=8,<9" iniconfig pluggy packaging pygments pyyaml "threadpoolctl>=3" "gguf>=0.19" tqdm
fi
(cd "$cache/packages" && "$cache/venv/bin/python" -m zipfile -c "$page/packages.zip" .)
"$cache/venv/bin/python" -m zipfile -c "$page/tests.zip" tests bench docs examples scripts pyproject.toml

if [ "$where" = chromium ]; then
  [ -e "$cache/node_modules" ] || npm install --silent --ignore-scripts --prefix "$cache" puppeteer-core@24
  cp scripts/browser/run_tests.mjs "$page"
  exec node scripts/browser/in_chromium.mjs "$cache" tests "${arguments[@]}"
fi
printf '\n== The losses of small models, in Pyodide and natively\n'
NPLORA_ISA=generic PYTHONPATH=python "${PYTHON:-python3}" scripts/same_losses.py "$page/native.npz"
node scripts/browser/run_tests.mjs "$page" losses
printf '\n== Tests\n'
exec node scripts/browser/run_tests.mjs "$page" tests "${arguments[@]}"
