"""How the project reads: the length of comment lines, of sentences in the documentation, and of README."""

import re
from pathlib import Path

import pytest
from scripts import sentences

ROOT = Path(__file__).parents[1]
COLUMNS = 110
PLACES = (".ci", "bench", "csrc", "docs", "examples", "python", "scripts", "tests")
MARKS = {
    ".py": "#",
    ".pyi": "#",
    ".h": "//",
    ".cpp": "//",
    ".txt": "#",
    ".toml": "#",
    ".sh": "#",
    ".yaml": "#",
    ".yml": "#",
    "": "#",
    ".js": "//",
    ".mjs": "//",
    ".css": "/*",
}


def written_files() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for place in PLACES for path in (ROOT / place).rglob("*") if path.is_file()]
    return sorted(
        p for p in found if p.suffix in MARKS and not {"__pycache__", "build", "LICENSES"} & {*p.parts}
    )


def long_comments(text: str, mark: str) -> list[int]:
    """The lines, counted from 1, whose comment ends past the last column. Words for tools are no comments."""
    pattern = re.compile(rf"(^|\s){re.escape(mark)}")
    lines = [re.sub(r"  # (noqa|type: ignore|fmt: skip).*", "", line) for line in text.splitlines()]
    return [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS and pattern.search(line)]


def test_no_comment_ends_past_the_last_column() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in written_files()
        if path.name not in ("LICENSE", "PKG-INFO")  # PKG-INFO, in a source distribution, is made from README
        for line in long_comments(path.read_text(encoding="utf-8"), MARKS[path.suffix])
    }
    assert not found


def test_long_comments_are_found() -> None:
    text = f"# {'a ' * 54}\nx = 1  # {'b' * 110}\ny = '{'#' * 120}'\n{'# c':<110}\n"
    assert long_comments(text, "#") == [2]
    assert long_comments(f"x = '{'b' * 96}'  # noqa: E501", "#") == []
    assert long_comments("a;  // " + "b" * 110, "//") == [1]
    assert {path.suffix for path in written_files()} >= {".py", ".h", ".cpp", ".txt", ".toml", ".yaml"}


# ---- sentences ----


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Hu et al. 2021 name them. `A` is first.", ["Hu et al. 2021 name them.", "`A` is first."]),
        ("It ends (in brackets.) Then more.", ["It ends (in brackets.)", "Then more."]),
        ("version 1. is no sentence", ["version 1. is no sentence"]),
    ],
)
def test_a_paragraph_is_split_into_sentences(text: str, split: list[str]) -> None:
    assert sentences.split(text) == split


def test_sentences_of_markdown_are_its_prose() -> None:
    text = """# A heading

A paragraph of
two lines. `some code` is one word, and a [link](http://a.b/c d) two.

| a | table |

- an entry
- another

```python
x = 1
```
"""
    found = [(line, words.strip()) for line, words in sentences._prose(text)]
    assert found == [
        (3, "A paragraph of two lines. `some_code` is one word, and a [link] two."),
        (8, "an entry"), (9, "another"),
    ]  # fmt: skip


def test_comments_of_cpp_are_joined() -> None:
    text = "// One line\n// and another.\nint a;  // trailing\nint b;\n"
    assert [(line, words.strip()) for line, words in sentences._comments(text)] == [
        (1, "One line and another."), (3, "trailing"),
    ]  # fmt: skip


@pytest.mark.parametrize("source", sentences.SOURCES)
def test_each_source_has_sentences_at_lines_that_exist(source: str) -> None:
    found = list(sentences.SOURCES[source]())
    assert len(found) > 40
    for sentence in found:
        assert sentence.file.is_file()
        assert 0 < sentence.line <= sentence.file.read_text(encoding="utf-8").count("\n") + 1


def test_the_average_sentence_of_each_page_is_short() -> None:
    found = {file.name: sentences.average(of_file) for file, of_file in sentences.pages().items()}
    assert len(found) > 5
    assert {name: words for name, words in found.items() if words > sentences.MOST_WORDS} == {}


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 150
    assert len(text) <= 9_000
