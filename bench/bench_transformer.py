"""The computations of a language model other than products with weights, against torch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench import ceilings
from bench.peft_layer import has_torch
from bench.timing import Calls, Contestant, Runtimes, assert_within_rounding, on_threads


class Heads(NamedTuple):
    """Sequences of one length, and the attention heads of a model."""

    sequences: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def flops(self) -> float:
        """Operations of forward and backward: two and five products over all pairs that see each other."""
        return 14.0 * self.sequences * self.tokens * (self.tokens + 1) / 2 * self.heads * self.dim


class Cache(NamedTuple):
    """One new token for each of several sequences of one length. Several caches are used in turn."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def bytes_read(self) -> float:
        return 8.0 * self.rows * self.length * self.kv_heads * self.dim

    @property
    def turns(self) -> int:
        """The number of caches that together exceed the CPU's caches."""
        return max(2, math.ceil(128 * 2**20 / self.bytes_read))


SMOLLM2 = [Heads(4, 256, 9, 3, 64), Heads(4, 1024, 9, 3, 64)]
WIDER = [Heads(1, 1024, 8, 8, 128), Heads(2, 512, 32, 8, 64)]
CACHES = [Cache(1, 2048, 9, 3, 64), Cache(8, 1024, 9, 3, 64), Cache(1, 4096, 32, 8, 128)]
N, D_MODEL, D_FF, VOCAB = 1024, 576, 1536, 49152  # SmolLM2-135M, 4 x 256 tokens
EPS = 1e-5
UNIT = 2.0**-24


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---- attention ----


def attention_inputs(case: Heads) -> tuple[np.ndarray, ...]:
    n = case.sequences * case.tokens
    widths = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return tuple(normal(n, width * case.dim, seed=seed) for seed, width in enumerate(widths))


