"""`nplora eval`"""

import argparse
import contextlib
import errno
import json
import math
import os
from typing import Any, TextIO

from nplora.cli.errors import UsageError, show_warning
from nplora.cli.parser import (
    add_adapters,
    add_data,
    add_model,
    add_options,
    checked,
    given_data,
    given_options,
    path,
)
from nplora.runtime.stderr import stderr

HELP = "Print the mean loss and other metrics of a language model on a file of text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import EvaluateOptions

    add_model(parser)
    add_data(parser, "valid.jsonl (or train.jsonl, if valid.jsonl is missing)", weighted=False)
    add_adapters(parser)
    text = (
        "evaluate the model without an adapter and with each adapter alone, and test whether "
        "the differences are significant"
    )
    parser.add_argument("--compare", action="store_true", help=text)
    add_options(parser, EvaluateOptions)
    text = "new file for the generated answers and their scores, as JSON lines"
    parser.add_argument("--answers", metavar="FILE", type=path, help=text)
    shown = parser.add_mutually_exclusive_group()
    text = 'print JSON: {"loss": ..., "tokens": ..., "examples": ..., ...}'
    shown.add_argument("--json", action="store_true", help=text)
    shown.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def run(arguments: argparse.Namespace) -> None:
    from nplora.finetuning import EvaluateOptions

    if arguments.compare and not arguments.adapter:
        raise UsageError("--compare needs an adapter to compare the model with: add --adapter PATH")
    options = given_options(arguments, EvaluateOptions)
    checked(EvaluateOptions, options)
    if arguments.max_new_tokens is not None and not arguments.metric:
        show_warning("--max-new-tokens has no effect, because no answers are generated; add --metric")
    record = None if arguments.answers is None else _Recorder(arguments.answers)
    with contextlib.nullcontext() if record is None else contextlib.closing(record):
        common = {"any_base": arguments.any_base, "progress": True, "record": record, **options}
        (_compare if arguments.compare else _evaluate)(arguments, common)
    if record is not None and not record.has_written:
        show_warning("--answers: nothing was written, because no answers were generated; add --metric")


def _evaluate(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from nplora import finetuning
    from nplora.finetuning.comparison import name_of
    from nplora.finetuning.judging.tables import evaluation_text, markdown_table
    from nplora.formats.errors import counted
    from nplora.formats.strict_json import json_values

    data = given_data(arguments.data)
    if len(arguments.adapter or ()) > 1:
        text = "the adapters are added up and evaluated together; --compare evaluates each adapter alone"
        print(text, file=stderr, flush=True)
    result = finetuning.evaluate(arguments.model, data, adapter=arguments.adapter, **options)
    is_finite = math.isfinite(result["loss"])
    if arguments.json:
        print(json.dumps(json_values(result), allow_nan=False), flush=True)
    elif arguments.markdown:
        name = " + ".join((arguments.model, *map(name_of, arguments.adapter or ())))
        print(markdown_table({name: result}), flush=True)
    elif is_finite:
        print(evaluation_text(result), flush=True)
    if not is_finite:
        loss, tokens = result["loss"], counted(result["tokens"], "token")
        raise FloatingPointError(f"eval: the loss over {tokens} is {loss}, expected a finite number")


def _compare(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from nplora import finetuning

    found = finetuning.compare(arguments.model, given_data(arguments.data), arguments.adapter, **options)
    if arguments.json:
        print(json.dumps(found.as_json(), allow_nan=False), flush=True)
    else:
        print(found.markdown() if arguments.markdown else found, flush=True)
    for name, result in found.evaluations.items():
        if not math.isfinite(loss := result["loss"]):
            raise FloatingPointError(f"eval: the loss of {name} is {loss}, expected a finite number")


class _Recorder:
    """Writes records as lines of JSON to a new file. The first record creates the file."""

    def __init__(self, file: str) -> None:
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, "the file exists already; choose another for --answers", file)
        self._file = file
        self._stream: TextIO | None = None

    def __call__(self, entry: dict[str, Any]) -> None:
        from nplora.formats.strict_json import json_values

        if self._stream is None:
            self._stream = open(self._file, "x", encoding="utf-8", newline="\n")  # noqa: SIM115  # see `close`
        self._stream.write(json.dumps(json_values(entry), ensure_ascii=False, allow_nan=False) + "\n")

    @property
    def has_written(self) -> bool:
        return self._stream is not None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
