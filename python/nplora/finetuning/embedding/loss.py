"""EmbeddingLoss: trains an encoder with a loss over the embeddings of a whole batch, in micro-batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.embedding.batches import Examples, TextBatch
from nplora.finetuning.int8_check import AddGradient
from nplora.finetuning.int8_sample import sample_length
from nplora.finetuning.nonfinite_layers import watched_blocks
from nplora.lm import Encoder
from nplora.models.packing import cut
from nplora.nn import embedding_losses
from nplora.nn.embedding_losses import EmbeddingFunction, MatryoshkaLoss, RankingLoss, innermost
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.trainer import FusedLoss

Array = npt.NDArray[Any]

MICRO_TOKENS = 4096
_SAMPLE_EXAMPLES = 16  # the most examples whose gradient is compared
_LEAST_EXAMPLES = 2  # with two examples, the positive of one is a negative of the other


class EmbeddingLoss(FusedLoss):
    """A loss for `Trainer` that compares the embeddings of all texts of a batch.

    The batch is divided into micro-batches, so a batch of thousands of texts needs little memory (Gao et al.
    2021, "GradCache"). First, a forward pass over each micro-batch computes embeddings; only the last pass
    also stores its activations. The loss and its gradient are computed from the embeddings of the whole
    batch. Then the last micro-batch gets its backward pass. Every other micro-batch gets a second forward
    pass, with the same dropout, and a backward pass. So a batch of one micro-batch takes no additional time.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.add_lora(rank=2)
        >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
        >>> batches = nplora.embedding.ExampleBatches(nplora.embedding.read_examples(rows, encoder))
        >>> trainer = nplora.Trainer(encoder, nplora.embedding.EmbeddingLoss(), nplora.AdamW(lr=1e-2))
        >>> history = trainer.fit(batches, epochs=20)
        >>> history.loss[-1] < history.loss[0]
        True

    Args:
        loss: "ranking" (multiple negatives), "triplet", "cosine" or "cosent", or a loss of
            `nplora.embedding`, such as `RankingLoss(scale=50)`.
        dims: widths to which embeddings are cut in training, as in `MatryoshkaLoss`.
        micro_tokens: maximum tokens of a micro-batch. A text with more tokens is a micro-batch by itself.
            Without dropout, this limit changes the gradients only by rounding. With dropout, the limit also
            changes the dropout masks, and so the gradients.
        leave_out_known: whether the loss "ranking" leaves out some negatives of an anchor: texts that equal
            the anchor or its positive, and the positives of equal anchors.
    Attributes:
        after_part: a function that is called after the backward pass of each micro-batch.
    Raises:
        ValueError, TypeError: an argument has a wrong value or type.
    """

    def __init__(
        self,
        loss: str | EmbeddingFunction = "ranking",
        *,
        dims: Sequence[int] | None = None,
        micro_tokens: int = MICRO_TOKENS,
        leave_out_known: bool = True,
    ) -> None:
        op = "EmbeddingLoss"
        self.function = embedding_losses.get(op, loss)
        if dims is not None:
            self.function = MatryoshkaLoss(self.function, tuple(dims))
        self.micro_tokens = _check.integer(op, "micro_tokens", micro_tokens, least=1)
        self.leave_out_known = bool(leave_out_known)
        self.after_part: Callable[[], None] = _nothing

    def count(self, x: TextBatch, y: Any) -> int:
        """The number of examples in a batch."""
        return len(x)

    def parts(self, x: TextBatch, y: Any) -> int:
        """The number of micro-batches of a batch."""
        return sum(1 for _ in self._micro_batches(x))

    def computed_elsewhere(self, x: TextBatch, y: Any) -> None:
        """Do nothing, because this loss does not count the tokens in the batches of other ranks."""

    def forward_backward(self, model: Module, x: TextBatch, y: Any, factor: float) -> float:
        """Return the summed loss of a batch; add `factor` times its gradient to the model's gradients."""
        encoder = _encoder(model)
        parts = list(self._micro_batches(x))
        vectors, streams = np.empty((len(x.texts), encoder.dim), np.float32), []
        for rows in parts[:-1]:
            streams.append(encoder.random_state())
            vectors[rows] = encoder.embed_forward(x.texts[rows])[0]
        vectors[parts[-1]], saved = encoder.embed_forward(x.texts[parts[-1]])
        loss, dy = self._loss(x, vectors, y)
        if not math.isfinite(loss):
            return loss
        dy *= np.float32(factor * len(x))
        encoder.embed_backward(dy[parts[-1]], saved)
        self.after_part()
        del saved
        after = encoder.random_state()
        for rows, stream in zip(parts[:-1], streams, strict=True):
            encoder.set_random_state(stream)
            encoder.embed_backward(dy[rows], encoder.embed_forward(x.texts[rows])[1])
            self.after_part()
        encoder.set_random_state(after)
        return loss * len(x)

    def sample_gradient(self, model: Module, examples: Examples) -> AddGradient:
        """Return the argument `add_gradient` of an `Int8Check`.

        The sample consists of the first examples: up to 16 examples, with about `SAMPLE_TOKENS` tokens. The
        sample has at least two examples and `LEAST_ROWS` texts, unless the data have fewer. With fewer texts,
        `Int8Check` may be unable to compare the last block; `TextBatches.sample_gradient` says why. The
        returned function raises NonFiniteLossError if the loss is not finite.
        """
        most = min(_SAMPLE_EXAMPLES, len(examples))
        singles = (examples.batch(np.array([i]))[0].texts for i in range(most))
        count = sample_length((sum(map(np.size, texts)), len(texts)) for texts in singles)
        count = min(max(count, _LEAST_EXAMPLES), most)

        def add_gradient() -> float:
            batch, scores = examples.batch(np.arange(count))
            loss = self.forward_backward(model, batch, scores, 1 / len(batch))
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss is {loss}")
            return loss / len(batch)

        return add_gradient

    def evaluate(self, model: Module, x: TextBatch, y: Any) -> float:
        """The mean loss of a batch, without dropout."""
        return self._loss(x, _encoder(model).embed_ids(x.texts), y)[0]

    def blame(self, model: Module, x: TextBatch) -> str:
        """After a loss that is not finite, return a text that names the first block with NaN or infinity."""
        encoder = _encoder(model)
        names = {id(module): name for name, module in encoder.named_modules()}
        with watched_blocks(encoder.model, lambda i: names[id(encoder.model.layers[i])]) as found:
            for rows in self._micro_batches(x):
                encoder.embed_forward(x.texts[rows])
                if found:
                    return f"the first block whose output is not finite is {found[0]!r}"
        return "the output of every block is finite, but the loss is not"

    def settings(self) -> dict[str, Any]:
        """Return the settings, as JSON values. A resumed run must have the same settings as the first run."""
        return {
            "loss": repr(self.function),
            "micro_tokens": self.micro_tokens,
            "leave_out_known": self.leave_out_known,
        }

    def _loss(self, x: TextBatch, vectors: Array, scores: Any) -> tuple[float, Array]:
        """The mean loss, and its gradient with respect to the embeddings of all texts."""
        targets = scores
        if isinstance(innermost(self.function), RankingLoss):
            targets = x.known_positives() if self.leave_out_known else None
        loss, gradients = self.function(x.split(vectors), targets)
        return loss, np.concatenate(gradients)

    def _micro_batches(self, x: TextBatch) -> Iterator[slice]:
        """Yield slices that cut `x.texts` into micro-batches."""
        cuts = cut(np.array([np.size(ids) for ids in x.texts]), self.micro_tokens)
        return (slice(first, end) for first, end in itertools.pairwise(cuts))


def _encoder(model: Module) -> Encoder:
    if not isinstance(model, Encoder):
        raise TypeError(
            f"EmbeddingLoss: the model is {_check.kind(model)}, expected an Encoder, as from load_encoder"
        )
    return model


def _nothing() -> None:
    pass
