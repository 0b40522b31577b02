"""Facts about a base model that are needed to convert an adapter, such as the number of attention heads."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nplora.formats import files, gguf, gguf_adapter, model_directory
from nplora.formats.config_json import read_fields
from nplora.formats.errors import FormatError, NotFetchedError
from nplora.formats.files import StrPath
from nplora.formats.gguf import GgufFile
from nplora.formats.model_directory import CONFIG
from nplora.models import families, model_digest
from nplora.models.config import MAX_HEADS
from nplora.models.families import Family, gguf_fields
from nplora.models.families.gguf_fields import ArchitectureMetadata


@dataclass(frozen=True)
class BaseModel:
    """Facts about a base model.

    Attributes:
        source: the file that the facts were read from.
        family: the description of the model's family.
        heads, kv_heads: the number of query heads, and the number of key/value heads.
        shapes: a dict from the GGUF name of each tensor to the tensor's shape, or None if the facts come from
            a config.json.
        digest: a hash of the norm weights (see `models.model_digest`), or None if it is not known.
    """

    source: str
    family: Family
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] | None
    digest: str | None = None

    def permuted_heads(self, layer: str) -> int:
        """The number of heads in the layer if GGUF reorders the rows of the layer's weight; 0 if not.

        Args:
            layer: the layer's name in Hugging Face's files.
        """
        return self.family.permuted_heads(layer, self.heads, self.kv_heads)


def read(path: StrPath, any_base: bool = False) -> BaseModel:
    """Read the facts from a GGUF model, a config.json, or a directory with a config.json.

    Args:
        any_base: whether the caller accepts any base model. If so, there is no warning about a missing
            digest.
    Raises:
        UnsupportedError: nplora does not know the model's family. The other errors are those of `digest_of`.
    """
    config = _config_of(path)
    if config is None:
        return _from_gguf(path)
    model = _from_config(config)
    return dataclasses.replace(model, digest=_digest_beside(config, model.family, any_base))


def digest_of(path: StrPath, any_base: bool = False) -> str | None:
    """Read only the digest of a model. nplora need not know the model's family.

    For a directory without weights, or with weights in a pickle, the digest is None.

    Args:
        any_base: whether the caller accepts any base model. If so, there is no warning about a missing
            digest.
    Raises:
        FormatError: the path is not a model, or a file breaks its format.
        OSError: a file cannot be read.
    Warns:
        UserWarning: `any_base` is False, and a weights file is missing from the directory or is only a Git
            LFS pointer.
    """
    config = _config_of(path)
    if config is None:
        return model_digest.of_tensors(_open_gguf(path)[0], families.FAMILIES[0])
    family = families.find(read_fields(config).string("model_type")) or families.FAMILIES[0]
    return _digest_beside(config, family, any_base)


def _config_of(path: StrPath) -> Path | None:
    """The config.json that a path refers to; None if the path refers to a GGUF file."""
    model_directory.require_no_hub_name(path)
    if Path(path).is_dir():
        return Path(path, CONFIG)
    return Path(path) if files.suffix(path) == ".json" else None


def _digest_beside(config: Path, family: Family, any_base: bool) -> str | None:
    """The digest of the weights in the directory of a config.json, or None if there are no weights."""
    if config.name != CONFIG or model_directory.weights_of(config.parent) is None:
        return None
    try:
        tensors = model_directory.open_tensors(
            config.parent, wanted=lambda name: model_digest.is_norm(family.gguf_tensor(name) or "")
        )
        return model_digest.of_tensors(tensors, family)
    except (NotFetchedError, FileNotFoundError):
        words = "weights are missing, so nplora cannot check that the adapter belongs to this model"
        if not any_base:
            warnings.warn(f"{files.name(config.parent)}: {words}", stacklevel=4)
        return None


def _open_gguf(path: StrPath) -> tuple[GgufFile, str]:
    """Open a GGUF model. Returns the file and the name of its architecture."""
    file = gguf.open(path)
    if gguf_adapter.is_adapter(file):
        raise FormatError(f"{file.source}: the file is an adapter, expected a model")
    return file, file.metadata.string("general.architecture")


def _from_gguf(path: StrPath) -> BaseModel:
    file, architecture = _open_gguf(path)
    family = families.by_architecture(file.source, architecture)
    data = ArchitectureMetadata(file, architecture)
    heads = data.integer("attention.head_count")
    kv_heads = gguf_fields.heads_of_keys(data, heads)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    digest = model_digest.of_tensors(file, family)
    return _checked(BaseModel(file.source, family, heads, kv_heads, shapes, digest))


def _from_config(path: Path) -> BaseModel:
    fields = read_fields(path)
    family = families.by_model_type(fields.source, fields.string("model_type"))
    return _checked(BaseModel(fields.source, family, *family.attention_heads(fields), None))


def _checked(model: BaseModel) -> BaseModel:
    for heads in (model.heads, model.kv_heads):
        if not 1 <= heads <= MAX_HEADS:
            raise FormatError(f"{model.source}: {heads} attention heads, expected 1 to {MAX_HEADS:,}")
    return model
