"""`nplora export`"""

import argparse

from nplora.cli.parser import STORAGES, adapter_path, add_any_base, add_model, path

HELP = "Export a model, with an adapter, for Ollama: a GGUF file and a Modelfile."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--adapter", metavar="PATH", type=adapter_path, help="PEFT directory or llama.cpp file"
    )
    text = "directory to write; `ollama create NAME -f DIR/Modelfile` imports it"
    parser.add_argument("--ollama", metavar="DIR", type=path, required=True, help=text)
    text = (
        "storage type of the merged weights; if MODEL is a directory, storage type of all matrices. With "
        "'same', the types do not change (default: q8_0)"
    )
    parser.add_argument("--dtype", choices=STORAGES, help=text)
    text = "do not merge the adapter, but write it as a separate file; only for Ollama 0.34.0 and older"
    parser.add_argument("--keep-adapter", action="store_true", help=text)
    parser.add_argument("--system", metavar="TEXT", help="system message of the model")
    text = "parameter of Ollama, such as temperature=0.7 (repeatable)"
    parser.add_argument(
        "--parameter", metavar="NAME=VALUE", type=_parameter, action="append", default=[], help=text
    )
    add_any_base(parser)
    text = "merge even if less than 90 %% of the adapter's change to the weights is left after rounding"
    parser.add_argument("--lossy", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the files in DIR")


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    return name, value


def run(arguments: argparse.Namespace) -> None:
    from nplora import adapters

    print(
        adapters.export_ollama(
            arguments.model,
            arguments.ollama,
            arguments.adapter,
            arguments.dtype,
            keep_adapter=arguments.keep_adapter,
            system=arguments.system,
            parameters=arguments.parameter,
            any_base=arguments.any_base,
            lossy=arguments.lossy,
            overwrite=arguments.overwrite,
        )
    )
