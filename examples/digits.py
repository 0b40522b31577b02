"""Adapt a scikit-learn network to images that it has never seen.

scikit-learn trains a small network on handwritten digits. Then the images are turned by a quarter, and the
network fails. LoRA adapts it with 400 turned images. The merged weights go back into scikit-learn's network.

    pip install "nplora[demo]"
    python examples/digits.py
"""

import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import nplora


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # (1797, 64), values from 0 to 1
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    old, adaptation, held_out = slice(0, 1000), slice(1000, 1400), slice(1400, None)

    # 1. A network that knows upright digits only.
    mlp = MLPClassifier(hidden_layer_sizes=(128,), batch_size=50, max_iter=40, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 40 passes are enough here
        mlp.fit(images[old], labels[old])
    upright = mlp.score(images[held_out], labels[held_out])
    before = mlp.score(turned[held_out], labels[held_out])
    print(f"pretrained:       {upright:.1%} of upright digits, {before:.1%} of turned ones")

    # 2. The same network with frozen weights and an adapter on each layer.
    layers = [
        nplora.LoRALinear(W.T, rank=8, bias=b, rng=seed)  # scikit-learn keeps (d_in, d_out)
        for seed, (W, b) in enumerate(zip(mlp.coefs_, mlp.intercepts_, strict=True))
    ]
    net = nplora.Sequential(layers[0], nplora.ReLU(), layers[1])
    net.print_trainable_parameters()
    trainer = nplora.Trainer(net, "cross_entropy", nplora.AdamW(lr=5e-3), schedule="cosine", progress=False)
    trainer.fit(turned[adaptation], labels[adaptation], epochs=40)
    after = trainer.evaluate(turned[held_out], labels[held_out])["accuracy"]
    print(f"adapted:          {after:.1%} of turned digits")

    # 3. Without the adapter, the old network is still there.
    with net.disable_adapter():
        off = trainer.evaluate(images[held_out], labels[held_out])["accuracy"]
    print(f"adapter off:      {off:.1%} of upright digits, as before")

    # 4. Back into scikit-learn: its weights are replaced by the merged ones.
    mlp.coefs_ = [layer.merged_weight().T.astype(np.float64) for layer in layers]
    merged = mlp.score(turned[held_out], labels[held_out])
    print(f"in scikit-learn:  {merged:.1%} of turned digits")

    assert abs(off - upright) < 0.005
    assert before < 0.3
    assert after > 0.85
    assert abs(merged - after) < 0.005


if __name__ == "__main__":
    main()
