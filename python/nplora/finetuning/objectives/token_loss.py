"""TokenLoss: the loss of a language model, with the methods that the trainer calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module, quiet
from nplora.trainer import FusedLoss


class TokenLoss(FusedLoss):
    """The mean of -log p(token) over the trained tokens. The logits are never in memory all at once.

    Args:
        micro_tokens: maximum tokens of a micro-batch; None: batches are not cut into micro-batches.
    Attributes:
        tokens: number of tokens, trained or not, that `forward_backward` has processed.

    >>> lm = nplora.load_model("model.gguf")
    >>> lm.add_lora(rank=2)
    >>> dataset = nplora.data.read_dataset("train.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=8)
    >>> trainer = nplora.Trainer(lm, nplora.finetuning.TokenLoss(), nplora.AdamW(lr=1e-2))
    >>> history = trainer.fit(batches, epochs=2)
    >>> len(history.steps)
    4
    """

    def __init__(self, micro_tokens: int | None = None) -> None:
        self.micro_tokens = micro_tokens
        self.tokens = 0

    def settings(self) -> dict[str, Any]:
        return {} if self.micro_tokens is None else {"micro_tokens": self.micro_tokens}

    def count(self, x: PackedBatch, y: Any) -> int:
        return x.num_targets

    def forward_backward(self, model: Module, x: PackedBatch, y: Any, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        self.tokens += len(x.ids)
        return sum(model.forward_backward(part, factor) for part in x.pieces(self.micro_tokens))

    def evaluate(self, model: Module, x: PackedBatch, y: Any) -> float:
        assert isinstance(model, LanguageModel)
        return model.loss_packed(x)

    def blame(self, model: Module, x: PackedBatch) -> str:
        assert isinstance(model, LanguageModel)
        found: list[str] = []
        prefix, model.model.prefix = model.model.prefix, None
        for index, block in enumerate(model.model.layers):
            vars(block)["run"] = _watched(block.run, f"model.layers.{index}", found)
        try:
            with quiet():
                model.loss_packed(x)
        finally:
            for block in model.model.layers:
                del vars(block)["run"]
            model.model.prefix = prefix
        return f"the first layer whose output is not finite is {(found or ['lm_head'])[0]!r}"


def _watched(run: Callable[..., Any], name: str, found: list[str]) -> Callable[..., Any]:
    def watching(*arguments: Any, **named: Any) -> Any:
        result = run(*arguments, **named)
        if not np.isfinite(result[0]).all():
            found.append(name)
        return result

    return watching
