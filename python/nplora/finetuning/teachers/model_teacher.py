"""ModelTeacher: a model that runs beside the student."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy.typing as npt

from nplora.finetuning.data.stored import Examples
from nplora.finetuning.nonfinite_layers import first_nonfinite_layer
from nplora.finetuning.teachers.teacher import DistributionsAt
from nplora.finetuning.teachers.vocabulary import require_same_vocabulary
from nplora.formats import model_directory
from nplora.formats.errors import FormatError
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.trainer.fingerprint import base_fingerprint, factors

Array = npt.NDArray[Any]


class ModelTeacher:
    """A teacher that is a model. The logits are computed for a few positions of the batch at a time."""

    top_k = 0
    temperature: float | None = None

    def __init__(self, lm: LanguageModel) -> None:
        self.model: LanguageModel | None = lm
        self._lm = lm.selected_model("distill")  # the run keeps these adapters
        self.name = str(lm.source)

    @property
    def paths(self) -> list[Path]:
        return [Path(path) for path in model_directory.files_of(self._lm.config.source)]

    def require_student(self, op: str, student: LanguageModel) -> None:
        theirs, ours = self._lm.tokenizer.tokens(), student.tokenizer.tokens()
        require_same_vocabulary(op, self.name, theirs, str(student.source), ours)

    def require_data(self, op: str, dataset: Examples) -> None:
        size = self._lm.vocab_size
        if dataset.largest_id >= size:
            raise FormatError(
                f"{op}: {dataset.report.source} has token {dataset.largest_id}, but the vocabulary of the "
                f"teacher {self.name} ends with {size - 1}"
            )
        longest, context = dataset.report.longest, self._lm.config.max_position_embeddings
        if longest > context:
            raise FormatError(
                f"{op}: {dataset.report.source} has an example of {longest:,} tokens, but the context of the "
                f"teacher {self.name} is {context:,}: expected max_length={context} or less"
            )

    def prepare_batch(self, batch: PackedBatch) -> DistributionsAt:
        hidden = self._lm.residual_stream(batch)
        return lambda rows: self._lm.logits_of(hidden[rows])

    def digest(self) -> str:
        return model_digest(self._lm)

    def blame(self, batch: PackedBatch) -> str:
        name = first_nonfinite_layer(self._lm, batch)
        return (
            f"in the teacher {self.name}, the first layer whose output is not finite is {name!r}"
            if name
            else ""
        )


def model_digest(lm: LanguageModel) -> str:
    """A hash of the model's weights, its arithmetic, and the adapters that are selected now."""
    used = lm.selected_model("model_digest")
    digest = hashlib.sha256(f"{used.compute} {base_fingerprint(used)}".encode())
    for name, layer in used.adapter_layers().items():
        settings = {key: value for key, value in layer.settings().items() if key != "dropout"}
        said = json.dumps(settings, sort_keys=True, allow_nan=False)
        digest.update(f"\n{name} {said} {layer.adapter_enabled}".encode())
    for name, array in factors(used).items():
        digest.update(f"\n{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
