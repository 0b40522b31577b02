"""Small files that ask for much memory or long work: each is refused, or read within 2 s and 300 MB."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nplora.formats import gguf, safetensors
from nplora.formats.gguf import Typed
from nplora.tokenizer import from_directory, from_gguf
from vocabularies import BYTES, byte_level, opened

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")

MOST_SECONDS, MOST_BYTES = 2.0, 300 << 20
TRIES = 3  # other processes on the same core make some tries slow
LONG = 16_000_000  # characters of a row, near the limit of a line

# How each kind of file is read. Imports and process starts are not counted.
READ = {
    "safetensors": """
from nplora.formats.safetensors import open as read
""",
    "adapter": """
from nplora.formats import peft_adapter

def read(path):
    with peft_adapter.reading(path) as content:
        for name, halves in content.factors([], {}).items():
            content.require_rank(name, halves)
""",
    "directory": """
import tokenizers
from nplora.tokenizer import from_directory as read
""",
    "gguf": """
import tokenizers
from nplora.formats import gguf
from nplora.tokenizer import from_gguf

def read(path):
    return from_gguf(gguf.open(path))
""",
    "rows": """
from nplora.finetuning.data import read_dataset
from nplora.tokenizer import from_gguf
from vocabularies import byte_level, opened

template = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '\\n' }}{% endfor %}"
words = from_gguf(opened(byte_level() | {"tokenizer.chat_template": template}))
words.encode_chat([{"role": "user", "content": "a"}])

def read(path):
    return str(read_dataset(path, words, max_length=2048).report)
""",
}
MEASURE = """
import json, sys, time, warnings
from nplora.platform.memory import peak_memory

warnings.simplefilter("ignore")

def used():  # getrusage would count the memory of the process that this one was forked from
    return time.process_time(), peak_memory()

seconds, size = used()
try:
    found = ["", str(read(sys.argv[1]))]
except Exception as error:
    found = [type(error).__name__, str(error)]
