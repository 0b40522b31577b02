"""Int8Check: during a run, compares a gradient computed in int8 with the same gradient in bfloat16."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from nplora.nn import TrainedHead
from nplora.nn.int8 import Int8Layer, without_int8
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.product_errors import ProductErrors
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord

Array = npt.NDArray[np.float32]

EVERY = 100  # steps between two comparisons; there is also one after the first step
# The least cosine between a part's gradients in int8 and in bfloat16. SmolLM2 has about 0.985. At 0.95, the
# norm of the error is a third of the gradient's norm, which is less than the noise of a batch.
LEAST_COSINE = 0.95
# The largest difference between the mean losses of the sample in int8 and in bfloat16 is the first number
# plus the second number times the loss in bfloat16. A loss of 4.6 may differ by 0.14. SmolLM2 has 0.01 to
# 0.06 before training, and at most 0.01 after 30 steps. If the head is inexact, its probabilities may be
# useless while all cosines are high, because the target dominates the gradient of the logits. The loss then
# shows the error.
LARGEST_DIFFERENCE, LARGEST_SHARE = 0.05, 0.02
# The most trials of one comparison. A trial computes the gradient of the sample, with one more part of the
# model in bfloat16.
MOST_TRIALS = 6
_CANDIDATES = 3  # the most parts that are tried before the best of them stays in bfloat16
# At most about this many values of the gradients are compared, so that the comparison needs little memory.
COMPARED = 1 << 20
_EVENT = "int8"  # the name of the check's event in the log

# Adds the gradient of the sample's mean loss to the gradients of the parameters, and returns the mean loss.
AddGradient = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Errors:
    """How much the loss and the gradients of a sample differ from those in bfloat16.

    Attributes:
        cosine: the cosine between the two gradients of the whole model.
        parts: the cosine for each part of the model that has parameters.
        loss: the mean loss minus the mean loss in bfloat16.
        exact_loss: the mean loss in bfloat16.
    """

    cosine: float
    parts: dict[str, float]
    loss: float
    exact_loss: float

    @classmethod
    def largest(cls, ranks: Sequence[Errors]) -> Errors:
        """The largest errors of several ranks: the smallest cosines, and the largest difference of losses."""
        parts = {part: min(each.parts[part] for each in ranks) for part in ranks[0].parts}
        furthest = max(ranks, key=lambda each: each.size_of_loss)
        return cls(min(each.cosine for each in ranks), parts, furthest.loss, furthest.exact_loss)

    @property
    def size_of_loss(self) -> float:
        """The difference of the losses, relative to its limit."""
        return abs(self.loss) / (LARGEST_DIFFERENCE + LARGEST_SHARE * abs(self.exact_loss))

    def size(self, least_cosine: float) -> float:
        """The largest error, relative to its limit. A size of at most 1 is accepted; NaN becomes infinity."""
        largest = max(1e-9, 1 - least_cosine)
        sizes = [(1 - cosine) / largest for cosine in (self.cosine, *self.parts.values())]
        sizes.append(self.size_of_loss)
        return math.inf if any(map(math.isnan, sizes)) else max(sizes)


class Int8Check(Callback):
    """Computes the loss and the gradient of a sample in int8 and in bfloat16, and compares them.

    Every comparison uses the same sample of the training data. The parts of a model are its blocks, its head
    and its embedding. The errors of int8 are too large if a cosine between the two gradients, of a part or of
    the whole model, is too small, or if the losses differ by too much (see LARGEST_DIFFERENCE). Then the
    check searches for the part that causes the errors. A part's own cosine does not show this, because errors
    of one part change the gradients of the others. So the check tries the part with the smallest cosine, a
    part without a gradient of its own (a frozen head), and the part with the second smallest cosine. In a
    trial, the part computes in bfloat16, and the errors are measured again. The part whose trial has the
    smallest errors computes in bfloat16 for the rest of the run. This is repeated until the errors are small
    enough. If MOST_TRIALS trials do not suffice, or if no trial reduces the errors, all parts whose cosines
    are too small compute in bfloat16; if there is no such part, all parts do.

    The log has one line for each comparison. The line also holds the error of the worst product (see
    `ProductErrors.worst`), on several ranks that of rank 0. If `add_gradient` raises NonFiniteLossError, or
    if the loss or the gradient in bfloat16 is not finite, nothing is compared, and a message says so.

    The check is a context manager. At the end of the `with` block, all parts can compute in int8 again.

    Args:
        model: the model, with its adapter.
        add_gradient: a function that adds the gradient of the sample's mean loss to the gradients of the
            parameters, and returns the mean loss. May raise NonFiniteLossError.
        say: prints a line.
        every: the number of steps between two comparisons.
        least_cosine: the smallest cosine that is accepted; None: LEAST_COSINE.

    >>> import nplora, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> layer = nplora.LoRALinear(rng.standard_normal((16, 64)), rank=2, compute="int8", rng=0)
    >>> model = nplora.Sequential(layer)
    >>> x, y = rng.standard_normal((64, 64)), rng.standard_normal((64, 16))
    >>> sample = nplora.finetuning.sample_gradient(model, "mse", x[:32], y[:32])
    >>> check = nplora.finetuning.Int8Check(model, sample, every=4, least_cosine=0.9)
    >>> trainer = nplora.Trainer(model, "mse", callbacks=[check])
    >>> history = trainer.fit(x, y, epochs=2, checkpoint_dir="int8-run", overwrite=True)
    >>> import json, pathlib
    >>> log = pathlib.Path("int8-run/log.jsonl").read_text(encoding="utf-8").splitlines()
    >>> [(row["step"], row["worst_product"]) for row in map(json.loads, log) if row["event"] == "int8"]
    [(1, '0'), (4, '0')]
    """

    def __init__(
        self,
        model: Module,
        add_gradient: AddGradient,
        say: Callable[[str], None] = print,
        every: int = EVERY,
        least_cosine: float | None = None,
    ) -> None:
        self._products = ProductErrors(model)
        self._model, self._add_gradient, self._say = model, self._products.sampled(add_gradient), say
        self._every, self._least = every, LEAST_COSINE if least_cosine is None else least_cosine
        self._fallen_back: list[str] = []  # the parts that compute in bfloat16
        self._switched: list[Int8Layer] = []  # the layers of these parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._switched:
            layer.int8 = True
        self._fallen_back, self._switched = [], []

    def on_fit_start(self, run: Run) -> None:
        """In a resumed run, switch to bfloat16 those parts that the earlier run had switched."""
        last = run.logged(_EVENT)
        self._fall_back(last.get("in_bfloat16", []))
        if run.step and self._is_due(run) and last.get("step") != run.step:
            self._compare(run)  # a signal ended the earlier run before this comparison

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if self._is_due(run):
            self._compare(run)

    def _is_due(self, run: Run) -> bool:
        return run.step == 1 or run.step % self._every == 0

    def _compare(self, run: Run) -> None:
        before = len(self._fallen_back)
        try:
            found, left = self._search(run)
        except NonFiniteLossError as error:
            self._say(f"step {run.step}: the gradients in int8 and bfloat16 are not compared: {error}")
            return
        if new := self._fallen_back[before:]:
            self._say(
                f"step {run.step}: int8 is too inexact: {_described(found)}. From now on, these parts "
                f"compute in bfloat16: {', '.join(new)}. With this change, {_described(left)}"
            )
        worst = min(found.parts, key=lambda part: found.parts[part], default="")
        run.log(
            _EVENT,
            {
                "step": run.step,
                "cosine": found.cosine,
                "worst": worst,
                "worst_cosine": found.parts.get(worst),
                "loss_difference": found.loss,
                "in_bfloat16": list(self._fallen_back),
                **self._products.worst(),
            },
        )

    def _search(self, run: Run) -> tuple[Errors, Errors]:
        """Switch parts to bfloat16 until the errors are small. Return the errors before and after.

        All ranks make the same decisions, because all use the largest errors of all ranks. With local steps,
        the errors of the ranks differ.

        Raises:
            NonFiniteLossError: the loss of the sample is not finite on a rank.
        """
        exact = list[Comparison]()

        def measure() -> Errors:
            if not exact:
                exact.append(Comparison(self._model, self._add_gradient))
            return exact[0].measure()

        found = left = self._of_all_ranks(run, measure)
        trials = 0
        while self._is_too_large(left) and trials < MOST_TRIALS:
            tried: dict[str, Errors] = {}
            for part in self._candidates(left)[: min(_CANDIDATES, MOST_TRIALS - trials)]:
                trials += 1
                with self._in_bfloat16(part):
                    tried[part] = self._of_all_ranks(run, measure)
                if not self._is_too_large(tried[part]):
                    break
            best = min(tried, key=lambda part: tried[part].size(self._least), default=None)
            if best is None or not tried[best].size(self._least) < left.size(self._least):
                break
            left = tried[best]
            self._fall_back([best])
        if self._is_too_large(left):
            in_int8 = self._parts_in_int8()
            bad = [part for part in in_int8 if not left.parts.get(part, 1) >= self._least]
            self._fall_back(bad or in_int8)
            left = self._of_all_ranks(run, measure)
        return found, left

    def _is_too_large(self, errors: Errors) -> bool:
        return errors.size(self._least) > 1

    def _of_all_ranks(self, run: Run, measure: Callable[[], Errors]) -> Errors:
        """Measure the errors; return the largest errors of all ranks.

        Raises:
            NonFiniteLossError: on every rank, if one rank raises this error.
        """
        own, problem = None, ""
        try:
            own = measure()
        except NonFiniteLossError as error:
            problem = str(error)
        rows = run.ranks.gather((own, problem), f"the comparison of step {run.step}")
        for rank, (errors, problem) in enumerate(rows):
            if errors is None:
                raise NonFiniteLossError(f"rank {rank}: {problem}" if len(rows) > 1 else problem)
        return Errors.largest([errors for errors, _ in rows if errors is not None])

    def _candidates(self, errors: Errors) -> list[str]:
        """The parts to try, the most likely cause first; see the class."""
        in_int8, cosines = self._parts_in_int8(), errors.parts
        trained = sorted((part for part in in_int8 if part in cosines), key=lambda part: cosines[part])
        frozen = [part for part in in_int8 if part not in cosines]
        return [*trained[:1], *frozen[-1:], *trained[1:], *frozen[:-1]]

    def _parts_in_int8(self) -> list[str]:
        parts = int8_parts(self._model)
        return [part for part in parts if any(layer.int8 for layer in layers_of(self._model, [part]))]

    @contextlib.contextmanager
    def _in_bfloat16(self, part: str) -> Iterator[None]:
        layers = [layer for layer in layers_of(self._model, [part]) if layer.int8]
        try:
            for layer in layers:
                layer.int8 = False
            yield
        finally:
            for layer in layers:
                layer.int8 = True

    def _fall_back(self, parts: Iterable[str]) -> None:
        parts = list(parts)
        self._fallen_back += parts
        for layer in layers_of(self._model, parts):
            if layer.int8:
                layer.int8 = False
                self._switched.append(layer)


def _described(errors: Errors) -> str:
    worst = min(errors.cosine, *errors.parts.values()) if errors.parts else errors.cosine
    return f"the smallest cosine of gradients is {worst:.3f}, and the losses differ by {abs(errors.loss):.3f}"


class Comparison:
    """Compares the loss and the gradient of a sample with those in bfloat16, which are computed only once.

    If the gradients have many values, only every k-th value is compared (see `sample_step`). The gradients of
    the parameters and the states of the random generators stay unchanged.
    """

    def __init__(self, model: Module, add_gradient: AddGradient) -> None:
        self._model, self._add_gradient = model, add_gradient
        self._step = sample_step([parameter.grad for parameter in model.parameters()])
        with _undisturbed(model), without_int8():
            self._loss = add_gradient()
            self._exact = [values.copy() for _, values in self._sampled()]
        if not math.isfinite(self._loss) or not all(np.isfinite(values).all() for values in self._exact):
            raise NonFiniteLossError("the sample has a loss or a gradient that is not finite in bfloat16")

    def measure(self) -> Errors:
        """Compute the loss and the gradient in the current arithmetic of the model's layers."""
        whole, parts = Products(), dict[str, Products]()
        with _undisturbed(self._model):
            loss = self._add_gradient()
            for exact, (name, values) in zip(self._exact, self._sampled(), strict=True):
                for products in (whole, parts.setdefault(part_of(name), Products())):
                    products.add(values, exact)
        cosines = {part: products.cosine() for part, products in parts.items()}
        return Errors(whole.cosine(), cosines, loss - self._loss, self._loss)

    def _sampled(self) -> Iterator[tuple[str, Array]]:
        for parameter in self._model.parameters():
            yield parameter.name, parameter.grad.reshape(-1)[:: self._step]


