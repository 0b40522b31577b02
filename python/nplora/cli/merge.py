"""`nplora merge`"""

import argparse

from nplora.cli.errors import show_warning
from nplora.cli.parser import STORAGES, add_any_base, path

HELP = (
    "Write a model with a LoRA adapter merged into it, and report how much of the adapter each weight kept."
)

_EPILOG = (
    "ΔW kept: the share of the adapter's change that is in the stored weights; less than 90 % is refused. "
    "Noise: what rounding changes besides. It spreads over all directions, and the adapter's change acts in "
    "a few, so noise may be larger than ΔW and hardly matter. Relative error: both together, over ΔW."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    text = "GGUF or safetensors file, or Hugging Face directory"
    parser.add_argument("base", metavar="BASE", type=path, help=text)
    text = "PEFT directory or llama.cpp file"
    parser.add_argument("adapter", metavar="ADAPTER", type=path, help=text)
    text = "a file of the same kind as BASE, or a directory"
    parser.add_argument("--output", metavar="FILE", type=path, required=True, help=text)
    text = "storage type of the merged weights; safetensors has the float types only (default: same)"
    parser.add_argument("--dtype", choices=STORAGES, default="same", help=text)
    add_any_base(parser)
    text = "merge even if less than 90 %% of the adapter's change is kept"
    parser.add_argument("--lossy", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    text = "report what every tensor kept of the adapter"
    parser.add_argument("--verbose", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    from nplora import adapters

    merged = adapters.merge_adapter(
        arguments.base,
        arguments.adapter,
        arguments.output,
        arguments.dtype,
        arguments.any_base,
        arguments.overwrite,
        arguments.lossy,
    )
    if arguments.verbose:
        print(merged.table())
    print(merged, flush=True)
    if merged.warning:
        show_warning(merged.warning)
