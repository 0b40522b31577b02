"""Threads, processes, signals and instruction sets around every call of the core."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl
from numpy.typing import NDArray

import systems
from nplora import _core

F32 = NDArray[np.float32]
KINDS = ["pool", "openmp"] if _core.config()["openmp"] else ["pool"]

# A fresh interpreter finds this file, and what this interpreter finds.
HERE = os.path.dirname(__file__)
SEARCH_PATH = os.pathsep.join(filter(None, [HERE, os.path.dirname(HERE), os.environ.get("PYTHONPATH")]))


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
    update = {"weight": w, "a": a, "b": b, "scale": 0.5, "dropout": 0.1, "key": 7}
    _core.lora_forward(x, [_core.ForwardPart(**update, bias=None, y=y, z=z)])
    dx, da, db = np.empty_like(x), np.zeros_like(a), np.zeros_like(b)
    _core.lora_backward(x, dx, [_core.BackwardPart(**update, dy=y, z=z, da=da, db=db)])
    merged = np.zeros((len(a), b.shape[1]), np.float32)
    _core.merge_lora(merged, a, b, 0.5, "float32")
    return [y, z, dx, da, db, merged]


@pytest.fixture
def threads():
    """Restores the thread limit that the test changes."""
    before = _core.get_num_threads()
    yield
    _core.set_num_threads(before)


@pytest.mark.slow
def test_results_are_bitwise_equal_for_any_number_and_kind_of_threads() -> None:
    code = (
        "import hashlib, test_threads as t; from nplora import _core\n"
        "for shape in (1, 300, 500, 4), (37, 577, 1531, 8), (512, 192, 576, 8), (700, 96, 48, 65):\n"
        "    x, w, a, b = t.factors(*shape)\n"
        "    outputs = t.step(x, _core.PackedWeight(w, 'float32'), a, b)\n"
        "    print(shape, hashlib.sha256(b''.join(v.tobytes() for v in outputs)).hexdigest())"
    )
    runs = [
        run_python(code, OMP_NUM_THREADS=count, NPLORA_PARALLEL=kind, PYTHONPATH=SEARCH_PATH)
        for count in ("1", "2", "3", "7")
        for kind in KINDS
    ]
    assert len({done.stdout for done in runs}) == 1, [done.stderr for done in runs]
    assert len(runs[0].stdout.splitlines()) == 4


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


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_limits_of_threads_are_honoured() -> None:
    _core.set_num_threads(1)
    assert _core.get_num_threads() == 1
    _core.set_num_threads(10_000)
    most = _core.get_num_threads()
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert _core.get_num_threads() == 1
    assert _core.get_num_threads() == most
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        assert _core.get_num_threads() == most
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _core.set_num_threads(0)
    done = run_python("from nplora import _core; print(_core.get_num_threads())", OMP_NUM_THREADS="5")
    assert done.stdout.strip() == "5"


@pytest.mark.usefixtures("threads")
def test_a_limit_of_threadpoolctl_belongs_to_its_thread() -> None:
    """As libgomp's does: omp_set_num_threads changes the calling thread's limit."""
    _core.set_num_threads(10_000)
    most, seen = _core.get_num_threads(), []
    with threadpoolctl.threadpool_limits(most + 3, user_api="openmp"):
        assert _core.get_num_threads() == most + 3
        other = threading.Thread(target=lambda: seen.append(_core.get_num_threads()))
        other.start()
        other.join()
    assert seen == [most]
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
    assert any(pool["num_threads"] == most for pool in pools)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "threads"), [(" 3", 3), ("2,4", 2), ("", None), ("0", None), ("-1", None), ("many", None)]
)
def test_the_number_of_threads_at_the_start(variable: str, threads: int | None) -> None:
    """The variable sets the number, as in OpenMP.

    Otherwise there is one thread for each processor that the process may use. The test limits the process to
    one processor on Linux and Windows. macOS has no such limit.
    """
    code, processors = "from nplora import _core; print(_core.get_num_threads())", 1
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + code
    elif systems.IS_WINDOWS:
        limit = (
            "kernel.SetProcessAffinityMask(ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.c_size_t(1))"
        )
        code = f"import ctypes; kernel = ctypes.windll.kernel32; assert {limit}\n" + code
    else:
        processors = os.cpu_count() or 1
    done = run_python(code, OMP_NUM_THREADS=variable)
    assert int(done.stdout) == (threads or processors), done.stderr


@systems.needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_computes_the_same_bits(kind: str) -> None:
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore'); import test_threads as t\n"
        "inputs = t.factors(256, 500, 500, 8); before = t.step(*inputs)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    after = t.step(*inputs)\n"
        "    os._exit(0 if all((x == y).all() for x, y in zip(before, after)) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = run_python(code, OMP_NUM_THREADS="2", NPLORA_PARALLEL=kind, PYTHONPATH=SEARCH_PATH)
    assert done.returncode == 0, done.stderr


@systems.needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_a_child_forked_during_products_of_another_thread_does_not_hang(compute: str) -> None:
    """In such a child, a lock that the other thread held stays locked."""
    code = (
        "import os, sys, threading, warnings; warnings.simplefilter('ignore')\n"
        "import numpy as np, nplora\n"
        f"weight = nplora.FrozenWeight(np.eye(32, dtype=np.float32), compute={compute!r})\n"
        "x = np.ones((16, 32), np.float32); wanted = weight.matmul(x); done = False\n"
        "def work():\n"
        "    while not done: weight.matmul(x)\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "for thread in threads: thread.start()\n"
        "codes = []\n"
        "for _ in range(1000):\n"
        "    child = os.fork()\n"
        "    if child == 0: os._exit(0 if (weight.matmul(x) == wanted).all() else 1)\n"
        "    codes.append(os.waitpid(child, 0)[1])\n"
        "done = True\n"
        "sys.exit(any(codes))"
    )
    done = run_python(code, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
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


def seconds_to_interrupt(n: int, d_out: int, d_in: int, **environment: str) -> float:
    """From Ctrl-C in the middle of a product to its end."""
    setting = (
        "from nplora import _core\n"
        f"x, w = (np.zeros((rows, {d_in}), np.float32) for rows in ({n}, {d_out}))\n"
        f"y = np.empty(({n}, {d_out}), np.float32)\n"
    )
    return seconds_until_heard(setting, "    _core.matmul(w, x, None, y)\n", **environment)


def seconds_until_heard(setting: str, call: str, **environment: str) -> float:
    """From Ctrl-C in the middle of a call, an indented line of code, to its end."""
    code = (
        "import os, signal, threading, time, numpy as np\n"
        f"{setting}"
        "sent = []\n"
        "def send():\n"
        f"    time.sleep(0.3); sent.append(time.perf_counter()); {systems.CTRL_C}\n"
        "threading.Thread(target=send).start()\n"
        "try:\n"
        f"{call}"
        "    print('not interrupted')\n"
        "except KeyboardInterrupt:\n"
        "    print(time.perf_counter() - sent[0])\n"
    )
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_ctrl_c_ends_a_long_product_within_200_ms() -> None:
    assert seconds_to_interrupt(60_000, 2048, 2048) < 0.2


@pytest.mark.slow
def test_ctrl_c_is_heard_within_one_block_of_tokens() -> None:
    # A vocabulary's weight on the slowest instruction set: 0.1 s here, 2 s without the bound on a task.
    assert seconds_to_interrupt(256, 32768, 4096, NPLORA_ISA="generic", OMP_NUM_THREADS="1") < 1


@pytest.mark.slow
def test_ctrl_c_is_heard_in_a_small_batch() -> None:
    # 600 weights that two rows meet in one call: 3 s.
    setting = (
        "import nplora\n"
        "layer = nplora.LoRALinear(np.zeros((4096, 4096), np.float32), 1)\n"
        "x = np.zeros((2, 4096), np.float32)\n"
    )
    call = "    nplora.stack_forward([layer] * 600, x)\n"
    assert seconds_until_heard(setting, call, NPLORA_ISA="generic", OMP_NUM_THREADS="1") < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_ends_in_order_while_a_daemon_thread_computes(kind: str) -> None:
    code = (
        "import threading, time, test_threads as t\n"
        "inputs = t.factors(512, 576, 1536, 8)\n"
        "def work():\n"
        "    while True: t.step(*inputs)\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.3)"
    )
    done = run_python(code, NPLORA_PARALLEL=kind, OMP_NUM_THREADS="2", PYTHONPATH=SEARCH_PATH)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_workers_round_as_the_caller_does(kind: str) -> None:
    code = (
        "import test_threads as t; from nplora import _core\n"
        "inputs = t.factors(512, 576, 576, 8); before = t.step(*inputs)\n"
        f"{systems.ROUND_UPWARD}"
        "upwards = [t.step(*inputs) for _ in range(10)]\n"
        "_core.set_num_threads(1); alone = t.step(*inputs)\n"
        "assert (alone[0] != before[0]).any()\n"
        "assert all(v.tobytes() == w.tobytes() for run in upwards for v, w in zip(run, alone))"
    )
    done = run_python(code, NPLORA_PARALLEL=kind, OMP_NUM_THREADS="4", PYTHONPATH=SEARCH_PATH)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@systems.needs_signals
def test_workers_leave_signals_to_the_program() -> None:
    code = (
        "import os, signal, test_threads as t\n"
        "inputs = t.factors(512, 576, 576, 8); t.step(*inputs)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert signal.sigtimedwait({signal.SIGUSR1}, 5) is not None"
    )
    # One thread for OpenBLAS: its workers do take signals.
    done = run_python(code, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1", PYTHONPATH=SEARCH_PATH)
    assert done.returncode == 0, done.stderr


@systems.needs_fork
@pytest.mark.slow
def test_a_fork_inside_a_signal_handler_neither_hangs_nor_lies() -> None:
    code = (
        "import os, signal, sys, warnings; warnings.simplefilter('ignore')\n"
        "import numpy as np; from nplora import _core\n"
        "x, w = (np.zeros((n, 2048), np.float32) for n in (60_000, 2048)); y = np.empty_like(x)\n"
        "children = []\n"
        "def fork(*_):\n"
        "    children.append(os.fork())\n"
        "signal.signal(signal.SIGALRM, fork); signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "try:\n"
        "    _core.matmul(w, x, None, y)\n"
        "except RuntimeError as error:\n"
        "    os._exit(7 if children == [0] and 'forked' in str(error) else 1)\n"
        "assert children and children[0], children\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))"
    )
    done = run_python(code, OMP_NUM_THREADS="2")
    assert done.returncode == 7, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_instruction_set_can_be_chosen(isa: str) -> None:
    done = run_python("from nplora import _core; print(_core.config()['isa'])", NPLORA_ISA=isa)
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused_with_the_reason() -> None:
    done = run_python("from nplora import _core", NPLORA_ISA="mmx")
    assert done.returncode != 0
    assert "NPLORA_ISA=mmx: expected one of generic" in done.stderr


def test_an_unknown_kind_of_threads_is_refused_with_the_reason() -> None:
    done = run_python("from nplora import _core", NPLORA_PARALLEL="tbb")
    assert done.returncode != 0
    assert "NPLORA_PARALLEL=tbb: expected pool" in done.stderr


@systems.needs_procfs("statm")
def test_failed_calls_leak_nothing() -> None:
    resource = pytest.importorskip("resource")

    def resident() -> int:
        with open("/proc/self/statm", encoding="utf-8") as statm:
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


@systems.needs_signals
@pytest.mark.slow
def test_a_signal_handler_may_call_the_core_in_the_middle_of_a_call() -> None:
    code = (
        "import signal, test_threads as t\n"
        "outer, inner = t.factors(2000, 700, 600, 8), t.factors(400, 900, 1100, 48)\n"
        "wanted, wanted_inside = t.step(*outer), t.step(*inner)\n"
        "same = lambda got, want: all(v.tobytes() == w.tobytes() for v, w in zip(got, want, strict=True))\n"
        "right = []\n"
        "def handle(*_):\n"
        "    right.append(same(t.step(*inner), wanted_inside))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.06)\n"
        "signal.signal(signal.SIGALRM, handle); signal.setitimer(signal.ITIMER_REAL, 0.06)\n"
        "while len(right) < 12: assert same(t.step(*outer), wanted)\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "assert all(right)"
    )
    for threads in ("1", "2"):
        done = run_python(code, OMP_NUM_THREADS=threads, PYTHONPATH=SEARCH_PATH)
        assert done.returncode == 0, done.stderr


SYSTEM = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)

class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(8192)
def small_signal_stack():
    return libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, len(room))), None)
"""


@pytest.mark.skipif("amx" not in _core.available_isas(), reason="needs a processor with AMX")
class TestTileRegisters:
    def test_they_are_asked_for_only_where_amx_is_chosen(self) -> None:
        code = SYSTEM + "import nplora\nnplora.show_config()\nprint(small_signal_stack())"
        for isa, wanted in ("avx512bf16", "0"), ("amx", "-1"), ("", "-1"):
            assert run_python(code, NPLORA_ISA=isa).stdout.splitlines()[-1] == wanted, isa

    def test_where_linux_refuses_them_the_next_best_serves(self) -> None:
        code = (
            SYSTEM
            + "assert small_signal_stack() == 0\nfrom nplora import _core\nprint(_core.config()['isa'])"
        )
        assert run_python(code, NPLORA_ISA="").stdout.strip() == "avx512bf16"
        done = run_python(code, NPLORA_ISA="amx")
        assert "NPLORA_ISA=amx: Linux refuses the tile registers of AMX" in done.stderr
