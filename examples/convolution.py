"""Adapt a convolutional network to images that it has never seen, with LoRA on its convolutions.

A small network learns scikit-learn's handwritten digits, in NumPy. Then the images are turned by a quarter
and inverted, and the network fails. LoRA on the two convolutions and the last layer adapts it with 300 such
images.

    pip install "nplora[demo]"
    python examples/convolution.py
"""

import tempfile

import numpy as np
from sklearn.datasets import load_digits

import nplora

LAYERS = ["0", "3", "7"]  # the layers with weights, by their places in the network


def network(layers: list[nplora.Module]) -> nplora.Sequential:
    """(n, 1, 8, 8) -> 16 channels -> (n, 16, 4, 4) -> 32 channels -> (n, 32, 2, 2) -> 10 logits."""
    conv1, conv2, head = layers
    return nplora.Sequential(
        conv1, nplora.ReLU(), nplora.MaxPool2d(2),
        conv2, nplora.ReLU(), nplora.MaxPool2d(2),
        nplora.Flatten(), head,
    )  # fmt: skip


def pretrained(images: np.ndarray, labels: np.ndarray) -> nplora.Sequential:
    """Train all weights of the network on these digits, and return it with frozen weights."""
    rng = np.random.default_rng(0)
    W1, W2 = rng.normal(0, 0.3, (16, 1, 3, 3)), rng.normal(0, 0.1, (32, 16, 3, 3))
    W3 = rng.normal(0, 0.1, (10, 128))
    net = network([
        nplora.Conv2d(W1, np.zeros(16), padding=1, trainable=True),
        nplora.Conv2d(W2, np.zeros(32), padding=1, trainable=True),
        nplora.Linear(W3, np.zeros(10), trainable=True),
    ])  # fmt: skip
    trainer = nplora.Trainer(net, "cross_entropy", nplora.AdamW(lr=5e-3), schedule="cosine", progress=False)
    trainer.fit(images, labels, epochs=12)
    arrays = {parameter.name: parameter.value for parameter in net.parameters()}
    return network([
        nplora.Conv2d(arrays["0.weight"], arrays["0.bias"], padding=1),
        nplora.Conv2d(arrays["3.weight"], arrays["3.bias"], padding=1),
        nplora.Linear(arrays["7.weight"], arrays["7.bias"]),
    ])  # fmt: skip


def adapted(net: nplora.Sequential, rank: int) -> nplora.Sequential:
    """The same network with an adapter on each layer. It shares the frozen weights."""
    conv1, conv2, head = (net[int(name)] for name in LAYERS)
    return network([
        nplora.LoRAConv2d.over(conv1, rank, alpha=2 * rank),
        nplora.LoRAConv2d.over(conv2, rank, alpha=2 * rank),
        nplora.LoRALinear(head.weight, rank, alpha=2 * rank, bias=head.bias),
    ])  # fmt: skip


def accuracy(net: nplora.Module, images: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(net(images).argmax(axis=1) == labels))


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    changed = 1 - np.rot90(images, axes=(2, 3))
    old, adaptation, held_out = slice(0, 1000), slice(1000, 1300), slice(1300, None)

    # 1. A network that knows upright digits only.
    frozen = pretrained(images[old], labels[old])
    upright = accuracy(frozen, images[held_out], labels[held_out])
    before = accuracy(frozen, changed[held_out], labels[held_out])
    print(f"pretrained:   {upright:.1%} of upright digits, {before:.1%} of turned and inverted ones")

    # 2. Adapters on its three layers.
    net = adapted(frozen, rank=4)
    net.seed(0)
    net.print_trainable_parameters()
    trainer = nplora.Trainer(net, "cross_entropy", nplora.AdamW(lr=1e-2), schedule="cosine", progress=False)
    trainer.fit(changed[adaptation], labels[adaptation], epochs=40)
    after = accuracy(net, changed[held_out], labels[held_out])
    print(f"adapted:      {after:.1%} of turned and inverted digits")

    # 3. Without the adapter, the old network is still there.
    with net.disable_adapter():
        off = accuracy(net, images[held_out], labels[held_out])
    print(f"adapter off:  {off:.1%} of upright digits, as before")

    # 4. The adapter in PEFT's format, in a fresh network.
    with tempfile.TemporaryDirectory() as directory:
        nplora.save_adapter(net, directory)
        twin = adapted(frozen, rank=4)
        nplora.load_adapter(twin, directory)
    assert np.array_equal(twin(changed[held_out]), net(changed[held_out]))
    print("reloaded:     a fresh network with the saved adapter gives the same bits")

    # 5. Merged into the kernels: plain convolutions again.
    merged = accuracy(net.merge_and_unload(), changed[held_out], labels[held_out])
    print(f"merged:       {merged:.1%} of turned and inverted digits")

    assert upright > 0.95
    assert before < 0.3
    assert after > 0.85
    assert off == upright
    assert abs(merged - after) < 0.005


if __name__ == "__main__":
    main()
