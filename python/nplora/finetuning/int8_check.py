"""Int8Check: compares gradients in int8 with gradients in bfloat16 during a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data import TokenBatches
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn import Linear, LoRALinear
from nplora.nn.int8 import without_int8
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord

Array = npt.NDArray[np.float32]

EVERY = 100  # steps between two comparisons; there is also one after the first step
SAMPLE_TOKENS = 512  # the most tokens of the sample, if its first sequence is not longer
# The least cosine of a part's gradients. With int8, SmolLM2 has about 0.985. A cosine of 0.95 means that the
# error has a third of the gradient's norm, less than the noise of a batch.
LEAST_COSINE = 0.95
# The most values of the gradients that are compared, about; a sample of them needs little memory.
COMPARED = 1 << 20
_EVENT = "int8"  # the event of these lines in the log


class Int8Check(Callback):
    """Computes the gradient of a sample in int8 and in bfloat16, and compares their directions.

    Every comparison takes the same sample: the first sequences of the training data. The parts of the model
    are its blocks, the head and the embedding. If the cosine of a part's two gradients is too small, the part
    computes in bfloat16 from then on. If only the cosine of the whole gradient is too small, the part with
    the smallest cosine switches to bfloat16. The log has one line for each comparison.

    Args:
        lm: the model, with its adapter.
        batches: the training data.
        say: prints a line.
        micro_tokens: maximum tokens of a micro-batch, as in PackedLoss.
        every: the number of steps between two comparisons.
        least_cosine: the smallest cosine that is accepted; None: LEAST_COSINE.
    """

    def __init__(
        self,
        lm: LanguageModel,
        batches: TokenBatches,
        say: Callable[[str], None],
        micro_tokens: int | None = None,
        every: int = EVERY,
        least_cosine: float | None = None,
    ) -> None:
        self._lm, self._batches, self._say = lm, batches, say
        self._tokens = min(SAMPLE_TOKENS, micro_tokens or SAMPLE_TOKENS)
        self._every, self._least = every, LEAST_COSINE if least_cosine is None else least_cosine
        self._fallen_back: list[str] = []  # the parts that compute in bfloat16

    def on_fit_start(self, run: Run) -> None:
        """Restore the parts that an earlier run in this directory has switched back to bfloat16."""
        for layer in layers_of(self._lm, part_names(self._lm)):
            layer.int8 = True  # an earlier run may have ended with an error
        self._fall_back(run.logged(_EVENT).get("in_bfloat16", []))

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if run.step == 1 or run.step % self._every == 0:
            self._compare(run)

    def on_fit_end(self, run: Run) -> None:
        for layer in layers_of(self._lm, self._fallen_back):
            layer.int8 = True

    def _compare(self, run: Run) -> None:
        whole, parts = cosines(self._lm, self._sample())
        worst = min(parts, key=lambda part: parts[part], default="")
        in_int8 = [part for part in parts if any(layer.int8 for layer in layers_of(self._lm, [part]))]
        new = [part for part in in_int8 if not parts[part] >= self._least]
        if in_int8 and not new and not whole >= self._least:
            new = [min(in_int8, key=lambda part: parts[part])]
        if new:
            self._say(
                f"step {run.step}: the gradient in int8 has a cosine of {whole:.3f} with that in bfloat16; "
                f"computed in bfloat16 from now on: {', '.join(new)}"
            )
        self._fall_back(new)
        run.log(
            _EVENT,
            {
                "step": run.step,
                "cosine": whole,
                "worst": worst,
                "worst_cosine": parts.get(worst),
                "in_bfloat16": self._fallen_back,
            },
        )

    def _sample(self) -> PackedBatch:
        batch, _ = next(self._batches.epoch(0))
        pieces = batch.pieces(self._tokens)
        return next((piece for piece in pieces if piece.num_targets), pieces[0])

    def _fall_back(self, parts: Iterable[str]) -> None:
        self._fallen_back += parts
        for layer in layers_of(self._lm, self._fallen_back):
            layer.int8 = False


def cosines(lm: LanguageModel, sample: PackedBatch) -> tuple[float, dict[str, float]]:
    """The cosine between the gradients in int8 and in bfloat16, for all parameters and for each part.

    If the gradients have many values, every k-th of them is compared. The gradients of the parameters and the
    states of the random generators stay unchanged.
    """
    # An odd step meets all columns of a factor, whose rank is usually even.
    step = 1 | -(-sum(parameter.grad.size for parameter in lm.parameters()) // COMPARED)

    def gradients() -> Iterator[tuple[str, Array]]:
        lm.forward_backward(sample, 1 / max(1, sample.num_targets))
        for parameter in lm.parameters():
            yield parameter.name, parameter.grad.reshape(-1)[::step].copy()

    with _undisturbed(lm):
        int8 = [gradient for _, gradient in gradients()]
    whole, parts = Products(), dict[str, Products]()
    with _undisturbed(lm), without_int8():
        for gradient, (name, exact) in zip(int8, gradients(), strict=True):
            for products in (whole, parts.setdefault(part_of(name), Products())):
                products.add(gradient, exact)
    return whole.cosine(), {part: products.cosine() for part, products in parts.items()}


class Products:
    """The products of two long vectors, which are added piece by piece."""

    def __init__(self) -> None:
        self.ab = self.aa = self.bb = 0.0

    def add(self, a: Array, b: Array) -> None:
        self.ab += float(np.dot(a, b))
        self.aa += float(np.dot(a, a))
        self.bb += float(np.dot(b, b))

    def cosine(self) -> float:
        """The cosine of the vectors; 1 if both are zero."""
        if self.aa == self.bb == 0:
            return 1.0
        return self.ab / math.sqrt(self.aa * self.bb) if self.aa and self.bb else 0.0


def layers_of(lm: LanguageModel, parts: Iterable[str]) -> Iterator[Linear | LoRALinear]:
    """The layers of some parts of a model that can compute in int8."""
    wanted = set(parts)
    for name, module in lm.named_modules():
        if isinstance(module, Linear | LoRALinear) and part_of(name) in wanted:
            yield module


def part_names(lm: LanguageModel) -> list[str]:
    """The parts of the model that have parameters."""
    return list(dict.fromkeys(part_of(parameter.name) for parameter in lm.parameters()))


def part_of(name: str) -> str:
    """The part of the model that a layer or parameter belongs to.

    >>> part_of("model.layers.12.mlp.up_proj.A"), part_of("lm_head.A")
    ('model.layers.12', 'lm_head')
    """
    words = name.split(".")
    digits = next((i for i, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join(words[: digits + 1])


@contextlib.contextmanager
def _undisturbed(lm: LanguageModel) -> Iterator[None]:
    """After the `with` block, the gradients and the random generators are as they were before it."""
    streams = lm.random_state()
    kept = [p.grad.copy() if p.grad.any() else None for p in lm.parameters()]  # usually zero after a step
    lm.zero_grad()
    try:
        yield
    finally:
        lm.zero_grad()
        for parameter, gradient in zip(lm.parameters(), kept, strict=True):
            if gradient is not None:
                parameter.grad[...] = gradient
        lm.set_random_state(streams)
        if lm.model.word_filter is not None:
            lm.model.word_filter.take_skipped()  # these words are not the run's
