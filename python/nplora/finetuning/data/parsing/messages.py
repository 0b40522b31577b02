"""Chats in the form of OpenAI's API: messages, tools and tool calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nplora.finetuning.data.examples import SYSTEM_ROLES, TOOL_ROLES, Chat, Message, Objects
from nplora.finetuning.data.parsing.fields import CONTEXT, Fields, loads, renaming
from nplora.formats.errors import brief

_MESSAGE = "expected an object with a role and a content"
_MESSAGES = "expected a list of objects with a role and a content"
_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")


def openai(row: Fields) -> Chat:
    return chat_of(row, openai_messages(row), None)


def openai_messages(row: Fields) -> list[Message]:
    messages = row.unpacked("messages")
    if not isinstance(messages, list) or not messages:
        raise row.error(f"messages is {brief(messages)}, {_MESSAGES}")
    if all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in messages):
        raise row.error(
            f"messages has turns in the form of ShareGPT; {renaming('conversations', 'messages')}"
        )
    return messages_of(row, "messages", messages)


def chat_of(row: Fields, messages: list[Message], prompt: list[Any] | None) -> Chat:
    if prompt:
        role, answer = messages[len(prompt) - 1]["role"], messages[len(prompt) :]
        if role in SYSTEM_ROLES and (not answer or answer[0]["role"] == "assistant"):
            wanted = "expected a message of the user, a tool or the assistant"
            raise row.error(f"the prompt ends with a message of role {role!r}, {wanted}")
    given, documents = (row.objects(name) for name in CONTEXT)
    tools = given and [_tool(row.part(f"tool {number}"), tool) for number, tool in enumerate(given, 1)]
    return Chat(messages, tools, documents, len(prompt or ()))


def messages_of(row: Fields, name: str, value: Any) -> list[Message]:
    """Check messages in the form of OpenAI's API, and return them in the form that chat templates read."""
    if not isinstance(value, list):
        raise row.error(f"{name} is {brief(value)}, {_MESSAGES}")
    of = "" if name == "messages" else f" of {name}"
    return read_turns(row, value, message_of, "message", of)


def read_turns(
    row: Fields, turns: list[object], read: Callable[[Fields, object], Message], name: str, of: str = ""
) -> list[Message]:
    """Read the turns of a chat, and check their order.

    Args:
        name, of: how error messages name a turn: `name`, the number of the turn, and `of`. For example,
            `name` is "message" and `of` is " of chosen" in "message 2 of chosen".
    """
    messages = list[Message]()
    for number, turn in enumerate(turns, 1):
        part = row.part(f"{name} {number}{of}")
        messages.append(read(part, turn))
        _check_order(part, messages[-2] if number > 1 else None, messages[-1])
    return messages


def message_of(row: Fields, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise row.error(f"a message is {brief(message)}, {_MESSAGE}")
    role = message["role"]
    if role not in _ROLES:
        raise row.error(f"the role of a message is {brief(role)}, expected one of {', '.join(_ROLES)}")
    message = _with_tool_calls(row, message)
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = _content(row, message)
    if message.get("tool_calls") not in (None, []):
        made["tool_calls"] = _tool_calls(row, message)
    if role == "assistant" and not made["content"].strip() and not made.get("tool_calls"):
        raise row.error(f"the assistant's content is {brief(message.get('content'))}, expected a text")
    _check_weight(row, message)
    return made


def _with_tool_calls(row: Fields, message: Message) -> Message:
    """Turn the field `function_call` of a message, from an older API of OpenAI, into `tool_calls`."""
    called = message.get("function_call")
    if called is None:
        return message
    if message.get("tool_calls") is not None:
        raise row.error("a message has both tool_calls and function_call, expected only one of them")
    if not isinstance(called, dict):
        raise row.error(f"function_call is {brief(called)}, expected an object")
    others = {name: value for name, value in message.items() if name != "function_call"}
    return others | {"tool_calls": [called]}


def _content(row: Fields, message: Message) -> str:
    """The content of a message as one text. Only a message with tool calls may lack content."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if "content" not in message:
        raise row.error(f"a message has the fields {brief(list(message))}, expected the field 'content'")
    if not isinstance(content, list):
        raise row.error(
            f"the content of a message of role {message['role']!r} is {brief(content)}, expected a text"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise row.error(f'a part of a content is {brief(part)}, expected {{"type": "text", "text": "…"}}')
    return "".join(part["text"] for part in content)


def _tool_calls(row: Fields, message: Message) -> Objects:
    calls = message["tool_calls"]
    if message["role"] != "assistant":
        raise row.error(f"a message of role {message['role']!r} has tool_calls, expected role 'assistant'")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise row.error(f"tool_calls is {brief(calls)}, expected a list of objects")
    return [_tool_call(row.part(f"tool call {number}"), call) for number, call in enumerate(calls, 1)]


def _tool_call(row: Fields, call: dict[str, Any]) -> dict[str, Any]:
    """Return the tool call in a form whose arguments are an object. Templates write the object as JSON."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise row.error(f"a tool call is {brief(call)}, expected an object with the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        shown = brief(function.get("arguments"))
        raise row.error(f"the arguments of the tool call {name!r} are {shown}, expected an object or JSON")
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call["id"]} if "id" in call else {})


def _check_weight(row: Fields, message: Message) -> None:
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise row.error(f"the weight of a message is {brief(weight)}, expected 0 or 1")
    if weight and role != "assistant":
        raise row.error(f"a message of role {role!r} has weight 1, expected 0 or no weight for this role")


def _check_order(row: Fields, before: Message | None, message: Message) -> None:
    """Check that a tool's result comes after an assistant's message or another result."""
    role = message["role"]
    if role in TOOL_ROLES and (before is None or before["role"] in ("user", *SYSTEM_ROLES)):
        after = "at the beginning" if before is None else f"after {before['role']!r}"
        raise row.error(f"a message of role {role!r} is {after}, expected it after an assistant's message")


def _tool(row: Fields, tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in the form of OpenAI's API. If `tool` is only a function, wrap it in such an object."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise row.error(f"a tool is {brief(tool)}, expected an object with the name of its function")
    return tool if "function" in tool else {"type": "function", "function": tool}
