"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), and the models built alike, SmolLM2 for one.

A block is x + attention(norm(x)), then h + mlp(norm(h)): RMSNorm, rotary positions, heads of keys and values
that groups of query heads share, and a SwiGLU. The other families are described by how they differ.
"""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.families.family import Family


class Llama(Family):
    model_type = "llama"
    architecture = "llama"

    def biases(self, fields: Fields) -> dict[str, bool]:
        attention = fields.boolean("attention_bias", False)
        return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": fields.boolean("mlp_bias", False)}
