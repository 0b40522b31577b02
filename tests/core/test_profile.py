"""The profile of a thread: which activities, and how many operations."""

import threading
from typing import Any

import numpy as np
import pytest

import nplora
import systems
from nplora import _core
from nplora.runtime.profile import Profiler, section

ROWS, D_IN, D_OUT, RANK = 20, 48, 64, 3


def recorded(work: Any) -> dict[tuple[str, str], tuple[int, dict[str, float]]]:
    """(section, activity) -> calls and operations of some work."""
    profiler = Profiler()
    profiler.start()
    work()
    profiler.stop()
    least = 0 if systems.IS_BROWSER else 1e-12  # clocks of browsers are coarse
    assert all(total.seconds >= least for total in profiler.totals.values())
    return {key: (total.calls, dict(total.operations)) for key, total in profiler.totals.items()}


@pytest.mark.parametrize(
    ("compute", "product", "update"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("int8", "int8", "bfloat16"),
    ],
)
def test_a_layer_counts_the_operations_of_its_products(compute: str, product: str, update: str) -> None:
    layer = nplora.LoRALinear(np.ones((D_OUT, D_IN), np.float32), rank=RANK, compute=compute)
    x, dy = np.ones((ROWS, D_IN), np.float32), np.ones((ROWS, D_OUT), np.float32)

    def work() -> None:
        _, saved = layer.forward(x)
        layer.backward(dy, saved)

    def sums(frozen: float, low: float) -> dict[str, float]:
        return {product: frozen + low} if product == update else {product: frozen, update: low}

    frozen, low = 2 * ROWS * D_OUT * D_IN, 2 * ROWS * RANK * (D_IN + D_OUT)
    assert recorded(work) == {  # backward: dz and dA need d_out columns each, dz B and dB need d_in
        ("", "forward"): (1, sums(frozen, low)),
        ("", "backward"): (1, sums(frozen, 2 * low)),
    }


