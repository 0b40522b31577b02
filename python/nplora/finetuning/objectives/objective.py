"""Objective: what a run minimises, which rows it reads, and what it computes before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from nplora.finetuning.data import Dataset
from nplora.finetuning.data.dataset import Part, ReadOptions, read_sources
from nplora.finetuning.data.sources import Source
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.formats import files
from nplora.lm import LanguageModel
from nplora.tokenizer import Tokenizer


class Objective:
    """The base class is supervised fine-tuning ("sft"): the mean of -log p(token) over the trained tokens.

    An object of it belongs to one run.
    """

    name: ClassVar[str] = "sft"

    def read(
        self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions, part: Part | None
    ) -> Dataset:
        """Read examples, as `read_sources` does."""
        return read_sources(op, sources, tokenizer, reading, part)

    def prepare(
        self,
        lm: LanguageModel,
        datasets: list[Dataset],
        directory: files.Directory,
        say: Callable[[str], None],
    ) -> None:
        """Compute what the loss needs besides the model, before the first step or after a resume.

        Args:
            lm: the model with the adapter that is trained.
            datasets: the training data, and the validation data, if there are any.
            directory: the output directory.
            say: prints a text.
        """

    def loss(self, micro_tokens: int | None) -> TokenLoss:
        """The loss of a batch. The batch is computed in micro-batches of at most `micro_tokens` tokens."""
        return TokenLoss(micro_tokens)
