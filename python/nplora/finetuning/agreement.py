"""The ranks of a distributed run check that they were started with the same options."""

from __future__ import annotations

import dataclasses
from typing import Any

from nplora.distributed.communicator import Communicator
from nplora.finetuning.load import RunInputs
from nplora.finetuning.options import FinetuneOptions
from nplora.trainer.handshake import differences, program
from nplora.trainer.resuming import first_few
from nplora.trainer.training_setup import too_many_ranks

# The options that may differ from machine to machine, and those that may be objects or paths.
_MAY_DIFFER = ("memory", "report_to", "profile", "save_every", "save_minutes", "teacher", "adapter")


def require_same_options(ranks: Communicator, options: FinetuneOptions) -> None:
    """Check that all ranks have the same program and options, and that each rank has a batch in every step.

    `require_same_data` compares the data after they are read. The trainer compares the models before the
    first step.

    Raises:
        ValueError: a rank differs from rank 0, and the message names the rank and what differs; or there are
            more ranks than batches in a step.
    """
    names = [field.name for field in dataclasses.fields(options) if field.name not in _MAY_DIFFER]
    mine = {**program(), **{name: repr(getattr(options, name)) for name in names}}
    mine["use of memory"] = "planned" if options.memory is not None else "not limited"
    _require_same(ranks, mine, "the options")
    if ranks.size > options.accumulate:
        raise ValueError(f"finetune: {too_many_ranks(ranks.size, options.accumulate)}")


def require_same_data(ranks: Communicator, inputs: RunInputs) -> None:
    """Check that all ranks have read the same data, because their next exchanges depend on the data.

    Raises:
        ValueError: a rank differs from rank 0.
    """
    if ranks.size > 1:
        held_out = None if inputs.held_out is None else inputs.held_out.fingerprint()
        _require_same(ranks, {"data": inputs.train.fingerprint(), "validation data": held_out}, "the data")


def _require_same(ranks: Communicator, mine: dict[str, Any], what: str) -> None:
    """Raise a ValueError if the values of a rank are not those of rank 0."""
    problems = differences(ranks.gather(mine, f"the comparison of {what}"))
    if problems:
        raise ValueError(f"finetune: the ranks do not agree: {first_few(problems, '; ')}")