def check_attention(case: Heads, got: tuple[np.ndarray, ...]) -> None:
    """Compare the last head of the last sequence, and its gradient of k, with the full matrix."""
    q, k, v, dout = attention_inputs(case)
    group, rows = case.heads // case.kv_heads, slice(-case.tokens, None)
    out, dq, dk, dv = (array.reshape(len(q), -1, case.dim)[rows].astype(np.float64) for array in got)
    q, k, v, dout = (
        array.reshape(len(q), -1, case.dim)[rows].astype(np.float64) for array in (q, k, v, dout)
    )
    keys, values, scale = k[:, -1], v[:, -1], 1 / math.sqrt(case.dim)
    hidden = np.triu(np.ones((case.tokens, case.tokens), bool), 1)
    dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
    size_k, size_v = np.zeros_like(keys), np.zeros_like(values)
    terms = 8 * case.dim + 4 * case.tokens
    for head in range(-group, 0):
        scores = np.where(hidden, -np.inf, scale * q[:, head] @ keys.T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dp = dout[:, head] @ values.T
        ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
        size = scale * p * (np.abs(dout[:, head]) @ np.abs(values).T * 2 + np.abs(dp).max())
        assert_within_rounding(out[:, head], p @ values, p @ np.abs(values), terms)
        assert_within_rounding(dq[:, head], ds @ keys, size @ np.abs(keys), terms)
        dkeys, size_k = dkeys + ds.T @ q[:, head], size_k + size.T @ np.abs(q[:, head])
        dvalues, size_v = dvalues + p.T @ dout[:, head], size_v + p.T @ np.abs(dout[:, head])
    assert_within_rounding(dk[:, -1], dkeys, size_k, terms)
    assert_within_rounding(dv[:, -1], dvalues, size_v, terms)


def nplora_attention(case: Heads, threads: int, path: str | None) -> Calls:
    import nplora
    from nplora import _core

    nplora.set_num_threads(threads)
    q, k, v, dout = attention_inputs(case)
    starts = np.arange(0, len(q) + 1, case.tokens)
    options = starts, case.heads, case.kv_heads, 1 / math.sqrt(case.dim), 0
    out, dq, dk, dv = (np.empty_like(array) for array in (q, q, k, v))
    lse = np.empty((len(q), case.heads), np.float32)

    def forward() -> None:
        _core.attention(q, k, v, *options, out, lse)

    def both() -> None:
        forward()
        _core.attention_backward(dout, q, k, v, out, lse, *options, dq, dk, dv)

    both()
    check_attention(case, (out, dq, dk, dv))
    calls: Calls = {"forward": forward, "both": both}
    return calls if path is None else {"FMA": ceilings.multiply_add(path, threads), **calls}


def torch_attention(case: Heads, threads: int) -> Calls:
    """As transformers calls it: views of (batch, heads, tokens, dim), with keys repeated for groups."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    inputs = attention_inputs(case)
    q, k, v, dout = (
        torch.from_numpy(array).view(case.sequences, case.tokens, -1, case.dim).transpose(1, 2)
        for array in inputs
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    group = case.heads // case.kv_heads

    def forward() -> Any:
        keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        return scaled_dot_product_attention(q, keys, values, is_causal=True)

    def both() -> Any:
        for tensor in (q, k, v):
            tensor.grad = None
        out = forward()
        out.backward(dout)
        return out

    out = both()
    results = out, q.grad, k.grad, v.grad
    flat = (x.detach().transpose(1, 2).reshape(len(inputs[0]), -1).numpy() for x in results)
    check_attention(case, tuple(flat))
    return {"forward": forward, "both": both}


def race_attention(runtimes: Runtimes, case: Heads) -> dict[str, Any]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [Contestant("nplora", nplora_attention, (case, threads, path), ceilings=("FMA",))]
    if has_torch():
        contestants.append(Contestant("torch", torch_attention, (case, threads), "torch"))
    result = runtimes.race(contestants, rounds=9, seconds=0.1)
    mine = "nplora", "both"
    share = result.share(case.flops, mine, ("nplora", "FMA")) if ("nplora", "FMA") in result else None
    over = {
        cell: result.ratio(("torch", cell), ("nplora", cell))
        for cell in ("forward", "both")
        if ("torch", cell) in result
    }
    shape = f"{case.sequences} x {case.tokens}"
    print(
        f"  {shape:>9} {case.heads:5} {case.kv_heads:3} {case.dim:4}{result.median(*mine) * 1e3:9.2f}"
        f"{'' if share is None else f'{share:9.1%}'}   "
        + ", ".join(f"{cell} {ratio:.2f}" for cell, ratio in over.items())
    )
    return {
        **case._asdict(),
        "threads": threads,
        "seconds": result.median(*mine),
        "of_fma": share,
        "over": over,
    }


# ---- decoding ----


def cache_inputs(case: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = case.turns * case.rows, case.length, case.kv_heads * case.dim
    return normal(case.rows, case.heads * case.dim), normal(*shape, seed=1), normal(*shape, seed=2)


def check_cache(case: Cache, out: np.ndarray) -> None:
    """Check the last head of the last row, in the first turn."""
    q, keys, values = cache_inputs(case)
    row, head = case.rows - 1, slice(-case.dim, None)
    k, v = keys[row, :, head].astype(np.float64), values[row, :, head].astype(np.float64)
    scores = k @ q[row, head].astype(np.float64) / math.sqrt(case.dim)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    assert_within_rounding(
        out.reshape(case.rows, -1)[row, head], p @ v, p @ np.abs(v), 8 * case.dim + 4 * case.length
    )


def nplora_cached(case: Cache, threads: int, path: str | None) -> Calls:
    import nplora
    from nplora import _core

    nplora.set_num_threads(threads)
    q, keys, values = cache_inputs(case)
    out, lengths, turn = np.empty_like(q), np.full(case.rows, case.length), 0
    pages = np.arange(len(keys))[:, None]

    def decode() -> None:
        nonlocal turn
        slots = np.arange(case.rows) + turn * case.rows
        turn = (turn + 1) % case.turns
        options = case.heads, case.kv_heads, 1 / math.sqrt(case.dim), 0
        _core.attention_cached(q, keys, values, pages, slots, lengths, *options, out)

    decode()
    check_cache(case, out)
    return {"decode": decode} if path is None else {"read": ceilings.read(path, threads), "decode": decode}


def torch_cached(case: Cache, threads: int) -> Calls:
    """One query per sequence. The cache has torch's fastest layout, (batch, heads, tokens, dim)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    q, *cache = (torch.from_numpy(array) for array in cache_inputs(case))
    query = q.view(case.rows, case.heads, 1, case.dim)
    keys, values = (
        x.view(case.turns, case.rows, case.length, case.kv_heads, case.dim).transpose(2, 3).contiguous()
        for x in cache
    )
    turn = 0

    def decode() -> Any:
        nonlocal turn
        k, v = keys[turn], values[turn]
        turn = (turn + 1) % case.turns
        return scaled_dot_product_attention(query, k, v, enable_gqa=case.heads > case.kv_heads)

    with torch.no_grad():
        check_cache(case, decode().numpy())
    return {"decode": torch.no_grad()(decode)}


def race_cache(runtimes: Runtimes, case: Cache) -> dict[str, Any]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [Contestant("nplora", nplora_cached, (case, threads, path), ceilings=("read",))]
    if has_torch():
        contestants.append(Contestant("torch", torch_cached, (case, threads), "torch"))
    result = runtimes.race(contestants, rounds=9, seconds=0.05)
    mine = "nplora", "decode"
    share = result.share(case.bytes_read, mine, ("nplora", "read")) if ("nplora", "read") in result else None
    over = result.ratio(("torch", "decode"), mine) if ("torch", "decode") in result else None
    shape = f"{case.rows} x {case.length}"
    print(
        f"  {shape:>9} {case.heads:5} {case.kv_heads:3} {case.dim:4}{result.median(*mine) * 1e3:9.3f}"
        f"{'' if share is None else f'{share:9.1%}'}{'' if over is None else f'   {over:.2f}'}"
    )
    return {
        **case._asdict(),
        "threads": threads,
        "seconds": result.median(*mine),
        "of_read": share,
        "over": over,
    }


# ---- rows ----

Rows = dict[str, Callable[[], Any]]

# The least number of bytes that each one reads and writes.
ROW_BYTES = {
    "RMSNorm": 4 * N * D_MODEL * 2,
    "RMSNorm backward": 4 * N * D_MODEL * 3,
    "SwiGLU": 4 * N * D_FF * 3,
    "SwiGLU backward": 4 * N * D_FF * 5,
    "cross-entropy with gradient": 4 * N * VOCAB * 2,
}


def check_rows(got: dict[str, np.ndarray]) -> None:
    """Check some rows of each result. exp, and values computed from it, err by a few roundings."""
    rows = slice(None, None, 97)
    x, dy = normal(N, D_MODEL).astype(np.float64)[rows], normal(N, D_MODEL, seed=1).astype(np.float64)[rows]
    r = 1 / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + EPS)
    along = x * r**3
    assert_within_rounding(got["RMSNorm"][rows], x * r, np.abs(x * r), D_MODEL)
    assert_within_rounding(
        got["RMSNorm backward"][rows],
        dy * r - along * (dy * x).mean(axis=1, keepdims=True),
        np.abs(dy * r) + np.abs(along) * np.abs(dy * x).mean(axis=1, keepdims=True),
        3 * D_MODEL,
    )
    gate, up, dout = (normal(N, D_FF, seed=seed).astype(np.float64)[rows] for seed in range(3))
    s = 1 / (1 + np.exp(-gate))
    assert_within_rounding(got["SwiGLU"][rows], gate * s * up, np.abs(gate * s * up), 16)
    size = np.abs(dout * up * s) * (2 + 2 * np.abs(gate))
    assert_within_rounding(got["SwiGLU backward"][rows], dout * up * s * (1 + gate * (1 - s)), size, 16)
    logits = normal(N, VOCAB).astype(np.float64)[rows]
    targets = np.arange(N)[rows]
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    p[np.arange(len(p)), targets] -= 1
    assert_within_rounding(N * got["cross-entropy with gradient"][rows], p, np.abs(p) + 1e-6, 4096)


