"""The metadata of a GGUF file, as llama.cpp has them: to a ModelConfig."""

from __future__ import annotations

from nplora.formats.errors import FormatError, brief
from nplora.formats.gguf import GgufFile
from nplora.models import families
from nplora.models.config import ModelConfig


def read(file: GgufFile) -> ModelConfig:
    """The model that the metadata, and the names of tensors, describe.

    Raises:
        UnsupportedError: an architecture or scaling that is not known here.
        FormatError: an entry is missing, of another type, or makes no sense; or the file is no model.
    """
    kind = file.metadata.string("general.type", "model")
    if kind != "model":
        raise FormatError(f"{file.source}: general.type is {brief(kind)}, expected 'model'")
    architecture = file.metadata.string("general.architecture")
    return families.by_architecture(file.source, architecture).read_metadata(file)
