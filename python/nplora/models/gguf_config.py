"""Reads the metadata of a GGUF file, in llama.cpp's form, into a ModelConfig."""

from __future__ import annotations

from nplora.formats.errors import FormatError, brief
from nplora.formats.gguf import GgufFile
from nplora.models import families
from nplora.models.config import ModelConfig


def read(file: GgufFile) -> ModelConfig:
    """The configuration that a GGUF file's metadata and tensor names describe.

    Raises:
        UnsupportedError: nplora does not know the architecture, or its scaling of rotary positions.
        FormatError: an entry is missing, or has a wrong type or an impossible value; or the file is not a
            model.
    """
    kind = file.metadata.string("general.type", "model")
    if kind != "model":
        what = "; this is an adapter file, not a model" if kind == "adapter" else ""
        raise FormatError(f"{file.source}: general.type is {brief(kind)}, expected 'model'{what}")
    architecture = file.metadata.string("general.architecture")
    return families.by_architecture(file.source, architecture).read_metadata(file)
