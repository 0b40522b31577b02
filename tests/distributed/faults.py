"""The program of a rank that fails: `python faults.py KIND RANK STEP DIRECTORY`, with a fault at a step.

STEP is a number of milliseconds for kill-at and stop-at. They slow the run, so that it takes a second, half
of it for checkpoints.
"""

import functools
import os
import signal
import sys
import threading
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

# The names of signals. Windows lacks most of them.
SIGNALS = {
    "kill": "SIGKILL",
    "stop": "SIGSTOP",
    "interrupt": "SIGINT",
    "terminate": "SIGTERM",
    "user": "SIGUSR1",
    "handled": "SIGUSR1",
}
TIMED = {"kill-at": "SIGKILL", "stop-at": "SIGSTOP"}


class Fault(Callback):
    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if run.step != self.step:
            return
        if self.kind in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[self.kind]))
        if self.kind == "error":
            raise MemoryError("no memory for a test")
        if self.kind == "disk":  # no file can grow any more, as on a full disk
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if self.kind == "raise":
            raise KeyboardInterrupt
        if self.kind == "announce":  # the test then sends a signal to the launcher
            print("now", flush=True)
            vars(run.model)["forward"] = functools.partial(_forward, run.model.forward, 0.1)
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


class Moment:
    """Sends this process a signal after some milliseconds. Prints where the process was."""

    doing = "starting"

    def __init__(self, milliseconds: int, signum: int) -> None:
        timer = threading.Timer(milliseconds / 1000, self._send, [signum])
        timer.daemon = True
        timer.start()

    def _send(self, signum: int) -> None:
        os.write(2, f"it gets a signal while {Moment.doing}\n".encode())
        os.kill(os.getpid(), signum)


class SlowStep(Callback):
    def on_fit_start(self, run: Run) -> None:
        Moment.doing = "training"

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        time.sleep(0.03)

    def on_fit_end(self, run: Run) -> None:
        Moment.doing = "ending"


def write_slowly(seconds: float) -> None:
    """Wait before and after each file of a checkpoint reaches the disk, and before it gets its name."""
    usual_save, usual_fsync, usual_replace = RunDirectory.save, os.fsync, os.replace

    def save(directory: RunDirectory, checkpoint: Checkpoint) -> None:
        before, Moment.doing = Moment.doing, "writing a checkpoint"
        usual_save(directory, checkpoint)
        Moment.doing = before

    def fsync(fd: int) -> None:
        time.sleep(seconds)
        usual_fsync(fd)
        time.sleep(seconds)

    def replace(*names: Any, **places: Any) -> None:
        time.sleep(seconds)
        usual_replace(*names, **places)
        time.sleep(seconds)

    RunDirectory.save = save  # type: ignore[method-assign]
    os.fsync, os.replace = fsync, replace  # type: ignore[assignment]


def die_in_checkpoint(step: int) -> None:
    """Kill this process when the file of a checkpoint is written, but does not have its name yet."""
    usual = RunDirectory.save

    def save(directory: RunDirectory, checkpoint: Checkpoint) -> None:
        if checkpoint.step == step:
            os.replace = lambda *names, **places: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        usual(directory, checkpoint)

    RunDirectory.save = save  # type: ignore[method-assign]


def train(
    ranks: Communicator | None,
    callbacks: list[Callback],
    directory: Path | None,
    data: int = 0,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    **more: Any,
) -> nplora.Module:
    rng = np.random.default_rng(data)
    x, y = rng.normal(size=(80, 16)), rng.normal(size=(80, 4))
    model = nplora.LoRALinear(np.random.default_rng(1).normal(size=(4, 16)), rank=2, rng=0)
    trainer = nplora.Trainer(
        model, "mse", accumulate=4, communicator=ranks, callbacks=callbacks, progress=False, **more
    )
    resume = directory is not None and not overwrite
    trainer.fit(
        x, y, batch_size=4, epochs=3, checkpoint_dir=directory, checkpoint_every=checkpoint_every,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kind, rank, step, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if kind in TIMED:
        write_slowly(0.003)
    if kind == "checkpoint":
        die_in_checkpoint(step)
    mine = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == str(rank)
    if kind == "kill-at" and mine:  # perhaps before MPI is started
        Moment(step, getattr(signal, TIMED[kind]))
    with MPICommunicator(share_cores=False) as here:
        if kind == "stop-at" and mine:  # in the start of MPI, no timeout of nplora counts
            Moment(step, getattr(signal, TIMED[kind]))
        faults: list[Callback] = [Fault(kind, step)] if rank in (here.rank, -1) else []
        if kind == "handled":
            signal.signal(
                signal.SIGUSR1, lambda signum, frame: print(f"rank {here.rank} handles it", flush=True)
            )
        if kind == "batch" and here.rank != rank:
            faults = [Fault("slow-batch", step)]
        if kind in ("user", "stop") and "FAULT_SECONDS" in os.environ:
            save_slowly(float(os.environ["FAULT_SECONDS"]))
        faults += [SlowStep()] if kind in TIMED else []
        differs = here.rank == rank
        train(
            here, faults, None if here.rank else place, data=int(differs and kind == "data"),
            checkpoint_every=1 if kind in (*TIMED, "checkpoint") else None,
            **({"clip_norm": 0.5} if differs and kind == "settings" else {}),
        )  # fmt: skip
