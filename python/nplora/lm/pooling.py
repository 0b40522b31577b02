"""Pooling: turns the hidden states of a text's tokens into one embedding, forward and backward."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.models.positions import packed_positions, rows_of
from nplora.nn import Linear, LoRALinear, Tanh
from nplora.nn.module import Module, Saved, inferring

Array = npt.NDArray[Any]

POOLINGS = ("cls", "mean", "max", "last", "weighted_mean", "mean_sqrt")
_LEAST_NORM = np.float32(1e-12)  # as in torch.nn.functional.normalize


@dataclasses.dataclass(frozen=True, slots=True)
class PoolingSaved(Saved):
    """The values that `Pooling.run_backward` needs.

    Attributes:
        starts: int64 (m + 1,): the index of the first row of each text, followed by the number of rows.
        x: the hidden states (n, d) if "max" is one of the modes, else None.
        layers: the saved values of each layer after the pooling.
        unit: a tuple: the normalised embeddings, and the lengths of the embeddings before the normalisation.
            None: the embeddings were not normalised.
    """

    starts: Array
    x: Array | None
    layers: tuple[Any, ...]
    unit: tuple[Array, Array] | None


class Pooling(Module):
    """Makes one embedding per text: pools the hidden states of the tokens, then applies optional layers.

        >>> import numpy as np
        >>> from nplora.lm.pooling import Pooling
        >>> pooling = Pooling("mean")
        >>> pooling.pool(np.float32([[1, 3], [3, 1], [8, 8]]), np.array([0, 2, 3]))
        array([[2., 2.],
               [8., 8.]], dtype=float32)

    Args:
        modes: "cls" (the first token), "mean", "max", "last" (the last token), "weighted_mean" (the i-th
            token has weight i) or "mean_sqrt" (the sum divided by the square root of the number of tokens),
            or several of these modes, whose results are concatenated.
        layers: pairs of a linear layer and the name of its activation; the name is "tanh" or None.
        normalize: whether to scale the embeddings to length 1.
    Raises:
        ValueError: a mode or an activation is unknown.
    """

    def __init__(
        self,
        modes: str | Sequence[str],
        layers: Sequence[tuple[Linear, str | None]] = (),
        normalize: bool = False,
    ) -> None:
        self.modes = (modes,) if isinstance(modes, str) else tuple(modes)
        for mode in self.modes:
            _check.choice("Pooling", "mode", mode, POOLINGS)
        if not self.modes:
            raise ValueError(f"Pooling: no mode, expected one or several of {', '.join(POOLINGS)}")
        for _, activation in layers:
            _check.choice("Pooling", "activation", activation or "", ("tanh", ""))
        self.dense: list[Linear | LoRALinear] = [layer for layer, _ in layers]
        self._activations = [Tanh() if activation else None for _, activation in layers]
        self.normalize = bool(normalize)

    def dim(self, hidden_size: int) -> int:
        """The width of the embeddings, for hidden states of width `hidden_size`."""
        return int(self.dense[-1].weight.shape[0]) if self.dense else len(self.modes) * hidden_size

    def pool(self, x: Array, starts: Array, normalize: bool | None = None) -> Array:
        """Return the embeddings (m, dim) of m texts, from the hidden states x (n, d) of all their tokens.

        Args:
            starts: int64 (m + 1,): the index in x of the first row of each text, followed by n. No text is
                empty.
            normalize: whether to scale the embeddings to length 1; None: as in the constructor.
        """
        return self.run(x, starts, normalize)[0]

    def run(self, x: Array, starts: Array, normalize: bool | None = None) -> tuple[Array, PoolingSaved]:
        """Like `pool`, but also return the values that `run_backward` needs."""
        y = np.concatenate([_pooled(mode, x, starts) for mode in self.modes], axis=1)
        saved = list[Any]()
        for layer, activation in zip(self.dense, self._activations, strict=True):
            y, kept = layer.forward(y)
            acted = None
            if activation is not None:
                y, acted = activation.forward(y)
            saved.append((kept, acted))
        unit = None
        if self.normalize if normalize is None else normalize:
            lengths = np.maximum(np.linalg.norm(y, axis=1, keepdims=True), _LEAST_NORM)
            y = y / lengths
            unit = y, lengths
        keep = "max" in self.modes and not inferring()
        return y, PoolingSaved(starts, x if keep else None, tuple(saved), unit)

    def run_backward(self, dy: Array, saved: PoolingSaved) -> Array:
        """Return the gradient of the hidden states (n, d), given the gradient `dy` of the embeddings (m,
        dim).
        """
        if saved.unit is not None:
            unit, lengths = saved.unit
            dy = (dy - unit * (unit * dy).sum(axis=1, keepdims=True)) / lengths
        layers = zip(self.dense, self._activations, saved.layers, strict=True)
        for layer, activation, (kept, acted) in reversed(list(layers)):
            if activation is not None:
                dy = activation.backward(dy, acted)
            dy = layer.backward(dy, kept)
        parts = np.split(dy, len(self.modes), axis=1)
        total = _pooled_backward(self.modes[0], parts[0], saved)
        for mode, part in zip(self.modes[1:], parts[1:], strict=True):
            total += _pooled_backward(mode, part, saved)
        return total

    def __repr__(self) -> str:
        shapes = (layer.weight.shape for layer in self.dense)
        words = ["+".join(self.modes), *(f"{d_in} -> {d_out}" for d_out, d_in in shapes)]
        return f"Pooling({', '.join([*words, *(['normalize'] if self.normalize else [])])})"


def _pooled(mode: str, x: Array, starts: Array) -> Array:
    first, counts = starts[:-1], np.diff(starts)[:, None].astype(np.float32)
    if not len(first):
        return np.empty((0, x.shape[1]), np.float32)
    if mode == "cls":
        return np.asarray(x[first])
    if mode == "last":
        return np.asarray(x[starts[1:] - 1])
    if mode == "max":
        return _reduced(np.maximum, x, starts)
    if mode == "weighted_mean":
        return _reduced(np.add, x * _weights(starts)[:, None], starts)
    total = _reduced(np.add, x, starts)
    return np.asarray(total / (counts if mode == "mean" else np.sqrt(counts)))


def _reduced(function: np.ufunc, x: Array, starts: Array) -> Array:
    """The sum or the maximum of each text's rows. This loop is five times as fast as `reduceat`."""
    y = np.empty((len(starts) - 1, x.shape[1]), np.float32)
    for row, (first, end) in zip(y, itertools.pairwise(starts.tolist()), strict=True):
        function.reduce(x[first:end], axis=0, out=row)
    return y


