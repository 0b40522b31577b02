"""A model file that another program changes while a run reads it through a mapping."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attack.case import Case
from attack.child import Ended, at_step, command
from small_llama import save_small_llama

STEP = 3  # the step at which the file changes
OPTIONS = ["--rank", "2", "--batch-examples", "4", "--steps", "6", "--save-every", "2"]


def truncate(model: Path) -> None:
    os.truncate(model, 4096)


def overwrite(model: Path) -> None:
    with model.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(bytes(10_000))


def replace(model: Path) -> None:
    other = model.with_suffix(".new")
    other.write_bytes(b"another model")
    os.replace(other, model)


class Mapped:
    """A model in blocks, which stay in their file."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.original = save_small_llama(room / "original.gguf", "q8_0")
        self.data = room / "train.jsonl"
        self.data.write_text("".join(json.dumps({"text": f"{n}+{n}={2 * n}"}) + "\n" for n in range(24)))

    def line(self, model: Path, output: Path) -> list[str]:
        paths = [str(model), "--data", str(self.data), "--output", str(output)]
        return ["finetune", *paths, *OPTIONS]

    def changed_while_training(self, change: Callable[[Path], None]) -> tuple[Ended, Path, Path]:
        model, output = self.room / f"{change.__name__}.gguf", self.room / f"{change.__name__}-out"
        shutil.copy(self.original, model)
        return (
            command(self.line(model, output), partial(at_step, STEP, partial(change, model))),
            model,
            output,
        )

    def truncated(self) -> None:
        """The process ends at once, with a message that names the file."""
        ended, model, output = self.changed_while_training(truncate)
        assert ended.status in (2, 135), f"exit status {ended.status}: {ended.stderr}"
        assert model.name in ended.stderr.splitlines()[-1], ended.stderr
        self.check_resumed(model, output)

    def overwritten(self) -> None:
        """The next checkpoint is not written: the steps since the last one may have used wrong data."""
        ended, model, output = self.changed_while_training(overwrite)
        assert ended.status == 2, f"exit status {ended.status}: {ended.stderr}"
        assert len(ended.errors) == 1, ended.stderr
        assert model.name in ended.errors[0], ended.stderr
        self.check_resumed(model, output)

    def replaced(self) -> None:
        """The mapping keeps the original file."""
        ended, _, output = self.changed_while_training(replace)
        assert ended.status == 0, ended.stderr
        assert (output / "adapter_model.safetensors").exists()

    def check_resumed(self, model: Path, output: Path) -> None:
        shutil.copy(self.original, model)
        ended = command([*self.line(model, output), "--resume"])
        assert ended.status == 0, ended.stderr


def cases(room: Path) -> Iterator[Case]:
    mapped = Mapped(room)
    for attack in (mapped.truncated, mapped.overwritten, mapped.replaced):
        yield Case("a model changed while it is mapped", attack.__name__, attack)
