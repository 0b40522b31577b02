"""The ranks of a distributed run check that they were started with the same options and data."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

from nplora.distributed.communicator import Communicator
from nplora.trainer.handshake import differences, program
from nplora.trainer.resuming import first_few
from nplora.trainer.training_setup import too_many_ranks

# Options that are not compared. Each rank may have its own values, such as paths or objects.
_MAY_DIFFER = ("memory", "report_to", "profile", "save_every", "save_minutes", "teacher", "adapter")


class _Options(Protocol):
    """A dataclass with the options of a training function, such as FinetuneOptions."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def accumulate(self) -> int: ...


class _Examples(Protocol):
    def fingerprint(self) -> str: ...


def require_same_options(ranks: Communicator, options: _Options, op: str = "finetune") -> None:
    """Check that all ranks have the same program and options, and that a step has a batch for each rank.

    `require_same_data` compares the data after they are read. The trainer compares the models before the
    first step.

    Args:
        op: the name of the calling function, for messages.
    Raises:
        ValueError: the program or an option of a rank differs from that of rank 0, or a step has fewer
            batches than there are ranks.
    """
    names = [field.name for field in dataclasses.fields(options)]
    values = {name: getattr(options, name) for name in names if name not in _MAY_DIFFER}
    mine = {**program(), **{name: None if value is None else repr(value) for name, value in values.items()}}
    if "memory" in names:
        mine["use of memory"] = "planned" if vars(options)["memory"] is not None else "not limited"
    _require_same(ranks, mine, op, "the options")
    if ranks.size > options.accumulate:
        raise ValueError(f"{op}: {too_many_ranks(ranks.size, options.accumulate)}")


def require_same_data(
    ranks: Communicator, train: _Examples, held_out: _Examples | None, op: str = "finetune"
) -> None:
    """Check that all ranks have read the same data, because later exchanges between ranks depend on the data.

    Args:
        op: the name of the calling function, for messages.
    Raises:
        ValueError: the data of a rank differ from those of rank 0.
    """
    if ranks.size > 1:
        valid = None if held_out is None else held_out.fingerprint()
        _require_same(ranks, {"data": train.fingerprint(), "validation data": valid}, op, "the data")


def _require_same(ranks: Communicator, mine: dict[str, Any], op: str, what: str) -> None:
    """Raise a ValueError if the values of a rank differ from the values of rank 0."""
    problems = differences(ranks.gather(mine, f"the comparison of {what}"))
    if problems:
        raise ValueError(f"{op}: the ranks do not agree: {first_few(problems, '; ')}")
