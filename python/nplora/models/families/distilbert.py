"""DistilBERT (Sanh et al. 2019): BERT without token types, with other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families import config_fields
from nplora.models.families.encoder_family import EncoderFamily, Names
from nplora.models.families.head_spec import HeadSpec


class DistilBert(EncoderFamily):
    model_type = "distilbert"
    prefix = "distilbert"
    blocks = "transformer.layer"
    layers: ClassVar[Mapping[str, Names]] = {
        "self_attn.q_proj": ("attention.q_lin", ""),
        "self_attn.k_proj": ("attention.k_lin", ""),
        "self_attn.v_proj": ("attention.v_lin", ""),
        "self_attn.o_proj": ("attention.out_lin", ""),
        "mlp.up_proj": ("ffn.lin1", ""),
        "mlp.down_proj": ("ffn.lin2", ""),
    }
    norms: ClassVar[Mapping[str, Names]] = {
        "attention_norm": ("sa_layer_norm", ""),
        "mlp_norm": ("output_layer_norm", ""),
    }
    outside: ClassVar[Mapping[str, Names]] = {
        "embed_tokens": ("embeddings.word_embeddings", ""),
        "embed_positions": ("embeddings.position_embeddings", ""),
        "embed_norm": ("embeddings.LayerNorm", ""),
    }

    def read_config(self, fields: Fields) -> EncoderConfig:
        config_fields.require_readable(fields)
        layers, rows = fields.integer("n_layers"), fields.integer("max_position_embeddings", 512)
        return EncoderConfig(
            source=fields.source,
            model_type=self.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("dim"),
            intermediate_size=fields.integer("hidden_dim"),
            num_hidden_layers=layers,
            num_attention_heads=config_fields.heads(fields, "n_heads"),
            layer_norm_eps=1e-12,
            max_position_embeddings=rows,
            hidden_act=config_fields.activation(fields, "activation", "gelu"),
            sliding_windows=config_fields.no_windows(fields, layers),
            position_rows=rows,
        )

    def head(self, config: EncoderConfig) -> HeadSpec:
        return HeadSpec("cls", "classifier", ("pre_classifier", "classifier"), "pre_classifier", "relu")
