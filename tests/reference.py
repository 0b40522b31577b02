"""The oracle: every operation of nplora in plain float64 NumPy, and the error bounds for float32.

Names and shapes are the project's: W (d_out, d_in), A (d_out, r), B (r, d_in), x (n, d_in).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


# ---- bounds ----


def gamma(k: int, dtype: Any = np.float32) -> float:
    """γ_k = k u / (1 - k u), the relative error of k rounded operations in a row (Higham 2002, lemma 3.1)."""
    u = float(np.finfo(dtype).eps) / 2
    assert k * u < 1
    return k * u / (1 - k * u)


# ---- the low-rank update ----


def lora_forward(
    x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None, mask: Array | None = None
) -> tuple[Array, Array]:
    """z = (mask ∘ x) Bᵀ;  y = x Wᵀ + scale · z Aᵀ [+ bias].  mask (n, d_in) holds 0 or 1 / (1 - p)."""
    x, W, A, B = (np.asarray(v, np.float64) for v in (x, W, A, B))
    z = (x if mask is None else x * mask) @ B.T
    y = x @ W.T + scale * z @ A.T
    return (y if bias is None else y + bias), z


def lora_backward(
    dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """dz = scale · dy A;  dx = dy W + mask ∘ (dz B);  dA = scale · dyᵀ z;  dB = dzᵀ (mask ∘ x)."""
    dy, x, W, A, B = (np.asarray(v, np.float64) for v in (dy, x, W, A, B))
    dropped = x if mask is None else x * mask
    dz = scale * dy @ A
    low = dz @ B
    dx = dy @ W + (low if mask is None else low * mask)
    return dx, scale * dy.T @ (dropped @ B.T), dz.T @ dropped


def convolution(
    x: Array, W: Array, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Array:
    """y[n, o, i, j] = Σ over c, u, v of W[o, c, u, v] · x[n, c, i·stride + u·dilation - padding, …]."""
    x, W = np.asarray(x, np.float64), np.asarray(W, np.float64)
    (top, left), (_, _, height, width) = padding, W.shape
    x = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    rows = range(0, x.shape[2] - dilation[0] * (height - 1), stride[0])
    columns = range(0, x.shape[3] - dilation[1] * (width - 1), stride[1])
    y = np.zeros((len(x), len(W), len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for u in range(height):
                for v in range(width):
                    seen = x[:, :, row + u * dilation[0], column + v * dilation[1]]
                    y[:, :, i, j] += seen @ W[:, :, u, v].T
    return y


def merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    """W + scale · A·B."""
    return np.asarray(W, np.float64) + scale * np.asarray(A, np.float64) @ np.asarray(B, np.float64)


def row_norms(W: Array) -> Array:
    """‖W_o‖ for each row."""
    return np.asarray(np.sqrt(np.square(np.asarray(W, np.float64)).sum(axis=1)))


def dora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    m: Array,
    scale: float,
    norm: Array,
    bias: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """y = (m / norm) ∘ u [+ bias] with u of `lora_forward`. The caller gives the norm."""
    u, _ = lora_forward(x, W, A, B, scale, None, mask)
    y = u * (np.asarray(m, np.float64) / norm)
    return y if bias is None else y + bias


# ---- dropout ----


def philox4x32(counter: Array, key: int) -> Array:
    """Philox4x32-10 (Salmon et al. 2011) of the counters (n,) uint64 (upper 64 bits zero): (n, 4) words."""
    low = np.uint64(0xFFFFFFFF)
    words = [counter & low, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (product1 >> np.uint64(32)) ^ words[1] ^ np.uint64(key0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ words[3] ^ np.uint64(key1),
            product0 & low,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(words, axis=-1).astype(np.uint32)


def dropout_mask(shape: tuple[int, ...], probability: float, key: int) -> Array:
    """The factor of each element: 0 if its word of Philox is too small, else 1 / (1 - p)."""
    n = math.prod(shape)
    words = philox4x32(np.arange((n + 3) // 4, dtype=np.uint64), key).reshape(-1)[:n]
    dropped = words < math.floor(probability * 2**32)
    return np.where(dropped, 0.0, 1 / (1 - probability)).reshape(shape)


# ---- activations and norms ----


def gelu(x: Array, approximate: str = "none") -> Array:
    """x Φ(x), or its tanh form."""
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))


def silu(x: Array) -> Array:
    """x σ(x)."""
    return np.asarray(x / (1 + np.exp(-x)))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """weight ∘ (x - mean) / sqrt(variance + eps) + bias, over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(weight * centred / np.sqrt(x.var(axis=-1, keepdims=True) + eps) + bias)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """weight ∘ x / sqrt(mean x² + eps), over the last axis."""
    return np.asarray(weight * x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps))


