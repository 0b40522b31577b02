"""Print random sentences of the project, or the average length of the sentences in README and docs.

    python scripts/sentences.py --from python --count 40 --seed 1 --paragraphs
    python scripts/sentences.py --average

Someone who never saw the code reads the random sentences; each one that needs a second reading is rewritten.
With --paragraphs, the sentences before a sentence are printed, too, because no one reads it without them.
"""

import argparse
import ast
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MOST_WORDS = 18  # of an average sentence of a page
_LEAST_WORDS = 4  # a shorter text is a label
_ENDS_NO_SENTENCE = ("al.", "e.g.", "i.e.", "vs.", "cf.", "No.", "eq.", "Fig.", "p.")


class Sentence(NamedTuple):
    file: Path
    line: int
    text: str
    before: tuple[str, ...] = ()  # the sentences before it in the same paragraph

    @property
    def words(self) -> int:
        return sum(any(letter.isalnum() for letter in word) for word in self.text.split())

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


def split(text: str) -> list[str]:
    """The sentences of a paragraph."""
    sentences = [""]
    for word in text.split():
        before = sentences[-1].split()
        ends = (
            before
            and before[-1].rstrip("\"')*`")[-1:] in tuple(".!?")
            and before[-1] not in _ENDS_NO_SENTENCE
        )
        if ends and not word[0].islower():
            sentences.append("")
        sentences[-1] += f" {word}"
    return [sentence.strip() for sentence in sentences if sentence.strip()]


def _sentences(file: Path, paragraphs: Iterator[tuple[int, str]]) -> Iterator[Sentence]:
    for line, text in paragraphs:
        found = split(text)
        yield from (Sentence(file, line, each, tuple(found[:i])) for i, each in enumerate(found))


# ---- Python: help texts, messages and docstrings ----


def from_python() -> Iterator[Sentence]:
    for file in sorted((ROOT / "python" / "nplora").rglob("*.py")):
        texts = _Texts()
        texts.visit(ast.parse(file.read_text(encoding="utf-8")))
        yield from _sentences(file, iter(texts.found))


class _Texts(ast.NodeVisitor):
    """All string constants. The values in an f-string become {…}."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found += paragraphs(node.value, node.lineno)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [part.value if isinstance(part, ast.Constant) else "{…}" for part in node.values]
        self.found += paragraphs("".join(map(str, parts)), node.lineno)


def paragraphs(text: str, first: int) -> list[tuple[int, str]]:
    """The paragraphs of a docstring or message. Each entry of "Args:" and the like is one."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines()):
        words = line.strip()
        starts = not found or not words or re.match(r"[\w, *]+: |- |>>> ", words) or found[-1][1] == ""
        if starts:
            found.append((first + number, words))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {words}")
    return [(line, words) for line, words in found if not re.fullmatch(r"|[A-Z]\w+:", words)]


# ---- C++: comments ----


def from_cpp() -> Iterator[Sentence]:
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".h", ".cpp"):
            yield from _sentences(file, _comments(file.read_text(encoding="utf-8")))


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """The comments: lines of comments that follow each other are one."""
    first, words = 0, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        whole = re.fullmatch(r"\s*//+ ?(.*)", line)
        trailing = re.search(r"[;{},)\w]\s+// (.*)", line)
        if whole and whole[1].strip():
            first, words = first or number, f"{words} {whole[1].strip()}"
            continue
        if words:
            yield first, words
        first, words = 0, ""
        if trailing and not whole:
            yield number, trailing[1]


# ---- Markdown ----


def from_docs() -> Iterator[Sentence]:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
    pages += sorted((ROOT / "docs").glob("*.md"))
    for file in pages:
        if file.exists():
            yield from _sentences(file, _prose(file.read_text(encoding="utf-8")))


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs and list entries, without code, tables, headings and addresses."""
    first, words, fence = 0, "", ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        bare = line.strip()
        mark = re.match(r"`{3,}|~{3,}", bare)
        is_code = bool(fence or mark)
        if mark and (not fence or (bare.startswith(fence) and not bare.strip(fence[0]))):
            fence = "" if fence else mark[0]
        is_prose = bare and not is_code and not bare.startswith(("|", "#", "<", ":::", "![", "[!["))
        entry = re.match(r"(?:[-*+]|\d+\.|:) +", bare)
        if words and (not is_prose or entry):
            yield first, words
            first, words = 0, ""
        if is_prose:
            first, words = first or number, f"{words} {_plain(bare[entry.end() :] if entry else bare)}"


def _plain(text: str) -> str:
    """The words of a line, without the addresses of links. Code counts as one word."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "_"), text).replace("**", "")


# ---- what is printed ----

SOURCES: dict[str, Callable[[], Iterator[Sentence]]] = {
    "python": from_python,
    "cpp": from_cpp,
    "docs": from_docs,
}


def print_random(source: str, count: int, seed: int, with_paragraphs: bool) -> None:
    found = [sentence for sentence in SOURCES[source]() if sentence.words >= _LEAST_WORDS]
    for number, sentence in enumerate(random.Random(seed).sample(found, min(count, len(found))), 1):
        if with_paragraphs and sentence.before:
            print(f"     ({' '.join(sentence.before)})")
        print(f"{number:3}  {sentence}")


def average(sentences: list[Sentence]) -> float:
    return sum(sentence.words for sentence in sentences) / max(1, len(sentences))


def pages() -> dict[Path, list[Sentence]]:
    """The sentences of each page."""
    found: dict[Path, list[Sentence]] = {}
    for sentence in from_docs():
        found.setdefault(sentence.file, []).append(sentence)
    return found


def print_averages(longest: int) -> bool:
    """Print words per sentence of each page; whether all pages are within the limit."""
    averages = {file: average(found) for file, found in pages().items()}
    for file, found in pages().items():
        words = f"{averages[file]:5.1f} words in {len(found):4} sentences  {file.relative_to(ROOT)}"
        print(words if averages[file] <= MOST_WORDS else f"{words}: more than {MOST_WORDS}")
    for sentence in sorted(from_docs(), key=lambda sentence: -sentence.words)[:longest]:
        print(f"{sentence.words:5}  {sentence}")
    return max(averages.values()) <= MOST_WORDS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="source", choices=SOURCES, default="python", help="what to sample")
    parser.add_argument("--count", type=int, default=40, metavar="N", help="sentences to print (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    text = "also print the sentences before each sentence in its paragraph, in parentheses"
    parser.add_argument("--paragraphs", action="store_true", help=text)
    text = f"print words per sentence of README and docs; exit status 1 if a page is above {MOST_WORDS}"
    parser.add_argument("--average", action="store_true", help=text)
    text = "with --average: also print the N longest sentences"
    parser.add_argument("--longest", type=int, default=0, metavar="N", help=text)
    given = parser.parse_args()
    if given.average:
        return 0 if print_averages(given.longest) else 1
    print_random(given.source, given.count, given.seed, given.paragraphs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
