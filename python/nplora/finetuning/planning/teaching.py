"""Teaching: how much more memory and time a distillation takes than the training of the student alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.planning.memory import Extra, MicroBatch
from nplora.finetuning.planning.speed import Speed, seconds
from nplora.lm import LanguageModel
from nplora.models.divergence import BLOCK_BYTES, Distillation, Teacher, TopK
from nplora.models.footprint import NOT_ADAPTED
from nplora.models.head import largest_chunk

Array = npt.NDArray[Any]

_FLOAT, _DOUBLE = 4, 8
_ROWS = 32  # rows of logits in a timing


@dataclass(frozen=True)
class Teaching:
    """The properties of a distillation on which the memory and the time of a plan depend.

    Attributes:
        student: the model that learns.
        model: the teacher, if it runs beside the student; None if its distributions are stored.
        top_k: the number of tokens in each stored distribution.
        formula: an object that computes the loss from the logits.

    >>> from nplora.models.divergence import Distillation
    >>> lm = nplora.load_model("model.gguf")
    >>> teaching = nplora.finetuning.planning.Teaching(lm, None, top_k=32, formula=Distillation())
    >>> teaching.kept(tokens=1000, targets=500)  # 32 ids, and 33 log-probabilities in float16 and float64
    229000
    """

    student: LanguageModel
    model: LanguageModel | None
    top_k: int
    formula: Distillation

    def kept(self, tokens: int, targets: int) -> int:
        """The bytes of the teacher's outputs, which are kept until the micro-batch ends."""
        if self.model is not None:
            return _FLOAT * self.model.config.hidden_size * tokens
        return targets * (_FLOAT * self.top_k + (_FLOAT // 2 + _DOUBLE) * (self.top_k + 1))

    def head(self, targets: Iterable[int]) -> int:
        """The maximum bytes that the teacher and the divergence take while the head computes one chunk.

        Args:
            targets: the number of trained tokens of each micro-batch.
        """
        vocab = self.student.config.vocab_size
        rows = max((largest_chunk(count, vocab) for count in set(targets)), default=0)
        blocks = 2 * BLOCK_BYTES  # log(p / q) or q on the rest, and the gradient of the cross-entropy
        if self.model is not None:
            config = self.model.config
            blocks += BLOCK_BYTES  # p log(p / q)
            return blocks + _FLOAT * rows * (config.vocab_size + 2 * config.hidden_size)
        return blocks + 4 * _DOUBLE * rows * self.top_k

    def inference(self, tokens: int) -> int:
        """The bytes that the teacher's own forward pass takes."""
        if self.model is None:
            return 0
        block = max(layer.footprint(NOT_ADAPTED, False).forward for layer in self.model.model.layers)
        return (block + _FLOAT * self.model.config.hidden_size) * tokens

    def extra(self, step: MicroBatch, targets: Iterable[int], evaluated: int) -> Extra:
        """The bytes that a distillation adds to the memory of a run.

        Args:
            step: the largest micro-batch.
            targets: the number of trained tokens of each micro-batch.
            evaluated: the number of tokens in the largest batch of an evaluation; 0 without an evaluation.
        """
        in_evaluation = self.kept(evaluated, evaluated) + self.head([evaluated]) if evaluated else 0
        return Extra(
            self.kept(step.tokens, step.targets),
            self.head(targets),
            self.inference(max(step.tokens, evaluated)),
            in_evaluation,
        )

    def measured_row(self) -> float:
        """The seconds that the divergence takes for each row of logits, measured on this machine."""
        vocab = self.student.config.vocab_size
        rng = np.random.default_rng(0)
        z, targets = rng.standard_normal((_ROWS, vocab), np.float32), np.zeros(_ROWS, np.int64)
        if self.model is not None:
            given: Teacher = rng.standard_normal((_ROWS, self.model.config.vocab_size), np.float32)
        else:
            even = np.full((_ROWS, self.top_k + 1), -np.log(self.top_k + 1))
            given = TopK(np.tile(np.arange(self.top_k), (_ROWS, 1)), even)
        return seconds(lambda: self.formula(z, targets, given, 1.0, True)) / _ROWS

    def step(self, teacher: Speed | None, row: float, one: MicroBatch) -> float:
        """The predicted seconds that the teacher and the divergence take for a micro-batch.

        Args:
            teacher: the speed of the teacher's model; None if the teacher's distributions are stored.
            row: seconds for each row of logits, from `measured_row`.
        """
        forward = 0.0
        if teacher is not None and self.model is not None:
            forward = teacher.forward_pass(self.model, one.tokens, one.targets)
        return forward + row * one.targets
