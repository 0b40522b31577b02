"""`nplora eval`"""

import argparse
import json
import math

from nplora.cli.parser import (
    add_adapters,
    add_data,
    add_model,
    add_options,
    checked,
    given_data,
    given_options,
)

HELP = "Print the mean loss of a language model over a file of text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import EvaluateOptions

    add_model(parser)
    add_data(parser, "valid.jsonl or, if that is missing, train.jsonl")
    add_adapters(parser)
    add_options(parser, EvaluateOptions)
    text = 'print JSON: {"loss": ..., "tokens": ..., "examples": ..., ...}'
    parser.add_argument("--json", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import EvaluateOptions
    from nplora.formats.errors import counted

    options = given_options(arguments, EvaluateOptions)
    checked(EvaluateOptions, options)
    result = finetuning.evaluate(
        arguments.model,
        given_data(arguments.data),
        adapter=arguments.adapter,
        any_base=arguments.any_base,
        progress=True,
        **options,
    )
    loss, tokens = result["loss"], counted(result["tokens"], "token")
    if arguments.json:
        shown = result if math.isfinite(loss) else result | {"loss": None}
        print(json.dumps(shown, allow_nan=False), flush=True)
    elif math.isfinite(loss):
        print(f"loss {loss:.4f} over {tokens}")
    if not math.isfinite(loss):
        raise FloatingPointError(f"eval: the loss over {tokens} is {loss}, expected a finite number")
