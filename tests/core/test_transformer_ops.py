"""The core's operations for language models against float64 NumPy, on awkward shapes."""

import math
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import nplora
import reference
from nplora import _core

Array = NDArray[Any]

U = 2.0**-24
EXP = 4 * U  # the relative error of one exponential


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def wide(*arrays: Array) -> list[Array]:
    return [array.astype(np.float64) for array in arrays]


def unwritten(*shape: int) -> Array:
    """NaN everywhere, so that a test fails if an element is not written."""
    return np.full(shape, np.nan, np.float32)


# ---- RMSNorm ----

ROWS = [(0, 4), (3, 0), (1, 1), (5, 7), (3, 16), (2, 33), (40, 576), (7, 1001), (1, 8192)]


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("n", "d"), ROWS)
def test_rms_norm_matches_the_oracle(n: int, d: int, eps: float, rng: np.random.Generator) -> None:
    x, weight, y = normal(rng, n, d), normal(rng, d), unwritten(n, d)
    _core.rms_norm(x, weight, eps, y)
    if d == 0:
        return
    exact = reference.rms_norm(*wide(x, weight), eps)
    # the mean of squares errs by gamma_(d + 2), its root by half of that, then four roundings
    assert (np.abs(y - exact) <= (reference.gamma(d + 2) / 2 + 5 * U) * np.abs(exact)).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("n", "d"), ROWS)
def test_rms_norm_backward_matches_the_oracle(
    n: int, d: int, accumulate: bool, rng: np.random.Generator
) -> None:
    dy, x, weight = normal(rng, n, d), normal(rng, n, d), normal(rng, d)
    before = normal(rng, n, d) if accumulate else unwritten(n, d)
    dx = before.copy()
    _core.rms_norm_backward(dy, x, weight, 1e-5, dx, accumulate)
    if d == 0:
        return
    dy, x, weight = wide(dy, x, weight)
    exact = reference.rms_norm_backward(dy, x, weight, 1e-5) + (before if accumulate else 0)
    r = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    along = np.abs(x) * r**3 * np.abs(dy * weight * x).mean(axis=-1, keepdims=True)
    magnitude = r * np.abs(dy * weight) + along + (np.abs(before) if accumulate else 0)
    assert (np.abs(dx - exact) <= reference.gamma(3 * d + 12) * magnitude).all()


def test_rms_norm_backward_of_nothing_is_finite_where_its_forward_is() -> None:
    x, dx = np.zeros((1, 8), np.float32), unwritten(1, 8)
    _core.rms_norm_backward(np.ones_like(x), x, np.ones(8, np.float32), 1e-30, dx, False)
    np.testing.assert_allclose(dx, 1e15, rtol=1e-5)


def test_rms_norm_backward_of_the_oracle_is_the_slope_of_its_forward(rng: np.random.Generator) -> None:
    x, weight, c = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal((3, 8))
    dx = reference.rms_norm_backward(c, x, weight, 1e-3)
    assert (
        reference.gradient_error(
            lambda: float((c * reference.rms_norm(x, weight, 1e-3)).sum()), [(x, dx)], rng
        )
        <= 1e-6
    )


# ---- RoPE ----


def rotary_table(angles: Array) -> Array:
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("n", "heads", "head_dim", "rotary_dim"),
    [
        (0, 2, 4, 4),
        (1, 1, 2, 2),
        (5, 3, 6, 6),
        (9, 2, 16, 16),
        (33, 9, 64, 64),
        (7, 1, 250, 250),
        (0, 2, 4, 2),
        (1, 1, 3, 2),
        (5, 3, 7, 6),
        (9, 2, 37, 10),
        (33, 9, 64, 48),
        (200, 5, 128, 96),  # Phi-4-mini's heads, on two threads
        (7, 1, 251, 190),
    ],
)
def test_rope_turns_the_first_pairs_of_each_head_forward_and_back(
    n: int, heads: int, head_dim: int, rotary_dim: int, interleaved: bool, rng: np.random.Generator
) -> None:
    angles = rng.uniform(-40, 40, (50, rotary_dim // 2))
    table, positions, x = rotary_table(angles), rng.integers(0, 50, n), normal(rng, n, heads, head_dim)
    turned = x.copy()
    rows = turned.reshape(n, heads * head_dim)
    _core.rope(rows, positions, table, interleaved, False, head_dim)
    head = x[..., :rotary_dim].astype(np.float64)
    exact = reference.rope(head, angles[positions], interleaved)
    size = reference.rope(np.square(head), 0 * angles[positions], True)
    longest = 2 * np.sqrt(size.max(initial=0))  # the length of a pair
    assert (np.abs(turned[..., :rotary_dim] - exact) <= 4 * U * longest).all()
    np.testing.assert_array_equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    _core.rope(rows, positions, table, interleaved, True, head_dim)
    assert (np.abs(turned - x) <= 8 * U * longest).all()


def test_rope_refuses_positions_and_widths_that_do_not_fit() -> None:
    x, table = np.ones((2, 4), np.float32), rotary_table(np.zeros((3, 2)))
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f"positions holds {bad}, expected at least 0 and below 3"):
            _core.rope(x, np.array([0, bad], np.int64), table, False, False, head_dim=4)
    places = np.array([0, 1], np.int64)
    for rotary_dim in (0, 3, 6):
        table = np.ones((3, rotary_dim), np.float32)
        with pytest.raises(ValueError, match="table must have an even width of at most head_dim"):
            _core.rope(x, places, table, False, False, head_dim=4)
    for head_dim in (0, 3, 8):
        with pytest.raises(ValueError, match=r"x must have a width of heads \* head_dim"):
            _core.rope(x, places, np.ones((3, 2), np.float32), False, False, head_dim=head_dim)
    assert (x == 1).all()


# ---- LayerNorm ----


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "d"), [row for row in ROWS if row[1] > 0])
def test_layer_norm_matches_the_oracle(n: int, d: int, biased: bool, rng: np.random.Generator) -> None:
    x, weight, y = 3 + normal(rng, n, d), normal(rng, d), unwritten(n, d)
    bias = normal(rng, d) if biased else None
    _core.layer_norm(x, weight, bias, 1e-5, y)
    added = np.zeros(d) if bias is None else bias
    exact = reference.layer_norm(*wide(x, weight, added), 1e-5)
    # the mean errs by gamma_d times the mean magnitude, which is divided by the deviation
    scale = np.abs(x).max(axis=1, initial=0, keepdims=True) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    rounded = 4 * U * (np.abs(exact) + np.abs(added))
    assert (np.abs(y - exact) <= reference.gamma(2 * d + 8) * (1 + scale) * np.abs(weight) + rounded).all()


