"""A LoRALinear step, forward and backward, against its two plain products, expert NumPy code and PEFT."""

from typing import Any, NamedTuple

import numpy as np

from bench.peft_layer import has_peft, peft_linear
from bench.timing import BF16_UNIT, Calls, Contestant, Runtimes, assert_within_rounding, on_threads

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]
BATCHES, RANKS, SCALE = (512, 2048), (8, 16, 64), 2.0
NUMPY_RANK = 8  # NumPy is timed only at this rank

Results = tuple[Any, ...]  # y, dx, dA, dB


class Case(NamedTuple):
    n: int
    d_out: int
    d_in: int
    rank: int
    dtype: str

    @property
    def floor(self) -> float:
        """The operations of a step, divided by those of its two products with W."""
        return 1 + 6 * self.rank * (self.d_in + self.d_out) / (4 * self.d_in * self.d_out)

    def arrays(self) -> list[np.ndarray]:
        """x (n, d_in), dy (n, d_out), W (d_out, d_in), A (d_out, r), B (r, d_in)."""
        rng = np.random.default_rng(0)
        n, d_out, d_in, r = self.n, self.d_out, self.d_in, self.rank
        shapes = (n, d_in), (n, d_out), (d_out, d_in), (d_out, r), (r, d_in)
        return [rng.standard_normal(shape, np.float32) for shape in shapes]


def check(case: Case, results: Results) -> None:
    """Check y, dx, dA and dB of one step; only some rows of the first two."""
    n, d_out, d_in, _, dtype = case
    x, dy, W, A, B = (value.astype(np.float64) for value in case.arrays())
    rows = np.linspace(0, n - 1, 4).astype(int)
    ax, ady, aW, aA, aB = (np.abs(value) for value in (x, dy, W, A, B))
    z, dz, az, adz = x @ B.T, SCALE * dy @ A, ax @ aB.T, SCALE * ady @ aA
    want = (x[rows] @ W.T + SCALE * z[rows] @ A.T, dy[rows] @ W + dz[rows] @ B, SCALE * dy.T @ z, dz.T @ x)
    magnitude = (
        ax[rows] @ aW.T + SCALE * az[rows] @ aA.T,
        ady[rows] @ aW + adz[rows] @ aB,
        SCALE * ady.T @ az,
        adz.T @ ax,
    )
    terms = (d_in + case.rank, d_out + case.rank, n + d_in, n + d_out)
    for i, (got, exact, size, k) in enumerate(zip(results, want, magnitude, terms, strict=True)):
        seen = np.asarray(got, np.float64)[rows] if i < 2 else np.asarray(got, np.float64)
        if dtype == "float32":
            assert_within_rounding(seen, exact, size, k + 4)
        else:
            assert_within_rounding(seen, exact, size, 8, BF16_UNIT)


def nplora_step(case: Case, threads: int) -> Calls:
    import nplora

    nplora.set_num_threads(threads)
    x, dy, W, A, B = case.arrays()
    weight = nplora.FrozenWeight(W, case.dtype, case.dtype)
    layer = nplora.LoRALinear(weight, rank=case.rank, alpha=SCALE * case.rank, compute=case.dtype)
    layer.A[...], layer.B[...] = A, B
    y_kept, dx_kept = np.empty_like(dy), np.empty_like(x)

    def step() -> Results:
        y, saved = layer.forward(x)
        return y, layer.backward(dy, saved), layer.dA, layer.dB

    def bare() -> None:
        weight.matmul(x, out=y_kept)
        weight.matmul_t(dy, out=dx_kept)

    check(case, step())
    return {"bare": bare, "step": step}


def numpy_terms(case: Case) -> Calls:
    """Multiply through the rank, keep every buffer, and scale the smaller factor."""
    x, dy, W, A, B = case.arrays()
    y, t = np.empty((2, *dy.shape), np.float32)
    dx, u = np.empty((2, *x.shape), np.float32)
    z, dz = np.empty((2, case.n, case.rank), np.float32)
    dA, dA_step = np.zeros((2, *A.shape), np.float32)
    dB, dB_step = np.zeros((2, *B.shape), np.float32)

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

    check(case, step())
    return {"step": step}


