"""Training data: all formats, the mistakes in them, and batches that a run can repeat."""

import csv
import itertools
import json
import os
import re
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nplora.finetuning.data import TokenBatches, find_evaluated, find_splits, read_dataset
from nplora.finetuning.data.builder import Builder
from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import Dataset, ReadOptions, add_rows, read_sources
from nplora.finetuning.data.encoding import Encoded
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.sources import splits_of
from nplora.formats.errors import DataError, FormatError, LimitError, UnsafeError
from nplora.models.packing import IGNORED
from nplora.tokenizer import Tokenizer, from_gguf
from vocabularies import byte_level, opened, sentencepiece

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}{{ '<|end|>' if m.role == 'nobody' else '' }}{{ m.role + ':' + m.content }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tokenizer(template: str = CHATML, **changes: Any) -> Tokenizer:
    return from_gguf(opened(byte_level(**changes) | {"tokenizer.chat_template": template}))


def write(path: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    """Write rows as lines of JSON, unless they are text or bytes already."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    (path / name).write_bytes(b"\n".join(lines) + b"\n")
    return path / name


def read(path: Path, *rows: Any, **options: Any) -> list[tuple[str, str]]:
    """The text of each example, and the text of its trained tokens."""
    words = tokenizer()
    dataset = read_dataset(write(path, *rows), words, **options)
    return [(words.decode(ids), words.decode(labels[labels != IGNORED])) for ids, labels in dataset]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files are read in parts of this many bytes instead of a megabyte."""
    monkeypatch.setattr("nplora.finetuning.data.rows._PART", 1 << 16)
    return 1 << 16


# ---- formats ----


def test_a_completion_follows_its_prompt_unchanged_and_is_trained_with_its_end(tmp_path: Path) -> None:
    row = {"prompt": "Q: hello?\nA:", "completion": " hello 12", "id": 7}
    assert read(tmp_path, row) == [("Q: hello?\nA: hello 12<|end|>", " hello 12<|end|>")]
    assert read(tmp_path, row, learn="all") == [("Q: hello?\nA: hello 12<|end|>",) * 2]


def test_the_tokens_of_a_prompt_are_those_of_generation(tmp_path: Path) -> None:
    words = tokenizer()
    prompt, completion = "hel", "lo"  # "hello" is one token
    [(ids, labels)] = read_dataset(write(tmp_path, {"prompt": prompt, "completion": completion}), words)
    before = words.encode(prompt)
    assert ids.tolist() == [*before, *words.encode(completion), words.eos_id]
    assert labels.tolist() == [IGNORED] * len(before) + ids.tolist()[len(before) :]


def test_an_empty_prompt_is_the_token_that_begins_a_text(tmp_path: Path) -> None:
    words = from_gguf(opened(sentencepiece()))
    [(ids, labels)] = read_dataset(write(tmp_path, {"prompt": "", "completion": "ab"}), words)
    assert ids[0] == words.bos_id
    assert labels.tolist() == [IGNORED, *ids.tolist()[1:]]


def test_no_space_comes_between_prompt_and_completion(tmp_path: Path) -> None:
    words = from_gguf(opened(sentencepiece()))
    [(ids, labels)] = read_dataset(write(tmp_path, {"prompt": "ab ", "completion": "nb"}), words)
    assert words.decode(ids[1:-1]) == "ab nb"
    assert [ids[0], ids[-1]] == [words.bos_id, words.eos_id]
    assert words.decode(labels[labels != IGNORED]) == "nb</s>"


@pytest.mark.parametrize(("prompt", "completion"), [("ab ", "ab"), ("a", "b"), ("ab\n", "ab"), ("n", "€b")])
def test_no_space_comes_before_a_completion_that_begins_a_word(
    tmp_path: Path, prompt: str, completion: str
) -> None:
    words = from_gguf(opened(sentencepiece()))
    [(ids, labels)] = read_dataset(write(tmp_path, {"prompt": prompt, "completion": completion}), words)
    assert words.decode(ids[1:-1]) == prompt + completion
    assert words.decode(labels[labels != IGNORED][:-1]).strip() == completion
    assert ids.tolist()[: len(words.encode_prompt(prompt))] == words.encode_prompt(prompt)


def test_no_space_is_added_to_a_long_plain_text(tmp_path: Path, small_parts: int) -> None:
    words = from_gguf(opened(sentencepiece()))
    text = "ab\n" * (small_parts // 2)  # longer than a part
    (tmp_path / "data.txt").write_text(text)
    [(ids, _)] = read_dataset(tmp_path / "data.txt", words, max_length=10**7)
    assert words.decode(ids[1:-1]) == text.rstrip()


def test_an_end_that_the_model_adds_itself_is_not_doubled(tmp_path: Path) -> None:
    words = from_gguf(opened(sentencepiece(add_eos_token=True)))
    for row in ({"prompt": "a", "completion": "b"}, {"text": "ab"}):
        [(ids, _)] = read_dataset([row], words)
        assert ids.tolist().count(words.eos_id) == 1
        assert ids[-1] == words.eos_id


def test_the_assistants_turns_are_trained(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "3"},
    ]
    text = "user:hello<|end|>assistant:12<|end|>user:x<|end|>assistant:3<|end|>"
    assert read(tmp_path, {"messages": chat}) == [(text, "12<|end|>3<|end|>")]
    assert read(tmp_path, {"messages": chat}, learn="all") == [(text, text)]


def test_a_turn_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "hello", "weight": None},
        {"role": "assistant", "content": "12", "weight": 0},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "3", "weight": 1},
        {"role": "assistant", "content": "4", "weight": None},
    ]
    text = "user:hello<|end|>assistant:12<|end|>user:x<|end|>assistant:3<|end|>assistant:4<|end|>"
    assert read(tmp_path, {"messages": chat}) == [(text, "3<|end|>4<|end|>")]
    assert read(tmp_path, {"messages": chat}, learn="all") == [(text, text.replace("12<|end|>", ""))]


