"""Distillation: the student learns the next-token distributions of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy.typing as npt

from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.sources import Source
from nplora.finetuning.data.stored import Examples
from nplora.finetuning.objectives.objective import Objective
from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.planning import Teaching
from nplora.finetuning.teachers import ModelTeacher, StoredTeacher, Teacher, is_stored
from nplora.formats import files, model_directory, peft_adapter
from nplora.lm import LanguageModel, load_model
from nplora.models.divergence import Distillation
from nplora.models.head import LogitLoss
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]


class DistillLoss(PackedLoss):
    """The mean of ratio · T² · KL + (1 - ratio) · cross-entropy over the trained tokens.

    T is the temperature, and ratio is the option `kd_ratio`. The loss has two metrics: the mean KL
    divergence without the factor T², and the mean cross-entropy. If ratio is 1, training does not compute the
    cross-entropy, and only the first metric exists.
    """

    def __init__(self, formula: Distillation, teacher: Teacher, micro_tokens: int | None = None) -> None:
        super().__init__(micro_tokens)
        self._formula, self._teacher = formula, teacher

    def settings(self) -> dict[str, Any]:
        chosen = {"kl": self._formula.kl, "temperature": self._formula.temperature}
        teacher = {"kd_ratio": self._formula.ratio, "teacher": self._teacher.digest()}
        return {"objective": "distill", **chosen, **teacher, **super().settings()}

    def forward_backward(self, model: Module, x: PackedBatch, y: Any, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        self.tokens += len(x.ids)
        total = 0.0
        for part, _, _ in self._micro_batches(x):
            total += model.forward_backward_with(part, self._loss_of_batch(part), factor)
            self._end_part()
        return total

    def evaluate(self, model: Module, x: PackedBatch, y: Any) -> float:
        assert isinstance(model, LanguageModel)
        return model.loss_with(x, self._loss_of_batch(x)) / x.num_targets if x.num_targets else 0.0

    def blame(self, model: Module, x: PackedBatch) -> str:
        return self._teacher.blame(x) or super().blame(model, x)

    def _loss_of_batch(self, batch: PackedBatch) -> LogitLoss:
        """Return a function that computes the losses of some tokens of the batch from the tokens' logits.

        The teacher's forward pass runs in this call, not in the returned function, so that it ends before the
        student's activations take memory.
        """
        teacher = self._teacher.prepare_batch(batch)

        def loss(logits: Array, rows: Array, factor: float, gradient: bool) -> Array:
            targets = batch.targets[rows]
            losses, kls, hard = self._formula(logits, targets, teacher(rows), factor, gradient)
            self._tally.add("kl", kls)
            if hard is not None:
                self._tally.add("nll_loss", hard)
            return losses

        return loss


class DistillObjective(Objective):
    """Distillation from a teacher model, or from the stored log-probabilities of a teacher."""

    name = "distill"
    _teacher: Teacher

    @property
    def teacher(self) -> Teacher:
        return self._teacher

    def open(self, op: str, lm: LanguageModel, check: bool) -> None:
        given = self.options.teacher
        if isinstance(given, LanguageModel):
            if given is lm:
                raise ValueError(f"{op}: the teacher is the model itself; expected another model")
            self._teacher = ModelTeacher(given)
        else:
            assert given is not None  # FinetuneOptions has checked it
            files.require_named(op, teacher=given)
            if Path(given, peft_adapter.CONFIG).exists() and not Path(given, model_directory.CONFIG).exists():
                raise ValueError(
                    f"{op}: the teacher {files.name(given)} is an adapter, expected a model: merge the "
                    "adapter into its model, or store log-probabilities with `nplora teach MODEL --adapter`"
                )
            stored = is_stored(given)
            self._teacher = (
                StoredTeacher(given) if stored else ModelTeacher(load_model(given, lm.compute, check=check))
            )
        self._teacher.require_student(op, lm)
        self._require_temperature(op)

    def with_options(self, op: str, options: FinetuneOptions) -> Self:
        other = super().with_options(op, options)
        other._require_temperature(op)
        return other

    def _require_temperature(self, op: str) -> None:
        wanted, stored = self.options.temperature, self._teacher.temperature
        if wanted is not None and stored is not None and wanted != stored:
            raise ValueError(
                f"{op}: temperature is {wanted:g}, but the log-probabilities in {self._teacher.name} were "
                f"computed at temperature {stored:g}: run nplora teach again with --temperature {wanted:g}"
            )

    def reload(self, compute: str) -> None:
        given = self.options.teacher
        if self._teacher.model is None or given is None or isinstance(given, LanguageModel):
            return
        del self._teacher  # frees its memory first
        self._teacher = ModelTeacher(load_model(given, compute, check=False))

    def read(self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions) -> Examples:
        dataset = super().read(op, sources, tokenizer, reading)
        self._teacher.require_data(op, dataset)
        return dataset

    @property
    def formula(self) -> Distillation:
        options = self.options
        temperature = options.temperature or self._teacher.temperature or 1.0
        return Distillation(options.kl, temperature, options.kd_ratio)

    def teaching(self, lm: LanguageModel) -> Teaching:
        return Teaching(lm, self._teacher.model, self._teacher.top_k, self.formula)

    def loss(self, micro_tokens: int | None) -> DistillLoss:
        return DistillLoss(self.formula, self._teacher, micro_tokens)
