"""Translates a chat template from Jinja to the template language of Go, for Ollama.

A Jinja template can do anything, but nearly all templates write the messages of a chat unchanged, with fixed
texts around them. To find the fixed texts, this module renders chats in which each message is a single
unusual character, a mark. The module then checks that the fixed texts also give the right result for other
chats. A template that does more than write fixed texts around messages is not translated. There are two
exceptions: the template may strip white space from messages, and may write the definitions of tools. The
translated template does neither, so `trimmed` and `has_tools` report what was lost.

A template that writes the present time is rendered with the time `TRAINING_TIME`, as in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from nplora.formats.errors import FormatError
from nplora.tokenizer.chat_template import RefusedChatError
from nplora.tokenizer.tokenizer import TRAINING_TIME, Tokenizer

_S, _U, _A, _V = (chr(0xE300 + number) for number in range(4))  # private-use characters for the marks


@dataclass(frozen=True)
class GoTemplate:
    """The fixed texts around the messages of a chat.

    Attributes:
        first: the text before the first user message, in a chat without a system message.
        system: the text before the system message, and the text between the system message and the first user
            message; None if the template refuses system messages.
        user: the text before each user message except the first, and the text after each user message.
        assistant: the text before each message of the assistant, and the text after each of these messages.
        answer: the text at the end of the chat, before the model's next answer.
        trimmed: the roles of the messages from which the Jinja template strips white space. A Go template
            cannot strip white space.
        has_tools: whether the Jinja template writes the definitions of tools. The Go template does not.
    """

    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    trimmed: tuple[str, ...] = ()
    has_tools: bool = False

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Write a chat as text, up to the point where the assistant's next message begins."""
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        begun = f"{self.system[0]}{system}{self.system[1]}" if self.system and system else self.first
        text = ""
        for message in messages:
            if message["role"] == "user":
                text += f"{self.user[0] if text else begun}{message['content']}{self.user[1]}"
            elif message["role"] == "assistant":
                text += f"{self.assistant[0]}{message['content']}{self.assistant[1]}"
        return text + self.answer

    def __str__(self) -> str:
        """Return the template in Go's language. Ollama sets .System to the system messages of the chat."""
        before, after = map(_literal, self.user)
        begin = self._begin(".System", self.user[0])
        if begin is None:  # the system message stands inside the first user message
            begin = "{{ $first := true }}"
            first = f"{self._begin('$.System')}{{{{ $first = false }}}}"
            before = f"{{{{ if $first }}}}{first}{{{{ else }}}}{before}{{{{ end }}}}"
        user = f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{after}'
        said = "{{ .Content }}".join(map(_literal, self.assistant))
        answer = f'{{{{ else if eq .Role "assistant" }}}}{said}{{{{ end }}}}'
        return f"{begin}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}{_literal(self.answer)}"

    def _begin(self, system: str, user: str = "") -> str | None:
        """Return the part of the Go template that writes the text before the first user message.

        Args:
            system: the Go variable with the system message.
            user: the end of this text, which is left out because the caller writes it. If the text does not
                end with `user`, return None.
        """
        texts = [self.first] if self.system is None else [self.first, self.system[1]]
        if not all(text.endswith(user) for text in texts):
            return None
        first, *more = (_literal(text.removesuffix(user)) for text in texts)
        if self.system is None:
            return first
        otherwise = f"{{{{ else }}}}{first}" if first else ""
        before = f"{{{{ if {system} }}}}{_literal(self.system[0])}{{{{ {system} }}}}"
        return f"{before}{more[0]}{otherwise}{{{{ end }}}}"

    @property
    def texts(self) -> str:
        """All fixed texts, joined."""
        return "".join((self.first, *(self.system or ()), *self.user, *self.assistant, self.answer))


def _literal(text: str) -> str:
    """Write a text in Go's syntax. Escape "{{", which begins an action, and "{" at the end of the text."""
    return re.sub(r"\{{2,}|\{\Z", r'{{ "\g<0>" }}', text)


