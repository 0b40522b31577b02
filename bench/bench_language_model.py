"""A training step of a language model of SmolLM2-135M's sizes, all linear layers adapted, against PEFT."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.peft_layer import has_peft
from bench.timing import Calls, Contestant, Runtimes, on_threads

BATCH, LENGTH, RANK, ALPHA = 4, 256, 8, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
DTYPES = ("float32", "bfloat16")


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (BATCH, LENGTH))


def check(loss: float, dtype: str) -> None:
    """Before training, a random model knows nothing: its loss is near log(vocabulary), in any arithmetic."""
    # the logits are N(0, σ²) with σ about 0.02 √576 = 0.5, which adds σ² / 2
    if not abs(loss - np.log(CONFIG["vocab_size"]) - 0.12) < (0.05 if dtype == "float32" else 0.1):
        raise AssertionError(f"a contestant's loss is {loss}")


@contextmanager
def model_directory() -> Iterator[Path]:
    """A random model in bfloat16, as transformers writes one."""
    from nplora.formats import safetensors
    from nplora.models import hf_config

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(CONFIG))
        arrays = {}
        for key, shape in hf_config.read(directory / "config.json").shapes():
            values = (
                0.02 * rng.standard_normal(shape, np.float32) if len(shape) == 2 else np.ones(shape, "f4")
            )
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            arrays[key] = safetensors.Tensor(key, "bfloat16", bits)
        safetensors.save(directory / "model.safetensors", arrays, {"format": "pt"})
        yield directory


def nplora_step(directory: Path, dtype: str, threads: int) -> Calls:
    import nplora

    nplora.set_num_threads(threads)
    lm, ids, optimizer = nplora.load_model(directory, compute=dtype), tokens(), nplora.AdamW(lr=1e-4)
    lm.add_lora(RANK, ALPHA)
    check(lm.loss(ids, ids), dtype)
    return {"step": lambda: lm.train_step(ids, ids, optimizer)}


def peft_step(directory: Path, dtype: str, threads: int) -> Calls:
    """transformers and PEFT, attention by torch's fused kernel, factors in float32 as there by default."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(threads)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(base, config), torch.from_numpy(tokens())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    check(step(), dtype)
    return {"step": step}


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print tokens a second of each contestant; return the figures."""
    sizes = f"{BATCH}x{LENGTH} tokens, r={RANK}"
    print(f"\na training step of a language model of 135M, {sizes}, {on_threads(threads)}")
    rows = []
    with model_directory() as directory, Runtimes(threads) as runtimes:
        for dtype in DTYPES:
            contestants = [Contestant("nplora", nplora_step, (directory, dtype, threads))]
            if has_peft() and find_spec("transformers"):
                contestants.append(Contestant("PEFT", peft_step, (directory, dtype, threads), "torch"))
            result = runtimes.race(contestants, rounds=1 if quick else 5)
            seconds = {c.name: result.median(c.name, "step") for c in contestants}
            rates = {name: BATCH * LENGTH / value for name, value in seconds.items()}
            over = f", {seconds['PEFT'] / seconds['nplora']:.2f} times as fast" if "PEFT" in seconds else ""
            told = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
            print(f"  {dtype:9}{told}{over}")
            rows.append({"dtype": dtype, "threads": threads, "tokens_per_second": rates})
    return rows