def layer_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> Array:
    """dx of `layer_norm`: r (dn - mean dn - xn mean(dn xn)), with dn = dy ∘ weight and normalised rows xn."""
    r = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    xn, dn = (x - x.mean(axis=-1, keepdims=True)) * r, dy * weight
    return np.asarray(
        r * (dn - dn.mean(axis=-1, keepdims=True) - xn * (dn * xn).mean(axis=-1, keepdims=True))
    )


# ---- the operations of a transformer ----


def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> Array:
    """dx of `rms_norm`: r (dn - n mean(dn ∘ n)), dn = dy ∘ weight, n = x r, r = 1 / sqrt(mean x² + eps)."""
    r = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
    dn, n = dy * weight, x * r
    return np.asarray(r * (dn - n * (dn * n).mean(axis=-1, keepdims=True)))


def rope(x: Array, angles: Array, interleaved: bool) -> Array:
    """Each pair of x (n, heads, head_dim) as a complex number, times exp(i angle); angles (n, head_dim/2)."""
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    # np.exp of a complex number calls a C function that Wine lacks.
    turned = (a + 1j * b) * (np.cos(angles) + 1j * np.sin(angles))[:, None, :]
    out = np.empty_like(x)
    if interleaved:
        out[..., ::2], out[..., 1::2] = turned.real, turned.imag
    else:
        out[..., :half], out[..., half:] = turned.real, turned.imag
    return out


def gelu_tanh(x: Array) -> Array:
    """x (1 + tanh u) / 2 (Hendrycks and Gimpel 2016), as x / (1 + exp(-2 u)), which avoids cancellation."""
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def exact_gelu(x: Array) -> Array:
    """x Φ(x). Unlike `gelu`, this is exact for x far below 0 too."""
    return np.asarray(x * normal_distribution(x))


def normal_distribution(x: Array) -> Array:
    """Φ(x) = erfc(-x / √2) / 2."""
    return np.asarray(np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2)


def gated(act: str, gate: Array, up: Array) -> Array:
    """act(gate) ∘ up (Shazeer 2020)."""
    return np.asarray({"silu": silu, "gelu_pytorch_tanh": gelu_tanh, "gelu": exact_gelu}[act](gate) * up)


def gated_backward(act: str, dout: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """dgate and dup, using σ' = σ (1 - σ) p' for act(g) = g σ(p), and Φ' = φ for the exact GELU."""
    if act == "gelu":
        slope = normal_distribution(gate) + gate * np.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
        return dout * up * slope, dout * exact_gelu(gate)
    root = 2 * np.sqrt(2 / np.pi)
    inner, its_slope = root * (gate + 0.044715 * gate**3), root * (1 + 3 * 0.044715 * gate**2)
    if act == "silu":
        inner, its_slope = gate, np.ones_like(gate)
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-inner))
    slope = s + gate * s * (1 - s) * its_slope
    return dout * up * slope, dout * gated(act, gate, np.ones_like(gate))


def sees(queries: int, keys: int, window: int, causal: bool = True) -> Array:
    """Which key a query sees, (queries, keys). The last query is the last key.

    window 0: all earlier keys, and all later ones too if `causal` is False.
    """
    distance = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
    near = np.abs(distance) < window if window else np.ones_like(distance, bool)
    return np.asarray(near & (distance >= 0) if causal else near)


