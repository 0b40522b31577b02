"""`nplora demo`: a language model learns a dictionary, or a network that reads digits adapts."""

import argparse

from nplora.cli.parser import path

HELP = (
    "Fine-tune a small language model on The Devil's Dictionary; or (digits) adapt a network that reads "
    "handwritten digits to turned and inverted images."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        choices=("dictionary", "digits"),
        default="dictionary",
        help="dictionary (default) or digits",
    )
    text = "directory for the adapter and the log (default: demo-WHAT)"
    parser.add_argument("--output", metavar="DIR", type=path, help=text)
    parser.add_argument("--rank", type=int, help="rank of the LoRA factors (default: 8; digits: 4)")
    text = "seed of the initial factors and the order of the data (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    text = "drop the run, the adapter and the plot in the output directory"
    parser.add_argument("--overwrite", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    output = f"demo-{arguments.what}" if arguments.output is None else arguments.output
    if arguments.what == "digits":
        from nplora.cli.demo import digits

        rank = 4 if arguments.rank is None else arguments.rank
        digits.run(output, rank, arguments.seed, arguments.overwrite)
    else:
        from nplora.cli.demo import dictionary

        rank = 8 if arguments.rank is None else arguments.rank
        dictionary.run(output, rank, arguments.seed, arguments.overwrite)
