"""warn_user: the warning names the first line outside nplora."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from nplora.runtime.user_warning import warn_user


def called_in(module: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A function of a module of this name, which makes the call."""
    namespace: dict[str, Any] = {"__name__": module, "call": call}
    exec(compile("def function():\n    call()\n", f"<{module}>", "exec"), namespace)
    function: Callable[[], Any] = namespace["function"]
    return function


def where(call: Callable[[], Any]) -> str:
    with pytest.warns(UserWarning, match="^something$") as caught:
        call()
    [warning] = caught
    return warning.filename


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_line_that_calls_nplora_is_named_however_deep_the_warning_arises(depth: int) -> None:
    call: Callable[[], Any] = functools.partial(warn_user, "something")
    for number in range(depth):
        call = called_in(f"nplora.trainer.module{number}" if number else "nplora", call)
    assert where(call) == __file__


def test_a_package_with_a_similar_name_is_outside() -> None:
    inner = called_in("nplora.trainer", functools.partial(warn_user, "something"))
    assert where(called_in("nplora_of_a_user", inner)) == "<nplora_of_a_user>"
