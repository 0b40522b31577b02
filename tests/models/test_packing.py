"""Packed sequences: the start of each sequence, and the token that each position must predict."""

import numpy as np
import pytest

from nplora.models.packing import IGNORED, PackedBatch, pack


def test_targets_are_the_labels_of_the_next_token_within_each_sequence():
    batch = pack([([5, 6, 7], [IGNORED, 6, 7]), ([], []), ([8], [8]), ([9, 4], [9, 4])])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.starts.tolist() == [0, 3, 3, 4, 6]
    assert batch.targets.tolist() == [6, 7, IGNORED, IGNORED, 4, IGNORED]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.num_targets == 3


def test_nothing_packs_to_nothing():
    batch = pack([])
    assert batch.ids.shape == batch.targets.shape == batch.positions.shape == (0,)
    assert batch.starts.tolist() == [0]
    assert {a.dtype for a in (batch.ids, batch.starts, batch.targets)} == {np.dtype(np.int64)}


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"sequence 1 has ids of shape \(2,\) and labels of shape \(1,\)"):
        pack([([1], [1]), ([1, 2], [1])])


def test_a_batch_of_your_own_takes_lists():
    batch = PackedBatch([5, 6], [0, 2], [6, IGNORED])
    assert {a.dtype for a in (batch.ids, batch.starts, batch.targets)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("starts", [[], [0], [0, 2], [1, 3], [0, 4], [0, 2, 1, 3], [-1, 0, 3], [0, 2**62, 3]])
def test_starts_that_do_not_ascend_over_all_tokens_are_refused(starts):
    with pytest.raises(ValueError, match=r"^PackedBatch: starts is \[.*\], expected to ascend from 0 to 3,"):
        PackedBatch(np.arange(3), np.array(starts, np.int64), np.arange(3))


def test_arrays_of_a_batch_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^PackedBatch: 2 targets for 3 ids$"):
        PackedBatch(np.arange(3), np.array([0, 3]), np.arange(2))
    with pytest.raises(ValueError, match=r"^PackedBatch: ids has shape \(1, 3\), expected one axis$"):
        PackedBatch(np.arange(3)[None], np.array([0, 3]), np.arange(3))
    with pytest.raises(TypeError, match=r"^PackedBatch: starts has dtype float64, expected integers$"):
        PackedBatch(np.arange(3), np.array([0.0, 3.0]), np.arange(3))
