"""EarlierRun: the arithmetic and the micro-batch size of a run, which are kept when the run is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nplora.distributed.communicator import Communicator
from nplora.finetuning.options import INT8_HEAD, FinetuneOptions
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.lm import Encoder
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.run_directory import RunDirectory
from nplora.weights import COMPUTES


@dataclass(frozen=True)
class EarlierRun:
    """How an earlier run computed its steps. If the run is resumed, all further steps are computed in the
    same way, even if a new run would choose another way.

    Attributes:
        compute: arithmetic of the products with frozen weights; None: the checkpoint does not name
            this arithmetic.
        int8_head: the arithmetic of the head: "off", "forward" or "on". None: the checkpoint does not record
            this, because the run is older than the option `int8_head`. Such a run computed the head as
            int8_head="auto" does.
        micro_tokens: maximum tokens of a micro-batch; None: the run did not divide its batches into
            micro-batches.
        step: the number of steps that the earlier run has made.
    """

    compute: str | None
    micro_tokens: int | None
    step: int
    int8_head: str | None = None

    def keep_compute(self, options: FinetuneOptions) -> FinetuneOptions:
        """If `options.compute` is None, set it to the earlier run's `compute`. Return the new options."""
        if options.compute is None and self.compute is not None:
            return dataclasses.replace(options, compute=self.compute)
        return options

    def keep_int8_head(self, options: FinetuneOptions, compute: str | None) -> FinetuneOptions:
        """If both runs compute in int8, replace int8_head="auto" by the earlier run's value, unless
        `change_compute` is set. Return the options.

        Args:
            compute: arithmetic of the resumed run. If the earlier run used another arithmetic, the trainer
                refuses to resume.
        Raises:
            ValueError: `int8_head` is given, but the checkpoint does not say how the earlier run computed its
                head, and `change_compute` is not set.
        """
        if not self.compute == compute == "int8" or options.change_compute:
            return options
        if self.int8_head is None and options.int8_head != "auto":
            raise ValueError(
                f"finetune: int8_head={options.int8_head!r} is given, but the checkpoint to resume does not "
                "say how the run computed its head; leave int8_head out, or set change_compute"
            )
        if self.int8_head is None or options.int8_head != "auto":
            return options
        # These options exclude int8_head="on". If the earlier run did not have these options, the trainer
        # refuses to resume, and its message names the options.
        rows = options.trainable_tokens or options.add_tokens or options.modules_to_save
        if self.int8_head == "on" and (options.filter_vocabulary or rows):
            return options
        return dataclasses.replace(options, int8_head=self.int8_head)


def words_of_kept(given: FinetuneOptions, chosen: FinetuneOptions) -> str:
    """A text about the options that a resumed run takes over from the earlier run; "" if there are none.

    Args:
        given: the options of the user.
        chosen: the options after `EarlierRun.keep_compute` and `EarlierRun.keep_int8_head`.
    """
    kept = [
        f"--{name.replace('_', '-')} {value}"
        for name in ("compute", "int8_head")
        if (value := getattr(chosen, name)) not in (getattr(given, name), "float32")
    ]
    return f"the run still uses {' and '.join(kept)}" if kept else ""


def compute_for(
    model: StrPath | Encoder,
    output: StrPath,
    compute: str | None,
    resume: bool,
    ranks: Communicator,
    say: Callable[[str], None],
) -> str | None:
    """Return the value of `compute` with which a run loads its encoder.

    If a resumed run has a path as `model` and no `compute`, this is the arithmetic of the earlier run, and
    `say` prints it unless it is float32. Otherwise, it is the argument `compute`. Only rank 0 reads the
    output directory.
    """
    earlier = find_earlier_run(output) if resume and ranks.rank == 0 else None
    earlier = ranks.broadcast(earlier, "the search for an earlier run")
    if compute is not None or isinstance(model, Encoder) or earlier is None or earlier.compute is None:
        return compute
    if earlier.compute != "float32":
        say(f"{files.name(output)}: the run still uses --compute {earlier.compute}")
    return earlier.compute


def find_earlier_run(output: StrPath) -> EarlierRun | None:
    """Return the earlier run in a directory, or None if the directory has no complete checkpoint."""
    if not holds_run(output):
        return None
    with RunDirectory(output) as directory:
        checkpoint = directory.newest
    return None if checkpoint is None else _described(checkpoint)


def _described(checkpoint: Checkpoint) -> EarlierRun:
    """Read an earlier run from the settings of a checkpoint.

    This function ignores settings with wrong values, because the trainer raises an error for them later.
    """
    fixed = checkpoint.settings.get("fixed")
    settings: dict[str, Any] = fixed if isinstance(fixed, dict) else {}
    layers, micro_tokens = settings.get("layers"), settings.get("micro_tokens")
    rows = [row for row in layers.values() if isinstance(row, dict)] if isinstance(layers, dict) else []
    computes = {row["compute"] for row in rows if row.get("compute") in COMPUTES}
    return EarlierRun(
        computes.pop() if len(computes) == 1 else None,
        micro_tokens if type(micro_tokens) is int and micro_tokens > 0 else None,
        checkpoint.step,
        int8_head if (int8_head := settings.get("int8_head")) in INT8_HEAD else None,
    )
