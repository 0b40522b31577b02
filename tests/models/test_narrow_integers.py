"""NumPy's default integer has 32 bits on some systems. The core takes int64 only, so code must ask for it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from small_llama import save_small_llama

# Functions that choose the type of their result, if they are called without `dtype`.
MAKING = ("arange", "full", "array", "asarray", "fromiter", "cumsum")
PLACES = ("argsort", "flatnonzero", "searchsorted")


def narrowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is on such a system."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        made = function(*arguments, **options)
        types = [a for a in (*arguments[1:], *options.values()) if isinstance(a, type | np.dtype)]
        is_wide = any(isinstance(a, np.ndarray) and a.dtype == np.int64 for a in arguments)
        is_place = function.__name__ in PLACES
        if made.dtype == np.int64 and not types and (is_place or not is_wide):
            return made.astype(np.int32)
        return made

    return call


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MAKING, *PLACES):
        monkeypatch.setattr(np, name, narrowed(getattr(np, name)))


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_run_where_the_default_integer_has_32_bits(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    assert np.arange(2).dtype == np.int32
    assert np.asarray([1]).dtype == np.int32
    model = save_small_llama(tmp_path / "model.gguf")
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(24)]
    done = nplora.finetune(
        model, rows, tmp_path / "one", rank=2, steps=2, batch_examples=2, valid_split=0.4, seed=0
    )
    assert done.loss_after is not None
    pairs = [{"prompt": "a", "chosen": "bc", "rejected": "d"}] * 4
    nplora.finetune(model, pairs, tmp_path / "two", objective="dpo", rank=2, steps=2)
    lm = nplora.load_model(model)
    lm.generate("ab", max_new_tokens=4)
    lm.forward([[1, 2, 3], [3, 2, 1]])
