"""A Sphinx extension: parts of pages that are made from the code when the pages are built.

A page asks for a part with a comment on a line of its own:

    <!-- generated: families -->            the model families, from their registry
    <!-- generated: encoders -->            the families of encoders, from their registry
    <!-- generated: storages -->            the types of weights, from the core and from GGUF's list
    <!-- generated: commands -->            every command, from the parser that `--help` prints
    <!-- generated: api Module Linear -->   documentation of these names of `nplora`, from their docstrings
    <!-- generated: module nplora.x -->     the same for all public names of a module
    <!-- generated: message DataError -->   a message that a run of today prints

The parts are Markdown, so that links to their headings are checked as all others. Without Sphinx,
`python docs/generated.py PAGE` prints a page with its parts.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import error_messages
import nplora
from nplora.cli.parser import COMMANDS, parser_of
from nplora.formats.gguf.ggml_types import GGML_TYPES
from nplora.models.families import ENCODERS, FAMILIES, EncoderFamily, Family
from nplora.weights import storages

_PART = re.compile(r"^<!-- generated: (\w+) ?(.*?) -->$", re.MULTILINE)
# What only readers of the Markdown file need, in pages whose content is made when the site is built.
_FOR_THE_REPOSITORY = re.compile(r"^<!-- in the repository -->\n.*?^<!-- end -->\n", re.MULTILINE | re.DOTALL)


def fill(text: str) -> str:
    """The text of a page with its generated parts, and without what only the repository's readers need."""
    return _PART.sub(lambda match: PARTS[match[1]](*match[2].split()), _FOR_THE_REPOSITORY.sub("", text))


def escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# ---- model families ----


def families() -> str:
    """A row for each family: its name, what its file says it is, and its names in files."""
    return _family_table(FAMILIES)


def encoders() -> str:
    """The same for the families of encoders."""
    return _family_table(ENCODERS)


def _family_table(families: Iterable[Family | EncoderFamily]) -> str:
    rows = [
        (
            type(family).__name__,
            escaped(_first_sentence(sys.modules[type(family).__module__].__doc__ or "")),
            f"`{family.model_type}`",
            f"`{family.architecture}`" if family.architecture else "",
        )
        for family in families
    ]
    return table(("family", "what it is", "`model_type` in `config.json`", "architecture in GGUF"), rows)


def _first_sentence(docstring: str) -> str:
    return " ".join(docstring.strip().partition("\n\n")[0].split())


# ---- types of weights ----


def weights() -> str:
    """A row for each type: values and bytes of a block, and bits for each value."""
    rows = []
    for name in storages.STORAGES:
        values = storages.block_elements(name)
        nbytes = storages.row_nbytes(name, values)
        ggml = storages.GGML_NAMES.get(name)
        rows.append(
            (
                f"`{name}`",
                f"`{ggml}`" if ggml else "none",
                values,
                nbytes,
                f"{8 * nbytes / values:g}",
                f"`{_shorter(name)}`" if _shorter(name) else "any row fits" if values == 1 else "refused",
            )
        )
    titles = ("type", "in GGUF", "values in a block", "bytes in a block", "bits per value")
    text = table((*titles, "if a row does not fill whole blocks"), rows)
    known = {*storages.GGML_BLOCKS, *storages.GGML_FLOATS}
    others = [f"`{name}`" for name, kind in GGML_TYPES.items() if name not in known and kind.dtype is None]
    return (
        f"{text}\nGGUF files may hold other types. nplora lists and copies them, but does not decode them: "
        f"{', '.join(others)}.\n"
    )


def _shorter(name: str) -> str | None:
    return storages.FORMATS[name].shorter if name in storages.FORMATS else None


# ---- commands ----


def commands() -> str:
    """A section for each command: its usage, and its arguments with their help."""
    return "\n".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    parser = _subparser(name)
    parts = [f"## nplora {name}", escaped(parser.description or ""), f"```text\n{_usage(parser)}\n```"]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        shown = [action for action in shown if not isinstance(action, argparse._HelpAction)]
        if shown:
            if group.title not in ("options", "positional arguments"):
                parts.append(f"**{escaped((group.title or '').capitalize())}**")
                parts.append(escaped(group.description or ""))
            parts.extend(_argument(parser, action) for action in shown)
    parts.append(escaped(parser.epilog or ""))
    return "\n\n".join(part for part in parts if part) + "\n"


