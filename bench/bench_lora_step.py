"""One step of LoRALinear, forward and backward, against an expert's NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench import ceilings
from bench.timing import Contestant, assert_within_rounding, on_threads, race

N, D_OUT, D_IN, RANK, SCALE = 512, 1536, 576, 8, 2.0
FLOPS = 4 * N * D_OUT * D_IN + 6 * N * RANK * (D_IN + D_OUT)
FLOOR = 1 + 6 * RANK * (D_IN + D_OUT) / (4 * D_IN * D_OUT)
WANTED = 1.0

Results = tuple[np.ndarray | None, ...]  # y, dx, dA, dB
Step = Callable[[], Results]


class Case(NamedTuple):
    x: np.ndarray  # (N, d_in)
    dy: np.ndarray  # (N, d_out)
    W: np.ndarray  # (d_out, d_in)
    A: np.ndarray  # (d_out, r)
    B: np.ndarray  # (r, d_in)


def case() -> Case:
    rng = np.random.default_rng(0)
    shapes = (N, D_IN), (N, D_OUT), (D_OUT, D_IN), (D_OUT, RANK), (RANK, D_IN)
    return Case(*(rng.standard_normal(shape, np.float32) for shape in shapes))


def check(step: Step, c: Case) -> None:
    """The gradients must be those of this one step, so `step` is called first here."""
    x, dy, W, A, B = (value.astype(np.float64) for value in c)
    ax, ady, aW, aA, aB = (np.abs(value) for value in (x, dy, W, A, B))
    z, dz, az, adz = x @ B.T, SCALE * dy @ A, ax @ aB.T, SCALE * ady @ aA
    want = (x @ W.T + SCALE * z @ A.T, dy @ W + dz @ B, SCALE * dy.T @ z, dz.T @ x)
    magnitude = (ax @ aW.T + SCALE * az @ aA.T, ady @ aW + adz @ aB, SCALE * ady.T @ az, adz.T @ ax)
    terms = (D_IN + RANK, D_OUT + RANK, N + D_IN, N + D_OUT)
    for got, exact, size, k in zip(step(), want, magnitude, terms, strict=True):
        assert got is not None
        assert_within_rounding(got, exact, size, k + 4)


def nplora_layer(threads: int) -> Callable[[], object]:
    import nplora

    nplora.set_num_threads(threads)
    c = case()
    layer = nplora.LoRALinear(c.W, rank=RANK, alpha=SCALE * RANK)
    layer.A[...], layer.B[...] = c.A, c.B

    def step() -> Results:
        y, saved = layer.forward(c.x)
        return y, layer.backward(c.dy, saved), layer.dA, layer.dB

    check(step, c)
    return step


def nplora_bare_products(threads: int) -> Callable[[], object]:
    """The two frozen products alone, into kept buffers: what the low-rank part is measured against."""
    import nplora

    nplora.set_num_threads(threads)
    c = case()
    weight = nplora.FrozenWeight(c.W)
    y, dx = np.empty((N, D_OUT), np.float32), np.empty((N, D_IN), np.float32)

    def products() -> None:
        weight.matmul(c.x, out=y)
        weight.matmul_t(c.dy, out=dx)

    return products


def numpy_terms() -> Callable[[], object]:
    """Contract through the rank, keep every buffer, scale the small side."""
    c = case()
    x, dy, W, A, B = c
    y, t = np.empty((2, N, D_OUT), np.float32)
    dx, u = np.empty((2, N, D_IN), np.float32)
    z, dz = np.empty((2, N, RANK), np.float32)
    dA, dA_step = np.zeros((2, D_OUT, RANK), np.float32)
    dB, dB_step = np.zeros((2, RANK, D_IN), np.float32)

    def step() -> Results:
        np.matmul(x, B.T, out=z)
        np.multiply(z, np.float32(SCALE), out=z)
        np.matmul(x, W.T, out=y)
        np.add(y, np.matmul(z, A.T, out=t), out=y)
        np.matmul(dy, A, out=dz)
        np.multiply(dz, np.float32(SCALE), out=dz)
        np.matmul(dy, W, out=dx)
        np.add(dx, np.matmul(dz, B, out=u), out=dx)
        np.add(dA, np.matmul(dy.T, z, out=dA_step), out=dA)
        np.add(dB, np.matmul(dz.T, x, out=dB_step), out=dB)
        return y, dx, dA, dB

    check(step, c)
    return step


def numpy_stacked() -> Callable[[], object]:
    """One buffer [W A; B 0] holds all weights: y = [x z] [W A]ᵀ and dx = [dy dz] [W; B] are one product each,
    without a temporary or an addition; x and dy are copied into their wide buffers."""
    c = case()
    block = np.zeros((D_OUT + RANK, D_IN + RANK), np.float32)
    block[:D_OUT, :D_IN], block[:D_OUT, D_IN:], block[D_OUT:, :D_IN] = c.W, c.A, c.B
    A, B = block[:D_OUT, D_IN:], block[D_OUT:, :D_IN]
    xz, dydz = np.empty((N, D_IN + RANK), np.float32), np.empty((N, D_OUT + RANK), np.float32)
    x, z, dy, dz = xz[:, :D_IN], xz[:, D_IN:], dydz[:, :D_OUT], dydz[:, D_OUT:]
    y, dx = np.empty((N, D_OUT), np.float32), np.empty((N, D_IN), np.float32)
    dA, dA_step = np.zeros((2, D_OUT, RANK), np.float32)
    dB, dB_step = np.zeros((2, RANK, D_IN), np.float32)

    def step() -> Results:
        np.copyto(x, c.x)
        np.matmul(x, B.T, out=z)
        np.multiply(z, np.float32(SCALE), out=z)
        np.matmul(xz, block[:D_OUT].T, out=y)
        np.copyto(dy, c.dy)
        np.matmul(dy, A, out=dz)
        np.multiply(dz, np.float32(SCALE), out=dz)
        np.matmul(dydz, block[:, :D_IN], out=dx)
        np.add(dA, np.matmul(dy.T, z, out=dA_step), out=dA)
        np.add(dB, np.matmul(dz.T, x, out=dB_step), out=dB)
        return y, dx, dA, dB

    check(step, c)
    return step


def run(quick: bool, threads: int) -> dict[str, Any]:
    """Print the race on `threads` threads; return its figures."""
    contestants = [
        Contestant("nplora", nplora_layer, (threads,)),
        Contestant("NumPy, term by term", numpy_terms, (), threads),
        Contestant("NumPy, stacked", numpy_stacked, (), threads),
        Contestant("nplora, W alone", nplora_bare_products, (threads,)),
    ]
    path = ceilings.library()
    if path is not None:
        contestants.append(Contestant("FMA ceiling", ceilings.multiply_add, (path, threads)))
    seconds = race(contestants, rounds=5 if quick else 21, calls=5)

    ceiling = ceilings.flops(path, threads) / seconds.pop("FMA ceiling") if path is not None else None
    title = f"LoRALinear forward + backward, {N} rows, W {D_OUT}x{D_IN}, r = {RANK}"
    print(f"\n{title}, {on_threads(threads)}")
    for name, time in seconds.items():
        flops = 4 * N * D_OUT * D_IN if name == "nplora, W alone" else FLOPS
        share = "" if ceiling is None else f"  {flops / time / ceiling:5.1%} of the FMA ceiling"
        print(f"  {name:22}{time * 1e3:9.2f} ms {flops / time / 1e9:8.1f} GFLOP/s{share}")
    if ceiling is not None:
        print(f"  {'FMA ceiling':22}{'':12} {ceiling / 1e9:8.1f} GFLOP/s")
    ratio = min(seconds["NumPy, term by term"], seconds["NumPy, stacked"]) / seconds["nplora"]
    overhead = seconds["nplora"] / seconds["nplora, W alone"]
    verdict = "met" if ratio >= WANTED else "MISSED"
    print(f"  ratio: {ratio:.2f} times as fast as the better NumPy (wanted {WANTED:.2f}: {verdict})")
    print(f"  ratio: {overhead:.3f} times W alone (floor by arithmetic {FLOOR:.3f})")
    figures = {"fma_ceiling": ceiling, "ratio": ratio, "over_bare": overhead}
    return {"threads": threads, "seconds": seconds, **figures}
