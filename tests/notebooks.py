"""A process that takes itself for the kernel of a notebook."""

import contextlib
import sys
import types
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def notebook(monkeypatch: pytest.MonkeyPatch, shell: str = "ZMQInteractiveShell") -> Iterator[None]:
    """Inside, IPython is loaded and has a shell of a subclass of this class, as Colab's has."""
    module = types.ModuleType("IPython")
    kind = type("Shell", (type(shell, (), {}),), {})
    module.get_ipython = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "IPython", module)
        yield
