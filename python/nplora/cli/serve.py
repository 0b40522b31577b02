"""`nplora serve`"""

import argparse
import contextlib
import os

from nplora.cli.adapter_names import named_adapters
from nplora.cli.parser import add_any_base, add_compute, add_model, add_options, checked, given_options, path

HELP = "Serve a model or an encoder, with adapters, through OpenAI's API. The server can also fine-tune."

_KEY = "NPLORA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.serving.options import ServeOptions

    add_model(parser)
    text = "adapter that requests can use as the model NAME: PEFT directory or llama.cpp file (repeatable)"
    parser.add_argument("--adapter", metavar="NAME=PATH", type=path, action="append", default=[], help=text)
    add_any_base(parser)
    add_compute(parser)
    add_options(parser, ServeOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora.lm import Encoder, LanguageModel, load_encoder, load_model
    from nplora.lm.encoder_loading import is_encoder
    from nplora.serving import run as serving
    from nplora.serving.api.http_server import bind
    from nplora.serving.options import ServeOptions

    given = given_options(arguments, ServeOptions)
    if key := os.environ.get(_KEY):
        given["api_key"] = (*given.get("api_key", ()), key)
    options = checked(ServeOptions, given)
    adapters = list(named_adapters(arguments.adapter).items())
    serving.require_packages()
    with bind(options.host, options.port) as listener:
        if options.embeddings or options.pooling is not None or is_encoder(arguments.model):
            model: LanguageModel | Encoder = load_encoder(
                arguments.model, arguments.compute, pooling=options.pooling
            )
        else:
            model = load_model(arguments.model, arguments.compute)
        serving.serve(model, options, adapters, any_base=arguments.any_base, listener=listener, report=_print)


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stdout is closed
        print(text, flush=True)