def attention(
    q: Array, k: Array, v: Array, scale: float, window: int, causal: bool = True, bias: Array | None = None
) -> tuple[Array, Array, Array]:
    """out, lse and the weights p of one head of one sequence, using the full matrix of scores.

    bias: None, or a number for each distance from 1 - tokens to tokens - 1 of the key from the query.
    """
    scores = scale * q @ k.T
    if bias is not None:
        scores = scores + bias[len(q) - 1 + np.arange(len(k)) - np.arange(len(q))[:, None]]
    scores = np.where(sees(len(q), len(k), window, causal), scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=1)
    p = np.exp(scores - lse[:, None])
    return p @ v, lse, p


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int,
    causal: bool = True,
    bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv of `attention`, using the Jacobian of softmax: ds = p ∘ (dp - Σ p dp)."""
    _, _, p = attention(q, k, v, scale, window, causal, bias)
    dp = dout @ v.T
    ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ dout


def grouped_heads(x: Array, heads: int, starts: Array) -> list[list[Array]]:
    """x (n, heads · d) by sequence and head: float64 views of (tokens, d)."""
    by_head = np.asarray(x, np.float64).reshape(len(x), heads, x.shape[1] // heads)
    return [[by_head[first:end, head] for head in range(heads)] for first, end in pairwise(starts)]


# ---- losses ----


def mse(p: Array, t: Array) -> float:
    """mean (p - t)²."""
    return float(np.square(p - t).mean())


def huber(p: Array, t: Array, delta: float = 1.0) -> float:
    """mean of e²/2 where |e| <= delta, else delta (|e| - delta / 2)."""
    e = np.abs(p - t)
    return float(np.where(e <= delta, e * e / 2, delta * (e - delta / 2)).mean())


def bce(p: Array, t: Array) -> float:
    """mean of -t log σ(p) - (1 - t) log(1 - σ(p))."""
    return float((t * np.logaddexp(0, -p) + (1 - t) * np.logaddexp(0, p)).mean())


def cross_entropy(p: Array, labels: Array, ignore_index: int = -100) -> float:
    """mean over labelled rows of log Σ exp(p) - p[label]."""
    rows = p.reshape(-1, p.shape[-1])
    terms = [
        np.logaddexp.reduce(row) - row[label]
        for row, label in zip(rows, labels.reshape(-1), strict=True)
        if label != ignore_index
    ]
    return float(np.mean(terms))


# ---- optimisers ----


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> tuple[Array, Array, Array]:
    """p, m and v after step t (Loshchilov & Hutter 2019, algorithm 2)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * decay * p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def sgd(
    p: Array, g: Array, buffer: Array, lr: float, momentum: float, decay: float, nesterov: bool
) -> tuple[Array, Array]:
    """p and the momentum buffer after a step, as torch computes it."""
    g = g + decay * p
    buffer = momentum * buffer + g
    return p - lr * (g + momentum * buffer if nesterov else buffer), buffer


# ---- differences ----


def gradient_error(
    loss: Callable[[], float],
    pairs: Sequence[tuple[Array, Array]],
    rng: np.random.Generator,
    directions: int = 100,
    step: float = 1e-5,
) -> float:
    """The largest relative error of a gradient against central differences, in random directions.

    Args:
        loss: evaluated with the current content of the arrays.
        pairs: (array, its gradient), float64. The arrays are changed and restored.
    """
    before = [value.copy() for value, _ in pairs]

    def at(distance: float, direction: list[Array]) -> float:
        for (value, _), start, d in zip(pairs, before, direction, strict=True):
            value[...] = start + distance * d
        return loss()

    worst = 0.0
    for _ in range(directions):
        direction = [rng.standard_normal(value.shape) for value, _ in pairs]
        numeric = (at(step, direction) - at(-step, direction)) / (2 * step)
        exact = sum(float((grad * d).sum()) for (_, grad), d in zip(pairs, direction, strict=True))
        worst = max(worst, abs(numeric - exact) / max(abs(numeric), abs(exact)))
    for (value, _), start in zip(pairs, before, strict=True):
        value[...] = start
    return worst
