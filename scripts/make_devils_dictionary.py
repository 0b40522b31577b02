"""Make the text of `nplora demo` out of Debian's package dict-devil: short entries of The Devil's Dictionary.

    apt-get install dict-devil && python scripts/make_devils_dictionary.py

Ambrose Bierce's book of 1911 is in the public domain. The script keeps the first sentences of each
definition, up to 25 words, without verses, anecdotes and the part of speech. Entries that speak of peoples as
was usual in 1911 are left out. The hashes of the words choose 600 entries, and 60 of them as held-out
entries. So every run chooses the same ones.
"""

import gzip
import hashlib
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path("/usr/share/dictd")
TARGET = Path(__file__).parents[1] / "python" / "nplora" / "cli" / "demo"
ENTRIES, HELD_OUT = 600, 60
MAX_WORDS, MIN_WORDS = 25, 3
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

HEAD = re.compile(r"(?P<word>[A-Z][A-Z' -]+), (?:[a-z]{1,4}\.\s*)+(?P<definition>\S.*)")
PEOPLES = re.compile(
    "negro|nigg|jew|hebrew|ethiop|african|chinese|mongol|indian|savage|aborigin|squaw|gypsy|mulatto|pigmy",
    re.I,
)
SENTENCE_END = re.compile(r"(?<=[a-z][.!?]) +(?=[A-Z])")


def number(text: str) -> int:
    """A number as dictd's index writes it, in base 64."""
    value = 0
    for letter in text:
        value = 64 * value + LETTERS.index(letter)
    return value


def entries() -> Iterator[str]:
    """The text of every entry."""
    content = gzip.decompress((SOURCE / "devil.dict.dz").read_bytes())
    for line in (SOURCE / "devil.index").read_text().splitlines():
        word, begin, size = line.split("\t")
        if not word.startswith("00database"):
            yield content[number(begin) : number(begin) + number(size)].decode()


def first_paragraph(entry: str) -> str:
    """The lines before the first that is empty or indented, which begins a verse or an anecdote."""
    lines = entry.splitlines()
    end = next((n for n, line in enumerate(lines) if n and (not line.strip() or line.startswith(" "))), None)
    text = re.sub(r"\s+", " ", " ".join(lines[:end])).strip()
    return re.sub(r"(?<=\w)- (?=\w)", "-", text)  # a word that the end of a line divides


def shortened(definition: str) -> str:
    """Its first sentences, as many as MAX_WORDS hold; none if the first is longer."""
    kept = ""
    for sentence in SENTENCE_END.split(definition):
        longer = f"{kept} {sentence}".strip()
        if len(longer.split()) > MAX_WORDS:
            break
        kept = longer
    return kept


def definitions() -> dict[str, str]:
    """Word -> its definition, of the entries that have a short one."""
    found: dict[str, str] = {}
    for entry in entries():
        head = HEAD.fullmatch(first_paragraph(entry))
        if head is None:
            continue
        definition = shortened(head["definition"])
        whole = definition.endswith((".", "!", "?", '."')) and "_" not in definition
        if PEOPLES.search(entry):
            continue
        if whole and len(definition.split()) >= MIN_WORDS and not definition.startswith("See "):
            found.setdefault(head["word"].lower(), definition)
    return found


def row(word: str, definition: str) -> str:
    """A line of the file: an instruct model takes the prompt for a task and answers it."""
    return json.dumps({"prompt": f"Q: Define {word}.\nA:", "completion": f" {definition}"})


def main() -> None:
    found = definitions()
    drawn = sorted(found, key=lambda word: hashlib.sha256(word.encode()).digest())[:ENTRIES]
    for name, words in (("valid", drawn[:HELD_OUT]), ("train", drawn[HELD_OUT:])):
        lines = [row(word, found[word]) for word in sorted(words)]
        path = TARGET / "devils_dictionary" / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        print(f"{path}: {len(lines)} of {len(found)} entries, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
