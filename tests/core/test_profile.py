"""The profile of a thread: which activities, and how many operations."""

import threading
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import _core
from nplora.runtime.profile import Profiler, section

ROWS, D_IN, D_OUT, RANK = 20, 48, 64, 3


def recorded(work: Any) -> dict[tuple[str, str], tuple[int, dict[str, float]]]:
    """(section, activity) -> calls and operations of some work."""
    profiler = Profiler()
    profiler.start()
    work()
    profiler.stop()
    assert all(total.seconds > 0 for total in profiler.totals.values())
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


def test_a_layer_in_float64_counts_in_float64() -> None:
    weight = nplora.FrozenWeight(np.ones((D_OUT, D_IN)), dtype="float64")
    found = recorded(lambda: weight.matmul_t(np.ones((ROWS, D_OUT))))
    assert found == {("", "backward"): (1, {"float64": 2.0 * ROWS * D_OUT * D_IN})}


@pytest.mark.parametrize(("window", "causal"), [(0, True), (5, True), (0, False), (5, False)])
def test_attention_counts_the_keys_that_queries_see(window: int, causal: bool) -> None:
    heads, dim, lengths = 2, 8, (30, 7)
    starts = np.array([0, *np.cumsum(lengths)], np.int64)
    x = np.random.default_rng(0).standard_normal((sum(lengths), heads * dim), np.float32)
    out, lse = np.empty_like(x), np.empty((len(x), heads), np.float32)
    d = [np.empty_like(x) for _ in range(3)]

    def work() -> None:
        _core.attention(x, x, x, starts, heads, heads, 1.0, window, out, lse, False, causal)
        _core.attention_backward(x, x, x, x, out, lse, starts, heads, heads, 1.0, window, *d, False, causal)

    def sees(query: int, key: int) -> bool:
        near = window == 0 or abs(query - key) < window
        return near and (key <= query or not causal)

    pairs = sum(sees(q, k) for n in lengths for q in range(n) for k in range(n))
    product = 2.0 * pairs * heads * dim
    assert recorded(work) == {
        ("", "attention"): (1, {"float32": 2 * product}),
        ("", "attention_backward"): (1, {"float32": 5 * product}),
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