def test_all_tokens_are_trained_with_learn_all_also_in_a_prompt(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"prompt": [user, answer, {**answer, "content": "c", "weight": 0}, user], "completion": [answer]}
    text = "user:a<|end|>assistant:b<|end|>assistant:c<|end|>user:a<|end|>assistant:b<|end|>"
    assert read(tmp_path, row) == [(text, "b<|end|>")]
    assert read(tmp_path, row, learn="all") == [(text, text.replace("c<|end|>", ""))]


def test_a_null_is_not_a_second_kind_of_example(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"messages": chat, "text": None, "tools": None},
        {"messages": None, "prompt": "a", "completion": "b"},
    ):
        assert [trained for _, trained in read(tmp_path, row)] == ["b<|end|>"]


# ---- tools ----

# Like the templates of Qwen and Hermes.
TOOLS_TEMPLATE = """{%- if tools %}{{- 'system:' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '</tools><|end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- 'system:' + messages[0].content + '<|end|>\n' }}{%- endif %}
{%- for document in documents or [] %}{{- document.title + ': ' + document.text + '\n' }}{%- endfor %}
{%- for m in messages if m.role != 'system' %}
{{- m.role + ':' }}{%- if m.content %}{{- m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{- '<call>' + call.name + ' ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '</call>' }}
{%- endfor %}{{- '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The <weather> of a "city", in °C',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it hot in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
            {"id": "2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "31"},
    {"role": "assistant", "content": "Yes."},
]
DOCUMENTS = [{"title": "Rome", "text": "A city."}]


def transformers_text(messages: Any, **given: Any) -> str:
    """The text that transformers' `apply_chat_template` writes."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("tokenizers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=package.Tokenizer(package.models.BPE()), eos_token="<|end|>"
    )
    text = theirs.apply_chat_template(messages, chat_template=TOOLS_TEMPLATE, tokenize=False, **given)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("tools", [None, [], [WEATHER, WEATHER]])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_tools_and_documents_are_written_as_in_transformers(
    tmp_path: Path, tools: Any, documents: Any
) -> None:
    words = tokenizer(TOOLS_TEMPLATE)
    path = write(tmp_path, {"messages": CALLS, "tools": tools, "documents": documents})
    expected = transformers_text(CALLS, tools=tools, documents=documents)
    assert ("<tools>" in expected) == bool(tools)
    dataset = read_dataset(path, words)
    [(ids, labels)] = dataset
    assert words.decode(ids) == expected
    call = '<call>weather {"city": "Rome"}</call><call>weather {"city": "Oslo"}</call><|end|>'
    assert words.decode(labels[labels != IGNORED]) == f"{call}Yes.<|end|>"
    assert dataset.report.unused == 0
    given = {"tools": tools, "documents": documents}
    assert words.apply_chat_template(CALLS, **given) == expected
    asked = words.encode_chat(CALLS[:2], True, **given)
    assert words.decode(asked) == transformers_text(CALLS[:2], add_generation_prompt=True, **given)


def test_examples_whose_tools_the_template_does_not_write_are_counted_once_a_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": chat, "tools": [WEATHER]},
        {"messages": chat, "documents": DOCUMENTS},
        {"messages": chat, "tools": []},
    ]
    path = write(tmp_path, *rows)
    with pytest.warns(UserWarning, match="the chat template or the format of the row leaves out") as caught:
        report = read_dataset(path, tokenizer()).report
    assert [str(warning.message) for warning in caught] == [
        f"{path}: in 2 examples, the chat template or the format of the row leaves out documents or tools, "
        "so the model does not see them"
    ]
    assert report.unused == 2
    assert read_dataset(path, tokenizer(TOOLS_TEMPLATE)).report.unused == 0
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}):
        with pytest.warns(
            UserWarning, match="in 1 example, the chat template or the format of the row leaves out"
        ):
            read_dataset([row | {"tools": [WEATHER]}, row | {"tools": None}], tokenizer(TOOLS_TEMPLATE))


