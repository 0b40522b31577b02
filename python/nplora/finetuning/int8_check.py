"""Int8Check: during a run, compares a gradient computed in int8 with the same gradient in bfloat16."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.finetuning.data import TokenBatches
from nplora.lm import LanguageModel
from nplora.nn import Linear, LoRALinear
from nplora.nn.int8 import without_int8
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.product_errors import ProductErrors
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord

Array = npt.NDArray[np.float32]

EVERY = 100  # steps between two comparisons; there is also one after the first step
SAMPLE_TOKENS = 512  # the most tokens of the sample, if its first sequence is not longer
# The least rows of a product that is compared. A product of fewer rows with low-bit weights is computed in
# int8 even within `without_int8`.
LEAST_ROWS = _core.constants.small_batch + 1
# The least cosine between a part's gradients in int8 and in bfloat16. SmolLM2 has about 0.985. At 0.95, the
# norm of the error is a third of the gradient's norm, which is less than the noise of a batch.
LEAST_COSINE = 0.95
# At most about this many values of the gradients are compared, so that the comparison needs little memory.
COMPARED = 1 << 20
_EVENT = "int8"  # the name of the check's event in the log

AddGradient = Callable[[], None]  # adds the gradient of the sample to the gradients of the model


class Int8Check(Callback):
    """Computes the gradient of a sample in int8 and in bfloat16, and compares their directions.

    Every comparison uses the same sample of the training data. The parts of a model are its blocks, its head
    and its embedding. If the cosine between the two gradients of a part is too small, this part computes in
    bfloat16 in the rest of the run. If only the cosine for the whole model is too small, the part with the
    smallest cosine switches to bfloat16. The log has one line for each comparison. It also holds the error of
    the worst product (see `ProductErrors.worst`); on several ranks, it is that of rank 0. If `add_gradient`
    raises NonFiniteLossError, nothing is compared, and a message says so.

    Args:
        model: the model, with its adapter.
        add_gradient: a function that adds the gradient of the sample to the gradients of the parameters.
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

    def on_fit_start(self, run: Run) -> None:
        """In a resumed run, switch to bfloat16 those parts that the earlier run had switched."""
        for layer in layers_of(self._model, part_names(self._model)):
            layer.int8 = True  # an earlier run that ended with an error may have left it False
        last = run.logged(_EVENT)
        self._fall_back(last.get("in_bfloat16", []))
        if run.step and self._is_due(run) and last.get("step") != run.step:
            self._compare(run)  # a signal ended the earlier run before this comparison

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if self._is_due(run):
            self._compare(run)

    def on_fit_end(self, run: Run) -> None:
        for layer in layers_of(self._model, self._fallen_back):
            layer.int8 = True

    def _is_due(self, run: Run) -> bool:
        return run.step == 1 or run.step % self._every == 0

    def _compare(self, run: Run) -> None:
        found = self._smallest_cosines(run)
        if found is None:
            return
        whole, parts = found
        worst = min(parts, key=lambda part: parts[part], default="")
        in_int8 = [part for part in parts if any(layer.int8 for layer in layers_of(self._model, [part]))]
        new = [part for part in in_int8 if not parts[part] >= self._least]
        if in_int8 and not new and not whole >= self._least:
            new = [min(in_int8, key=lambda part: parts[part])]
        if new:
            self._say(
                f"step {run.step}: the cosine between the gradients in int8 and in bfloat16 is {whole:.3f}; "
                f"from now on, these parts of the model compute in bfloat16: {', '.join(new)}"
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
                **self._products.worst(),
            },
        )

    def _smallest_cosines(self, run: Run) -> tuple[float, dict[str, float]] | None:
        """Return the smallest cosine over all ranks: a number for the whole model, and a dict for the parts.

        The result is None if the loss of the sample is not finite on a rank. With local steps, the cosines of
        the ranks differ. All ranks use the smallest cosine, because all must compute in the same arithmetic.
        """
        own, problem = None, ""
        try:
            own = cosines(self._model, self._add_gradient)
        except NonFiniteLossError as error:
            problem = str(error)
        rows = run.ranks.gather((own, problem), f"the comparison of step {run.step}")
        found = [row for row, _ in rows if row is not None]
        if len(found) < len(rows):
            rank, problem = next((rank, problem) for rank, (row, problem) in enumerate(rows) if row is None)
            where = f"rank {rank}: " if len(rows) > 1 else ""
            self._say(
                f"step {run.step}: the gradients in int8 and bfloat16 are not compared: {where}{problem}"
            )
            return None
        whole = min(cosine for cosine, _ in found)
        return whole, {part: min(of_parts[part] for _, of_parts in found) for part in found[0][1]}

    def _fall_back(self, parts: Iterable[str]) -> None:
        self._fallen_back += parts
        for layer in layers_of(self._model, self._fallen_back):
            layer.int8 = False