def nplora_rows(threads: int, path: str | None) -> Calls:
    import nplora
    from nplora import _core

    nplora.set_num_threads(threads)
    x, dy, weight = normal(N, D_MODEL), normal(N, D_MODEL, seed=1), np.ones(D_MODEL, np.float32)
    gate, up, dout = (normal(N, D_FF, seed=seed) for seed in range(3))
    logits, targets, losses = normal(N, VOCAB), np.arange(N), np.empty(N)
    y, dx, out, dgate, dup = (np.empty_like(array) for array in (x, x, gate, gate, gate))
    calls: Rows = {
        "RMSNorm": lambda: _core.rms_norm(x, weight, EPS, y),
        "RMSNorm backward": lambda: _core.rms_norm_backward(dy, x, weight, EPS, dx, False),
        "SwiGLU": lambda: _core.gated("silu", gate, up, out),
        "SwiGLU backward": lambda: _core.gated_backward("silu", dout, gate, up, dgate, dup),
        "cross-entropy with gradient": lambda: _core.cross_entropy(logits, targets, 1 / N, losses, True),
    }
    for call in calls.values():
        call()
    check_rows(dict(zip(calls, (y, dx, out, dgate, logits), strict=True)))
    return calls if path is None else {"rewrite": ceilings.rewrite(path, threads), **calls}


