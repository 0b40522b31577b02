"""Chat templates: Jinja out of a model's file, which nobody vouches for, rendered within bounds.

jinja2's sandbox keeps a template away from Python's internals. It does not keep it from running for ever or
from filling the memory, so here each rendering has an allowance, of bytes that it may handle, and everything
that it does is paid from it before it is done:

    a line of the template's compiled code      one node; calls and filters some more
    what an operation makes                     its nodes, or the length of a text
    what an operation takes                     the same; where it looks through all of it, to compare or to
                                                write it, what is shared counts each time it is met

Operations that make large things of small ones (`*`, replace, join, split, indent) are charged for what they
will make. What a template may call is listed. So the end of a rendering depends on the template and the
messages alone, not on the machine's clock.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from nplora.formats.errors import FormatError, LimitError, UnsafeError, brief

MAX_TEMPLATE = 1 << 18  # characters; the longest in use have 20,000
ALLOWANCE = 1 << 23
ALLOWANCE_PER_BYTE = 64  # of the messages
_MAX_INPUT = 1 << 32
_NODE = 64  # bytes: about what Python's smallest objects take
_CALL = 16 * _NODE  # what a call takes in time, beside its arguments
_MAX_BITS = 4096  # of an integer
_MAX_WIDTH = 1000  # that a filter may be asked to fill
_FILE = "<chat template>"

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
# Filters and tests that do not look into what a list or a dictionary holds.
_SHALLOW = frozenset(
    ["_made", "_slice", "attr", "boolean", "callable", "count", "d", "default", "defined", "false", "first",
     "float", "integer", "items", "iterable", "last", "length", "list", "map", "mapping", "none", "number",
     "reject", "rejectattr", "reverse", "sameas", "select", "selectattr", "sequence", "string", "true",
     "undefined"]
)  # fmt: skip
_WIDENING = frozenset(["indent", "round", "tojson"])  # filters whose integers are widths
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")  # transformers' mark of what is learned
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_WIDE_FORMAT = re.compile(r"\d{4}|\*")


class ChatTemplate:
    """A compiled template.

    Args:
        text: the template.
        source: whose it is, for messages.
    Raises:
        FormatError: it is not Jinja. LimitError: it is too long.
        ModuleNotFoundError: the package `jinja2` is not installed.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        self._lock = threading.Lock()
        self._program: tuple[_Meter, Any] | None = None  # compiled when it is first needed: that takes jinja2

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a chat.

        Args:
            messages: of strings, numbers, lists and dictionaries. They are not changed.
            variables: whatever else the template may ask for, such as bos_token.
        Raises:
            ValueError: the template refuses the messages, or does not find in them what it needs.
            UnsafeError: it reaches for Python's internals, or takes more than its allowance.
            FormatError, LimitError, ModuleNotFoundError: as for the template.
        """
        variables |= {"messages": plain(list(messages)), "add_generation_prompt": bool(add_generation_prompt)}
        with self._lock, self._failures():
            if self._program is None:
                self._program = _compile(self.text, self.source)
            meter, template = self._program
            meter.allow(_MAX_INPUT)
            meter.allow(ALLOWANCE + ALLOWANCE_PER_BYTE * meter.weigh(variables))
            context = template.new_context(variables)
            with _Traced(meter):
                return str(template.environment.concat(template.root_render_func(context)))

    def _failures(self) -> _Failures:
        return _Failures(self.source)


class _Failures:
    """Tells what goes wrong in a template in the terms of this package."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FormatError | ImportError) or not isinstance(error, Exception):
            return
        from jinja2 import exceptions

        what = f"{self.source}: the chat template"
        if isinstance(error, exceptions.SecurityError):
            raise UnsafeError(f"{what} is not safe: {error}") from error
        if isinstance(error, _ExcessError | OverflowError):
            raise UnsafeError(f"{what} asks for too much: {error}") from error
        if isinstance(error, RecursionError | MemoryError):
            raise UnsafeError(f"{what} nests too deep") from error
        if isinstance(error, exceptions.TemplateSyntaxError | SyntaxError):
            raise FormatError(f"{what} is not Jinja, in line {error.lineno}: {error}") from error
        if isinstance(error, _RefusalError):
            raise ValueError(f"{what} refuses the messages: {error}") from error
        raise ValueError(f"{what} fails with these messages: {type(error).__name__}: {error}") from error


