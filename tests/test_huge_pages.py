"""Weights lie side by side in huge pages, take no memory for it, and give back what they took."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nplora

KIBIBYTE = 1024
SMAPS, ENABLED = Path("/proc/self/smaps_rollup"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's smaps_rollup")
granted = ENABLED.exists() and "[never]" not in ENABLED.read_text()

PRELUDE = """
import re
import numpy as np, nplora
nplora.set_num_threads(1)
def memory(kind):
    text = open("/proc/self/smaps_rollup").read()
    return 1024 * int(re.search(rf"^{kind}: *(\\d+) kB", text, re.MULTILINE)[1])
def seen():
    return np.array([memory("Anonymous"), memory("AnonHugePages")])
def grown():
    return seen() - before
W = np.ones((576, 576), np.float32)
nplora.FrozenWeight(W)  # code
before = seen()
"""


def run(code: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, text=True, check=True
    )
    return list(map(int, done.stdout.split()))


@needs_smaps
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_weights_smaller_than_a_huge_page_take_little_more_than_their_storage(count: int) -> None:
    total, huge, nbytes = run(
        f"kept = [nplora.FrozenWeight(W) for _ in range({count})]\nprint(*grown(), {count} * W.nbytes)"
    )
    assert 0.97 * nbytes <= total <= 1.03 * nbytes + 64 * KIBIBYTE
    assert huge <= nbytes


@needs_smaps
@pytest.mark.skipif(not granted, reason="the system grants no huge pages")
def test_weights_smaller_than_a_huge_page_share_them() -> None:
    code = """
one = nplora.FrozenWeight(np.ones((8192, 2048), np.float32))
alone = grown()[1]
kept = [nplora.FrozenWeight(W) for _ in range(48)]
print(alone, one.nbytes, grown()[1] - alone, 48 * W.nbytes)
"""
    alone, large, together, nbytes = run(code)
    if alone < large:
        pytest.skip("the system had no huge pages left")
    assert together >= 0.9 * nbytes


@needs_smaps
def test_a_weight_gives_back_its_memory_while_its_neighbours_live() -> None:
    code = """
kept = [nplora.FrozenWeight(W) for _ in range(40)]
print(grown()[0])
del kept[::2]
print(grown()[0])
kept.clear()
print(grown()[0])
"""
    all_of_them, half, none = run(code)
    assert half <= 0.55 * all_of_them
    assert none <= 256 * KIBIBYTE


def test_weights_of_all_sizes_keep_their_values_while_others_come_and_go() -> None:
    rng = np.random.default_rng(0)
    kept: dict[int, tuple[nplora.FrozenWeight, float]] = {}
    for i in range(300):
        # From some KB, which malloc holds, to more than half of the largest mapping that is shared.
        rows = int(2 ** rng.uniform(1, 15 if i % 10 else 16.2))
        kept[i] = nplora.FrozenWeight(np.full((rows, 64), i, np.float32)), float(i)
        while sum(weight.nbytes for weight, _ in kept.values()) > 96 * KIBIBYTE**2:
            weight, value = kept.pop(int(rng.choice(list(kept))))
            assert (weight.to_numpy() == value).all()
    for weight, value in kept.values():
        assert (weight.to_numpy() == value).all()
