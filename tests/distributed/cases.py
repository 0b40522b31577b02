"""Runs that one process or several ranks make. Every case returns values that must not depend on the ranks.

`python cases.py DIRECTORY` is the program of each rank: it runs all cases, and rank 0 writes results.json.
`python cases.py DIRECTORY STEP` runs or resumes a run until that step.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.distributed import Alone, Communicator, MPICommunicator
from nplora.finetuning import finetune
from nplora.finetuning import run as finetuning_run
from nplora.finetuning.planning import ExecutionPlan
from nplora.formats import safetensors
from nplora.models import head
from nplora.trainer import Callback, History, Run, StepRecord

ACCUMULATE = 5  # the last step of an epoch of 12 batches has 2 batches, which is fewer than 3 ranks
PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)} for n in range(24)]
ROWS = [{"prompt": f"{n} and one is ", "completion": f"{n + 1}" * (1 + n % 4)} for n in range(24)]
HELD_OUT = [{"prompt": f"{n}-{n}=", "completion": "0" * n} for n in range(1, 6)]
UNLIKED = [{"prompt": f"{n}-{n}=", "chosen": "0", "rejected": str(n)} for n in range(1, 5)]


def digest(model: nplora.Module, history: History) -> str:
    """A digest of the trained values and of the numbers that the run has recorded."""
    values = hashlib.sha256(b"".join(p.value.tobytes() for p in model.parameters()))
    steps = [(s.loss, s.count, s.grad_norm, s.metrics) for s in history.steps]
    evaluations = [(e.step, e.val_loss, e.val_accuracy, e.val_metrics) for e in history.evaluations]
    return f"{values.hexdigest()[:16]} {hashlib.sha256(repr((steps, evaluations)).encode()).hexdigest()[:16]}"


# ---- NumPy models ----


class Twice(nplora.Module):
    """Runs a layer with dropout twice in each pass, so that it draws two masks."""

    def __init__(self) -> None:
        self.layer = nplora.LoRALinear(np.eye(16), rank=2, rng=0, dropout=0.3)

    def forward(self, x: Any) -> Any:
        y, first = self.layer.forward(x)
        z, second = self.layer.forward(x)
        return y + z, (first, second)

    def backward(self, dy: Any, saved: Any) -> Any:
        first, second = saved
        return self.layer.backward(dy, first) + self.layer.backward(dy, second)


def arrays(labels: bool) -> tuple[Any, Any]:
    """Rows with labels of three classes, some of them ignored; or with targets of 16 numbers."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(81, 16)), rng.integers(0, 3, 81)
    y[rng.random(81) < 0.3] = -100
    y[7:14] = -100  # a batch without a label, if the rows are not shuffled
    return x, y if labels else x[:, ::-1]


def classifier() -> nplora.Module:
    rng = np.random.default_rng(1)
    frozen = nplora.LoRALinear(rng.normal(size=(24, 16)), rank=3, rng=1, dropout=0.3, use_dora=True)
    return nplora.Sequential(frozen, nplora.ReLU(), nplora.Linear(rng.normal(size=(3, 24)), trainable=True))


def fitted(
    ranks: Communicator | None,
    model: nplora.Module,
    loss: str = "cross_entropy",
    callbacks: Any = (),
    communication_dtype: str = "float32",
    local_steps: int | None = None,
    **more: Any,
) -> str:
    optimizer = nplora.AdamW(lr=0.05)
    trainer = nplora.Trainer(
        model, loss, optimizer, schedule="cosine", clip_norm=1.0, accumulate=ACCUMULATE, progress=False,
        communicator=ranks, callbacks=callbacks, communication_dtype=communication_dtype,
        local_steps=local_steps,
    )  # fmt: skip
    x, y = arrays(loss == "cross_entropy")
    options = {"validation": (x[:50], y[:50]), "eval_every": 2, "epochs": 3, "batch_size": 7} | more
    return digest(model, trainer.fit(x, y, **options))


def numpy_model(ranks: Communicator | None, directory: Path) -> str:
    return fitted(ranks, classifier())


def numpy_batch_without_labels(ranks: Communicator | None, directory: Path) -> str:
    return fitted(ranks, classifier(), shuffle=False)


def numpy_layer_used_twice(ranks: Communicator | None, directory: Path) -> str:
    return fitted(ranks, Twice(), "mse")


def numpy_float64(ranks: Communicator | None, directory: Path) -> str:
    layer = nplora.LoRALinear(np.eye(16), rank=2, rng=0, dtype="float64")
    return fitted(ranks, layer, "huber")


def numpy_sent_in_bfloat16(ranks: Communicator | None, directory: Path) -> str:
    return fitted(ranks, classifier(), communication_dtype="bfloat16")


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if run.step == self.step:
            run.stop()


def numpy_resumed(ranks: Communicator | None, directory: Path) -> str:
    """A run that stops twice, and is resumed."""
    for stop in (2, 5):
        resumed_part(ranks, directory / "resumed", stop)
    return resumed_part(ranks, directory / "resumed", None)


