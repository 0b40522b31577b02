"""Threads, processes, signals and instruction sets: what must hold around every call of the core."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl
from numpy.typing import NDArray

from nplora import _core

F32 = NDArray[np.float32]

# A fresh interpreter finds this file, and what this interpreter finds.
SEARCH_PATH = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def factors(n: int, d_out: int, d_in: int, r: int) -> tuple[F32, F32, F32, F32]:
    rng = np.random.default_rng(0)
    shapes = (n, d_in), (d_out, d_in), (d_out, r), (r, d_in)
    x, w, a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, w, a, b


def step(x: F32, w: _core.PackedWeight | F32, a: F32, b: F32) -> list[F32]:
    """Every output of one forward and backward pass, and of a merge."""
    y, z = np.empty((len(x), len(a)), np.float32), np.empty((len(x), len(b)), np.float32)
    _core.lora_forward(w, x, a, b, 0.5, None, 0.1, 7, y, z)
    dx, da, db = np.empty_like(x), np.zeros_like(a), np.zeros_like(b)
    _core.lora_backward(w, y, x, z, a, b, 0.5, 0.1, 7, dx, da, db)
    merged = np.zeros((len(a), b.shape[1]), np.float32)
    _core.merge_lora(merged, a, b, 0.5, "float32")
    return [y, z, dx, da, db, merged]


@pytest.fixture
def threads():
    """Restores the thread limit that the test changes."""
    before = _core.get_num_threads()
    yield
    _core.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(1, 300, 500, 4), (37, 577, 1531, 8), (512, 192, 576, 8), (700, 96, 48, 65)]
)
def test_results_are_bitwise_equal_for_any_number_and_kind_of_threads(
    shape: tuple[int, int, int, int],
) -> None:
    code = (
        "import hashlib, test_runtime as t; from nplora import _core\n"
        f"x, w, a, b = t.factors(*{shape})\n"
        "outputs = t.step(x, _core.PackedWeight(w, 'float32'), a, b)\n"
        "print(hashlib.sha256(b''.join(v.tobytes() for v in outputs)).hexdigest())"
    )
    runs = [
        run_python(code, OMP_NUM_THREADS=count, NPLORA_PARALLEL=kind, PYTHONPATH=SEARCH_PATH)
        for count in ("1", "2", "3", "7")
        for kind in ("pool", "openmp")
    ]
    assert len({done.stdout for done in runs}) == 1, [done.stderr for done in runs]
    assert len(runs[0].stdout) > 60


def test_a_hundred_reruns_give_the_same_bits() -> None:
    x, w, a, b = factors(65, 200, 300, 8)
    first = [v.tobytes() for v in step(x, w, a, b)]
    for _ in range(100):
        assert [v.tobytes() for v in step(x, w, a, b)] == first


def test_packed_and_row_major_weights_give_the_same_bits() -> None:
    x, w, a, b = factors(33, 101, 203, 5)
    packed = step(x, _core.PackedWeight(w, "float32"), a, b)
    for left, right in zip(packed, step(x, w, a, b), strict=True):
        assert left.tobytes() == right.tobytes()


@pytest.mark.usefixtures("threads")
def test_limits_of_threads_are_honoured() -> None:
    _core.set_num_threads(1)
    assert _core.get_num_threads() == 1
    _core.set_num_threads(10_000)
    most = _core.get_num_threads()
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert _core.get_num_threads() == 1
    assert _core.get_num_threads() == most
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _core.set_num_threads(0)
    done = run_python("from nplora import _core; print(_core.get_num_threads())", OMP_NUM_THREADS="5")
    assert done.stdout.strip() == "5"


@pytest.mark.parametrize("kind", ["pool", "openmp"])
def test_a_forked_child_computes_the_same_bits(kind: str) -> None:
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore'); import test_runtime as t\n"
        "inputs = t.factors(256, 500, 500, 8); before = t.step(*inputs)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    after = t.step(*inputs)\n"
        "    os._exit(0 if all((x == y).all() for x, y in zip(before, after)) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = run_python(code, OMP_NUM_THREADS="2", NPLORA_PARALLEL=kind, PYTHONPATH=SEARCH_PATH)
    assert done.returncode == 0, done.stderr


def test_other_python_threads_run_while_the_core_works() -> None:
    x, w, _, _ = factors(512, 1024, 1024, 1)
    y = np.empty((512, 1024), np.float32)
    windows: list[list[tuple[float, float]]] = [[], []]

    def work(own: list[tuple[float, float]]) -> None:
        for _ in range(20):
            start = time.perf_counter()
            _core.matmul(w, x, None, np.empty_like(y))
            own.append((start, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(own,)) for own in windows]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # With the GIL held, a call of one thread could not begin inside a call of the other.
    assert any(a0 < b0 < a1 for a0, a1 in windows[0] for b0, _ in windows[1]) or any(
        a0 < b0 < a1 for a0, a1 in windows[1] for b0, _ in windows[0]
    )


def test_many_python_threads_get_right_answers() -> None:
    inputs = factors(40, 150, 250, 6)
    expected = [v.tobytes() for v in step(*inputs)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if [v.tobytes() for v in step(*inputs)] != expected:
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_ctrl_c_ends_a_long_product_within_200_ms() -> None:
    code = (
        "import signal, threading, time, numpy as np, os\n"
        "from nplora import _core\n"
        "x, w = (np.zeros((n, 2048), np.float32) for n in (60_000, 2048)); y = np.empty_like(x)\n"
        "sent = []\n"
        "def send():\n"
        "    time.sleep(0.3); sent.append(time.perf_counter()); os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=send).start()\n"
        "try:\n"
        "    _core.matmul(w, x, None, y)\n"
        "    print('not interrupted')\n"
        "except KeyboardInterrupt:\n"
        "    print(time.perf_counter() - sent[0])\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


@pytest.mark.parametrize("isa", _core.config()["available_isas"])
def test_every_instruction_set_can_be_chosen(isa: str) -> None:
    done = run_python("from nplora import _core; print(_core.config()['isa'])", NPLORA_ISA=isa)
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused_with_the_reason() -> None:
    done = run_python("from nplora import _core", NPLORA_ISA="mmx")
    assert done.returncode != 0
    assert "NPLORA_ISA=mmx: this build knows generic" in done.stderr


def test_an_unknown_kind_of_threads_is_refused_with_the_reason() -> None:
    done = run_python("from nplora import _core", NPLORA_PARALLEL="tbb")
    assert done.returncode != 0
    assert "NPLORA_PARALLEL=tbb: expected pool or openmp" in done.stderr


def test_failed_calls_leak_nothing() -> None:
    resource = pytest.importorskip("resource")

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    w = np.ones((64, 64), np.float32)

    def cycle() -> None:
        _core.PackedWeight(w, "float32")
        with pytest.raises(ValueError, match="storage"):
            _core.PackedWeight(w, "float99")

    for _ in range(500):
        cycle()
    before = resident()
    for _ in range(3000):
        cycle()
    assert resident() - before < 512 * 1024  # one leaked weight a cycle would be 48 MB


@pytest.mark.parametrize(
    "other", [np.ones((4, 4)), np.asfortranarray(np.ones((4, 4), np.float32)), [[1.0] * 4] * 4, None]
)
def test_arguments_of_another_dtype_or_order_are_never_converted(other: object) -> None:
    w, out = np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)
    with pytest.raises(TypeError):
        _core.matmul(w, other, None, out)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.matmul(w, w, None, other)  # type: ignore[arg-type]
    assert not out.any()


def test_a_read_only_output_is_refused() -> None:
    w, out = np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _core.matmul(w, w, None, out)
    assert not out.any()
