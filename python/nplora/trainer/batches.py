"""Batches: rows of arrays, or the items of a user's iterable. Reading can start at any batch of an epoch."""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.trainer.fingerprint import fingerprint

Array = npt.NDArray[Any]
Batch = tuple[Any, Any]


@runtime_checkable
class Batches(Protocol):
    """A source of batches (x, y), read epoch by epoch. `Trainer.fit` accepts such a source as `x`.

    >>> import nplora, numpy as np
    >>> class Noise:
    ...     "Ten random batches an epoch. Each batch is drawn when it is needed."
    ...     length = 10
    ...     def epoch(self, epoch, skip):
    ...         for number in range(skip, self.length):
    ...             x = np.random.default_rng([epoch, number]).normal(size=(8, 4))
    ...             yield x, 2 * x
    ...     def identity(self):
    ...         return {"noise": 8}
    >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=4, rng=0), loss="mse")
    >>> len(trainer.fit(Noise(), epochs=2).steps)
    20
    """

    @property
    def length(self) -> int | None:
        """The number of batches in an epoch; None if unknown."""

    def epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of epoch number `epoch` (from 0), without the first `skip` batches."""

    def identity(self) -> dict[str, Any]:
        """The batches' settings that must be the same in a resumed run, as values for JSON."""


def shuffled(rows: int, seed: int, epoch: int) -> Array:
    """A random order of rows, which depends only on the seed and the number of the epoch.

    Each row gets a random integer from the bit generator PCG64, and the rows are sorted by their integers.
    PCG64 gives the same integers in every version of NumPy, but the results of `Generator.permutation` may
    change.

        >>> from nplora.trainer.batches import shuffled
        >>> sorted(shuffled(3, seed=0, epoch=1).tolist())
        [0, 1, 2]
    """
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.argsort(stream.random_raw(rows), kind="stable")


class ArrayBatches:
    """Batches of `batch_size` rows from two arrays; the last batch of an epoch may be smaller.

    The order of the rows in an epoch depends only on the seed and the number of the epoch. So a resumed run
    finds its position in the data without reading the earlier batches.

    Args:
        op: the name of the calling function, for error messages.
        x, y: arrays of the same length, which is at least 1. The arrays are not copied.
        names: the names of x and y in error messages.
    Raises:
        ValueError: x and y have different lengths, have no rows, or hold Python objects.
    """

    def __init__(
        self,
        op: str,
        x: npt.ArrayLike,
        y: npt.ArrayLike,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        names: tuple[str, str] = ("x", "y"),
    ) -> None:
        x_name, y_name = names
        self.x, self.y = np.asarray(x), np.asarray(y)
        for name, array in zip(names, (self.x, self.y), strict=True):
            if array.ndim == 0 or array.dtype.kind == "O":
                raise ValueError(
                    f"{op}: {name} has dtype {array.dtype} and {array.ndim} axes, expected rows of numbers"
                )
        if len(self.x) != len(self.y):
            raise ValueError(f"{op}: {x_name} has {len(self.x)} rows, {y_name} has {len(self.y)}")
        if not len(self.x):
            raise ValueError(f"{op}: {x_name} and {y_name} have no rows")
        self.batch_size = _check.integer(op, "batch_size", batch_size, least=1)
        self.shuffle, self.seed = bool(shuffle), seed

    @property
    def length(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        order = shuffled(len(self.x), self.seed, epoch) if self.shuffle else None
        for start in range(skip * self.batch_size, len(self.x), self.batch_size):
            window = slice(start, start + self.batch_size)
            rows = window if order is None else order[window]
            yield self.x[rows], self.y[rows]

    def identity(self) -> dict[str, Any]:
        return {
            "x": fingerprint(self.x),
            "y": fingerprint(self.y),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def log_summary(self) -> dict[str, Any]:
        """The description of these batches for the log of a run."""
        return {"rows": len(self.x), "batch_size": self.batch_size}


class IterableBatches:
    """The batches (x, y) of a user's iterable, which is iterated over once in each epoch.

    A resumed run iterates from the beginning, and skips the batches that were used before the run stopped.

    Args:
        batches: any iterable. A generator can be read only once, so it provides the batches of only one
            epoch.
    Attributes:
        once: whether `batches` can be read only once.
    Raises:
        TypeError: `batches` is not an iterable.
    """

    def __init__(self, op: str, batches: Iterable[Any]) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{op}: got a {type(batches).__name__}, expected arrays x and y, or an iterable of (x, y)"
            )
        self.op, self.batches = op, batches
        self.once = isinstance(batches, Iterator)

    @property
    def length(self) -> int | None:
        return len(self.batches) if isinstance(self.batches, Sized) else None

    def epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        iterator = iter(self.batches)
        skipped = sum(1 for _ in itertools.islice(iterator, skip))
        if skipped < skip:
            raise ValueError(
                f"{self.op}: the iterable has only {skipped} batches, "
                f"but the run to resume has already used {skip} batches"
            )
        empty = not skip
        for number, batch in enumerate(iterator, skip + 1):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                kind = (
                    f"{type(batch).__name__} of {len(batch)}"
                    if isinstance(batch, Sized)
                    else type(batch).__name__
                )
                raise TypeError(f"{self.op}: batch {number} is a {kind}, expected (x, y)")
            empty = False
            yield batch[0], batch[1]
        if empty:
            kind = type(self.batches).__name__
            which = f"epoch {epoch + 1} has no batch" if epoch else "the iterable has no batch"
            raise ValueError(
                f"{self.op}: {which}; a generator can be read only once. Instead of the {kind}, "
                "pass a list, or an object whose __iter__ starts from the beginning"
            )

    def identity(self) -> dict[str, Any]:
        return {"batches": self.length}


def batches_of(op: str, x: Any, y: Any, batch_size: int, shuffle: bool = False, seed: int = 0) -> Batches:
    """Make the batches of `fit` and `evaluate` from arrays x and y, or from an iterable x if y is None."""
    if y is not None:
        return ArrayBatches(op, x, y, batch_size, shuffle, seed)
    if isinstance(x, Batches):
        return x
    if isinstance(x, np.ndarray):
        raise ValueError(f"{op}: x is an array of shape {x.shape}, and y is missing")
    return IterableBatches(op, x)


def validation_of(op: str, validation: Any, batch_size: int, several: bool) -> Batches:
    """Make the batches of the validation data from a tuple of two arrays, or from an iterable of batches.

    Args:
        several: whether the data will be read more than once. If so, a generator is refused.
    """
    if isinstance(validation, Batches):
        return validation
    op, wanted = f"{op}: validation", "expected a tuple (x, y) of arrays or an iterable of batches (x, y)"
    if isinstance(validation, tuple) and len(validation) == 2:
        x, y = validation
        return ArrayBatches(op, x, y, batch_size, names=("validation[0]", "validation[1]"))
    if isinstance(validation, np.ndarray):
        raise TypeError(f"{op} is an array of shape {validation.shape} and has no targets, {wanted}")
    if isinstance(validation, Sequence) and any(isinstance(part, np.ndarray) for part in validation):
        raise TypeError(
            f"{op} is a {type(validation).__name__} of {len(validation)} that contains an array, {wanted}"
        )
    if not isinstance(validation, Iterable):
        raise TypeError(f"{op} is a {type(validation).__name__}, {wanted}")
    batches = IterableBatches(op, validation)
    if several and batches.once:
        raise ValueError(
            f"{op} is a {type(validation).__name__}, which can be read only once, "
            "but the validation data are read after every epoch: pass a list"
        )
    return batches
