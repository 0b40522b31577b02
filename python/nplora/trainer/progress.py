"""The progress line: a tqdm bar if tqdm is installed, otherwise a plain line."""

import sys
import time
from typing import Any

from nplora.platform.host import has_threads
from nplora.runtime.stderr import stderr
from nplora.trainer.callbacks import Callback
from nplora.trainer.history import EpochRecord, StepRecord
from nplora.trainer.run import Run

_INTERVAL = 0.1  # seconds between two redraws


class ProgressLine(Callback):
    """A callback that shows progress on stderr until `close` is called."""

    def on_fit_end(self, run: Run) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line, so that the next output starts on a new line."""


def progress_line(progress: bool | None) -> ProgressLine | None:
    """A callback that shows progress on stderr; None if no progress should be shown.

    Args:
        progress: whether to show progress; None: show progress only in a terminal or a notebook. A process
            without stderr never shows progress.
    """
    if sys.stderr is None or progress is False or (progress is None and not stderr.is_watched()):
        return None
    try:
        import tqdm
    except ImportError:
        return PlainLine()
    if not has_threads():
        tqdm.tqdm.monitor_interval = 0  # otherwise the bar would start a monitor thread
    return TqdmLine(tqdm.tqdm)


class TqdmLine(ProgressLine):
    """A tqdm bar that counts steps."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None

    def on_fit_start(self, run: Run) -> None:
        self._bar = self._tqdm(
            total=run.total_steps, initial=run.step, unit="step", dynamic_ncols=True, file=stderr
        )

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._bar.set_postfix_str(f"epoch {record.epoch}, loss {record.loss:.4f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class PlainLine(ProgressLine):
    """Redraws one line in a terminal or a notebook; elsewhere, prints a line after every epoch."""

    def __init__(self) -> None:
        self._redraws = stderr.is_watched()
        self._width = 0
        self._drawn = -_INTERVAL

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        now = time.monotonic()
        if self._redraws and (now - self._drawn >= _INTERVAL or record.step == run.total_steps):
            self._draw(_text(run, record.step, record.epoch, f"loss {record.loss:.4f}"))
            self._drawn = now

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        validation = "" if record.val_loss is None else f", validation loss {record.val_loss:.4f}"
        text = _text(run, record.step, record.epoch, f"loss {record.loss:.4f}{validation}")
        if self._redraws:
            self._draw(text)
        else:
            print(text, file=stderr, flush=True)

    def close(self) -> None:
        if self._width:
            print(file=stderr, flush=True)
            self._width = 0

    def _draw(self, text: str) -> None:
        print(f"\r{text:<{self._width}}", end="", file=stderr, flush=True)
        self._width = len(text)


def _text(run: Run, step: int, epoch: int, rest: str) -> str:
    total = "" if run.total_steps is None else f"/{run.total_steps}"
    return f"step {step}{total}, epoch {epoch}, {rest}"
