"""What the conversion of an adapter needs to know of its base model: family, heads and, at best, shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora.formats import files, gguf, strict_json
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.gguf_names import ARCHITECTURES, is_permuted

CONFIG = "config.json"
MAX_CONFIG = 16 << 20
MAX_HEADS = 1 << 16


@dataclass(frozen=True)
class BaseModel:
    """A base model's facts.

    Attributes:
        source: the file that told them.
        architecture: GGUF's name for the model's family.
        heads, kv_heads: the number of heads of q, and of k and v.
        shapes: of its tensors, by GGUF's names; None where the file does not tell.
    """

    source: str
    architecture: str
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] | None

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
        path = Path(path, CONFIG)
    return _from_config(path) if Path(path).suffix == ".json" else _from_gguf(path)


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
    return _checked(BaseModel(file.source, architecture, heads, kv_heads, shapes))


def _from_config(path: StrPath) -> BaseModel:
    source = files.name(path)
    fields = strict_json.loads(bytes(files.read(path, MAX_CONFIG)), source)
    if not isinstance(fields, dict):
        raise FormatError(f"{source}: {brief(fields)}, expected an object")
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UnsupportedError(
            f"{source}: model_type is {brief(family)}, expected one of {', '.join(ARCHITECTURES)}"
        )
    heads = fields.get("num_attention_heads")
    kv_heads = fields.get("num_key_value_heads", heads)
    return _checked(BaseModel(source, ARCHITECTURES[family], _integer(heads), _integer(kv_heads), None))


def _integer(value: Any) -> int:
    return value if type(value) is int else 0


def _checked(model: BaseModel) -> BaseModel:
    for heads in (model.heads, model.kv_heads):
        if not 1 <= heads <= MAX_HEADS:
            raise FormatError(f"{model.source}: {heads} attention heads, expected 1 to {MAX_HEADS:,}")
    return model