def _subparser(name: str) -> argparse.ArgumentParser:
    subparsers = next(
        action for action in parser_of([name])._actions if isinstance(action, argparse._SubParsersAction)
    )
    parser: argparse.ArgumentParser = subparsers.choices[name]
    return parser


def _usage(parser: argparse.ArgumentParser) -> str:
    """The command with what it needs; other options are `[options]`."""
    words = [parser.prog]
    for action in parser._actions:
        value = _value(action)
        if not action.option_strings:
            words.append({"?": f"[{value}]", "+": f"{value} ..."}.get(str(action.nargs), value))
        elif action.required:
            words.append(f"{action.option_strings[0]} {value}")
    options = [a for a in parser._actions if a.option_strings and not a.required]
    return " ".join([*words, *(["[options]"] if len(options) > 1 else [])])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = action.option_strings or [_value(action)]
    value = f" {_value(action)}" if action.option_strings and action.nargs != 0 else ""
    text = parser._get_formatter()._expand_help(action)
    return f"{', '.join(f'`{name}{value}`' for name in names)}\n: {escaped(text)}"


# ---- Python ----


def names(*wanted: str) -> str:
    """Documentation of names of `nplora`."""
    return "".join(_documented(f"nplora.{name}", getattr(nplora, name)) for name in wanted)


def module(path: str) -> str:
    """Documentation of a module's public names. What `nplora` has itself stands elsewhere on the page."""
    owner = _object(path)
    ours = {id(getattr(nplora, name)) for name in nplora.__all__}
    text = _rst(f".. automodule:: {owner.__name__}\n   :no-index:")
    for name in public_names(owner):
        value = getattr(owner, name)
        if id(value) not in ours and callable(value):
            text += _documented(f"{owner.__name__}.{name}", value)
    return text


def _object(path: str) -> Any:
    """nplora.a.b, which may be loaded late."""
    value: Any = nplora
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def public_names(owner: types.ModuleType) -> list[str]:
    """The names in `__all__`; or, without it, what the module defines without an underscore."""
    listed = getattr(owner, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, value in vars(owner).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == owner.__name__
    ]


def asked_for(text: str) -> tuple[set[str], set[str]]:
    """The names of `nplora`, and the modules, that a page asks for."""
    parts = [(kind, words.split()) for kind, words in _PART.findall(text)]
    given = {word for kind, words in parts if kind == "api" for word in words}
    return given, {word for kind, words in parts if kind == "module" for word in words}


