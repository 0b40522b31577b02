"""`nplora plan`"""

import argparse
import functools

from nplora.cli.parser import add_data, add_model, add_options, checked, given_data, given_options, path

HELP = (
    "Predict the memory and the time that finetune takes. With --memory, find the fastest plan that fits. "
    "Nothing is trained."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import FinetuneOptions

    parser.epilog = "All other options of finetune are accepted, but have no effect."
    add_model(parser)
    add_data(parser)
    parser.add_argument("--valid", metavar="FILE", type=path, help="validation file of the run")
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="list all plans that --memory chooses from")
    add_options(parser, FinetuneOptions, shown="planned")


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import FinetuneOptions

    options = given_options(arguments, FinetuneOptions)
    checked(functools.partial(FinetuneOptions, op="plan"), options)
    found = finetuning.plan(arguments.model, given_data(arguments.data), valid=arguments.valid, **options)
    print(found.table() if arguments.verbose else found)
