"""The pages of the documentation and their code blocks.

A page is README.md or a file of docs/. The rules of its blocks:

- ```python runs. A bare ``` block directly below it is exactly what it prints.
- ```sh runs with `bash -e`. Its output is not compared.
- The comment `<!-- not run: REASON -->` on the line above keeps a block from running.
- Any other language is text for the reader.
- A block may stand in a list or in a quotation.

README.md and docs/*.md run. PAGES_ONLY_CHECKED do not run here, but keep the other rules.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_ONLY_CHECKED = [
    page for page in (ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md") if page.exists()
]
LANGUAGES_THAT_RUN = ("python", "sh")

# Before a fence: spaces, the marks of quotations, and the mark of a list entry.
_FENCE = re.compile(
    r"(?P<indent>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<mark>`{3,}|~{3,})(?P<language>[^`]*)"
)
_NOT_RUN = re.compile(r"[ \t>]*<!-- not run: *(?P<reason>.*?) *-->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its opening fence in the page, from 1.
        language: all words behind the opening fence.
        not_run: the reason why it does not run; None if there is none.
        output: what a Python block prints, from the bare block below it.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    output: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES_THAT_RUN and self.not_run is None

    @property
    def misnamed(self) -> bool:
        """Whether the block names a language that runs, with other letters or words: nobody would run it."""
        words = re.findall(r"[\w-]+", self.language.lower())
        names_one = words[:1] and words[0] in LANGUAGES_THAT_RUN
        return bool(names_one) and self.language not in LANGUAGES_THAT_RUN


def blocks_of(page: Path) -> list[Block]:
    return blocks_of_text(page.name, page.read_text(encoding="utf-8"))


def blocks_of_text(page: str, text: str) -> list[Block]:
    """The blocks of a page. A bare block directly below a Python block is its output, and no block."""
    lines = text.splitlines()
    blocks: list[Block] = []
    end_of_python = None  # the line below the Python block that was read last
    for first, last in _fences(page, lines):
        opening = _FENCE.fullmatch(lines[first])
        assert opening
        language = opening["language"].strip()
        body = _without_indentation(lines[first + 1 : last], opening["indent"])
        between = "" if end_of_python is None else "".join(lines[end_of_python:first])
        if not language and end_of_python is not None and not between.strip("> \t"):
            blocks[-1] = replace(blocks[-1], output=body)
            end_of_python = None
            continue
        reason = _NOT_RUN.fullmatch(lines[first - 1]) if first else None
        blocks.append(Block(page, first + 1, language, body, reason["reason"] if reason else None))
        end_of_python = last + 1 if language == "python" else None
    return blocks


def _fences(page: str, lines: list[str]) -> Iterator[tuple[int, int]]:
    """The lines that open and close each block, counted from 0."""
    number = 0
    while number < len(lines):
        opening = _FENCE.fullmatch(lines[number])
        if opening:
            before = "[ >]*" if ">" in opening["indent"] else " *"
            closing = re.compile(rf"{before}{opening['mark'][0]}{{{len(opening['mark'])},}} *")
            first, number = number, number + 1
            while not (number < len(lines) and closing.fullmatch(lines[number])):
                number += 1
                if number >= len(lines):
                    raise ValueError(f"{page}:{first + 1}: the block has no closing fence")
            yield first, number
        number += 1


def _without_indentation(lines: list[str], indent: str) -> str:
    marks = " \t>" if ">" in indent else " \t"
    return "".join(f"{line[min(len(indent), len(line) - len(line.lstrip(marks))) :]}\n" for line in lines)


def commands_of(text: str) -> list[list[str]]:
    """The commands of shell lines as words.

    Comments, prompts, redirections, variables before a command and the text of here-documents are left out.
    """
    commands: list[list[str]] = [[]]
    for line in _shell_lines(text):
        for word in _words(line):
            if set(word) <= set("&;|"):
                commands.append([])
            elif commands[-1] or not re.match(r"[A-Z_]+=", word):
                commands[-1].append(word)
        commands.append([])
    return [_without_redirections(command) for command in commands if command]


def _shell_lines(text: str) -> Iterator[str]:
    """Lines with closed quotes. What follows a `\\` or an open quote belongs to the line before."""
    document: str | None = None  # the word that ends the here-document
    waiting = ""
    for line in text.replace("\\\n", " ").splitlines():
        if document is not None:
            document = None if line.strip() == document else document
            continue
        started = re.search(r"(?<!<)<<-?\s*['\"]?(\w+)", line)
        document = started[1] if started else None
        waiting += line
        try:
            _words(waiting)
        except ValueError:
            waiting += "\n"
        else:
            yield waiting
            waiting = ""
    if waiting:
        raise ValueError(f"a quote is open: {waiting}")


def _words(line: str) -> list[str]:
    plain = re.sub(r"\d?>&\d|&>", ">", line.removeprefix("$ "))
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    return list(lexer)


def _without_redirections(words: list[str]) -> list[str]:
    """The words before the first redirection, such as `> out.txt`."""
    ends = (i for i, word in enumerate(words) if re.match(r"\d?[<>]", word))
    return words[: next(ends, len(words))]
