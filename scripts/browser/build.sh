#!/usr/bin/env bash
# Builds the wheel of nplora for Pyodide, which is CPython compiled to WebAssembly.
#
#   scripts/browser/build.sh CACHE
#
# The wheel is CACHE/nplora-…-wasm32.whl, and CACHE/page is the page of examples/browser with all its files.
# CACHE is a directory outside the checkout. It also keeps Pyodide and the wheel of NumPy, so that later runs
# compile only what changed in nplora. The first run takes about 20 minutes.
#
# Needs Debian 13's packages emscripten (3.1.69), nodejs, npm and unzip, and CPython 3.12 with its headers.
# Set PYTHON if CPython 3.12 has another command than python3.12.
set -euo pipefail
cd "$(dirname "$0")/../.."

mkdir -p "${1:?expected CACHE, a directory for the files}"
cache=$(cd "$1" && pwd)
pyodide=0.27.7 abi=2024.0 numpy=2.0.2
tag=cpython-312-wasm32-emscripten
venv=$cache/venv

step() { printf '\n== %s\n' "$*"; }

step "Pyodide $pyodide"
if [ ! -e "$cache/pyodide/pyodide.asm.wasm" ]; then
  (cd "$cache" && npm pack --silent "pyodide@$pyodide" && tar xzf "pyodide-$pyodide.tgz")
  rm -rf "$cache/pyodide"
  mv "$cache/package" "$cache/pyodide"
fi

step "Build tools"
if [ ! -e "$venv/ready" ]; then
  "${PYTHON:-python3.12}" -m venv "$venv"
  needed=$("$venv/bin/python" scripts/requirements.py build) # set -e ignores failures in pip's arguments
  "$venv/bin/pip" install -q $needed "cmake>=3.21" ninja wheel \
    "meson-python>=0.15" "Cython>=3.0.6,<3.1"
  touch "$venv/ready"
fi
export PATH=$venv/bin:$PATH

step "Headers of Pyodide's Python"
if [ ! -e "$cache/include" ]; then
  unzip -q -o "$cache/pyodide/python_stdlib.zip" '_sysconfigdata*' -d "$cache/sysconfig"
  PYODIDE_ROOT=/ python scripts/browser/headers.py "$cache"/sysconfig/_sysconfigdata*.py "$cache/include"
fi

# These wrappers of the compilers link an extension module as Pyodide loads it: a side module that exports its
# PyInit function. A build system adds the headers of this machine's Python, which the wrappers replace with
# Pyodide's.
headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
mkdir -p "$cache/tools"
for tool in emcc em++; do
  cat >"$cache/tools/$tool" <<END_OF_TOOL
#!/usr/bin/env bash
arguments=(-fexceptions)
for argument in "\$@"; do
  [ "\$argument" != "-I$headers" ] || argument=-I$cache/include
  [ "\${before:-}" != -o ] || name=\$(basename "\$argument")
  [ "\$argument" != -shared ] || module=1
  arguments+=("\$argument")
  before=\$argument
done
if [ "\${module:-}" ]; then
  arguments+=(-sSIDE_MODULE=2 -sWASM_BIGINT "-sEXPORTED_FUNCTIONS=_PyInit_\${name%%.*}")
fi
exec /usr/bin/$tool "\${arguments[@]}"
END_OF_TOOL
done
chmod +x "$cache"/tools/*

step "NumPy $numpy"
if ! compgen -G "$cache/numpy-$numpy-*wasm32.whl" >/dev/null; then
  sed "s#@CACHE@#$cache#" scripts/browser/meson.cross.in >"$cache/meson.cross"
  settings=(--cross-file="$cache/meson.cross" -Dallow-noblas=true -Dblas=none -Dlapack=none -Ddisable-optimization=true)
  PYODIDE_ROOT=/ PYTHONPATH=$cache/sysconfig _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__emscripten_wasm32-emscripten \
    _PYTHON_HOST_PLATFORM=pyodide-$abi-wasm32 \
    pip wheel -q --no-build-isolation --no-deps --no-binary numpy "numpy==$numpy" --wheel-dir "$cache" \
    -C builddir="$cache/numpy-build" "${settings[@]/#/-Csetup-args=}"
fi

step "nplora"
cmake -S . -B "$cache/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DNPLORA_OPENMP=OFF \
  -DCMAKE_TOOLCHAIN_FILE=scripts/browser/emscripten.cmake -DNPLORA_BROWSER_TOOLS="$cache/tools" \
  -DPython_EXECUTABLE="$venv/bin/python" -DPython_INCLUDE_DIR="$cache/include" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DPYTHON_MODULE_EXTENSION=".$tag.so" -DPYTHON_MODULE_DEBUG_POSTFIX=
cmake --build "$cache/build" --target _core

step "The wheel"
python scripts/pack_wheel.py "$cache/build/_core.$tag.so" "pyodide-$abi-wasm32" "$cache"

step "The page, for any web server"
page=$cache/page
mkdir -p "$page"
cp "$cache"/pyodide/{pyodide.mjs,pyodide.asm.js,pyodide.asm.wasm,python_stdlib.zip,pyodide-lock.json} "$page"
cp "$cache"/numpy-"$numpy"-*.whl "$page/numpy.whl"
cp "$cache"/nplora-*.whl "$page/nplora.whl"
cp examples/browser/* "$page"
printf 'python3 -m http.server --bind 127.0.0.1 --directory %s\n' "$page"
