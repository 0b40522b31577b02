"""Mistral (Jiang et al. 2023): Llama in which a query may see a window of the last tokens only."""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.families.family import Family, has_window, windows


class Mistral(Family):
    model_type = "mistral"
    architecture = "llama"  # GGUF tells the two apart by the window alone

    def sliding_windows(self, fields: Fields, layers: int) -> tuple[int, ...]:
        kind = "sliding_attention" if has_window(fields) else "full_attention"
        return windows(fields, [kind] * layers)
