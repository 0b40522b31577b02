"""Rows of chosen and rejected answers: their prompt, and rows that are not valid pairs."""

import re
from typing import Any

import pytest

from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.examples import Completion, Preference
from nplora.finetuning.data.kinds import recognise
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.sources import splits_of
from nplora.formats.errors import DataError
from nplora.models.packing import IGNORED
from nplora.tokenizer import Tokenizer, from_gguf
from vocabularies import byte_level, opened

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
USER, YES = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}


def tokenizer(template: str = CHATML) -> Tokenizer:
    return from_gguf(opened(byte_level() | {"tokenizer.chat_template": template}))


def read(row: dict[str, Any], words: Tokenizer, **options: Any) -> list[tuple[str, str]]:
    """The text of both sequences, and the text of their trained tokens."""
    data = read_pairs(
        "test", splits_of("test", [row]).train, words, ReadOptions(**options), "dpo", PairDataset
    )
    return [(words.decode(ids), words.decode(labels[labels != IGNORED])) for ids, labels in data[0]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "yes", "rejected": "yes "},
        {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "weight": 1}]},
        {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "name": "b"}]},
    ],
    ids=["space", "weight", "name"],
)
def test_answers_that_the_template_writes_alike_are_no_pair(row: dict[str, Any]) -> None:
    words = tokenizer(CHATML.replace("m.content", "m.content | trim"))
    with pytest.raises(DataError, match="row 1: chosen and rejected have the same tokens, expected two answ"):
        read(row, words)
    with pytest.raises(DataError, match="no examples: 1 bad row skipped"):
        read(row, words, skip_bad=True)


CHAT = [USER, YES, {"role": "user", "content": "more"}]
IMPLICIT = [
    ("Q: hi A: I think hello", "Q: hi A: I hope 12"),
    ("Q: hi A: yes", "Q: hi A: no"),
    ("Human: a\n\nAssistant: yes", "Human: a\n\nAssistant:no"),
    ("a  b", "a  c"),
    ("a yes", "a yes and more"),
    ("ab", "ac"),
    ([USER, YES], [USER, {**YES, "content": "no"}]),
    ([*CHAT, YES], [*CHAT, {**YES, "content": "no"}]),
    ([USER, YES], [USER, YES, USER, YES]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "rejected"), IMPLICIT, ids=range(len(IMPLICIT)))
def test_the_prompt_of_answers_that_repeat_it_is_that_of_trl(chosen: Any, rejected: Any) -> None:
    extract = pytest.importorskip("trl.data_utils").extract_prompt
    row = {"chosen": chosen, "rejected": rejected}
    theirs, found = extract(row), recognise(row, "w").parse(Fields(row, "w"))
    assert isinstance(found, Preference)
    for side, name in ((found.chosen, "chosen"), (found.rejected, "rejected")):
        if isinstance(side, Completion):
            assert (side.prompt, side.completion) == (theirs["prompt"], theirs[name])
        else:
            assert side.messages[: side.prompt] == theirs["prompt"]
            assert side.messages[side.prompt :] == theirs[name]


NO = {**YES, "content": "no"}
OTHER = {**USER, "content": "other"}
CONTRADICTIONS = [
    ({"chosen": "abc", "rejected": "xyz"}, "chosen and rejected begin differently, expected the same"),
    ({"chosen": " abc", "rejected": " xyz"}, "chosen and rejected begin differently"),
    ({"chosen": [USER, YES], "rejected": [OTHER, NO]}, "chosen and rejected begin differently"),
    ({"prompt": "a", "chosen": [USER, YES], "rejected": [OTHER, NO]}, "chosen and rejected begin diff"),
    ({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]},
     "prompt is 'other', expected a message of the user at the beginning of chosen and rejected"),
    ({"prompt": "no", "chosen": [USER, YES, OTHER, YES], "rejected": [USER, YES, OTHER, NO]},
     "prompt is 'no', expected a message of the user"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_prompts_of_a_pair_that_differ_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^data, row 1: {message}"):
        read(row, tokenizer())


@pytest.mark.parametrize("prompt", ["a", " a\n", "other"])
def test_a_prompt_beside_whole_chats_is_one_of_their_questions(prompt: str) -> None:
    row = {"prompt": prompt, "chosen": [USER, YES, OTHER, YES], "rejected": [USER, YES, OTHER, NO]}
    assert [trained for _, trained in read(row, tokenizer())] == ["yes<|end|>", "no<|end|>"]


OPENAI = {"input": {"messages": [USER]}, "preferred_output": [YES]}
OPENAI |= {"non_preferred_output": [{"role": "assistant", "content": "no"}]}


def test_a_pair_in_openais_form_is_read_as_the_same_pair_in_trls_form() -> None:
    words = tokenizer()
    trl = {"prompt": [USER], "chosen": OPENAI["preferred_output"], "rejected": OPENAI["non_preferred_output"]}
    assert read(OPENAI, words) == read(trl, words)
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = "{{ tools | tojson }}" + CHATML
    theirs = {**OPENAI, "input": {"messages": [USER], "tools": tools, "parallel_tool_calls": True}}
    assert read(theirs, tokenizer(template)) == read(trl | {"tools": tools}, tokenizer(template))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": None}, "input is None, expected an object with messages"),
        ({"input": {}}, "input is {}, expected an object with messages"),
        ({"non_preferred_output": None}, "non_preferred_output is None, expected a list"),
        ({"non_preferred_output": []}, "non_preferred_output is empty, expected messages"),
        ({"non_preferred_output": [USER]}, "non_preferred_output ends with a message of role 'user'"),
        ({"non_preferred_output": [YES]}, "preferred_output and non_preferred_output are the same answer"),
    ],
)
def test_wrong_pairs_in_openais_form_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read(OPENAI | changes, tokenizer())
