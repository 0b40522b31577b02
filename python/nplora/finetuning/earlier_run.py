"""EarlierRun: how a run computed its steps until now, which a resumed run keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nplora.finetuning.options import FinetuneOptions
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.run_directory import RunDirectory
from nplora.weights import COMPUTES


@dataclass(frozen=True)
class EarlierRun:
    """What a resumed run keeps of its beginning, whatever plan would fit now.

    Attributes:
        compute: the arithmetic of the frozen products; None if the checkpoint does not say.
        micro_tokens: the size of its micro-batches; None: batches were not cut.
        step: the steps made.
    """

    compute: str | None
    micro_tokens: int | None
    step: int

    def keep_compute(self, options: FinetuneOptions) -> FinetuneOptions:
        """The options, with the arithmetic of the run unless they choose one."""
        if options.compute is None and self.compute is not None:
            return dataclasses.replace(options, compute=self.compute)
        return options


def find_earlier_run(output: StrPath) -> EarlierRun | None:
    """The run that a directory holds, if it holds a whole checkpoint."""
    if not holds_run(output):
        return None
    with RunDirectory(output) as directory:
        checkpoint = directory.newest
    return None if checkpoint is None else _described(checkpoint)


def _described(checkpoint: Checkpoint) -> EarlierRun:
    """What the settings of a checkpoint say. The trainer refuses later what makes no sense."""
    fixed = checkpoint.settings.get("fixed")
    settings: dict[str, Any] = fixed if isinstance(fixed, dict) else {}
    layers, micro_tokens = settings.get("layers"), settings.get("micro_tokens")
    rows = [row for row in layers.values() if isinstance(row, dict)] if isinstance(layers, dict) else []
    computes = {row["compute"] for row in rows if row.get("compute") in COMPUTES}
    return EarlierRun(
        computes.pop() if len(computes) == 1 else None,
        micro_tokens if type(micro_tokens) is int and micro_tokens > 0 else None,
        checkpoint.step,
    )
