#!/usr/bin/env bash
# Tests nplora with a Python that has no global lock, with and without ThreadSanitizer.
#
#   scripts/free_threaded.sh CACHE
#
# The script compiles Debian's source of Python 3.13 twice, the second time with ThreadSanitizer, and keeps
# both in CACHE. nplora is compiled with ThreadSanitizer too, but NumPy is a wheel, so races inside NumPy are
# not found.
#
# Needs Debian's packages build-essential, curl, xz-utils, python3-venv, clang-19, libclang-rt-19-dev,
# libssl-dev, libffi-dev and zlib1g-dev.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p "${1:?expected CACHE, a directory for the files}"
cache=$(cd "$1" && pwd)
source=$(scripts/debian_source.sh "$cache" cpython)
name=$(basename "$source")

# ThreadSanitizer fails if the kernel places memory at random addresses. setarch -R switches this off.
still=()
if setarch -R true 2>/dev/null; then still=(setarch -R); fi

# interpreter KIND OPTION...: prints the path of the interpreter. Compiles it first if it does not exist.
# Compiling the standard library to .pyc files takes long, so -l leaves out its folders.
interpreter() {
  local place=$cache/$1-$name build=$cache/build-$1-$name
  if [ ! -e "$place/ready" ]; then
    mkdir -p "$build"
    (
      cd "$build" &&
        "${still[@]}" "$source/configure" -q --prefix="$place" --disable-gil "${@:2}" &&
        "${still[@]}" make -s -j "$(nproc)" &&
        "${still[@]}" make -s altinstall COMPILEALL_OPTS=-l
    ) >"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
    touch "$place/ready"
  fi
  echo "$place"/bin/python3.*t
}

printf '\n== Without ThreadSanitizer\n'
plain=$(interpreter plain)
python3 scripts/test_python.py "$plain" "$cache/plain"

printf '\n== With ThreadSanitizer\n'
checked=$(interpreter checked CC=clang-19 CXX=clang++-19 --with-thread-sanitizer --without-ensurepip)
CC=clang-19 CXX=clang++-19 CXXFLAGS='-O1 -g1 -fsanitize=thread' "$cache/plain/environment/bin/pip" install -q \
  --prefer-binary --upgrade --target "$cache/checked" . pytest threadpoolctl -C cmake.build-type=None \
  -C cmake.define.NPLORA_OPENMP=OFF -C build-dir="$cache/build-nplora"

# run ARGUMENT...: runs the Python with ThreadSanitizer and nplora. ThreadSanitizer writes its reports to the
# files $cache/race.*. It sees no accesses of more than 16 bytes, so the generic kernels run.
run() {
  rm -f "$cache"/race.*
  local suppressions=$source/Tools/tsan/suppressions_free_threading.txt
  TSAN_OPTIONS="suppressions=$suppressions exitcode=0 log_path=$cache/race" PYTHONPATH=$cache/checked \
    NPLORA_ISA=generic "${still[@]}" "$checked" "$@"
}
races_in_nplora() { grep -qs '_core\.cpython' "$cache"/race.*; }

# Two threads that write to one array: this race must be found.
run -c '
import threading, numpy as np
from nplora import _core
w, x, y = (np.zeros((256, 256), np.float32) for _ in range(3))
threads = [threading.Thread(target=lambda: [_core.matmul(w, x, None, y) for _ in range(100)]) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()'
races_in_nplora || { echo 'two threads wrote to one array, and ThreadSanitizer did not notice' >&2; exit 1; }

# A crash under ThreadSanitizer also has the exit status 0, so the last line of pytest is checked.
run -m pytest -q tests/runtime/test_free_threading.py | tee "$cache/tests.log"
grep -q '^2 passed' "$cache/tests.log" || { echo 'the tests did not finish' >&2; exit 1; }
if races_in_nplora; then echo "races in nplora: see $cache/race.*" >&2; exit 1; fi
echo 'No race in nplora. All reports:'
grep -hs SUMMARY "$cache"/race.* | sort | uniq -c || true