def of_tokens(lm: LanguageModel, batches: TokenBatches, micro_tokens: int | None = None) -> AddGradient:
    """Return the argument `add_gradient` of an `Int8Check`.

    The sample comes from the run's first batch: it is the first micro-batch that has targets.

    Args:
        micro_tokens: maximum number of tokens in a micro-batch, as in `PackedLoss`.
    """
    tokens = min(SAMPLE_TOKENS, micro_tokens or SAMPLE_TOKENS)

    def add_gradient() -> None:
        batch, _ = next(batches.epoch(0))
        pieces = batch.pieces(tokens)
        sample = next((piece for piece in pieces if piece.num_targets), pieces[0])
        try:
            lm.forward_backward(sample, 1 / max(1, sample.num_targets))
        finally:
            if lm.model.word_filter is not None:
                lm.model.word_filter.take_skipped()  # the run must not count the sample's words

    return add_gradient


def sample_length(sizes: Iterable[tuple[int, int]]) -> int:
    """The number of examples in a sample.

    The first examples are counted until they have `LEAST_ROWS` texts. Further examples are counted as long as
    the sample has at most `SAMPLE_TOKENS` tokens.

    Args:
        sizes: for each example, a tuple: its number of tokens, and its number of texts.
    """
    tokens = texts = count = 0
    for new_tokens, new_texts in sizes:
        if tokens + new_tokens > SAMPLE_TOKENS and texts >= LEAST_ROWS:
            break
        tokens, texts, count = tokens + new_tokens, texts + new_texts, count + 1
    return count


def cosines(model: Module, add_gradient: AddGradient) -> tuple[float, dict[str, float]]:
    """The cosine between the gradients in int8 and in bfloat16: for the whole model, and for each part of it.

    If the gradients have many values, only every k-th value is compared (see `sample_step`). The gradients of
    the parameters and the states of the random generators stay unchanged.
    """
    step = sample_step([parameter.grad for parameter in model.parameters()])

    def gradients() -> Iterator[tuple[str, Array]]:
        add_gradient()
        for parameter in model.parameters():
            yield parameter.name, parameter.grad.reshape(-1)[::step].copy()

    with _undisturbed(model):
        int8 = [gradient for _, gradient in gradients()]
    whole, parts = Products(), dict[str, Products]()
    with _undisturbed(model), without_int8():
        for gradient, (name, exact) in zip(int8, gradients(), strict=True):
            for products in (whole, parts.setdefault(part_of(name), Products())):
                products.add(gradient, exact)
    return whole.cosine(), {part: products.cosine() for part, products in parts.items()}


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
    """Whether some frozen weights of a model have compute="int8"."""
    layers = (module for _, module in model.named_modules() if isinstance(module, Linear | LoRALinear))
    return any(getattr(layer.weight, "compute", None) == "int8" for layer in layers)


def layers_of(model: Module, parts: Iterable[str]) -> Iterator[Linear | LoRALinear]:
    """Yield the linear layers in the given parts of a model. Only linear layers can compute in int8."""
    wanted = set(parts)
    for name, module in model.named_modules():
        if isinstance(module, Linear | LoRALinear) and part_of(name) in wanted:
            yield module


def part_names(model: Module) -> list[str]:
    """The parts of the model that have parameters."""
    return list(dict.fromkeys(part_of(parameter.name) for parameter in model.parameters()))


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