print(json.dumps([*found, used()[0] - seconds, used()[1] - size]))
"""


def measured(kind: str, path: Path) -> tuple[str, str]:
    """The name and text of the error, or "" and the content, after checking time and memory."""
    command = [sys.executable, "-c", READ[kind] + MEASURE, str(path)]
    for _ in range(TRIES):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
        )
        error, words, seconds, size = json.loads(done.stdout)
        if seconds < MOST_SECONDS:
            break
    assert seconds < MOST_SECONDS
    assert size < MOST_BYTES
    return error, words


def container(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


# The start of a header, a repeated part, how often it repeats, the end, and a part of the error's text.
HEADERS = {
    "metadata": ('{"__metadata__":{', '"a":"",', 3_000_000, '"b":""}}', "3,000,001 values at depth 2"),
    "lists": ('{"a":{"shape":[', "[],", 8_000_000, "1]}}", "8,000,001 values at depth 3"),
    "numbers": ('{"a":{"shape":[', "1,", 9_000_000, "1]}}", "9,000,001 values at depth 3"),
    "fields": ('{"a":{', '"a":0,', 3_000_000, '"b":0}}', "3,000,001 values at depth 2"),
    "deeper lists": ('{"a":{"shape":[[[', "[],", 9_000_000, "1]]]}}", "values at depth 4"),
    "names": ("{", '"a":0,', 3_000_000, '"b":0}', "3,000,001 values at depth 1"),
    "commas in a name": ('{"', ",[", 20_000_000, '":0}', "expected dtype, shape and data_offsets"),
    "one wide character": (
        '{"',
        "a",
        80_000_000,
        '😀":0}',
        "bytes, but a header with non-ASCII characters may have at most",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_very_many_values_is_refused_before_any_is_created(name: str, tmp_path: Path) -> None:
    begin, unit, count, end, expected = HEADERS[name]
    header = begin.encode() + unit.encode() * count + end.encode()
    error, words = measured("safetensors", container(tmp_path / "a.safetensors", header))
    assert error in ("LimitError", "FormatError")
    assert expected in words


def test_metadata_of_very_many_entries_are_refused(tmp_path: Path) -> None:
    entries = ",".join(f'"{number}":""' for number in range(400_000))
    header = b'{"__metadata__":{' + entries.encode() + b"}}"
    error, words = measured("safetensors", container(tmp_path / "a.safetensors", header))
    assert error == "LimitError"
    assert "__metadata__ has 400,000 entries, expected at most 16,384" in words


def test_a_header_of_100_000_tensors_is_read() -> None:
    entries = ",".join(
        f'"model.layers.{n}.weight":{{"dtype":"F32","shape":[1,1],"data_offsets":[{n * 4},{n * 4 + 4}]}}'
        for n in range(100_000)
    )
    header = ("{" + entries + "}").encode()
    data = len(header).to_bytes(8, "little") + header + bytes(400_000)
    assert len(safetensors.loads(data)) == 100_000


# ---- adapters ----


@pytest.mark.parametrize(
    ("layers", "length", "patterns"), [(20_000, 10, 100), (300, 10_000, 1000), (10, 10, 20_000)]
)
def test_layers_times_patterns_are_bounded(tmp_path: Path, layers: int, length: int, patterns: int) -> None:
    header = ",".join(
        f'"base_model.model.{"l" * length}{n}.lora_{side}.weight":'
        f'{{"dtype":"U8","shape":[1,1],"data_offsets":[{2 * n + place},{2 * n + place + 1}]}}'
        for n in range(layers)
        for place, side in enumerate("AB")
    )
    path = container(tmp_path / "adapter_model.safetensors", b"{" + header.encode() + b"}")
    with path.open("ab") as file:
        file.write(bytes(2 * layers))
    config = {"peft_type": "LORA", "r": 1, "rank_pattern": {f"l.*.*{n}x": 2 for n in range(patterns)}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    error, words = measured("adapter", tmp_path)
    assert error == "LimitError"
    assert "characters of patterns" in words


# ---- vocabularies ----


def vocabulary(special: int, others: int = 0, kind: int = 3) -> dict[str, Any]:
    """The metadata of a byte-level model with many special tokens."""
    plain = byte_level()["tokenizer.ggml.tokens"]
    kinds = [3] + [1] * (len(plain) - 2) + [4] + [1] * others + [kind] * special
    tokens = [*plain, *(f"q{n}" for n in range(others)), *(f"<|{n}|>" for n in range(special))]
    return byte_level(tokens=tokens, token_type=Typed(kinds, "INT32"))


def tokenizer_json(directory: Path, special: int, others: int = 0) -> Path:
    vocab = {
        letter: number for number, letter in enumerate([*BYTES.values(), *(f"q{n}" for n in range(others))])
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocab) + n, "content": f"<|{n}|>", **flags} for n in range(special)]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("kind", [3, 4])
def test_very_many_special_tokens_of_a_gguf_file_are_refused(tmp_path: Path, kind: int) -> None:
    metadata = {
        key: Typed(value, "UINT32") if type(value) is int else value
        for key, value in vocabulary(300_000, kind=kind).items()
    }
    (tmp_path / "a.gguf").write_bytes(gguf.dumps({}, metadata))
    error, words = measured("gguf", tmp_path / "a.gguf")
    assert error == "LimitError"
    assert "300,002 special tokens, expected at most 131,072" in words


def test_very_many_special_tokens_of_a_directory_are_refused(tmp_path: Path) -> None:
    error, words = measured("directory", tokenizer_json(tmp_path, 300_000))
    assert error == "LimitError"
    assert "values at depth 2, expected at most 132,072" in words


def test_the_largest_vocabularies_in_use_are_read(tmp_path: Path) -> None:
    others = 262_144 - 7000 - len(BYTES)
    assert from_directory(tokenizer_json(tmp_path, 7000, others)).vocab_size == 262_144
    assert from_gguf(opened(vocabulary(7000, others))).vocab_size >= 262_144


# ---- rows ----


def chat(user: Any, assistant: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


WORDS = ("word ", LONG // 5)  # a text and how often it repeats; made when its test runs
ROWS: dict[str, tuple[Any, str, str]] = {
    "words": ({"text": WORDS}, "", "1 cut to the maximum length"),
    "one word": ({"text": ("a", LONG)}, "", "1 cut"),
    "emoji": ({"text": ("😀", LONG // 4)}, "", "1 cut"),
    "a completion": ({"prompt": "a", "completion": WORDS}, "", "1 cut"),
    "a prompt": ({"prompt": WORDS, "completion": "a"}, "DataError", "1 with nothing to train on"),
    "an answer": (chat("a", WORDS), "", "1 cut"),
    "a question": (chat(WORDS, "a"), "DataError", "1 with nothing to train on"),
    "lists": ({"text": "a", "x": ([[]], LONG // 4)}, "LimitError", "values, expected at most"),
}


def made(value: Any) -> Any:
    """The row with its long texts."""
    if isinstance(value, tuple):
        return value[0] * value[1]
    if isinstance(value, dict):
        return {key: made(part) for key, part in value.items()}
    return [made(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ROWS)
def test_only_the_needed_part_of_a_very_long_row_is_read(name: str, tmp_path: Path) -> None:
    row, expected, words = ROWS[name]
    text = json.dumps(made(row), ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    error, found = measured("rows", tmp_path / "a.jsonl")
    assert error == expected
    assert words in found
