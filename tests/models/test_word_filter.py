"""A model's head with a WordFilter: the same losses, and gradients within the documented error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nplora.lm import LanguageModel
from nplora.models import WordFilter
from nplora.models.packing import PackedBatch, pack

Array = np.ndarray[Any, Any]


@pytest.fixture
def lm(tmp_path: Path) -> LanguageModel:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2)
    return lm


def batch() -> PackedBatch:
    rng = np.random.default_rng(3)
    members = [rng.integers(0, small_models.VOCAB, length) for length in (9, 2, 33)]
    return pack((ids, np.where(np.arange(len(ids)) % 5 == 1, -100, ids)) for ids in members)


def gradients(lm: LanguageModel, run: Any = None) -> tuple[float, Array]:
    lm.zero_grad()
    loss = lm.forward_backward(batch(), 0.1) if run is None else run(lm)
    return loss, np.concatenate([p.grad.ravel() for p in lm.parameters()])


def log_likelihood(lm: LanguageModel) -> float:
    return lm.forward_backward_of(
        batch(), lambda log_probs: (-float(log_probs.sum()), -0.1 * np.ones_like(log_probs))
    )


@pytest.mark.parametrize("run", [None, log_likelihood])
def test_a_filter_leaves_the_loss_and_changes_gradients_a_little(lm: LanguageModel, run: Any) -> None:
    loss, plain = gradients(lm, run)
    lm.model.word_filter = WordFilter(0.03)  # an even distribution gives each word 1 / 60
    filtered_loss, filtered = gradients(lm, run)
    assert filtered_loss == loss
    skipped = lm.model.word_filter.take_skipped()
    assert skipped.shape == (batch().num_targets,)
    assert 0.3 < skipped.mean() < 1
    assert not len(lm.model.word_filter.take_skipped())
    assert 1e-4 < np.linalg.norm(filtered - plain) / np.linalg.norm(plain) < 0.2


def test_rows_without_unlikely_words_have_the_bits_of_no_filter(lm: LanguageModel) -> None:
    loss, plain = gradients(lm)
    lm.model.word_filter = WordFilter(1e-30)
    filtered_loss, filtered = gradients(lm)
    assert (filtered_loss, filtered.tobytes()) == (loss, plain.tobytes())
    assert not lm.model.word_filter.take_skipped().any()


def test_the_error_of_the_heads_gradient_is_within_the_documented_bound(lm: LanguageModel) -> None:
    word_filter, head = WordFilter(0.03), lm.lm_head
    assert isinstance(head, nplora.Linear)
    w = head.weight.to_numpy().astype(np.float64)  # type: ignore[union-attr]
    x = np.random.default_rng(0).standard_normal((50, small_models.WIDTH), np.float32)
    targets, losses = np.arange(50, dtype=np.int64), np.empty(50)
    dx = word_filter.gradient(head, head(x), targets, 0.5, losses)
    p = np.exp(head(x).astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    exact = 0.5 * (p - np.eye(len(w))[:50]) @ w
    widest = np.linalg.norm(w - w.mean(axis=0), axis=1).max()
    error = np.linalg.norm(dx - exact, axis=1)
    bound = 0.5 * word_filter.take_skipped() * widest
    assert (error <= bound + 1e-5).all()
    assert (error > 1e-3 * bound).all()  # the bound is not idle


def test_a_trained_head_is_computed_without_the_filter(tmp_path: Path) -> None:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2, targets=["lm_head"])
    _, plain = gradients(lm)
    lm.model.word_filter = WordFilter(0.03)
    assert gradients(lm)[1].tobytes() == plain.tobytes()
    assert not len(lm.model.word_filter.take_skipped())


def test_a_bound_out_of_range_is_refused() -> None:
    for bound in (0, -1, 1, float("nan")):
        with pytest.raises(ValueError, match="WordFilter: bound is"):
            WordFilter(bound)
