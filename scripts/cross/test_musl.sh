#!/usr/bin/env bash
# Tests nplora with musl, the C library of Alpine Linux.
#
#   scripts/cross/test_musl.sh CACHE [ARCHITECTURE]
#
# First, the tests of the kernels and of the threads run as static programs. ARCHITECTURE is x86_64 or
# aarch64. If it is not the architecture of this machine, qemu runs the programs, and the script ends.
# Otherwise, the script compiles CPython for musl, builds the source distribution and a wheel from it, and
# runs the tests of release.yml. CACHE, such as build/cross/musl, keeps all files.
#
# Needs Debian's packages musl, binutils, curl, make, xz-utils, autoconf, automake, libtool and libltdl-dev;
# qemu-user for another architecture; python3.13 with pip; and the Python of build.sh, with its cmake and
# ninja on the path.
set -euo pipefail
shopt -s inherit_errexit # a failure inside $(…) ends the script
cd "$(dirname "$0")/../.."

case ${1:-} in
  '' | x86_64 | aarch64) echo 'expected CACHE, a directory for the files' >&2; exit 2 ;;
esac
mkdir -p "$1"
cache=$(cd "$1" && pwd)
architecture=${2:-$(uname -m)}
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")

printf '\n== Kernels and threads, on %s\n' "$architecture"
build=$cache/build-$architecture
scripts/cross/build.sh "musl-$architecture" "$build" kernel_tests pool_tests
runner=()
[ "$architecture" = "$(uname -m)" ] || runner=("qemu-$architecture" -cpu max)
for name in kernel_tests pool_tests; do
  program=$build/tests/cpp/$name
  libraries=$(readelf -d "$program")
  if [[ $libraries = *NEEDED* ]]; then
    printf '%s is not static\n' "$program" >&2
    exit 1
  fi
  "${runner[@]}" "$program"
done
[ "$architecture" = "$(uname -m)" ] || exit 0

# From here on, programs use the shared library of musl, because Python loads extension modules. Clang of zig
# refuses the date of compilation, which CPython uses.
tools=$build/tools
printf '#!/usr/bin/env bash\nexec "%s" -m ziglang cc -target %s-linux-musl -dynamic -Wno-date-time "$@"\n' \
  "$python" "$architecture" >"$tools/shared-cc"
printf '#!/usr/bin/env bash\nexec "%s" -dynamic "$@"\n' "$tools/c++" >"$tools/shared-c++"
chmod +x "$tools"/shared-*
export AR=$tools/ar RANLIB=$tools/ranlib CC=$tools/shared-cc CXX=$tools/shared-c++

printf '\n== CPython\n'
source=$(scripts/debian_source.sh "$cache" cpython)
place=$cache/musl-$architecture-$(basename "$source")

# compile NAME OPTION...: compiles a source of debian_source.sh in a copy, and installs it for musl. -l leaves
# out the .pyc files of the standard library's folders.
compile() (
  copy=$cache/build-$1
  source=$(scripts/debian_source.sh "$cache" "$1")
  rm -rf "$copy"
  cp -r "$source" "$copy"
  cd "$copy"
  export PKG_CONFIG=false CFLAGS='-O2 -fPIC' CPPFLAGS=-I$place/include LDFLAGS=-L$place/lib
  {
    { [ -e configure ] || autoreconf -fi; } && ./configure --prefix="$place" "${@:2}" &&
      make -s -j "$(nproc)" install COMPILEALL_OPTS=-l
  } >"$cache/make.log" 2>&1 || { tail -n 20 "$cache/make.log" >&2; exit 1; }
)

if [ ! -e "$place/ready" ]; then
  rm -rf "$place"
  compile zlib --static
  compile libffi --disable-shared --disable-docs "--build=$architecture-linux-musl"
  # CPython's configure recognises musl by a macro that zig's headers do not define.
  compile cpython "--build=$architecture-linux-musl" CPP="$CC -E -D__DEFINED_va_list"
  touch "$place/ready"
fi

# This Python has no OpenSSL, so pip cannot download. It installs what other Pythons have downloaded. There is
# no wheel of ml_dtypes for musl, so its source is compiled.
printf '\n== Packages\n'
packages=$cache/packages
needed=$("$python" scripts/requirements.py build run test)
tool_names=$("$python" -c '
import sys
sys.path.insert(0, "scripts")
import test_python
print(*test_python.TOOLS, sep="\n")')
python3.13 -m pip download -q --dest "$packages" --only-binary :all: -r <(grep -v ml_dtypes <<<"$needed") \
  --platform "musllinux_1_2_$architecture" --platform "musllinux_1_1_$architecture"
"$python" -m pip download -q --dest "$packages" --no-deps --no-binary ml_dtypes -r <(grep ml_dtypes <<<"$needed")
"$python" -m pip download -q --dest "$packages" -r <(echo "$tool_names")

printf '\n== The source distribution\n'
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$packages
export LD_LIBRARY_PATH=/lib/$architecture-linux-musl # where auditwheel looks for libc.so
exec "$python" scripts/test_python.py "$place/bin/python3.13" "$cache/tested"
