"""Weights are placed next to each other in huge pages, use no extra memory, and return it when freed."""

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import nplora
import systems

KIBIBYTE, MEBIBYTE = 1024, 1024**2
COLLAPSE = 25  # MADV_COLLAPSE
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_smaps = systems.needs_procfs("smaps_rollup")

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
nplora.FrozenWeight(W[:64])  # code
before = seen()
"""


def run(code: str) -> list[int]:
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(int, done.stdout.split()))


def collapses() -> bool:
    """Whether the system can merge small pages into a huge page of 2 MB on request."""
    if not ENABLED.exists():
        return False
    of_size = ENABLED.parent / "hugepages-2048kB/enabled"
    own = of_size.read_text() if of_size.exists() else "[inherit]"
    if "[never]" in (ENABLED.read_text(encoding="utf-8") if "[inherit]" in own else own):
        return False
    if ENABLED.with_name("hpage_pmd_size").read_text() != f"{2 * MEBIBYTE}\n":
        return False
    with mmap.mmap(-1, 4 * MEBIBYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)
        try:
            memory.madvise(COLLAPSE)
        except OSError:
            return False
    return True


@pytest.mark.slow
@needs_smaps
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_weights_smaller_than_a_huge_page_take_their_storage_in_whole_pages(count: int) -> None:
    total, huge, nbytes = run(
        f"kept = [nplora.FrozenWeight(W) for _ in range({count})]\nprint(*grown(), W.nbytes)"
    )
    in_pages = count * -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    assert 0.97 * count * nbytes <= total <= in_pages + 64 * KIBIBYTE
    assert huge <= in_pages


@pytest.mark.slow
@needs_smaps
@pytest.mark.skipif(not collapses(), reason="the system makes no huge pages on request")
def test_weights_smaller_than_a_huge_page_share_them() -> None:
    huge, nbytes = run("kept = [nplora.FrozenWeight(W) for _ in range(48)]\nprint(grown()[1], 48 * W.nbytes)")
    assert huge >= 0.5 * nbytes  # the system may refuse some huge pages when it is short of them


@pytest.mark.slow
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


@pytest.mark.slow
@needs_smaps
def test_weights_that_come_and_go_beside_one_that_stays_leave_nothing() -> None:
    code = """
stays = nplora.FrozenWeight(W)
for _ in range(60):
    nplora.FrozenWeight(W)
print(grown()[0], W.nbytes)
"""
    total, nbytes = run(code)
    assert total <= nbytes + 256 * KIBIBYTE


@pytest.mark.slow
@needs_smaps
@pytest.mark.skipif(not collapses(), reason="the system makes no huge pages on request")
def test_memory_mapped_in_a_freed_weight_s_place_is_left_alone() -> None:
    code = """
import ctypes, mmap
def ends():
    return {int(line.split()[0].split("-")[1], 16) for line in open("/proc/self/maps")}
anonymous = ctypes.CDLL(None).mmap
anonymous.restype = ctypes.c_void_p
anonymous.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
stays, freed = nplora.FrozenWeight(W), nplora.FrozenWeight(W)
known = ends()
del freed
size = -(-W.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
filled = sum(anonymous(hole, size, *kind, -1, 0) == hole for hole in ends() - known)
before = seen()
kept = [nplora.FrozenWeight(W) for _ in range(3)]
print(filled, grown()[0], 3 * size)
"""
    filled, total, in_pages = run(code)
    assert filled == 1
    assert total <= in_pages + 64 * KIBIBYTE


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1030, 1024])
@pytest.mark.skipif(not collapses(), reason="the system makes no huge pages on request")
def test_a_weight_after_a_freed_one_or_of_whole_huge_pages_starts_on_a_huge_page(rows: int) -> None:
    code = f"""
def advised():
    text = open("/proc/self/smaps").read()
    mapping = r"^Size: *(\\d+) kB(?:(?!^Size:).)*?^VmFlags:([^\\n]*)"
    found = re.findall(mapping, text, re.MULTILINE | re.DOTALL)
    return 1024 * sum(int(size) for size, flags in found if " hg" in flags)
stays = nplora.FrozenWeight(W)
if {rows} != 1024:
    nplora.FrozenWeight(W)
large = np.ones(({rows}, 512), np.float32)  # 2 MB and a little, or nothing
before = advised()
kept = nplora.FrozenWeight(large)
print(advised() - before)
"""
    assert run(code) == [2 * MEBIBYTE]


@pytest.mark.slow
@systems.needs_fork
def test_a_forked_child_can_make_weights_while_threads_of_its_parent_make_some() -> None:
    code = """
import os, signal, threading
W = W[:, :64]
def make():
    while not done.is_set():
        nplora.FrozenWeight(W)
done = threading.Event()
threads = [threading.Thread(target=make) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        kept = [nplora.FrozenWeight(W) for _ in range(3)]
        os._exit(0 if all((weight.to_numpy() == 1).all() for weight in kept) else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
for thread in threads: thread.join()
print(1)
"""
    assert run(code) == [1]


@pytest.mark.slow
def test_weights_of_all_sizes_keep_their_values_while_others_come_and_go() -> None:
    def come_and_go(seed: int) -> None:
        rng = np.random.default_rng(seed)
        together.wait()
        kept: dict[int, nplora.FrozenWeight] = {}
        for i in range(150):
            # From a few KB, which malloc provides, to sizes above the shared ones.
            rows = int(2 ** rng.uniform(1, 15 if i % 10 else 16))
            kept[i] = nplora.FrozenWeight(np.full((rows, 64), seed + i, np.float32))
            while sum(weight.nbytes for weight in kept.values()) > 24 * MEBIBYTE:
                one = int(rng.choice(list(kept)))
                right.append((kept.pop(one).to_numpy() == seed + one).all())
        right.extend((weight.to_numpy() == seed + i).all() for i, weight in kept.items())

    right: list[np.bool_] = []
    together = threading.Barrier(4)
    threads = [threading.Thread(target=come_and_go, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 4 * 150
    assert all(right)
