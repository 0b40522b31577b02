"""`nplora generate`"""

import argparse
import dataclasses
import os
import sys
import warnings
from typing import Any

from nplora.cli.errors import UsageError, show_warning
from nplora.cli.parser import add_adapters, add_compute, add_model, add_options, checked, given_options
from nplora.cli.terminal import printed

HELP = "Generate text after a prompt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.lm.generation import Sampling

    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="prompt; - reads the prompt from standard input")
    add_adapters(parser)
    text = "send the prompt as a user's message, in the model's chat template"
    parser.add_argument("--chat", action="store_true", help=text)
    parser.add_argument("--system", metavar="TEXT", help="system message; only with --chat")
    add_compute(parser)
    names = {field.name for field in dataclasses.fields(Sampling) if field.metadata.get("command", True)}
    add_options(parser, Sampling, names=names)


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.lm.generation import Sampling, stream

    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system works only in a chat: add --chat")
    sampling = checked(Sampling, given_options(arguments, Sampling))
    lm = finetuning.load_with_adapter(
        arguments.model, arguments.adapter, arguments.compute, arguments.any_base
    )
    if arguments.adapter is not None:
        finetuning.attach.warn_of_form(
            "generate", arguments.adapter, arguments.chat, "this prompt", "add --chat"
        )
    with warnings.catch_warnings(record=True) as found:  # shown after the text, not inside it
        for piece in stream(lm, _prompt(arguments), sampling):
            print(printed(piece), end="", flush=True)
    print(flush=True)
    for warning in found:
        show_warning(warning.message)


def _prompt(arguments: argparse.Namespace) -> Any:
    """The prompt as text or, with --chat, as a list of messages."""
    text = _text(arguments.prompt)
    if not arguments.chat:
        return text
    messages = [("system", arguments.system), ("user", text)]
    return [{"role": role, "content": content} for role, content in messages if content is not None]


def _text(given: str) -> str:
    """The prompt from the command line. For "-", the prompt is read from standard input."""
    if given == "-" and sys.stdin is None:
        raise ValueError("the prompt cannot be read: standard input is closed")
    text = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return text.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8, at byte {error.start}") from error
