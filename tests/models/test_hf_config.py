"""What a config.json says, and what it does not say: transformers' own reading of it is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest

import small_models
from nplora.models import base_model, hf_config
from nplora.models.config import ModelConfig

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
NOTHING = object()  # in the place of a field: it is not there


def write(directory: Path, family: str, **changes: Any) -> Path:
    """A config.json of 32 heads and 30 layers, of which the families' defaults are possible."""
    fields = small_models.config(
        model_type=family, num_attention_heads=32, hidden_size=256, num_hidden_layers=30
    )
    fields |= {"num_key_value_heads": NOTHING} | changes
    path = directory / "config.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not NOTHING}))
    return path


def read(directory: Path, family: str, **changes: Any) -> ModelConfig:
    return hf_config.read(write(directory, family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [NOTHING, None, 4], ids=["absent", "null", "told"])
def test_both_readers_take_the_heads_that_transformers_takes(
    family: str, kv_heads: object, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if family == "mistral" and kv_heads is None:
        expected = 32  # before version 5; since then an error
        path = write(tmp_path, family, num_key_value_heads=None)
    else:
        path = write(tmp_path, family, num_key_value_heads=kv_heads)
        expected = transformers.AutoConfig.from_pretrained(tmp_path).num_key_value_heads
    base = base_model.read(path)
    assert (base.heads, base.kv_heads) == (32, expected)
    assert hf_config.read(path).num_key_value_heads == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [NOTHING, None, 7], ids=["absent", "null", "told"])
@pytest.mark.parametrize("use", [NOTHING, False, True], ids=["of course", "off", "on"])
def test_the_windows_are_those_of_transformers(
    family: str, window: object, use: object, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, family, sliding_window=window, use_sliding_window=use)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    told = getattr(theirs, "sliding_window", None) if family != "llama" else None
    kinds = theirs.layer_types if family.startswith("qwen") else ["sliding_attention"] * 30
    expected = tuple((told or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    assert hf_config.read(path).sliding_windows == expected


def test_what_mistral_does_not_say_is_what_mistral_7b_has(tmp_path: Path) -> None:
    config = read(tmp_path, "mistral")
    assert (config.num_key_value_heads, set(config.sliding_windows)) == (8, {4096})
    assert set(read(tmp_path, "mistral", sliding_window=None).sliding_windows) == {0}


def test_a_qwen_with_windows_has_them_of_4096_tokens_from_layer_28(tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3"):
        windows = read(tmp_path, family, use_sliding_window=True).sliding_windows
        assert windows == (0,) * 28 + (4096,) * 2
