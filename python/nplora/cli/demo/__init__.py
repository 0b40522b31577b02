"""`nplora demo`: a language model learns a dictionary, or a digit classifier adapts to changed images."""

import argparse

from nplora.cli.parser import path

HELP = (
    "See LoRA at work. By default, a small language model learns The Devil's Dictionary. With digits, a "
    "network that reads handwritten digits adapts to rotated and inverted images."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        choices=("dictionary", "digits"),
        default="dictionary",
        help="which demo to run: dictionary or digits (default: dictionary)",
    )
    text = "directory for the adapter and the log (default: demo-dictionary or demo-digits)"
    parser.add_argument("--output", metavar="DIR", type=path, help=text)
    parser.add_argument("--rank", type=int, help="rank of the LoRA factors (default: 8; digits: 4)")
    text = "random seed of the initial factors and the order of the data (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    text = "delete the run, the adapter and the plot in the output directory"
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
