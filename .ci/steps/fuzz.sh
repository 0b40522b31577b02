#!/usr/bin/env bash
# Every reader of files under Atheris
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_packages atheris llm
install "$work/environments/atheris" atheris || { echo 'not fuzzed: there is no atheris for this Python'; exit; }
memory=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$memory"' EXIT
TMPDIR=$memory "$work/environments/atheris/bin/python" tests/fuzz/all_readers.py "$here"
