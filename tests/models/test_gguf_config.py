"""The model that a GGUF file's metadata describe, as llama.cpp reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_models
from nplora.formats import gguf
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.models import base_model, gguf_config
from nplora.models.config import ModelConfig

PAIRS = small_models.DIM // 2
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ORIGINAL = {"rope__scaling__original_context_length": 32}


def read(directory: Path, architecture: str, factors: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    """The model of a file with these entries changed. Entry names are given without the architecture."""
    entries = {
        key.replace("llama", architecture): value for key, value in small_models.metadata().items()
    } | {"general.architecture": architecture}
    entries |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
    weights = small_models.tensors() | dict.fromkeys(factors, np.full(PAIRS, 2, np.float32))
    return gguf_config.read(gguf.open(small_models.write(directory / "m.gguf", entries, weights)))


def test_a_scaling_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """This is llama.cpp's default of rope.scaling.type. Its older name of the factor is read too."""
    assert read(tmp_path, "llama", rope__scaling__factor=4.0).rope.linear_factor == 4
    assert read(tmp_path, "llama", rope__scale_linear=8.0).rope.linear_factor == 8
    unscaled = {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}
    assert read(tmp_path, "llama", **unscaled).rope.linear_factor == 1
    assert read(tmp_path, "llama").rope.linear_factor == 1


def test_a_granite_without_rotation_rotates_nowhere(tmp_path: Path) -> None:
    """Only in Granite, rope.scaling.finetuned says whether the heads rotate."""
    assert read(tmp_path, "granite").unrotated == frozenset()
    assert read(tmp_path, "granite", rope__scaling__finetuned=True).unrotated == frozenset()
    layers = frozenset(range(small_models.LAYERS))
    assert read(tmp_path, "granite", rope__scaling__finetuned=False).unrotated == layers
    assert read(tmp_path, "llama", rope__scaling__finetuned=False).unrotated == frozenset()


def test_heads_may_be_listed_for_each_layer(tmp_path: Path) -> None:
    """Files of Granite 4's dense models have such lists. `base_model` reads them too."""
    same, other = np.int32([2, 2, 2]), np.int32([2, 0, 2])
    assert read(tmp_path, "granite", attention__head_count_kv=same).num_key_value_heads == 2
    assert base_model.read(tmp_path / "m.gguf").kv_heads == 2
    with pytest.raises(UnsupportedError, match="head_count_kv differs between layers"):
        read(tmp_path, "granite", attention__head_count_kv=other)
    with pytest.raises(UnsupportedError, match="head_count_kv differs between layers"):
        base_model.read(tmp_path / "m.gguf")
    for wrong in (np.int32([]), np.float32([2, 2, 2])):
        with pytest.raises(FormatError, match="expected an integer"):
            read(tmp_path, "granite", attention__head_count_kv=wrong)


def test_a_phi_may_name_longrope(tmp_path: Path) -> None:
    long = read(tmp_path, "phi3", (LONG, SHORT), rope__scaling__type="longrope", **ORIGINAL).rope.long
    assert long is not None
    assert long.original_length == 32


@pytest.mark.parametrize(
    ("architecture", "factors", "changes", "error", "words"),
    [
        ("olmo2", (), {"attention__sliding_window": 4096}, UnsupportedError, "OLMo 3"),
        ("gemma3", (), {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping is 30"),
        ("gemma3", (), {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapping is 50"),
        ("llama", (), {"rope__scaling__attn_factor": 1.5}, UnsupportedError, "attn_factor is 1.5"),
        ("phi3", (), {"rope__scaling__attn_factor": 1.5}, UnsupportedError, "attn_factor is 1.5"),
        (
            "phi3",
            (LONG, SHORT),
            {"rope__scaling__original_context_length": 1},
            FormatError,
            "phi3.rope.scaling.original_context_length is 1, expected 2 to 1,073,741,824",
        ),
        ("phi3", (LONG,), {}, FormatError, f"tensor {SHORT} is missing"),
        ("phi3", (SHORT,), {}, FormatError, f"tensor {LONG} is missing"),
        ("phi3", (), {"rope__scaling__type": "longrope"}, FormatError, f"tensor {LONG} is missing"),
        ("phi3", (LONG, SHORT), {"rope__scaling__type": "yarn", **ORIGINAL}, UnsupportedError, "'yarn'"),
        ("llama", (), {"rope__scaling__type": "longrope"}, UnsupportedError, "expected 'none' or 'linear'"),
    ],
)
def test_unsupported_settings_are_refused(
    architecture: str,
    factors: tuple[str, ...],
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=r"m\.gguf") as caught:
        read(tmp_path, architecture, factors, **changes)
    assert words in str(caught.value)
    assert isinstance(caught.value, FormatError)
