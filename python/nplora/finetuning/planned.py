"""How a run computes its steps within a budget of memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from nplora import _check
from nplora.adapters import Adapter
from nplora.finetuning.data import Dataset
from nplora.finetuning.load import batches_of, checks_of, continued, opened_all
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.planning import (
    Adapters,
    Candidate,
    Plan,
    Wishes,
    Work,
    available_memory,
    choose,
    needed,
    parse_bytes,
    resident_memory,
    shortage,
)
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.lm import LanguageModel
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.run_directory import RunDirectory
from nplora.weights import COMPUTES

_LOOKED_AT = 1_000_000  # examples of which a plan looks at the batches, epoch by epoch


def plan(
    model: StrPath | LanguageModel, data: StrPath, *, valid: StrPath | None = None, **options: Any
) -> Plan:
    """What `finetune` would take with the same arguments, in memory and time; nothing is trained or written.

    With `memory`, how `finetune` would compute its steps so that the process stays below it.

    Returns:
        the way of computing, bytes and seconds; `str` of it is what the command prints.
    Raises:
        BudgetError: nothing fits into `memory`; the message says what is needed, and what would fit.
        Others as `finetune`.
    """
    chosen = _check.options("plan", FinetuneOptions, options)
    lm, train, held_out = opened_all("plan", model, data, valid, chosen, check=False)
    wishes = Wishes(fixed_compute(model, chosen), chosen.checkpoint_blocks)
    adapters = adapters_of("plan", lm, chosen, continued("plan", lm, chosen))
    return planned(lm, adapters, train, held_out, chosen, wishes)


def fixed_compute(model: StrPath | LanguageModel, options: FinetuneOptions) -> str | None:
    """The arithmetic, where it is not to be chosen: as asked for, or that of a model that is there."""
    return model.compute if isinstance(model, LanguageModel) else options.compute


def adapters_of(
    op: str, lm: LanguageModel, options: FinetuneOptions, start: Adapter | None = None
) -> Adapters:
    """Those that a run puts on a model.

    Args:
        start: the adapter that the run continues from; all of its layers count with the largest rank.

    Raises:
        ValueError: they do not fit it, or leave no block whose output could be kept.
    """
    if start is None:
        adapters = Adapters.of(
            lm, options.rank, options.targets, options.layers, options.use_dora, options.init, op
        )
    else:
        shapes, ranks = {name: delta.shape for name, delta in start.items()}, [d.rank for d in start.values()]
        adapters = Adapters(shapes, max(ranks), start.use_dora)
    if options.keep_prefix != "off" and not adapters.first_block(lm.config.num_hidden_layers):
        raise ValueError(
            f"{op}: keep_prefix: no frozen block lies below the adapters; layers='last:4' leaves some"
        )
    return adapters


def planned(
    lm: LanguageModel,
    adapters: Adapters,
    train: Dataset,
    held_out: Dataset | None,
    options: FinetuneOptions,
    wishes: Wishes,
) -> Plan:
    """How steps are computed with these options."""
    budget = None if options.memory is None else parse_bytes(options.memory)
    resident = resident_memory(lm)
    return choose(lm, adapters, _work_of(train, held_out, options), wishes, resident, budget)


def warning_of(
    lm: LanguageModel,
    adapters: Adapters,
    train: Dataset,
    held_out: Dataset | None,
    options: FinetuneOptions,
    way: Candidate,
    done: int,
) -> str:
    """Words where the rest of a run needs more memory than is available, by its first epoch.

    Args:
        done: the steps that the run has made.
    """
    resident, work = resident_memory(lm), _work_of(train, held_out, options, most_epochs=1)
    if done >= work.steps:
        return ""
    return shortage(needed(lm, adapters, work, way, resident), available_memory())


def _work_of(
    train: Dataset, held_out: Dataset | None, options: FinetuneOptions, most_epochs: int | None = None
) -> Work:
    """What a run of these options reads.

    Args:
        most_epochs: of which the batches are looked at; None: of nearly all, a million examples in sum.
    """
    batches = batches_of(train, options)
    steps = options.steps or (options.epochs or 1) * -(-batches.length // options.accumulate)
    most = 1 + _LOOKED_AT // len(train) if most_epochs is None else most_epochs
    epochs = min(-(-steps * options.accumulate // batches.length), most)
    lengths, targets = train.lengths, train.targets
    return Work(
        [(lengths[batch], targets[batch]) for epoch in range(epochs) for batch in batches.members(epoch)],
        steps,
        options.accumulate,
        0 if held_out is None else _most_tokens(held_out),
        sum(d.report.tokens for d in (train, held_out) if d and options.keep_prefix == "memory"),
    )


def _most_tokens(held_out: Dataset) -> int:
    """Of the batches of an evaluation."""
    return max(int(held_out.lengths[batch].sum()) for batch in checks_of(held_out).members(0))


def resumed(
    options: FinetuneOptions, output: StrPath, loaded: bool
) -> tuple[FinetuneOptions, tuple[int | None, ...] | None, int]:
    """The options of a run that goes on, and its pieces: as an earlier plan had them, whatever fits now.

    And the steps that it has made.

    Args:
        loaded: the model is given, and its arithmetic with it.
    """
    if not (options.resume and holds_run(output)):
        return options, None, 0
    with RunDirectory(output) as directory:
        checkpoint = directory.newest
    if checkpoint is None:
        return options, None, 0
    computes, pieces = _started_with(checkpoint)
    if options.compute is None and not loaded and len(computes) == 1:
        options = dataclasses.replace(options, compute=computes.pop())
    return options, (pieces,), checkpoint.step


def _started_with(checkpoint: Checkpoint) -> tuple[set[str], int | None]:
    """Its run's arithmetic and the size of its pieces; what makes no sense, the trainer refuses later."""
    fixed = checkpoint.settings.get("fixed")
    told: dict[str, Any] = fixed if isinstance(fixed, dict) else {}
    layers, pieces = told.get("layers"), told.get("micro_tokens")
    settings = [s for s in layers.values() if isinstance(s, dict)] if isinstance(layers, dict) else []
    computes = {s["compute"] for s in settings if s.get("compute") in COMPUTES}
    return computes, pieces if type(pieces) is int and pieces > 0 else None
