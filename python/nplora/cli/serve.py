"""`nplora serve`"""

import argparse
import contextlib
import os

from nplora.cli.adapter_names import named_adapters
from nplora.cli.parser import add_any_base, add_compute, add_model, add_options, checked, given_options, path

HELP = "Serve a model and its adapters with OpenAI's API, and fine-tune in the same process."

_KEY = "NPLORA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.serving.options import ServeOptions

    add_model(parser)
    text = "adapter that requests choose as their model: PEFT directory or llama.cpp file (repeatable)"
    parser.add_argument("--adapter", metavar="NAME=PATH", type=path, action="append", default=[], help=text)
    add_any_base(parser)
    add_compute(parser)
    add_options(parser, ServeOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora.lm import load_model
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
        lm = load_model(arguments.model, arguments.compute)
        serving.serve(lm, options, adapters, any_base=arguments.any_base, listener=listener, report=_print)


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(text, flush=True)
