"""The parser of the command line, and the arguments that several commands share."""

import argparse
import dataclasses
import importlib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Container, Sequence
from typing import Any, NoReturn, TypeVar

from nplora import _check, _core
from nplora.cli.errors import UsageError, one_line
from nplora.formats import model_directory
from nplora.runtime.stderr import stderr
from nplora.weights import COMPUTES

T = TypeVar("T")

# {command: module}. Each module has HELP, `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "finetune": "finetune",
    "plan": "plan",
    "data": "data",
    "teach": "teach",
    "eval": "evaluate",
    "tune": "tune",
    "classify": "classify",
    "embed": "embed",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "demo": "demo",
    "plot": "plot",
    "info": "info",
    "convert": "convert",
    "combine": "combine",
    "merge": "merge",
    "export": "export",
}

# The storage types of files: "same" keeps the type of each weight.
STORAGES = (
    *("same", "float32", "float64", "float16", "bfloat16"),
    *(name for name, block in _core.block_formats().items() if block.ggml_name is not None),
)


# {a name of a command in other programs: our command}
_OTHER_COMMANDS = {
    **dict.fromkeys(("train", "sft", "lora", "fine-tune", "fine_tune"), "finetune"),
    **dict.fromkeys(("evaluate", "test", "perplexity"), "eval"),
    **dict.fromkeys(("run", "infer", "inference"), "generate"),
    **dict.fromkeys(("sweep", "search", "optimize"), "tune"),
    **dict.fromkeys(("preview", "dataset", "tokenize"), "data"),
    "classifier": "classify",
    "predict": "classify",
    "fuse": "merge",
    "quantize": "convert",
    "distill": "teach",
    "server": "serve",
}


