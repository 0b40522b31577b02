"""What an adapter is put on or written for, and the one check of whether it fits."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.adapters.content import AdapterContent
from nplora.formats.errors import FormatError, brief, counted, in_places
from nplora.models import model_digest

_KINDS = ("a linear layer", "an embedding")


@dataclass(frozen=True)
class Place:
    """The weight that a layer's update is for. Anything fits an attribute that is None.

    Attributes:
        title: how messages name the weight.
        shape: (d_out, d_in).
        embedding: whether it is a table of rows.
        use_dora: whether its update has magnitudes.
        dtype: of the factors.
    """

    title: str = ""
    shape: tuple[int, ...] | None = None
    embedding: bool | None = None
    use_dora: bool | None = None
    dtype: npt.DTypeLike = np.float32


@dataclass(frozen=True)
class Target:
    """What adapters are to fit.

    Attributes:
        title: how messages name it; empty if anything fits.
        place: the place of a layer's update (d_out, d_in) by its name, or the reason why there is none.
        digest: `model_digest.of` its norms, or None.
        required: layers that the adapter must have.
        whole: live arrays of the layers that are trained whole, by layer and parameter; None: any are taken.
        require_kind: raises UnsupportedError for an adapter of this source that the target cannot hold, by
            whether it has DoRA and by its layers that are trained whole.
    """

    title: str = ""
    place: Callable[[str, tuple[int, ...]], Place | str] = lambda layer, shape: Place()
    digest: str | None = None
    required: Collection[str] = ()
    whole: Mapping[str, Mapping[str, npt.NDArray[Any]]] | None = None
    require_kind: Callable[[str, bool, Collection[str]], None] = lambda source, has_dora, whole: None

    def place_of(self, layer: str, shape: tuple[int, ...], embedding: bool, use_dora: bool) -> Place:
        """The place of an update. Raises FormatError if there is none that it fits."""
        place = self.place(layer, shape)
        if isinstance(place, str):
            raise FormatError(f"{brief(layer)}: {place}")
        if place.embedding not in (None, embedding):
            wanted, found = _KINDS[embedding], _KINDS[not embedding]
            raise FormatError(f"{brief(layer)}: for {wanted}, and {place.title} is {found}")
        if place.shape not in (None, shape):
            raise FormatError(f"{brief(layer)}: for a weight {shape}, and {place.title} is {place.shape}")
        if place.use_dora not in (None, use_dora):
            raise FormatError(
                f"{brief(layer)}: use_dora is {use_dora} in the adapter and {place.use_dora} in the layer"
            )
        return place

    def check(self, adapter: AdapterContent, any_base: bool) -> None:
        """Raise FormatError for an adapter that does not fit, is of another model, or has no layers."""
        self.require_kind(adapter.source, adapter.use_dora, adapter.modules_to_save)
        problems = list[str]()
        for name, delta in adapter.items():
            with collecting(problems):
                self.place_of(name, delta.shape, delta.embedding, delta.use_dora)
        self.require(adapter, problems, any_base)

    def require(self, adapter: AdapterContent, problems: list[str], any_base: bool) -> None:
        """As `check`, with the problems that were found while the adapter was read."""
        base = adapter.base_model_name_or_path, adapter.base_digest
        if problems and not self.title:
            lines = "".join(f"\n  {problem}" for problem in problems)
            reasons = counted(len(problems), "reason")
            raise FormatError(f"{adapter.source}: the adapter cannot be used, for {reasons}:{lines}")
        if problems:
            subject = model_digest.subject(*base, self.digest)
            raise FormatError(f"{adapter.source}: {subject} does not fit {self.title} {in_places(problems)}")
        if not any_base and (refusal := model_digest.refusal(*base, self.digest)):
            raise FormatError(f"{adapter.source}: {refusal}")
        if not adapter and not adapter.modules_to_save:
            raise FormatError(f"{adapter.source}: the adapter holds no factors")


ANYTHING = Target()


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Continue after what does not fit, so that all of it can be listed."""
    try:
        yield
    except FormatError as error:
        problems.append(str(error))
