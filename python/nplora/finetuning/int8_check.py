"""Int8Check: during a run, compares a gradient computed in int8 with the same gradient in bfloat16."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.int8 import Int8Layer, without_int8
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.product_errors import ProductErrors, int8_layers, nan_as_infinity
from nplora.runtime.user_warning import warn_user
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
# If the norm of a product's error, divided by the norm of the exact product, is larger than this, the product
# is a likely cause. SmolLM2 has 0.01 to 0.09.
LARGEST_PRODUCT_ERROR = 0.2
# The most trials of one comparison. A trial computes the gradient of the sample, with more parts of the model
# in bfloat16. If they do not suffice, there is one last trial with all parts in bfloat16.
MOST_TRIALS = 6
_LEAST_REDUCTION = 0.1  # parts stay in bfloat16 only if the errors become smaller by more than this share
_CANDIDATES = 3  # after this many trials, the best one is kept; if none helps, there are more trials
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
        """The largest errors of several ranks: the smallest cosines, and the largest difference of losses.

        NaN counts as the largest error.
        """
        parts = {part: _least(each.parts[part] for each in ranks) for part in ranks[0].parts}
        furthest = max(ranks, key=lambda each: nan_as_infinity(each.size_of_loss))
        return cls(_least(each.cosine for each in ranks), parts, furthest.loss, furthest.exact_loss)

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
    check searches for the parts that cause the errors, among all parts that multiply in int8. In a trial,
    some parts compute in bfloat16, and the errors are measured again. A part's own cosine does not show the
    cause, because errors of one part change the gradients of the others. The errors of single products show
    it better (see `ProductErrors`). So the check tries these candidates, in this order:

    1. the part with the largest error of a product,
    2. all parts with an error above LARGEST_PRODUCT_ERROR together, if there are several,
    3. the part with the smallest cosine,
    4. the last part without a gradient of its own (a frozen head, for example),
    5. the other parts, those with the largest errors of products first.

    A candidate helps if it reduces the errors by more than a tenth. The best of the first three candidates
    stays in bfloat16; if none of them helps, more candidates are tried, until one helps. This is repeated
    until the errors are small enough. Then, as long as trials are left, the check tries whether a part can
    return to int8. If MOST_TRIALS trials do not suffice, or if no candidate helps, a last trial computes all
    parts in bfloat16, and they stay so if this helps. So a comparison computes at most MOST_TRIALS + 3
    gradients. The parts that were found compute in bfloat16 for the rest of the run. If the errors are still
    too large, the check prints this. It prints this again only if it switches more parts, or if the errors
    were small enough in between.

    The log has one line for each comparison. The line also holds the error of the worst product (see
    `ProductErrors.worst`); on several ranks, this is the worst product of rank 0. A run that is resumed in
    another arithmetic makes a comparison before its first step. If `add_gradient` raises NonFiniteLossError,
    or if the loss or the gradient in bfloat16 is not finite, nothing is compared, and a message says so.

    The check is a context manager. At the end of the `with` block, all parts can compute in int8 again.

    Args:
        model: the model, with its adapter.
        add_gradient: a function that adds the gradient of the sample's mean loss to the gradients of the
            parameters, and returns the mean loss. May raise NonFiniteLossError.
        say: prints a line.
        every: the number of steps between two comparisons.
        least_cosine: the smallest cosine that is accepted; None: LEAST_COSINE.
    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `every` is less than 1, or `least_cosine` is NaN or infinite.

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
        op = "Int8Check"
        if not isinstance(model, Module):
            raise TypeError(f"{op}: model is {_check.kind(model)}, expected a module")
        if not callable(add_gradient):
            raise TypeError(f"{op}: add_gradient is {_check.kind(add_gradient)}, expected a function")
        _check.integer(op, "every", every, least=1)
        if least_cosine is not None:
            _check.number(op, "least_cosine", least_cosine)
        self._products = ProductErrors(model)
        self._model, self._add_gradient, self._say = model, self._products.sampled(add_gradient), say
        self._every, self._least = every, LEAST_COSINE if least_cosine is None else least_cosine
        self._fallen_back: list[str] = []  # the parts that compute in bfloat16
        self._switched: list[Int8Layer] = []  # the layers of these parts
        self._remains = False  # whether the errors were too large after the last comparison

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _switch(self._switched, int8=True)
        self._fallen_back, self._switched, self._remains = [], [], False

    def on_fit_start(self, run: Run) -> None:
        """In a resumed run, switch to bfloat16 those parts that the earlier run had switched."""
        last = run.logged(_EVENT)
        self._fall_back(last.get("in_bfloat16", []))
        is_new = not last or bool(run.changed_compute)  # this arithmetic has not been compared yet
        # A signal may have ended the earlier run before a comparison that was due.
        if run.step and (is_new or (self._is_due(run) and last.get("step") != run.step)):
            self._compare(run)

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
            self._products.worst()  # forgets the errors
            self._say(
                f"step {run.step}: the sample's gradients in int8 and bfloat16 are not compared: {error}"
            )
            return
        text, remains = f"step {run.step}: int8 is too inexact: {_described(found)}", self._is_too_large(left)
        if new := self._fallen_back[before:]:
            still = "; this is still too inexact" * remains
            self._say(
                f"{text}. From now on, these parts compute in bfloat16: {', '.join(new)}. With this change, "
                f"{_described(left)}{still}"
            )
        elif remains and not self._remains:
            self._say(f"{text}. Computing more parts in bfloat16 does not help; the run continues in int8")
        self._remains = remains
        worst = max(found.parts, key=lambda part: nan_as_infinity(1 - found.parts[part]), default="")
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
        if not self._is_too_large(left):
            return found, left
        products = self._errors_of_products(run)

        def trial(parts: Iterable[str]) -> Errors:
            with self._in_bfloat16(list(parts)):
                return self._of_all_ranks(run, measure)

        chosen, trials = list[str](), MOST_TRIALS
        while self._is_too_large(left):
            best, least = list[str](), left
            for number, more in enumerate(_candidates(left, products, chosen)[:trials], 1):
                trials -= 1
                errors = trial([*chosen, *more])
                if self._helps(errors, left) and self._size(errors) < self._size(least):
                    best, least = more, errors
                if not self._is_too_large(least) or (best and number >= _CANDIDATES):
                    break
            if not best:
                break
            chosen, left = [*chosen, *best], least
        if not self._is_too_large(left) and len(chosen) > 1:
            for part in sorted(chosen, key=lambda part: products[part])[:trials]:
                fewer = [each for each in chosen if each != part]
                if not self._is_too_large(errors := trial(fewer)):
                    chosen, left = fewer, errors
        if self._is_too_large(left) and (rest := [part for part in products if part not in chosen]):
            errors = trial(products)
            if self._helps(errors, left):
                chosen, left = [*chosen, *rest], errors
        self._fall_back(chosen)
        return found, left

    def _errors_of_products(self, run: Run) -> dict[str, float]:
        """For each part that multiplied in int8, the largest error of its products on any rank."""
        own = dict[str, float]()
        for name in self._products.seen:
            error = self._products.found.get(name)  # None: not measured
            part, size = part_of(name), 0.0 if error is None else nan_as_infinity(error.measured)
            own[part] = max(size, own.get(part, 0.0))
        found = dict[str, float]()
        for ranks in run.ranks.gather(own, f"the products of step {run.step}"):
            for part, size in ranks.items():
                found[part] = max(size, found.get(part, 0.0))
        return found

    def _helps(self, errors: Errors, before: Errors) -> bool:
        return self._size(errors) < (1 - _LEAST_REDUCTION) * self._size(before)

    def _size(self, errors: Errors) -> float:
        return errors.size(self._least)

    def _is_too_large(self, errors: Errors) -> bool:
        return self._size(errors) > 1

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

    @contextlib.contextmanager
    def _in_bfloat16(self, parts: Sequence[str]) -> Iterator[None]:
        layers = self._layers_in_int8(parts)
        try:
            _switch(layers, int8=False)
            yield
        finally:
            _switch(layers, int8=True)

    def _fall_back(self, parts: Sequence[str]) -> None:
        layers = self._layers_in_int8(parts)
        self._fallen_back += [part for part in parts if part not in self._fallen_back]
        self._switched += layers
        _switch(layers, int8=False)

    def _layers_in_int8(self, parts: Sequence[str]) -> list[Int8Layer]:
        return [layer for layer in layers_of(self._model, parts) if layer.int8]


def _switch(layers: Iterable[Int8Layer], int8: bool) -> None:
    for layer in layers:
        layer.int8 = int8


def _candidates(errors: Errors, products: dict[str, float], chosen: Sequence[str]) -> list[list[str]]:
    """The parts to try, the most likely cause first; see `Int8Check`."""
    parts = sorted((part for part in products if part not in chosen), key=lambda part: -products[part])
    trained = [part for part in parts if part in errors.parts]
    frozen = [part for part in products if part in parts and part not in errors.parts]
    worst = sorted(trained, key=lambda part: -nan_as_infinity(1 - errors.parts[part]))[:1]
    found = [[part] for part in dict.fromkeys([*parts[:1], *worst, *frozen[-1:], *parts])]
    inexact = [part for part in parts if products[part] > LARGEST_PRODUCT_ERROR]
    if len(inexact) > 1:
        found.insert(1, inexact)
    return found


def _least(values: Iterable[float]) -> float:
    return float(np.min(list(values)))  # NaN if a value is NaN


def _described(errors: Errors) -> str:
    worst = _least([errors.cosine, *errors.parts.values()])
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
    return any(True for _ in int8_layers(model))


def warn_of_slow_int8(op: str, model: Module) -> None:
    """Warn if a model computes in int8, but nplora uses no vector instructions."""
    if computes_in_int8(model) and _core.config()["isa"] == "generic":
        warn_user(
            f"{op}: compute='int8' is about 8 times slower than 'float32' here, because nplora uses no "
            "vector instructions (its instruction set is 'generic')"
        )


def layers_of(model: Module, parts: Iterable[str]) -> Iterator[Int8Layer]:
    """Yield the layers in the given parts of a model that can multiply in int8."""
    wanted = set(parts)
    return (layer for name, layer in int8_layers(model) if part_of(name) in wanted)


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
