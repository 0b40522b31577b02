"""Large results reuse the memory of earlier ones, so a training step allocates nothing."""

import subprocess
import sys

import numpy as np
import pytest

import systems
from nplora import _core
from nplora.weights import buffers

MEBIBYTE = 1 << 20


def address(array):
    return array.__array_interface__["data"][0]


def test_an_array_reuses_the_memory_of_the_one_before():
    first = buffers.empty((512, 1024), np.float32)
    where = address(first)
    del first
    allocated = _core.allocations()
    second = buffers.empty((1024, 256), np.float64)
    assert address(second) == where
    assert _core.allocations() == allocated
    assert second.flags.behaved
    assert second.flags.c_contiguous


def test_memory_that_a_view_holds_is_not_given_to_another_array():
    whole = buffers.empty((512, 1024), np.float32)
    whole.fill(7)
    part = whole[100:200, ::2]
    del whole
    other = buffers.empty((512, 1024), np.float32)
    other.fill(1)
    assert (part == 7).all()


def test_an_array_that_is_much_smaller_leaves_a_large_buffer_alone():
    large = buffers.empty((4 * MEBIBYTE,), np.uint8)
    where = address(large)
    del large
    small = buffers.empty((MEBIBYTE,), np.uint8)
    assert address(small) != where


@pytest.mark.parametrize("shape", [(), (0,), (0, 10**8), (3, 0, 5), (7, 3)])
def test_small_arrays_are_numpys(shape):
    array = buffers.empty(shape, np.float32)
    assert (array.shape, array.dtype) == (shape, np.float32)
    assert array.flags.owndata


def test_a_size_that_no_memory_holds_is_a_memory_error():
    with pytest.raises(MemoryError):
        buffers.empty((2**40, 2**40), np.float32)
    with pytest.raises(MemoryError):
        buffers.empty((2**46,), np.float32)
    with pytest.raises(MemoryError, match="cannot allocate an array of 4,722,366,482,869,645,213,696 bytes"):
        buffers.empty((2**70,), np.float32)


def in_fresh_process(code):
    """Run code in a new process. Returns its output. `rss()` gives the growth of resident memory in MiB."""
    prelude = """
import gc, nplora, numpy as np
from nplora.platform.memory import current_memory
from nplora.weights import buffers
def resident():
    return current_memory() / 2**20
np.random.default_rng(0)  # the first one imports a part of NumPy
before = resident()
def rss():
    return resident() - before
def taken(mebibytes):
    array = buffers.empty((mebibytes << 20,), np.uint8)
    array.fill(1)
    return array
"""
    run = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.slow
def test_idle_memory_never_adds_to_the_most_that_was_in_use():
    out = in_fresh_process("""
for size in (64, 100, 30, 7, 128, 90, 127):
    array = taken(size)
    print(rss())
    del array
""")
    assert max(map(float, out)) < 128 + 8


@pytest.mark.slow
def test_arrays_of_many_sizes_leave_no_holes_behind():
    out = in_fresh_process("""
rng = np.random.default_rng(0)
most = 0
for batch in range(8):
    rows = int(rng.integers(200, 420))
    step = []
    for width in (144, 768, 288, 144, 768) * 10:
        step.append(buffers.empty((rows, width), np.float32))
        step[-1].fill(1)
    most = max(most, sum(array.nbytes for array in step) / 2**20)
    while step:
        step.pop(int(rng.integers(len(step))))
        if rng.random() < 0.3:
            step[:0] = [buffers.empty((int(rng.integers(100, 300)), 256), np.float32)]
print(rss(), most)
""")
    held, most = map(float, out)
    assert held < 1.1 * most + 4 + 4  # of these, 4 MiB are the spare memory of the cache


@pytest.mark.slow
def test_buffers_of_different_sizes_that_are_used_in_turn_are_all_kept():
    """As in the layers of a model that reads a prompt: attention has other sizes than the MLP."""
    out = in_fresh_process("""
from nplora import _core
def layer():
    for sizes in ((300, 100, 100, 300), (800, 800, 300)):
        arrays = [buffers.empty((size << 10,), np.uint8) for size in sizes]
        del arrays
for _ in range(3):
    layer()
allocated = _core.allocations()
for _ in range(10):
    layer()
print(_core.allocations() - allocated)
""")
    assert int(out[0]) == 0


@systems.needs_resizing
@pytest.mark.slow
def test_a_buffer_that_is_too_small_grows_and_keeps_its_pages():
    out = in_fresh_process("""
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(rows):
    arrays = [buffers.empty((rows, width), np.float32) for width in (384, 1152, 384, 384, 1536) * 6]
    for array in arrays:
        array.fill(1)
    return sum(array.nbytes for array in arrays)
step(700)
new = []
for rows in range(710, 1000, 10):  # each batch is larger than the one before
    faulted = faults()
    size = step(rows)
    new.append((faults() - faulted) * resource.getpagesize() / size)
print(max(new), rss(), size / 2**20)
""")
    new, held, most = map(float, out)
    assert new < 0.2
    assert held < 1.1 * most + 4 + 4  # of these, 4 MiB are the spare memory of the cache


