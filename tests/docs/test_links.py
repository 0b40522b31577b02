"""Links: in the sources of all pages, and how scripts/check_site.py finds bad ones in the built pages."""

import json
import re
from pathlib import Path

import pytest
from scripts.check_site import Site

import generated
from pages import PAGES, ROOT, blocks_of_text

SOURCES = [page for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] if page.exists()]
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")


def prose(page: Path) -> str:
    """A page with its generated parts and without its code."""
    text = generated.fill(page.read_text(encoding="utf-8"))
    for block in blocks_of_text(page.name, text):
        text = text.replace(block.text, "\n") if block.text.strip() else text
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them, and those that it names itself."""
    text = generated.fill(page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#{1,6} (.+?)#*$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]
    return {*slugs, *re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for address in _LINK.findall(prose(page)):
        if re.match(r"https?://|mailto:", address):
            continue
        path, _, anchor = address.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {address}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {address}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)+)```", index)
    names = [name for names in listed for name in names.split()]
    assert sorted(["index", *names]) == sorted(page.stem for page in PAGES if page.name != "README.md")


# ---- the built site ----


def site(directory: Path, body: str, **others: str) -> Site:
    for name, text in {"index.html": f"<html>{body}</html>", **others}.items():
        (directory / name).write_text(text)
    return Site(directory)


def test_a_sound_site_has_no_problems(tmp_path: Path) -> None:
    body = (
        '<a href="#here">x</a><h1 id="here">h</h1><a href="b.html#there">y</a><a href="https://e.org/x">z</a>'
        '<link rel="stylesheet" href="s.css?v=1"><script src="a.js"></script>'
        '<img src="data:image/png;base64,AA">'
    )
    others = {
        "b.html": '<p id="there">', "s.css": "p{background:url(data:x)}", "a.js": "x='http://www.w3.org/2000/svg'"
    }  # fmt: skip
    found = site(tmp_path, body, **others)
    assert found.problems == []
    assert found.external == {"https://e.org/x": {"index.html"}}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="no.html">x</a>', "no such file: no.html"),
        ('<a href="#no">x</a>', "no such anchor: #no"),
        ('<script src="https://cdn.org/x.js"></script>', "is loaded from elsewhere: https://cdn.org/x.js"),
        ('<script src="//cdn.org/x.js"></script>', "is loaded from elsewhere: //cdn.org/x.js"),
        (
            '<link rel="stylesheet" href="https://fonts.org/f">',
            "is loaded from elsewhere: https://fonts.org/f",
        ),
        ('<img src="https://img.org/badge.svg">', "is loaded from elsewhere: https://img.org/badge.svg"),
        ("<style>@import 'https://f.org/a.css';</style>", "is loaded from elsewhere: https://f.org/a.css"),
        ('<p style="background: url(https://f.org/a.png)">', "is loaded from elsewhere: https://f.org/a.png"),
    ],
)
def test_what_is_wrong_with_a_page_is_found(body: str, problem: str, tmp_path: Path) -> None:
    assert [line.partition(": ")[2] for line in site(tmp_path, body).problems] == [problem]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.css", "@font-face{src:url('https://f.org/a.woff2')}"),
        ("s.css", "@import url(https://f.org/a.css);"),
        ("a.js", "fetch('https://f.org/index.json')"),
        ("a.js", 'const m = await import("https://f.org/m.js")'),
    ],
)
def test_what_styles_and_scripts_load_from_elsewhere_is_found(name: str, text: str, tmp_path: Path) -> None:
    problems = site(tmp_path, "", **{name: text}).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: is loaded from elsewhere: https://f.org/")


def index(terms: dict[str, int | list[int]]) -> str:
    """An index of words, as Sphinx writes it."""
    words = {"docnames": ["b", "index"], "terms": terms, "titleterms": {}}
    return f"Search.setIndex({json.dumps(words)})"


SEARCH = '<h1>Search</h1><script src="_static/searchtools.js"></script><script src="searchindex.js"></script>'


@pytest.mark.parametrize(
    ("terms", "search", "problems"),
    [
        ({"serv": 0, "adapt": [0, 1]}, SEARCH, []),
        ({"adapt": [0, 1]}, SEARCH, ["b.html: the search does not find it by its title, 'Serving'"]),
        (
            {"serv": 0, "adapt": [0, 1]},
            SEARCH.replace('<script src="searchindex.js"></script>', ""),
            ["search.html: does not load searchindex.js"],
        ),
    ],
)
def test_the_search_must_find_each_page_by_its_title(
    terms: dict[str, int | list[int]], search: str, problems: list[str], tmp_path: Path
) -> None:
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "searchtools.js").write_text("")
    others = {"b.html": "<h1>Serving<a>¶</a></h1>", "search.html": search, "searchindex.js": index(terms)}
    assert site(tmp_path, "<h1>Adapters <em>and</em> files</h1>", **others).problems == problems
