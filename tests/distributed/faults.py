"""The program of a rank that fails: `python faults.py KIND RANK STEP DIRECTORY`, with a fault at a step."""

import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.distributed import Communicator, MPICommunicator
from nplora.trainer import Callback, Run, StepRecord
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.run_directory import RunDirectory

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
    "user": signal.SIGUSR1,
    "handled": signal.SIGUSR1,
}


class Fault(Callback):
    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if run.step != self.step:
            return
        if self.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.kind])
        if self.kind == "error":
            raise MemoryError("no memory for a test")
        if self.kind == "raise":
            raise KeyboardInterrupt
        if self.kind in ("batch", "slow-batch"):  # of the next step
            delay = float(os.environ["FAULT_SECONDS"]) if self.kind == "slow-batch" else None
            vars(run.model)["forward"] = functools.partial(_forward, run.model.forward, delay)
        if self.kind == "nan":  # in the outputs of the next steps; a change of values would be noticed before
            vars(run.model)["forward"] = functools.partial(_nan, run.model.forward)


def _forward(usual: Callable[..., Any], delay: float | None, *inputs: Any) -> Any:
    """The pass of a model that fails, or that begins after a delay."""
    if delay is None:
        raise MemoryError("no memory for a test")
    time.sleep(delay)
    return usual(*inputs)


def _nan(usual: Callable[..., Any], x: Any) -> Any:
    y, saved = usual(x)
    return np.full_like(y, np.nan), saved


def save_slowly(seconds: float) -> None:
    """Let every checkpoint after the first two wait before it is written."""
    usual = RunDirectory.save

    def save(directory: RunDirectory, checkpoint: Checkpoint) -> None:
        time.sleep(seconds if checkpoint.step > 1 else 0)
        usual(directory, checkpoint)

    RunDirectory.save = save  # type: ignore[method-assign]


def train(
    ranks: Communicator | None,
    callbacks: list[Callback],
    directory: Path | None,
    data: int = 0,
    overwrite: bool = False,
    **more: Any,
) -> nplora.Module:
    rng = np.random.default_rng(data)
    x, y = rng.normal(size=(80, 16)), rng.normal(size=(80, 4))
    model = nplora.LoRALinear(np.random.default_rng(1).normal(size=(4, 16)), rank=2, rng=0)
    trainer = nplora.Trainer(
        model, "mse", accumulate=4, communicator=ranks, callbacks=callbacks, progress=False, **more
    )
    resume = directory is not None and not overwrite
    trainer.fit(x, y, batch_size=4, epochs=3, checkpoint_dir=directory, resume=resume, overwrite=overwrite)
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kind, rank, step, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    with MPICommunicator(share_cores=False) as here:
        faults: list[Callback] = [Fault(kind, step)] if rank in (here.rank, -1) else []
        if kind == "handled":
            signal.signal(
                signal.SIGUSR1, lambda signum, frame: print(f"rank {here.rank} handles it", flush=True)
            )
        if kind == "batch" and here.rank != rank:
            faults = [Fault("slow-batch", step)]
        if kind in ("user", "stop") and "FAULT_SECONDS" in os.environ:
            save_slowly(float(os.environ["FAULT_SECONDS"]))
        differs = here.rank == rank
        train(
            here, faults, None if here.rank else place, data=int(differs and kind == "data"),
            **({"clip_norm": 0.5} if differs and kind == "settings" else {}),
        )  # fmt: skip