REASONING = """{%- for m in messages %}{{- m.role + ':' }}
{%- if m.reasoning_content %}{{- '(' + m.reasoning_content + ')' }}{%- endif %}
{{- m.content + '<|end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""


@pytest.mark.parametrize(
    ("template", "name", "indices", "unused"),
    [
        (CHATML, "reasoning_content", [1, 3], 1),
        (CHATML, "thinking", [3], 1),
        (CHATML, "name", [1, 3], 0),  # no reasoning
        (REASONING, "reasoning_content", [1, 3], 0),
        (REASONING, "thinking", [3], 1),  # a name that this template does not know
    ],
)
@pytest.mark.filterwarnings("ignore:.*leaves out")
def test_reasoning_that_the_template_leaves_out_is_counted(
    template: str, name: str, indices: list[int], unused: int
) -> None:
    chat = [CALLS[1], CALLS[4], CALLS[1], CALLS[4]]
    messages = [m | ({name: "Hm."} if n in indices else {}) for n, m in enumerate(chat)]
    assert read_dataset([{"messages": messages}], tokenizer(template)).report.unused == unused


@pytest.mark.parametrize("content", [None, "Let me look.", "Let me look up the weather."])
def test_a_tool_call_that_the_template_leaves_out_is_refused(tmp_path: Path, content: str | None) -> None:
    """Its turn would be trained as an empty answer, or as an answer without the call."""
    user, calling = CALLS[1], CALLS[2] | {"content": content}
    path = write(tmp_path, {"messages": [user, calling]})
    message = (
        f"{path}, line 1: the chat template of this model leaves out the tool call 'weather', so it cannot "
        "be trained; use a model whose template writes tool calls, or give the call as text in 'content'"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read_dataset(path, tokenizer())
    read_dataset(path, tokenizer(TOOLS_TEMPLATE))
    with pytest.raises(DataError, match="leaves out the tool call 'weather'"):
        read_dataset(path, tokenizer(), learn="all")
    pairs = splits_of("test", [{"prompt": [user], "chosen": [calling], "rejected": "b"}]).train
    with pytest.raises(DataError, match="leaves out the tool call 'weather'"):
        read_pairs("test", pairs, tokenizer(), ReadOptions(), "dpo", PairDataset)
    long = {"role": "user", "content": "a" * 9000}
    for ours in (tokenizer(), tokenizer(TOOLS_TEMPLATE)):  # turns that are not trained, or are cut
        read_dataset([{"messages": [user, calling | {"weight": 0}, ANSWER]}], ours)
        read_dataset([{"messages": [user, ANSWER, long, calling]}], ours, max_length=60)
        read_dataset(
            [{"messages": [user, ANSWER, user, calling | {"content": "a" * 9000}]}], ours, max_length=80
        )


@pytest.mark.parametrize("name", ["<|end|>", "wétter", 'a"b', "天気"])
def test_the_name_of_a_function_may_have_any_characters(name: str) -> None:
    call = {"function": {"name": name, "arguments": {}}}
    chat = [CALLS[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    for template in (TOOLS_TEMPLATE, TOOLS_TEMPLATE.replace("call.name", "(call.name | tojson)")):
        assert len(read_dataset([{"messages": chat}], tokenizer(template))) == 1


def test_a_template_may_write_a_call_by_its_id() -> None:
    """As that of Kimi K2 does."""
    call = {"id": "call_7", "function": {"name": "weather", "arguments": {}}}
    chat = [CALLS[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = TOOLS_TEMPLATE.replace(
        "{%- if call.function %}{%- set call = call.function %}{%- endif %}", ""
    )
    template = template.replace("call.name", "call.id").replace("call.arguments", "call.function.arguments")
    assert len(read_dataset([{"messages": chat}], tokenizer(template))) == 1


FIRST_SYSTEM = """{%- for m in messages %}{%- if m.role != 'system' or loop.first %}
{{- m.role + ':' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("messages", "unused"),
    [
        ([BRIEF, *CALLS[1:2], CALLS[4], BRIEF, *CALLS[1:2], CALLS[4]], 1),
        ([CALLS[1], CALLS[4] | {"content": "I shall: Be brief."}, BRIEF, CALLS[1], CALLS[4]], 1),
        ([BRIEF, CALLS[1], CALLS[4], CALLS[1], CALLS[4]], 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*leaves out")
def test_a_message_that_is_left_out_is_found_though_its_text_is_elsewhere(
    messages: list[dict[str, Any]], unused: int
) -> None:
    assert read_dataset([{"messages": messages}], tokenizer(FIRST_SYSTEM)).report.unused == unused


def test_the_chats_with_tools_of_the_documentation_train_the_call_and_the_answer() -> None:
    root = Path(__file__).parents[2]
    template = (root / "tests/data/chat_templates/qwen2_5.jinja").read_text()
    page = (root / "docs/finetune.md").read_text(encoding="utf-8")
    rows = [
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "tools" in block
    ]
    assert [set(row) for row in rows] == [{"tools", "messages"}, {"tools", "conversations"}]
    for row in rows:
        words = tokenizer(template)
        [(_, labels)] = read_dataset([row], words)
        assert words.decode(labels[labels != IGNORED]) == (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
            "Yes, it has 31 °C.<|im_end|>\n"
        )


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DROPS: list[tuple[dict[str, Any], bool]] = [
    ({"prompt": [USER], "completion": [ANSWER]}, False),
    ({"messages": [USER, ANSWER]}, False),
    ({"instruction": "a", "output": "b"}, True),
    ({"prompt": "a", "completion": "b"}, True),
    ({"text": "a"}, True),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, True),
    ({"prompt": [USER], "chosen": "b", "rejected": "c"}, False),
    ({"prompt": "a", "completion": "b", "label": True}, True),
    ({"prompt": [USER], "completion": "b", "label": True}, False),
]


@pytest.mark.parametrize(("row", "drops"), DROPS, ids=range(len(DROPS)))
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_counted_as_unused_where_the_model_does_not_see_them(
    row: dict[str, Any], drops: bool, name: str
) -> None:
    words, columns = tokenizer(TOOLS_TEMPLATE), {"tools": "functions"} if name == "functions" else {}
    sources = splits_of("test", [{**row, name: tools} for tools in ([WEATHER], json.dumps([WEATHER]))]).train
    options = ReadOptions(columns=columns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if "chosen" in row:
            report = read_pairs("test", sources, words, options, "dpo", PairDataset).report
        elif "label" in row:
            builder = Builder(None, False, Dataset)
            builder.begin(sources[0])
            add_rows(
                builder,
                ColumnNames({}),
                sources[0],
                words,
                options,
                lambda kind, where: None,
                lambda _, found: [found],
            )
            builder.end()
            report = builder.dataset().report
        else:
            report = read_sources("test", sources, words, options).report
    assert (report.unused, len(caught)) == (2 * drops, drops)


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]"])
def test_no_tools_are_not_unused(tools: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_dataset([{"text": "a", "tools": tools}], tokenizer()).report.unused == 0


def test_a_template_that_needs_tools_gets_them(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    words = tokenizer("{{ tools[0].function.name }}" + CHATML)
    [(ids, _)] = read_dataset(write(tmp_path, {"messages": chat, "tools": [WEATHER]}), words)
    assert words.decode(ids).startswith("weatheruser:a")
    with pytest.raises(DataError, match="the chat template fails with these messages"):
        read_dataset(write(tmp_path, {"messages": chat}), words)


def test_a_special_token_that_a_tool_spells_out_stays_letters() -> None:
    words = tokenizer(TOOLS_TEMPLATE)
    chat = [{"role": "user", "content": "a"}]
    tools = [{"name": "<|end|>", "<|end|>": 1}]
    assert words.encode_chat(chat, tools=tools).count(words.eos_id) == 2  # after the tools, and the message
    text = words.apply_chat_template(chat, tools=tools)
    assert words.decode(words.encode_chat(chat, tools=tools)) == text


@pytest.mark.parametrize("given", [{"tools": {"a": 1}}, {"tools": [print]}, {"documents": "a"}])
def test_tools_or_documents_that_are_not_a_list_are_refused(given: dict[str, Any]) -> None:
    name = next(iter(given))
    for write_chat in (tokenizer().apply_chat_template, tokenizer().encode_chat):
        with pytest.raises(TypeError, match=f"{name} of a chat are .*, expected a list of dictionaries"):
            write_chat([{"role": "user", "content": "a"}], **given)


def test_a_text_is_trained_to_its_end(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "hello"}) == [("hello<|end|>",) * 2]


def test_byte_order_marks_and_carriage_returns_are_ignored(tmp_path: Path) -> None:
    rows = [b"\xef\xbb\xbf" + b'{"text": "a"}\r', b"", b'{"text": "b"}\r', b" \t\r", b"\r", b""]
    assert [text for text, _ in read(tmp_path, *rows)] == ["a<|end|>", "b<|end|>"]
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a"}')  # without an end of the line
    assert len(read_dataset(tmp_path / "data.jsonl", tokenizer())) == 1


def test_lines_longer_than_a_part_of_the_file_are_whole(tmp_path: Path, small_parts: int) -> None:
    texts = ["ab" * (2 * small_parts // 3), "c", "d" * small_parts, "e"]
    found = read(tmp_path, *({"text": text} for text in texts))
    assert [text for text, _ in found] == [f"{text}<|end|>" for text in texts]


def test_csv_has_its_columns_by_name(tmp_path: Path) -> None:
    words = tokenizer()
    path = tmp_path / "data.csv"
    path.write_bytes('\ufeffcompletion,n,prompt\r\n"a ""b"",\nc",1,q\r\nd,2,p\r\n'.encode())
    found = read_dataset(path, words)
    assert [words.decode(ids) for ids, _ in found] == ['qa "b",\nc<|end|>', "pd<|end|>"]
    path.write_text("text\nhello\n")
    assert [words.decode(ids) for ids, _ in read_dataset(path, words)] == ["hello<|end|>"]


def test_a_plain_text_comes_in_windows_that_share_a_token(tmp_path: Path) -> None:
    words = tokenizer()
    text = "".join(f"Line {n} hello\n  and 12\n\n" for n in range(50))
    path = tmp_path / "data.txt"
    path.write_text(text)
    whole = [*words.encode(text.rstrip("\n")), words.eos_id]
    dataset = read_dataset(path, words, max_length=16)
    assert {len(ids) for ids, _ in list(dataset)[:-1]} == {16}
    joined = dataset[0][0].tolist() + [id_ for ids, _ in dataset[1:] for id_ in ids[1:].tolist()]
    assert joined == whole
    assert dataset.report.learned == len(whole) - 1


def test_a_long_plain_text_has_the_tokens_of_its_whole(tmp_path: Path, small_parts: int) -> None:
    tokens = [*byte_level()["tokenizer.ggml.tokens"], "ĊĠ"]  # an end of a line and a space
    words = tokenizer(tokens=tokens, token_type=None, merges=["Ċ Ġ"])
    text = "".join(f"Line {n}\n  and\n  12\r\n  then\n" for n in range(4_000))
    (tmp_path / "data.txt").write_text(text, newline="")
    dataset = read_dataset(tmp_path / "data.txt", words, max_length=1 << 30)
    assert len(text) > 1.5 * small_parts
    whole = text.replace("\r\n", "\n").rstrip("\n")
    assert dataset[0][0].tolist() == [*words.encode(whole), words.eos_id]


def test_a_directory_has_its_files_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"the directory has no train\.\* that ends in \.jsonl, \.json, "
    ):
        find_splits(tmp_path)
    train = write(tmp_path, {"text": "a"}, name="train.jsonl")
    assert find_splits(tmp_path) == (train, None)
    valid = write(tmp_path, {"text": "a"}, name="valid.jsonl")
    assert find_splits(tmp_path) == (train, valid)
    assert find_splits(train) == (train, None)
    assert find_evaluated(tmp_path) == valid
    assert find_evaluated(train) == train
    train.unlink()
    assert find_evaluated(tmp_path) == valid
    train = valid.rename(train)
    assert find_evaluated(tmp_path) == train
    train.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no valid\.\*, validation\.\*, train\.\* that ends in \.jsonl, "
    ):
        find_evaluated(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        find_evaluated(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("names", [("train.jsonl", "train.csv"), ("train.jsonl", "train.jsonl.gz"),
                                   ("train.txt", "valid.csv", "validation.jsonl")])  # fmt: skip
def test_two_files_of_one_split_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path, {"text": "a"}, name=name)
    both = f"{names[-2]}.*{names[-1]}|{names[-1]}.*{names[-2]}"
    with pytest.raises(ValueError, match=f"the directory has ({both}), expected only one of them"):
        find_splits(tmp_path)
    with pytest.raises(ValueError, match=f"the directory has ({both}), expected only one of them"):
        find_evaluated(tmp_path)


# ---- lengths ----


def test_long_examples_are_cut_and_counted(tmp_path: Path) -> None:
    pairs = [("a", "bc"), ("a", "bcdefgh"), ("a" * 9, "b")]
    path = write(tmp_path, *({"prompt": prompt, "completion": completion} for prompt, completion in pairs))
    report = read_dataset(path, tokenizer(), max_length=5).report
    assert (report.examples, report.truncated, report.emptied) == (2, 1, 1)
    assert (report.tokens, report.learned) == (4 + 5, 3 + 4)
    assert (report.shortest, report.median, report.longest) == (4, 4, 5)
    assert "1 cut to the maximum length; 1 left out" in str(report)
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: 9 tokens, expected at most 5"):
        read_dataset(path, tokenizer(), max_length=5, strict=True)


# Each has more characters than the beginning that is encoded first: 8 · (41 + 1024) = 8,520.
LONG_TEXTS = {
    "words": "hello 12 word " * 750,
    "lines": "hello 123\n  and 12\nx" * 550,
    "one word": "ahello" * 1750,
    "digits": "123" * 3500,
    "spaces": "a" + " " * 10_500 + "b",
    "letters of all kinds": "日本é e\u0301 😀 <|end|> 12\r\n" * 500,
}


@pytest.mark.slow
@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("words", ["gpt-2", "llama-bpe", "qwen2", "sentencepiece"])
def test_a_long_example_that_is_cut_has_the_tokens_of_its_whole(
    tmp_path: Path, text: str, words: str
) -> None:
    metadata = sentencepiece() if words == "sentencepiece" else byte_level(pre=words)
    model = from_gguf(opened(metadata | {"tokenizer.chat_template": CHATML}))
    read_texts = list[int]()
    encode = model._encode
    model._encode = lambda text, *options: (read_texts.append(len(text)), encode(text, *options))[1]  # type: ignore
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"text": text},
        {"prompt": "a", "completion": text},
        {"prompt": text, "completion": "a"},
        {"messages": [*chat, {"role": "assistant", "content": text}]},
        {"messages": [*chat, {"role": "user", "content": text}, *chat]},
    ]
    for row in rows:
        path = write(tmp_path, row)
        for learn in ("completion", "all"):
            [(ids, labels)] = read_dataset(path, model, learn=learn)
            read_texts.clear()
            if (labels[1:40] == IGNORED).all():
                with pytest.raises(DataError, match="1 with nothing to train on within max_length="):
                    read_dataset(path, model, learn=learn, max_length=40)
            else:
                [(first, trained)] = read_dataset(path, model, learn=learn, max_length=40)
                assert first.tolist() == ids[:40].tolist()
                assert trained.tolist() == labels[:40].tolist()
            assert max(read_texts) < len(text)


def test_a_long_example_is_refused_with_the_least_number_of_its_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "hello " * 10_000})
    with pytest.raises(DataError, match=r"line 1: at least 7 tokens, expected at most 5"):
        read_dataset(path, tokenizer(), max_length=5, strict=True)


def test_trained_tokens_are_those_that_can_be_predicted(tmp_path: Path) -> None:
    for row, targets in ({"text": "abc"}, 3), ({"prompt": "ab", "completion": "c"}, 2):
        dataset = read_dataset(write(tmp_path, row, row), tokenizer())
        batches = TokenBatches(dataset, batch_tokens=100)
        assert dataset.report.learned == sum(batch.num_targets for batch, _ in batches) == 2 * targets


def test_a_dataset_does_not_copy_the_tokens_that_are_collected(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"})
    builder = Builder(None, False, Dataset)
    builder.begin(splits_of("test", path).train[0])
    builder.add([Encoded([1] * 3_000_000, [True] * 3_000_000)], "here")
    builder.end()
    tracemalloc.start()
    data = builder.dataset()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert data.report.tokens == 3_000_000
    assert held < 1_000_000


def test_the_report_counts_the_cut_examples_of_an_epoch(tmp_path: Path) -> None:
    path = write(tmp_path, *({"text": f"a{n} bcdefgh"} for n in range(50)), {"text": "a"})
    for weight in (0.1, 1, 2.5):
        dataset = read_dataset([(path, weight)], tokenizer(), max_length=4)
        cut = sum(len(ids) == 4 for ids, _ in dataset)
        assert dataset.report.truncated == cut <= len(dataset)


@pytest.mark.parametrize(
    ("weight", "count"), [(0.04, 1), (0.25, 5), (0.5, 10), (1.5, 30), (2.26, 45), (3, 60)]
)
def test_an_epoch_has_the_share_of_examples_that_a_weight_says(
    tmp_path: Path, weight: float, count: int
) -> None:
    path = write(tmp_path, *({"text": f"a{n}"} for n in range(20)))
    found = Counter(ids.tobytes() for ids, _ in read_dataset([(path, weight)], tokenizer()))
    assert sum(found.values()) == count
    assert set(found.values()) <= {int(weight), int(weight) + 1}


def test_a_file_of_which_an_epoch_has_nothing_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "b"}\n')
    with pytest.warns(UserWarning, match=r"data\.jsonl: with weight 0\.1, an epoch has none of its examples"):
        assert len(read_dataset([(path, 0.1), other], tokenizer())) == 1


@pytest.mark.parametrize("weight", [1e9, 1e300, 33_554_432])
def test_a_weight_that_repeats_examples_too_often_is_refused(tmp_path: Path, weight: float) -> None:
    path, other = (write(tmp_path, {"text": "a"}, name=name) for name in ("data.jsonl", "other.jsonl"))
    with pytest.raises(LimitError, match=r"data\.jsonl: weight \S+ .*, expected at most 33,554,432"):
        read_dataset([other, (path, weight)], tokenizer())


# ---- mistakes ----

CHAT_LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'


def weighted(weight: bytes, role: bytes = b"assistant") -> bytes:
    """A chat of two messages; the one of this role has a weight."""
    return CHAT_LINE.replace(b'"' + role + b'"', b'"' + role + b'", "weight": ' + weight) + b"}"


BAD = [
    (b'{"text": "\xff"}', DataError, "not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', DataError, "a string holds half a surrogate pair"),
    (b'{"text": "a"', DataError, "not JSON at character"),
    (b'{"text": "a", "text": "b"}', DataError, "the name 'text' appears twice"),
    (b'{"text": NaN}', DataError, "NaN is not JSON"),
    (b"[" * 100_000, LimitError, "JSON nested 100,000 deep, expected at most 64"),
    (b'["text"]', DataError, r"the row is \['text'\], expected an object"),
    (b'{"txt": "a"}', DataError, r"the row has \['txt'\], expected messages, conversations, "),
    (b"{}", DataError, r"has \[\], expected"),
    (b'{"text": 5}', DataError, "text is 5, expected a string"),
    (b'{"text": null}', DataError, "text is None"),
    (b'{"text": " "}', DataError, "text is empty"),
    (b'{"prompt": "a", "completion": ""}', DataError, "completion is empty"),
    (b'{"prompt": "a", "completion": " \\n"}', DataError, "completion is empty"),
    (b'{"prompt": "a"}', DataError, "completion is missing"),
    (b'{"completion": "a"}', DataError, "prompt is missing"),
    (b'{"prompt": ["a"], "completion": "a"}', DataError, "a message is 'a'"),
    (
        b'{"prompt": "", "completion": "a"}',
        DataError,
        "prompt is empty, but a model without a BOS token needs",
    ),
    (b'{"prompt": "a", "completion": "b", "text": "c"}', DataError, "has both completion and text"),
    (b'{"text": "c", "completion": "b"}', DataError, "has both completion and text"),
    (CHAT_LINE + b', "text": "c"}', DataError, "has both messages and text"),
    (CHAT_LINE + b', "completion": "c"}', DataError, "has both messages and completion"),
    (CHAT_LINE + b', "tools": {"a": 1}}', DataError, "tools is {'a': 1}, expected a list of objects"),
    (CHAT_LINE + b', "documents": ["a"]}', DataError, r"documents is \['a'\], expected a list of objects"),
    (weighted(b"2"), DataError, "the weight of a message is 2, expected 0 or 1"),
    (weighted(b"0.5"), DataError, "the weight of a message is 0.5, expected 0 or 1"),
    (weighted(b"true"), DataError, "the weight of a message is True, expected 0 or 1"),
    (weighted(b'"0"'), DataError, "the weight of a message is '0', expected 0 or 1"),
    (weighted(b"0"), DataError, "nothing to train on"),
    (
        weighted(b"1", b"user"),
        DataError,
        "a message of role 'user' has weight 1, expected 0 or no weight for this role",
    ),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}',
        DataError,
        "the role of a message is 'asistant', expected one of system, user, assistant, tool, ",
    ),
    (b'{"messages": []}', DataError, r"messages is \[\]"),
    (b'{"messages": "a"}', DataError, "messages is 'a'"),
    (b'{"messages": ["a"]}', DataError, "a message is 'a'"),
    (b'{"messages": [{"content": "a"}]}', DataError, "a message is"),
    (b'{"messages": [{"role": 1}]}', DataError, "a message is"),
    (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        DataError,
        "the chat has no message of the assistant",
    ),
    (
        b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
        DataError,
        r"a message has the fields \['role'\], expected the field 'content'",
    ),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        DataError,
        "the assistant's content is ''",
    ),
]


