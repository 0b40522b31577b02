"""Teacher: the methods that a distillation needs from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from nplora.finetuning.data.stored import Examples
from nplora.lm import LanguageModel
from nplora.models import divergence
from nplora.models.packing import PackedBatch

Array = npt.NDArray[Any]
DistributionsAt: TypeAlias = Callable[[Array], divergence.Teacher]


class Teacher(Protocol):
    """A source of next-token distributions.

    Attributes:
        name: the file or directory, for messages.
        model: the model that runs beside the student; None if the distributions are stored.
        top_k: the number of stored tokens in each distribution; 0 for a model.
        temperature: the temperature of the distributions; None: any temperature, because the distributions
            are computed from logits.
        paths: the files from which the teacher is read.
    """

    name: str
    model: LanguageModel | None
    top_k: int

    @property
    def temperature(self) -> float | None: ...

    @property
    def paths(self) -> list[Path]: ...

    def require_student(self, op: str, student: LanguageModel) -> None:
        """Raise FormatError if the student's vocabulary differs from that of the teacher."""

    def require_data(self, op: str, dataset: Examples) -> None:
        """Raise FormatError if the teacher lacks the distributions for an example of the data set."""

    def prepare_batch(self, batch: PackedBatch) -> DistributionsAt:
        """Read or compute what the teacher needs for a batch.

        Return a function that takes an array of positions in the batch, and returns the teacher's
        distributions at these positions. Each position must have a target.
        """

    def digest(self) -> str:
        """A hash that identifies the teacher's distributions."""

    def blame(self, batch: PackedBatch) -> str:
        """An error text if the teacher's outputs for a batch are not finite; "" if they are finite."""
