"""`nplora convert`"""

import argparse
import os

from nplora.cli.errors import UsageError
from nplora.cli.parser import STORAGES, add_any_base, path

HELP = (
    "Convert a LoRA adapter from a PEFT directory to a GGUF file for llama.cpp, or back. The command also "
    "converts a model from a Hugging Face directory to GGUF, or a GGUF model to another storage type."
)

_EPILOG = (
    "If a Hugging Face model has a byte-level BPE tokenizer, the tokenizer is converted too. If SOURCE is "
    "a GGUF model, the new file has the same tokenizer."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    text = (
        "adapter (a directory or a .gguf file) or model (a directory, its model.safetensors or a .gguf file)"
    )
    parser.add_argument("source", metavar="SOURCE", type=path, help=text)
    text = "new .gguf file, or new directory for an adapter"
    parser.add_argument("target", metavar="TARGET", type=path, help=text)
    storages = tuple(name for name in STORAGES if name != "float64")
    text = 'storage type of the model\'s matrices; with "same", each matrix keeps its type (default: same)'
    parser.add_argument("--dtype", choices=storages, help=text)
    text = (
        "model that the adapter was trained on: a GGUF file, a config.json or its directory (default: the "
        "model that adapter_config.json names, if it is on this machine)"
    )
    parser.add_argument("--base", metavar="MODEL", type=path, help=text)
    add_any_base(parser)
    text = "replace the file TARGET, or the adapter in the directory TARGET"
    parser.add_argument("--overwrite", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    from nplora.formats import model_directory
    from nplora.models import gguf_export

    model_directory.require_no_hub_name(arguments.source)
    convert = _convert_model if gguf_export.is_model(arguments.source) else _convert_adapter
    convert(arguments)


def _convert_model(arguments: argparse.Namespace) -> None:
    from nplora.models import gguf_export

    if arguments.base is not None:
        raise UsageError("--base is for adapters, but SOURCE is a model")
    if arguments.any_base:
        raise UsageError("--any-base is for adapters, but SOURCE is a model")
    dtype = arguments.dtype or "same"
    print(gguf_export.model_to_gguf(arguments.source, arguments.target, dtype, arguments.overwrite))


def _convert_adapter(arguments: argparse.Namespace) -> None:
    from nplora import adapters

    if arguments.dtype is not None:
        os.stat(arguments.source)  # report a missing file before any other error
        raise UsageError("--dtype is for models, but SOURCE is not one")
    print(
        adapters.convert_adapter(
            arguments.source, arguments.target, arguments.base, arguments.any_base, arguments.overwrite
        )
    )
