"""What an adapter is put on or written for, and the one check of whether it fits."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nplora.adapters.adapter import Adapter
from nplora.formats import model_digest
from nplora.formats.errors import FormatError, brief, counted, in_places

BaseNames: TypeAlias = tuple[str | None, str | None]  # the name and the digest of an adapter's base model


@dataclass(frozen=True)
class Place:
    """The weight that a layer's update is for. None in an attribute: not known, and anything fits.

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
        title: how messages name it; empty where anything fits.
        place: the place of a layer's update (d_out, d_in) by its name, or the reason why there is none.
        digest: `model_digest.of` its norms, or None.
        required: layers that the adapter must have.
        whole: live arrays of the layers that are trained whole, by layer and parameter; None: any are taken.
    """

    title: str = ""
    place: Callable[[str, tuple[int, ...]], Place | str] = lambda layer, shape: Place()
    digest: str | None = None
    required: Collection[str] = ()
    whole: Mapping[str, Mapping[str, npt.NDArray[Any]]] | None = None

    def place_of(self, layer: str, shape: tuple[int, ...], embedding: bool, use_dora: bool) -> Place:
        """Where an update belongs.

        Raises:
            FormatError: it does not fit.
        """
        place = self.place(layer, shape)
        if isinstance(place, str):
            raise FormatError(f"{brief(layer)}: {place}")
        if place.embedding not in (None, embedding):
            kinds = ("an embedding", "a linear layer")
            wanted, found = kinds if embedding else kinds[::-1]
            raise FormatError(f"{brief(layer)}: for {wanted}, and {place.title} is {found}")
        if place.shape not in (None, shape):
            raise FormatError(f"{brief(layer)}: for a weight {shape}, and {place.title} is {place.shape}")
        if place.use_dora not in (None, use_dora):
            raise FormatError(
                f"{brief(layer)}: use_dora is {use_dora} in the adapter and {place.use_dora} in the layer"
            )
        return place

    def missing(self, layers: Collection[str]) -> list[str]:
        """A problem for each layer that should be among these."""
        return [
            f"{brief(name)}: the adapter has no such layer" for name in self.required if name not in layers
        ]

    def check(self, adapter: Adapter, any_base: bool) -> None:
        """Raise FormatError for an adapter that does not fit, is of another model, or has no layers."""
        problems = list[str]()
        for name, delta in adapter.items():
            with collecting(problems):
                self.place_of(name, delta.shape, delta.embedding, delta.use_dora)
        self.require(adapter.source, adapter.base, problems, adapter, any_base)

    def require(
        self, source: str, base: BaseNames, problems: list[str], layers: Collection[str], any_base: bool
    ) -> None:
        """As `check`, of an adapter's source, base, problems and layers."""
        if problems and not self.title:
            lines = "".join(f"\n  {problem}" for problem in problems)
            reasons = counted(len(problems), "reason")
            raise FormatError(f"{source}: the adapter cannot be used, for {reasons}:{lines}")
        if problems:
            subject = model_digest.subject(*base, self.digest)
            raise FormatError(f"{source}: {subject} does not fit {self.title} {in_places(problems)}")
        if not any_base and (refusal := model_digest.refusal(*base, self.digest)):
            raise FormatError(f"{source}: {refusal}")
        if not layers:
            raise FormatError(f"{source}: the adapter holds no factors")


ANYTHING = Target()


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Continue after what does not fit, so that all of it can be listed."""
    try:
        yield
    except FormatError as error:
        problems.append(str(error))
