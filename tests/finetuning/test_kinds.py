"""Every kind of row, good and malformed in each field: errors name the line, the field and both values."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nplora.finetuning.data import preview, read_dataset
from nplora.finetuning.data.builder import Builder
from nplora.finetuning.data.dataset import Dataset, ReadOptions, add_rows
from nplora.finetuning.data.examples import (
    Chat,
    Completion,
    Example,
    Instruction,
    Judged,
    MultipleChoice,
    Preference,
    Text,
)
from nplora.finetuning.data.kinds import BY_NAME, recognise, renamed
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.sources import splits_of
from nplora.finetuning.options import parse_columns
from nplora.formats.errors import DataError
from nplora.tokenizer import from_gguf
from vocabularies import byte_level, opened


def parsed(row: dict[str, Any], kind: str | None = None) -> Example:
    found = recognise(row, "d.jsonl, line 7") if kind is None else BY_NAME[kind]
    return found.parse(Fields(row, "d.jsonl, line 7"))


FUNCTION_F = {"type": "function", "function": {"name": "f"}}  # a tool

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
FUNCTION = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
ALPACA = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]}


# ---- good rows ----


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, CALLING, RESULT, ANSWER], "tools": [{"name": "f"}]},
         Chat([USER, {**CALLING, "content": ""}, RESULT, ANSWER],
              [{"type": "function", "function": {"name": "f"}}])),
        ({"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}]},
         Chat([USER, {**CALLING, "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}])),
        ({"messages": [USER, {**ANSWER, "name": None, "tool_calls": None}], "tools": " ", "documents": None},
         Chat([USER, ANSWER])),
        ({"messages": [USER, {"role": "assistant", "content": None,
                              "function_call": {"name": "f", "arguments": '{"x": 1}'}}, RESULT, ANSWER]},
         Chat([USER, {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, RESULT, ANSWER])),
        ({"conversations": [HUMAN, GPT], "system": "s"},
         Chat([{"role": "system", "content": "s"}, USER, ANSWER])),
        ({"conversations": [HUMAN, FUNCTION, {"from": "observation", "value": "5"}, GPT]},
         Chat([USER, {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, RESULT, ANSWER])),
        *(({"conversations": [HUMAN, {"from": "gpt", "value": "", **calls},
                              {"from": "observation", "value": "5"}, GPT]},
           Chat([USER, {"role": "assistant", "content": "", "tool_calls": [
               {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, RESULT, ANSWER]))
          for call in [{"name": "f", "arguments": '{"x": 1}'}]
          for calls in ({"function_call": call}, {"tool_calls": [{"type": "function", "function": call}]})),
        # the chat template decides which order of speakers is possible
        ({"conversations": [GPT, HUMAN, GPT]}, Chat([ANSWER, USER, ANSWER])),
        ({"conversations": [HUMAN, HUMAN, GPT, {"from": "system", "value": "s"}, HUMAN, GPT]},
         Chat([USER, USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER])),
        ({"conversations": [HUMAN, {**GPT, "weight": 0}]}, Chat([USER, {**ANSWER, "weight": 0}])),
        (ALPACA, Instruction("a", "c", "b", "s", (("d", "e"),))),
        ({"instruction": "a", "output": "c", "input": None, "history": None}, Instruction("a", "c")),
        ({"instruction": "a", "output": "c", "input": "", "history": ""}, Instruction("a", "c")),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER], prompt=1)),
        ({"prompt": [USER], "completion": "b"}, Chat([USER, ANSWER], prompt=1)),
        ({"prompt": [USER], "completion": ANSWER}, Chat([USER, ANSWER], prompt=1)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"},
         Preference(Completion("a", "b"), Completion("a", "c"))),
        ({"chosen": "ab", "rejected": "ac"}, Preference(Completion("a", "b"), Completion("a", "c"))),
        ({"chosen": "a: b", "rejected": "a: c"}, Preference(Completion("a:", " b"), Completion("a:", " c"))),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "c"}]},
         Preference(Chat([USER, ANSWER], prompt=1), Chat([USER, {**ANSWER, "content": "c"}], prompt=1))),
        ({"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "c"}]},
         Preference(Chat([USER, ANSWER], prompt=1), Chat([USER, {**ANSWER, "content": "c"}], prompt=1))),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "c"}},
         Preference(Chat([USER, ANSWER], prompt=1), Chat([USER, {**ANSWER, "content": "c"}], prompt=1))),
        ({"prompt": [SYSTEM], "completion": [USER, ANSWER]}, Chat([SYSTEM, USER, ANSWER], prompt=1)),
        ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, {**USER, "content": "c"}, ANSWER]},
         Preference(Chat([SYSTEM, USER, ANSWER], prompt=1),
                    Chat([SYSTEM, {**USER, "content": "c"}, ANSWER], prompt=1))),
        ({"prompt": "a", "completion": "b", "label": True}, Judged(Completion("a", "b"), True)),
        ({"prompt": "a", "completion": "b", "label": "False"}, Judged(Completion("a", "b"), False)),
        ({"prompt": "a", "completion": "b", "label": " true"}, Judged(Completion("a", "b"), True)),
        ({"prompt": "a", "completion": "b", "label": 1}, Judged(Completion("a", "b"), True)),
        ({"prompt": "a", "completion": "b", "label": 0}, Judged(Completion("a", "b"), False)),
        ({"prompt": "a", "completion": "b", "label": 0.0}, Judged(Completion("a", "b"), False)),
        ({"prompt": "a", "completion": "b", "label": "1"}, Judged(Completion("a", "b"), True)),
        ({"prompt": "a", "completion": "b", "label": "0"}, Judged(Completion("a", "b"), False)),
        ({"prompt": "a", "completion": "b", "label": "1.0"}, Judged(Completion("a", "b"), True)),
        ({"prompt": [USER], "completion": [ANSWER], "label": False},
         Judged(Chat([USER, ANSWER], prompt=1), False)),
        # LLaMA-Factory's forms of comparisons: only the last answer is judged
        ({"messages": [USER, {**ANSWER, "content": "c"}, USER, ANSWER], "label": True},
         Judged(Chat([USER, {**ANSWER, "content": "c"}, USER, ANSWER], prompt=3), True)),
        ({"conversations": [HUMAN, GPT], "system": "s", "label": False},
         Judged(Chat([{"role": "system", "content": "s"}, USER, ANSWER], prompt=2), False)),
        ({**ALPACA, "label": True}, Judged(Instruction("a", "c", "b", "s", (("d", "e"),)), True)),
        ({"instruction": "a", "input": "b", "system": "s", "history": [["d", "e"]], "chosen": "c",
          "rejected": "x"},
         Preference(Instruction("a", "c", "b", "s", (("d", "e"),)),
                    Instruction("a", "x", "b", "s", (("d", "e"),)))),
        # tables in text files have no lists
        ({"messages": json.dumps([USER, ANSWER])}, Chat([USER, ANSWER])),
        ({"conversations": json.dumps([HUMAN, GPT])}, Chat([USER, ANSWER])),
        ({**ALPACA, "history": '[["d", "e"]]'}, Instruction("a", "c", "b", "s", (("d", "e"),))),
        ({"prompt": "q", "choices": '["x", "y"]', "answer": "y"}, MultipleChoice("q", ("x", "y"), 1)),
        ({"prompt": "q", "choices": json.dumps({"text": ["x", "y"], "label": ["1", "2"]}), "answer": "1"},
         MultipleChoice("q", ("x", "y"), 0)),
        # keys of a turn besides from and value are the message's
        ({"conversations": [{**HUMAN, "weight": 0}, {**GPT, "reasoning_content": "h", "weight": 0}]},
         Chat([{**USER, "weight": 0}, {**ANSWER, "reasoning_content": "h", "weight": 0}])),
        # tools beside "input" of OpenAI's preferences
        ({"input": {"messages": [USER]}, "tools": [FUNCTION_F], "preferred_output": [ANSWER],
          "non_preferred_output": [{**ANSWER, "content": "c"}]},
         Preference(Chat([USER, ANSWER], [FUNCTION_F], prompt=1),
                    Chat([USER, {**ANSWER, "content": "c"}], [FUNCTION_F], prompt=1))),
        # a text file has no null: an empty field counts as missing
        ({"prompt": "a", "completion": "b", "text": ""}, Completion("a", "b")),
        ({"prompt": "", "completion": "", "text": "a"}, Text("a")),
        ({"messages": [USER, ANSWER], "label": ""}, Chat([USER, ANSWER])),
        ({**ALPACA, "label": "False"}, Judged(Instruction("a", "c", "b", "s", (("d", "e"),)), False)),
        # a label that is no judgement
        ({"messages": [USER, ANSWER], "label": "greeting"}, Chat([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "label": 1}, Chat([USER, ANSWER])),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_means_its_example(row: dict[str, Any], expected: Example) -> None:
    assert parsed(row) == expected


ARC = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (ARC, 1, 0),
        (ARC, "1", 0),
        (ARC, 3, 2),
        (ARC, "y", 1),
        ({**ARC, "label": [1, 2, 3]}, 1, 0),
        (
            {"text": ["3", "2", "1"], "label": ["1", "2", "3"]},
            "1",
            0,
        ),  # a label that the row gives comes first
        ({**ARC, "label": ["A", "B", "C"]}, "B", 1),
        ({**ARC, "label": ["A", "B", "C"]}, 1, 1),  # no label is a number, so this is an index
        (["3", "2", "1"], "1", 2),  # without labels, a choice comes first
        (["3", "2", "1"], 1, 1),
        (["x", "y"], "B", 1),
    ],
)
def test_an_answer_is_a_label_of_the_row_a_choice_or_an_index(choices: Any, answer: Any, right: int) -> None:
    found = parsed({"prompt": "q", "choices": choices, "answer": answer})
    assert isinstance(found, MultipleChoice)
    assert found.answer == right


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}, "message 2"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 1"),
        ({"prompt": [USER], "completion": [ANSWER, USER, {**ANSWER, "content": None}]},
         "message 3 of completion"),
        ({"prompt": [USER, 3], "chosen": "a", "rejected": "b"}, "message 2 of prompt"),
        ({"conversations": [HUMAN, GPT, {"from": "gpt"}]}, "turn 3"),
        ({"conversations": [HUMAN, {"from": "observation", "value": "a"}]}, "turn 2"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}, {"name": ""}]}, "tool 2"),
    ],
    ids=str,
)  # fmt: skip
def test_the_place_of_a_wrong_message_is_named(row: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl, line 7, {place}: "):
        parsed(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [HUMAN, GPT]}, {"conversations": "messages"}),
        ({"conversations": [USER, ANSWER]}, {"messages": "conversations"}),
    ],
)
def test_messages_in_the_form_of_another_kind_name_the_option_that_reads_them(
    row: dict[str, Any], columns: dict[str, str]
) -> None:
    [(ours, theirs)] = columns.items()
    with pytest.raises(DataError, match=rf"--columns {ours}={theirs} "):
        parsed(row)
    assert parsed(renamed(row, columns, "w")) == Chat([USER, ANSWER])


def test_a_row_is_not_changed() -> None:
    row = {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{}"}]}]}
    before = json.dumps(row)
    parsed(row)
    assert json.dumps(row) == before


# ---- malformed rows ----

PLACE = r"(, ((message|turn|tool|tool call) \d( of \w+)?|chosen|rejected))*"


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": [USER, *messages]}


def called(**changes: Any) -> dict[str, Any]:
    call = {"name": "f", "arguments": {"x": 1}} | changes
    return chat({**CALLING, "tool_calls": [{k: v for k, v in call.items() if v is not ...}]})


def talk(*turns: Any) -> dict[str, Any]:
    return {"conversations": list(turns)}


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a", "chosen": "b", "rejected": "c"} | changes


def judged(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a", "completion": "b", "label": True} | changes


NO_JSON = (
    "NaN",
    "-Infinity",
    "1e999",
    '"\\ud800"',
    '{"a": 1, "a": 1}',
    "[" * 70 + "]" * 70,
    "1" * 200,
)
BAD: list[tuple[dict[str, Any], str]] = [
    # messages
    ({"messages": {}}, r"messages is \{\}, expected a list of objects with a role and a content"),
    (chat(3), "a message is 3, expected"),
    (chat({"content": "b"}), r"a message is \{'content': 'b'\}, expected"),
    (chat({"role": ["user"], "content": "b"}), "a message is"),
    (chat({"role": "bot", "content": "b"}), "the role of a message is 'bot', expected one of system, user, "),
    (chat({"role": "assistant", "text": "b"}),
     r"a message has the fields \['role', 'text'\], expected the field 'content'"),
    (chat({"role": "assistant", "content": None}),
     "the content of a message of role 'assistant' is None, expected a text"),
    (chat({**ANSWER, "content": 5}), "the content of a message of role 'assistant' is 5, expected a text"),
    (chat({**ANSWER, "content": [{"type": "image_url"}]}),
     r"a part of a content is .*, expected \{\"type\": \"text\""),
    (chat({**ANSWER, "content": ["b"]}), "a part of a content is 'b', expected"),
    (chat({**ANSWER, "content": [{"type": "text", "text": 3}]}), "a part of a content is"),
    (chat({**ANSWER, "content": ""}), "the assistant's content is '', expected a text"),
    (chat({**ANSWER, "weight": 2}), "the weight of a message is 2, expected 0 or 1"),
    (chat({**USER, "weight": 1}), "a message of role 'user' has weight 1, expected 0 or no weight for this"),
    (chat(RESULT), "a message of role 'tool' is after 'user', expected it after an assistant's message"),
    ({"messages": [RESULT, ANSWER]},
     "a message of role 'tool' is at the beginning, expected it after an assist"),
    # tools and calls
    ({**chat(ANSWER), "tools": {"f": 1}}, r"tools is \{'f': 1\}, expected a list of objects"),
    ({**chat(ANSWER), "tools": ["f"]}, r"tools is \['f'\], expected a list of objects"),
    ({**chat(ANSWER), "tools": "f"}, "tools is 'f', expected a list of objects, or such a list as JSON"),
    ({**chat(ANSWER), "tools": '{"f": 1}'}, "tools is .*, expected a list of objects"),
    ({**chat(ANSWER), "tools": "[" * 100_000}, "tools is .*, expected a list of objects, or such a list"),
    ({**chat(ANSWER), "documents": "d"}, "documents is 'd', expected a list of objects"),
    *(({**chat(ANSWER), "tools": [tool]}, "a tool is .*, expected an object with the name of its function")
      for tool in ({}, {"function": 3}, {"type": "function"}, {"name": ""}, {"function": {"name": 3}})),
    *((chat({**ANSWER, "tool_calls": calls}), "tool_calls is .*, expected a list of objects")
      for calls in ({}, 0, "", False)),
    (chat({**ANSWER, "function_call": "f"}), "function_call is 'f', expected an object"),
    (chat({**ANSWER, "function_call": {}}), "a tool call is {}, expected an object with the name of a"),
    (chat({**ANSWER, "function_call": {"name": "f", "arguments": "x"}}), "the arguments of the tool call"),
    (chat({**CALLING, "function_call": {"name": "f", "arguments": "{}"}}), "both tool_calls and function"),
    (chat({**USER, "function_call": {"name": "f", "arguments": "{}"}}), "a message of role 'user' has"),
    (chat({**USER, "tool_calls": [CALL]}), "role 'user' has tool_calls, expected role 'assistant'"),
    (chat({**CALLING, "tool_calls": CALL}), "tool_calls is .*, expected a list of objects"),
    (chat({**CALLING, "tool_calls": ["f"]}), r"tool_calls is \['f'\], expected a list of objects"),
    (called(name=...), "a tool call is .*, expected an object with the name of a"),
    (called(name=""), "a tool call is .*, expected an object with the name of a"),
    (called(name=3), "a tool call is .*, expected an object with the name of a"),
    (called(function="f"), "a tool call is .*, expected an object with the name of a"),
    (called(arguments=...), "the arguments of the tool call 'f' are None, expected an object"),
    (called(arguments="{x}"), "the arguments of the tool call 'f' are '{x}', expected an object"),
    (called(arguments="[1]"), r"the arguments of the tool call 'f' are '\[1\]', expected an object"),
    (called(arguments="[" * 100_000), "the arguments of the tool call 'f' are .*, expected an object"),
    # JSON in a text is as strict as that of a file
    *((called(arguments=f'{{"x": {value}}}'), "the arguments of the tool call 'f' are .*, expected an object")
      for value in NO_JSON),
    (called(arguments='{"x": 1, "x": 2}'), "the arguments of the tool call 'f' are .*, expected an object"),
    *(({**chat(ANSWER), "tools": f'[{{"name": "f", "x": {value}}}]'}, "tools is .*, or such a list as JSON")
      for value in NO_JSON),
    *((talk(HUMAN, {**FUNCTION, "value": f'{{"name": "f", "arguments": {{"x": {value}}}}}'}),
       "a function_call is .*, expected a name and arguments as JSON") for value in NO_JSON),
    # ShareGPT
    ({"conversations": "a"}, "conversations is 'a', expected a list of objects with from and value"),
    (talk(), r"conversations is \[\], expected"),
    (talk("a"), "a turn is 'a', expected an object with from and value"),
    (talk({"value": "a"}), r"a turn is \{'value': 'a'\}, expected an object with from and value"),
    (talk({"from": 1, "value": "a"}), "a turn is"),
    (talk({"from": "bob", "value": "a"}), "a turn is from 'bob', expected one of system, human, user, gpt, "),
    (talk(HUMAN, {"from": "gpt"}), "the value of a turn is None, expected a text"),
    (talk(HUMAN, {**GPT, "value": 5}), "the value of a turn is 5, expected a text"),
    (talk(HUMAN, {**GPT, "value": ""}), "the value of a turn from 'gpt' is '', expected a text"),
    (talk(HUMAN, {"from": "function_call", "value": "[]"}), r"a function_call is '\[\]', expected a"),
    (talk(HUMAN, {**FUNCTION, "value": "f(1)"}),
     r"a function_call is 'f\(1\)', expected a name and arguments as JSON"),
    (talk(HUMAN, {**FUNCTION, "value": "3"}), "a function_call is '3', expected"),
    (talk(HUMAN, {**FUNCTION, "value": "{}"}), "a tool call is {}, expected an object with the name of a"),
    (talk({"from": "observation", "value": "5"}, GPT), "a message of role 'tool' is at the beginning"),
    ({**talk(HUMAN, GPT), "system": 3}, "system is 3, expected a string"),
    ({**talk(HUMAN, GPT), "tools": 3}, "tools is 3, expected a list of objects"),
    (talk(HUMAN, {**GPT, "weight": "1"}), "the weight of a message is '1', expected 0 or 1"),
    # Alpaca
    ({**ALPACA, "instruction": 1}, "instruction is 1, expected a string"),
    ({**ALPACA, "instruction": " "}, "instruction is empty, expected a text"),
    ({**ALPACA, "output": ""}, "output is empty, expected a text"),
    ({"instruction": "a"}, r"output is missing; the row has \['instruction'\]; --columns output=NAME "),
    ({**ALPACA, "output": None}, "output is None, expected a string"),
    ({**ALPACA, "input": 5}, "input is 5, expected a string"),
    ({**ALPACA, "system": ["s"]}, r"system is \['s'\], expected a string"),
    ({**ALPACA, "history": "d"}, "history is 'd', expected a list of pairs of texts"),
    *(({**ALPACA, "history": history}, "history is .*, expected a list of pairs of texts")
      for history in ({}, 0, False)),
    ({**ALPACA, "history": [["d"]]}, "history is .*, expected a list of pairs of texts"),
    ({**ALPACA, "history": [["d", 1]]}, "history is .*, expected a list of pairs of texts"),
    # completions
    ({"prompt": [USER], "completion": 5},
     "completion is 5, expected a list of objects with a role and a content"),
    ({"prompt": [{"role": "system", "content": "s"}], "completion": [ANSWER, USER, ANSWER]},
     "the prompt ends with a message of role 'system', expected a message of the user, a tool or"),
    ({"prompt": [{"role": "system", "content": "s"}], "completion": [ANSWER]},
     "the prompt ends with a message of role 'system', expected a message of the user, a tool or"),
    ({"prompt": [USER], "completion": [5]}, "a message is 5, expected"),
    ({"prompt": [USER], "completion": ""}, "completion is empty, expected a text"),
    ({"prompt": [USER]}, "completion is missing; the row has"),
    ({"prompt": [5], "completion": [ANSWER]}, "a message is 5, expected"),
    ({"prompt": "a", "completion": [ANSWER]},
     r"completion is \[.*\], expected a string, because prompt is a string"),
    ({"prompt": "a", "completion": ["c"]},
     r"completion is \['c'\], expected a string, because prompt is a string"),
    ({"prompt": "a", "chosen": "b", "rejected": ["c"]},
     r"rejected is \['c'\], expected a string, because prompt is a string"),
    ({"prompt": "a", "chosen": ANSWER, "rejected": "c"},
     r"chosen is \{.*\}, expected a string, because prompt is a string"),
    ({"prompt": 5, "completion": "b"}, "prompt is 5, expected a string"),
    ({"prompt": [USER, CALLING], "completion": [{**RESULT, "role": "user", "tool_calls": [CALL]}]},
     "has tool_calls"),
    # comparisons
    (pair(chosen=5), "chosen is 5, expected a string"),
    (pair(chosen=""), "chosen is empty, expected a text"),
    (pair(rejected=" "), "rejected is empty, expected a text"),
    ({"prompt": "a", "chosen": "b"}, r"rejected is missing; the row has \['prompt', 'chosen'\]"),
    ({"prompt": "a", "rejected": "b"}, "chosen is missing; the row has"),
    (pair(rejected="b"), "chosen and rejected are the same answer, expected two different ones"),
    ({"chosen": "b", "rejected": "b"}, "chosen and rejected are the same answer"),
    (pair(prompt=[USER], chosen=[ANSWER], rejected=[ANSWER]), "chosen and rejected are the same answer"),
    (pair(prompt=[USER], chosen=[ANSWER], rejected=5), "rejected is 5, expected a list of objects"),
    (pair(prompt=[USER], chosen=[{"role": "x"}], rejected=[ANSWER]), "the role of a message is 'x'"),
    (pair(prompt=[USER, {"role": "developer", "content": "s"}], chosen="a", rejected="b"),
     "the prompt ends with a message of role 'developer', expected a message of the user"),
    ({"chosen": [USER, ANSWER], "rejected": "c"}, "chosen is .*, expected a string"),
    ({"conversations": [HUMAN], "chosen": "b", "rejected": GPT},
     "a turn is 'b', expected an object with from and"),
    (pair(prompt=[USER], chosen=[ANSWER, USER], rejected=[ANSWER]),
     "chosen ends with a message of role 'user', expected a message of the assistant"),
    (pair(prompt=[USER], chosen=[ANSWER], rejected=USER), "rejected ends with a message of role"),
    ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT}, "chosen ends with a message of role"),
    (judged(label=2), "label is 2, expected true or false, or 1 or 0"),
    (judged(label=0.5), "label is 0.5, expected true or false, or 1 or 0"),
    (judged(label=float("nan")), "label is nan, expected true or false, or 1 or 0"),
    (judged(label=[1]), r"label is \[1\], expected true or false, or 1 or 0"),
    (judged(label="yes"), "label is 'yes', expected true or false, or 1 or 0"),
    (judged(label="good"), "label is 'good', expected true or false"),
    (judged(completion=""), "completion is empty"),
    ({"messages": [USER, ANSWER, USER], "label": True},
     "the chat ends with a message of role 'user', expected a message of the assistant"),
    ({"messages": [{"role": "system", "content": "s"}, ANSWER], "label": True},
     "the prompt ends with a message of role 'system', expected a message of the user, a tool or"),
    ({"instruction": "a", "chosen": "b", "rejected": 3}, "rejected is 3, expected a string"),
    ({"instruction": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same answer"),
    ({"instruction": 5, "chosen": "b", "rejected": "c"}, "instruction is 5, expected a string"),
    (judged(prompt=3), "prompt is 3, expected a string"),
    # multiple choice
    ({"prompt": "q", "choices": ARC, "answer": 0}, "answer is 0, expected one of the choices, or one"),
    ({"prompt": "q", "choices": ARC, "answer": "4"}, "answer is '4', expected one of the choices, or one"),
    ({"prompt": "q", "choices": ARC, "answer": True}, "answer is True, expected"),
    ({"prompt": "q", "choices": {**ARC, "label": ["A", "B", "A"]}, "answer": "A"},
     r"the labels of choices are \['A', 'B', 'A'\], expected a different label for each choice"),
    ({"prompt": "q", "choices": {**ARC, "label": ["1", 1, "2"]}, "answer": "1"}, "the labels of choices are"),
    # no kind, or two
    ({"a": 1}, r"the row has \['a'\], expected messages, conversations, instruction and output, prompt and "
               r"completion, text, or chosen and rejected; --columns OURS=THEIRS "),
    ({**chat(ANSWER), **talk(HUMAN, GPT)},
     "the row has both messages and conversations, expected only one of them"),
    ({**ALPACA, "text": "x"},
     "both instruction and text, expected only one of them; set --format to alpaca or text "),
    ({**chat(ANSWER), "chosen": "b", "rejected": "c"}, "the row has both messages and chosen"),
]  # fmt: skip


def neighbour(row: dict[str, Any]) -> dict[str, Any]:
    """A good row of the kind that a bad row seems to be."""
    try:
        return GOOD[recognise(row, "").name]
    except DataError:
        return GOOD["text"]


GOOD = {
    "messages": chat(ANSWER),
    "sharegpt": talk(HUMAN, GPT),
    "alpaca": ALPACA,
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
    "preference": pair(),
    "kto": judged(),
    "choice": {"prompt": "q", "choices": ARC, "answer": 1},
}
CHATML = "{% for m in messages %}{{ m.role + m.content + '<|end|>' }}{% endfor %}"


@pytest.mark.parametrize(("row", "message"), BAD, ids=range(len(BAD)))
def test_a_malformed_row_is_an_error_that_names_line_field_and_values(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl, line 7{PLACE}: .*{message}") as caught:
        parsed(row)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("row", "message"), BAD, ids=range(len(BAD)))
def test_a_malformed_row_is_found_among_good_rows_of_its_kind(row: dict[str, Any], message: str) -> None:
    words = from_gguf(opened(byte_level() | {"tokenizer.chat_template": CHATML}))
    [source] = splits_of("test", [neighbour(row), row]).train
    builder = Builder(None, False, Dataset)
    builder.begin(source)
    with pytest.raises(DataError, match=rf"^data, row 2{PLACE}: .*{message}"):
        add_rows(
            builder,
            ColumnNames({}),
            source,
            words,
            ReadOptions(),
            lambda kind, where: None,
            lambda _, found: [found],
        )


def test_a_kind_that_is_forced_takes_its_own_fields() -> None:
    both = {**ALPACA, "text": "x"}
    assert parsed(both, "text") == parsed({"text": "x"})
    assert parsed(both, "alpaca") == parsed(ALPACA)
    with pytest.raises(DataError, match="messages is missing; the row has"):
        parsed(both, "messages")
    labelled = {"messages": [USER, ANSWER], "label": 0}
    assert parsed({**labelled, "label": False}, "messages") == Chat([USER, ANSWER])
    assert parsed(labelled, "kto") == Judged(Chat([USER, ANSWER], prompt=1), False)


def test_columns_give_fields_their_names() -> None:
    row = {"question": "a", "answer": "b", "prompt": "other", "id": 3}
    columns = {"prompt": "question", "completion": "answer"}
    assert renamed(row, columns, "w") == {"prompt": "a", "completion": "b", "id": 3}
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}, "w") == {"a": 2, "b": 1}
    with pytest.raises(
        DataError, match=r"w: the row has no field 'answer' that --columns .* renames; it has \['question'\]"
    ):
        renamed({"question": "a"}, columns, "w")


def test_the_usual_names_of_a_question_and_its_answer_are_recognised_in_the_error() -> None:
    row = {"id": 3, "response": "b", "query": "a", "context": None}
    with pytest.raises(DataError, match=r"; --columns prompt=query,completion=response \("):
        parsed(row)
    columns = {"prompt": "query", "completion": "response"}
    assert parsed(renamed(row, columns, "w")) == Completion("a", "b")
    with pytest.raises(DataError, match=r"; --columns OURS=THEIRS "):
        parsed({"answer": "b", "question": None})


def test_an_unknown_field_in_columns_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"here: columns has the key 'promptt', which no format has; did you mean 'pro"
    ):
        ReadOptions(columns={"promptt": "question", "completion": "answer"}, op="here")
    with pytest.raises(
        ValueError, match=r"here: columns has the key 'xyz', which no format has; possible: answer, ch"
    ):
        ReadOptions(columns={"xyz": "question"}, op="here")
    with pytest.raises(ValueError, match=r"'foo', which no format has; possible: .*: question=foo$"):
        ReadOptions(columns={"foo": "question"}, op="here")
    ReadOptions(columns={name: "x" for row in (*GOOD.values(), {"tools": []}) for name in row})


@pytest.mark.parametrize(
    ("columns", "names", "hint"),
    [
        ("question=prompt,answer=completion", ["question", "answer"],
         "nplora's name comes before the equals sign: prompt=question"),
        ("prompt=questoin,completion=answer", ["question", "answer"], "did you mean 'question'?"),
        ("prompt=question,completion=answer", ["question;answer"],
         "';' seems to separate the columns; a .csv file needs commas, a .tsv file tabs"),
    ],
)  # fmt: skip
def test_a_wrong_name_in_columns_is_explained(columns: str, names: list[str], hint: str) -> None:
    with pytest.raises(DataError, match=rf"; it has \[.*\]; {re.escape(hint)}$"):
        renamed(dict.fromkeys(names, "x"), parse_columns(columns), "d.csv, row 1")


# ---- files ----


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), tmp_path / "d.parquet")
    words = from_gguf(opened(byte_level()))
    with pytest.raises(DataError, match=r"d\.parquet, row 1: the row has \['question', 'answer'\], expected"):
        read_dataset(tmp_path / "d.parquet", words)
    with pytest.raises(
        DataError, match=r"d\.parquet, row 1: the row has no field 'q' that --columns .* renames"
    ):
        read_dataset(tmp_path / "d.parquet", words, columns={"prompt": "q"})
    columns = {"prompt": "question", "completion": "answer"}
    assert len(read_dataset(tmp_path / "d.parquet", words, columns=columns)) == 1


def test_a_null_of_a_table_has_the_name_of_its_column(tmp_path: Path) -> None:
    """Such as Dolly's "context", which only some rows have."""
    arrow = pytest.importorskip("pyarrow")
    rows = [
        {"instruction": "a", "context": None, "response": "c"},
        {"instruction": "a", "context": "b", "response": "c"},
    ]
    table = arrow.Table.from_pylist(rows)
    arrow.parquet.write_table(table, tmp_path / "d.parquet")
    words, columns = from_gguf(opened(byte_level())), {"input": "context", "output": "response"}
    expected = [ids.tolist() for ids, _ in read_dataset(rows, words, columns=columns)]
    for data in (table, tmp_path / "d.parquet"):
        assert [ids.tolist() for ids, _ in read_dataset(data, words, columns=columns)] == expected


