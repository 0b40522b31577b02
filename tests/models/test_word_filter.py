"""A model's head with a WordFilter: the same losses, and gradients within the documented error."""

import pickle
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
    rows, probability, kept = lm.model.word_filter.take_skipped()
    assert rows == batch().num_targets
    assert 0.3 < probability / rows < 1
    assert 1 / small_models.VOCAB <= kept / rows < 0.3
    assert lm.model.word_filter.take_skipped() == (0, 0, 0)
    assert 1e-4 < np.linalg.norm(filtered - plain) / np.linalg.norm(plain) < 0.2


def test_rows_without_unlikely_words_have_the_bits_of_no_filter(lm: LanguageModel) -> None:
    loss, plain = gradients(lm)
    lm.model.word_filter = WordFilter(1e-30)
    filtered_loss, filtered = gradients(lm)
    assert (filtered_loss, filtered.tobytes()) == (loss, plain.tobytes())
    rows = batch().num_targets
    assert lm.model.word_filter.take_skipped() == (rows, 0, rows)  # all words are kept


def test_the_error_of_the_heads_gradient_is_within_the_documented_bound(lm: LanguageModel) -> None:
    word_filter, head = WordFilter(0.03), lm.lm_head
    assert isinstance(head, nplora.Linear)
    w = head.weight.to_numpy().astype(np.float64)  # type: ignore[union-attr]
    x = np.random.default_rng(0).standard_normal((50, small_models.WIDTH), np.float32)
    p = np.exp(head(x).astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    exact = 0.5 * (p - np.eye(len(w))[:50]) @ w
    widest = np.linalg.norm(w - w.mean(axis=0), axis=1).max()
    for i in range(50):
        row = x[i : i + 1]
        dx = word_filter.gradient(head, row, head(row), np.array([i], np.int64), 0.5, np.empty(1))
        error = np.linalg.norm(dx - exact[i])
        bound = 0.5 * word_filter.take_skipped().probability * widest
        assert error <= bound + 1e-5
        assert error > 1e-3 * bound  # the bound is not idle


# ---- heads that are trained ----


def load(directory: Path, ties: bool) -> LanguageModel:
    tensors = small_models.tensors()
    if ties:
        del tensors["output.weight"]
    return nplora.load_model(small_models.write(directory / "small.gguf", weights=tensors))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("run", [None, log_likelihood])
def test_a_whole_trained_head_is_filtered(tmp_path: Path, ties: bool, run: Any) -> None:
    lm = load(tmp_path, ties)
    lm.add_lora(rank=2, modules_to_save="embed_tokens" if ties else "lm_head")
    assert isinstance(lm.lm_head, nplora.nn.TrainedHead)
    assert lm.lm_head.is_whole
    loss, plain = gradients(lm, run)
    lm.model.word_filter = WordFilter(0.03)
    filtered_loss, filtered = gradients(lm, run)
    assert filtered_loss == loss
    rows, probability, kept = lm.model.word_filter.take_skipped()
    assert rows == batch().num_targets
    assert 0.3 < probability / rows < 1
    assert kept / rows < 0.3
    assert 1e-4 < np.linalg.norm(filtered - plain) / np.linalg.norm(plain) < 0.2


def trained(tmp_path: Path) -> tuple[LanguageModel, Any]:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2, modules_to_save="lm_head")
    head = lm.lm_head
    head.rows.value += np.random.default_rng(1).normal(0, 0.01, head.rows.value.shape)  # type: ignore[union-attr]
    return lm, head


def test_a_trained_head_without_unlikely_words_has_its_exact_gradient(tmp_path: Path) -> None:
    lm, _ = trained(tmp_path)
    loss, plain = gradients(lm)
    lm.model.word_filter = WordFilter(1e-30)  # every row is computed without the filter
    filtered_loss, filtered = gradients(lm)
    assert filtered_loss == loss
    np.testing.assert_allclose(filtered, plain, rtol=1e-4, atol=1e-6)


def test_the_error_of_a_trained_weights_gradient_is_within_the_documented_bound(tmp_path: Path) -> None:
    _, head = trained(tmp_path)
    word_filter, rng = WordFilter(0.03), np.random.default_rng(0)
    x, weights = rng.standard_normal((50, small_models.WIDTH), np.float32), rng.random(50, np.float32)
    targets = rng.integers(0, small_models.VOCAB, 50)
    w = head.rows.value.astype(np.float64)
    p = np.exp(x @ w.T)
    p /= p.sum(axis=1, keepdims=True)
    dlogits = 0.5 * weights[:, None] * (p - np.eye(len(w))[targets])
    skipped = np.where((p < 0.03) & (np.arange(len(w)) != targets[:, None]), p, 0).sum(axis=1)
    flat = (p >= 0.03).sum(axis=1) > len(w) // 4
    dx = word_filter.gradient(head, x, head(x), targets, 0.5, np.empty(50), weights)
    size = 0.5 * weights * np.sqrt(0.03 * np.where(flat, 0, skipped)) * np.linalg.norm(x, axis=1)
    error = np.linalg.norm(head.rows.grad - dlogits.T @ x)
    assert 0.05 * size.sum() < error <= size.sum() + 1e-5
    mean = head.weight.to_numpy().mean(axis=0)  # of the weight before training
    widest = np.linalg.norm(w - mean, axis=1).max()
    within = 0.5 * weights * np.where(flat, 0, skipped) * widest + 1e-5
    assert (np.linalg.norm(dx - dlogits @ w, axis=1) <= within).all()


ADAPTED: dict[str, dict[str, Any]] = {
    "an adapter": {"targets": ["lm_head"]},
    "trained rows": {"trainable_tokens": [3, 4]},
}


@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_other_trained_heads_are_computed_without_the_filter(tmp_path: Path, options: dict[str, Any]) -> None:
    lm = load(tmp_path, ties="trainable_tokens" in options)
    lm.add_lora(rank=2, **options)
    _, plain = gradients(lm)
    lm.model.word_filter = WordFilter(0.03)
    assert gradients(lm)[1].tobytes() == plain.tobytes()
    assert lm.model.word_filter.take_skipped().rows == 0


def test_many_steps_need_no_more_memory(lm: LanguageModel) -> None:
    lm.model.word_filter = WordFilter(0.03)
    optimizer, sizes = nplora.AdamW(lr=1e-4), []
    for _ in range(3):
        lm.train_step([[1, 2, 3]], [[1, 2, 3]], optimizer=optimizer)
        sizes.append(len(pickle.dumps(lm.model.word_filter._skipped)))
    assert sizes[0] == sizes[2]
    assert lm.model.word_filter.take_skipped().rows == 6


def test_a_bound_out_of_range_is_refused() -> None:
    for bound in (0, -1, 1, float("nan")):
        with pytest.raises(ValueError, match="WordFilter: bound is"):
            WordFilter(bound)
