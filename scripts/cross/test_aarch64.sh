#!/usr/bin/env bash
# Builds the wheel for Linux on aarch64, and tests it with CPython for aarch64, which qemu runs.
#
#   scripts/cross/test_aarch64.sh CACHE [ARGUMENT OF PYTEST...]
#
# Without arguments of pytest, the script trains small models natively and under qemu, and compares their
# losses. Then it runs the tests of release.yml, except the slow ones.
#
# Needs root, and Debian 13 with the packages g++-aarch64-linux-gnu, qemu-user, debootstrap and python3-venv.
# PYTHON (python3) is a native Python with nplora. The Python for aarch64 comes from Debian's packages, which
# are unpacked but not configured.
set -euo pipefail
cd "$(dirname "$0")/../.."

mkdir -p "${1:?expected CACHE, a directory for the files}"
cache=$(cd "$1" && pwd)
root=$cache/root
native=$(command -v "${PYTHON:-python3}") # before PATH changes

if [ ! -e "$root/ready" ]; then
  packages=libpython3.13-dev,python3.13,libstdc++6,tzdata
  debootstrap --foreign --arch=arm64 --variant=minbase --include="$packages" trixie "$root" >"$cache/debootstrap.log"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
  touch "$root/ready"
fi

if [ ! -e "$cache/venv/ready" ]; then
  python3.13 -m venv "$cache/venv"
  needed=$(python3.13 scripts/requirements.py build) # set -e ignores failures in pip's arguments
  "$cache/venv/bin/pip" install -q $needed "cmake>=3.21" ninja wheel
  touch "$cache/venv/ready"
fi
export PATH=$cache/venv/bin:$PATH
cmake -S . -B "$cache/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DNPLORA_OPENMP=OFF -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_STRIP=/usr/bin/aarch64-linux-gnu-strip -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" \
  -DPython_EXECUTABLE="$cache/venv/bin/python" -DPython_INCLUDE_DIR="$root/usr/include/python3.13" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPYTHON_MODULE_EXTENSION=.cpython-313-aarch64-linux-gnu.so -DPYTHON_MODULE_DEBUG_POSTFIX=
cmake --build "$cache/build" --target _core
python scripts/pack_wheel.py "$cache"/build/_core.*.so linux-aarch64 "$cache"

needed=$(python scripts/requirements.py run test)
site=$root/usr/local/lib/python3.13/dist-packages
pip install -q --upgrade --target "$site" --only-binary :all: --python-version 3.13 --implementation cp \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
  -r <(echo "$needed")
rm -rf "$site"/nplora*
python -m zipfile -e "$cache"/nplora-*.whl "$site"

# Let Linux run programs for aarch64 with qemu, also those that the tests start.
formats=/proc/sys/fs/binfmt_misc
[ -e "$formats/register" ] || mount -t binfmt_misc none "$formats"
if ! compgen -G "$formats/*aarch64" >/dev/null; then
  header='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  echo ":nplora-aarch64:M::$header:$mask:/usr/bin/qemu-aarch64:FP" >"$formats/register"
  trap 'echo -1 >"$formats/nplora-aarch64"' EXIT
fi

# inside COMMAND...: runs a command in the root directory for aarch64, where /source is this checkout. Under
# qemu, OpenBLAS's kernels for SVE return wrong products, so OPENBLAS_CORETYPE selects others.
inside() {
  mkdir -p "$root/source"
  unshare --mount --pid --fork bash -c '
    set -e
    mount -t proc proc "$0/proc"
    mount --bind /dev "$0/dev"
    mount --bind . "$0/source"
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 OPENBLAS_CORETYPE=ARMV8 \
      PYTHONPATH=/source/tests PYTHONDONTWRITEBYTECODE=1 \
      chroot "$0" sh -c "cd /source && exec \"\$@\"" sh "$@"' "$root" "$@"
}

if [ $# -eq 1 ]; then
  printf '\n== The losses of small models, on aarch64 and natively\n'
  NPLORA_ISA=generic "$native" scripts/same_losses.py "$root/tmp/native.npz"
  for isa in generic ''; do
    inside env NPLORA_ISA="$isa" python3.13 scripts/same_losses.py /tmp/aarch64.npz /tmp/native.npz
  done
  printf '\n== Tests\n'
  set -- "$1" -m 'not slow' tests/core tests/lora tests/weights tests/runtime
fi
inside python3.13 -c 'import nplora; nplora.show_config()'
inside python3.13 -c 'from bench import bench_import; bench_import.run(quick=True)'
inside python3.13 -m pytest -q -p no:cacheprovider "${@:2}"