def test_rows_of_two_kinds_in_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n')
    words = from_gguf(opened(byte_level()))
    with pytest.raises(
        DataError,
        match=r"line 2: the row has prompt and completion, but the earlier rows have text; expected one",
    ):
        read_dataset(path, words)
    assert read_dataset(path, words, skip_bad=True).report.skipped == 1
    (tmp_path / "e.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "f.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')  # another file may have another
    assert read_dataset([tmp_path / "e.jsonl", tmp_path / "f.jsonl"], words).report.kind == "text, completion"


def test_rows_of_two_kinds_are_refused_on_either_side_of_a_split() -> None:
    """The kind of a row is compared with that of all earlier rows, held out or not."""
    words = from_gguf(opened(byte_level()))
    rows = [{"prompt": f"{n}", "completion": "b"} for n in range(20)]
    for number in range(20):  # some of these texts are held out, and some are not
        found = preview([*rows, {"text": f"t{number}"}], words, valid_split=0.3)
        assert (found.train.kinds, found.train.bad) == (("completion",), 1)
        assert found.train.problems[0].startswith("data, row 21: the row has text, but the earlier rows have")
        assert found.valid is not None
        assert found.valid.kinds == ("completion",)


def test_columns_leave_a_file_that_has_the_names_already(tmp_path: Path) -> None:
    words, columns = from_gguf(opened(byte_level())), {"prompt": "q", "completion": "a"}
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n')
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    warning = r"b\.jsonl: 1 row without any field that --columns .* renames \('q', 'a'\)"
    with pytest.warns(UserWarning, match=warning):
        report = read_dataset(files, words, columns=columns).report
    assert (report.kind, report.unread) == ("completion, text", {})
    with pytest.warns(UserWarning, match=warning):
        assert preview(files, words, columns=columns).train.unread == {}
    with pytest.warns(UserWarning, match=warning):
        assert preview(files[0], words, valid=files[1], columns=columns).valid is not None
    for row in ({"q": "a", "text": "b"}, {"question": "a"}):  # only some of the names; no kind
        with pytest.raises(
            DataError, match=r"row 1: the row has no field '\w' that --columns .* renames; it has"
        ):
            read_dataset([row], words, columns=columns)


def test_a_name_of_columns_that_no_row_has_is_an_error() -> None:
    words, row = from_gguf(opened(byte_level())), {"instruction": "a", "output": "b", "context": "c"}
    with_split = functools.partial(preview, valid_split=0.5)
    for read in (read_dataset, preview, with_split):
        message = r"^data: no row has a field that --columns .* renames \('contxt'\); a row has \['instruct"
        with pytest.raises(DataError, match=message):
            read([row | {"output": f"{n}"} for n in range(20)], words, columns={"input": "contxt"})


@pytest.mark.filterwarnings("ignore:.*without any field that --columns .* renames")
def test_columns_are_found_in_any_row() -> None:
    """A bad row counts, and so does a row that is held out."""
    words, columns = from_gguf(opened(byte_level())), {"prompt": "q", "completion": "a"}
    bad = [{"q": "x"}, {"text": "c"}]
    assert read_dataset(bad, words, columns=columns, skip_bad=True).report.skipped == 1
    assert preview(bad, words, columns=columns).train.bad == 1
    others = [{"text": f"{n}"} for n in range(40)]
    for text in "abcdefgh":  # some of these rows are held out, and some are trained on
        found = preview([{"t": text}, *others], words, columns={"text": "t"}, valid_split=0.5)
        assert found.valid is not None
        assert found.train.examples + found.valid.examples == 41


@pytest.mark.filterwarnings("ignore:.*without any field that --columns .* renames")
def test_columns_leave_a_row_of_the_format_that_is_set(tmp_path: Path) -> None:
    words, columns = from_gguf(opened(byte_level())), {"prompt": "q", "completion": "a"}
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b", "text": "c"}\n')
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    report = read_dataset(files, words, columns=columns, format="completion").report
    assert (report.examples, report.unread) == (2, {"text": 1})
    with pytest.raises(DataError, match="completion is empty"):
        read_dataset([{"prompt": "a", "completion": ""}], words, columns=columns, format="completion")
    row = {"question": "a", "completion": "b"}
    with pytest.raises(DataError, match=r"prompt is missing.*; the row has none of .* renames \('qestion'\)"):
        read_dataset([row], words, columns={"prompt": "qestion"}, format="completion")  # misspelled
    rows = [{"instruction": "a", "output": "b", "context": "c"}, {"instruction": "a", "output": "b"}]
    for format in ("alpaca", None):
        read = read_dataset(rows, words, columns={"input": "context"}, format=format, skip_bad=True)
        assert read.report.examples == 2
        with pytest.raises(
            DataError, match=r"^data, row 1: output is .*; the row has none of the fields that"
        ):
            read_dataset(
                [{"instruction": "a", "output": ""}], words, columns={"input": "context"}, format=format
            )


@pytest.mark.filterwarnings("ignore:.*without any field that --columns .* renames")
def test_a_prompt_with_nplora_s_name_is_found_beside_columns(tmp_path: Path) -> None:
    words = from_gguf(opened(byte_level()))
    (tmp_path / "a.jsonl").write_text('{"q": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "source": "d e"}\n')
    found = preview([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], words, columns={"prompt": "q"})
    assert found.train.without_prompt == {}


def test_the_names_of_columns_in_the_wrong_order_or_case_are_noticed() -> None:
    words, row = from_gguf(opened(byte_level())), {"Question": "a", "Answer": "b"}
    with pytest.raises(DataError, match="--columns prompt=Question,completion=Answer "):
        read_dataset([row], words)
    with pytest.raises(ValueError, match=r"the key 'Question'.*; .* before the equals sign: prompt=Question"):
        read_dataset([row], words, columns={"Question": "prompt"})
    with pytest.raises(ValueError, match="which names 'prompt' twice"):
        parse_columns("prompt=Question,prompt=Answer")


def test_an_empty_field_is_no_field_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion,text\na,b,\nc,d,\n")
    assert read_dataset(tmp_path / "d.csv", from_gguf(opened(byte_level()))).report.kind == "completion"


def test_a_judgement_in_a_csv_file_is_not_learnt_as_an_answer(tmp_path: Path) -> None:
    words = from_gguf(opened(byte_level()))
    (tmp_path / "d.csv").write_text("instruction,output,label\na,b,false\nc,d,true\n")
    with pytest.raises(DataError, match="line 2: the row has an answer and a label; expected one"):
        read_dataset(tmp_path / "d.csv", words)


def test_comparisons_are_refused_where_one_answer_is_learnt() -> None:
    words = from_gguf(opened(byte_level()))
    for row, fields in ((pair(), "chosen and rejected"), (judged(), "an answer and a label")):
        with pytest.raises(DataError, match=f"row 1: the row has {fields}; expected one answer"):
            read_dataset([row], words)
    for row, format_ in (
        ({"prompt": "a", "completion": "b", "label": True}, "completion"),
        ({"instruction": "a", "output": "b", "label": True}, "alpaca"),
    ):
        with pytest.raises(DataError, match=f"to ignore the label, set --format .*{format_}"):
            read_dataset([row], words)
        assert len(read_dataset([row], words, format=format_)) == 1
