"""`nplora teach`"""

import argparse

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

HELP = (
    "Store a teacher model's predictions for a data set in a file, which finetune --objective distill "
    "--teacher FILE reads."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import TeachOptions

    add_model(parser)
    add_data(parser)
    text = "validation file; its predictions are stored too"
    parser.add_argument("--valid", metavar="FILE", type=path, help=text)
    text = "safetensors file to write"
    parser.add_argument("--output", metavar="FILE", type=path, required=True, help=text)
    add_adapters(parser)
    add_options(parser, TeachOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import TeachOptions

    options = given_options(arguments, TeachOptions)
    checked(TeachOptions, options)
    taught = finetuning.teach(
        arguments.model,
        given_data(arguments.data),
        arguments.output,
        valid=arguments.valid,
        adapter=arguments.adapter,
        any_base=arguments.any_base,
        progress=True,
        **options,
    )
    print(taught, flush=True)