def of(tokenizer: Tokenizer) -> GoTemplate | None:
    """Translate the chat template of a tokenizer.

    If the tokenizer adds BOS to each text, the translated template does not write BOS, because llama.cpp
    adds BOS itself.

    Returns:
        the translated template. None if the tokenizer has no chat template, or has one that cannot be
        translated.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        found = _found(tokenizer)
        chats = [chat for chat in _CHATS if found.system or chat[0]["role"] != "system"]
        trimmed = _trimmed(tokenizer, found, chats)
        found = replace(found, trimmed=trimmed, has_tools=_has_tools(tokenizer, chats[0]))
    except (RefusedChatError, FormatError, _OtherError):
        return None
    bos = tokenizer.decode([tokenizer.bos_id]) if tokenizer.bos_id is not None else ""
    if bos and tokenizer.encode_prompt("a")[0] == tokenizer.bos_id:
        system = found.system and (found.system[0].removeprefix(bos), found.system[1])
        return replace(found, first=found.first.removeprefix(bos), system=system)
    return found


def special_tokens(tokenizer: Tokenizer, template: GoTemplate) -> list[str]:
    """Return the special tokens in the fixed texts. Each of them ends the model's answer."""
    return list(dict.fromkeys(tokenizer.special_in(template.texts)))


class _OtherError(Exception):
    """Raised if a template does more than write fixed texts around the messages."""


def _found(tokenizer: Tokenizer) -> GoTemplate:
    def written(roles: str, answering: bool = True) -> str:
        chat = [{"role": _ROLES[mark], "content": mark} for mark in roles]
        return tokenizer.apply_chat_template(chat, answering, now=TRAINING_TIME)

    asked, alone = written(_U), written(_U, False)
    first, after = _split(asked, _U)
    user_end = alone.removeprefix(first + _U)
    answer = _less(after, user_end)
    try:
        before, between, _ = _split(written(_S + _U), _S, _U)
        system = before, between
    except RefusedChatError:
        system = None
    _, said, between, _ = _split(written(_U + _A + _V), _U, _A, _V)
    *_, assistant_end = _split(written(_U + _A, False), _U, _A)
    user = _less(between, assistant_end), user_end
    return GoTemplate(first, system, user, (_less(said, user_end), assistant_end), answer)


def _trimmed(tokenizer: Tokenizer, found: GoTemplate, chats: Sequence[list[Any]]) -> tuple[str, ...]:
    """Return the roles of the messages from which the template strips white space.

    To find these roles, the function renders chats with and without spaces around each message.
    """
    if _texts(tokenizer, chats) != [found.render(chat) for chat in chats]:
        raise _OtherError
    padded = _texts(tokenizer, [_changed(chat, " {} \n") for chat in chats])
    for count in range(len(_NAMES) + 1):
        for roles in combinations(_NAMES.values(), count):
            if padded == [found.render(_changed(chat, " {} \n", roles)) for chat in chats]:
                return roles
    raise _OtherError


def _texts(tokenizer: Tokenizer, chats: Sequence[list[Any]]) -> list[str]:
    return [tokenizer.apply_chat_template(chat, True, now=TRAINING_TIME) for chat in chats]


def _changed(chat: list[Any], form: str, but: Sequence[str] = ()) -> list[Any]:
    """Insert each message's text into the format string `form`, unless the message's role is in `but`."""
    return [
        message if message["role"] in but else {**message, "content": form.format(message["content"])}
        for message in chat
    ]


def _has_tools(tokenizer: Tokenizer, chat: list[Any]) -> bool:
    plain, tooled = (
        tokenizer.apply_chat_template(chat, True, tools=tools, now=TRAINING_TIME) for tools in (None, [_TOOL])
    )
    return plain != tooled


_TOOL = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_NAMES = {"s": "system", "u": "user", "a": "assistant"}
_ROLES = {_S: "system", _U: "user", _A: "assistant", _V: "user"}


def _chat(roles: str) -> list[dict[str, Any]]:
    return [
        {"role": _NAMES[role], "content": f"{number}. Was it {role}?"} for number, role in enumerate(roles)
    ]


_CHATS = [_chat(roles) for roles in ("u", "su", "uau", "suau", "suauauau")]


def _split(text: str, *marks: str) -> list[str]:
    """Split a text at marks. The text must contain each mark once, in the order of the arguments."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise _OtherError
        parts.append(part)
    return [*parts, text]


def _less(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise _OtherError
    return text.removeprefix(beginning)
