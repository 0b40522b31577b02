"""What tells one family of decoders from another. Each has a file of its own: llama, mistral, ..."""

from __future__ import annotations

from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError, brief

NO_WINDOW = 0
_WINDOW = 4096  # where config.json does not say; null is none at all


class Family:
    """The base of the families: what config.json says of a block, by default that of Llama without biases.

    Attributes:
        model_type: Hugging Face's word for the family.
        architecture: GGUF's.
        head_dim: what it is where config.json does not say; None: hidden_size / heads.
        qk_norm: whether each head of q and k is normalised before it is rotated.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    head_dim: ClassVar[int | None] = None
    qk_norm: ClassVar[bool] = False

    def biases(self, fields: Fields) -> dict[str, bool]:
        """Which linear layers have a bias, by ModelConfig's names."""
        return {}

    def sliding_windows(self, fields: Fields, layers: int) -> tuple[int, ...]:
        """For each layer, how many tokens a query sees, itself included; NO_WINDOW: all before it."""
        return (NO_WINDOW,) * layers


def has_window(fields: Fields) -> bool:
    """Whether there is a sliding window, told or by default: null alone says that there is none."""
    return fields.integer_or_null("sliding_window", _WINDOW) is not None


def windows(fields: Fields, kinds: list[str]) -> tuple[int, ...]:
    """The window of each layer, by its kind: as given, unless `layer_types` tells otherwise."""
    if "layer_types" in fields:
        kinds = fields.strings("layer_types", len(kinds))
    sizes = {"full_attention": NO_WINDOW}
    window = fields.integer_or_null("sliding_window", _WINDOW)
    if window is not None:
        sizes["sliding_attention"] = require_window(fields.source, window)
    for kind in kinds:
        if kind not in sizes:
            known = ", ".join(map(repr, sizes))
            raise UnsupportedError(f"{fields.source}: a layer of type {brief(kind)}, expected one of {known}")
    return tuple(sizes[kind] for kind in kinds)


def require_window(source: str, window: int) -> int:
    """A sliding window that lets a token see itself."""
    if not 1 <= window < 1 << 31:
        raise FormatError(f"{source}: sliding_window is {window:,}, expected 1 to 2^31 - 1")
    return window
