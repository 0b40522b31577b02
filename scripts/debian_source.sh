#!/usr/bin/env bash
# Downloads and unpacks a source that Debian distributes, and prints its directory.
#
#   scripts/debian_source.sh CACHE NAME
#
# NAME is cpython, zlib or libffi. CACHE keeps the archive and the directory.
set -euo pipefail

mkdir -p "${1:?expected CACHE, a directory for the files}"
cache=$(cd "$1" && pwd)
case ${2:-} in
  cpython)
    file=p/python3.13/python3.13_3.13.5.orig.tar.xz
    sum=93e583f243454e6e9e4588ca2c2662206ad961659863277afcdb96801647d640
    ;;
  zlib)
    file=z/zlib/zlib_1.3.dfsg+really1.3.1.orig.tar.gz
    sum=60dd315c07f616887caa029408308a018ace66e3d142726a97db164b3b8f69fb
    ;;
  libffi)
    file=libf/libffi/libffi_3.4.8.orig.tar.gz
    sum=cbb7f0b3b095dc506387ec1e35b891bfb4891d05b90a495bc69a10f2293f80ff
    ;;
  *) printf 'expected cpython, zlib or libffi, got %s\n' "${2:-nothing}" >&2; exit 2 ;;
esac
archive=$cache/${file##*/}
source=${archive%.orig.tar.*}
if [ ! -e "$source/ready" ]; then
  curl -sSfo "$archive" "http://deb.debian.org/debian/pool/main/$file"
  echo "$sum  $archive" | sha256sum --check --quiet >&2
  rm -rf "$source"
  mkdir "$source"
  tar -xf "$archive" --strip-components=1 -C "$source"
  touch "$source/ready"
fi
echo "$source"
