"""Activated LoRA (aLoRA): reads the invocation tokens, and refuses options that aLoRA does not support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from nplora import _check
from nplora.nn.principal import PRINCIPAL_INITS
from nplora.tokenizer import Tokenizer


class _Model(Protocol):
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def vocab_size(self) -> int: ...


def invocation_tokens(lm: _Model, op: str, invocation: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """The ids of the invocation tokens.

    If `invocation` is a text, it may contain the names of special tokens, such as "<|im_start|>".

    Raises:
        ValueError: there are no tokens, or an id is not in the vocabulary.
        TypeError: `invocation` is neither a text nor a list of integers.
    """
    if invocation is None:
        return None
    if isinstance(invocation, str):
        ids = lm.tokenizer.encode(invocation, parse_special=True)
    else:
        array = _check.integers(op, "invocation", np.asarray(invocation))
        ids = _check.in_range(op, "invocation", array.reshape(-1), lm.vocab_size).tolist()
    if not ids:
        raise ValueError(f"{op}: invocation is {invocation!r}, expected at least one token")
    return tuple(ids)


def require_plain(
    op: str,
    names: Iterable[str],
    use_dora: bool,
    dropout: float,
    init: str,
    tokens: object,
    modules: object,
    added: object,
) -> None:
    """Raise ValueError if an option cannot be combined with activated LoRA."""
    outside = [name for name in names if not name.startswith("model.layers.")]
    refused = {
        f"the target {outside[0]}" if outside else "": outside,
        "use_dora": use_dora,
        "dropout": dropout,
        f"init={init!r}": init in PRINCIPAL_INITS,
        "trainable_tokens": tokens,
        "modules_to_save": modules,
        "add_tokens": added,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(f"{op}: activated LoRA (invocation) cannot be combined with {what}")