@pytest.mark.slow
def test_buffers_of_random_sizes_hold_what_is_written_to_them():
    """Buffers grow, shrink and move on two threads. Other rules hold above 64 KiB, and again above 2 MiB."""
    out = in_fresh_process("""
from concurrent.futures import ThreadPoolExecutor
around = [1 << 16, 1 << 20, 1 << 21, 3 << 21]
def work(seed):
    rng, held = np.random.default_rng(seed), {}
    for number in range(3000):
        if len(held) > 12:
            key = list(held)[int(rng.integers(len(held)))]
            assert (held.pop(key) == key % 251).all(), key
        size = int(rng.choice(around) * rng.uniform(0.7, 1.4))
        array = buffers.empty((size,), np.uint8)
        array.fill(number % 251)
        held[number] = array
        assert size < 1 << 16 or array.ctypes.data % 64 == 0
    return sum(array.nbytes for array in held.values())
with ThreadPoolExecutor(2) as pool:
    print(len(list(pool.map(work, (1, 2)))), rss() < 2 * 13 * 8 * 1.5)
""")
    assert out == ["2", "True"]


@systems.needs_resizing
@pytest.mark.slow
def test_buffers_work_where_no_address_is_left_to_move_them_to():
    out = in_fresh_process("""
import resource
step = lambda rows: [buffers.empty((rows, 1024), np.float32) for _ in range(24)]
for rows in range(600, 640, 10):  # mappings above 2 MiB, which move if they grow
    for number, array in enumerate(arrays := step(rows)):
        array.fill(number)
    assert all((array == number).all() for number, array in enumerate(arrays))
    del array, arrays
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
for rows in range(640, 700, 10):
    try:
        for number, array in enumerate(arrays := step(rows)):
            array.fill(number)
        assert all((array == number).all() for number, array in enumerate(arrays))
    except MemoryError:
        print("no memory")
        break
    del array, arrays
""")
    assert out in ([], ["no", "memory"])


def test_idle_memory_can_be_returned():
    out = in_fresh_process("""
array = taken(100)
del array
print(rss())
nplora.release_memory()
print(rss())
""")
    kept, released = map(float, out)
    assert kept > 90
    assert released < 8


# A fresh process, because what was allocated before decides whether the C library gives the end of its heap
# back to the system in each step. One thread, because each thread allocates memory when it first gets a task
# of some kind, at a random time.
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8, 100, 1000])
def test_a_step_allocates_nothing_after_warm_up(tokens):
    out = in_fresh_process(f"""
try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None
from nplora import _core
nplora.set_num_threads(1)
rng = np.random.default_rng(0)
weights = [rng.standard_normal((512, 512), dtype=np.float32) for _ in range(3)]
model = nplora.Sequential(
    nplora.LoRALinear(weights[0], rank=8, rng=1, compute="bfloat16"),
    nplora.ReLU(),
    nplora.LoRALinear(weights[1], rank=8, rng=2, dropout=0.1),
    nplora.GELU(),
    nplora.LoRALinear(weights[2], rank=8, rng=3, bias=np.zeros(512)),
)
optimizer = nplora.AdamW(lr=1e-3)
parameters = model.parameters()
optimizer.init(parameters)
x = rng.standard_normal(({tokens}, 512), dtype=np.float32)
dy = np.ones_like(x)
def step():
    model.zero_grad()
    y, saved = model.forward(x)
    model.backward(dy, saved)
    optimizer.step(parameters, max_norm=1.0)
    return y
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0
for _ in range(3):
    step()
allocated, faulted = _core.allocations(), faults()
for _ in range(10):
    step()
print(_core.allocations() - allocated, faults() - faulted)
""")
    allocated, faulted = map(int, out)
    assert allocated == 0
    if not systems.HAS_MUSL:
        assert faulted < 64  # pages; a new y of 1000 tokens alone has 500


def test_factors_made_side_by_side_share_two_buffers_of_zeros():
    shapes = [(3, 5), (1, 1), (100, 8)]
    with buffers.side_by_side(*(4 * m * n for m, n in shapes)):
        pairs = [buffers.value_and_gradient(shape, np.dtype(np.float32)) for shape in shapes]
        beyond, _ = buffers.value_and_gradient((1, 1), np.dtype(np.float32))
    for arrays in zip(*pairs, strict=True):
        assert len({id(array.base) for array in arrays}) == 1
        addresses = [address(array) for array in arrays]
        assert addresses == [addresses[0] + offset for offset in (0, 64, 128)]
        assert all(array.flags.c_contiguous and address(array) % 64 == 0 for array in arrays)
        for index, array in enumerate(arrays, 1):
            assert (array == 0).all()
            array += index
        assert [array.ravel().tolist() for array in arrays] == [[i] * a.size for i, a in enumerate(arrays, 1)]
    assert beyond.base is None
    alone, _ = buffers.value_and_gradient((3, 5), np.dtype(np.float32))
    assert alone.base is None
