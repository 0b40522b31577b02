"""A row of a small batch has the same bits alone, in any batch, and on any number of threads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import FrozenWeight, LoRALinear, _core
from nplora.weights.storages import BLOCKS
from reference import gamma

Array = np.ndarray[Any, Any]
SMALL = _core.constants.small_batch
WEIGHTS = [
    *(("float32", compute, d_in) for compute in ("float32", "bfloat16") for d_in in (97, 192)),
    *(("bfloat16", compute, d_in) for compute in ("float32", "bfloat16") for d_in in (61, 144)),
    ("float16", "float32", 1100),
    ("float64", "float32", 97),
    ("nf4", "float32", 96),  # rows that do not begin at blocks are decoded to floats
    *((storage, "float32", 512) for storage in sorted(BLOCKS)),
    *((storage, "int8", 512) for storage in sorted(set(BLOCKS) - {"nf4"})),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = nplora.get_num_threads()
    nplora.set_num_threads(request.param)
    yield request.param
    nplora.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("storage", "compute", "d_in"), WEIGHTS)
@pytest.mark.parametrize("rank", [0, 3, 8, 20])
def test_a_row_of_a_small_batch_has_the_bits_of_the_row_alone(
    storage: str, compute: str, d_in: int, rank: int, threads: int
) -> None:
    fw = FrozenWeight(normal(101, d_in, seed=1), storage, compute)
    bias = normal(101, seed=2)
    layer: nplora.Module = nplora.Linear(fw, bias=bias)
    if rank:
        layer = LoRALinear(fw, rank=rank, bias=bias, init="gaussian", rng=3)
    x = normal(SMALL, d_in).astype(fw.compute_dtype)
    alone = np.concatenate([layer(row[None]) for row in x])
    for count in range(2, SMALL + 1):
        for first in range(0, SMALL - count + 1, 3):
            batch = slice(first, first + count)
            np.testing.assert_array_equal(layer(x[batch]), alone[batch])


def at_address(x: Array, offset: int) -> Array:
    """A contiguous copy of x whose first byte is `offset` bytes after the start of a cache line."""
    memory = np.zeros(x.nbytes + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    copy = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    assert copy.ctypes.data % 64 == offset
    return copy


@pytest.mark.parametrize(("storage", "compute", "d_in"), WEIGHTS)
@pytest.mark.parametrize("count", [1, 2, 4, SMALL])
def test_the_address_of_x_changes_no_bit(
    storage: str, compute: str, d_in: int, count: int, threads: int
) -> None:
    fw = FrozenWeight(normal(101, d_in, seed=1), storage, compute)
    layer = LoRALinear(fw, rank=3, init="gaussian", rng=3)
    x = normal(count, d_in).astype(fw.compute_dtype)
    aligned = layer(at_address(x, 0))
    if compute == "float32":
        W, A, B, exact = (a.astype(np.float64) for a in (fw.to_numpy(), layer.A, layer.B, x))
        error = np.abs(aligned - exact @ (W + layer.scale * A @ B).T)
        magnitude = np.abs(exact) @ (np.abs(W) + layer.scale * np.abs(A) @ np.abs(B)).T
        # Each output sums d_in products, and rank more for the update. 4 stands for the roundings of the
        # decoded weights, of B x, of the scale and of the last addition. In formats with minima, the summands
        # may be larger than those of W, but errors of random signs stay far below this bound.
        assert (error <= gamma(d_in + layer.rank + 4) * magnitude).all()
    for offset in (8, 16, 32, 48):
        np.testing.assert_array_equal(layer(at_address(x, offset)), aligned)


def layer_of(fw: FrozenWeight, rank: int, seed: int, biased: bool = True) -> LoRALinear | nplora.Linear:
    bias = normal(fw.shape[0], seed=7).astype(fw.compute_dtype) if biased else None
    if not rank:
        return nplora.Linear(fw, bias=bias)
    return LoRALinear(fw, rank=rank, bias=bias, init="gaussian", rng=seed)


@pytest.mark.parametrize(
    "counts", [(1, 1, 1), (8,), (3, 0, 5), (1, 2, 1), (7, 1), (2, 30, 9), (0, 16, 16), (70, 1, 300), (30,)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("storage", "compute"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float64", "float32"), ("q4_1", "int8"),
     ("q4_k", "bfloat16"), ("q4_k", "float32")],
)  # fmt: skip
def test_groups_of_rows_have_the_bits_of_a_batch_with_the_layers_of_each_group(
    storage: str, compute: str, counts: tuple[int, ...], biased: bool, threads: int
) -> None:
    compare_groups(*stacks(storage, compute, 256, (4, 0, 17)[: len(counts)], counts, biased), counts)


def stacks(
    storage: str,
    compute: str,
    d_in: int,
    ranks: tuple[int, ...],
    counts: tuple[int, ...],
    biased: bool = True,
) -> tuple[list[list[Any]], Array]:
    """Return a stack of two layers for each rank, all with the same weights and biases, and x."""
    stack = [FrozenWeight(normal(rows, d_in, seed=rows), storage, compute) for rows in (130, 48)]
    groups = [[layer_of(fw, rank, 9 * i + rank, biased) for i, fw in enumerate(stack)] for rank in ranks]
    return groups, normal(sum(counts), d_in).astype(stack[0].compute_dtype)


def test_large_groups_whose_updates_are_merged_on_the_fly() -> None:
    counts = (20, 5)
    groups, x = stacks("float32", "float32", 48, (40, 3), counts)
    for layer in groups[0]:
        plan = _core.explain(layer.weight.packed, 64, layer.rank, False, False)["forward"]
        assert "the update is merged into W on the fly" in plan
    compare_groups(groups, x, counts)


def compare_groups(groups: list[list[Any]], x: Array, counts: tuple[int, ...]) -> None:
    prepared = [[layer.inference_layer() for layer in each] for each in groups]
    got = _core.infer_groups(x, prepared, list(counts))
    bounds = np.cumsum((0, *counts))
    for each, first, end in zip(prepared, bounds[:-1], bounds[1:], strict=True):
        for y, whole in zip(got, _core.infer(x, each), strict=True):
            np.testing.assert_array_equal(y[first:end], whole[first:end])


@pytest.mark.parametrize("counts", [(3, 2), (5, 20)])
def test_groups_may_have_other_weights_and_biases(counts: tuple[int, ...]) -> None:
    fw, bias = FrozenWeight(normal(5, 256), "q4_k"), normal(5, seed=1)
    others = (
        nplora.Linear(normal(5, 256, seed=2)),
        nplora.Linear(fw, bias=bias),
        nplora.Linear(fw.with_compute("bfloat16")),
        nplora.Linear(fw.with_compute("int8")),
    )
    for other in others:
        compare_groups([[nplora.Linear(fw)], [other]], normal(sum(counts), 256, seed=3), counts)


def test_groups_refuse_what_does_not_fit() -> None:
    one, other = (nplora.Linear(normal(d_out, 16)).inference_layer() for d_out in (5, 6))
    assert one is not None
    assert other is not None
    x = normal(3, 16)
    refused: list[tuple[list[Any], list[int], str]] = [
        ([[one], [one]], [1, 1], "fewer rows"),
        ([[one], [one]], [2, 2], "more rows"),
        ([[one]], [1, 2], "layers for each group"),
        ([], [], "layers for each group"),
        ([[one], [one, one]], [1, 2], "same number of layers"),
        ([[one], [other]], [1, 2], "same d_out"),
    ]
    for groups, counts, message in refused:
        with pytest.raises(ValueError, match=message):
            _core.infer_groups(x, groups, counts)


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16, 33])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_constant_factors_in_bfloat16_give_the_same_bits(rank: int, rows: int) -> None:
    fw, x = FrozenWeight(normal(70, 96), "q4_1", "int8"), normal(rows, 96, seed=1)
    layer = layer_of(fw, rank, 2)
    for factor in (layer.A, layer.B):
        factor[...] = (factor.view(np.uint32) & 0xFFFF0000).view(np.float32)
    arguments = fw.packed, layer.A, layer.B, layer.scale, None
    (live,), (constant,) = (
        _core.infer(x, [_core.InferenceLayer(*arguments, constant)]) for constant in (False, True)
    )
    np.testing.assert_array_equal(live, constant)
    layer.A[0, 0] += np.float32(0.3)  # bfloat16 does not have this value: the layer reads the float32 arrays
    expected, got = (
        _core.infer(x, [_core.InferenceLayer(*arguments, constant)])[0] for constant in (False, True)
    )
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(got, live)
