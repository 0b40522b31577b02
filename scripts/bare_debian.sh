#!/usr/bin/env bash
# Compiles the source distribution on a bare Debian, measures the import, and runs the fast tests there.
#
#   scripts/bare_debian.sh [DIRECTORY [RELEASE]]
#
# The script installs the smallest Debian, certificates, and the packages that README names: a compiler and
# Python. This shows whether nplora needs more. RELEASE is trixie if none is given. Needs root, Debian's
# package `debootstrap`, and the Python package `build`. DIRECTORY keeps the new system: a second run is
# faster.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" != --inside ]; then
  place=$(realpath -m "${1:-build/bare-debian}")
  release=${2:-trixie}
  root=$place/$release
  mkdir -p "$place"
  rm -rf "$place/dist"
  python3 -m build -q --sdist --outdir "$place/dist" .
  if [ ! -e "$root/ready" ]; then
    debootstrap --variant=minbase --include=ca-certificates "$release" "$root" >"$place/debootstrap.log"
    touch "$root/ready"
  fi
  rm -rf "$root"/{source,sdist}
  mkdir "$root/source" "$root/sdist"
  cp "$place"/dist/*.tar.gz "$root/sdist"
  tar -xzf "$root"/sdist/*.tar.gz --strip-components=1 -C "$root/source"
  cp scripts/bare_debian.sh "$root/inside.sh"
  # What this machine needs to reach package indexes.
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  [ ! -e /etc/resolv.conf ] || cp /etc/resolv.conf "$root/etc/"
  exec unshare --mount --pid --fork bash -c '
    set -e
    mount -t proc proc "$0/proc"
    mount --bind /dev "$0/dev"
    mount --bind /dev/shm "$0/dev/shm"
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 CMAKE_BUILD_PARALLEL_LEVEL="$1" \
      SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
      chroot "$0" bash /inside.sh --inside' "$root" "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
fi

# From here on: inside the bare system.
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1
apt-get update -qq
apt-get install -y -qq --no-install-recommends g++ python3-dev python3-venv >/tmp/apt.log 2>&1 ||
  { cat /tmp/apt.log; exit 1; }
rm -rf /venv
python3 -m venv /venv
# Without --no-cache-dir, pip would take the wheel that it built from an earlier file of this name.
/venv/bin/pip install -q --no-cache-dir "nplora[test] @ file://$(echo /sdist/*.tar.gz)"
cd /source
/venv/bin/python -c 'import nplora; print(nplora.__file__); nplora.show_config()'
/venv/bin/python -c 'from bench import bench_import; bench_import.run(quick=True)'
OMP_NUM_THREADS=1 /venv/bin/pytest -q -m 'not slow' -n 2 --dist loadfile -p no:cacheprovider