def test_add_layer_norm_is_layer_norm_of_the_sum(rng: np.random.Generator) -> None:
    x, total, weight, bias = normal(rng, 70, 33), normal(rng, 70, 33), normal(rng, 33), normal(rng, 33)
    wanted, y, exact = x + total, unwritten(70, 33), unwritten(70, 33)
    _core.add_layer_norm(x, total, weight, bias, 1e-5, y)
    assert np.array_equal(total, wanted)
    _core.layer_norm(wanted, weight, bias, 1e-5, exact)
    assert np.array_equal(y, exact)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("n", "d"), [row for row in ROWS if row[1] > 0])
def test_layer_norm_backward_matches_the_oracle(
    n: int, d: int, accumulate: bool, rng: np.random.Generator
) -> None:
    dy, x, weight = normal(rng, n, d), normal(rng, n, d), normal(rng, d)
    before = normal(rng, n, d) if accumulate else unwritten(n, d)
    dx = before.copy()
    _core.layer_norm_backward(dy, x, weight, 0.01, dx, accumulate)
    exact = reference.layer_norm_backward(*wide(dy, x, weight), 0.01)
    r = 1 / np.sqrt(x.var(axis=1, keepdims=True) + 0.01)
    widest = 1 + np.abs(x).max(axis=1, initial=0, keepdims=True) * r
    size = r * widest**2 * np.abs(dy * weight).max(axis=1, initial=0, keepdims=True)
    added = before if accumulate else np.zeros_like(dx)
    assert (np.abs(dx - added - exact) <= reference.gamma(4 * d + 16) * size + 2 * U * np.abs(added)).all()
    _core.layer_norm_backward(dy, x, weight, 0.01, dy, False)
    if not accumulate:
        assert np.array_equal(dy, dx)


def test_layer_norm_backward_of_the_oracle_is_the_slope_of_its_forward(rng: np.random.Generator) -> None:
    x, c, weight, bias = (rng.standard_normal(shape) for shape in ((3, 8), (3, 8), 8, 8))
    dx = reference.layer_norm_backward(c, x, weight, 1e-3)
    assert (
        reference.gradient_error(
            lambda: float((c * reference.layer_norm(x, weight, bias, 1e-3)).sum()), [(x, dx)], rng
        )
        <= 1e-6
    )


# ---- the exact GELU, and activations without a gate ----


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (40, 1536), (1, 16400)])
def test_the_exact_gelu_matches_the_oracle(
    shape: tuple[int, int], spread: float, rng: np.random.Generator
) -> None:
    x, dout, out, dx = spread * normal(rng, *shape), normal(rng, *shape), unwritten(*shape), unwritten(*shape)
    _core.activated("gelu", x, out)
    _core.activated_backward("gelu", dout, x, dx)
    g, d = wide(x, dout)
    phi = reference.normal_distribution(g)
    # the polynomial errs by 2 U; exp by EXP, and by the rounding of its argument, about g² / 2
    error = 2 * EXP + 16 * U + 2 * U * g * g * (g < 0)
    tiny = 1e-36 * (1 + np.abs(g) ** 3)
    assert (np.abs(out - g * phi) <= error * np.abs(g * phi) + tiny).all()
    exact, _ = reference.gated_backward("gelu", d, g, np.ones_like(g))
    density = np.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    size = np.abs(d) * (error * phi + (EXP + (6 + g * g) * U) * np.abs(g) * density)
    assert (np.abs(dx - exact) <= size + 4 * U * np.abs(exact) + tiny).all()


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_an_activation_is_a_gated_unit_whose_up_is_1(act: str, rng: np.random.Generator) -> None:
    x, dout, one = normal(rng, 7, 33), normal(rng, 7, 33), np.ones((7, 33), np.float32)
    out, gated, dx, dgate, dup = (unwritten(7, 33) for _ in range(5))
    _core.activated(act, x, out)
    _core.gated(act, x, one, gated)
    _core.activated_backward(act, dout, x, dx)
    _core.gated_backward(act, dout, x, one, dgate, dup)
    assert np.array_equal(out, gated)
    assert np.array_equal(dx, dgate)
    _core.activated_backward(act, dout, x, dout)  # in place
    assert np.array_equal(dout, dx)


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1024), (5, 7000)])
def test_an_activation_of_bits_is_that_of_the_widened_numbers(
    shape: tuple[int, int], rng: np.random.Generator
) -> None:
    dout, x = (rng.normal(0, 2, shape).astype(np.float32) for _ in range(2))
    bits, expected = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    out, same, dx = (unwritten(*shape) for _ in range(3))
    _core.activated("gelu", x, out)
    _core.activated_narrow("gelu", x, same, bits)
    assert np.array_equal(out, same)
    _core.narrow(x, "bfloat16", expected)
    assert np.array_equal(bits, expected)
    _core.widen(bits, "bfloat16", x)
    _core.activated("gelu", x, out)
    _core.activated("gelu", bits, same)
    assert np.array_equal(out, same)
    _core.activated_backward("gelu", dout, x, dx)
    _core.activated_backward("gelu", dout, bits, dout)  # in place
    assert np.array_equal(dout, dx)
    _core.activated_narrow("gelu", x, x, expected)  # in place
    assert np.array_equal(x, out)
    assert np.array_equal(expected, bits)
    with pytest.raises(ValueError, match="bits must have shape"):
        _core.activated_narrow("gelu", x, out, bits[:, :0])


