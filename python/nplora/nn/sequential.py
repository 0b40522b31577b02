"""Sequential: modules that are applied one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import Gradient, Module, Saved, name_error, pair

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class SequentialSaved(Saved):
    """The saved values of each module, in order."""

    items: tuple[Any, ...]


class Sequential(Module):
    """Apply modules in order. The modules are named "0", "1", ...

        >>> import nplora, numpy as np
        >>> W1, W2 = np.ones((32, 16)), np.ones((3, 32))
        >>> model = nplora.Sequential(nplora.LoRALinear(W1, rank=4), nplora.ReLU(), nplora.Linear(W2))
        >>> model
        Sequential: 192 of 800 values trained
          0: LoRALinear((32, 16), rank=4, alpha=16, dtype='float32', num_trainable=192)
          1: ReLU()
          2: Linear((3, 32), dtype='float32', trainable=False)
        >>> model(np.ones((5, 16))).shape, model[0].rank
        ((5, 3), 4)

    Args:
        modules: any number of modules. A module may be given twice; both places then share its parameters.
    Raises:
        TypeError: an argument is not a Module.
    """

    def __init__(self, *modules: Module) -> None:
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"Sequential: argument {i} is a {type(module).__name__}, expected a Module")
        self.modules = list(modules)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        for i, module in enumerate(self.modules):
            yield str(i), module

    def forward(self, x: Any) -> tuple[Array, SequentialSaved]:
        """Return the output of the last module, and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(2), rank=1), nplora.ReLU())
            >>> y, saved = net.forward([-1, 2])
            >>> y
            array([0., 2.], dtype=float32)

        Raises:
            ValueError: a module raised ValueError. The message begins with the module's dotted name.
        """
        items: list[Any] = []
        try:
            for module in self.modules:
                x, saved = pair(module, module.forward(x))
                items.append(saved)
        except ValueError as error:
            name_error(error, self, self.modules[len(items)])
            raise
        return np.asarray(x), SequentialSaved(tuple(items))

    def backward(self, dy: Array, saved: SequentialSaved, need_dx: bool = True) -> Gradient:
        """Return dx. Return None if need_dx is False, or if the input has no gradient, such as token ids.

            >>> import nplora, numpy as np
            >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(2), rank=1), nplora.ReLU())
            >>> y, saved = net.forward([-1, 2])
            >>> net.backward(np.ones(2, np.float32), saved)
            array([0., 1.], dtype=float32)

        Raises:
            ValueError: as in `forward`, or `saved` is from a pass through more or fewer modules.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: a module other than the first one returned no gradient of its input.
        """
        _check.saved("Sequential.backward", saved, SequentialSaved)
        if len(saved.items) != len(self.modules):
            raise ValueError(
                f"Sequential.backward: saved is from a pass through {len(saved.items)} modules, "
                f"expected {len(self.modules)}"
            )
        gradient: Array | None = dy
        for i, module in reversed(list(enumerate(self.modules))):
            if gradient is None:
                raise RuntimeError(f"Sequential.backward: module {i + 1} returned no gradient of its input")
            try:
                gradient = module.backward(gradient, saved.items[i], need_dx or i > 0)
            except ValueError as error:
                name_error(error, self, module)
                raise
        return gradient

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Module | Sequential:
        """Return the module at an index. For a slice, return a Sequential of the modules themselves."""
        return Sequential(*self.modules[index]) if isinstance(index, slice) else self.modules[index]
