#!/usr/bin/env bash
# Tests nplora with a Python that has no global lock, with and without ThreadSanitizer.
#
#   scripts/free_threaded.sh CACHE [SOURCE]
#
# SOURCE is the archive of CPython's source, 3.13 or later. Without it, the script downloads Debian's archive
# of 3.13. The script compiles Python twice, the second time with ThreadSanitizer, and keeps both in CACHE.
# nplora is compiled with ThreadSanitizer too, but NumPy is a wheel, so races inside NumPy are not found.
#
# Needs Debian's packages clang-19, libclang-rt-19-dev, libssl-dev, libffi-dev and zlib1g-dev.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p "${1:?which directory keeps the files?}"
cache=$(cd "$1" && pwd)
archive=${2:-}
if [ -z "$archive" ]; then
  archive=$cache/python3.13_3.13.5.orig.tar.xz
  sum=93e583f243454e6e9e4588ca2c2662206ad961659863277afcdb96801647d640
  [ -e "$archive" ] || curl -sSfo "$archive" "http://deb.debian.org/debian/pool/main/p/python3.13/${archive##*/}"
  echo "$sum  $archive" | sha256sum --check --quiet
fi
name=$(basename "$archive")
source=$cache/source-$name

step() { printf '\n== %s\n' "$*"; }

# ThreadSanitizer needs its addresses, so nothing is moved at random.
still=()
if setarch -R true 2>/dev/null; then still=(setarch -R); fi

# python KIND OPTION...: the interpreter, compiled if it is not there. Its library is not compiled in advance,
# which would take as long as all the rest.
python() {
  local place=$cache/$1-$name build=$cache/build-$1-$name
  if [ ! -e "$place/ready" ]; then
    mkdir -p "$build"
    (
      cd "$build" &&
        "${still[@]}" "$source/configure" -q --prefix="$place" --disable-gil "${@:2}" &&
        "${still[@]}" make -s -j "$(nproc)" &&
        "${still[@]}" make -s altinstall COMPILEALL_OPTS="-x ."
    ) >"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
    touch "$place/ready"
  fi
  echo "$place"/bin/python3.*t
}

if [ ! -e "$source" ]; then
  mkdir "$source"
  tar -xf "$archive" --strip-components=1 -C "$source"
fi

step "Without ThreadSanitizer"
plain=$(python plain)
python3 scripts/test_python.py "$plain" "$cache/plain"

step "With ThreadSanitizer"
checked=$(python checked CC=clang-19 CXX=clang++-19 --with-thread-sanitizer --without-ensurepip)
CC=clang-19 CXX=clang++-19 CXXFLAGS='-O1 -g1 -fsanitize=thread' "$cache/plain/environment/bin/pip" install -q --prefer-binary \
  --upgrade --target "$cache/checked" . pytest threadpoolctl -C cmake.build-type=None \
  -C cmake.define.NPLORA_OPENMP=OFF -C build-dir="$cache/build-nplora"

# run ARGUMENT...: the Python under ThreadSanitizer, with nplora. Reports of races are in the files $cache/race.*
run() {
  rm -f "$cache"/race.*
  local suppressions=$source/Tools/tsan/suppressions_free_threading.txt
  TSAN_OPTIONS="suppressions=$suppressions exitcode=0 log_path=$cache/race" PYTHONPATH=$cache/checked \
    "${still[@]}" "$checked" "$@"
}
races_in_nplora() { grep -hs -m 1 '_core\.cpython' "$cache"/race.*; }

run -c '
import threading, numpy as np
from nplora import _core
w, x, y = (np.zeros((64, 64), np.float32) for _ in range(3))
threads = [threading.Thread(target=lambda: [_core.matmul(w, x, None, y) for _ in range(100)]) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()'
races_in_nplora >/dev/null || { echo 'two threads wrote to one array, and ThreadSanitizer did not notice' >&2; exit 1; }

run -m pytest -q tests/runtime/test_free_threading.py
if races_in_nplora; then exit 1; fi
echo "No race in nplora. Races in Python:"
grep -hs SUMMARY "$cache"/race.* | sort | uniq -c || true
