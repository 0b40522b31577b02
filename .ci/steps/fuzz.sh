#!/usr/bin/env bash
# Every reader of files under Atheris
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_packages atheris llm
"$work/environments/atheris/bin/pip" install -q --only-binary :all: atheris ||
  { echo 'not fuzzed: pip installs no atheris for this Python'; exit; }
memory=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$memory"' EXIT

# fuzz READER: a bug planted in it is found, and then nothing. A hang is 20 s.
# The package tokenizers keeps about 3 KB of each tokenizer that encoded a text, so the process may grow.
fuzz() {
  local reader=$1 log=$here/$1.log command
  rm -rf "$here/corpus-$reader" "$here/planted-$reader"
  mkdir "$here/corpus-$reader" "$here/planted-$reader"
  command=(env "TMPDIR=$memory" "$work/environments/atheris/bin/python" tests/fuzz/fuzz.py "$reader" -seed=1 -runs=100000 -max_total_time=30 -timeout=20
    -malloc_limit_mb=512 -rss_limit_mb=1536 "-artifact_prefix=$here/$reader-")
  "$work/environments/atheris/bin/python" tests/fuzz/seeds.py "$reader" "$here/seeds-$reader"
  must_find 'Uncaught Python exception' "${command[@]}" --planted-bug "$here/planted-$reader" "$here/seeds-$reader" >/dev/null
  "${command[@]}" "$here/corpus-$reader" "$here/seeds-$reader" >"$log" 2>&1 || { tail -n 40 "$log"; fail "the reader of $reader"; }
  echo "$reader: $(grep '^Done' "$log")"
}
readers=$("$work/environments/atheris/bin/python" tests/fuzz/seeds.py)
for reader in $readers; do fuzz "$reader"; done