# ---- gated units ----

ACTS = ("silu", "gelu_pytorch_tanh")


def sigmoid_error(act: str, g: Array) -> Array:
    """A bound on the relative error of σ(p), from exp, two operations, and GELU's p."""
    p = np.abs(g if act == "silu" else 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
    return np.asarray(EXP + 4 * U + (0 if act == "silu" else 4 * U) * p * (g < 0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1024), (5, 7000)])
def test_a_gated_unit_of_bits_is_that_of_the_widened_numbers(
    shape: tuple[int, int], rng: np.random.Generator
) -> None:
    dout, gate, up = (rng.normal(0, 2, shape).astype(np.float32) for _ in range(3))
    gate_bits, up_bits = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    out, same, dgate, dup = (unwritten(*shape) for _ in range(4))
    _core.gated("silu", gate, up, out)
    _core.gated_narrow("silu", gate, up, same, gate_bits, up_bits)
    assert np.array_equal(out, same)
    for values, bits in ((gate, gate_bits), (up, up_bits)):
        expected = np.empty(shape, np.uint16)
        _core.narrow(values, "bfloat16", expected)
        assert np.array_equal(bits, expected)
        _core.widen(bits, "bfloat16", values)
    _core.gated("silu", gate, up, out)
    _core.gated("silu", gate_bits, up_bits, same)
    assert np.array_equal(out, same)
    _core.gated_narrow("silu", gate, up, gate, expected, up_bits)  # in place
    assert np.array_equal(gate, out)
    assert np.array_equal(expected, gate_bits)
    _core.widen(gate_bits, "bfloat16", gate)
    _core.gated_backward("silu", dout, gate_bits, up_bits, dgate, dup)
    for inputs in ((gate, up), (gate_bits, up_bits)):
        gradient, of_up = dout.copy(), unwritten(*shape)
        _core.gated_backward("silu", gradient, *inputs, gradient, of_up)  # in place
        assert np.array_equal(gradient, dgate)
        assert np.array_equal(of_up, dup)
    _core.gated_backward("silu", dout, gate, up, gate, up)
    assert np.array_equal(dgate, gate)
    assert np.array_equal(dup, up)
    with pytest.raises(ValueError, match="up_bits must have shape"):
        _core.gated_narrow("silu", gate, up, same, gate_bits, up_bits[:0])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (40, 1536), (1, 16400)])
def test_gated_and_its_backward_match_the_oracle(
    shape: tuple[int, int], spread: float, act: str, rng: np.random.Generator
) -> None:
    gate, up, dout = (spread * normal(rng, *shape), normal(rng, *shape), normal(rng, *shape))
    out, dgate, dup = unwritten(*shape), unwritten(*shape), unwritten(*shape)
    _core.gated(act, gate, up, out)
    _core.gated_backward(act, dout, gate, up, dgate, dup)
    g, u, d = wide(gate, up, dout)
    exact = reference.gated(act, g, u)
    exact_dgate, exact_dup = reference.gated_backward(act, d, g, u)
    error = sigmoid_error(act, g)
    tiny = 1e-36 * (1 + np.abs(u) + np.abs(d * u)) * (1 + np.abs(g) ** 3)  # where exp(-p) overflows
    assert (np.abs(out - exact) <= (error + 2 * U) * np.abs(exact) + tiny).all()
    assert (np.abs(dup - exact_dup) <= (error + 2 * U) * np.abs(exact_dup) + tiny).all()
    root = 2 * np.sqrt(2 / np.pi)
    p, slope = (g, g) if act == "silu" else (root * (g + 0.044715 * g**3), root * (g + 3 * 0.044715 * g**3))
    s = 1 / (1 + np.exp(-np.clip(p, -700, 700)))
    magnitude = np.abs(d * u) * s * (1 + np.abs(slope) * (1 - s + 2 * U))
    assert (
        np.abs(dgate - exact_dgate)
        <= 2 * (error + 4 * U) * magnitude + 2 * U * np.abs(d * u * slope) * s + tiny
    ).all()

    _core.gated_backward(act, dout, gate, up, gate, up)
    assert np.array_equal(gate, dgate)
    assert np.array_equal(up, dup)