class _RefusalError(Exception):
    """What raise_exception raises."""


class _ExcessError(Exception):
    """An operation that is not even tried."""


def plain(value: Any, change: Callable[[str], str] = str) -> Any:
    """The value, which JSON could hold, as plain Python objects, every text in it changed.

    Raises:
        TypeError: it is another kind of object.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, change) for part in value]
    if not isinstance(value, bool | int | float | None):
        raise TypeError(f"a message of a chat holds a {type(value).__name__}, expected what JSON can hold")
    return value


# ---- the allowance ----


class _Meter:
    """How much a rendering may still handle."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.allow(0)

    def allow(self, amount: int) -> None:
        self.left = self.allowed = amount

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            self.exceeded()

    def exceeded(self) -> NoReturn:
        raise UnsafeError(
            f"{self.source}: the chat template takes more than the {self.allowed:,} bytes of work it may"
        )

    def weigh(self, *values: Any) -> int:
        """The nodes of values and the bytes of their texts; what is shared counts each time it is met."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            total += _NODE
            if isinstance(value, str):
                total += _nbytes(value)
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise UnsafeError(
                    f"{self.source}: the chat template makes an integer of over {_MAX_BITS} bits"
                )
            parts = _parts(value)
            if total + _NODE * (len(waiting) + len(parts)) > self.left:
                self.exceeded()
            waiting.extend(parts)
            waiting.extend(parts.values() if isinstance(parts, dict) else ())
        return total

    def size(self, value: Any) -> int:
        """The value's own bytes."""
        if isinstance(value, str):
            return _NODE + _nbytes(value)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _ExcessError(f"an integer of over {_MAX_BITS} bits")
        return _NODE + _NODE * len(_parts(value))

    def pay(self, *values: Any, deep: bool) -> None:
        """Charge for values that are about to be used."""
        self.charge(self.weigh(*values) if deep else sum(map(self.size, values)))

    def paid(self, value: Any) -> Any:
        """A value that was just made, charged for."""
        self.charge(self.size(value))
        return value

    def written(self, value: Any) -> Any:
        """A value that is about to be written, charged for."""
        self.charge(self.weigh(value))
        return value


