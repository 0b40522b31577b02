"""The cached outputs of the frozen blocks: the same bits, in memory or on disk."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
import systems
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch, pack
from nplora.models.prefix_cache import SMALL_BATCH, PrefixCache

Array = np.ndarray[Any, Any]


@pytest.fixture
def lm(tmp_path: Path) -> LanguageModel:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2, layers="last:1", dropout=0.2)
    rng = np.random.default_rng(5)
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.3 * rng.standard_normal(layer.A.shape)  # type: ignore[attr-defined]
    return lm


def sequences(*lengths: int) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, small_models.VOCAB, length) for length in lengths]


def packed(*members: Array) -> PackedBatch:
    return pack((s, s) for s in members)


def keeping(lm: LanguageModel, directory: Path | None = None, capacity: int = 1000) -> PrefixCache:
    lm.model.prefix = PrefixCache(lm.model.first_adapted(), capacity, small_models.WIDTH, directory)
    return lm.model.prefix


def passes(lm: LanguageModel, batches: list[PackedBatch]) -> list[Any]:
    """Losses and gradients, with the same dropout masks."""
    lm.seed(0)
    results: list[Any] = []
    for batch in batches:
        lm.zero_grad()
        results.append((lm.loss_packed(batch), lm.forward_backward(batch, 0.1)))
        results += [(p.name, p.grad.tobytes()) for p in lm.parameters()]
    return results


def never(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("a frozen block was computed again")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_outputs_give_the_same_bits_in_any_packing_without_the_frozen_blocks(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    a, b, c, d = sequences(9, 1, 33, 70)
    first, again = [packed(a, b), packed(c, d)], [packed(d, a), packed(c, b), packed(b, a, c, d)]
    wanted = passes(lm, first), passes(lm, again)
    prefix = keeping(lm, tmp_path if where == "disk" else None)
    assert passes(lm, first) == wanted[0]
    assert prefix.nbytes == (9 + 1 + 33 + 70) * 4 * small_models.WIDTH
    for block in lm.model.layers[: prefix.blocks]:
        monkeypatch.setattr(block, "run", never, raising=False)
    assert passes(lm, again) == wanted[1]
    prefix.close()
    with pytest.raises(AssertionError, match="computed again"):
        lm.loss_packed(first[0])


def test_small_batches_are_neither_stored_nor_looked_up(lm: LanguageModel) -> None:
    small, other = sequences(SMALL_BATCH, 30)
    wanted = passes(lm, [packed(small)])
    prefix = keeping(lm)
    assert passes(lm, [packed(small)]) == wanted
    assert prefix.nbytes == 0
    passes(lm, [packed(small, other)])
    assert prefix.nbytes > 0
    assert passes(lm, [packed(small)]) == wanted


def test_rows_of_larger_batches_do_not_depend_on_the_other_rows() -> None:
    """The cache relies on this. The sizes use each code path of the products."""
    rng = np.random.default_rng(0)
    for d_out, d_in, dtype, compute in (
        (96, 64, "float32", "float32"),
        (130, 577, "float32", "bfloat16"),
        (576, 1536, "q4_1", "float32"),
        (576, 1536, "q4_1", "bfloat16"),
        (130, 625, "bfloat16", "bfloat16"),
        (577, 1531, "bfloat16", "bfloat16"),
    ):
        weight = nplora.FrozenWeight(rng.standard_normal((d_out, d_in), dtype=np.float32), dtype, compute)
        x = rng.standard_normal((700, d_in), dtype=np.float32)
        whole = weight.matmul(x)
        for begin, end in ((0, SMALL_BATCH + 1), (5, 22), (1, 34), (100, 163), (3, 300), (300, 700)):
            np.testing.assert_array_equal(weight.matmul(x[begin:end]), whole[begin:end])


def test_sequences_beyond_the_capacity_are_computed(lm: LanguageModel) -> None:
    a, b = sequences(20, 30)
    wanted = passes(lm, [packed(a), packed(b), packed(b, a)])
    prefix = keeping(lm, capacity=20)
    assert passes(lm, [packed(a), packed(b), packed(b, a)]) == wanted
    assert prefix.nbytes == 20 * 4 * small_models.WIDTH


def test_outputs_of_other_blocks_are_not_used(lm: LanguageModel) -> None:
    [a] = sequences(20)
    keeping(lm)
    passes(lm, [packed(a)])
    lm.add_lora(rank=2, layers=[1])
    found = passes(lm, [packed(a)])
    lm.model.prefix = None
    assert found == passes(lm, [packed(a)])


def test_the_file_has_no_name_and_is_gone_with_the_process(lm: LanguageModel, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    prefix = keeping(lm, directory)
    passes(lm, [packed(*sequences(20))])
    if not systems.IS_WINDOWS:  # there, the file has a name until it is closed
        assert os.listdir(directory) == []
    prefix.close()
    assert os.listdir(directory) == []


def test_a_system_that_moves_few_bytes_at_a_time_moves_all(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    [a] = sequences(20)
    wanted = passes(lm, [packed(a)])
    prefix = keeping(lm, tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda fd, rest, offset: pwrite(fd, rest[:100], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:100]], offset))
    assert passes(lm, [packed(a)]) == wanted
    assert passes(lm, [packed(a)]) == wanted
    prefix.close()


def test_a_full_disk_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate" if hasattr(os, "posix_fallocate") else "ftruncate", full)
    with pytest.raises(OSError, match=r"No space left on device: .* take 128,000 bytes") as error:
        PrefixCache(1, 1000, 32, tmp_path)
    assert error.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == []
