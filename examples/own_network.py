"""A network of your own: forward and backward by hand, checked, trained, saved and loaded.

The network has a residual connection, which `nplora.Sequential` cannot express. Its `backward` is compared
with small steps, in float64. Then it learns, and its adapter is saved in PEFT's format and loaded again.

    python examples/own_network.py
"""

import tempfile
from typing import Any

import numpy as np

import nplora


class ResidualNet(nplora.Module):
    """y = W3 · (h + W2 · gelu(h)) with h = norm(W1 · x). W1, W2 and W3 are frozen and have adapters."""

    def __init__(self, W1: np.ndarray, W2: np.ndarray, W3: np.ndarray, dtype: str = "float32") -> None:
        self.fc1 = nplora.LoRALinear(W1, rank=4, dtype=dtype)
        self.norm = nplora.LayerNorm(np.ones(len(W1)), np.zeros(len(W1)), dtype=dtype)
        self.act = nplora.GELU()
        self.fc2 = nplora.LoRALinear(W2, rank=4, dtype=dtype)
        self.fc3 = nplora.LoRALinear(W3, rank=4, dtype=dtype)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        """The output, and what `backward` needs."""
        h, saved1 = self.fc1.forward(x)
        h, saved_norm = self.norm.forward(h)
        r, saved_act = self.act.forward(h)
        r, saved2 = self.fc2.forward(r)
        y, saved3 = self.fc3.forward(h + r)
        return y, (saved1, saved_norm, saved_act, saved2, saved3)

    def backward(self, dy: np.ndarray, saved: Any, need_dx: bool = True) -> np.ndarray | None:
        """The same lines from the last to the first. Each layer adds to the gradients of its factors."""
        saved1, saved_norm, saved_act, saved2, saved3 = saved
        dsum = self.fc3.backward(dy, saved3)  # of h + r: both get it
        dr = self.fc2.backward(dsum, saved2)
        dh = dsum + self.act.backward(dr, saved_act)
        dh = self.norm.backward(dh, saved_norm)
        return self.fc1.backward(dh, saved1, need_dx)  # need_dx=False skips a product with W1


def main() -> None:
    rng = np.random.default_rng(0)
    shapes = [(48, 32), (48, 48), (10, 48)]
    weights = [rng.standard_normal(shape, dtype=np.float32) / 7 for shape in shapes]

    check_gradients(weights)

    # The task: labels by a network whose weights have moved, each by a matrix of rank 2.
    moved = [W + rng.standard_normal((len(W), 2)) @ rng.standard_normal((2, W.shape[1])) / 7 for W in weights]
    x = rng.standard_normal((3000, 32), dtype=np.float32)
    labels = ResidualNet(*moved)(x).argmax(axis=1)

    net = ResidualNet(*weights)
    net.seed(0)  # every layer draws its own start from (seed, name)
    net.print_trainable_parameters()
    trainer = nplora.Trainer(net, "cross_entropy", nplora.AdamW(lr=1e-2), schedule="cosine", progress=False)
    before = trainer.evaluate(x[2500:], labels[2500:])["accuracy"]
    trainer.fit(x[:2500], labels[:2500], epochs=20, batch_size=50)
    after = trainer.evaluate(x[2500:], labels[2500:])["accuracy"]
    print(f"accuracy on held-out rows: {before:.1%} before, {after:.1%} after")
    assert after > before + 0.4

    with tempfile.TemporaryDirectory() as directory:
        nplora.save_adapter(net, directory)
        twin = ResidualNet(*weights)
        nplora.load_adapter(twin, directory)
    assert np.array_equal(twin(x), net(x))
    print("a fresh network with the saved adapter gives the same bits")


def check_gradients(weights: list[np.ndarray]) -> None:
    """Compare `backward` with central differences in a random direction of all factors."""
    rng = np.random.default_rng(1)
    net = ResidualNet(*weights, dtype="float64")
    for parameter in net.parameters():
        parameter.value[...] = rng.standard_normal(parameter.value.shape) / 4
    x = rng.standard_normal((5, 32))
    dy = rng.standard_normal((5, 10))  # the loss is the sum of dy · y
    directions = [rng.standard_normal(parameter.value.shape) for parameter in net.parameters()]

    net.zero_grad()
    net.backward(dy, net.forward(x)[1])
    exact = sum(np.sum(p.grad * d) for p, d in zip(net.parameters(), directions, strict=True))

    def loss_after_a_step(size: float) -> float:
        for parameter, direction in zip(net.parameters(), directions, strict=True):
            parameter.value[...] += size * direction
        loss = float(np.sum(dy * net(x)))
        for parameter, direction in zip(net.parameters(), directions, strict=True):
            parameter.value[...] -= size * direction
        return loss

    step = 1e-5
    measured = (loss_after_a_step(step) - loss_after_a_step(-step)) / (2 * step)
    print(f"slope in a random direction: {exact:.6f} by backward, {measured:.6f} by small steps")
    assert abs(exact - measured) < 1e-5 * abs(exact)


if __name__ == "__main__":
    main()
