"""What the page does with nplora. worker.js runs this in Pyodide; it also runs natively."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import nplora
from nplora.trainer import Callback, Run, StepRecord

Report = Callable[[int, int, float, float], object]  # step, steps, loss, seconds


def save_text(text: str, directory: Path) -> Path:
    """Write the user's text to a file whose name says whether it is JSON Lines."""
    path = directory / ("data.jsonl" if is_json_lines(text) else "data.txt")
    path.write_text(text, encoding="utf-8")
    return path


def is_json_lines(text: str) -> bool:
    try:
        return all(isinstance(json.loads(line), dict) for line in text.splitlines() if line.strip())
    except ValueError:
        return False


class _Progress(Callback):
    def __init__(self, report: Report) -> None:
        self._report = report

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._report(record.step, run.total_steps or 0, record.loss, record.seconds)


class Session:
    """A model, the user's text, and the adapter that is trained on it."""

    def __init__(self, model: str, text: str, directory: str, window: int = 128) -> None:
        self.lm = nplora.load_model(model)
        self.directory, self.window = Path(directory), window
        self.directory.mkdir(exist_ok=True)
        self.data = save_text(text, self.directory)

    def loss(self) -> float:
        """The mean loss over the text, with the adapter if there is one."""
        return nplora.evaluate(self.lm, self.data, max_length=self.window)["loss"]

    def answer(self, prompt: str, most: int = 32) -> str:
        found = self.lm.generate(prompt, max_new_tokens=most)
        assert isinstance(found, str)
        return found

    def train(self, steps: int, rank: int, lr: float, report: Report) -> None:
        nplora.finetune(
            self.lm,
            self.data,
            self.directory / "adapter",
            steps=steps,
            rank=rank,
            lr=lr,
            batch_examples=1,
            max_length=self.window,
            overwrite=True,
            callbacks=[_Progress(report)],
        )

    def zipped_adapter(self) -> bytes:
        """The adapter's directory in PEFT's format, as a ZIP file."""
        path = self.directory / "adapter.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(self.directory.glob("adapter/adapter_*")):
                archive.write(file, f"adapter/{file.name}")
        return path.read_bytes()
