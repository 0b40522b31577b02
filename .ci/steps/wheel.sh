#!/usr/bin/env bash
# The wheel: built, repaired to manylinux, at most 3 MB, with a complete bill of materials
# needs: tools
. "$(dirname "$0")/../environment.sh"

# In one build with the C++ tests, which test the wheel's own kernels. tests/inner_loops.py needs -g1.
rm -rf "$here/dist"
pip wheel -q . --no-deps --wheel-dir "$here/dist" -C build-dir="$here/native" -C cmake.define.NPLORA_BUILD_TESTS=ON \
  -C cmake.define.NPLORA_OPENMP=OFF -C cmake.define.NPLORA_WERROR=ON -C cmake.define.NPLORA_UNITY=ON \
  -C cmake.define.CMAKE_CXX_FLAGS=-g1
rm -f "$here"/nplora-*.whl
auditwheel repair --wheel-dir "$here" "$here"/dist/*.whl
wheel=$(echo "$here"/nplora-*.whl)
python scripts/compress_wheel.py "$wheel"
size=$(stat -c %s "$wheel")
printf '%s: %d bytes\n' "$(basename "$wheel")" "$size"
case $wheel in *manylinux*) ;; *) fail 'the wheel has no manylinux tag' ;; esac
[ "$size" -le 3000000 ] || fail 'the wheel is larger than 3 MB'
python scripts/check_sbom.py "$wheel" "$here/native"
