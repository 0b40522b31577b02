"""What the conversion of an adapter needs to know of its base model: family, heads and, at best, shapes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nplora.formats import gguf, model_digest, model_directory
from nplora.formats.config_json import attention_heads, read_fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.gguf_names import ARCHITECTURES, is_permuted
from nplora.formats.model_directory import CONFIG

MAX_HEADS = 1 << 16


@dataclass(frozen=True)
class BaseModel:
    """A base model's facts.

    Attributes:
        source: the file that told them.
        architecture: GGUF's name for the model's family.
        heads, kv_heads: the number of heads of q, and of k and v.
        shapes: of its tensors, by GGUF's names; None where the file does not tell.
        digest: `model_digest.of` its norms; None where the file has none, or it is not known.
    """

    source: str
    architecture: str
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] | None
    digest: str | None = None

    def permuted_heads(self, name: str) -> int | None:
        """The heads by which GGUF permutes the rows of a layer of this name in GGUF; None if it does not."""
        if not is_permuted(self.architecture, name):
            return None
        return self.heads if name.endswith("attn_q") else self.kv_heads


def read(path: StrPath) -> BaseModel:
    """The facts from a model's GGUF file, its config.json, or the directory with that.

    Raises:
        UnsupportedError: a family whose layers are not known here. FormatError: the file breaks its format.
        OSError: it cannot be read.
    """
    if Path(path).is_dir():
        return dataclasses.replace(_from_config(Path(path, CONFIG)), digest=digest(path))
    return _from_config(path) if Path(path).suffix == ".json" else _from_gguf(path)


def digest(path: StrPath) -> str | None:
    """`BaseModel.digest` alone, of a model of any family.

    A directory needs no weights, and they may be a pickle, or Git LFS's text in their place: not known, then.

    Raises:
        FormatError: a GGUF file breaks its format. OSError: it cannot be read.
    """
    if Path(path).is_dir():
        try:
            return model_digest.of_tensors(model_directory.open_tensors(path))
        except (FormatError, FileNotFoundError):
            return None
    return None if Path(path).suffix == ".json" else model_digest.of_tensors(gguf.open(path))


def _from_gguf(path: StrPath) -> BaseModel:
    file = gguf.open(path)
    architecture = file.metadata.string("general.architecture")
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UnsupportedError(
            f"{file.source}: general.architecture is {brief(architecture)}, expected one of {known}"
        )
    heads = file.metadata.integer(f"{architecture}.attention.head_count")
    kv_heads = file.metadata.integer(f"{architecture}.attention.head_count_kv", heads)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    told = model_digest.of_tensors(file)
    return _checked(BaseModel(file.source, architecture, heads, kv_heads, shapes, told))


def _from_config(path: StrPath) -> BaseModel:
    fields = read_fields(path)
    family = fields.string("model_type")
    if family not in ARCHITECTURES:
        raise UnsupportedError(
            f"{fields.source}: model_type is {brief(family)}, expected one of {', '.join(ARCHITECTURES)}"
        )
    return _checked(BaseModel(fields.source, ARCHITECTURES[family], *attention_heads(fields), None))


def _checked(model: BaseModel) -> BaseModel:
    for heads in (model.heads, model.kv_heads):
        if not 1 <= heads <= MAX_HEADS:
            raise FormatError(f"{model.source}: {heads} attention heads, expected 1 to {MAX_HEADS:,}")
    return model