def numpy_stacked(case: Case) -> Calls:
    """One buffer [W A; B 0] holds all weights. y = [x z] [W A]ᵀ and dx = [dy dz] [W; B] are then one product
    each, without a temporary or an addition. x and dy are copied into wide buffers."""
    x0, dy0, W, A0, B0 = case.arrays()
    n, d_out, d_in, rank, _ = case
    block = np.zeros((d_out + rank, d_in + rank), np.float32)
    block[:d_out, :d_in], block[:d_out, d_in:], block[d_out:, :d_in] = W, A0, B0
    A, B = block[:d_out, d_in:], block[d_out:, :d_in]
    xz, dydz = np.empty((n, d_in + rank), np.float32), np.empty((n, d_out + rank), np.float32)
    x, z, dy, dz = xz[:, :d_in], xz[:, d_in:], dydz[:, :d_out], dydz[:, d_out:]
    y, dx = np.empty((n, d_out), np.float32), np.empty((n, d_in), np.float32)
    dA, dA_step = np.zeros((2, d_out, rank), np.float32)
    dB, dB_step = np.zeros((2, rank, d_in), np.float32)

    def step() -> Results:
        np.copyto(x, x0)
        np.matmul(x, B.T, out=z)
        np.multiply(z, np.float32(SCALE), out=z)
        np.matmul(xz, block[:d_out].T, out=y)
        np.copyto(dy, dy0)
        np.matmul(dy, A, out=dz)
        np.multiply(dz, np.float32(SCALE), out=dz)
        np.matmul(dydz, block[:, :d_in], out=dx)
        np.add(dA, np.matmul(dy.T, z, out=dA_step), out=dA)
        np.add(dB, np.matmul(dz.T, x, out=dB_step), out=dB)
        return y, dx, dA, dB

    check(case, step())
    return {"step": step}


def peft_step(case: Case, threads: int) -> Calls:
    """PEFT's own Linear, with base and factors in the case's dtype. Gradients are kept between steps."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, case.dtype)
    x, dy, W, A, B = (torch.from_numpy(array).to(dtype) for array in case.arrays())
    layer = peft_linear(W, A, B, int(SCALE * case.rank))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x.requires_grad_(True)

    def step() -> Results:
        y = layer(x)
        y.backward(dy)
        return y, x.grad, up.grad, down.grad

    def numbers(values: Results) -> Results:
        return tuple(value.detach().float().numpy() for value in values)

    check(case, numbers(step()))
    return {"step": step}


def race(runtimes: Runtimes, case: Case) -> dict[str, Any]:
    threads = runtimes.threads
    contestants = [Contestant("nplora", nplora_step, (case, threads))]
    if case.dtype == "float32" and case.rank == NUMPY_RANK:
        contestants.append(Contestant("NumPy, term by term", numpy_terms, (case,), "numpy"))
        contestants.append(Contestant("NumPy, stacked", numpy_stacked, (case,), "numpy"))
    if has_peft():
        contestants.append(Contestant("PEFT", peft_step, (case, threads), "torch"))
    result = runtimes.race(contestants, rounds=9, seconds=0.05)
    mine = "nplora", "step"
    peers = [contestant.name for contestant in contestants[1:]]
    return {
        **case._asdict(),
        "threads": threads,
        "seconds": result.median(*mine),
        "floor": case.floor,
        "over_bare": result.ratio(mine, ("nplora", "bare")),
        "over": {peer: result.ratio((peer, "step"), mine) for peer in peers},
    }


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(512, 1536, 576, 8, dtype) for dtype in ("float32", "bfloat16")]
    return [
        Case(n, *shape, rank, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for n in BATCHES
        for rank in RANKS
        if rank == RANKS[0] or shape in SHAPES[:2]
    ]


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races on `threads` threads, and return their figures."""
    print(f"\nLoRALinear forward + backward, {on_threads(threads)}: its time divided by that of W alone")
    print(f"  {'rows':>5} {'W':>10} {'r':>3} {'dtype':9}{'ms':>8} {'over W':>7} {'floor':>6}  × as fast as")
    rows = []
    runtimes = Runtimes(threads)
    for case in cases(quick):
        row = race(runtimes, case)
        over = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["over"].items())
        print(
            f"  {case.n:5} {f'{case.d_out}x{case.d_in}':>10} {case.rank:3} {case.dtype:9}"
            f"{row['seconds'] * 1e3:8.2f} {row['over_bare']:7.3f} {case.floor:6.3f}  {over}"
        )
        rows.append(row)
    return rows
