"""`nplora plot`"""

import argparse

from nplora.cli.parser import path
from nplora.distributed.launch import require_one_process

HELP = "Plot the losses and the learning rate of a run in a PNG file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN_DIR", type=path, help="output directory of the run, with its log.jsonl"
    )
    text = "new PNG file (default: RUN_DIR/plot.png)"
    parser.add_argument("--output", metavar="FILE", type=path, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> None:
    from nplora.trainer import plot

    require_one_process("plot")  # all ranks would write the same file
    print(plot.plot_run(arguments.run, arguments.output, arguments.overwrite))
