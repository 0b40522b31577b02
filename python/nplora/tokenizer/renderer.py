"""The program that renders chat templates, in a separate process that can be killed.

A request is two lines of JSON on standard input:

- an object with "template", "now", and the limits "compiling" and "rendering" (seconds of CPU time) and
  "memory" (bytes); a limit that only the parent process can enforce is 0;
- an object with the template's variables.

The answer is one line of JSON on standard output: ["text", the rendered text] or [kind of error, reason].

The program is started by its path and does not import the package nplora, so that it starts in a tenth of a
second.
"""

import datetime
import functools
import gc
import importlib
import json
import os
import re
import sys
from typing import Any, NoReturn

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.append(os.path.join(os.path.dirname(here), "platform"))
    limits = importlib.import_module("limits")
    sys.path[:] = sys.argv[1:]
else:
    from nplora.platform import limits

import jinja2
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST_REFUSAL = 1000  # characters
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")  # transformers' tag before trained tokens
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


class RefusalError(Exception):
    """Raised when a template calls `raise_exception`."""


class Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, changed to raise an error for unsafe attributes instead of hiding them."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # jinja2 replaces str.format and str.format_map with safe versions. Before jinja2 3.1.6, the filter
        # `attr` could still reach the original methods.
        formats = isinstance(obj, str) and attr in ("format", "format_map")
        return not (formats or isinstance(obj, type)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it tries to access {attribute!r} of a {type(obj).__name__}")


def answer(request: dict[str, Any], variables: dict[str, Any]) -> tuple[str, str]:
    """Return ("text", the rendered text), or (the kind of error, such as "unsafe", the reason)."""
    try:
        kind, words = _answer(request, variables)
    except RecursionError:
        kind, words = "unsafe", "is nested too deeply"
    return kind, words if kind == "text" else words[:_LONGEST_REFUSAL]


def _answer(request: dict[str, Any], variables: dict[str, Any]) -> tuple[str, str]:
    try:
        limits.limit_compiling(request["compiling"])
        template = _compiled(request["template"])
        limits.limit_compiling(0)
        limits.limit_rendering(request["rendering"])
        now = datetime.datetime.fromisoformat(request["now"])
        context = template.new_context({**variables, "strftime_now": now.strftime})
        return "text", "".join(template.root_render_func(context))
    except (MemoryError, RecursionError):
        raise
    except SecurityError as error:
        return "unsafe", f"is not safe: {error}"
    except (TemplateSyntaxError, SyntaxError) as error:
        return "format", f"is not valid Jinja in line {error.lineno}: {error}"
    except OverflowError as error:
        return "unsafe", f"asks for too much: {error}"
    except RefusalError as error:
        return "value", f"refuses the messages: {error}"
    except Exception as error:
        return "value", f"fails with these messages: {type(error).__name__}: {error}"


@functools.lru_cache(maxsize=1)
def _compiled(text: str) -> Any:
    """Compile a template in a new sandbox."""
    text = _END_GENERATION.sub(r"{%\1 endif \2%}", _GENERATION.sub(r"{%\1 if true \2%}", text))
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension],
        loader=jinja2.FunctionLoader(_other),
        optimized=False,
        finalize=_unchanged,
    )
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(text)


@jinja2.pass_context
def _unchanged(context: Any, value: Any) -> Any:
    """Return `value`. The argument `context` prevents jinja2 from computing constants while it compiles."""
    return value


def _other(name: str) -> NoReturn:
    raise SecurityError("it tries to load another template")


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON. Unlike jinja2's filter, but like transformers, do not escape HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise RefusalError(str(message))


def main() -> None:
    """Render templates until standard input ends.

    If a template takes too long, a timer sends a signal that ends this process, even in the middle of a long
    Python operation.
    """
    limits.isolate()
    gc.freeze()  # the objects so far are never freed
    for line in sys.stdin.buffer:
        request, variables = json.loads(line), json.loads(sys.stdin.buffer.readline())
        gc.collect()  # otherwise reference cycles of earlier templates would add up
        try:
            with limits.limited_memory(request["memory"]):
                rendered = json.dumps(answer(request, variables)).encode()
        except MemoryError:
            limits.end_without_memory()
        sys.stdout.buffer.write(rendered + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
