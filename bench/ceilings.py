"""The most that the machine can do: compiled loops, run in the process that is compared with them."""

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

FMA_ITERATIONS = 300_000  # a few milliseconds
STREAMED = 64 * 2**20  # float32 values: 256 MiB, beyond every cache

# If NPLORA_ISA asks for less than the machine has, the ceilings use less too.
MARCH = {
    "generic": "x86-64",
    "avx2": "x86-64-v3",
    "avxvnni": "alderlake",
    "avx512": "x86-64-v4",
    "avx512vnni": "cascadelake",
    "avx512bf16": "cooperlake",
}

Ceiling = Callable[[], float]
"""Measures when called. Returns floating-point operations, or bytes, per second."""


@cache
def library() -> str | None:
    """The path of the compiled loops, or None without a C++ compiler (then no ceiling is printed)."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    directory = tempfile.mkdtemp(prefix="nplora-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    target = Path(directory) / "ceilings.so"
    source = Path(__file__).with_name("ceilings.cpp")
    march = MARCH.get(os.environ.get("NPLORA_ISA", ""), "native")
    flags = ["-std=c++20", "-O3", f"-march={march}", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    return str(target)


def multiply_add(path: str, threads: int) -> Ceiling:
    """Fused multiply-adds of float32 in registers."""
    loop = _loop(path, "multiply_add", ctypes.c_long, ctypes.c_long)
    return lambda: loop(threads, FMA_ITERATIONS)


def bf16_dots(path: str, threads: int) -> Ceiling | None:
    """Dot products of bfloat16 pairs in registers; None if the machine has no such instruction."""
    loop = _loop(path, "bf16_dots", ctypes.c_long, ctypes.c_long)
    return (lambda: loop(threads, FMA_ITERATIONS)) if loop(1, 1) > 0 else None


def int8_dots(path: str, threads: int) -> Ceiling | None:
    """Dot products of four int8 values in registers; None if the machine has no such instruction."""
    loop = _loop(path, "int8_dots", ctypes.c_long, ctypes.c_long)
    return (lambda: loop(threads, FMA_ITERATIONS)) if loop(1, 1) > 0 else None


def read(path: str, threads: int) -> Ceiling:
    """Bytes read from memory."""
    return _stream(path, "read_once", threads)


def rewrite(path: str, threads: int) -> Ceiling:
    """Bytes read from memory and written back in place, both counted."""
    return _stream(path, "rewrite", threads)


def _stream(path: str, name: str, threads: int) -> Ceiling:
    loop = _loop(path, name, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
    values = np.ones(STREAMED, np.float32)
    return lambda: loop(threads, values.ctypes.data, STREAMED)


def _loop(path: str, name: str, *arguments: type) -> Callable[..., float]:
    function = getattr(ctypes.CDLL(path), name)  # ctypes releases the GIL
    function.argtypes, function.restype = arguments, ctypes.c_double
    return function  # type: ignore[no-any-return]
