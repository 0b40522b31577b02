#!/usr/bin/env bash
# Every reader of files under Atheris
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_packages atheris llm
install "$work/environments/atheris" atheris || { echo 'not fuzzed: there is no atheris for this Python'; exit; }
memory=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$memory"' EXIT

# How long a reader is fuzzed. In a reader whose seeds reach all of it, eight seconds find what half a minute
# does. A reader that has changed lately belongs into the first line.
seconds() {
  case $1 in
    rows | checkpoint | peft_adapter | gguf_adapter) echo 24 ;;
    *) echo 8 ;;
  esac
}

# fuzz READER: a bug planted in it is found, and then nothing. A hang is 20 s.
# The package tokenizers keeps about 3 KB of each tokenizer that encoded a text, so the process may grow.
fuzz() {
  local reader=$1 log=$here/$1.log seeds=$here/seeds/$1 command
  rm -rf "$here/corpus-$reader" "$here/planted-$reader"
  mkdir "$here/corpus-$reader" "$here/planted-$reader"
  command=(env "TMPDIR=$memory" "$work/environments/atheris/bin/python" tests/fuzz/fuzz.py "$reader" -seed=1 -runs=100000 -timeout=20
    -malloc_limit_mb=512 -rss_limit_mb=1536 "-artifact_prefix=$here/$reader-")
  must_find 'Uncaught Python exception' "${command[@]}" -max_total_time=120 --planted-bug "$here/planted-$reader" "$seeds" >/dev/null
  "${command[@]}" "-max_total_time=$(seconds "$reader")" "$here/corpus-$reader" "$seeds" >"$log" 2>&1 ||
    { tail -n 40 "$log"; fail "the reader of $reader"; }
  echo "$reader: $(grep '^Done' "$log")"
}
readers=$("$work/environments/atheris/bin/python" tests/fuzz/seeds.py "$here/seeds")
for reader in $readers; do fuzz "$reader"; done