class WrongArguments(SystemExit):
    """Raised after the parser has printed an error, to end the program with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:  # what the other ranks of a distributed run print
        return self.message


class Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line.

    Options cannot be abbreviated: in a later version, an abbreviation might fit several options.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        text = one_line(message)
        print(f"nplora: error: {text} (try {self.prog} --help)", file=stderr)
        raise WrongArguments(text)


class CommandParser(Parser):
    """The parser of one command. If an option is unknown, the parser suggests a similar option."""

    def error(self, message: str) -> NoReturn:
        """Print an error. If the value of an option is missing, describe the value."""
        found = re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", message)
        action = found and self._option_string_actions.get(found[1].rpartition("/")[2])
        super().error(message + (f": {_value_of(action)}" if action else ""))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words. If there is a hint for an unknown option, print all unknown options and exit.

        Without a hint, return the unknown options. The caller refuses them.
        """
        words = (word.partition("=")[0] for word in itertools.takewhile("--".__ne__, args or ()))
        unknown = {word: self._suggestion(word) for word in words if self._is_unknown(word)}
        with_words = [word for word, near in unknown.items() if near]
        if with_words:
            without = [word for word in unknown if word.startswith("--") and not unknown[word]]
            if len(with_words) + len(without) == 1:
                self.error(f"no option {with_words[0]}{unknown[with_words[0]]}")
            named = [f"{word} ({unknown[word].removeprefix('; ')})" for word in with_words]
            self.error(f"no options {', '.join(named + without)}")
        return super().parse_known_args(args, namespace)

    def _is_unknown(self, word: str) -> bool:
        return word.startswith("-") and " " not in word and word not in self._option_string_actions

    def _long_options(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def _suggestion(self, word: str) -> str:
        """The end of a message about an unknown option (see `_check.suggestion`).

        If the word names a value of an option, the suggestion is this option with the value: for --int8, it
        is --compute int8. If the word is the beginning of exactly one option, the suggestion is this option.
        """
        options = [action for action in self._actions if action.choices and action.option_strings]
        values = [option.option_strings[-1] for option in options if word[2:] in (option.choices or ())]
        if values:
            return f"; did you mean {values[0]} {word[2:]}?"
        begun = [option for option in self._long_options() if option.startswith(word)]
        if len(begun) == 1 and word.startswith("--"):
            return f"; did you mean {begun[0]}?"
        in_order = {
            action.dest: action.metavar
            for action in self._actions
            if not action.option_strings and action.metavar
        }
        line = " ".join([self.prog, *map(str, in_order.values())])

        def show(name: str) -> str:
            return (
                f"{in_order[name]}, which is given without an option: {line}"
                if name in in_order
                else _option(name)
            )

        names = [option[2:].replace("-", "_") for option in self._long_options()]
        return _check.suggestion(word.lstrip("-").replace("-", "_"), [*in_order, *names], show)


def _value_of(action: argparse.Action) -> str:
    """A description of the value of an option: the possible values, or the beginning of the help text."""
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    if action.help == argparse.SUPPRESS:  # the command accepts this option, but ignores it
        return str(action.metavar or "a value")
    about = re.split(r"[:;(]", (action.help or "").replace("%%", "%"))[0].strip()
    return f"{action.metavar or 'a value'} ({about})"


def parser_of(words: Sequence[str]) -> Parser:
    """Make the parser for a command line. If the line names a command, load only this command's module.

    Raises:
        SystemExit: there is no such command.
    """
    parser = Parser(prog="nplora", description="LoRA fine-tuning on CPUs, from NumPy.")
    parser.add_argument("--version", action="version", version=f"nplora {_core.config()['version']}")
    named = next((word for word in words if not word.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        parser.error(f"no command {named!r}{_suggested_command(named)}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name in [named] if named in COMMANDS else COMMANDS:
        module = importlib.import_module(f"nplora.cli.{COMMANDS[name]}")
        added = commands.add_parser(name, help=module.HELP, description=module.HELP)
        added.set_defaults(run_command=module.run, prog=added.prog)
        if name == named:
            module.add_arguments(added)
            shown = (action for action in added._actions if action.option_strings)
            spelling = {action.dest: action.option_strings[-1] for action in reversed(list(shown))}
            added.set_defaults(options=spelling)
    return parser


def _suggested_command(name: str) -> str:
    ours = _OTHER_COMMANDS.get(name)
    near = f"; did you mean {ours}?" if ours else _check.suggestion(name, COMMANDS)
    return near or f", expected one of {', '.join(COMMANDS)}"


# ---- arguments that several commands have ----


def add_model(parser: argparse.ArgumentParser) -> None:
    text = "GGUF file, or directory with config.json, *.safetensors and tokenizer.json"
    parser.add_argument("model", metavar="MODEL", type=path, help=text)


def add_data(
    parser: argparse.ArgumentParser,
    directory: str = "train.jsonl and, optionally, valid.jsonl",
    weighted: bool = True,
    words: bool = False,
) -> None:
    """Add --data.

    Args:
        directory: the names of the files that are read if the user gives a directory.
        weighted: whether the help text says that a file may have a weight.
        words: whether the help text names .conll files, which hold words with tags.
    """
    suffixes = ".jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow" + (", .conll" if words else "")
    text = f"file of rows ({suffixes}), or directory with {directory}. "
    if weighted:
        text += "WEIGHT is the number of times that an epoch uses each example (default: 1). "
    metavar = "FILE[:WEIGHT]" if weighted else "FILE"
    parser.add_argument(
        "--data",
        metavar=metavar,
        type=weighted_path,
        action="append",
        required=True,
        help=f"{text}Repeatable",
    )


def given_data(data: list[tuple[str, float]]) -> Any:
    """The data in the form that the Python functions take: a path, or pairs (path, weight)."""
    return data[0][0] if len(data) == 1 and data[0][1] == 1 else data


def add_adapters(parser: argparse.ArgumentParser) -> None:
    text = (
        "adapter: PEFT directory or llama.cpp file, with an optional weight (default: 1). Repeatable: the "
        "updates of all given adapters are added"
    )
    parser.add_argument("--adapter", metavar="PATH[:WEIGHT]", type=weighted_path, action="append", help=text)
    add_any_base(parser)


def add_any_base(parser: argparse.ArgumentParser) -> None:
    text = "accept an adapter that was trained on another model with the same shapes"
    parser.add_argument("--any-base", action="store_true", help=text)


def add_compute(parser: argparse.ArgumentParser) -> None:
    text = (
        "arithmetic of the products with frozen weights; int8 makes decoding faster if the weights are "
        "quantised (default: float32)"
    )
    parser.add_argument("--compute", choices=COMPUTES, default="float32", help=text)


def path(text: str) -> str:
    """Return the path. Raise an error if the path is empty, for example because a shell variable is unset."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def weighted_path(text: str) -> tuple[str, float]:
    """Read PATH:WEIGHT or PATH. If a file has the whole text as its name, the text is a PATH.

    Raises:
        FileNotFoundError: the text is the name of an adapter on the Hugging Face Hub instead of a path.
    """
    before, colon, weight = _split_weight(text)
    if not colon or os.path.exists(text):
        return path(text), 1.0
    try:
        found = path(before), float(weight)
    except ValueError:
        model_directory.require_no_hub_name(text, "an adapter")
        problem = f"no such file: {text!r}; if this is PATH:WEIGHT, the weight {weight!r} is not a number"
        raise argparse.ArgumentTypeError(problem) from None
    if not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"the weight of {before!r} is {weight}, expected a finite number")
    return found


def _split_weight(text: str) -> tuple[str, str, str]:
    """Split at the last colon as `str.rpartition` does, but not at the colon of a drive, as in C:\\x."""
    drive = os.path.splitdrive(text)[0]
    start = len(drive) if drive.endswith(":") and os.path.isabs(text) else 0
    before, colon, weight = text[start:].rpartition(":")
    return text[:start] + before, colon, weight


def adapter_path(text: str) -> str:
    """Return the path of an adapter, for a command in which adapters have no weights."""
    before, colon, _ = _split_weight(text)
    if colon and os.path.exists(before) and not os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} has a weight, but this command takes no weights: "
            f"nplora combine {text} --output DIR writes an adapter with that weight"
        )
    return path(text)


def columns(text: str) -> dict[str, str]:
    """Read the names of fields from a text such as "prompt=question,completion=answer"."""
    from nplora.finetuning.options import parse_columns

    try:
        return dict(parse_columns(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


_KINDS: dict[str, Callable[[str], Any]] = {  # {`kind` in a field's metadata: function that reads a value}
    "adapter": adapter_path,
    "columns": columns,
    "metric": str,
    "path": path,
    "pattern": str,
}


# ---- options that are the fields of a dataclass ----


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    shown: str = "help",
    names: Container[str] | None = None,
) -> None:
    """Add an option for every field of a dataclass.

    The help text and the group are in the metadata of the field.

    Args:
        shown: a key of the metadata. If the value of this key is False, --help does not show the option.
        names: the fields that become options; None: all of them.
    """
    kinds = typing.get_type_hints(options)
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for field in dataclasses.fields(options):
        if names is not None and field.name not in names:
            continue
        title = field.metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = _help_of(field) if field.metadata.get(shown, True) else argparse.SUPPRESS
        if kinds[field.name] is bool:
            _add_switch(groups[title], field, text)
        else:
            _add_value(groups[title], field, kinds[field.name], text)


def _help_of(field: "dataclasses.Field[Any]") -> str:
    """Return the help text of a field: its entry "command_help" or, without such an entry, "help".

    In this text, names of fields in backticks become options: `max_length` becomes --max-length.
    """
    text = field.metadata.get("command_help", field.metadata["help"])
    text = re.sub(r"`(\w+)`", lambda match: _option(match[1]), text).replace("%", "%%")
    default = field.default
    if isinstance(default, tuple):
        text += "" if "repeatable" in text else " (repeatable)"
        default = " ".join(default)
    says_default = "(default: " in text or default is None or default is False or default == ""
    return text if says_default else f"{text} (default: {default})"


def _add_switch(group: argparse._ActionsContainer, field: "dataclasses.Field[Any]", text: str) -> None:
    group.add_argument(_option(field.name), action="store_true", help=text)
    if alias := field.metadata.get("alias"):
        hidden = argparse.SUPPRESS
        group.add_argument(_option(alias), dest=field.name, action="store_true", help=hidden)


def _add_value(
    group: argparse._ActionsContainer, field: "dataclasses.Field[Any]", kind: Any, text: str
) -> None:
    several = typing.get_origin(kind) is tuple
    plain = [part for part in typing.get_args(kind) if part not in (types.NoneType, ...)] or [kind]
    kind_name = field.metadata.get("kind", "")
    metavar = field.metadata.get("metavar") or plain[0].__name__.upper().replace("STR", "TEXT")
    group.add_argument(
        _option(field.name),
        type=_KINDS.get(kind_name, plain[0]),
        action="append" if several else "store",
        choices=field.metadata.get("choices"),
        metavar=None if field.metadata.get("choices") else metavar,
        help=text,
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the options that the user has set, as a dict {name of a field of the dataclass: value}."""
    found = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(options)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def checked(options: Callable[..., T], given: dict[str, Any]) -> T:
    """Make an instance of the dataclass `options` from {field: value}. A wrong value raises a UsageError."""
    try:
        return options(**given)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
