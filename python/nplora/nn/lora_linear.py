"""LoRALinear: y = x Wᵀ + scale · (x Bᵀ) Aᵀ with a frozen W. Options: rsLoRA, dropout, DoRA, LoRA-FA."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.active_rows import active_rows
from nplora.nn.int8 import in_int8
from nplora.nn.linear import Linear, no_factors
from nplora.nn.low_rank import LoRALayer
from nplora.nn.module import Gradient, Saved, SharedWeights, inferring, quiet
from nplora.nn.principal import PRINCIPAL_INITS
from nplora.weights import FrozenWeight, Int8Error, buffers, freeze
from nplora.weights.int8_error import SAMPLES

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class LoRALinearSaved(Saved):
    """The values that `LoRALinear.backward` needs: x (n, d_in) and z = x Bᵀ (n, r).

    With DoRA, `backward` also needs u (n, d_out), the output before DoRA rescales it.
    """

    lead: tuple[int, ...]  # the axes of x before the last
    alone: bool = False  # the pass used only W, or only the merged weight, and added no update
    merged: bool = False
    dropout: float = 0.0
    key: int = 0  # the key of the dropout mask, from which `backward` draws the same mask again
    x: Array | None = None  # None if B is frozen
    z: Array | None = None
    u: Array | None = None  # DoRA: the output before rescaling
    gain: Array | None = None  # DoRA: m / ‖row‖
    inverse_norm: Array | None = None
    active: Array | None = None  # activated LoRA: the rows with the update; z has only these rows


class LoRALinear(LoRALayer):
    """A frozen linear layer with a trainable low-rank update.

    y = x Wᵀ + scale · (x Bᵀ) Aᵀ [+ bias]      (Hu et al. 2021, eq. 3, with A and B named as in this project)

    With DoRA (Liu et al. 2024, eq. 5):  y = (m / ‖W + scale·A·B‖) ∘ (x Wᵀ + scale · (x Bᵀ) Aᵀ) [+ bias]. Here
    ‖·‖ is the norm of each row. The norms are computed without forming A·B, and `backward` treats them as
    constants (section 4.3 of the paper). If a row of W + scale·A·B is 0, it stays 0.

        >>> import nplora, numpy as np
        >>> W = np.random.default_rng(0).normal(size=(96, 64))
        >>> layer = nplora.LoRALinear(W, rank=4, rng=0)
        >>> layer
        LoRALinear((96, 64), rank=4, alpha=16, dtype='float32', num_trainable=640)
        >>> x = np.ones((10, 64), np.float32)
        >>> y, saved = layer.forward(x)             # training: saved is for backward
        >>> dx = layer.backward(np.ones_like(y), saved)
        >>> dx.shape, layer.dA.shape, layer.dB.shape
        ((10, 64), (96, 4), (4, 64))
        >>> layer(x).shape                          # inference
        (10, 96)

    Args:
        W: float array (d_out, d_in), which is copied and packed, or a FrozenWeight, which is not copied.
        rank: the rank r of the update, from 1 to 65536.
        alpha: the strength of the update, which sets scale = alpha / rank.
        bias: a frozen array (d_out,), or None.
        dtype: the storage format of W, as in FrozenWeight: "float32", "float64", "bfloat16", "float16", or
            quantised ("q8_0", "q4_1", "nf4", ...). None: the format of W if W is a FrozenWeight,
            and "float32" if W is an array (even a float64 array). With "float64" all arrays are float64;
            otherwise x is converted to float32.
        compute: the arithmetic of products with W, as in FrozenWeight: "float32", "bfloat16" or "int8". None:
            the arithmetic of W if W is a FrozenWeight, and "float32" if W is an array.
        init: how the factors A and B start.

            - "zero": A is 0, and B is drawn from U(±1/sqrt(d_in)). At first, the layer computes x Wᵀ.
            - "gaussian": A and B are drawn from N(0, 1/r), so the update is not 0 even before training.
            - "pissa", "olora": scale · A·B starts as a rank-r part of W. The frozen `weight` is W minus this
              part, rounded to the storage format of W. So at first, the layer computes x Wᵀ, except for
              the rounding error, which is large for a quantised format. "pissa" and "olora" cannot be
              combined with DoRA.
        dropout: the probability that training drops an element of x from the input of the low-rank update.
        use_rslora: use scale = alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023).
        use_dora: also train the norm m of each row (DoRA).
        freeze_B: train A only (LoRA-FA, Zhang et al. 2023). A layer with a frozen B keeps z = x Bᵀ for
            `backward`, but not x.
        rng: a random generator or a seed, for the initial factors and the dropout. With None, the factors and
            the dropout differ from run to run, unless `model.seed` is called.
    Raises:
        ValueError: W does not have two axes; bias does not have the shape (d_out,); rank is not from 1 to
            65536; alpha is not finite; dropout is not in [0, 1); or dtype, compute or init is unknown. With
            init "pissa" or "olora", ValueError has further causes: use_dora is set; rank is above min(d_out,
            d_in); alpha is not positive; or W holds NaN, an infinity or values that are too large.
        TypeError: W does not hold floats; rank is not an integer.
    Warns:
        UserWarning: rank is above min(d_out, d_in).
    """

    int8 = True  # False: training computes in bfloat16 although the weight has compute="int8"

    @_check.keywords
    def __init__(
        self,
        W: npt.ArrayLike | FrozenWeight,
        rank: int = 8,
        alpha: float = 16,
        bias: npt.ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        compute: str | None = None,
        init: str = "zero",
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        freeze_B: bool = False,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        op = type(self).__name__
        weight = freeze(op, W, dtype, compute)
        if use_dora and init in PRINCIPAL_INITS:
            raise ValueError(
                f"{op}: init={init!r} with use_dora=True: DoRA needs the norms of the rows of W, "
                "but this init keeps only a part of W as the frozen weight"
            )
        self._dropout = _check.probability(op, "dropout", dropout)
        d_out = weight.shape[0]
        self._bias = (
            None if bias is None else _check.shaped(op, "bias", bias, (d_out,), weight.compute_dtype).copy()
        )
        self._frozen_squares = np.empty(d_out if use_dora else 0, np.float64)  # ‖W_o‖², which never changes
        if use_dora:
            weight.packed.row_sums_of_squares(self._frozen_squares)
        super().__init__(weight, rank, alpha, init, use_rslora, rng, bool(use_dora), bool(freeze_B))

    inits = (*LoRALayer.inits, *PRINCIPAL_INITS)

    @property
    def bias(self) -> Array | None:
        """The frozen bias (d_out,), or None."""
        return self._bias

    @property
    def dropout(self) -> float:
        """The probability that training drops an element of x from the input of the low-rank update."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self._dropout = _check.probability(type(self).__name__, "dropout", value)

    @property
    def reads_x(self) -> bool:
        """Whether `backward` needs the layer's input x, because B is trained.

        >>> import nplora, numpy as np
        >>> nplora.LoRALinear(np.eye(8), rank=2, freeze_B=True).reads_x
        False
        """
        return not self.freeze_B

    def settings(self) -> dict[str, Any]:
        tokens = self.invocation_tokens
        return super().settings() | ({} if tokens is None else {"invocation_tokens": list(tokens)})

    def _start(self, rng: np.random.Generator) -> None:
        super()._start(rng)
        if self.m is not None:
            with quiet():
                self.m[...] = self._row_norms()

    def _draw_b(self, rng: np.random.Generator) -> Array:
        bound = 1 / math.sqrt(max(1, self.B.shape[1]))
        return rng.uniform(-bound, bound, self.B.shape)

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [*super().local_frozen(), *([] if self.bias is None else [self.bias])]

    # ---- the two passes ----

    def forward(self, x: npt.ArrayLike) -> tuple[Array, LoRALinearSaved]:
        """Return y (..., d_out) for x (..., d_in), and references to x and z = x Bᵀ for `backward`.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(2, 3), rank=1)
            >>> y, saved = layer.forward([1, 2, 3])
            >>> y
            array([1., 2.], dtype=float32)

        Raises:
            ValueError: the last axis of x is not d_in.
        """
        d_in, dtype = self.weight.shape[1], self.weight.compute_dtype
        rows, lead = _check.rows("LoRALinear.forward", "x", x, d_in, "d_in", dtype)
        part, y, saved = self.forward_part(rows, lead)
        _core.lora_forward(rows, [part], int8=in_int8(self))
        return self.finish_forward(y, saved)

    def forward_part(
        self, rows: Array, lead: tuple[int, ...]
    ) -> tuple[_core.ForwardPart, Array, LoRALinearSaved]:
        """Prepare a call of `_core.lora_forward`, which can run several layers on the same input.

        The caller makes the call. Return a tuple: this layer's argument for `_core.lora_forward`; the array
        y (n, d_out), into which `_core.lora_forward` writes the output; and the values for `backward`.
        """
        y = buffers.empty((len(rows), len(self.A)), self.A.dtype)
        lone, merged = self._lone_weight()
        weight, scale, bias = self._core_terms(lone)
        z, dropout, key, saved = None, 0.0, 0, LoRALinearSaved(lead, layer=self)
        active = active_rows()
        if lone is not None:
            saved = LoRALinearSaved(lead, alone=True, merged=merged, layer=self)
        elif active is not None:  # the core computes x Wᵀ, and finish_forward adds the update
            scale, saved = 0.0, LoRALinearSaved(lead, x=rows, active=active, layer=self)
        elif not inferring():
            z, dropout = buffers.empty((len(rows), self.rank), y.dtype), self.dropout
            key = self._next_key() if dropout else 0
            x = rows if self.reads_x else None
            saved = LoRALinearSaved(lead, dropout=dropout, key=key, x=x, z=z, layer=self)
        part = _core.ForwardPart(
            weight=weight, a=self.A, b=self.B, scale=scale, dropout=dropout, key=key, bias=bias, y=y, z=z
        )
        return part, y, saved

    def _core_terms(self, lone: FrozenWeight | None) -> tuple[_core.PackedWeight, float, Array | None]:
        """Return the weight, scale and bias for the core. The bias is None if `_rescale` adds it (DoRA)."""
        if lone is not None:
            return lone.packed, 0.0, self._bias  # scale 0: W alone
        return self._weight.packed, self.scale, None if self.use_dora else self._bias

    def finish_forward(self, y: Array, saved: LoRALinearSaved) -> tuple[Array, LoRALinearSaved]:
        """Return the result of `forward`, after `_core.lora_forward` has filled y."""
        if saved.active is not None:
            saved = self._add_update(y, saved, saved.active)
        elif self.use_dora and not saved.alone:
            y, saved = self._rescale(y, saved, saved.z is not None)
        return y.reshape(*saved.lead, y.shape[1]), saved

    def _add_update(self, y: Array, saved: LoRALinearSaved, active: Array) -> LoRALinearSaved:
        """Add the update to the rows `active`: y[active] += scale · z Aᵀ with z = x[active] Bᵀ."""
        assert saved.x is not None
        z = np.empty((len(active), self.rank), y.dtype)
        if len(active):
            update = buffers.empty((len(active), y.shape[1]), y.dtype)
            _core.matmul(self.B, np.ascontiguousarray(saved.x[active]), None, z)
            _core.matmul(self.A, z, None, update)
            with quiet():
                update *= self.scale
                y[active] += update
        keeps_x = self.reads_x and not inferring()
        return dataclasses.replace(saved, z=None if inferring() else z, x=saved.x if keeps_x else None)

    def finish_backward(self, du: Array, saved: LoRALinearSaved, dx: Array | None) -> None:
        """Activated LoRA: after `_core.lora_backward`, add the gradients of active rows to dA, dB and dx."""
        if saved.active is None or saved.z is None or not len(saved.active):
            return
        own = np.ascontiguousarray(du[saved.active])
        dz = np.empty((len(own), self.rank), du.dtype)
        _core.matmul_t(self.A, own, dz)
        with quiet():
            dz *= self.scale
        _core.add_outer(own, saved.z, self.scale, self.dA)
        if self.dB is not None:
            assert saved.x is not None
            _core.add_outer(dz, np.ascontiguousarray(saved.x[saved.active]), 1.0, self.dB)
        if dx is not None:
            more = buffers.empty((len(own), dx.shape[1]), dx.dtype)
            _core.matmul_t(self.B, dz, more)
            with quiet():
                dx[saved.active] += more

    def _inference_state(self) -> tuple[Hashable, ...]:
        own = vars(self)  # faster than access through LiveArray, because decoding calls this for each token
        strength = own["_alpha"], own["_use_rslora"], self.adapter_enabled
        return own["_weight"], own["_merged"], strength, id(own["A"])

    def _inference_layer(self) -> _core.InferenceLayer | None:
        lone = self._lone_weight()[0]
        if self.use_dora and lone is None:
            return None  # the core's inference does not rescale rows
        weight, scale, bias = self._core_terms(lone)
        a, b = self.A, self.B
        constant = not (a.flags.writeable or b.flags.writeable)
        return _core.InferenceLayer(weight, a, b, scale, bias, constant)

    def frozen_part(self) -> _core.InferenceLayer:
        """The layer without its update, as an argument for `_core.infer_groups`."""
        d_out, d_in = self.weight.shape
        return _core.InferenceLayer(
            self.weight.packed, *no_factors(d_out, d_in, self.weight.compute_dtype), 0.0, self._bias
        )

    def _rescale(self, u: Array, saved: LoRALinearSaved, training: bool) -> tuple[Array, LoRALinearSaved]:
        """Rescale the output u as DoRA does: y = (m / norms) ∘ u + bias. `norms` holds the norm of each row
        of W + scale·A·B."""
        assert self.m is not None
        with quiet():
            inverse_norm = self._inverse_norms()
            gain = (self.m * inverse_norm).astype(u.dtype)
            y = buffers.empty_like(u) if training else u
            np.multiply(u, gain, out=y)
            if self.bias is not None:
                y += self.bias
        if training:
            saved = dataclasses.replace(saved, u=u, gain=gain, inverse_norm=inverse_norm.astype(u.dtype))
        return y, saved

    def backward(self, dy: npt.ArrayLike, saved: LoRALinearSaved, need_dx: bool = True) -> Gradient:
        """Add this pass's gradients to dA, dB and dm; return dx (..., d_in), or None if need_dx is False.

        forward:   z = x Bᵀ;  y = x Wᵀ + scale · z Aᵀ
        backward:  dz = scale · dy A;  dx = dy W + dz B;  dA += scale · dyᵀ z;  dB += dzᵀ x

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(2, 3), rank=1)
            >>> y, saved = layer.forward([1, 2, 3])
            >>> layer.backward([1, 0], saved)
            array([1., 0., 0.], dtype=float32)
            >>> bool(layer.dA[0] != 0), bool(layer.dA[1] != 0)
            (True, False)

        Raises:
            ValueError: dy does not have the shape of y; `saved` is from a forward pass of another layer; or
                an array in `saved` does not fit the layer's shape, rank or dtype.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer is merged, or it was merged during the forward pass; or the forward pass
                ran in inference mode.
        """
        rows = self.backward_rows("LoRALinear.backward", dy, saved)
        _check.own("LoRALinear.backward", saved, self)
        part = self.backward_part(rows, saved)
        dx = buffers.empty((len(rows), self.weight.shape[1]), rows.dtype) if need_dx else None
        if dx is not None or (not saved.alone and saved.active is None):
            _core.lora_backward(saved.x, dx, [part], in_int8(self))
        self.finish_backward(rows, saved, dx)
        return None if dx is None else dx.reshape(*saved.lead, dx.shape[1])

    def backward_rows(self, op: str, dy: npt.ArrayLike, saved: LoRALinearSaved) -> Array:
        """Make all checks of `backward`, and return dy as rows (n, d_out)."""
        self.require_trainable("backward")
        _check.saved(op, saved, LoRALinearSaved)
        if saved.merged:
            raise RuntimeError(f"{op}: the layer was merged when this forward pass ran")
        if saved.z is None and not saved.alone:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        self._require_own(op, saved)
        d_out, dtype = self.weight.shape[0], self.weight.compute_dtype
        return _check.shaped(op, "dy", dy, (*saved.lead, d_out), dtype).reshape(math.prod(saved.lead), d_out)

    def _require_own(self, op: str, saved: LoRALinearSaved) -> None:
        """Raise ValueError if an array in `saved` does not fit this layer. The message names the array."""
        if saved.z is None:
            return
        if saved.x is None and self.reads_x:
            raise ValueError(f"{op}: this forward pass saved no x, which the gradient of B needs")
        if (saved.u is not None) != self.use_dora:
            raise ValueError(f"{op}: saved is from a layer {'without' if self.use_dora else 'with'} DoRA")
        n, (d_out, d_in) = math.prod(saved.lead), self.weight.shape
        updated = n if saved.active is None else len(saved.active)
        for name, array, shape in (
            ("x", saved.x, (n, d_in)), ("z", saved.z, (updated, self.rank)), ("u", saved.u, (n, d_out)),
        ):  # fmt: skip
            _check.kept(op, name, array, shape, self.weight.compute_dtype)

    def backward_part(self, du: Array, saved: LoRALinearSaved) -> _core.BackwardPart:
        """Add the gradient of m to dm (DoRA only); return this layer's argument for `_core.lora_backward`."""
        weight, a, b = self.weight.packed, self.A, self.B
        if saved.z is None or saved.active is not None:
            return _core.BackwardPart(
                weight=weight, a=a, b=b, scale=0.0, dropout=0.0, key=0, dy=du, z=None, da=None, db=None
            )
        if saved.u is not None:  # y = gain ∘ u, gain = m · inverse_norm
            assert self.dm is not None
            with quiet():
                self.dm += np.einsum("no,no->o", du, saved.u) * saved.inverse_norm
                du = du * saved.gain
        return _core.BackwardPart(
            weight=weight, a=a, b=b, scale=self.scale, dropout=saved.dropout, key=saved.key,
            dy=du, z=saved.z, da=self.dA, db=self.dB,
        )  # fmt: skip

    def explain(self, rows: int, training: bool = True) -> str:
        """Describe the method that a pass uses if x has `rows` rows, and the cost of each possible method.

        The layer chooses a method by counting floating-point operations, never by timing. The same call
        therefore gives the same bits on every machine with the same instruction set. The text describes the
        present state of the layer, and takes account of its switch `int8` and of `without_int8`. If the
        backward pass uses another arithmetic than the forward pass, as it does for 5 to 8 rows with
        compute="bfloat16", the line `backward` names its arithmetic. While the adapter is merged or
        disabled, the text does not mention the update. If `backward` would raise an error, the text has no
        line for `backward`. The costs of DoRA and of the gradients are the same for every method, so these
        costs are not shown.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(64), rank=4)
            >>> print(layer.explain(rows=128))  # doctest: +ELLIPSIS
            computes in: ...
            forward: ...
            backward: ...

        If a training pass rounds x and W to int8, the text has a line about the error of x Wᵀ. This error is
        measured by `int8_error`, for 16 rows of normally distributed numbers. Your own inputs may have
        outliers, so call `int8_error` with them too.

        Raises:
            ValueError: `rows` is below 1, or above the maximum number of rows of an array.
            TypeError: `rows` is not an integer.
        """
        rows = _check.integer("explain", "rows", rows, least=1, most=sys.maxsize)
        weight, scale, _ = self._core_terms(self._lone_weight()[0])
        dropout = bool(self.dropout) and training
        plan = _core.explain(weight, rows, self.rank if scale else 0, dropout, training, in_int8(self))
        if not training or self.merged:
            del plan["backward"]  # it would raise an error
        many = rows > _core.constants.small_batch
        if training and many and in_int8(self) and self.weight.compute == "int8" and not self.merged:
            plan["rounding to int8"] = self._usual_int8_error()
        return "\n".join(f"{name}: {text}" for name, text in plan.items())

    def _usual_int8_error(self) -> str:
        d_out, d_in = self.weight.shape
        x = np.random.default_rng((d_out, d_in)).standard_normal((SAMPLES, d_in), np.float32)
        error = self.weight.int8_error(x)
        return (
            f"changes x Wᵀ by {error.measured:.1%} of its norm, measured for normally distributed x "
            f"(at most {error.bound:.0%}, with the worst signs of all errors); int8_error measures your x"
        )

    def int8_error(self, x: npt.ArrayLike, samples: int = SAMPLES) -> Int8Error:
        """Measure how much rounding to int8 changes the product x Wᵀ with the frozen weight, and bound it.

        The update is computed in bfloat16 and is not part of the product. `layer.weight.int8_error` can
        also measure the product of a backward pass.

            >>> import nplora, numpy as np
            >>> rng = np.random.default_rng(0)
            >>> layer = nplora.LoRALinear(rng.standard_normal((64, 128)), rank=4, compute="int8")
            >>> layer.int8_error(rng.standard_normal((32, 128)))
            Int8Error(measured=0.0098, bound=0.21, of 16 rows and 16 outputs)

        Args:
            x: array (..., d_in), the input of the layer.
            samples: the most rows of x, and the most outputs of each row, that are compared.
        Raises:
            ValueError: the weight's compute is not "int8"; the last axis of x is not d_in; or `samples` is
                below 1.
        """
        return self.weight.int8_error(x, samples=samples)

    # ---- DoRA's norms ----

    def _row_norms(self) -> Array:
        """Return ‖W_o + s A_o B‖ for each row o, in float64, without forming A·B.

        In the formula, s is `scale`.

        ‖W_o + s A_o B‖² = ‖W_o‖² + 2 s A_o · (B W_oᵀ) + s² A_o (B Bᵀ) A_oᵀ
        """
        squares = self._frozen_squares.copy()
        if self.scale != 0:
            a, b, bw = (
                self.A.astype(np.float64),
                self.B.astype(np.float64),
                self.weight.matmul_unrounded(self.B),
            )
            gram, a_gram = np.empty((self.rank, self.rank)), np.empty_like(a)
            _core.matmul(b, b, None, gram)
            _core.matmul(gram, a, None, a_gram)
            squares += 2 * self.scale * np.einsum("or,ro->o", a, bw.astype(np.float64))
            squares += self.scale**2 * np.einsum("or,or->o", a_gram, a)
        return np.sqrt(np.maximum(squares, 0))

    def _inverse_norms(self) -> Array:
        norms = self._row_norms()
        return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms != 0)

    # ---- merging ----

    def merged_weight(self) -> Array:
        merged = super().merged_weight()
        if self.m is not None:
            with quiet():
                merged *= (self.m * self._inverse_norms()).astype(merged.dtype)[:, None]
        return merged

    def delta_weight(self) -> Array:
        return self.merged_weight() - self.weight.to_numpy() if self.use_dora else super().delta_weight()

    def frozen(self) -> Linear:
        self._require_whole_weight("frozen")
        return Linear(self.weight, self.bias)

    def unloaded(self, shared: SharedWeights) -> Linear:
        return Linear(self._merged_frozen(), self.bias)
