"""Training and evaluation give way between blocks and between parts of the head."""

from pathlib import Path

import numpy as np
import pytest

import nplora
import small_models
from nplora.models.packing import pack
from nplora.runtime.giving_way import giving_way


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_gives_way_before_every_block_of_both_passes(tmp_path: Path, recompute: bool) -> None:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2)
    lm.model.recompute = recompute
    calls = list[int]()
    with giving_way(lambda: calls.append(1)):
        lm.train_step([1, 2, 3], [1, 2, 3], nplora.AdamW())
    head = 2  # its forward and its backward pass
    assert len(calls) == 2 * small_models.LAYERS + head


def test_blocks_below_the_adapter_and_evaluations_give_way(tmp_path: Path) -> None:
    lm = small_models.load(tmp_path)
    calls = list[int]()
    with giving_way(lambda: calls.append(1)):
        lm.loss([1, 2, 3], [1, 2, 3])
        assert len(calls) == small_models.LAYERS + 1
        lm.add_lora(rank=2, layers="last:1")
        calls.clear()
        lm.train_step([1, 2, 3], [1, 2, 3], nplora.AdamW())
    assert len(calls) == small_models.LAYERS + 1 + 2


def test_an_error_ends_a_pass_between_blocks_and_the_next_pass_has_the_same_bits(tmp_path: Path) -> None:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2)
    batch, left = pack([([1, 2, 3], [1, 2, 3])]), list(range(5))

    def gradients() -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        lm.zero_grad()
        lm.forward_backward(batch, 1.0)
        return [parameter.grad.copy() for parameter in lm.parameters()]

    def stop() -> None:
        if not left:
            raise StoppedError
        left.pop()

    before = gradients()
    with giving_way(stop), pytest.raises(StoppedError):
        lm.forward_backward(batch, 1.0)
    assert all(map(np.array_equal, before, gradients()))
