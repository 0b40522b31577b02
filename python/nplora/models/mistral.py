"""Mistral (Jiang et al. 2023): Llama in which a query may see a window of the last tokens only."""

from __future__ import annotations

from nplora.models.family import Family, windows
from nplora.models.fields import Fields


class Mistral(Family):
    model_type = "mistral"
    architecture = "llama"  # GGUF tells the two apart by the window alone
    key_value_heads = 8

    def sliding_windows(self, fields: Fields, layers: int) -> tuple[int, ...]:
        kind = "sliding_attention" if "sliding_window" in fields else "full_attention"
        return windows(fields, [kind] * layers)
