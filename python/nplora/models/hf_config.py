"""Reads a config.json, as transformers writes it, into a ModelConfig."""

from __future__ import annotations

from nplora.formats.config_json import read_fields
from nplora.formats.errors import UnsupportedError
from nplora.formats.files import StrPath
from nplora.models import families
from nplora.models.config import ModelConfig


def read(path: StrPath) -> ModelConfig:
    """The configuration that a config.json describes.

    Raises:
        UnsupportedError: nplora does not know the family, activation, rotation scaling or quantisation.
        FormatError: a field is missing, or has a wrong type or an impossible value.
        OSError: the file cannot be read.
    """
    fields = read_fields(path)
    config = families.by_model_type(fields.source, fields.string("model_type")).read_config(fields)
    if not config.causal:
        raise UnsupportedError(
            f"{fields.source}: the model is not causal (a token also attends to later tokens); "
            "nplora.load_encoder reads such models (commands: embed, classify)"
        )
    return config
