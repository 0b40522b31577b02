"""In inference, the bits of a row do not depend on the other rows of a large batch, or on their number."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nplora import FrozenWeight, Linear, LoRALinear, _core
from nplora.nn.row_groups import GroupedLayer, RowGroup, grouped_rows
from nplora.nn.stack import stack_infer

Array = np.ndarray[Any, Any]

PIECES = (9, 64, 65, 100, 128, 192, 256)
MOST = 512
# The ranks of layers (d_out, d_in). A round and an odd number of outputs meet all ranks. To save time, each
# other number of outputs meets one of the ranks.
ALL = (0, 8, 64, 256)
RANKS = {
    (192, 576): (0, 8), (576, 576): ALL, (1536, 576): (0, 256), (576, 1536): ALL, (101, 97): ALL,
    (3000, 256): (0, 64),
}  # fmt: skip
STORED = (
    ("float32", "float32"), ("float64", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
    ("q4_1", "float32"), ("q4_1", "int8"), ("q8_0", "bfloat16"),
)  # fmt: skip


def layer_of(weight: FrozenWeight, rank: int, **options: Any) -> Linear | LoRALinear:
    if not rank:
        return Linear(weight)
    layer = LoRALinear(weight, rank, rng=1, **options)
    layer.A[...] = 0.1 * np.random.default_rng(rank).standard_normal(layer.A.shape)
    return layer


def require_equal_rows(layers: Sequence[Any], x: Array) -> None:
    whole = stack_infer(layers, x)
    for n in PIECES:
        for first in (0, len(x) - n):
            for got, wanted in zip(stack_infer(layers, x[first : first + n].copy()), whole, strict=True):
                np.testing.assert_array_equal(got, wanted[first : first + n], err_msg=f"{n} rows")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LoRALinear. rank")
@pytest.mark.parametrize(("storage", "compute"), STORED)
@pytest.mark.parametrize(("d_out", "d_in"), RANKS)
def test_a_row_has_the_same_bits_in_every_large_batch(
    d_out: int, d_in: int, storage: str, compute: str
) -> None:
    if storage.startswith("q") and d_in % 32:
        pytest.skip("blocks have 32 values")
    rng = np.random.default_rng(0)
    weight = FrozenWeight(rng.standard_normal((d_out, d_in), np.float32), storage, compute)
    x = rng.standard_normal((MOST, d_in), np.float32).astype(weight.compute_dtype)
    for rank in RANKS[d_out, d_in]:
        require_equal_rows([layer_of(weight, rank)], x)


@pytest.mark.parametrize("use_dora", [False, True])
def test_so_do_the_rows_of_a_stack(use_dora: bool) -> None:
    rng = np.random.default_rng(1)
    weights = [
        FrozenWeight(rng.standard_normal((n, 576), np.float32), "q4_1", "int8") for n in (576, 192, 64)
    ]
    ranks = (8, 0, 40)
    layers = [
        layer_of(w, r, **({"use_dora": use_dora} if r else {})) for w, r in zip(weights, ranks, strict=True)
    ]
    require_equal_rows(layers, rng.standard_normal((MOST, 576), np.float32))


@pytest.mark.parametrize("compute", ["float32", "int8"])
@pytest.mark.parametrize("by_core", [True, False])
@pytest.mark.parametrize("first", [2, 100, 130, 298])
def test_an_update_that_acts_from_some_row_on_gives_the_same_bits_in_every_piece(
    first: int, by_core: bool, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    weight = FrozenWeight(rng.standard_normal((576, 576), np.float32), "q4_1", compute)
    adapted, x = layer_of(weight, 8), rng.standard_normal((300, 576), np.float32)
    layer = GroupedLayer([adapted])
    if not by_core:
        monkeypatch.setattr(GroupedLayer, "part", lambda self, group: None)
    plain = stack_infer([layer_of(weight, 0)], x)[0]
    wanted = np.concatenate([plain[:first], stack_infer([adapted], x)[0][first:]])
    assert not np.array_equal(plain[first:], wanted[first:])
    for cuts in ((0, 300), (0, 64, 300), (0, 128, 256, 300)):
        for begin, end in itertools.pairwise(cuts):
            before = min(max(first - begin, 0), end - begin)
            counts = ((before, False), (end - begin - before, True))
            groups = tuple(RowGroup(0, n, acts) for n, acts in counts if n)
            with grouped_rows(groups):
                got = stack_infer([layer], x[begin:end].copy())[0]  # type: ignore[list-item]
            np.testing.assert_array_equal(got, wanted[begin:end])


def test_a_part_of_a_batch_cannot_claim_to_be_smaller_than_it_is() -> None:
    layer, x = layer_of(FrozenWeight(np.eye(32)), 0), np.ones((20, 32), np.float32)
    part = layer.inference_layer()
    assert part is not None
    np.testing.assert_array_equal(_core.infer(x, [part], 1)[0], _core.infer(x, [part])[0])
