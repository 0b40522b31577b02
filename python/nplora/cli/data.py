"""`nplora data`"""

import argparse
import os
import sys

from nplora.cli.parser import add_options, given_data, given_options, path, weighted_path

HELP = (
    "Show how training data are read: which tokens are trained, how long the examples are, and how many "
    "examples are cut or repeated."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning.options import PreviewOptions

    text = "files of rows, or a directory with train.jsonl and, optionally, valid.jsonl, as for finetune"
    parser.add_argument("data", metavar="FILE", type=weighted_path, nargs="+", help=text)
    text = "model whose tokenizer and chat template are used: GGUF file or Hugging Face directory"
    parser.add_argument("--model", metavar="MODEL", type=path, required=True, help=text)
    parser.add_argument(
        "--valid",
        metavar="FILE",
        type=path,
        help="validation file; the command counts the examples that are also in the training data",
    )
    add_options(parser, PreviewOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora.finetuning import data, load
    from nplora.finetuning.options import PreviewOptions

    options = given_options(arguments, PreviewOptions)
    lm = load.loaded("data", arguments.model, "float32", check=False)
    longest = min(options.pop("max_length", PreviewOptions.max_length), lm.config.max_position_embeddings)
    found = data.preview(
        given_data(arguments.data), lm.tokenizer, valid=arguments.valid, max_length=longest, **options
    )
    print(found.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    found.require_usable()
