"""An adapter stores whether it was trained with the chat template, and other uses give a warning."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

import nplora
from commands import command
from nplora.adapters import read_adapter, save_adapter
from nplora.finetuning import evaluate, finetune, load_with_adapter
from nplora.formats import safetensors
from small_llama import save_small_llama

oracle = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

PAIRS = [{"prompt": f"{n}+1=", "completion": "2"} for n in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}+1="}, {"role": "assistant", "content": "2"}]}
    for n in range(4)
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf")


def trained(model: Path, output: Path, rows: list[Any], **options: Any) -> Path:
    finetune(model, rows, output, steps=1, rank=1, **options)
    return output


def key(adapter: Path) -> str | None:
    content = safetensors.open(adapter / "adapter_model.safetensors")
    return content.metadata.get("chat_template")


@pytest.mark.slow
def test_an_adapter_remembers_whether_its_data_went_through_the_template(model: Path, tmp_path: Path) -> None:
    for name, rows, options, expected in (
        ("pairs", PAIRS, {}, "false"),
        ("pairs as chats", PAIRS, {"chat": True}, "true"),
        ("chats", CHATS, {}, "true"),
    ):
        assert key(trained(model, tmp_path / name, rows, **options)) == expected
        assert read_adapter(tmp_path / name).chat_template is (expected == "true")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, rows in zip(files, (PAIRS, CHATS), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert key(trained(model, tmp_path / "both", files)) is None
    save_adapter(load_with_adapter(model, tmp_path / "chats"), tmp_path / "again")
    assert key(tmp_path / "again") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "chat", "message"),
    [
        ("chats", CHATS, False,
         r"chats was trained with the chat template, but this prompt is not formatted with it; add --chat"),
        ("pairs", PAIRS, True,
         "pairs was trained without the chat template, but this prompt is formatted with it"),
        ("chats", CHATS, True, None),
        ("pairs", PAIRS, False, None),
    ],
)  # fmt: skip
def test_generate_warns_of_another_form(
    model: Path, tmp_path: Path, name: str, rows: Any, chat: bool, message: str | None
) -> None:
    adapter = trained(model, tmp_path / name, rows)
    line = ["generate", model, "1+1=", "--adapter", adapter, "--max-new-tokens", 2]
    printed = command(*line, *(["--chat"] if chat else [])).stderr
    assert printed == (f"nplora: warning: generate: {adapter.parent}{os.sep}{message}\n" if message else "")


@pytest.mark.slow
def test_evaluate_warns_of_another_form(model: Path, tmp_path: Path) -> None:
    chats = trained(model, tmp_path / "chats", CHATS)
    with pytest.warns(
        UserWarning, match=r"chats was trained with .*, but this text is not formatted with it; "
    ):
        evaluate(model, PAIRS, adapter=chats)
    pairs = read_adapter(trained(model, tmp_path / "pairs", PAIRS))
    with pytest.warns(UserWarning, match="was trained without the chat template, but this text is formatted"):
        evaluate(model, CHATS, adapter=(pairs, 0.5))
    save_adapter(load_with_adapter(model, chats), tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, PAIRS, adapter=chats, chat=True)
        evaluate(model, CHATS, adapter=chats)
        evaluate(model, PAIRS, adapter=tmp_path / "other")  # an adapter that does not say


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "with_template"), [(CHATS, True), (PAIRS, False)])
def test_a_converted_adapter_remembers_the_form_too(
    model: Path, tmp_path: Path, rows: list[Any], with_template: bool
) -> None:
    adapter = trained(model, tmp_path / "a", rows)
    nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", model)
    fields = oracle.GGUFReader(tmp_path / "a.gguf").fields  # PyPI's gguf
    assert bool(fields["nplora.chat_template"].contents()) is with_template
    nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "back", model)
    assert key(tmp_path / "back") == str(with_template).lower()
    others = PAIRS if with_template else CHATS
    with pytest.warns(UserWarning, match=r"a\.gguf was trained with(out)? the chat template, but this text"):
        evaluate(model, others, adapter=tmp_path / "a.gguf")
    save_adapter(load_with_adapter(model, adapter), tmp_path / "other")
    nplora.adapter_to_gguf(tmp_path / "other", tmp_path / "other.gguf", model)
    assert "nplora.chat_template" not in oracle.GGUFReader(tmp_path / "other.gguf").fields


@pytest.mark.slow
def test_a_combined_adapter_remembers_the_form_that_all_parts_have(model: Path, tmp_path: Path) -> None:
    chats, pairs = (trained(model, tmp_path / str(len(rows[0])), rows) for rows in (CHATS, PAIRS))
    save_adapter(load_with_adapter(model, chats), tmp_path / "other")
    for parts, expected in (
        ((chats, chats), "true"),
        ((pairs,), "false"),
        ((chats, pairs), None),
        ((chats, tmp_path / "other"), None),
    ):
        nplora.combine([(part, 0.5) for part in parts]).save(tmp_path / "sum", overwrite=True)
        assert key(tmp_path / "sum") == expected