def resumed_part(ranks: Communicator | None, directory: Path, stop: int | None) -> str:
    """Run or resume until a step. Only the last rank wants to stop."""
    group = ranks or Alone()
    callbacks = [StopAt(stop)] if stop is not None and group.rank == group.size - 1 else []
    place = None if group.rank else directory  # other ranks do not know the directory
    return fitted(ranks, classifier(), callbacks=callbacks, checkpoint_dir=place, resume=True)


# ---- language models ----


@contextmanager
def executed(plan: ExecutionPlan | None) -> Iterator[None]:
    """Compute the steps of `finetune` by a plan, which would otherwise depend on memory."""
    before = finetuning_run.choose_execution
    if plan is not None:
        finetuning_run.choose_execution = lambda *arguments: plan
    try:
        yield
    finally:
        finetuning_run.choose_execution = before


def tuned(
    directory: Path, name: str, distributed: str | None, plan: ExecutionPlan | None = None, **more: Any
) -> str:
    """Fine-tune; return a digest of the adapter's file and of the history."""
    chosen = {"data": ROWS, "valid": HELD_OUT, "rank": 2, "lr": 1e-2, "batch_examples": 2, "epochs": 2} | more
    with executed(plan):
        report = finetune(
            directory / "model.gguf", output=directory / name, accumulate=ACCUMULATE, overwrite=True,
            progress=False, distributed=distributed, **chosen,
        )  # fmt: skip
    if report.process:
        return ""
    tensors = safetensors.open(directory / name / "adapter_model.safetensors")
    adapter = hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()
    steps = [(s.loss, s.count, s.grad_norm, s.metrics) for s in report.history.steps]
    evaluations = [(e.step, e.val_loss, e.val_metrics) for e in report.history.evaluations]
    numbers = repr((steps, evaluations, report.loss_before, report.metrics_before, report.loss_after))
    return f"{adapter[:16]} {hashlib.sha256(numbers.encode()).hexdigest()[:16]}"


CUT = ExecutionPlan("float32", False, 30)
LANGUAGE: dict[str, dict[str, Any]] = {
    "sft": {"dropout": 0.2, "use_dora": True, "sample": ["1 and one is "]},
    "tokens": {"batch_examples": None, "batch_tokens": 60, "schedule": "linear", "lora_plus_ratio": 4.0},
    "micro_batches": {"dropout": 0.2, "plan": ExecutionPlan("float32", True, 20), "batch_examples": 4},
    "trained_tokens": {"trainable_tokens": "a,1", "plan": CUT, "batch_examples": 4},
    "adapter_on_the_head": {"targets": "q_proj,lm_head", "plan": CUT, "batch_examples": 4},
    "bfloat16": {"compute": "bfloat16", "recompute": True, "steps": 3, "epochs": None},
    "int8": {"compute": "int8", "recompute": True, "dropout": 0.2, "steps": 3, "epochs": None},
    "freeze_B": {"freeze_B": True, "steps": 3, "epochs": None},
    "sent_in_bfloat16": {"communication_dtype": "bfloat16", "plan": CUT, "batch_examples": 4},
    "dpo": {"objective": "dpo", "data": PAIRS, "valid": UNLIKED},
    "dpo_micro_batches": {"objective": "dpo", "data": PAIRS, "valid": UNLIKED, "plan": CUT},
    "orpo": {"objective": "orpo", "data": PAIRS, "valid": UNLIKED, "dropout": 0.1},
    "kto": {"objective": "kto", "data": PAIRS, "valid": UNLIKED, "plan": CUT, "dropout": 0.1},
    "distill": {"objective": "distill", "teacher": "model.gguf", "kl": "reverse"},
}

Case = Callable[[Communicator | None, Path], str]
_CASES: list[Case] = [
    numpy_model, numpy_batch_without_labels, numpy_layer_used_twice, numpy_float64, numpy_resumed,
    numpy_sent_in_bfloat16,
]  # fmt: skip
NUMPY = {case.__name__: case for case in _CASES}
ADDS_TWICE = "numpy_layer_used_twice"  # to a gradient in one pass: has other bits without a communicator


@contextmanager
def small_chunks() -> Iterator[None]:
    """Let the head of a model compute a batch in several parts."""
    before = head._LEAST_ROWS, head._MOST_ROWS
    head._LEAST_ROWS = head._MOST_ROWS = 8
    try:
        yield
    finally:
        head._LEAST_ROWS, head._MOST_ROWS = before


def results(directory: Path, distributed: str | None) -> dict[str, str]:
    """Run all cases."""
    found = {}
    with warnings.catch_warnings(), small_chunks():
        warnings.simplefilter("ignore")
        with MPICommunicator() if distributed == "mpi" else Alone() as ranks:
            for name, case in NUMPY.items():
                found[name] = case(ranks if distributed or name == ADDS_TWICE else None, directory)
        for name, options in LANGUAGE.items():
            more = {key: directory / value if key == "teacher" else value for key, value in options.items()}
            found[name] = tuned(directory, name, distributed, **more)
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        with MPICommunicator(share_cores=False) as here:
            resumed_part(here, place, int(sys.argv[2]))
        sys.exit()
    made = results(place, "mpi")
    if made["sft"]:
        (place / "results.json").write_text(json.dumps(made))
