"""`nplora info`"""

import argparse

from nplora.cli.parser import path

HELP = (
    "Describe a model or an adapter. Without FILE, print what a bug report needs: versions, instruction set "
    "and threads."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "GGUF or safetensors file, *.safetensors.index.json, or directory of a model or an adapter"
    parser.add_argument("file", metavar="FILE", type=path, nargs="?", help=text)


def run(arguments: argparse.Namespace) -> None:
    from nplora import runtime

    if arguments.file is None:
        runtime.show_config()
        return
    from nplora.cli import description

    print(description.describe(arguments.file))
