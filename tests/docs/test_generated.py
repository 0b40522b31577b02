"""The parts of pages that are made from the code: they are complete, and their statements are true."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import error_messages
import generated
import nplora
from nplora.cli.parser import COMMANDS
from nplora.formats import errors
from nplora.models.families import ENCODERS, FAMILIES
from nplora.weights import storages
from pages import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


def text_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_part_that_a_page_asks_for_can_be_made(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    filled = generated.fill(text)
    assert text.count("<!-- generated:") == len(generated._PART.findall(text))
    assert "<!-- generated:" not in filled


def test_the_table_of_families_has_a_row_for_each() -> None:
    rows = generated.families().splitlines()[2:]
    assert len(rows) == len(FAMILIES)
    for family, row in zip(FAMILIES, rows, strict=True):
        assert f"`{family.model_type}`" in row
        assert f"`{family.architecture}`" in row
        assert len(row.split("|")[2].split()) > 2, "the family's file has no docstring"


def test_the_table_of_encoders_has_a_row_for_each() -> None:
    rows = generated.encoders().splitlines()[2:]
    assert [row.split("|")[3].strip(" `") for row in rows] == [family.model_type for family in ENCODERS]
    assert "`bert` |" in rows[0]


def test_the_table_of_types_has_a_row_for_each() -> None:
    rows = {row.split("`")[1]: row for row in generated.weights().splitlines() if row.startswith("| `")}
    assert list(rows) == list(storages.STORAGES)
    assert "| `Q8_0` | 32 | 34 | 8.5 |" in rows["q8_0"]  # 32 bytes and a float16
    assert "| none | 64 | 36 | 4.5 |" in rows["nf4"]  # 64 codes of 4 bits and a float32
    assert "| 1 | 2 | 16 |" in rows["bfloat16"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_reference_has_what_help_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    printed = re.sub(r"\n {10,}", "  ", generated._subparser(name).format_help())
    entries = re.findall(r"^  (\S.*?)(?:  +(\S.*))?$", printed, re.MULTILINE)
    section = re.search(
        rf"^## nplora {name}\n(.*?)(?=^## |\Z)", generated.commands(), re.DOTALL | re.MULTILINE
    )
    assert section
    shown = re.findall(r"^(`.+`)\n: (.*)$", section[1], re.MULTILINE)
    arguments = {entry: text for entry, text in entries if entry != "-h, --help"}
    assert arguments
    assert {entry.replace("`", ""): re.sub(r"\\(.)", r"\1", text) for entry, text in shown} == arguments
    assert generated._usage(generated._subparser(name)).startswith(f"nplora {name}")


def test_a_command_is_shown_with_what_it_needs() -> None:
    assert "\nnplora finetune MODEL --data FILE[:WEIGHT] --output DIR [options]\n" in generated.commands()
    assert "\nnplora info [FILE]\n" in generated.commands()


def test_the_api_page_has_every_public_name() -> None:
    names, modules = generated.asked_for(text_of("api"))
    public = set(nplora.__all__)
    assert names <= public
    assert public - names == {
        name for name in public if f"nplora.{name}" in modules and inspect.ismodule(getattr(nplora, name))
    }


def test_the_api_page_says_nothing_twice() -> None:
    found = re.findall(r"auto(?:class|function|data):: (\S+)", generated.fill(text_of("api")))
    values = [id(generated._object(path)) for path in found]
    assert len(found) > 60
    assert len(set(values)) == len(values)


# ---- errors ----


def public_errors() -> set[str]:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    classes = {name for name in classes if issubclass(vars(errors)[name], errors.FormatError)}
    return classes | {"NonFiniteLossError", "BudgetError", "RankError", "QueueFullError"}


def test_every_class_of_errors_is_explained() -> None:
    text = text_of("errors")
    for name in public_errors():
        section = re.search(rf"\n### {name}\n(.*?)(?=\n##|\Z)", text, re.DOTALL)
        assert section, name
        assert "**What to do.**" in section[1], name


@pytest.mark.parametrize("kind", error_messages.MISTAKES)
def test_a_mistake_raises_the_class_that_it_stands_for(kind: str) -> None:
    name, message = error_messages.message_of(kind)
    assert name.rpartition(".")[2] == kind
    assert len(message.split()) > 2


def test_every_class_of_file_errors_has_a_message() -> None:
    assert public_errors() - {"BudgetError"} <= set(error_messages.MISTAKES)
    assert all(name in nplora.formats.__all__ for name in public_errors() if hasattr(errors, name))


# ---- docstrings and signatures ----


def test_a_docstring_becomes_rst_in_which_nothing_is_markup() -> None:
    text = """The first line, with *stars* and name_ and a|b.

y = x Wᵀ

    y = x Wᵀ + scale · z Aᵀ
    z = x * y

Args:
    x: array (..., d_in), `float32` or *.
Returns:
    `y`.
"""
    assert generated.as_rst(text.splitlines()) == [
        r"The first line, with \*stars\* and name\_ and a\|b.",
        "",
        "y = x Wᵀ",
        "",
        "::",
        "",
        "    y = x Wᵀ + scale · z Aᵀ",
        "    z = x * y",
        "",
        "Args:",
        r"    x: array (..., d_in), ``float32`` or \*.",
        "",
        ":returns:",
        "    ``y``.",
    ]


def test_doctests_stay_as_they_are() -> None:
    lines = ["Example:", "    >>> f(*a)", "    a_ | b", "", "    Then *this*."]
    assert generated.as_rst(lines) == [*lines[:4], r"    Then \*this\*."]


def test_a_signature_is_as_the_source_has_it() -> None:
    assert (generated.signature_of(nplora.FrozenWeight.matmul) or "").startswith("(x: ArrayLike, out: ")
    assert generated.signature_of(nplora.set_num_threads) == "(n: int) -> None"
    assert generated.signature_of(len) is None


def test_a_page_is_printed_with_its_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "models.md"
    monkeypatch.setattr("sys.argv", ["generated.py", str(page)])
    runpy.run_path(str(ROOT / "docs" / "generated.py"), run_name="__main__")
    assert capsys.readouterr().out == generated.fill(page.read_text(encoding="utf-8"))
