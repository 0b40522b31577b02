"""What the machine can do at most: compiled loops that take part in a race like any contestant."""

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Thread

import numpy as np

FMA_ITERATIONS = 2_000_000
ACCUMULATORS = 12  # kAccumulators in ceilings.cpp


@cache
def library() -> str | None:
    """Path of the compiled loops, or None where there is no C++ compiler (then no ceiling is printed)."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    directory = tempfile.mkdtemp(prefix="nplora-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    target = Path(directory) / "ceilings.so"
    source = Path(__file__).with_name("ceilings.cpp")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    return str(target)


def flops(path: str, threads: int) -> int:
    """Floating-point operations of one call of `multiply_add`."""
    lanes: int = ctypes.CDLL(path).lanes()
    return threads * FMA_ITERATIONS * ACCUMULATORS * lanes * 2


def multiply_add(path: str, threads: int) -> Callable[[], None]:
    """Fused multiply-adds in registers on every thread (ctypes releases the GIL)."""
    loop = ctypes.CDLL(path).multiply_add
    loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
    return _on_threads(threads, lambda _: loop(FMA_ITERATIONS))


def read(path: str, threads: int, count: int) -> Callable[[], None]:
    """Read `count` float32 once, split over the threads."""
    loop = ctypes.CDLL(path).read_once
    loop.argtypes, loop.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    values = np.ones(count, np.float32)
    return _on_threads(threads, lambda i: loop(_part(values, threads, i), count // threads))


def rewrite(path: str, threads: int, count: int) -> Callable[[], None]:
    """Read and write `count` float32 in place, split over the threads."""
    loop = ctypes.CDLL(path).rewrite
    loop.argtypes, loop.restype = [ctypes.c_void_p, ctypes.c_long], None
    values = np.ones(count, np.float32)
    return _on_threads(threads, lambda i: loop(_part(values, threads, i), count // threads))


def _part(values: np.ndarray, threads: int, index: int) -> int:
    return values.ctypes.data + 4 * index * (values.size // threads)


def _on_threads(threads: int, work: Callable[[int], object]) -> Callable[[], None]:
    def call() -> None:
        others = [Thread(target=work, args=(i,)) for i in range(1, threads)]
        for thread in others:
            thread.start()
        work(0)
        for thread in others:
            thread.join()

    return call
