"""`nplora combine`"""

import argparse

from nplora.cli.errors import UsageError
from nplora.cli.parser import path, weighted_path

HELP = "Write the weighted sum of LoRA adapters as one adapter. The sum is exact unless --rank truncates it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "PEFT directory or llama.cpp file, and its weight (default: 1)"
    parser.add_argument("adapters", metavar="ADAPTER[:WEIGHT]", nargs="+", type=weighted_path, help=text)
    text = "directory for the new adapter"
    parser.add_argument("--output", metavar="DIR", type=path, required=True, help=text)
    text = "maximum rank; larger ranks are truncated (default: the rank that the exact sum needs)"
    parser.add_argument("--rank", type=int, help=text)
    text = "model that the adapters were trained on; needed for some .gguf adapters"
    parser.add_argument("--base", metavar="MODEL", type=path, help=text)
    parser.add_argument(
        "--any-base", action="store_true", help="accept adapters that were trained on different models"
    )
    text = "replace the adapter in the output directory"
    parser.add_argument("--overwrite", action="store_true", help=text)
    text = "print the rank and the error of each layer"
    parser.add_argument("--verbose", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    from nplora import adapters

    _check_output(arguments)
    combined = adapters.combine(arguments.adapters, arguments.rank, arguments.base, arguments.any_base)
    combined.save(arguments.output, arguments.overwrite)
    if arguments.verbose:
        print(combined.table())
    print(f"{arguments.output}: {combined}")


def _check_output(arguments: argparse.Namespace) -> None:
    """Before the slow work begins, raise an error if the output directory cannot or must not be written."""
    from nplora.formats import files
    from nplora.formats.model_directory import require_no_model
    from nplora.formats.output_directory import require_no_other
    from nplora.formats.peft_adapter import files_of

    output = arguments.output
    if files.suffix(output) in (".gguf", ".safetensors"):
        raise UsageError(
            f"--output is {output!r}, expected a directory; nplora convert turns a directory into .gguf"
        )
    require_no_other(output, arguments.overwrite)
    require_no_model(output)
    inputs = [("adapter", file) for adapter, _ in arguments.adapters for file in files_of(adapter)]
    files.require_not_read("combine", files_of(output), inputs)
