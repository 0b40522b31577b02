"""A short training run that is killed, runs out of disk space, gets SIGHUP or loses its terminal.

Afterwards, `--resume` must always end with the adapter of an undisturbed run.
"""

import itertools
import json
import os
import pty
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from attack.case import Case
from attack.child import Disk, DiskAction, Ended, at_step, call, command, disk_broken, disk_full, edges, kill
from nplora import cli
from nplora.formats import safetensors
from small_llama import save_small_llama

STEPS = 6
OPTIONS = ["--rank", "2", "--lr", "0.01", "--batch-examples", "4", "--steps", str(STEPS), "--dropout", "0.1"]
OPTIONS += ["--save-every", "2"]
STATUS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
WEIGHTS = "adapter_model.safetensors"
CHAINS, KILLS = 12, 10  # runs that are killed at random moments, and kills of each
RATES = {"1e6": True, "1e9": True, "1e30": False}  # learning rates that diverge; True: after one good step


class Runs:
    """A model, its data, and the result of an undisturbed run."""

    def __init__(self, room: Path) -> None:
        self._outputs = (room / f"out-{os.getpid()}-{n}" for n in itertools.count())
        self.model = save_small_llama(room / "model.gguf")
        self.data = room / "train.jsonl"
        rows = ({"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24))
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = self.output()
        self.calls = edges(self._calls(whole))
        self.expected = adapter(whole)

    def output(self) -> Path:
        return next(self._outputs)

    def line(self, output: Path, *more: str) -> list[str]:
        paths = [str(self.model), "--data", str(self.data), "--output", str(output)]
        return ["finetune", *paths, *OPTIONS, *more]

    def _calls(self, output: Path) -> list[str]:
        """Perform a run. Returns the names of its calls that change the disk."""

        def body() -> int:
            disk = Disk()
            disk.watch()
            status = cli.main(self.line(output))
            print("\n", *disk.names)
            return status

        ended = call(body)
        assert ended.status == 0, ended.stderr
        return ended.stdout.splitlines()[-1].split()

    def check_resumed(self, output: Path, way: str = "--resume") -> None:
        ended = command(self.line(output, way))
        assert ended.status == 0, f"{way}: {ended.stderr}"
        assert adapter(output) == self.expected, "the adapter is another one"
        left = [file.name for file in output.iterdir() if file.name.endswith(".tmp") or file.name == "lock"]
        assert not left, f"left behind: {left}"

    def at_call(self, output: Path, number: int, action: DiskAction, *more: str) -> Ended:
        return command(self.line(output, *more), Disk(number, action).watch)

    # ---- the attacks ----

    def kill_at(self, number: int) -> None:
        output = self.output()
        ended = self.at_call(output, number, kill)
        assert ended.status == -signal.SIGKILL, ended.stderr
        self.check_resumed(output)

    def kill_overwriting(self, number: int) -> None:
        """An adapter of another rank exists. It must never be taken for the new run's."""
        output = self.output()
        ended = command([*self.line(output), "--rank", "4"])
        assert ended.status == 0, ended.stderr
        old = adapter(output)
        ended = self.at_call(output, number, kill, "--overwrite")
        assert ended.status == -signal.SIGKILL, ended.stderr
        used = command(["eval", str(self.model), "--data", str(self.data), "--adapter", str(output)])
        if used.status == 0:
            found = adapter(output)
            assert found in (old, self.expected), "the adapter is neither the old one nor the new one"
            assert found != old or _rank_of_run(output) == 4, "the old adapter is taken for the new run's"
        else:
            assert len(used.errors) == 1, used.stderr
        self.check_resumed(output, "--overwrite")

    def kill_again_and_again(self, seed: int) -> int:
        """Kill one run at random moments, and start another after it has ended."""
        output, moments, kills = self.output(), random.Random(seed), 0
        while kills < KILLS:
            ended = command(self.line(output, "--resume"), kill_after=moments.uniform(0.01, 0.25))
            kills += ended.status == -signal.SIGKILL
            if ended.status == 0:
                self.check_resumed(output)
                output = self.output()
        self.check_resumed(output)
        return kills

    def fail_at(self, number: int, action: DiskAction) -> None:
        output = self.output()
        ended = self.at_call(output, number, action)
        assert ended.status in (0, 2), ended.stderr  # 0: nothing was lost, as when the lock is removed
        assert len(ended.errors) == (ended.status == 2), ended.stderr
        assert "Traceback" not in ended.stderr
        assert not list(output.glob(".*.tmp")), "a temporary file is left"
        self.check_resumed(output)

    def signal_at(self, number: signal.Signals, step: int) -> None:
        output = self.output()
        ended = command(self.line(output), lambda: at_step(step, lambda: os.kill(os.getpid(), number)))
        assert ended.status == STATUS[number], f"exit status {ended.status}: {ended.stderr}"
        self.check_resumed(output)

    def cut_off_at(self, step: int, make: Callable[[], tuple[int, int]], stream: int, status: int) -> None:
        """The reader of a stream goes away. The run must still make all of its steps."""

        def prepare() -> None:
            reader, writer = make()
            os.dup2(writer, stream)
            os.close(writer)
            at_step(step, partial(os.close, reader))

        output = self.output()
        ended = command(self.line(output), prepare)
        assert ended.status == status, f"exit status {ended.status}: {ended.stderr}"
        assert adapter(output) == self.expected, "the adapter is another one"

    def diverge(self, rate: str, learned: bool) -> None:
        """The adapter of the last good step is saved, and --resume needs a lower rate."""
        output = self.output()
        ended = command(self.line(output, "--lr", rate))
        assert ended.status == 1, f"exit status {ended.status}: {ended.stderr}"
        assert len(ended.errors) == 1, ended.stderr
        assert (output / WEIGHTS).exists() == learned
        saved = adapter(output) if learned else {}
        assert all(np.isfinite(np.frombuffer(data, np.float32)).all() for data in saved.values())
        again = command(self.line(output, "--lr", rate, "--resume"))
        assert again.status in (1, 2), "--resume accepts the rate that failed"
        assert not learned or adapter(output) == saved
        lower = command(self.line(output, "--resume"))
        assert lower.status == 0, lower.stderr


def cases(room: Path) -> Iterator[Case]:
    runs, steps = Runs(room), range(1, STEPS + 1)
    for n in runs.calls:
        yield Case("killed at each call to the disk", f"call {n}", partial(runs.kill_at, n))
    for n in runs.calls[::2]:
        yield Case("killed while overwriting a run", f"call {n}", partial(runs.kill_overwriting, n))
    for n in range(CHAINS):
        yield Case("killed at random moments", f"run {n}", partial(runs.kill_again_and_again, n))
    for n, action in zip(runs.calls, itertools.cycle((disk_full, disk_broken))):
        name = f"{action.__name__} at call {n}"
        yield Case("an error at each call to the disk", name, partial(runs.fail_at, n, action))
    for number, step in itertools.product(STATUS, steps):
        yield Case(f"{number.name} at each step", f"step {step}", partial(runs.signal_at, number, step))
    for row, make, stream, status in (
        ("stderr's reader goes at each step", os.pipe, 2, 0),
        ("stdout's reader goes at each step", os.pipe, 1, 1),
        ("the terminal closes at each step", pty.openpty, 2, 0),
    ):
        for step in steps:
            yield Case(row, f"step {step}", partial(runs.cut_off_at, step, make, stream, status))
    for rate, learned in RATES.items():
        yield Case("divergence", f"lr {rate}", partial(runs.diverge, rate, learned))


def adapter(directory: Path) -> dict[str, bytes]:
    """The tensors of an adapter."""
    tensors = safetensors.open(directory / WEIGHTS)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def _rank_of_run(directory: Path) -> int:
    """The rank of the factors in the newest checkpoint."""
    runs = [safetensors.open(file) for file in directory.glob("checkpoint-?.safetensors")]
    newest = max(runs, key=lambda run: int(json.loads(run.metadata["state"])["serial"]))
    name = next(name for name in newest if name.startswith("parameters.") and name.endswith(".A"))
    return newest[name].shape[1]
