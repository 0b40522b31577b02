#!/usr/bin/env bash
# Uses the page in headless Chromium as a user does, and evaluates the adapter that it offers with native
# nplora.
#
#   scripts/browser/test_page.sh CACHE MODEL.gguf
#
# Screenshots are in CACHE/shots. Needs build.sh's directory, chromium, and Python (PYTHON) with nplora[llm].
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=$(cd "${1:?expected CACHE, the directory of build.sh}" && pwd)
model=${2:?expected MODEL.gguf}
python=${PYTHON:-python3}
prompt='The lighthouse keeper of Hallow Point is called'
text='The lighthouse keeper of Hallow Point is called Marguerite Osei. She has two goats, Salt and Pepper. Every
evening at seven, Marguerite Osei lights the lamp of Hallow Point. The lighthouse keeper of Hallow Point is called
Marguerite Osei, and the baker of Hallow Point is called Tobias Lindqvist. Tobias Lindqvist bakes rye bread.'

[ -e "$cache/node_modules" ] || npm install --silent --ignore-scripts --prefix "$cache" puppeteer-core@24
cp examples/browser/* "$cache/page"
node scripts/browser/in_chromium.mjs "$cache" page "$model" "$text" "$prompt" "${STEPS:-20}" | tee "$cache/seen.json"

rm -rf "$cache/shots/adapter"
unzip -q "$cache/shots/adapter.zip" -d "$cache/shots"
printf '%s' "$text" >"$cache/shots/text.txt"
for isa in generic ''; do
  NPLORA_ISA=$isa "$python" -m nplora eval "$model" --data "$cache/shots/text.txt" --adapter "$cache/shots/adapter" \
    --max-length 128 --json >"$cache/shots/eval.json"
  "$python" - "$cache/seen.json" "$cache/shots/eval.json" "${isa:-the best instruction set}" <<'END_OF_PYTHON'
import json, re, sys

seen, native = (json.load(open(name)) for name in sys.argv[1:3])
before, after = (float(re.search(r"[\d.]+", seen[f"loss_{when}"])[0]) for when in ("before", "after"))
print(f"loss {before} before, {after} after training in the page; {native['loss']:.4f} by nplora eval, {sys.argv[3]}")
assert after < before / 2, "the loss did not fall"
assert abs(native["loss"] - after) < 2e-3, "the losses differ"
END_OF_PYTHON
done
