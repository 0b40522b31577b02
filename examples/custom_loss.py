"""A loss of your own, first with `Trainer`, then with a training loop of your own.

The loss is the pinball loss of quantile regression: with q = 0.9, the prediction should be above nine targets
in ten. Both ways of training give the same factors, bit for bit.

    python examples/custom_loss.py
"""

import numpy as np

import nplora

QUANTILE = 0.9
EPOCHS, BATCH, LR, MAX_NORM = 15, 50, 1e-2, 1.0


def pinball(prediction: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """A loss is any function of prediction and target that returns the loss and its gradient."""
    error = target - prediction
    loss = float(np.mean(np.maximum(QUANTILE * error, (QUANTILE - 1) * error)))
    gradient = np.where(error > 0, -QUANTILE, 1 - QUANTILE).astype(prediction.dtype) / error.size
    return loss, gradient


def network(W1: np.ndarray, W2: np.ndarray) -> nplora.Sequential:
    net = nplora.Sequential(nplora.LoRALinear(W1, rank=4), nplora.Tanh(), nplora.LoRALinear(W2, rank=1))
    net.seed(0)
    return net


def train_with_trainer(net: nplora.Sequential, x: np.ndarray, y: np.ndarray) -> float:
    trainer = nplora.Trainer(
        net, pinball, nplora.AdamW(lr=LR), schedule="cosine", clip_norm=MAX_NORM, progress=False
    )
    history = trainer.fit(x, y, epochs=EPOCHS, batch_size=BATCH, shuffle=False)
    return history.loss[-1]


def train_by_hand(net: nplora.Sequential, x: np.ndarray, y: np.ndarray) -> float:
    optimizer = nplora.AdamW(lr=LR)  # keeps its moments from step to step
    total = EPOCHS * len(x) // BATCH
    loss = 0.0
    for step in range(total):
        start = step * BATCH % len(x)
        rows = slice(start, start + BATCH)
        net.zero_grad()
        prediction, saved = net.forward(x[rows])
        loss, gradient = pinball(prediction, y[rows])
        net.backward(gradient, saved, need_dx=False)
        rate = LR * nplora.optim.schedule("cosine", step, total)
        optimizer.step(net.parameters(), lr=rate, max_norm=MAX_NORM)
    return loss


def main() -> None:
    rng = np.random.default_rng(0)
    W1 = rng.standard_normal((64, 8), dtype=np.float32) / 3  # pretrained
    W2 = rng.standard_normal((1, 64), dtype=np.float32) / 8
    x = rng.standard_normal((4000, 8), dtype=np.float32)
    x[:, -1] = 1  # a constant input: the layers have no bias
    noise = rng.standard_normal((4000, 1), dtype=np.float32)
    y = np.sin(x[:, :1]) + noise * (0.2 + 0.2 * np.abs(x[:, 1:2]))  # noise of different size everywhere

    net = network(W1, W2)
    below = float(np.mean(y < net(x)))
    loss = train_with_trainer(net, x, y)
    after = float(np.mean(y < net(x)))
    print(f"targets below the prediction: {below:.0%} before, {after:.0%} after; wanted {QUANTILE:.0%}")
    print(f"loss of the last batch: {loss:.4f}")
    assert abs(after - QUANTILE) < 0.03

    twin = network(W1, W2)
    assert train_by_hand(twin, x, y) == loss
    assert np.array_equal(twin(x), net(x))
    print("the loop by hand gives the same factors, bit for bit")


if __name__ == "__main__":
    main()
