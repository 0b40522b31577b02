"""Check the built documentation: its links, its search, and that nothing is loaded from elsewhere.

    python scripts/check_site.py build/docs

Links within the site must name an existing file, and an existing anchor in it. Links to other hosts are
listed, not followed. A script, style sheet, font or picture of another host is an error. The search must find
each page by a word of its title.
"""

import argparse
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, by element: the attributes that hold addresses.
_FETCHED = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "image": ("href", "xlink:href"),
    "img": ("src", "srcset"), "input": ("src",), "link": ("href",), "object": ("data",), "script": ("src",),
    "source": ("src", "srcset"), "track": ("src",), "use": ("href", "xlink:href"), "video": ("src", "poster"),
}  # fmt: skip
_SEARCH = ("searchindex.js", "searchtools.js")  # the index, and the script that looks words up in it
_NOT_SEARCHED = ("search", "genindex", "py-modindex")  # pages that Sphinx adds
_STEM = 4  # letters that a word has in common with its stem, which the index holds
_IN_STYLES = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
# Addresses in scripts that a script could fetch. Namespaces of XML are names, not addresses.
_IN_SCRIPTS = re.compile(r"""(?:fetch|import|importScripts|open)\(\s*[`'"]((?:https?:)?//[^`'"]+)""")


class _Page(HTMLParser):
    """The anchors of a page, its title, its links, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[int, str]] = []
        self.fetched: list[tuple[int, str]] = []
        self.title = ""
        self._in_style = self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given, line = {name: value or "" for name, value in attrs}, self.getpos()[0]
        self.anchors |= {given[name] for name in ("id", "name") if name in given and tag != "meta"}
        if tag in ("a", "area") and "href" in given:
            self.links.append((line, given["href"]))
        for name in _FETCHED.get(tag, ()):
            if name in given and not (
                tag == "link" and given.get("rel") in ("canonical", "author", "license")
            ):
                self.fetched += [(line, address.split()[0]) for address in _addresses(name, given[name])]
        self.fetched += [(line, address) for address in in_styles(given.get("style", ""))]
        self._in_style = tag == "style"
        self._in_title = self._in_title or (tag == "h1" and not self.title)

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += [(self.getpos()[0], address) for address in in_styles(data)]
        self.title += data if self._in_title else ""

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False
        self._in_title = self._in_title and tag != "h1"


def _addresses(attribute: str, value: str) -> list[str]:
    found = value.split(",") if attribute == "srcset" and not value.startswith("data:") else [value]
    return [address for address in found if address.strip()]


def in_styles(text: str) -> list[str]:
    """The addresses in a style sheet."""
    return [first or second for first, second in _IN_STYLES.findall(text)]


def is_elsewhere(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme not in ("", "data")


def found_by_search(index: str) -> dict[str, set[str]]:
    """The first letters of all words that lead to a page, by the name of the page."""
    parsed = json.loads(index.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    names = parsed["docnames"]
    found: dict[str, set[str]] = {name: set() for name in names}
    for kind in ("terms", "titleterms"):
        for word, numbers in parsed[kind].items():
            for number in numbers if isinstance(numbers, list) else [numbers]:
                found[names[number]].add(word[:_STEM].lower())
    return found


class Site:
    """A directory of pages.

    Attributes:
        problems: the errors that were found, one line each.
        external: links to other hosts, with the pages that have them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.pages = {path: _Page(path.read_text("utf-8")) for path in sorted(self.directory.rglob("*.html"))}
        self.problems: list[str] = []
        self.external: dict[str, set[str]] = {}
        for path, page in self.pages.items():
            for line, address in page.links:
                self._check_link(path, line, address)
            for line, address in page.fetched:
                self._check_fetched(path, line, address)
        for path in sorted(self.directory.rglob("*")):
            if path.suffix in (".css", ".js"):
                self._check_text(path)
        if (self.directory / _SEARCH[0]).exists():
            self._check_search()

    def _check_link(self, path: Path, line: int, address: str) -> None:
        if urlsplit(address).scheme in ("mailto", "javascript", "data"):
            return
        if is_elsewhere(address):
            self.external.setdefault(address, set()).add(self._name(path))
            return
        self._check_local(path, line, address)

    def _check_fetched(self, path: Path, line: int, address: str) -> None:
        if is_elsewhere(address):
            self._report(path, line, f"is loaded from elsewhere: {address}")
        elif not address.startswith("data:"):
            self._check_local(path, line, address)

    def _check_local(self, path: Path, line: int, address: str) -> None:
        parts = urlsplit(address)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            self._report(path, line, f"no such file: {address}")
        elif target in self.pages and unquote(parts.fragment) not in {"", *self.pages[target].anchors}:
            self._report(path, line, f"no such anchor: {address}")

    def _check_text(self, path: Path) -> None:
        text = path.read_text("utf-8", errors="replace")
        found = in_styles(text) if path.suffix == ".css" else _IN_SCRIPTS.findall(text)
        for address in found:
            self._check_fetched(path, 0, address.partition("#")[0].partition("?")[0] or "data:")

    def _check_search(self) -> None:
        path = self.directory / "search.html"
        fetched = {Path(urlsplit(address).path).name for _, address in self.pages[path].fetched}
        for script in _SEARCH:
            if script not in fetched:
                self._report(path, 0, f"does not load {script}")
        found = found_by_search((self.directory / _SEARCH[0]).read_text("utf-8"))
        for path, page in self.pages.items():
            name = self._name(path).removesuffix(".html")
            words = {word[:_STEM] for word in re.findall(r"[a-z]{3,}", page.title.lower())}
            if name not in _NOT_SEARCHED and not words & found.get(name, set()):
                self._report(path, 0, f"the search does not find it by its title, {page.title.rstrip('¶')!r}")

    def _report(self, path: Path, line: int, problem: str) -> None:
        self.problems.append(f"{self._name(path)}{f':{line}' if line else ''}: {problem}")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.directory))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="what sphinx-build wrote")
    given = parser.parse_args()
    site = Site(given.directory)
    if not site.pages:
        site.problems.append(f"{given.directory}: no pages")
    if not (site.directory / _SEARCH[0]).is_file():
        site.problems.append(f"{given.directory}: no {_SEARCH[0]}, so the search finds nothing")
    for address, pages in sorted(site.external.items()):
        print(f"external, not followed: {address}  ({len(pages)} pages)")
    for problem in site.problems:
        print(problem, file=sys.stderr)
    links = sum(len(page.links) for page in site.pages.values())
    print(f"{len(site.pages)} pages, {links} links, {len(site.problems)} problems")
    return 1 if site.problems else 0


if __name__ == "__main__":
    sys.exit(main())