def sample_step(gradients: Sequence[Array]) -> int:
    """Return a number k: every k-th value of the gradients is used, in all about COMPARED values at most.

    k has no common factor with the number of columns of any gradient. So the compared values come from all
    columns.

    >>> import numpy as np
    >>> sample_step([np.empty((1024, 6), np.float32), np.empty((3000, 576), np.float32)])
    5
    """
    step = max(1, -(-sum(gradient.size for gradient in gradients) // COMPARED))
    lengths = {gradient.shape[-1] for gradient in gradients if gradient.size}
    while any(math.gcd(step, length) != 1 for length in lengths):
        step += 1
    return step


class Products:
    """Adds up the dot products a·b, a·a and b·b of two vectors. Each call of `add` gets a piece of both."""

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


def computes_in_int8(model: Module) -> bool:
    """Whether training multiplies some frozen weights of a model in int8."""
    return any(True for _ in _int8_layers(model))


def layers_of(model: Module, parts: Iterable[str]) -> Iterator[Int8Layer]:
    """Yield the layers in the given parts of a model that can multiply in int8."""
    wanted = set(parts)
    return (layer for name, layer in _int8_layers(model) if part_of(name) in wanted)


def int8_parts(model: Module) -> list[str]:
    """The parts of a model that can multiply in int8 in training, in the model's order.

    The parts before the first part with parameters are left out. They are computed as in inference, and so
    never in int8.
    """
    first = next((part_of(parameter.name) for parameter in model.parameters()), None)
    parts = list(dict.fromkeys(part_of(name) for name, _ in model.named_modules()))
    own = {part_of(name) for name, _ in _int8_layers(model)}
    begin = parts.index(first) if first in parts else 0
    return [part for part in parts[begin:] if part in own]


def _int8_layers(model: Module) -> Iterator[tuple[str, Int8Layer]]:
    for name, module in model.named_modules():
        is_whole = isinstance(module, TrainedHead) and module.is_whole  # no frozen row is left
        weight = getattr(module, "weight", None)
        if isinstance(module, Int8Layer) and getattr(weight, "compute", None) == "int8" and not is_whole:
            yield name, module


def part_of(name: str) -> str:
    """The name of the model's part (see `Int8Check`) to which a layer or parameter belongs.

    >>> part_of("model.layers.12.mlp.up_proj.A"), part_of("lm_head.A")
    ('model.layers.12', 'lm_head')
    """
    words = name.split(".")
    digits = next((i for i, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join(words[: digits + 1])


@contextlib.contextmanager
def _undisturbed(model: Module) -> Iterator[None]:
    """Restore the gradients and the random generators at the end of the `with` block."""
    streams = model.random_state()
    kept = [p.grad.copy() if p.grad.any() else None for p in model.parameters()]  # usually all zero
    model.zero_grad()
    try:
        yield
    finally:
        model.zero_grad()
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            if gradient is not None:
                parameter.grad[...] = gradient
        model.set_random_state(streams)