def torch_rows(threads: int) -> Calls:
    """The same with torch's functions. Gradients come from autograd, as in a model."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    x, dy, weight = normal(N, D_MODEL), normal(N, D_MODEL, seed=1), torch.ones(D_MODEL)
    x, dy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)
    gate, up, dout = (torch.from_numpy(normal(N, D_FF, seed=seed)) for seed in range(3))
    gate.requires_grad_(), up.requires_grad_()
    logits, targets = torch.from_numpy(normal(N, VOCAB)).requires_grad_(), torch.arange(N)

    def norm() -> Any:
        return functional.rms_norm(x, (D_MODEL,), weight, EPS)

    def gated() -> Any:
        return functional.silu(gate) * up

    normed, product = norm(), gated()
    calls: Rows = {
        "RMSNorm": torch.no_grad()(norm),
        "RMSNorm backward": lambda: torch.autograd.grad(normed, x, dy, retain_graph=True)[0],
        "SwiGLU": torch.no_grad()(gated),
        "SwiGLU backward": lambda: torch.autograd.grad(product, (gate, up), dout, retain_graph=True)[0],
        "cross-entropy with gradient": lambda: torch.autograd.grad(
            functional.cross_entropy(logits, targets), logits
        )[0],
    }
    check_rows({name: call().numpy() for name, call in calls.items()})
    return calls


def race_rows(runtimes: Runtimes) -> list[dict[str, Any]]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [Contestant("nplora", nplora_rows, (threads, path), ceilings=("rewrite",))]
    if has_torch():
        contestants.append(Contestant("torch", torch_rows, (threads,), "torch"))
    result = runtimes.race(contestants, rounds=9, seconds=0.05)
    rows = []
    for name, moved in ROW_BYTES.items():
        mine = "nplora", name
        share = result.share(moved, mine, ("nplora", "rewrite")) if ("nplora", "rewrite") in result else None
        over = result.ratio(("torch", name), mine) if ("torch", name) in result else None
        print(
            f"  {name:28}{result.median(*mine) * 1e3:9.3f}{'' if share is None else f'{share:9.1%}'}"
            f"{'' if over is None else f'   {over:.2f}'}"
        )
        rows.append(
            {
                "name": name,
                "threads": threads,
                "seconds": result.median(*mine),
                "of_rewrite": share,
                "over": over,
            }
        )
    return rows


def run(quick: bool, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Print the races on `threads` threads, and return their figures."""
    runtimes = Runtimes(threads)
    print(f"\ncausal attention, forward + backward, {on_threads(threads)}")
    print(f"  {'tokens':>9} {'heads':>5} {'kv':>3} {'dim':>4}{'ms':>9}{'of FMA':>9}   × as fast as torch")
    attention = [race_attention(runtimes, case) for case in (SMOLLM2 if quick else SMOLLM2 + WIDER)]
    print(f"\nattention of one new token, {on_threads(threads)}")
    print(f"  {'tokens':>9} {'heads':>5} {'kv':>3} {'dim':>4}{'ms':>9}{'of read':>9}   × as fast as torch")
    decoding = [race_cache(runtimes, case) for case in (CACHES[1:2] if quick else CACHES)]
    print(f"\n{N} tokens of SmolLM2-135M, {on_threads(threads)}")
    print(f"  {'':28}{'ms':>9}{'of memory':>10}  × as fast as torch")
    return {"attention": attention, "decoding": decoding, "rows": race_rows(runtimes)}
