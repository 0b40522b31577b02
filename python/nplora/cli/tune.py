"""`nplora tune`"""

import argparse
import dataclasses
import types
import typing
from typing import Any

from nplora.cli.errors import UsageError
from nplora.cli.parser import add_data, add_model, add_options, checked, given_data, given_options, path

HELP = (
    "Search for the best learning rate, rank, targets and number of epochs of finetune. The search makes "
    "short runs within a time budget. Print a table of the runs, and the finetune command of the best run."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import FinetuneOptions, TuneOptions
    from nplora.finetuning.tuning.options import NOT_PASSED

    parser.epilog = (
        "If you give an option of finetune, all trials use its value, and tune does not search that option."
    )
    add_model(parser)
    add_data(parser)
    text = "held-out data to compare the trials on (default: a tenth of the examples)"
    parser.add_argument("--valid", metavar="FILE", type=path, help=text)
    text = "directory for tune.jsonl, the record of the search"
    parser.add_argument("--output", metavar="DIR", type=path, required=True, help=text)
    own = {field.name: field for field in dataclasses.fields(TuneOptions)}
    add_options(parser, TuneOptions, names=own.keys() - {"search"})
    field = own["search"]
    parser.add_argument(
        "--search", action="append", type=searched, metavar=field.metadata["metavar"],
        help=f"{field.metadata['help']}; repeatable",
    )  # fmt: skip
    passed = {field.name for field in dataclasses.fields(FinetuneOptions)} - {*NOT_PASSED}
    add_options(parser, FinetuneOptions, names=passed)


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import FinetuneOptions, TuneOptions
    from nplora.finetuning.tuning.options import NOT_PASSED
    from nplora.finetuning.tuning.space import require_values

    names = [name for name, _ in arguments.search or ()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--search {twice[0]} is given twice, expected one list of values")
    arguments.search = dict(arguments.search or ())
    own = given_options(arguments, TuneOptions)
    checked(TuneOptions, own)
    passed = {
        name: value
        for name, value in given_options(arguments, FinetuneOptions).items()
        if name not in NOT_PASSED and value is not False
    }
    checked(lambda **options: FinetuneOptions(**options, op="tune"), passed)
    checked(lambda **options: require_values("tune", arguments.search, options), passed)
    report = finetuning.tune(
        arguments.model,
        given_data(arguments.data),
        arguments.output,
        valid=arguments.valid,
        progress=True,
        **own,
        **passed,
    )
    print(report, flush=True)
    if report.ended == "interrupted":
        raise KeyboardInterrupt


def searched(text: str) -> tuple[str, list[Any]]:
    """Read NAME=VALUE,VALUE. If NAME is `targets`, "+" joins several layer names into one VALUE.

    Raises:
        ArgumentTypeError: the text does not have this form, tune cannot search this option, or a value does
            not have the option's type.
    """
    from nplora.finetuning import FinetuneOptions
    from nplora.finetuning.tuning.space import require_searchable

    name, equals, values = (part.strip() for part in text.partition("="))
    name = name.lstrip("-").replace("-", "_")
    if not (name and equals and values):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE,VALUE as in lr=1e-4,1e-3")
    try:
        require_searchable("tune", name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    kind = typing.get_type_hints(FinetuneOptions)[name]
    plain = next((part for part in typing.get_args(kind) if part is not types.NoneType), kind)
    try:
        return name, [_value(word.strip(), name, plain) for word in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected values of the type {plain.__name__} for {name}"
        ) from None


def _value(word: str, name: str, kind: type) -> Any:
    if name == "targets":
        return tuple(word.split("+"))
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(word)
        return word.lower() == "true"
    return kind(word)