def _documented(path: str, value: Any) -> str:
    if isinstance(value, type):
        bases = "" if value.__bases__ == (object,) else "\n   :show-inheritance:"
        return _rst(f".. autoclass:: {path}\n   :members:{bases}")
    if inspect.isroutine(value):
        return _rst(f".. autofunction:: {path}")
    return _rst(f".. autodata:: {path}\n   :no-value:")


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```\n\n"


PARTS: dict[str, Callable[..., str]] = {
    "families": families,
    "encoders": encoders,
    "storages": weights,
    "commands": commands,
    "api": names,
    "module": module,
    "message": error_messages.block,
}


# ---- signatures: as the source has them ----


def signature_of(value: Any) -> str | None:
    """The arguments of a function as its source has them: `ArrayLike`, not the union that it stands for."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    arguments = tree.args
    if inspect.ismethod(value) or (arguments.args and arguments.args[0].arg in ("self", "cls")):
        arguments.args = arguments.args[1:]
    returned = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
    return _short_types(f"({ast.unparse(arguments)}){returned}")


def _short_types(text: str) -> str:
    return re.sub(r"\b(?:npt|np|collections\.abc|typing)\.(?=[A-Z])", "", text).replace("'", '"')


def _set_signature(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    if what == "class":
        is_generated = dataclasses.is_dataclass(value)
        found = None if is_generated else signature_of(value.__init__)
        if is_generated:
            found = _fields_as_arguments(value)
    else:
        found = signature_of(value)
    if found is None:
        return None
    arguments, _, result = found.partition(") -> ")
    if not result:
        return arguments, ""
    return f"{arguments})", "" if what == "class" else result


def _fields_as_arguments(owner: type) -> str:
    given = []
    for field in dataclasses.fields(owner):
        if field.init:
            kind = (
                field.type
                if isinstance(field.type, str)
                else getattr(field.type, "__name__", str(field.type))
            )
            has_default = field.default is not dataclasses.MISSING
            given.append(f"{field.name}: {kind}" + (f" = {field.default!r}" if has_default else ""))
    return _short_types(f"({', '.join(given)})")


# ---- docstrings: plain text, so nothing in them is markup ----

_SECTION = re.compile(
    r"(Args|Arguments|Attributes|Examples?|Notes?|Raises|Returns|Warns|Warnings?|Yields):\s*"
)


def as_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText that Napoleon reads.

    Text in `backticks` becomes code. An indented part outside of a section, such as a formula, becomes a
    literal block. All other markup is escaped. "Returns" becomes a field here, because Napoleon would take
    the words before a colon for a type.
    """
    out: list[str] = []
    in_section = in_doctest = in_block = False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            in_doctest = False
            out.append("")
            continue
        if indent == 0:
            in_section, in_block = bool(_SECTION.fullmatch(text)), False
            if out and ((in_section and out[-1]) or out[-1].startswith(" ")):
                out.append("")
        in_doctest = in_doctest or text.startswith(">>>")
        if in_section and indent == 0:
            out.append(":returns:" if text == "Returns:" else line)
            continue
        if in_doctest:
            out.append(line)
            continue
        if indent and not in_section:
            if not in_block:
                out += [*([""] if out and out[-1] else []), "::", ""]
            in_block = True
            out.append(line)
            continue
        if text.startswith("- ") and out and out[-1] and not out[-1].strip().startswith("- "):
            out.append("")
        out.append(" " * indent + _inline(text))
    return out


def _inline(text: str) -> str:
    """A line of text. What stands in backticks is code, and the rest is no markup."""
    out = ""
    for piece in re.split(r"(`+[^`]+`+)", text):
        if piece.startswith("`"):
            out += f"{_apart(out[-1:])}``{piece.strip('`')}``"
        else:
            plain = re.sub(r"([*|`\\]|_(?=\W|$))", r"\\\1", piece)
            out += _apart(plain[:1]) * bool(out) + plain
    return out


def _apart(letter: str) -> str:
    """What separates code from a letter beside it; nothing is printed for it."""
    return "\\ " if letter.isalnum() else ""


def _set_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)
    if what == "class" and dataclasses.is_dataclass(value):
        options_of = list(_options(value))
        if options_of:
            lines += ["", "Attributes:", *options_of, ""]


def _options(owner: type) -> Iterator[str]:
    for field in dataclasses.fields(owner):
        if "help" in field.metadata:
            yield f"    {field.name}: {_inline(field.metadata['help'])}"


def _fill_page(app: Any, name: str, source: list[str]) -> None:
    source[0] = fill(source[0])


def _outdated(app: Any, env: Any, *changes: Any) -> list[str]:
    """Pages with generated parts are always read again: the code may have changed."""
    return [name for name in env.found_docs if _PART.search(Path(env.doc2path(name)).read_text("utf-8"))]


def _set_dashes(app: Any, tree: Any) -> None:
    """Write a dash between an argument and its text. Sphinx writes two hyphens, for smart quotes to join."""
    for node in list(tree.findall(lambda node: isinstance(node, str) and node.startswith(" -- "))):
        text = node[4:]
        is_last = not text.strip() and not "".join(
            n.astext() for n in node.parent[node.parent.index(node) + 1 :]
        )
        node.parent.replace(node, [] if is_last else type(node)(f" \N{EN DASH} {text}"))


def setup(app: Any) -> dict[str, bool]:
    app.connect("env-get-outdated", _outdated)
    app.connect("source-read", _fill_page)
    app.connect("doctree-read", _set_dashes)
    app.connect("autodoc-process-signature", _set_signature)
    app.connect("autodoc-process-docstring", _set_docstring, priority=100)  # before Napoleon
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Print a page of the documentation with its generated parts."
    )
    parser.add_argument("page", type=Path, metavar="PAGE", help="Markdown file, such as docs/models.md")
    print(fill(parser.parse_args().page.read_text("utf-8")), end="")
