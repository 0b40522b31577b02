"""LoRALayer: a frozen weight with a trainable low-rank update, which can be merged into the weight."""

from __future__ import annotations

import math
from typing import Any, Generic, NoReturn, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import MergeReport, merge_weight
from nplora.nn.linear import describe_weight
from nplora.nn.module import AdapterLayer, Commit, Parameter
from nplora.nn.prepared import Prepared
from nplora.nn.principal import PRINCIPAL_INITS, principal_factors
from nplora.runtime.user_warning import warn_user
from nplora.weights import FrozenWeight, become_infinite, buffers

Array = npt.NDArray[Any]
T = TypeVar("T", bound=Array | None)


class LiveArray(Generic[T]):
    """An attribute that always holds the same array: `layer.A = value` copies the value into this array.

    Optimisers and the C++ core hold references to the arrays, so an assignment must write in place.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> T: ...
    def __get__(self, layer: object | None, owner: type) -> Self | T:
        if layer is None:
            return self
        return vars(layer)[self._name]  # type: ignore[no-any-return]

    def __set__(self, layer: object, value: npt.ArrayLike) -> None:
        live = vars(layer)[self._name]
        if value is live:
            return
        op = type(layer).__name__
        if live is None:
            raise AttributeError(f"{op}.{self._name}: this layer has no {self._name}")
        live[...] = _check.shaped(op, self._name, value, live.shape, live.dtype)


class LoRALayer(Prepared, AdapterLayer):
    """Base class of `LoRALinear`, `LoRAConv2d` and `LoRAEmbedding`: W + scale · A·B with a frozen W.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(8), rank=2, alpha=4)
        >>> isinstance(layer, nplora.LoRALayer), layer.scale
        (True, 2.0)
        >>> layer.alpha = 8
        >>> layer.scale, layer.A.shape, layer.B.shape
        (4.0, (8, 2), (2, 8))

    Attributes:
        weight: the FrozenWeight W (d_out, d_in). With init "pissa" or "olora", `weight` is the original
            weight minus the initial scale · A·B.
        A, B: arrays (d_out, r) and (r, d_in) that optimisers update in place, in float64 if W is float64,
            else in float32.
        m: DoRA's magnitudes (d_out,), one for each row of W, or None without DoRA.
        dA, dB, dm: the gradients of A, B and m. `backward` adds to these arrays. dB is None if B is frozen;
            dm is None without DoRA.
        rank, use_rslora, use_dora, freeze_B: the arguments of the constructor; read-only.
        alpha: the strength of the update. Setting alpha also changes `scale`. With init "pissa" or "olora",
            alpha is read-only.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA; read-only.
        dropout: the dropout probability. It can be set in LoRALinear and LoRAConv2d, and is 0 in
            LoRAEmbedding.
        row_order: None if the rows of W have the same order as in an adapter file. Otherwise, `row_order` is
            an array, and row i of W is row row_order[i] in the adapter file.
    """

    A = LiveArray[Array]()
    B = LiveArray[Array]()
    m = LiveArray[Array | None]()
    dA = LiveArray[Array]()  # noqa: N815
    dB = LiveArray[Array | None]()  # noqa: N815
    dm = LiveArray[Array | None]()

    inits: tuple[str, ...] = ("zero", "gaussian")
    is_embedding = False

    _dropout = 0.0
    row_order: Array | None = None
    invocation_tokens: tuple[int, ...] | None = None  # an activated LoRA acts from these tokens on

    def __init__(
        self,
        weight: FrozenWeight,
        rank: int,
        alpha: float,
        init: str,
        use_rslora: bool,
        rng: np.random.Generator | int | None,
        use_dora: bool = False,
        freeze_B: bool = False,
    ) -> None:
        op = type(self).__name__
        self._weight = weight
        rank = _check.rank(op, rank)
        self._alpha, self._use_rslora = _check.number(op, "alpha", alpha), bool(use_rslora)
        self._use_dora = use_dora
        self.init = _check.choice(op, "init", init, self.inits)
        self._taken: tuple[Array, Array] | None = None  # the initial A and B of "pissa" and "olora"
        self._merged: FrozenWeight | None = None
        d_out, d_in = weight.shape
        if init in PRINCIPAL_INITS and (rank > min(d_out, d_in) or self._alpha <= 0):
            raise ValueError(
                f"{op}: init={init!r} needs a rank of at most min(d_out, d_in) = {min(d_out, d_in)} and a "
                f"positive alpha, got rank {rank} and alpha {alpha:g}"
            )
        if rank > min(d_out, d_in):
            warn_user(
                f"{op}: rank {rank} is above min(d_out, d_in) = {min(d_out, d_in)}, the largest useful rank"
            )
        dtype = weight.compute_dtype
        a, da = buffers.value_and_gradient((d_out, rank), dtype)
        b, db = buffers.value_and_gradient((rank, d_in), dtype, trained=not freeze_B)
        vars(self).update(A=a, B=b, m=None, dA=da, dB=db, dm=None)
        if use_dora:
            vars(self).update(m=np.zeros(d_out, dtype), dm=np.zeros(d_out, dtype))
        self._start(_check.generator(op, rng))

    @property
    def weight(self) -> FrozenWeight:
        return self._weight

    @property
    def kernel(self) -> tuple[int, int, int] | None:
        """The shape (c_in, height, width) of a convolution's windows; None for other layers."""
        return None

    @property
    def rank(self) -> int:
        return len(self.B)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.require_unmerged("alpha")
        self._require_whole_weight("alpha")
        self._alpha = _check.number(type(self).__name__, "alpha", value)

    @property
    def use_rslora(self) -> bool:
        return self._use_rslora

    @property
    def scale(self) -> float:
        return self._alpha / (math.sqrt(self.rank) if self._use_rslora else self.rank)

    @property
    def use_dora(self) -> bool:
        return self._use_dora

    @property
    def freeze_B(self) -> bool:  # noqa: N802
        return self.dB is None

    @property
    def dropout(self) -> float:
        return self._dropout

    def settings(self) -> dict[str, int | float | bool | str]:
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "dropout": self.dropout,
            "freeze_B": self.freeze_B,
            "compute": self.weight.compute,
        }

    def prepare_adopt(self, delta: LoraDelta) -> Commit:
        """Return a function that copies the update `delta` into this layer.

        The rows of `delta` must have the order of an adapter file. The returned function allocates no arrays
        and cannot fail. `delta` must have magnitudes m if and only if the layer has magnitudes. If the ranks
        of the update and the layer differ, the layer gets new arrays for A and B.
        """
        self.require_unmerged("prepare_adopt")
        self._require_whole_weight("load_adapter")
        delta = delta.rows(self.row_order)
        fresh: dict[str, Array | None] = {}
        if delta.rank != self.rank:
            a, b = (factor.astype(self.A.dtype, order="C") for factor in (delta.A, delta.B))
            fresh = {"A": a, "B": b, "dA": np.zeros_like(a)}
            fresh["dB"] = None if self.freeze_B else np.zeros_like(b)

        def commit() -> None:
            vars(self).update(fresh)
            for name, value in (("A", delta.A), ("B", delta.B), ("m", delta.m)):
                if value is not None:
                    np.copyto(vars(self)[name], value)
            self._alpha, self._use_rslora = delta.stated_alpha, delta.use_rslora
            self.forget_prepared()

        return commit

    def _require_whole_weight(self, what: str) -> None:
        if self._taken is not None:
            raise ValueError(
                f"{type(self).__name__}.{what}: init={self.init!r} moved a part of the frozen weight "
                "into A and B; use a layer with init='zero', which keeps the whole weight"
            )

    def plain_update(self) -> LoraDelta:
        """Return the update of the original W as plain LoRA, with rows in the order of an adapter file.

        The result usually holds the layer's own arrays. The arrays are new if the rows must be reordered, or
        if init is "pissa" or "olora". With "pissa" and "olora", the frozen weight is W_rest = W - s·A₀B₀,
        where s is the scale, and A₀ and B₀ are the initial factors. The update of W then has rank 2r, because
        W_rest + s·AB = W + s·[A, -A₀][B; B₀]. This equation ignores the rounding of W_rest to its storage
        format. PEFT converts "pissa" and "olora" adapters in the same way.
        """
        a, b, alpha = self.A, self.B, self.alpha
        if self._taken is not None:
            a, b = np.concatenate([a, -self._taken[0]], axis=1), np.concatenate([b, self._taken[1]])
            alpha *= math.sqrt(2) if self.use_rslora else 2
        delta = LoraDelta.of_alpha(a, b, alpha, self.use_rslora, self.m, self.is_embedding, self.kernel)
        # row row_order[i] of the adapter file is row i of the layer
        return delta if self.row_order is None else delta.rows(np.argsort(self.row_order))

    # ---- starting values and randomness ----

    def _start(self, rng: np.random.Generator) -> None:
        """Draw A and B, then the seed of the dropout stream."""
        if self.init == "zero":
            self.A[...] = 0
            self.B[...] = self._draw_b(rng)
        elif self.init in PRINCIPAL_INITS:
            self.A[...], self.B[...] = self._taken or self._take()
        else:  # N(0, 1/r): A·B has entries of variance 1/r
            self.A[...] = rng.normal(0, 1 / math.sqrt(self.rank), self.A.shape)
            self.B[...] = rng.normal(0, 1 / math.sqrt(self.rank), self.B.shape)
        self.dropout_stream = (int(rng.integers(2**63)), 0)

    def _take(self) -> tuple[Array, Array]:
        """Compute initial factors A and B from the weight, and subtract scale · A·B from the weight."""
        a, b = self._taken = principal_factors(self.init, self.weight, self.rank, self.scale)
        self._weight, _ = merge_weight("W - scale · A·B", self.weight, LoraDelta(a, b, -self.scale), "same")
        return a, b

    def _draw_b(self, rng: np.random.Generator) -> Array:
        """Draw the initial B for init="zero". (The initial A is then 0.)"""
        raise NotImplementedError

    def reset(self, stream: np.random.SeedSequence) -> None:
        self.require_unmerged("reset")
        self._start(np.random.default_rng(stream))

    def _next_key(self) -> int:
        """Return the 64-bit key from which this pass draws its dropout mask."""
        seed, calls = self.dropout_stream
        self.dropout_stream = (seed, calls + 1)
        return int(np.random.SeedSequence((seed, calls)).generate_state(1, np.uint64)[0])

    # ---- parameters ----

    def local_parameters(self) -> list[Parameter]:
        triples = (("A", self.A, self.dA), ("B", self.B, self.dB), ("m", self.m, self.dm))
        return [Parameter(name, v, g) for name, v, g in triples if v is not None and g is not None]

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [self.weight, *([self.B] if self.freeze_B else [])]

    # ---- the update as a dense matrix ----

    def delta_weight(self) -> Array:
        """Return merged_weight() - W, an array (d_out, d_in). Without DoRA this is scale · A·B.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(8), rank=2, init="gaussian")
        >>> np.allclose(layer.delta_weight(), layer.scale * layer.A @ layer.B, atol=1e-5)
        True
        """
        delta = np.zeros(self.weight.shape, self.weight.compute_dtype)
        _core.merge_lora(delta, self.A, self.B, self.scale, delta.dtype.name)
        return delta

    def merged_weight(self) -> Array:
        """Return W + scale · A·B as a new array (d_out, d_in), float32 or float64.

        With DoRA, the rows of the result are rescaled.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(2), rank=1)
        >>> layer.merged_weight()
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        merged = self.weight.to_numpy()
        _core.merge_lora(merged, self.A, self.B, self.scale, merged.dtype.name)
        return merged

    # ---- merging ----

    @property
    def merged(self) -> bool:
        """Whether the layer computes with its merged weight at the moment."""
        return self._merged is not None

    def _merged_frozen(self) -> FrozenWeight:
        self._require_mergeable()
        return self._merged or self.weight.like(self._finite_still(self.merged_weight()))

    def _finite_still(self, merged: Array) -> Array:
        """Return `merged`. Raise ValueError if the merge, or the rounding to the storage format, makes finite
        values infinite."""
        storage = self.weight.float_dtype
        lost = become_infinite(merged, storage).size
        if not lost and not np.isfinite(merged).all() and self._finite_factors():
            lost = int(np.sum(~np.isfinite(merged) & np.isfinite(self.weight.to_numpy())))
        if lost:
            raise ValueError(
                f"{type(self).__name__}.merge: {lost} finite values become infinite in {storage}; nothing is "
                "merged"
            )
        return merged

    def _finite_factors(self) -> bool:
        return all(np.isfinite(array).all() for array in (self.A, self.B, self.m) if array is not None)

    def _require_mergeable(self) -> None:
        if self.invocation_tokens is not None:
            raise ValueError(
                f"{type(self).__name__}.merge: activated LoRA (aLoRA) acts only from its invocation "
                "tokens on, so it cannot be merged into the weight"
            )

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        self.require_unmerged("merge")
        self._require_mergeable()
        report = None
        if dtype is None:
            weight = self._merged_frozen()
        else:
            update = LoraDelta(self.A, self.B, self.scale, self.m)
            weight, report = merge_weight(name or type(self).__name__, self.weight, update, dtype)

        def commit() -> None:
            self._merged = weight
            self.forget_prepared()
            self._allow_writes(False)  # an update made now would have no effect until unmerge

        return commit, report

    def prepare_unmerge(self) -> Commit:
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}.unmerge: the layer is not merged")

        def commit() -> None:
            self._merged = None
            self.forget_prepared()
            self._allow_writes(True)

        return commit

    def _allow_writes(self, allowed: bool) -> None:
        for array in (self.A, self.B, self.m):
            if array is not None:
                array.flags.writeable = allowed

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state.get("_merged") is not None:
            vars(self).update(A=buffers.writable(self.A), B=buffers.writable(self.B))
            if self.m is not None:
                vars(self).update(m=buffers.writable(self.m))
            self._allow_writes(False)  # a copied array is writable again

    def discard(self) -> None:
        vars(self).clear()
        vars(self)["_was"] = type(self).__name__
        object.__setattr__(self, "__class__", UnloadedLayer)

    def _lone_weight(self) -> tuple[FrozenWeight | None, bool]:
        """Return the only weight that a pass needs, and whether it is the merged weight.

        While the adapter is disabled, a pass needs only W. While the adapter is merged and enabled, a pass
        needs only the merged weight. In all other cases, a pass computes a separate update, and the result is
        (None, False). A pass calls this method only once, because another thread may merge, unmerge or
        disable the layer meanwhile.
        """
        enabled, merged = self.adapter_enabled, self._merged
        return (merged, merged is not None) if enabled else (self.weight, False)

    def _describe(self) -> str:
        d_out, d_in = self.weight.shape
        flags = [name for name in ("use_rslora", "use_dora", "freeze_B", "merged") if getattr(self, name)]
        parts = [f"({d_out}, {d_in})", f"rank={self.rank}", f"alpha={self.alpha:g}"]
        parts += describe_weight(self.weight)
        if self._taken is not None:  # the weight is only a part of the original W
            parts.append(f"init={self.init!r}")
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        parts += [f"{name}=True" for name in flags]
        return ", ".join([*parts, f"num_trainable={self.num_trainable}"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._describe()})"


class UnloadedLayer:
    """The class of a layer after `merge_and_unload` has replaced it. Every use of the layer raises an error.

    LoRALayer itself has no `__getattr__`, because that would slow down every access to an attribute.
    """

    _was = LoRALayer.__name__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self._was}.{name}: this layer was unloaded; use the layer that replaced it")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        self.__getattr__(name)

    def __call__(self, x: object) -> NoReturn:
        self.__getattr__("__call__")

    def __repr__(self) -> str:
        return f"{self._was}(unloaded)"
