"""TokenLoss: the loss of a language model, with the methods that the trainer calls."""

from __future__ import annotations

from typing import Any

from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module


class TokenLoss(PackedLoss):
    """The mean of -log p(token) over the trained tokens. Only a chunk of the logits is in memory at a time.

    Args:
        micro_tokens: maximum number of tokens in a micro-batch; None: batches are not cut into micro-batches.
    Attributes:
        tokens: number of tokens, trained or not, in the batches that all ranks together have processed.

    >>> lm = nplora.load_model("model.gguf")
    >>> lm.add_lora(rank=2)
    >>> dataset = nplora.data.read_dataset("train.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=8)
    >>> trainer = nplora.Trainer(lm, nplora.finetuning.TokenLoss(), nplora.AdamW(lr=1e-2))
    >>> history = trainer.fit(batches, epochs=2)
    >>> len(history.steps)
    4
    """

    def forward_backward(self, model: Module, x: PackedBatch, y: Any, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        self.tokens += len(x.ids)
        total = 0.0
        for part, _, _ in self._micro_batches(x):
            total += model.forward_backward(part, factor)
            self._end_part()
        return total

    def evaluate(self, model: Module, x: PackedBatch, y: Any) -> float:
        assert isinstance(model, LanguageModel)
        return model.loss_packed(x, as_decoded=False)
