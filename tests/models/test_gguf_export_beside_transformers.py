"""Models of every family, converted to GGUF: transformers' logits, from nplora and from its own reader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch_models = pytest.importorskip("torch_models")

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]

# The families that transformers reads from GGUF. Each has the options that its reader understands: it ignores
# sliding windows, biases and scaled rotations, and takes Qwen3's width of a head and Phi-3's padding token
# from models of the usual size.
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {"sliding_window": None, "vocab_size": 32_064},
}


def converted(directory: Path, family: str, **options: Any) -> tuple[Any, Path]:
    """A random model of transformers, and the same model as a GGUF file alone in its directory."""
    theirs = torch_models.make(family, **options)
    path = torch_models.save(theirs, directory / "hf", "safetensors", family)
    (directory / "gguf").mkdir()
    nplora.model_to_gguf(path, directory / "gguf" / "model.gguf")
    return theirs, directory / "gguf" / "model.gguf"


def logits_of(theirs: Any, ids: Array) -> Array:
    with torch.no_grad():
        return np.asarray(theirs(torch.from_numpy(ids)).logits.numpy())


def assert_near(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.fixture
def ids(rng: np.random.Generator) -> Array:
    return rng.integers(0, torch_models.SIZES["vocab_size"], (2, 40))


@pytest.mark.parametrize("family", torch_models.FAMILIES)
def test_a_converted_model_gives_the_logits_of_transformers(family: str, ids: Array, tmp_path: Path) -> None:
    theirs, path = converted(tmp_path, family)
    assert_near(nplora.load_model(path).logits(ids), logits_of(theirs, ids))


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file_to_the_same_model(family: str, ids: Array, tmp_path: Path) -> None:
    theirs, path = converted(tmp_path, family, **READ_BY_TRANSFORMERS[family])
    read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    for name in ("num_key_value_heads", "max_position_embeddings"):
        assert getattr(read.config, name) == getattr(theirs.config, name)
    assert_near(logits_of(read, ids), logits_of(theirs, ids))