def neighbour(line: bytes) -> dict[str, Any]:
    """A good row of the kind that a bad line seems to be."""
    if b'"messages"' in line:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    return {"prompt": "a", "completion": "b"} if re.search(rb'"(prompt|completion)"', line) else {"text": "a"}


@pytest.mark.parametrize(("line", "error", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, line: bytes, error: type[FormatError], message: str
) -> None:
    good = neighbour(line)
    path = write(tmp_path, good, line, good)
    with pytest.raises(error, match=rf"data\.jsonl, line 2(, message \d( of \w+)?)?: .*{message}") as caught:
        read_dataset(path, tokenizer())
    assert caught.type is error
    report = read_dataset(path, tokenizer(), skip_bad=True).report
    assert (report.examples, report.skipped, report.problems) == (2, 1, (str(caught.value),))
    assert "1 bad row skipped, such as: " in str(report)
    with pytest.raises(DataError, match=r"no examples: 1 bad row skipped"):
        read_dataset(write(tmp_path, line), tokenizer(), skip_bad=True)


def test_an_endless_line_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # a sparse file of zeros
    with pytest.raises(LimitError, match=r"line 1: more than 16,777,216 bytes, the limit"):
        read_dataset(path, tokenizer(), skip_bad=True)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_an_empty_file_has_no_examples(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.\w+: no examples"):
        read_dataset(path, tokenizer(), max_length=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", r"line 2: the row has \['a', 'b'\], expected messages, conversations, "),
        (b"a,b\n", r"data\.csv: no examples"),
        (b"text,text\na,b\n", r"the columns are \['text', 'text'\], expected a different name for each"),
        (b"text\na,b\n", "line 2: the row has 2 fields, expected 1"),
        (b"prompt,completion\na\n", "line 2: the row has 1 field, expected 2"),
        (b'text\n"a\n', "line 2: a quote is not closed"),
        (b'text\na\n\n"b\n\n', "line 4: a quote is not closed"),
        (b'"prompt,completion\na,b\n', "line 1: a quote is not closed"),
        (b'text\n"a"b\n', "line 2: ',' expected after '\"'"),
        (b"text\n\xff\n", "line 2: not UTF-8 at byte 0"),
        (b'text\n"' + (b"a" * 99_999 + b"\n") * 180, "field larger than field limit"),
        (b"prompt,completion\na,\n", "line 2: completion is empty"),
        (b"prompt,completion,text\na,b,c\n", "line 2: the row has both completion and text"),
        (b"messages,text\na,b\n", "line 2: the row has both messages and text"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "data.csv", tokenizer())


def test_a_path_that_is_not_a_data_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff")
    (tmp_path / "data.xml").touch()
    for name, message in (
        ("pipe.jsonl", "a FIFO, expected a regular file"),
        ("bad.txt", "line 2: not UTF-8"),
        ("data.xml", r"expected a name that ends in \.jsonl"),
    ):
        with pytest.raises(FormatError, match=message):
            read_dataset(tmp_path / name, tokenizer(), max_length=8)
    with pytest.raises(FileNotFoundError, match=r"the directory has no valid\.\*, .*folder\.jsonl"):
        read_dataset(tmp_path / "folder.jsonl", tokenizer(), max_length=8)
    with pytest.raises(FileNotFoundError):
        read_dataset(tmp_path / "nowhere", tokenizer(), max_length=8)
    with pytest.raises(FileNotFoundError):
        read_dataset(tmp_path / "missing.jsonl", tokenizer())
    with pytest.raises(ValueError, match=r"max_length is None, but the plain text .*bad\.txt needs one"):
        read_dataset(tmp_path / "bad.txt", tokenizer())


def test_a_long_field_of_a_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\n" + "a" * 140_000 + "\nab\n")
    limit = csv.field_size_limit()
    assert read_dataset(tmp_path / "data.csv", tokenizer()).lengths.tolist() == [140_001, 3]
    assert csv.field_size_limit() == limit


def test_faults_of_the_model_are_not_blamed_on_the_rows(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path, chat)
    with pytest.raises(UnsafeError):
        read_dataset(path, tokenizer("{{ ''.__class__ }}"), skip_bad=True)
    with pytest.raises(UnsafeError, match=r"line 1: .*takes too much memory"):
        read_dataset(path, tokenizer("{{ 'a' * 1000000000 }}"), skip_bad=True)
    with pytest.raises(UnsafeError, match=r"line 1: .*has 70,000 characters"):
        read_dataset(path, tokenizer("x" * 70_000), skip_bad=True)
    with pytest.raises(DataError, match=r"line 1: .*has no chat template"):
        read_dataset(path, tokenizer(""))
    with pytest.raises(DataError, match=r"line 1: .*the chat template writes the messages before message 2"):
        read_dataset(path, tokenizer("{{ messages | length }}" + CHATML))
    with pytest.raises(ValueError, match="the model has no EOS token"):
        read_dataset(path, tokenizer(eos_token_id=None))


@pytest.mark.parametrize("options", [{"max_length": 1}, {"learn": "some"}, {"columns": {"promptt": "a"}}])
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="read_dataset: "):
        read_dataset(tmp_path / "data.jsonl", tokenizer(), **options)


# ---- batches ----


@pytest.fixture
def many(tmp_path: Path) -> Any:
    rows = [{"text": chr(97 + n % 26) * (1 + n * 7 % 11)} for n in range(50)]
    return read_dataset(write(tmp_path, *rows), tokenizer())


def batches_of(batches: TokenBatches, epoch: int, skip: int = 0) -> list[list[int]]:
    return [[*batch.ids.tolist(), *batch.starts.tolist()] for batch, _ in batches.epoch(epoch, skip)]


@pytest.mark.parametrize("size", [{"batch_tokens": 32}, {"batch_examples": 7}])
def test_every_example_comes_once_in_an_epoch_and_any_batch_can_be_reached(many: Any, size: Any) -> None:
    batches = TokenBatches(many, **size, seed=3)
    everything = sorted(tuple(ids.tolist()) for ids, _ in many)
    orders = []
    for epoch in range(3):
        seen = []
        for batch, targets in batches.epoch(epoch):
            assert targets is batch.targets
            starts = batch.starts.tolist()
            seen += [tuple(batch.ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
        assert sorted(seen) == everything
        orders.append(seen)
        whole = batches_of(batches, epoch)
        assert len(whole) == batches.length
        for skip in range(batches.length + 1):
            assert batches_of(batches, epoch, skip) == whole[skip:]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches_of(TokenBatches(many, **size, seed=3), 1) == batches_of(batches, 1)
    assert batches_of(TokenBatches(many, **size, seed=4), 1) != batches_of(batches, 1)


def test_without_shuffling_the_order_is_that_of_the_file(many: Any) -> None:
    for size in ({"batch_tokens": 32}, {"batch_examples": 7}):
        batches = TokenBatches(many, **size, shuffle=False)
        ids = np.concatenate([batch.ids for batch, _ in batches.epoch(5)])
        assert ids.tolist() == [id_ for example, _ in many for id_ in example.tolist()]


def test_a_batch_has_at_most_its_tokens_unless_one_example_has_more(many: Any) -> None:
    for tokens in (1, 12, 40, 10**6):
        batches = TokenBatches(many, batch_tokens=tokens)
        for batch, _ in batches:
            assert len(batch.ids) <= tokens or len(batch.starts) == 2
    assert TokenBatches(many, batch_tokens=1).length == 50
    assert TokenBatches(many, batch_tokens=10**6).length == 1


def test_the_identity_changes_with_the_data_and_the_batches(tmp_path: Path, many: Any) -> None:
    identity = TokenBatches(many, batch_tokens=32).identity()
    json.dumps(identity)
    other = read_dataset(write(tmp_path, {"text": "a"}), tokenizer())
    others = [
        TokenBatches(other, batch_tokens=32),
        TokenBatches(many, batch_tokens=33),
        TokenBatches(many, batch_examples=32),
        TokenBatches(many, batch_tokens=32, seed=1),
        TokenBatches(many, batch_tokens=32, shuffle=False),
    ]
    assert all(batches.identity() != identity for batches in others)
    assert TokenBatches(many, batch_tokens=32).identity() == identity


@pytest.mark.parametrize(
    "options", [{}, {"batch_tokens": 1, "batch_examples": 1}, {"batch_tokens": 0}, {"batch_examples": 0}]
)
def test_a_batch_size_that_is_wrong_is_refused(many: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="TokenBatches: "):
        TokenBatches(many, **options)


def test_the_bad_rows_of_a_file_are_not_those_of_another(tmp_path: Path) -> None:
    good, one, other = '{"text": "a"}', tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("\n".join([good] + ['{"text": 1}'] * 5))
    other.write_text("\n".join(['{"text": 2}'] * 4))
    with pytest.raises(DataError) as caught:
        read_dataset([one, other], tokenizer(), skip_bad=True)
    assert str(caught.value).startswith(
        f"{other}: no examples: 4 bad rows skipped ({other}, line 1: text is 2"
    )
    assert str(one) not in str(caught.value)
    other.write_text(f'{good}\n{{"text": 2}}\n')
    report = read_dataset([one, other], tokenizer(), skip_bad=True).report
    assert (report.skipped, len(report.problems)) == (6, 3)
