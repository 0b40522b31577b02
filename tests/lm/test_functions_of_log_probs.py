"""Log-probabilities of targets, and gradients of functions of them, against the whole matrix of logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.lm import LanguageModel
from nplora.models import head
from nplora.models.packing import IGNORED, PackedBatch, pack
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


def batch_of(lm: LanguageModel, rng: np.random.Generator) -> PackedBatch:
    """Sequences of several lengths. Some of their tokens have no target, one sequence has none at all."""
    made = []
    for number, length in enumerate((9, 1, 14, 30, 6)):
        ids = rng.integers(lm.config.vocab_size, size=length)
        is_trained = (rng.random(length) < 0.6) & (number != 4)
        made.append((ids, np.where(is_trained, ids, IGNORED)))
    return pack(made)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def rows_of(batch: PackedBatch) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip(batch.starts[:-1], batch.starts[1:], strict=True)]


def test_log_probs_are_those_of_the_logits(path: Path, rng: np.random.Generator) -> None:
    lm = nplora.load_model(path)
    batch = batch_of(lm, rng)
    logs = np.concatenate([log_softmax(lm.logits(batch.ids[rows])) for rows in rows_of(batch)])
    places = np.flatnonzero(batch.targets != IGNORED)
    np.testing.assert_allclose(lm.log_probs(batch), logs[places, batch.targets[places]], rtol=1e-5)
    nothing = pack([([1, 2, 3], [IGNORED] * 3)])
    assert lm.log_probs(nothing).shape == (0,)


def squares(log_probs: Array, weights: Array) -> tuple[float, Array]:
    """A function that depends on the values, so that a wrong order or weight shows."""
    return float((weights * log_probs**2).sum()), 2 * weights * log_probs


def expected_gradients(lm: LanguageModel, batch: PackedBatch, weights: Array) -> tuple[float, list[Array]]:
    """The gradients by way of all logits, sequence by sequence, with the softmax in float64."""
    lm.zero_grad()
    total, done = 0.0, 0
    for rows in rows_of(batch):
        logits, saved = lm.forward(batch.ids[rows])
        assert saved is not None
        targets = batch.targets[rows]
        places = np.flatnonzero(targets != IGNORED)
        logs = log_softmax(logits)
        value, slopes = squares(logs[places, targets[places]], weights[done : done + len(places)])
        done += len(places)
        dlogits = np.zeros_like(logs)
        dlogits[places] = -np.exp(logs[places]) * slopes[:, None]
        dlogits[places, targets[places]] += slopes
        lm.backward(dlogits.astype(np.float32), saved)
        total += value
    return total, [parameter.grad.copy() for parameter in lm.parameters()]


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,lm_head", "lm_head"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_a_function_is_that_of_all_logits(
    path: Path, targets: str, recompute: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = nplora.load_model(path)
    lm.add_lora(rank=2, targets=targets)
    lm.model.recompute = recompute
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.1 * rng.standard_normal(layer.A.shape)
    batch = batch_of(lm, rng)
    weights = rng.standard_normal(batch.num_targets)
    value, expected = expected_gradients(lm, batch, weights)
    for rows in (256, 4):  # one chunk, and several
        monkeypatch.setattr(head, "_MOST_ROWS", rows)
        monkeypatch.setattr(head, "_LEAST_ROWS", min(rows, 4))
        lm.zero_grad()
        found = lm.forward_backward_of(batch, lambda logs: squares(logs, weights))
        assert found == pytest.approx(value, rel=1e-5)
        for parameter, gradient in zip(lm.parameters(), expected, strict=True):
            error = np.linalg.norm(parameter.grad - gradient)
            assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-6, parameter.name


@pytest.mark.parametrize("without", ["", "output.weight"])
@pytest.mark.parametrize(
    "options", [{"trainable_tokens": [0, 5, 7]}, {"modules_to_save": "embed_tokens,lm_head"}]
)
def test_trained_rows_of_the_head_get_the_gradient_of_all_logits(
    without: str, options: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    """A head that shares the embedding's weight has no parameters of its own, and yet gets a gradient."""
    lm = nplora.load_model(save_small_llama(tmp_path / "model.gguf", without=without))
    lm.add_lora(rank=2, layers="last:1", **options)
    for parameter in lm.parameters():
        parameter.value[...] += 0.1 * rng.standard_normal(parameter.value.shape)
    batch = batch_of(lm, rng)
    weights = rng.standard_normal(batch.num_targets)
    places = np.flatnonzero(batch.targets != IGNORED)
    value, expected = expected_gradients(lm, batch, weights)

    def of_logits(logits: Array, rows: Array, factor: float, gradient: bool) -> Array:
        own, numbers = batch.targets[rows], np.searchsorted(places, rows)
        logs, each = log_softmax(logits), np.arange(len(rows))
        slopes = 2 * weights[numbers] * logs[each, own]
        if gradient:
            logits[...] = -np.exp(logs) * slopes[:, None]
            logits[each, own] += slopes
            logits *= factor
        return np.asarray(weights[numbers] * logs[each, own] ** 2)

    for compute in (
        lambda: lm.forward_backward_of(batch, lambda logs: squares(logs, weights)),
        lambda: lm.forward_backward_with(batch, of_logits, 1.0),
    ):
        lm.zero_grad()
        assert compute() == pytest.approx(value, rel=1e-5)
        for parameter, gradient in zip(lm.parameters(), expected, strict=True):
            error = np.linalg.norm(parameter.grad - gradient)
            assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-6, parameter.name
    assert lm.loss_with(batch, of_logits) == pytest.approx(value, rel=1e-5)


def test_dropout_in_the_head_draws_one_mask_for_the_value_and_the_gradient(
    path: Path, rng: np.random.Generator
) -> None:
    """Along a line of factors, the value's slope is the gradient's, with the same mask each time."""
    lm = nplora.load_model(path)
    lm.add_lora(rank=2, targets="lm_head", dropout=0.5)
    layer = lm.adapter_layers()["lm_head"]
    layer.A[...] = 0.1 * rng.standard_normal(layer.A.shape)
    batch, start, state = batch_of(lm, rng), layer.A.copy(), lm.random_state()
    weights = rng.standard_normal(batch.num_targets)
    direction = rng.standard_normal(start.shape).astype(np.float32)

    def value(step: float) -> float:
        layer.A[...] = start + step * direction
        lm.set_random_state(state)
        return lm.forward_backward_of(batch, lambda logs: squares(logs, weights))

    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    lm.zero_grad()
    value(0.0)
    assert (layer.dA * direction).sum() == pytest.approx(slope, rel=1e-2)
    after = lm.random_state()
    lm.set_random_state(state)
    lm.forward_backward(batch, 1.0)
    assert lm.random_state() == after, "a pass draws each mask once"