def test_the_oracle_of_gelu_is_that_of_the_paper(rng: np.random.Generator) -> None:
    x = rng.uniform(-3, 3, 100)
    paper = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert np.abs(reference.gelu_tanh(x) - paper).max() < 1e-14


@pytest.mark.parametrize("act", [*ACTS, "gelu"])
def test_gated_backward_of_the_oracle_is_the_slope_of_its_forward(act: str, rng: np.random.Generator) -> None:
    gate, up, c = (rng.standard_normal((3, 8)) for _ in range(3))
    pairs = list(zip((gate, up), reference.gated_backward(act, c, gate, up), strict=True))
    assert (
        reference.gradient_error(lambda: float((c * reference.gated(act, gate, up)).sum()), pairs, rng)
        <= 1e-6
    )


@pytest.mark.parametrize("act", [*ACTS, "gelu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e4, 1e4, 0.0])
def test_gated_saturates_and_propagates(value: float, act: str) -> None:
    gate, up = np.full((1, 3), value, np.float32), np.full((1, 3), 2, np.float32)
    out = unwritten(1, 3)
    _core.gated(act, gate, up, out)
    expected = {-1e4: 0.0, 1e4: 2e4, 0.0: 0.0, np.inf: np.inf}.get(value, np.nan)
    assert np.array_equal(out, np.full((1, 3), expected), equal_nan=True)


def test_an_unknown_activation_is_refused() -> None:
    x = np.ones((1, 3), np.float32)
    for call in (lambda: _core.gated("relu", x, x, x), lambda: _core.gated_backward("relu", x, x, x, x, x)):
        with pytest.raises(ValueError, match="act is 'relu', expected silu, gelu_pytorch_tanh or gelu"):
            call()


# ---- attention ----


class Case(NamedTuple):
    """Packed sequences of these lengths."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    causal: bool = True
    biased: bool = False  # numbers for each distance are added to the scores


CASES = [
    Case((), 2, 1, 4),
    Case((0, 1, 0), 1, 1, 1),
    Case((1, 2, 3), 3, 1, 2),
    Case((5, 17), 2, 2, 16),
    Case((49,), 1, 1, 30),
    Case((65, 3, 130), 9, 3, 64),
    Case((200,), 7, 1, 22),
    Case((70,), 4, 2, 128),
    Case((40, 33), 2, 1, 256),
    Case((3,), 60, 1, 6),
    Case((150,), 2, 2, 80, 1),
    Case((150, 20), 6, 2, 16, 7),
    Case((130, 7), 4, 4, 16, 9),  # a tile of queries sees fewer than 64 keys, but in two tiles of keys
    Case((300,), 3, 1, 64, 64),
    Case((700,), 2, 1, 48, 513),
    Case((700, 530), 3, 1, 17),
    Case((1100,), 1, 1, 64, 100),
    Case((0, 1, 2, 3), 3, 1, 2, causal=False),
    Case((5, 17, 11), 2, 2, 16, causal=False),
    Case((200, 49), 6, 2, 22, causal=False),
    Case((700, 530, 65), 3, 1, 17, causal=False),
    Case((150, 20, 1), 6, 2, 16, 7, causal=False),
    Case((700, 12), 2, 1, 48, 65, causal=False),
    Case((1100, 300), 1, 1, 64, 100, causal=False),
    Case((150,), 2, 2, 80, 1, causal=False),
    Case((3, 11, 1), 6, 6, 8, causal=False, biased=True),
    Case((300, 40, 5), 6, 2, 16, causal=False, biased=True),
    Case((130, 7), 4, 4, 16, 9, biased=True),
    Case(
        (300,), 36, 12, 16, 20
    ),  # long blocks, and windows that begin in one tile of keys and end in another
]


class Attention:
    """Inputs and results of one case, and the oracle's results."""

    def __init__(self, case: Case, seed: int = 0, bfloat16: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.case, self.bfloat16 = case, bfloat16
        self.starts = np.cumsum((0, *case.lengths), dtype=np.int64)
        n, self.scale = int(self.starts[-1]), 1 / math.sqrt(case.dim)
        self.q, self.dout = (normal(rng, n, case.heads * case.dim) for _ in range(2))
        self.k, self.v = (normal(rng, n, case.kv_heads * case.dim) for _ in range(2))
        self.out, self.lse = unwritten(*self.q.shape), unwritten(n, case.heads)
        self.dq, self.dk, self.dv = (unwritten(*x.shape) for x in (self.q, self.k, self.v))
        self.reach = max(case.lengths, default=1) + 2  # more columns than are needed
        self.bias = normal(rng, case.heads, 2 * self.reach + 1) if case.biased else None

    def bias_of(self, head: int, tokens: int) -> Array | None:
        """The numbers of one head for the distances in a sequence."""
        middle = self.reach
        return None if self.bias is None else self.bias[head, middle - tokens + 1 : middle + tokens]

    @property
    def options(self) -> tuple[int, int, float, int]:
        return self.case.heads, self.case.kv_heads, self.scale, self.case.window

    def forward(self) -> None:
        results = self.out, self.lse
        _core.attention(self.q, self.k, self.v, self.starts, *self.options, *results, *self.more)

    def backward(self) -> None:
        saved = (self.q, self.k, self.v, self.out, self.lse)
        results = self.dq, self.dk, self.dv
        _core.attention_backward(self.dout, *saved, self.starts, *self.options, *results, *self.more)

    @property
    def more(self) -> tuple[bool, bool, Array | None]:
        return self.bfloat16, self.case.causal, self.bias

    def results(self) -> list[Array]:
        return [self.out, self.lse, self.dq, self.dk, self.dv]

    def by_head(self, x: Array, heads: int) -> list[list[Array]]:
        return reference.grouped_heads(x, heads, self.starts)


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_backward_match_the_whole_matrix(case: Case, bfloat16: bool) -> None:
    run = Attention(case, bfloat16=bfloat16)
    pair = 2.0**-8 if bfloat16 else 0  # a product of two factors that were rounded to bfloat16
    run.forward()
    run.backward()
    group = case.heads // case.kv_heads
    q, out, dout, dq = (run.by_head(x, case.heads) for x in (run.q, run.out, run.dout, run.dq))
    k, v, dk, dv = (run.by_head(x, case.kv_heads) for x in (run.k, run.v, run.dk, run.dv))
    for sequence, t in enumerate(case.lengths):
        if t == 0:
            continue
        lse = run.lse[run.starts[sequence] : run.starts[sequence + 1]]
        for kv_head in range(case.kv_heads):
            keys, values = k[sequence][kv_head], v[sequence][kv_head]
            dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
            bound_k, bound_v = np.zeros_like(keys), np.zeros_like(values)
            for head in range(kv_head * group, (kv_head + 1) * group):
                queries, gradient = q[sequence][head], dout[sequence][head]
                bias = run.bias_of(head, t)
                arguments = queries, keys, values, run.scale, case.window, case.causal, bias
                exact, exact_lse, p = reference.attention(*arguments)
                # a score has this error (its sum, the scaled query, lse beside it), p the same relative error
                score = (reference.gamma(case.dim + 3) + pair) * run.scale * np.abs(queries) @ np.abs(keys).T
                score = np.where(reference.sees(t, t, case.window, case.causal), score, 0)
                if bias is not None:
                    score += 4 * U * np.abs(bias).max()
                off = score.max(axis=1) * 2 + EXP + reference.gamma(t + 8)
                assert (np.abs(lse[:, head] - exact_lse) <= off + 4 * U * np.abs(exact_lse)).all()
                size = p @ np.abs(values)
                assert (np.abs(out[sequence][head] - exact) <= (2 * off[:, None] + pair) * size).all()

                eq, ek, ev = reference.attention_backward(gradient, *arguments)
                dkeys += ek
                dvalues += ev
                dp = np.abs(gradient) @ np.abs(values).T
                # ds = p (dp - delta): both have errors relative to their sums of magnitudes
                delta = (np.abs(gradient) * (p @ np.abs(values))).sum(axis=1, keepdims=True)
                sums = reference.gamma(2 * case.dim + 8) + 2 * pair  # of dp, and then of dq or dk
                ds = run.scale * p * (dp + delta) * (4 * off[:, None] + sums)
                assert (
                    np.abs(dq[sequence][head] - eq)
                    <= ds @ np.abs(keys)
                    + reference.gamma(t) * np.abs(run.scale * p * (dp + delta)) @ np.abs(keys)
                ).all()
                rounds = reference.gamma(t * group + 4)
                bound_k += ds.T @ np.abs(queries) + rounds * (run.scale * p * (dp + delta)).T @ np.abs(
                    queries
                )
                bound_v += (p * (2 * off[:, None] + rounds + pair)).T @ np.abs(gradient)
            assert (np.abs(dk[sequence][kv_head] - dkeys) <= bound_k).all()
            assert (np.abs(dv[sequence][kv_head] - dvalues) <= bound_v).all()


def test_attention_in_bfloat16_rounds_its_products() -> None:
    narrow, wide = Attention(Case((70, 33), 4, 2, 32), bfloat16=True), Attention(Case((70, 33), 4, 2, 32))
    for run in (narrow, wide):
        run.forward()
        run.backward()
    for ours, theirs in zip(narrow.results(), wide.results(), strict=True):
        assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-2


@pytest.mark.parametrize("case", [Case((1,) * 40, 6, 2, 22), Case((150,), 2, 2, 80, 1)], ids=str)
def test_a_query_that_sees_one_key_has_no_gradient_of_its_score(case: Case) -> None:
    """Its weight is 1 whatever the score is."""
    run = Attention(case)
    run.forward()
    run.backward()
    assert not run.dq.any()
    assert not run.dk.any()


@pytest.mark.parametrize("case", [Case((1, 2, 3), 3, 1, 2), Case((5, 17), 2, 2, 16)], ids=str)
def test_gradients_of_attention_with_huge_scores_stay_bounded(case: Case) -> None:
    """The last bit of a score of 1e10 is 1,024. Backward computes it in another order and may exceed lse."""
    run = Attention(case)
    run.q *= 1e5
    run.k *= 1e5
    run.forward()
    run.backward()
    group, factor = case.heads // case.kv_heads, 1 + 1e-4
    q, dout, dq = (run.by_head(np.abs(x), case.heads) for x in (run.q, run.dout, run.dq))
    k, v, dk, dv = (run.by_head(np.abs(x), case.kv_heads) for x in (run.k, run.v, run.dk, run.dv))
    for sequence, t in enumerate(case.lengths):
        sees = reference.sees(t, t, case.window)
        for kv_head in range(case.kv_heads):
            keys, values = k[sequence][kv_head], v[sequence][kv_head]
            bound_k, bound_v = np.zeros_like(keys), np.zeros_like(values)
            for head in range(kv_head * group, (kv_head + 1) * group):
                dp = np.where(sees, dout[sequence][head] @ values.T, 0)
                ds = run.scale * np.where(sees, dp + dp.max(axis=1, keepdims=True), 0)  # p <= 1
                assert (dq[sequence][head] <= factor * ds @ keys).all()
                bound_k += ds.T @ q[sequence][head]
                bound_v += sees.T @ dout[sequence][head]
            assert (dk[sequence][kv_head] <= factor * bound_k).all()
            assert (dv[sequence][kv_head] <= factor * bound_v).all()


@pytest.mark.parametrize("window", [0, 3])
def test_attention_backward_of_the_oracle_is_the_slope_of_its_forward(
    window: int, rng: np.random.Generator
) -> None:
    q, k, v, c = (rng.standard_normal((9, 4)) for _ in range(4))
    pairs = list(zip((q, k, v), reference.attention_backward(c, q, k, v, 0.5, window), strict=True))
    assert (
        reference.gradient_error(
            lambda: float((c * reference.attention(q, k, v, 0.5, window)[0]).sum()), pairs, rng
        )
        <= 1e-6
    )


def test_attention_has_the_sliding_window_of_transformers(rng: np.random.Generator) -> None:
    """With window = 1, a query sees only itself."""
    run = Attention(Case((20,), 2, 2, 8, 1))
    run.forward()
    np.testing.assert_allclose(run.out, run.v, rtol=1e-6)


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize(
    "case",
    [
        Case((700, 30), 3, 1, 64),
        Case((300, 65), 4, 4, 32, 50),
        Case((700, 30), 3, 1, 64, causal=False, biased=True),
    ],
    ids=str,
)
def test_attention_has_the_same_bits_on_any_number_of_threads(case: Case) -> None:
    results = []
    for threads in (1, 2, 5):
        nplora.set_num_threads(threads)
        run = Attention(case)
        run.forward()
        run.backward()
        results.append(run.results())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_their_own_sequence_and_no_other(name: str, value: float) -> None:
    case = Case((30, 70, 40), 4, 2, 16)
    clean, spoilt = Attention(case), Attention(case)
    getattr(spoilt, name)[30, 5] = value  # the first token of the second sequence
    for run in (clean, spoilt):
        run.forward()
        run.backward()
    others = np.r_[0:30, 100:140]
    for a, b in zip(clean.results(), spoilt.results(), strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a[others], b[others])
    assert not all(np.isfinite(a[30:100]).all() for a in spoilt.results())
    if name == "v" or (name == "k" and np.isnan(value)):  # which all later tokens see
        assert (~np.isfinite(spoilt.out[30:100])).any(axis=1).all()


def test_large_scores_do_not_overflow() -> None:
    run = Attention(Case((100,), 2, 1, 16))
    run.q *= 1e4
    run.k *= 1e4
    run.forward()
    run.backward()
    for result in run.results():
        assert np.isfinite(result).all()
    exact = reference.attention(
        *(run.by_head(x, 2)[0][0] for x in (run.q,)),
        *(run.by_head(x, 1)[0][0] for x in (run.k, run.v)),
        run.scale,
        0,
    )[0]
    np.testing.assert_allclose(run.out[:, :16], exact, atol=0.02)


@pytest.mark.parametrize(
    "case", [Case((150,), 9, 3, 64), Case((90,), 4, 2, 20, 11), Case((600,), 1, 1, 32)], ids=str
)
@pytest.mark.parametrize("pieces", [1, 4, 1000])
def test_cached_attention_equals_attention_over_the_whole_sequence(case: Case, pieces: int) -> None:
    """A prompt in one part, a few parts, and token by token, for several sequences with alternating rows."""
    first, second = Attention(case, seed=1), Attention(case, seed=2)
    for run in (first, second):
        run.forward()
    (t,) = case.lengths
    keys, values = (np.full((3, t + 5, case.kv_heads * case.dim), np.nan, np.float32) for _ in range(2))
    for slot, run in ((2, first), (0, second)):
        keys[slot, :t], values[slot, :t] = run.k, run.v
    for rows in np.array_split(np.arange(t, dtype=np.int64), min(pieces, t)):
        q = np.concatenate([first.q[rows], second.q[rows]])
        slots = np.repeat(np.array([2, 0], np.int64), len(rows))
        out = unwritten(*q.shape)
        _core.attention_cached(
            q, keys, values, own_pages(keys), slots, np.tile(rows + 1, 2), *first.options, out
        )
        np.testing.assert_allclose(
            out, np.concatenate([first.out[rows], second.out[rows]]), rtol=2e-5, atol=2e-6
        )


def own_pages(keys: np.ndarray) -> np.ndarray:
    """The table of a cache in which each slot has one page, its own."""
    return np.arange(len(keys), dtype=np.int64)[:, None]


@pytest.mark.parametrize("group", [1, 3, 8, 11, 13])
@pytest.mark.parametrize("dim", [2, 16, 63, 64, 128])
def test_decoding_matches_the_whole_matrix(group: int, dim: int, rng: np.random.Generator) -> None:
    lengths = np.array([1, 7, 256, 257, 700], np.int64)
    keys, values = normal(rng, 5, 700, 2 * dim), normal(rng, 5, 700, 2 * dim)
    slots = np.array([4, 0, 0, 2, 1], np.int64)
    q, out = normal(rng, 5, 2 * group * dim), unwritten(5, 2 * group * dim)
    _core.attention_cached(q, keys, values, own_pages(keys), slots, lengths, 2 * group, 2, 0.2, 0, out)
    for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        for head in range(2 * group):
            at, kv = (
                slice(head * dim, (head + 1) * dim),
                slice(head // group * dim, (head // group + 1) * dim),
            )
            k, v = wide(keys[slot, :length, kv], values[slot, :length, kv])
            query = q[i : i + 1, at].astype(np.float64)
            exact, _, p = reference.attention(query, k, v, 0.2, 0)
            off = reference.gamma(2 * dim + 6) * 0.2 * (np.abs(query) @ np.abs(k.T)).max()
            bound = (2 * off + EXP + reference.gamma(length + 8)) * 2 * (p @ np.abs(v))
            assert (np.abs(out[i, at] - exact[0]) <= bound[0]).all()


@pytest.mark.parametrize("page", [16, 48, 64])
@pytest.mark.parametrize("window", [0, 37, 300])
@pytest.mark.parametrize("group", [1, 3, 7, 13])
def test_the_bits_of_attention_do_not_depend_on_pages_or_on_the_other_rows(
    page: int, window: int, group: int, rng: np.random.Generator
) -> None:
    """A prompt in one piece and in several, and single queries, with one page and with shuffled pages."""
    n, dim = 600, 24
    q, keys, values = normal(rng, n, 2 * group * dim), normal(rng, 1, n, 2 * dim), normal(rng, 1, n, 2 * dim)
    table = rng.permutation(-(-n // page) + 3)[None, : -(-n // page)].astype(np.int64)
    paged_keys, paged_values = (np.full((table.max() + 1, page, 2 * dim), np.nan, np.float32) for _ in "kv")
    for position in range(n):
        cell = table[0, position // page], position % page
        paged_keys[cell], paged_values[cell] = keys[0, position], values[0, position]

    def run(rows: np.ndarray, paged: bool) -> np.ndarray:
        held = (paged_keys, paged_values, table) if paged else (keys, values, own_pages(keys))
        out, slots = unwritten(len(rows), q.shape[1]), np.zeros(len(rows), np.int64)
        options = 2 * group, 2, 0.2, window, out
        _core.attention_cached(np.ascontiguousarray(q[rows]), *held, slots, rows + 1, *options)
        return out

    whole = run(np.arange(n, dtype=np.int64), False)
    for begin, end in ((0, 600), (0, 37), (37, 300), (300, 333), (333, 600)):
        np.testing.assert_array_equal(run(np.arange(begin, end, dtype=np.int64), True), whole[begin:end])
    single = np.array([0, 15, 17, 63, 65, 300, 511, 599], np.int64)  # neighbours would be one run
    together = run(single, False)
    np.testing.assert_array_equal(run(single, True), together)
    np.testing.assert_array_equal(
        np.concatenate([run(single[i : i + 1], True) for i in range(len(single))]), together
    )


def test_attention_refuses_arrays_that_do_not_fit() -> None:
    run = Attention(Case((4,), 2, 1, 4))
    rest = run.out, run.lse
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads"):
        _core.attention(run.q, run.k, run.v, run.starts, 2, 3, 1.0, 0, *rest)
    with pytest.raises(ValueError, match="width of kv_heads"):
        _core.attention(run.q, run.k, run.v, run.starts, 2, 2, 1.0, 0, *rest)
    with pytest.raises(ValueError, match="window must be at least 0"):
        _core.attention(run.q, run.k, run.v, run.starts, 2, 1, 1.0, -1, *rest)
    for starts in ([0, 3], [1, 4], [0, 5, 4], [0, -1, 4], []):
        with pytest.raises(ValueError, match="starts must ascend from 0"):
            _core.attention(run.q, run.k, run.v, np.array(starts, np.int64), 2, 1, 1.0, 0, *rest)
    cache = np.zeros((2, 3, 4), np.float32)
    for slot, length, message in (
        (2, 1, "slots holds 2"),
        (0, 4, "lengths holds 4"),
        (0, 0, "lengths holds 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.attention_cached(
                *(run.q[:1], cache, cache, own_pages(cache)),
                *(np.array([slot], np.int64), np.array([length], np.int64)),
                *(2, 1, 1.0, 0, run.out[:1]),
            )
    slots, lengths = np.array([[0], [1]], np.int64)
    for pages, message in (
        ([[0], [2]], "pages holds 2"),
        ([[0], [-1]], "pages holds -1"),
        ([[0, 1]], "must be a multiple of 16"),
        ([0, 1], "pages must have 2 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.attention_cached(
                run.q[:1], cache, cache, np.array(pages, np.int64), slots, lengths,
                2, 1, 1.0, 0, run.out[:1],
            )  # fmt: skip
    assert np.isnan(run.out).all()


@pytest.mark.parametrize("window", [5, 2**40, 2**62, 2**63 - 1])
def test_a_window_longer_than_the_sequence_has_no_effect(window: int) -> None:
    narrow, whole = (Attention(Case((5,), 4, 2, 8, window=w)) for w in (window, 0))
    narrow.forward(), whole.forward()
    np.testing.assert_array_equal(narrow.out, whole.out)


WRITER = """
import sys, threading
import numpy as np
from nplora import _core

n, indices = 20_000, np.zeros(20_000, np.int64)
rows, table, losses = np.ones((n, 16), np.float32), np.ones((4, 16), np.float32), np.empty(n)
done = False

def write():
    while not done:
        indices[:] = 1 << 40
        indices[:] = 0

thread = threading.Thread(target=write)
thread.start()
for _ in range(300):
    try:
        if sys.argv[1] == "rope":
            _core.rope(rows, indices, table, False, False, 16)
        else:
            _core.cross_entropy(rows, indices, 1.0, losses, True)
    except ValueError:
        pass
done = True
thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rope", "cross_entropy"])
def test_indices_changed_by_another_thread_never_reach_memory_outside(kernel: str) -> None:
    subprocess.run([sys.executable, "-c", WRITER, kernel], check=True, timeout=60)


# ---- cross-entropy ----


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("n", "vocab"), [(0, 3), (1, 1), (3, 2), (5, 17), (7, 2048), (4, 2049), (6, 49152), (2, 100003)]
)
def test_cross_entropy_and_its_gradient_match_the_oracle(
    n: int, vocab: int, gradient: bool, rng: np.random.Generator
) -> None:
    logits, targets = 3 * normal(rng, n, vocab), rng.integers(0, vocab, n)
    targets[1::3] = -100
    given, losses = logits.copy(), np.full(n, np.nan)
    _core.cross_entropy(given, targets, 0.25, losses, gradient)
    if not gradient:
        assert np.array_equal(given, logits)
    off = EXP + reference.gamma(min(vocab, 2048) + 8)  # exp(x - max) has an additional error of |x - max| u
    for i, target in enumerate(targets):
        if target == -100:
            assert losses[i] == 0
            assert not gradient or not given[i].any()
            continue
        row = logits[i].astype(np.float64)
        lse = np.logaddexp.reduce(row)
        assert abs(losses[i] - (lse - row[target])) <= off + 40 * U
        if gradient:
            p = np.exp(row - lse)
            one_hot = np.arange(vocab) == target
            bound = (off + 4 * U + (row.max() - row) * U) * 2 * p + 2 * U * one_hot
            assert (np.abs(given[i] - 0.25 * (p - one_hot)) <= 0.25 * bound).all()


def test_cross_entropy_leaves_ignored_rows_unread() -> None:
    logits = np.full((2, 5), np.nan, np.float32)
    logits[1] = 0
    losses = np.empty(2)
    _core.cross_entropy(logits, np.array([-100, 2], np.int64), 1.0, losses, True)
    np.testing.assert_allclose(losses, [0, math.log(5)], rtol=1e-7)
    np.testing.assert_allclose(logits, [[0] * 5, [0.2, 0.2, -0.8, 0.2, 0.2]], rtol=1e-6)


def test_cross_entropy_propagates_nan_and_infinity_in_their_row() -> None:
    for value in (np.nan, np.inf):
        logits, losses = np.ones((3, 5), np.float32), np.empty(3)
        logits[1, 3] = value
        _core.cross_entropy(logits, np.array([0, 0, 0], np.int64), 1.0, losses, True)
        assert np.isnan(losses[1])
        assert np.isnan(logits[1]).all()
        assert np.isfinite(losses[[0, 2]]).all()
        assert np.isfinite(logits[[0, 2]]).all()
    logits = np.array([[0, -np.inf, 0]], np.float32)  # one token is ruled out
    _core.cross_entropy(logits, np.array([0], np.int64), 1.0, losses[:1], True)
    np.testing.assert_allclose(losses[0], math.log(2), rtol=1e-7)
    assert logits[0, 1] == 0


def test_cross_entropy_refuses_targets_out_of_range() -> None:
    logits, losses = np.ones((2, 5), np.float32), np.empty(2)
    for bad in (5, -1, -99):
        with pytest.raises(ValueError, match=f"targets holds {bad}"):
            _core.cross_entropy(logits, np.array([0, bad], np.int64), 1.0, losses, True)
    assert (logits == 1).all()


@pytest.mark.usefixtures("thread_limit")
def test_the_other_operations_have_the_same_bits_on_any_number_of_threads(rng: np.random.Generator) -> None:
    x, weight, gate, up = (
        normal(rng, 300, 577),
        normal(rng, 577),
        normal(rng, 300, 577),
        normal(rng, 300, 577),
    )
    targets = rng.integers(0, 577, 300)
    results = []
    for threads in (1, 2, 5):
        nplora.set_num_threads(threads)
        y, dx, out, dgate, dup, logits = (unwritten(*x.shape) for _ in range(6))
        losses = np.empty(300)
        logits[...] = gate
        _core.rms_norm(x, weight, 1e-5, y)
        _core.rms_norm_backward(gate, x, weight, 1e-5, dx, False)
        _core.gated("silu", gate, up, out)
        _core.gated_backward("silu", x, gate, up, dgate, dup)
        normed, dnormed = unwritten(*x.shape), unwritten(*x.shape)
        _core.layer_norm(x, weight, weight, 1e-5, normed)
        _core.layer_norm_backward(gate, x, weight, 1e-5, dnormed, False)
        _core.cross_entropy(logits, targets, 0.5, losses, True)
        results.append([a.tobytes() for a in (y, dx, out, dgate, dup, normed, dnormed, logits, losses)])
    assert results[0] == results[1] == results[2]
