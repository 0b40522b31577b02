"""Writes a chat template in the template language of Go, which Ollama reads.

A Jinja template can do anything, but nearly all templates write a chat as fixed texts around the messages.
This module finds the fixed texts by rendering chats whose messages are marks. Then the module checks that the
fixed texts reproduce what the Jinja template writes for other chats. A template that writes more than fixed
texts is not translated. There are two exceptions: a template that strips white space from messages or that
writes the definitions of tools is translated without these steps. `trimmed` and `has_tools` report what is
missing.

A template that uses the time gets the same time as in training.
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
    """The fixed texts of a chat.

    Attributes:
        first: the text before the first user message, in a chat without a system message.
        system: the text before the system message, and the text between the system message and the first user
            message; None if the template refuses system messages.
        user: the texts before and after each user message except the first.
        assistant: the texts before and after an answer.
        answer: the text where the model's next answer begins.
        trimmed: the roles of the messages from which the Jinja template strips white space. A Go template
            cannot strip white space.
        has_tools: whether the Jinja template writes tools. The Go template writes no tools.
    """

    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    trimmed: tuple[str, ...] = ()
    has_tools: bool = False

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat as text, with the beginning of the next answer."""
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
        """The template in Go's language. Ollama sets .System to the system messages of the chat."""
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
        """The Go text before the first user message, without `user` at its end.

        None if the text does not end with `user`.

        Args:
            system: the name of the system message in Go.
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
        """All fixed texts."""
        return "".join((self.first, *(self.system or ()), *self.user, *self.assistant, self.answer))


def _literal(text: str) -> str:
    """A text in Go's syntax. Two braces begin an action, so a brace at the text's end is also escaped."""
    return re.sub(r"\{{2,}|\{\Z", r'{{ "\g<0>" }}', text)


def of(tokenizer: Tokenizer) -> GoTemplate | None:
    """Translate the chat template of a tokenizer.

    If the tokenizer adds BOS to each text, the translation has no BOS, because llama.cpp also adds BOS.

    Returns:
        the translated template; None if the tokenizer has no chat template, or if the template writes more
        than fixed texts.
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
    """The special tokens that the template writes. If one appears in an answer, the answer has ended."""
    return list(dict.fromkeys(tokenizer.special_in(template.texts)))


class _OtherError(Exception):
    """The template writes more than fixed texts."""


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
    """Return the roles whose messages the template strips.

    This compares chats without and with spaces around each message.
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
    """Put spaces around the messages of a chat, except around the messages of the roles in `but`."""
    return [
        message if message["role"] in but else {**message, "content": form.format(message["content"])}
        for message in chat
    ]


def _has_tools(tokenizer: Tokenizer, chat: list[Any]) -> bool:
    """Whether tools change the text of a chat."""
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
    """Split a text at marks. Each mark must occur exactly once, and the marks must be in this order."""
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
