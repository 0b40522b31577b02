"""`nplora chat`"""

import argparse
import sys

from nplora.cli.adapter_names import named_adapters
from nplora.cli.parser import (
    add_any_base,
    add_compute,
    add_model,
    add_options,
    checked,
    given_options,
    path,
)

HELP = "Chat with a model in the terminal."

_EPILOG = (
    "In the chat, /help lists the commands, Ctrl-C stops an answer and Ctrl-D ends the chat. If the input is "
    "a pipe, each line is a message, and only the answers go to standard output. With --commands, lines from "
    "the pipe can also be commands."
)
_MOST_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.lm.generation import Sampling

    parser.epilog = _EPILOG
    add_model(parser)
    text = (
        "PEFT directory or llama.cpp file (repeatable); without NAME, the adapter is named after its file or "
        "directory. The chat begins with the first adapter; /adapter NAME selects another adapter"
    )
    parser.add_argument("--adapter", metavar="[NAME=]PATH", type=path, action="append", default=[], help=text)
    add_any_base(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    text = "obey commands such as /reset in lines from a pipe; by default, each line from a pipe is a message"
    parser.add_argument("--commands", action="store_true", help=text)
    add_compute(parser)
    text = (
        "memory limit for the whole process (default: the memory that the model needs, plus half of the "
        "remaining available memory)"
    )
    parser.add_argument("--memory", metavar="SIZE", help=text)
    add_options(parser, Sampling)
    for action in parser._actions:
        if action.dest == "max_new_tokens":
            action.help = f"maximum number of tokens in an answer (default: {_MOST_TOKENS})"


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.cli.chat_session import COMMANDS, ChatSession
    from nplora.cli.message_lines import opened
    from nplora.lm import load_model
    from nplora.lm.generation import Sampling
    from nplora.serving import Conversation, Engine

    sampling = checked(Sampling, {"max_new_tokens": _MOST_TOKENS, **given_options(arguments, Sampling)})
    adapters = named_adapters(arguments.adapter)
    if sys.stdin is None:
        raise ValueError("the messages cannot be read: standard input is closed")
    lm = load_model(arguments.model, arguments.compute)
    for name, file in adapters.items():
        lm.load_adapter(file, name, arguments.any_base)
        finetuning.attach.warn_of_form("chat", file, True, "a chat", "use nplora generate")
    first = next(iter(adapters), None)
    with Engine(lm, memory=arguments.memory, max_requests=1) as engine:
        chat = Conversation(engine, sampling, arguments.system, first)
        lines = opened([*COMMANDS])
        ChatSession(chat, lines, lines.is_terminal or arguments.commands).run(arguments.model)
