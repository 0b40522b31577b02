"""Checks whether an adapter fits its target, which is a model or a file of weights."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.adapters.content import CLASSIFIER_TASKS, AdapterContent, classifier_hint
from nplora.formats.errors import FormatError, brief, counted, in_places
from nplora.formats.tokenizer_json import AddedToken
from nplora.models import model_digest


def kind(embedding: bool, kernel: tuple[int, ...] | None) -> str:
    """The name of a layer's kind in messages. `kernel` is the shape of a convolution's kernel, or empty."""
    return "a convolution" if kernel else "an embedding" if embedding else "a linear layer"


@dataclass(frozen=True)
class Place:
    """The properties that an adapter's layer must have to fit a weight. None stands for any value.

    Attributes:
        title: the weight's name in messages.
        shape: (d_out, d_in).
        embedding: whether the weight is an embedding table.
        use_dora: whether the layer has DoRA magnitudes.
        kernel: the shape (c_in, height, width) of a convolution's kernel; empty for other weights.
        dtype: the dtype that the factors are converted to.
    """

    title: str = ""
    shape: tuple[int, ...] | None = None
    embedding: bool | None = None
    use_dora: bool | None = None
    kernel: tuple[int, ...] | None = None
    dtype: npt.DTypeLike = np.float32


@dataclass(frozen=True)
class Target:
    """The model or file that an adapter must fit.

    Attributes:
        title: the target's name in messages; empty for a target that accepts every adapter.
        place: a function that takes a layer's name and shape (d_out, d_in). The function returns the layer's
            `Place`, or a text that says why the target has no such layer.
        digest: the digest of the target's norm weights (`model_digest.of`), or None.
        required: the layers that the adapter must have.
        ties_head: whether the head of the model shares the embedding's weight.
        whole: the arrays of the layers that are or can be fully trained, as {layer's name: {parameter's name:
            array}}. A `Place` with the shape stands for an array that does not exist yet. None: the adapter
            may have any fully trained layers.
        rows: a function that takes a layer's name. If an adapter may replace rows of the layer's weight, the
            function returns the weight's shape. If the adapter may not, the function returns a text that says
            why not. If the target accepts all rows, the function returns None.
        require_kind: a function that raises UnsupportedError if the target cannot hold this kind of adapter.
            The arguments of the function are the adapter's source and task type, whether the adapter has
            DoRA, the adapter's fully trained layers, and the adapter's layers with trained tokens.
        task_type: PEFT's name for the model's task, or None.
    """

    title: str = ""
    place: Callable[[str, tuple[int, ...]], Place | str] = lambda layer, shape: Place()
    digest: str | None = None
    required: Collection[str] = ()
    whole: Mapping[str, Mapping[str, npt.NDArray[Any] | Place]] | None = None
    rows: Callable[[str], tuple[int, int] | str | None] = lambda layer: None
    ties_head: bool = False
    require_kind: Callable[[str, str | None, bool, Collection[str], Collection[str]], None] = (
        lambda source, task_type, has_dora, whole, tokens: None
    )
    task_type: str | None = None

    def place_of(
        self,
        layer: str,
        shape: tuple[int, ...],
        embedding: bool,
        use_dora: bool,
        kernel: tuple[int, ...] | None = None,
    ) -> Place:
        """Find the `Place` of an adapter's layer.

        Raises:
            FormatError: the target has no place for the layer, or the layer does not fit its place.
        """
        place = self.place(layer, shape)
        if isinstance(place, str):
            raise FormatError(f"{brief(layer)}: {place}")
        is_convolution = None if place.kernel is None else bool(place.kernel)
        if place.embedding not in (None, embedding) or is_convolution not in (None, bool(kernel)):
            wanted, found = kind(embedding, kernel), kind(bool(place.embedding), place.kernel)
            raise FormatError(f"{brief(layer)}: the adapter has {wanted}, but {place.title} is {found}")
        if place.kernel and place.kernel != kernel:
            raise FormatError(
                f"{brief(layer)}: the adapter is for kernels of shape {kernel}, but {place.title} has "
                f"kernels of shape {place.kernel}"
            )
        if place.shape not in (None, shape):
            raise FormatError(
                f"{brief(layer)}: the adapter is for a weight of shape {shape}, but {place.title} has shape "
                f"{place.shape}"
            )
        if place.use_dora not in (None, use_dora):
            raise FormatError(
                f"{brief(layer)}: use_dora is {use_dora} in the adapter and {place.use_dora} in the layer"
            )
        return place

    def check_rows(
        self, layer: str, ids: Collection[int], width: int, tokens: Collection[AddedToken] = ()
    ) -> None:
        """Raise FormatError if an adapter's trained rows of a layer do not fit the target's weight.

        Args:
            tokens: the adapter's new tokens. Without new tokens, a row beyond the end of the weight is an
                error.
        """
        shape = self.rows(layer)
        if isinstance(shape, str):
            raise FormatError(f"{brief(layer)}: {shape}")
        if shape is None:
            return
        if width != shape[1]:
            raise FormatError(
                f"{brief(layer)}: the adapter's trained rows have {width} values each, but the rows of "
                f"{self.title} have {shape[1]}"
            )
        beyond = sorted(id_ for id_ in ids if id_ >= shape[0])
        may_follow = _may_follow(shape[0], tokens)
        if not beyond or (may_follow and beyond == [*range(shape[0], shape[0] + len(beyond))]):
            return
        hint = ""
        if beyond[0] == shape[0] and not may_follow:
            hint = "; if tokens were added to the model, save its tokenizer in the directory of the adapter"
        raise FormatError(
            f"{brief(layer)}: the adapter trains token {beyond[-1]}, but the vocabulary of {self.title} "
            f"ends with token {shape[0] - 1}{hint}"
        )

    def check_whole(
        self,
        layer: str,
        parameter: str,
        shape: tuple[int, ...],
        tensor: str = "",
        tokens: Collection[AddedToken] = (),
    ) -> npt.DTypeLike:
        """Check a parameter of a fully trained layer; return the dtype to which its array is to be converted.

        `tokens` are the adapter's new tokens.

        Raises:
            FormatError: the array does not fit the target.
        """
        if self.whole is None:
            return np.float32
        live = self.whole.get(layer, {}).get(parameter)
        if live is None:
            raise FormatError(
                f"{brief(layer)}: {self.title} has no fully trained {parameter!r} in this layer"
            )
        stored = live.shape or ()
        is_longer = stored[1:] == shape[1:] and stored < shape
        if stored != shape and not (is_longer and _may_follow(stored[0], tokens)):
            name = brief(tensor or f"{layer}.{parameter}", 200)
            raise FormatError(f"tensor {name} has shape {shape}, expected {live.shape}")
        return live.dtype

    def check(self, adapter: AdapterContent, any_base: bool) -> None:
        """Raise FormatError if an adapter does not fit, belongs to another model, or has no layers."""
        self.require_kind(
            adapter.source, adapter.task_type, adapter.use_dora, adapter.modules_to_save, adapter.token_rows
        )
        problems = list[str]()
        for name, delta in adapter.items():
            with collecting(problems):
                self.place_of(name, delta.shape, delta.embedding, delta.use_dora, delta.kernel)
        for name, rows in adapter.token_rows.items():
            with collecting(problems):
                self.check_rows(name, rows.ids.tolist(), rows.values.shape[1], adapter.added_tokens)
        for name, parameters in adapter.modules_to_save.items():
            if not parameters:
                problems.append(
                    f"{brief(name)}: modules_to_save names this layer, but the file has no tensor for it"
                )
            for parameter, array in parameters.items():
                with collecting(problems):
                    self.check_whole(name, parameter, array.shape, tokens=adapter.added_tokens)
        self.require(adapter, problems, any_base)

    def require(self, adapter: AdapterContent, problems: list[str], any_base: bool) -> None:
        """Raise FormatError for `problems`, for an empty adapter, or for an adapter of another model."""
        base = adapter.base_model_name_or_path, adapter.base_digest
        if problems and not self.title:
            lines = "".join(f"\n  {problem}" for problem in problems)
            reasons = counted(len(problems), "reason")
            raise FormatError(f"{adapter.source}: the adapter cannot be used ({reasons}):{lines}")
        if problems:
            subject = model_digest.subject(*base, self.digest)
            if self.task_type not in CLASSIFIER_TASKS and (hint := classifier_hint(adapter.task_type)):
                subject = f"{hint}; {subject}"
            raise FormatError(f"{adapter.source}: {subject} does not fit {self.title} {in_places(problems)}")
        if not any_base and (refusal := model_digest.refusal(*base, self.digest)):
            raise FormatError(f"{adapter.source}: {refusal}")
        if not adapter and not adapter.modules_to_save:
            raise FormatError(f"{adapter.source}: the adapter holds no factors")


ANYTHING = Target()


def _may_follow(stored: int, tokens: Collection[AddedToken]) -> bool:
    """Whether a token of `tokens` needs a row after the `stored` rows that a weight has."""
    return any(token.id >= stored for token in tokens)


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Catch a FormatError that the `with` body raises, and add the error's message to `problems`."""
    try:
        yield
    except FormatError as error:
        problems.append(str(error))
