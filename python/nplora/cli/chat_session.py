"""A chat in the terminal: messages and commands, until the user leaves."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nplora import _check
from nplora.cli.errors import show_error
from nplora.cli.message_lines import Lines
from nplora.cli.terminal import printed
from nplora.runtime.stderr import stderr

if TYPE_CHECKING:
    from nplora.serving import Conversation

# {command: (its argument, what it does)}
COMMANDS = {
    "/adapter": ("[NAME]", "use the adapter NAME ('none': no adapter); without NAME, list the adapters"),
    "/system": ("[TEXT]", "set the system message to TEXT; without TEXT, remove the system message"),
    "/reset": ("", "forget all messages except the system message"),
    "/save": ("FILE.jsonl", "add the chat to a file as a row that nplora finetune reads"),
    "/help": ("", "list the commands"),
    "/exit": ("", "end the chat, as Ctrl-D does"),
}
_NO_ADAPTER = "none"


class ChatSession:
    """Reads messages and commands, and prints answers.

    In a terminal, an error or Ctrl-C ends only the current answer. If the input is a pipe, an error or Ctrl-C
    ends the program.

    Args:
        obeys: whether a line that begins with a slash is a command. If False, every line is a message.
    """

    def __init__(self, chat: Conversation, lines: Lines, obeys: bool = True) -> None:
        self._chat, self._lines, self._obeys = chat, lines, obeys

    def run(self, model: str) -> None:
        """Chat until there are no more lines.

        Args:
            model: the path of the model. In a terminal, the first line shows the last part of the path.
        """
        if self._lines.is_terminal:
            print(
                f"{os.path.basename(os.path.abspath(model))}{self._with_adapter()}. /help lists the commands."
            )
        try:
            while self._turn():
                pass
        finally:
            self._lines.close()

    def _turn(self) -> bool:
        """Read a line, and send it as a message or carry it out as a command.

        Return whether the chat continues.
        """
        try:
            line = self._lines.read()
            if line is None:
                return False
            if self._obeys and line.startswith("/"):
                if not line.startswith("//"):
                    return self._command(*line.partition(" ")[::2])
                line = line.removeprefix("/")
            if line.strip():
                self._answer(line)
        except KeyboardInterrupt:
            if not self._lines.is_terminal:
                raise
            print("\n(Ctrl-D ends the chat)")
        except (OSError, ValueError, ArithmeticError) as error:
            if not self._lines.is_terminal or isinstance(error, BrokenPipeError):
                raise
            show_error(error)
        return True

    def _answer(self, text: str) -> None:
        """Print the answer while it is generated.

        In a terminal, Ctrl-C stops the answer. The chat keeps the part of the answer that was printed.
        """
        with contextlib.closing(self._chat.ask(text)) as pieces:
            try:
                for piece in pieces:
                    print(printed(piece), end="", flush=True)
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
            print(flush=True)
        if self._chat.finish_reason == "length" and self._chat.usage is not None:
            self._say(f"(the answer was cut after {self._chat.usage.generated:,} tokens)")

    # ---- commands ----

    def _command(self, name: str, text: str) -> bool:
        text = text.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/adapter":
            self._adapter(text)
        elif name == "/system":
            self._chat.system = text or None
            self._say("the system message is set" if text else "there is no system message")
        elif name == "/reset":
            self._chat.reset()
            self._say("all messages are forgotten")
        elif name == "/save":
            self._save(text)
        elif name == "/help":
            self._help()
        else:
            near = _check.suggestion(name, COMMANDS)
            raise ValueError(
                f"no command {name}{near or '; /help lists the commands'} "
                "(to begin a message with /, type //)"
            )
        return True

    def _adapter(self, name: str) -> None:
        names = list(self._chat.engine.lm.adapters)
        if name:
            if name not in (*names, _NO_ADAPTER):
                known = ", ".join([*names, _NO_ADAPTER])
                raise ValueError(f"no adapter {name!r}, expected one of: {known}")
            self._chat.adapter = name if name in names else None
            self._say(f"answers come from {self._chat.adapter or 'the model without an adapter'}")
            return
        for one in [*names, None]:
            self._say(f"{'*' if one == self._chat.adapter else ' '} {one or _NO_ADAPTER}")

    def _save(self, name: str) -> None:
        """Add the chat to a JSON Lines file."""
        if not name.endswith(".jsonl"):
            raise ValueError(f"/save: the file is {name!r}, expected a name that ends in .jsonl")
        if not self._chat.turns:
            raise ValueError("/save: there are no messages yet")
        path = Path(name).expanduser()
        row = json.dumps({"messages": self._chat.messages}, ensure_ascii=False, allow_nan=False)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                row = row if file.read(1) == b"\n" else f"\n{row}"
            file.write(f"{row}\n".encode())
        self._say(f"saved to {path}")

    def _help(self) -> None:
        for name, (takes, does) in COMMANDS.items():
            self._say(f"{name + ' ' + takes:20} {does}")
        self._say('A message of several lines begins and ends with """. Ctrl-C stops an answer.')

    def _with_adapter(self) -> str:
        return f" with {self._chat.adapter}" if self._chat.adapter else ""

    def _say(self, text: str) -> None:
        """Print a line that is not an answer."""
        print(text, file=sys.stdout if self._lines.is_terminal else stderr)
