"""Compare adapters: rank, method, what a merge into few bits costs, and how two adapters add up.

The task of a pretrained network has changed. Several adapters learn the new task, and a table shows the cost
and the loss of each. Then two adapters that were trained on two tasks are added up with weights.

    python examples/comparing_adapters.py
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import nplora

D_IN, HIDDEN, D_OUT = 64, 128, 64
TARGET_RANK = 4  # of the change that the tasks ask for, in each layer
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, rank 1": {"rank": 1},
    "LoRA, rank 2": {"rank": 2},
    "LoRA, rank 4": {"rank": 4},
    "LoRA, rank 8": {"rank": 8},
    "rank 8, B frozen (LoRA-FA)": {"rank": 8, "freeze_B": True},
    "rank 4, rsLoRA": {"rank": 4, "use_rslora": True},
    "rank 4, DoRA": {"rank": 4, "use_dora": True},
}


class Task:
    """Rows x, and the outputs y of a network whose two weights have moved by matrices of low rank."""

    def __init__(self, W1: np.ndarray, W2: np.ndarray, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((3000, D_IN), dtype=np.float32)
        hidden = np.maximum(self.x @ (W1 + low_rank(rng, W1.shape)).T, 0)
        self.y = hidden @ (W2 + low_rank(rng, W2.shape)).T


def low_rank(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    factors = rng.standard_normal((shape[0], TARGET_RANK)), rng.standard_normal((TARGET_RANK, shape[1]))
    return (factors[0] @ factors[1] / (3 * np.sqrt(TARGET_RANK * shape[1]))).astype(np.float32)


def network(W1: np.ndarray, W2: np.ndarray, **options: Any) -> nplora.Sequential:
    net = nplora.Sequential(nplora.LoRALinear(W1, **options), nplora.ReLU(), nplora.LoRALinear(W2, **options))
    net.seed(0)
    return net


def train(net: nplora.Sequential, task: Task) -> None:
    optimizer = nplora.AdamW(lr=1e-2, weight_decay=0.0)
    trainer = nplora.Trainer(net, "mse", optimizer, schedule="cosine", progress=False)
    trainer.fit(task.x[:2500], task.y[:2500], epochs=20, batch_size=50)


def loss(net: nplora.Sequential, task: Task) -> float:
    return nplora.Trainer(net, "mse").evaluate(task.x[2500:], task.y[2500:])["loss"]


def main() -> None:
    rng = np.random.default_rng(0)
    W1 = rng.standard_normal((HIDDEN, D_IN), dtype=np.float32) / np.sqrt(D_IN)
    W2 = rng.standard_normal((D_OUT, HIDDEN), dtype=np.float32) / np.sqrt(HIDDEN)
    compare_methods(W1, W2)
    add_two(W1, W2)


def compare_methods(W1: np.ndarray, W2: np.ndarray) -> None:
    task = Task(W1, W2, seed=1)
    base = loss(network(W1, W2), task)
    print(f"The task asks for a change of rank {TARGET_RANK}. Loss of the pretrained network: {base:.4f}")
    print("All adapters train with the same learning rate. The last columns are the loss after a merge.\n")
    print(f"{'adapter':<28}{'trained':>8}{'loss':>10}{'in q8_0':>10}{'in q4_0':>10}")
    losses = {}
    for name, options in METHODS.items():
        net = network(W1, W2, **options)
        train(net, task)
        losses[name] = loss(net, task)
        merged = [loss_merged(net, task, storage) for storage in ("q8_0", "q4_0")]
        print(f"{name:<28}{net.num_trainable:>8,}{losses[name]:>10.4f}{merged[0]:>10.4f}{merged[1]:>10.4f}")
    assert losses["LoRA, rank 4"] < losses["LoRA, rank 2"] < losses["LoRA, rank 1"] < base
    assert losses["LoRA, rank 4"] < 0.1 * base


def loss_merged(net: nplora.Sequential, task: Task, storage: str) -> float:
    """The loss with the adapters merged into weights of 8 or 4 bits."""
    net.merge(storage)
    after = loss(net, task)
    net.unmerge()  # the frozen weights are back, bit for bit
    return after


def add_two(W1: np.ndarray, W2: np.ndarray) -> None:
    tasks = {"first": Task(W1, W2, seed=1), "second": Task(W1, W2, seed=2)}
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: Path(directory, name) for name in tasks}
        for name, task in tasks.items():
            net = network(W1, W2, rank=4)
            train(net, task)
            nplora.save_adapter(net, paths[name])

        print(f"\n{'adapter':<28}{'rank':>8}{'loss on the first task':>24}{'on the second':>15}")
        rows: dict[str, Any] = {
            "none": None,
            "first": nplora.read_adapter(paths["first"]),
            "second": nplora.read_adapter(paths["second"]),
            "sum of both": nplora.combine([(paths["first"], 1), (paths["second"], 1)]),
            "half of each": nplora.combine([(paths["first"], 0.5), (paths["second"], 0.5)]),
            "half of each, cut to rank 4": nplora.combine(
                [(paths["first"], 0.5), (paths["second"], 0.5)], rank=4
            ),
        }
    result = {}
    for name, adapter in rows.items():
        net = nplora.Sequential(nplora.Linear(W1), nplora.ReLU(), nplora.Linear(W2))
        if adapter is not None:
            adapter.attach(net)
        rank = 0 if adapter is None else max(delta.rank for delta in adapter.values())
        result[name] = [loss(net, task) for task in tasks.values()]
        print(f"{name:<28}{rank:>8}{result[name][0]:>24.4f}{result[name][1]:>15.4f}")
    cut = rows["half of each, cut to rank 4"]
    print(f"\nCutting to rank 4 changes the update by {cut.error:.0%} of its size.")

    assert result["first"][0] < result["none"][0]
    assert result["first"][0] < result["second"][0]
    assert result["second"][1] < result["first"][1]
    assert max(result["half of each"]) < max(result["first"][1], result["second"][0])


if __name__ == "__main__":
    main()
