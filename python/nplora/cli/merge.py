"""`nplora merge`"""

import argparse

from nplora.cli.errors import show_warning
from nplora.cli.parser import STORAGES, adapter_path, add_any_base, path

HELP = (
    "Merge a LoRA adapter into a model, write the new model, and report how much of the adapter's change it "
    "kept."
)

_EPILOG = (
    "ΔW is the adapter's change of the weights. 'ΔW kept' is the share of ΔW that the stored weights hold; a "
    "merge that keeps less than 90 % is refused. Noise is every other change that rounding makes. Noise "
    "spreads over all directions, while ΔW acts in a few, so noise that is larger than ΔW can still be "
    "harmless. Relative error is the size of the lost part of ΔW and the noise together, divided by the size "
    "of ΔW."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    text = "GGUF or safetensors file, or Hugging Face directory"
    parser.add_argument("base", metavar="BASE", type=path, help=text)
    text = "PEFT directory or llama.cpp file"
    parser.add_argument("adapter", metavar="ADAPTER", type=adapter_path, help=text)
    text = "new model of the same kind as BASE; a directory if BASE is a directory"
    parser.add_argument("--output", metavar="FILE", type=path, required=True, help=text)
    text = "storage type of the merged weights; for safetensors, only the float types (default: same)"
    parser.add_argument("--dtype", choices=STORAGES, default="same", help=text)
    add_any_base(parser)
    text = "write the model even if it keeps less than 90 %% of the adapter's change"
    parser.add_argument("--lossy", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    text = "print how much of the adapter each tensor kept"
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