_CONTAINERS: tuple[Any, ...] = (
    dict,
    list,
    tuple,
    range,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def _parts(value: Any) -> Any:
    """What the texts of a value are made of, beside its own."""
    if type(value).__name__ == "Namespace":
        return object.__getattribute__(value, "_Namespace__attrs")
    return value if isinstance(value, _CONTAINERS) else ()


def _nbytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


class _Traced:
    """While entered, every line of compiled templates is charged for."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._on_line if frame.f_code.co_filename == _FILE else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._meter.charge(_NODE)
        return self._on_line


# ---- the sandbox ----


def _compile(text: str, source: str) -> tuple[_Meter, Any]:
    """The template in a sandbox of its own, and the meter that the sandbox reads."""
    if len(text) > MAX_TEMPLATE:
        raise LimitError(
            f"{source}: the chat template has {len(text):,} characters, at most {MAX_TEMPLATE:,} are read"
        )
    meter = _Meter(source)
    meter.allow(ALLOWANCE)  # constants are computed while compiling
    environment = _environment(meter)
    text = _END_GENERATION.sub(r"{%\1 endif \2%}", _GENERATION.sub(r"{%\1 if true \2%}", text))
    tree = _guard(environment.parse(text))
    code = environment.compile(tree, name="chat template", filename=_FILE)
    return meter, environment.template_class.from_code(environment, code, environment.globals)


def _environment(meter: _Meter) -> Any:
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
            meter.charge(_amplified(operator, left, right))
            return meter.paid(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            meter.charge(_CALL)
            deep = isinstance(owner, str | list | tuple) or obj is _raise_exception
            meter.pay(owner, *args, *kwargs.values(), deep=deep)
            if isinstance(owner, str):
                meter.charge(_amplified(name, owner, *args))
            return meter.paid(super().call(context, obj, *args, **kwargs))

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        finalize=meter.written,
    )

    def concat(pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            meter.charge(_NODE + _nbytes(piece))
            kept.append(piece)
        return "".join(kept)

    def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # jinja's own argument stands before the value

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            meter.charge(_CALL // 4)
            own, operands = args[:first], [_listed(meter, value) for value in args[first:]]
            meter.pay(*operands, *kwargs.values(), deep=name not in _SHALLOW)
            meter.charge(_amplified(name, *operands, **kwargs))
            return meter.paid(function(*own, *operands, **kwargs))

        return call

    filters: dict[str, Callable[..., Any]] = {name: environment.filters[name] for name in _FILTERS}
    filters |= {"tojson": _tojson, **_OWN_FILTERS}
    environment.concat = concat  # type: ignore[method-assign]
    environment.filters = {name: metered(name, function) for name, function in filters.items()}
    tests: dict[str, Any] = environment.tests
    environment.tests = {name: metered(name, function) for name, function in tests.items()}
    kept = {name: environment.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
    environment.globals = {**kept, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _listed(meter: _Meter, value: Any) -> Any:
    """What a lazy filter gives, as a list."""
    if not isinstance(value, Iterator):
        return value
    items = []
    for item in value:
        meter.charge(_NODE)
        items.append(item)
    return items


def _amplified(name: str, *operands: Any, **named: Any) -> int:
    """The bytes that an operation makes beyond those of its operands."""
    left, right = operands[0], operands[1] if len(operands) > 1 else None
    if name == "*":
        for size, value in ((left, right), (right, left)):
            if isinstance(size, int) and isinstance(value, str | list | tuple):
                return max(0, size) * (_nbytes(value) if isinstance(value, str) else _NODE * len(value))
    elif name == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(0, right)
    elif (name == "%" and isinstance(left, str)) or name == "format":
        if _WIDE_FORMAT.search(str(left)):
            raise _ExcessError(f"the format {brief(left)}, widths may have three digits")
    elif name == "replace" and len(operands) > 2:
        return str(left).count(str(right)) * _nbytes(str(operands[2]))
    elif name == "join":
        separator, items = (left, right) if isinstance(left, str) and right is not None else (right, left)
        return _nbytes(str(separator or "")) * (len(items) if hasattr(items, "__len__") else 0)
    elif name in ("split", "rsplit", "splitlines", "list") and isinstance(left, str):
        return _NODE * (left.count(right) + 1 if isinstance(right, str) and right else len(left))
    elif name in _WIDENING:
        widths = [value for value in (*operands[1:], *named.values()) if type(value) is int]
        if max(widths, default=0) > _MAX_WIDTH:
            raise _ExcessError(f"{name} of {max(widths)}, at most {_MAX_WIDTH}")
        return max(widths, default=0) * len(json.dumps(left, default=str)) if name != "round" else 0
    return 0


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
    raise _RefusalError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100 or re.search(r"\d", format):
        raise _ExcessError(f"the time as {brief(format)}")
    return datetime.datetime.now().strftime(format)


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
        node.expr = _filter("_compared", node.expr)
        for operand in node.ops:
            operand.expr = _filter("_compared", operand.expr)
    return node


def _filter(name: str, node: Any, arguments: Sequence[Any] = ()) -> Any:
    from jinja2 import nodes

    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)
