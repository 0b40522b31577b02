"""Embedding: a frozen or trained lookup table. LoRAEmbedding: a frozen table with a low-rank update."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.linear import trainable_copy
from nplora.nn.low_rank import LoRALayer
from nplora.nn.module import Module, Parameter, Saved, SharedWeights, inferring, quiet
from nplora.weights import FrozenWeight, buffers, freeze

Array = npt.NDArray[Any]

_SAVED_IDS = "saved is from another layer: its array of ids"


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingSaved(Saved):
    """The shape of the ids, and the flattened ids (n,) for `Embedding.backward`.

    `ids` is None if the table is frozen or if the pass ran in inference mode.
    """

    lead: tuple[int, ...]
    ids: Array | None = None


class Embedding(Module):
    """Look up rows of a table E: y = E[ids].

        >>> import nplora, numpy as np
        >>> nplora.Embedding(np.eye(3))([2, 0])
        array([[0., 0., 1.],
               [1., 0., 0.]], dtype=float32)

    Args:
        W: the table E (vocab, dim). A float array is copied. A FrozenWeight is copied only if `trainable`.
        dtype: the storage format of the table, as in LoRALinear. A trainable table must be "float32" or
            "float64".
        trainable: whether the table itself is trained, as the parameter "weight".
    Attributes:
        weight: a FrozenWeight, or, if `trainable`, the array (vocab, dim) that optimisers update in place.
        dweight: the gradient of `weight`, or None if the table is frozen.
    Raises:
        ValueError: W does not have two axes; `dtype` is unknown, or differs from the format of a
            FrozenWeight; or a table of type `dtype` cannot be trained.
    """

    def __init__(
        self, W: npt.ArrayLike | FrozenWeight, dtype: npt.DTypeLike | None = None, trainable: bool = False
    ) -> None:
        frozen = freeze("Embedding", W, dtype)
        self.shape = frozen.shape
        self.trainable = bool(trainable)
        self.weight = trainable_copy("Embedding", frozen) if trainable else frozen
        self.dweight = np.zeros_like(self.weight) if isinstance(self.weight, np.ndarray) else None

    def local_parameters(self) -> list[Parameter]:
        if isinstance(self.weight, FrozenWeight) or self.dweight is None:
            return []
        return [Parameter("weight", self.weight, self.dweight)]

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [] if self.trainable else [self.weight]

    def forward(self, ids: npt.ArrayLike) -> tuple[Array, EmbeddingSaved]:
        """Return y (..., dim) for integer ids (...), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.Embedding(np.eye(3)).forward([[0, 2]])
            >>> y.shape
            (1, 2, 3)

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in [0, vocab).
        """
        flat, lead = token_ids("Embedding.forward", ids, self.shape[0])
        y = self.weight.take(flat) if isinstance(self.weight, FrozenWeight) else self.weight[flat]
        keep = self.trainable and not inferring()
        return y.reshape(*lead, self.shape[1]), EmbeddingSaved(lead, flat if keep else None, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: EmbeddingSaved, need_dx: bool = True) -> None:
        """Add dy to dweight[ids] if the table is trained. Return None, because ids have no gradient.

            >>> import nplora, numpy as np
            >>> layer = nplora.Embedding(np.zeros((3, 2)), trainable=True)
            >>> y, saved = layer.forward([0, 2, 2])
            >>> layer.backward(np.ones((3, 2)), saved)
            >>> layer.dweight
            array([[1., 1.],
                   [0., 0.],
                   [2., 2.]], dtype=float32)

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the table is trained, but the forward pass ran in inference mode.
        """
        op = "Embedding.backward"
        _check.saved(op, saved, EmbeddingSaved)
        dtype = self.weight.compute_dtype if isinstance(self.weight, FrozenWeight) else self.weight.dtype
        rows = _check.shaped(op, "dy", dy, (*saved.lead, self.shape[1]), dtype)
        if self.dweight is None:
            _check.own(op, saved, self)
            return
        if saved.ids is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        ids = _check.in_range(op, _SAVED_IDS, saved.ids, self.shape[0])
        _check.own(op, saved, self)
        add_rows(self.dweight, ids, rows.reshape(-1, self.shape[1]))

    def __repr__(self) -> str:
        return f"Embedding({self.shape}, dtype={str(self.weight.dtype)!r}, trainable={self.trainable})"


@dataclasses.dataclass(frozen=True, slots=True)
class LoRAEmbeddingSaved(Saved):
    """The values that `LoRAEmbedding.backward` needs: the token ids (n,) and the rows A[ids] (n, r).

    Only the gradient of B needs the rows, so `rows` is None if B is frozen.
    """

    lead: tuple[int, ...]
    alone: bool = False
    merged: bool = False
    ids: Array | None = None
    rows: Array | None = None


class LoRAEmbedding(LoRALayer):
    """A frozen table E with a trainable low-rank update: y = E[ids] + scale · A[ids] B.

    A is (vocab, r), and B is (r, dim). With init "zero", A starts at 0, and B starts with random numbers from
    N(0, 1). PEFT starts its factors in the same way, but swaps the names A and B and transposes the arrays.
    Like the embedding layer of PEFT, this layer has no dropout.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRAEmbedding(np.eye(4), rank=2, rng=0)
        >>> layer
        LoRAEmbedding((4, 4), rank=2, alpha=16, dtype='float32', num_trainable=16)
        >>> layer([3])
        array([[0., 0., 0., 1.]], dtype=float32)

    Args:
        W: the table E (vocab, dim). A float array is copied and packed. A FrozenWeight is not copied.
        rank, alpha, dtype, init ("zero" or "gaussian"), use_rslora, rng, freeze_B: as in LoRALinear.
    Raises:
        ValueError, TypeError: as in LoRALinear.
    Warns:
        UserWarning: rank is above min(vocab, dim).
    """

    @_check.keywords
    def __init__(
        self,
        W: npt.ArrayLike | FrozenWeight,
        rank: int = 8,
        alpha: float = 16,
        dtype: npt.DTypeLike | None = None,
        init: str = "zero",
        use_rslora: bool = False,
        rng: np.random.Generator | int | None = None,
        freeze_B: bool = False,
    ) -> None:
        weight = freeze("LoRAEmbedding", W, dtype)
        super().__init__(weight, rank, alpha, init, use_rslora, rng, freeze_B=bool(freeze_B))

    is_embedding = True

    def _draw_b(self, rng: np.random.Generator) -> Array:
        return rng.normal(0, 1, self.B.shape)

    def forward(self, ids: npt.ArrayLike) -> tuple[Array, LoRAEmbeddingSaved]:
        """Return y (..., dim) for integer ids (...), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.LoRAEmbedding(np.eye(3), rank=1).forward([2])
            >>> y
            array([[0., 0., 1.]], dtype=float32)

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in [0, vocab).
        """
        vocab, dim = self.weight.shape
        flat, lead = token_ids("LoRAEmbedding.forward", ids, vocab)
        lone, merged = self._lone_weight()
        y = (lone or self.weight).take(flat)
        saved = LoRAEmbeddingSaved(lead, alone=lone is not None, merged=merged, layer=self)
        if lone is None:
            rows = self.A[flat]
            if self.scale != 0:
                update = buffers.empty_like(y)
                _core.matmul_t(self.B, rows, update)
                with quiet():
                    update *= self.scale
                    y += update
            if not inferring():
                kept = None if self.freeze_B else rows
                saved = LoRAEmbeddingSaved(lead, ids=flat, rows=kept, layer=self)
        return y.reshape(*lead, dim), saved

    def backward(self, dy: npt.ArrayLike, saved: LoRAEmbeddingSaved, need_dx: bool = True) -> None:
        """Add to dA and dB; return None, because ids have no gradient.

        dA[ids] += scale · dy Bᵀ;  dB += scale · A[ids]ᵀ dy, unless B is frozen

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRAEmbedding(np.eye(3), rank=1, rng=0)
            >>> y, saved = layer.forward([2])
            >>> layer.backward(np.ones((1, 3)), saved)
            >>> (layer.dA != 0).T
            array([[False, False,  True]])

        Raises:
            ValueError: dy does not have the shape of y; `saved` is from a forward pass of another layer; or
                an array in `saved` does not fit the layer's rank or dtype.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer is merged, or was merged during the forward pass; or that pass ran in
                inference mode.
        """
        op = "LoRAEmbedding.backward"
        self.require_unmerged("backward")
        _check.saved(op, saved, LoRAEmbeddingSaved)
        if saved.merged:
            raise RuntimeError(f"{op}: the layer was merged when this forward pass ran")
        dim, dtype = self.weight.shape[1], self.weight.compute_dtype
        du = _check.shaped(op, "dy", dy, (*saved.lead, dim), dtype).reshape(math.prod(saved.lead), dim)
        if saved.alone or self.scale == 0:
            _check.own(op, saved, self)
            return
        if saved.ids is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        if saved.rows is None and not self.freeze_B:
            raise ValueError(f"{op}: this forward pass saved no rows of A, which the gradient of B needs")
        _check.kept(op, "A[ids]", saved.rows, (len(du), self.rank), dtype)
        ids = _check.in_range(op, _SAVED_IDS, saved.ids, len(self.A))
        _check.own(op, saved, self)
        d_rows = buffers.empty((len(du), self.rank), dtype)
        _core.matmul(self.B, du, None, d_rows)
        with quiet():
            d_rows *= self.scale
        add_rows(self.dA, ids, d_rows)
        if self.dB is not None and saved.rows is not None:
            _core.add_outer(saved.rows, du, self.scale, self.dB)

    def frozen(self) -> Embedding:
        self._require_whole_weight("frozen")
        return Embedding(self.weight)

    def unloaded(self, shared: SharedWeights) -> Embedding:
        return Embedding(self._merged_frozen())


def token_ids(op: str, ids: npt.ArrayLike, vocab: int) -> tuple[Array, tuple[int, ...]]:
    """Check that all ids (...) are in [0, vocab). Return the flattened ids (n,), and the shape of `ids`."""
    array = _check.in_range(op, "ids", _check.integers(op, "ids", ids), vocab)
    return array.reshape(-1), array.shape


def add_rows(out: Array, ids: Array, rows: Array) -> None:
    """Add rows[i] to out[ids[i]] for each i, even if an id occurs several times."""
    if not ids.size:
        return
    order = np.argsort(ids, kind="stable")
    found, starts = np.unique(ids[order], return_index=True)
    with quiet():
        out[found] += np.add.reduceat(rows[order], starts, axis=0)