@pytest.mark.parametrize("rows", range(1, 11))
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "q8_0", "nf4"])
@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_products_of_few_rows_count_in_the_arithmetic_that_computes_them(
    compute: str, storage: str, rows: int
) -> None:
    """Products in the arithmetic of another weight have the bits of that weight's products."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((D_OUT, 2 * D_OUT), np.float32)
    x, dy = (rng.standard_normal((rows, n), np.float32) for n in (2 * D_OUT, D_OUT))
    found = []  # for each arithmetic, the product in a forward and in a backward pass, and the profile
    for other in ("float32", "bfloat16", compute):
        layer = nplora.LoRALinear(nplora.FrozenWeight(W, storage, other), rank=RANK)
        products = layer.weight.matmul(x), layer.weight.matmul_t(dy)
        found.append((products, recorded(lambda layer=layer: layer.backward(dy, layer.forward(x)[1]))))
    for i, activity in enumerate(("forward", "backward")):
        computed = [products[i].tobytes() for products, _ in found]
        arithmetic = {computed[1]: "bfloat16", computed[0]: "float32"}.get(computed[2], "int8")
        operations = found[2][1]["", activity][1]
        assert max(operations, key=lambda name: operations[name]) == arithmetic
        update = "bfloat16" if rows > (8, 4)[i] else "float32"
        assert operations.keys() == {arithmetic, update}


def test_a_layer_in_float64_counts_in_float64() -> None:
    weight = nplora.FrozenWeight(np.ones((D_OUT, D_IN)), dtype="float64")
    found = recorded(lambda: weight.matmul_t(np.ones((ROWS, D_OUT))))
    assert found == {("", "backward"): (1, {"float64": 2.0 * ROWS * D_OUT * D_IN})}


def attention_profile(
    dim: int, lengths: tuple[int, ...], window: int, causal: bool, bfloat16: bool
) -> dict[tuple[str, str], tuple[int, dict[str, float]]]:
    """The profile of a forward and a backward pass with two heads."""
    heads = 2
    starts = np.array([0, *np.cumsum(lengths)], np.int64)
    x = np.random.default_rng(0).standard_normal((sum(lengths), heads * dim), np.float32)
    out, lse = np.empty_like(x), np.empty((len(x), heads), np.float32)
    d = [np.empty_like(x) for _ in range(3)]

    def work() -> None:
        shape = starts, heads, heads, 1.0, window
        _core.attention(x, x, x, *shape, out, lse, bfloat16, causal)
        _core.attention_backward(x, x, x, x, out, lse, *shape, *d, bfloat16, causal)

    return recorded(work)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (5, True), (0, False), (5, False)])
def test_attention_counts_the_keys_that_queries_see(window: int, causal: bool) -> None:
    heads, dim, lengths = 2, 8, (30, 7)

    def sees(query: int, key: int) -> bool:
        near = window == 0 or abs(query - key) < window
        return near and (key <= query or not causal)

    pairs = sum(sees(q, k) for n in lengths for q in range(n) for k in range(n))
    product = 2.0 * pairs * heads * dim
    assert attention_profile(dim, lengths, window, causal, bfloat16=False) == {
        ("", "attention"): (1, {"float32": 2 * product}),
        ("", "attention_backward"): (1, {"float32": 5 * product}),
    }


@pytest.mark.parametrize(
    ("dim", "length", "forward", "backward"),
    [
        (8, 30, "bfloat16", "bfloat16"),
        (7, 30, "float32", "float32"),  # an odd number of values does not divide into pairs
        (8, 7, "float32", "bfloat16"),  # the forward pass computes a few queries without tiles
    ],
)
def test_attention_counts_in_the_arithmetic_that_computes_it(
    dim: int, length: int, forward: str, backward: str
) -> None:
    product = 2.0 * length * (length + 1) / 2 * 2 * dim
    assert attention_profile(dim, (length,), 0, causal=True, bfloat16=True) == {
        ("", "attention"): (1, {forward: 2 * product}),
        ("", "attention_backward"): (1, {backward: 5 * product}),
    }


def test_a_section_has_its_own_totals_and_other_threads_are_not_recorded() -> None:
    weight = nplora.FrozenWeight(np.ones((D_OUT, D_IN), np.float32))
    x = np.ones((ROWS, D_IN), np.float32)

    def work() -> None:
        weight.matmul(x)
        with section("head"):
            weight.matmul(x)
            weight.matmul(x)
        other = threading.Thread(target=weight.matmul, args=(x,))
        other.start()
        other.join()

    one = 2.0 * ROWS * D_OUT * D_IN
    assert recorded(work) == {
        ("", "forward"): (1, {"float32": one}),
        ("head", "forward"): (2, {"float32": 2 * one}),
    }


def test_work_before_the_start_and_without_a_stop_is_not_recorded() -> None:
    weight = nplora.FrozenWeight(np.ones((D_OUT, D_IN), np.float32))
    x, profiler = np.ones((ROWS, D_IN), np.float32), Profiler()
    weight.matmul(x)
    profiler.start()
    weight.matmul(x)
    profiler.start()
    profiler.stop()
    weight.matmul(x)
    assert profiler.totals == {}
    assert _core.take_profile() == []


def test_an_error_inside_a_section_leaves_it() -> None:
    weight, profiler = nplora.FrozenWeight(np.ones((D_OUT, D_IN), np.float32)), Profiler()
    profiler.start()
    with pytest.raises(ValueError, match="matmul"), section("head"):
        weight.matmul(np.ones((ROWS, D_IN + 1), np.float32))
    weight.matmul(np.ones((ROWS, D_IN), np.float32))
    profiler.stop()
    assert list(profiler.totals) == [("", "forward")]


def test_every_arithmetic_has_a_peak_rate() -> None:
    assert all(_core.peak_rate(name) > 0 for name in ("float64", "float32", "bfloat16", "int8"))
    with pytest.raises(ValueError, match="float8"):
        _core.peak_rate("float8")
