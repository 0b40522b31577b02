"""config.json, as transformers writes it: to a ModelConfig."""

from __future__ import annotations

from nplora.formats.config_json import read_fields
from nplora.formats.files import StrPath
from nplora.models import families
from nplora.models.config import ModelConfig


def read(path: StrPath) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        UnsupportedError: a family, activation, scaling or quantisation that is not known here.
        FormatError: a field is missing, of another type, or makes no sense. OSError: it cannot be read.
    """
    fields = read_fields(path)
    return families.by_model_type(fields.source, fields.string("model_type")).read_config(fields)
