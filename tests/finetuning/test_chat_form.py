"""An adapter remembers whether it was trained with the chat template, and other uses are warned of."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from commands import command
from nplora.adapters import read_adapter, save_adapter
from nplora.finetuning import evaluate, finetune, load_with_adapter
from nplora.formats import safetensors
from small_llama import save_small_llama

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
         r"chats was trained with the chat template, but this prompt does not go through it; add --chat"),
        ("pairs", PAIRS, True,
         "pairs was trained without the chat template, but this prompt goes through it"),
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
    assert printed == (f"nplora: warning: generate: {adapter.parent}/{message}\n" if message else "")


def test_evaluate_warns_of_another_form(model: Path, tmp_path: Path) -> None:
    chats = trained(model, tmp_path / "chats", CHATS)
    with pytest.warns(
        UserWarning, match=r"chats was trained with .*, but this text does not go through it; "
    ):
        evaluate(model, PAIRS, adapter=chats)
    pairs = read_adapter(trained(model, tmp_path / "pairs", PAIRS))
    with pytest.warns(UserWarning, match="was trained without the chat template, but this text goes"):
        evaluate(model, CHATS, adapter=(pairs, 0.5))
    save_adapter(load_with_adapter(model, chats), tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, PAIRS, adapter=chats, chat=True)
        evaluate(model, CHATS, adapter=chats)
        evaluate(model, PAIRS, adapter=tmp_path / "other")  # an adapter that does not say
