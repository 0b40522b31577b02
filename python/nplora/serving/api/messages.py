"""Reads the messages and tools of a chat request, and converts them to the form that chat templates need."""

from __future__ import annotations

from typing import Any

from nplora.formats import strict_json
from nplora.formats.errors import FormatError, brief
from nplora.serving.fields import Fields, checked_text, wrong
from nplora.serving.request_error import RequestError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_MOST_MESSAGES = 10_000
_MOST_CALLS = 128
_MOST_TOOLS = 128


def read_messages(body: Fields) -> list[Message]:
    """The messages of a request. The content of each message is converted to one text.

    The arguments of tool calls are converted to objects.

    Raises:
        RequestError: a message has a wrong form, or contains something other than text.
    """
    body.required("messages")
    given = body.objects("messages", _MOST_MESSAGES)
    if not given:
        raise RequestError("messages is empty, expected at least one message", param="messages")
    return [_message(message) for message in given]


def _message(given: Fields) -> Message:
    given.required("role")
    role = given.choice("role", ROLES)
    made = {name: value for name, value in given.values.items() if value is not None}
    made["role"] = "system" if role == "developer" else role  # chat templates know only the older name
    called = given.objects("tool_calls", _MOST_CALLS)
    if (old := given.object("function_call")) is not None:
        called.append(old)
        del made["function_call"]
    if called and role != "assistant":
        raise RequestError(
            f"{given.name('tool_calls')} is in a message of role {role!r}, expected 'assistant'",
            param=given.name("tool_calls"),
        )
    made.pop("tool_calls", None)
    if called:
        made["tool_calls"] = [_call(call) for call in called]
    made["content"] = _content(given, role == "assistant")
    return made


def _content(given: Fields, may_lack: bool) -> str:
    name, content = given.name("content"), given.get("content")
    if content is None and may_lack:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(name, content, "a text, or a list of parts")
    return "".join(_part(Fields(part, f"{name}[{index}].")) for index, part in enumerate(content))


def _part(part: Fields) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise RequestError(
            f"{part.name('type')} is {brief(kind)}, expected 'text': this server reads text only",
            param=part.name("type"),
            code="unsupported_content",
        )
    return checked_text(part.name(kind), part.required(kind))


def _call(call: Fields) -> dict[str, Any]:
    """A tool call. Its arguments are an object, not JSON text: chat templates convert the object to JSON."""
    function = call.object("function") or call
    name = checked_text(function.name("name"), function.required("name"), empty=False)
    arguments = function.get("arguments")
    if arguments in (None, ""):
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments.encode(), function.name("arguments"))
        except (FormatError, UnicodeEncodeError):
            arguments = None
    if not isinstance(arguments, dict):
        shown = function.get("arguments")
        raise wrong(function.name("arguments"), shown, "an object, or an object as JSON text")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call.get("id")} if call.has("id") else {})


# ---- tools ----


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """The functions that the model may call, in the form of OpenAI's API."""
    given = body.objects("tools", _MOST_TOOLS)
    tools = [_tool(tool) for tool in given]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools has two functions of the same name", param="tools", code="invalid_value")
    return tools


def _tool(tool: Fields) -> dict[str, Any]:
    kind = tool.text("type", "function")
    function = tool.object("function")
    if kind != "function" or function is None:
        raise wrong(
            tool.name("type"), tool.get("type"), "'function' together with an object in the field 'function'"
        )
    checked_text(function.name("name"), function.required("name"), empty=False)
    function.text("description")
    function.object("parameters")
    return {**tool.values, "type": "function"}


def chosen_tools(body: Fields, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Apply `tool_choice`: return the tools that the model sees, and whether the model must call a tool."""
    choice = body.get("tool_choice")
    if choice is None or choice == "auto":
        return tools, False
    if choice == "none":
        return [], False
    if not tools:
        raise RequestError("tool_choice is given, but there are no tools", param="tool_choice")
    if choice == "required":
        return tools, True
    named = Fields(choice, "tool_choice.") if isinstance(choice, dict) else None
    if named is None:
        raise wrong("tool_choice", choice, '"none", "auto", "required" or an object')
    function = named.object("function") or named
    name = checked_text(function.name("name"), function.required("name"))
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise RequestError(f"tool_choice names {name[:80]!r}, which is not in tools", param="tool_choice")
    return found, True
