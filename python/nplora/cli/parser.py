"""The parser of the command line, and the arguments that several commands share."""

import argparse
import dataclasses
import importlib
import os
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from nplora import _core
from nplora.cli.errors import UsageError, one_line
from nplora.weights import INFERENCE_COMPUTES

T = TypeVar("T")

# The commands, each with its module: HELP, `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "finetune": "finetune",
    "plan": "plan",
    "eval": "evaluate",
    "generate": "generate",
    "demo": "demo",
    "plot": "plot",
    "info": "info",
    "convert": "convert",
    "combine": "combine",
    "merge": "merge",
}

# The storage types of files: "same" keeps the type of each weight.
STORAGES = (
    *("same", "float32", "float64", "float16", "bfloat16"),
    *(name for name, block in _core.block_formats().items() if block.ggml_name is not None),
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nplora: error: {one_line(message)} (try {self.prog} --help)\n")


def parser_of(words: Sequence[str]) -> Parser:
    """The parser for these words: it has the arguments of the command that they name, and of no other.

    The modules of the other commands, and what these import, need not be loaded.
    """
    parser = Parser(prog="nplora", description="LoRA fine-tuning on CPUs, from NumPy.")
    parser.add_argument("--version", action="version", version=f"nplora {_core.config()['version']}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = next((word for word in words if not word.startswith("-")), None)
    for name in [named] if named in COMMANDS else COMMANDS:
        module = importlib.import_module(f"nplora.cli.{COMMANDS[name]}")
        added = commands.add_parser(name, help=module.HELP, description=module.HELP)
        added.set_defaults(run_command=module.run, prog=added.prog)
        if name == named:
            module.add_arguments(added)
    return parser


# ---- arguments that several commands have ----


def add_model(parser: argparse.ArgumentParser) -> None:
    text = "GGUF file, or directory with config.json, *.safetensors and tokenizer.json"
    parser.add_argument("model", metavar="MODEL", type=path, help=text)


def add_data(parser: argparse.ArgumentParser, more: str = "") -> None:
    text = f".jsonl, .csv or .txt file, or directory with train.jsonl and valid.jsonl{more}"
    parser.add_argument("--data", metavar="FILE", type=path, required=True, help=text)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    text = "PEFT directory or llama.cpp file, and its weight (default: 1); several adapters add up"
    parser.add_argument("--adapter", metavar="PATH[:WEIGHT]", type=weighted_path, action="append", help=text)
    add_any_base(parser)


def add_any_base(parser: argparse.ArgumentParser) -> None:
    text = "accept an adapter that was trained on another model with the same shapes"
    parser.add_argument("--any-base", action="store_true", help=text)


def add_compute(parser: argparse.ArgumentParser) -> None:
    text = "arithmetic of the frozen products; int8: for quantised weights and few tokens (default: float32)"
    parser.add_argument("--compute", choices=INFERENCE_COMPUTES, default="float32", help=text)


def path(text: str) -> str:
    """A path. An empty one, as from an unset variable of the shell, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def weighted_path(text: str) -> tuple[str, float]:
    """PATH:WEIGHT, or PATH alone, even if an existing path ends like a weight."""
    before, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return path(text), 1.0
    try:
        return path(before), float(weight)
    except ValueError:
        problem = f"{text!r} does not exist, and in ADAPTER:WEIGHT {weight!r} is not a number"
        raise argparse.ArgumentTypeError(problem) from None


# ---- options that are the fields of a dataclass ----


def add_options(parser: argparse.ArgumentParser, options: type, shown: str = "help") -> None:
    """Add an option for every field of a dataclass, with the help that the field's metadata holds.

    Args:
        shown: if the metadata of a field are False for this, the option is hidden from the help.
    """
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        text = field.metadata["help"] if field.metadata.get(shown, True) else argparse.SUPPRESS
        if kinds[field.name] is bool:
            parser.add_argument(_option(field.name), action="store_true", help=text)
            if alias := field.metadata.get("alias"):
                hidden = argparse.SUPPRESS
                parser.add_argument(_option(alias), dest=field.name, action="store_true", help=hidden)
        else:
            _add_value(parser, field, kinds[field.name], text)


def _add_value(
    parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", kind: Any, text: str
) -> None:
    several = typing.get_origin(kind) is tuple
    plain = [part for part in typing.get_args(kind) if part not in (types.NoneType, ...)] or [kind]
    choices, default = field.metadata.get("choices"), field.default
    if text != argparse.SUPPRESS:
        shown = " ".join(default) if isinstance(default, tuple) else default
        text = text.replace("%", "%%") + (f" (default: {shown})" if default not in (None, ()) else "")
    parser.add_argument(
        _option(field.name),
        type=plain[0],
        action="append" if several else "store",
        choices=choices,
        metavar=None if choices else plain[0].__name__.upper().replace("STR", "TEXT"),
        help=text,
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass that were given on the command line."""
    found = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(options)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def checked(options: Callable[..., T], given: dict[str, Any]) -> T:
    """A dataclass made of these fields; its errors are errors of usage."""
    try:
        return options(**given)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