def _weights(starts: Array) -> Array:
    """The weight of each token in the weighted mean of its text, float32 (n,)."""
    positions = packed_positions(starts)
    lengths = positions.sequence_lengths()
    return np.asarray((positions.in_sequence + 1) / (lengths * (lengths + 1) / 2), np.float32)


def _pooled_backward(mode: str, dy: Array, saved: PoolingSaved) -> Array:
    starts = saved.starts
    if mode in ("cls", "last"):
        dx = np.zeros((int(starts[-1]), dy.shape[1]), np.float32)
        dx[starts[:-1] if mode == "cls" else starts[1:] - 1] = dy
        return dx
    if mode in ("mean", "mean_sqrt"):
        divisor = np.diff(starts)[:, None].astype(np.float32)
        return np.asarray((dy / (divisor if mode == "mean" else np.sqrt(divisor)))[rows_of(starts)])
    spread = dy[rows_of(starts)]
    if mode == "weighted_mean":
        return np.asarray(spread * _weights(starts)[:, None])
    assert saved.x is not None
    return _at_the_largest(saved.x, starts, spread)


def _at_the_largest(x: Array, starts: Array, spread: Array) -> Array:
    """The gradient of the maximum (n, d).

    x (n, d) holds the rows that were pooled. Row i of `spread` (n, d) is the gradient of the embedding of the
    text that row i of x belongs to.

    In each column, only the row of x that holds a text's maximum gets the gradient of the text's embedding.
    If several rows hold the maximum, only the first of these rows gets the gradient. All other elements
    get 0.
    """
    dx = np.zeros_like(x)
    for first, end in itertools.pairwise(starts.tolist()):
        row, column = first + x[first:end].argmax(axis=0), np.arange(x.shape[1])
        dx[row, column] = spread[first]
    return dx
