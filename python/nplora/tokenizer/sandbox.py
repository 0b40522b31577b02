"""The sandbox of chat templates: what they may call and reach, every hook of jinja2's paid for."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from nplora.formats.errors import LimitError, UnsafeError, brief
from nplora.tokenizer.allowance import (
    ALLOWANCE,
    CALL,
    FILE,
    NODE,
    ExcessError,
    ExhaustedError,
    Meter,
    amplified,
    nbytes,
)

MAX_TEMPLATE = 1 << 16  # characters; the longest in use have 20,000

_STRING_METHODS = frozenset(
    ["capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
     "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower",
     "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition",
     "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"]
)  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
}
_FILTERS = frozenset(
    ["abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
     "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max",
     "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort",
     "string", "sum", "title", "trim", "unique", "upper", "wordcount"]
)  # fmt: skip
# Filters and tests that take as long for a large list or text as for a small one.
_CONSTANT_FILTERS = frozenset(["attr", "count", "d", "default", "first", "last", "length"])
_CONSTANT_TESTS = frozenset(
    ["boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number",
     "sameas", "sequence", "string", "true", "undefined"]
)  # fmt: skip
# Filters that do not look into what a list or a dictionary holds.
_SHALLOW = frozenset(
    ["_made", "_slice", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"]
)  # fmt: skip
# Bytes: what the compiler takes in time for a node at each level of statements around it, and to copy a name.
_LEVEL, _NAME = 4 * NODE, 16
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")  # transformers' mark of what is learned
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


class RefusalError(Exception):
    """What raise_exception raises."""


def compile_template(text: str, source: str) -> tuple[Meter, Any]:
    """The template in a sandbox of its own, and the meter that the sandbox reads."""
    if len(text) > MAX_TEMPLATE:
        raise LimitError(
            f"{source}: the chat template has {len(text):,} characters, at most {MAX_TEMPLATE:,} are read"
        )
    meter = Meter(source)
    meter.allow(ALLOWANCE)  # for compiling, which computes constants too
    environment = _environment(meter)
    text = _END_GENERATION.sub(r"{%\1 endif \2%}", _GENERATION.sub(r"{%\1 if true \2%}", text))
    tree = environment.parse(text)
    try:
        _pay_for_compiling(tree, meter)
        code = environment.compile(_guard(tree), name="chat template", filename=FILE)
    except ExhaustedError as error:
        raise UnsafeError(str(error)) from None  # whatever the chat
    return meter, environment.template_class.from_code(environment, code, environment.globals)


def _environment(meter: Meter) -> Any:
    """jinja2's sandbox, each of its hooks paid for."""
    try:
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        message = 'chat templates need the package jinja2: pip install "nplora[llm]"'
        raise ModuleNotFoundError(message, name="jinja2") from error

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            kinds = [allowed for kind, allowed in _METHODS.items() if isinstance(obj, kind)]
            if kinds or isinstance(obj, int | float | bytes):
                return any(attr in allowed for allowed in kinds)
            return super().is_safe_attribute(obj, attr, value)

        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

        def wrap_str_format(self, value: Any) -> None:
            return None  # so that format and format_map count as what they are: attributes, not allowed

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            meter.pay(left, right, deep=operator == "%")
            meter.charge(amplified(meter, operator, left, right))
            return meter.paid(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            meter.charge(CALL)
            deep = isinstance(owner, str | list | tuple) or obj is _raise_exception
            meter.pay(owner, *args, *kwargs.values(), deep=deep)
            if isinstance(owner, str):
                meter.charge(amplified(meter, name, owner, *args))
            return meter.paid(super().call(context, obj, *args, **kwargs))

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        optimized=False,  # it would fold the same again at each level: the cube of an expression's depth
        finalize=meter.written,
    )

    def concat(pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            meter.charge(NODE + nbytes(piece))
            kept.append(piece)
        return "".join(kept)

    def metered(name: str, function: Callable[..., Any], constant: bool) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # jinja's own argument stands before the value

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            meter.charge(CALL // 4)
            own, operands = args[:first], [_listed(meter, value) for value in args[first:]]
            if constant:
                meter.charge(NODE)
                return function(*own, *operands, **kwargs)
            meter.pay(*operands, *kwargs.values(), deep=name not in _SHALLOW)
            meter.charge(amplified(meter, name, *operands, **kwargs))
            return meter.paid(function(*own, *operands, **kwargs))

        return call

    filters: dict[str, Callable[..., Any]] = {name: environment.filters[name] for name in _FILTERS}
    filters |= {"tojson": _tojson, **_OWN_FILTERS}
    environment.concat = concat  # type: ignore[method-assign]
    environment.filters = {
        name: metered(name, function, name in _CONSTANT_FILTERS) for name, function in filters.items()
    }
    tests: dict[str, Any] = environment.tests
    environment.tests = {
        name: metered(name, function, name in _CONSTANT_TESTS) for name, function in tests.items()
    }
    kept = {name: environment.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
    environment.globals = {**kept, "raise_exception": _raise_exception, "strftime_now": strftime_now(None)}
    return environment


def _listed(meter: Meter, value: Any) -> Any:
    """What a lazy filter gives, as a list."""
    if not isinstance(value, Iterator):
        return value
    items = []
    for item in value:
        meter.charge(NODE)
        items.append(item)
    return items


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers has it: without HTML's escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise RefusalError(message)


def strftime_now(now: datetime.datetime | None) -> Callable[[str], str]:
    """The function of that name which templates know; None: it tells the clock's time."""

    def told(format: str) -> str:
        if len(format) > 100 or re.search(r"\d", format):
            raise ExcessError(f"the time as {brief(format)}")
        return (now or datetime.datetime.now()).strftime(format)

    return told


def _pay_for_compiling(tree: Any, meter: Meter) -> None:
    """Statements look through their bodies at each level that they nest to; branches copy all names."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError

    names = len({named.name for named in tree.find_all((nodes.Name, nodes.NSRef, nodes.Macro))})
    waiting = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
            raise SecurityError("it reaches for another template")
        if isinstance(node, nodes.Block) and node.scoped:
            raise SecurityError("it has a scoped block")  # which would be given a copy of every name
        nests = hasattr(node, "body")
        branches = nests or isinstance(node, nodes.CondExpr)
        meter.charge(_LEVEL * depth + _NAME * names * branches)
        waiting += [(child, depth + nests) for child in node.iter_child_nodes()]


# ---- what jinja2 compiles to Python's own operations, as filters, which are paid for ----

_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "_made": lambda value: value,
    "_compared": lambda value: value,
    "_text": lambda parts: "".join(map(str, parts)),
    "_slice": lambda value, start, stop, step: value[start:stop:step],
}


def _guard(node: Any) -> Any:
    """The tree with `~`, slices, comparisons and literals of containers handed to filters."""
    from jinja2 import nodes

    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_guard(part) if isinstance(part, nodes.Node) else part for part in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _guard(value))
    if isinstance(node, nodes.Concat):
        return _filter("_text", nodes.List(node.nodes, lineno=node.lineno))
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        none = nodes.Const(None, lineno=node.lineno)
        return _filter("_slice", node.node, [none if bound is None else bound for bound in bounds])
    if isinstance(node, nodes.List | nodes.Dict):
        return _filter("_made", node)
    if isinstance(node, nodes.Tuple) and node.ctx == "load":
        return _filter("_made", node)
    if isinstance(node, nodes.Compare):
        parts: list[Any] = [node, *node.ops]
        long = [part for part in parts if not _is_short(part.expr)]
        for part in long if len(parts) == 2 and long else parts:
            part.expr = _filter("_compared", part.expr)
    return node


def _is_short(node: Any) -> bool:
    """Whether it is a constant that costs nothing beside what it is compared with."""
    from jinja2 import nodes

    return isinstance(node, nodes.Const) and len(str(node.value)) <= NODE


def _filter(name: str, node: Any, arguments: Sequence[Any] = ()) -> Any:
    from jinja2 import nodes

    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)
