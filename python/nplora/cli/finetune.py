"""`nplora finetune`"""

import argparse

from nplora.cli.parser import add_data, add_model, add_options, checked, given_data, given_options, path
from nplora.distributed.opening import heard_by_all_ranks, require_choice

HELP = "Fine-tune a language model with LoRA on a file of text. The adapter is saved in PEFT's format."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import FinetuneOptions

    add_model(parser)
    add_data(parser)
    text = "validation file; its loss is printed before training and after every epoch"
    parser.add_argument("--valid", metavar="FILE", type=path, help=text)
    text = "directory for the adapter, the checkpoints and log.jsonl"
    parser.add_argument("--output", metavar="DIR", type=path, required=True, help=text)
    add_options(parser, FinetuneOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import FinetuneOptions

    require_choice("finetune", arguments.distributed)
    with heard_by_all_ranks(arguments.distributed):
        options = given_options(arguments, FinetuneOptions)
        checked(FinetuneOptions, options)
        data = given_data(arguments.data)
    report = finetuning.finetune(
        arguments.model,
        data,
        arguments.output,
        valid=arguments.valid,
        progress=True,
        **options,
    )
    try:
        if report.process == 0:
            print(report, flush=True)
    except OSError as error:
        error.add_note(f"stdout could not be written; {report.output} holds the adapter")
        raise
    if report.history.interrupted:
        raise KeyboardInterrupt
