"""Tool calls in generated text, whole and in pieces."""

import json
import random

import pytest

from nplora.serving.api.tool_calls import CallFilter, split_calls

NAMES = {"add", "get_weather"}
ADD = '{"name": "add", "arguments": {"x": 1}}'
WEATHER = '{"name": "get_weather", "parameters": {"place": "Rome", "more": [{"a": "}"}]}}'

# A text, its content, and the names of its calls.
TEXTS = [
    (f"<tool_call>\n{ADD}\n</tool_call>", "", ["add"]),
    (f"See:\n<tool_call>{ADD}</tool_call>\n<tool_call>{WEATHER}</tool_call>", "See:", ["add", "get_weather"]),
    (f"<tool_call>[{ADD}, {WEATHER}]</tool_call>", "", ["add", "get_weather"]),
    (f"[TOOL_CALLS][{ADD}]", "", ["add"]),
    (f"[{ADD}, {WEATHER}]", "", ["add", "get_weather"]),
    (WEATHER, "", ["get_weather"]),
    (f" {ADD}; {WEATHER}", "", ["add", "get_weather"]),
    (f"<tool_call>{ADD}", "", ["add"]),
    ('{"function": {"name": "add", "arguments": "{}"}}', "", ["add"]),
    ('{"name": "add"}', "", ["add"]),
    # What is no call stays content.
    ("plain text", "plain text", []),
    ("a < b and [1] or {2}", "a < b and [1] or {2}", []),
    ("[1] is a citation", "[1] is a citation", []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('<tool_call>{"name": "add", "arguments": {', '<tool_call>{"name": "add", "arguments": {', []),
    ('{"name": "add", "arguments": 5}', '{"name": "add", "arguments": 5}', []),
    ('{"name": "add", "arguments": "x"}', '{"name": "add", "arguments": "x"}', []),
    ('{"name": "add", "arguments": {"x": 1e999}}', '{"name": "add", "arguments": {"x": 1e999}}', []),
    # What follows complete calls is content.
    (f"<tool_call>{ADD}</tool_call> and more", "and more", ["add"]),
    (f"{ADD}\nDone.", "Done.", ["add"]),
    (f"So: <tool_call>{ADD}</tool_call><tool_call>{{", "So: <tool_call>{", ["add"]),
    (f"<tool_call>{ADD}</tool_call>\n<tool_call>", "", ["add"]),
    # Arguments are always JSON objects in UTF-8.
    ('{"name": "add", "arguments": {"x": "\\ud800"}}', "", ["add"]),
    ('{"name": "add", "arguments": "{\\"x\\": \\"\\\\ud800\\"}"}', "", ["add"]),
    ('{"name": "add", "arguments": ""}', "", ["add"]),
    ('{"name": "add", "arguments": null}', "", ["add"]),
    ("<tool", "<tool", []),
    ("", "", []),
    ("[" * 5000, "[" * 5000, []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "names"), TEXTS, ids=lambda value: str(value)[:25])
def test_a_text_is_split_into_content_and_calls(text: str, content: str, names: list[str]) -> None:
    found, calls = split_calls(text, NAMES)
    assert found == content
    assert [call["function"]["name"] for call in calls] == names
    for call in calls:
        assert isinstance(json.loads(call["function"]["arguments"].encode()), dict)
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.parametrize(("text", "content", "names"), TEXTS, ids=lambda value: str(value)[:25])
def test_pieces_give_the_same_as_the_whole_text(text: str, content: str, names: list[str]) -> None:
    for seed in range(20):
        random_, rest, shown = random.Random(seed), text, ""
        calls = CallFilter(NAMES)
        while rest:
            size = random_.randint(1, 9 if len(text) < 1000 else 2000)
            shown += calls.push(rest[:size])
            rest = rest[size:]
        last, called = calls.flush()
        assert (shown + last).rstrip() == content.rstrip()
        assert [call["function"]["name"] for call in called] == names


def test_plain_text_is_not_held_back() -> None:
    calls = CallFilter(NAMES)
    assert calls.push("Hello ") == "Hello "
    assert calls.push("a <b") == "a <b"
    assert calls.push(" [T") == " "
    assert calls.push("x") == "[Tx"
    assert CallFilter(()).push("{") == "{"
