"""Many threads call nplora at once.

scripts/free_threaded.sh runs this file with free-threaded Python, also under ThreadSanitizer. Other Pythons
make a tenth of the calls, because their threads run at once only inside the core.
"""

import concurrent.futures
import hashlib
import importlib.util
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike

import nplora
from nplora import losses
from small_llama import save_small_llama

LACKS_LOCK = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
HAS_TOKENIZERS = importlib.util.find_spec("tokenizers") is not None
THREADS, CALLS = 8, 1000 if LACKS_LOCK else 100

rng = np.random.default_rng(0)
x, dy = (rng.standard_normal((6, width), dtype=np.float32) for width in (256, 96))
W = rng.standard_normal((96, 256), dtype=np.float32)
A, B = (rng.standard_normal(shape, dtype=np.float32) for shape in ((96, 4), (4, 256)))
ids = rng.integers(1, 200, (2, 24))

Call = Callable[[], ArrayLike]


def product(storage: str, compute: str) -> Call:
    """Both products of a weight that all threads share."""
    weight = nplora.FrozenWeight(W, storage, compute)
    return lambda: np.concatenate([weight.matmul(x), weight.matmul_t(dy)], axis=None)


def quantize() -> ArrayLike:
    return nplora.FrozenWeight(W, "q4_k").to_numpy()


def update() -> ArrayLike:
    y, z = nplora.lora_forward(x, W, A, B)
    return np.concatenate([y, *nplora.lora_backward(dy, x, z, W, A, B)], axis=None)


def merge() -> ArrayLike:
    return nplora.merge_lora(W.copy(), A, B)


def train_layers() -> ArrayLike:
    model = nplora.Sequential(
        nplora.LayerNorm(np.ones(256)),
        nplora.LoRALinear(W, 4, rng=1),
        nplora.GELU(),
        nplora.LoRALinear(W.T, 4, rng=2),
    )
    optimizer = nplora.AdamW(lr=1e-2)
    seen = []
    for _ in range(2):
        y, saved = model.forward(x)
        loss, gradient = losses.mse(y, x)
        model.zero_grad()
        model.backward(gradient, saved, need_dx=False)
        optimizer.step(model.parameters())
        seen.append(loss)
    return seen


def change_number_of_threads() -> ArrayLike:
    """Set the number of threads to 2 or 3 for all threads, then compute."""
    nplora.set_num_threads(3 - nplora.get_num_threads() % 2)
    return nplora.lora_forward(x, W, A, B)[0]


def kinds_of_calls(model: Path) -> list[Call]:
    lm = nplora.load_model(model)  # shared by all threads, which only read it
    lm.add_lora(rank=4, seed=3, init="gaussian")

    def train_model() -> ArrayLike:
        own = nplora.load_model(model)
        own.add_lora(rank=2, seed=5)
        optimizer = nplora.AdamW(lr=1e-2)
        return [own.train_step(ids, ids, optimizer) for _ in range(2)]

    def generate() -> ArrayLike:
        return np.frombuffer(lm.generate("one two ", 4).encode(), np.uint8)

    calls = [
        *(product(*kind) for kind in (("float32", "float32"), ("bfloat16", "bfloat16"), ("q8_0", "float32"))),
        *(product(*kind) for kind in (("q4_k", "int8"), ("nf4", "float32"))),
        quantize,
        update,
        merge,
        train_layers,
        change_number_of_threads,
        lambda: lm.loss(ids, ids),
        train_model,
    ]
    if HAS_TOKENIZERS:  # the package has no build for some Pythons
        calls += [generate, lambda: lm.tokenizer.encode("Threads share a tokenizer, its cache too.")]
    return calls


def bits(call: Call) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(call()).tobytes()).digest()


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.slow
def test_mixed_calls_of_many_threads_give_the_same_bits(tmp_path: Path) -> None:
    calls = kinds_of_calls(save_small_llama(tmp_path / "model.gguf", "q8_0"))
    expected = [bits(call) for call in calls]
    begin = threading.Barrier(THREADS)

    def run(number: int) -> list[int]:
        order = np.random.default_rng(number).integers(len(calls), size=CALLS)
        begin.wait()
        return [int(kind) for kind in order if bits(calls[kind]) != expected[kind]]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        wrong = list(pool.map(run, range(THREADS)))
    assert wrong == [[]] * THREADS


@pytest.mark.skipif(not LACKS_LOCK, reason="this Python has a global lock")
def test_the_global_lock_stays_off() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
