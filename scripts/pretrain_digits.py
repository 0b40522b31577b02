"""Pretrain the demo's network on handwritten digits and write python/nplora/cli/demo/digits.safetensors.

    python scripts/pretrain_digits.py [OUTPUT]        (NumPy, scikit-learn and nplora installed; about 15 s)

The training uses plain NumPy, as if somebody else had done it. The network has 64, 512, 512 and 10 units,
with ReLU. AdamW trains it with a cosine schedule, on images that are moved, turned and scaled a little at
random. Each matrix is rounded to multiples of a step, half of its standard deviation, so that it compresses
well. The file holds the multiples as int8 (`fc1.weight`), the steps (`fc1.step`) and float16 biases. It also
holds the three parts of the 1,797 digits, so that whoever adapts the network knows which digits it has never
seen. One machine gives the same bytes each time, but other BLAS libraries round differently.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from nplora.formats import safetensors

SIZES = (64, 512, 512, 10)
PARTS = {"train": 837, "adaptation": 600, "held_out": 360}
EPOCHS, BATCH, RATE, DECAY, SEED = 100, 32, 1e-3, 0.01, 0
TURN, SHIFT, ZOOM, SHARE = 10.0, 0.7, 0.1, 0.7  # degrees, pixels, log scale, share of images moved
OUTPUT = Path(__file__).parents[1] / "python/nplora/cli/demo/digits.safetensors"


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    order = np.random.default_rng(SEED).permutation(len(labels)).astype(np.int16)
    rows = np.split(order, np.cumsum(list(PARTS.values()))[:-1])
    parts = dict(zip(PARTS, rows, strict=True))

    tensors, weights = dict[str, np.ndarray](), list[np.ndarray]()
    trained = pretrain(images[parts["train"]], labels[parts["train"]])
    for i, (w, b) in enumerate(zip(trained[::2], trained[1::2], strict=True), 1):
        codes, step, bias = *coarse(w), b.astype(np.float16)
        tensors |= {f"fc{i}.weight": codes, f"fc{i}.step": step, f"fc{i}.bias": bias}
        weights += [codes * step, bias.astype(np.float32)]
    for part, rows in parts.items():
        logits = forward(flatten(images[rows]), weights)[-1]
        print(f"{part:11}{len(rows):5} digits  {np.mean(logits.argmax(1) == labels[rows]):.1%} right")

    tensors |= {f"split.{part}": rows for part, rows in parts.items()}
    made = f"UCI handwritten digits as in scikit-learn, AdamW, {EPOCHS} epochs, scripts/{Path(__file__).name}"
    safetensors.save(output, tensors, {"format": "np", "made_from": made})
    print(f"{output}: {output.stat().st_size:,} bytes")


def coarse(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to int8 multiples of a step (1,): a power of 2 that is at most half of the standard deviation."""
    step = 2.0 ** np.floor(np.log2(w.std() / 2))
    return np.round(w / step).astype(np.int8), np.array([step], np.float32)


def pretrain(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Weights and biases, W1, b1, W2, b2, W3, b3, from images (n, 8, 8) of 0..16 and labels (n,)."""
    rng = np.random.default_rng(SEED)
    weights: list[np.ndarray] = []
    for d_in, d_out in pairwise(SIZES):
        weights.append(rng.normal(0, np.sqrt(2 / d_in), (d_out, d_in)).astype(np.float32))
        weights.append(np.zeros(d_out, np.float32))
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    total, step = EPOCHS * -(-len(labels) // BATCH), 0
    for _ in range(EPOCHS):
        order = rng.permutation(len(labels))
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            step += 1
            rate = RATE * (1 + np.cos(np.pi * step / total)) / 2
            grads = gradients(flatten(moved(images[rows], rng)), labels[rows], weights)
            for w, g, m, v in zip(weights, grads, first, second, strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                w *= 1 - rate * DECAY
                w -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return weights


def forward(x: np.ndarray, weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both hidden layers and the logits."""
    W1, b1, W2, b2, W3, b3 = weights
    h1 = np.maximum(x @ W1.T + b1, 0)
    h2 = np.maximum(h1 @ W2.T + b2, 0)
    return h1, h2, h2 @ W3.T + b3


def gradients(x: np.ndarray, labels: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    """The gradients of the mean cross-entropy, in the order of the weights."""
    h1, h2, logits = forward(x, weights)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    dy = p / p.sum(axis=1, keepdims=True)
    dy[np.arange(len(labels)), labels] -= 1
    dy /= len(labels)
    d2 = (dy @ weights[4]) * (h2 > 0)
    d1 = (d2 @ weights[2]) * (h1 > 0)
    return [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), dy.T @ h2, dy.sum(0)]


def flatten(images: np.ndarray) -> np.ndarray:
    """(n, 8, 8) of 0..16 to (n, 64) of 0..1, as the demo does."""
    return (images.reshape(len(images), 64) / 16).astype(np.float32)


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, scale and shift most images a little, with bilinear interpolation. Pixels from outside are 0."""
    n = len(images)
    picked = rng.random(n) < SHARE
    angle = picked * np.radians(rng.uniform(-TURN, TURN, n))
    zoom = np.exp(picked * rng.uniform(-ZOOM, ZOOM, n))
    shift = picked * rng.uniform(-SHIFT, SHIFT, (2, n))
    cos, sin = (zoom * np.cos(angle))[:, None, None], (zoom * np.sin(angle))[:, None, None]
    row, column = np.mgrid[:8, :8] - 3.5
    padding = 3
    row, column = (
        np.clip(place + move[:, None, None] + 3.5 + padding, 0, 7 + 2 * padding - 1e-6)
        for place, move in ((cos * row - sin * column, shift[0]), (sin * row + cos * column, shift[1]))
    )
    top, left, image = row.astype(int), column.astype(int), np.arange(n)[:, None, None]
    down, right = row - top, column - left
    wide = np.pad(images, ((0, 0), (padding, padding), (padding, padding)))
    above = (1 - right) * wide[image, top, left] + right * wide[image, top, left + 1]
    below = (1 - right) * wide[image, top + 1, left] + right * wide[image, top + 1, left + 1]
    return (1 - down) * above + down * below


if __name__ == "__main__":
    main()
