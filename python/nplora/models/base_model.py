"""What the conversion of an adapter needs to know of its base model: family, heads and, at best, shapes."""

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
    """A base model's facts.

    Attributes:
        source: the file that they were read from.
        family: the description of the model's family.
        heads, kv_heads: the number of heads of q, and of k and v.
        shapes: of its tensors, by GGUF's names; None where the file does not say them.
        digest: `model_digest.of` its norms; None where the file has none, or it is not known.
    """

    source: str
    family: Family
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] | None
    digest: str | None = None

    def permuted_heads(self, layer: str) -> int:
        """By how many heads GGUF has the rows of a layer, by Hugging Face's name, in another order, or 0."""
        return self.family.permuted_heads(layer, self.heads, self.kv_heads)


def read(path: StrPath, any_base: bool = False) -> BaseModel:
    """The facts from a model's GGUF file, its config.json, or the directory with that.

    Args:
        any_base: as in `digest_of`.
    Raises:
        UnsupportedError: a family whose layers are not known here. The rest as `digest_of`.
    """
    config = _config_of(path)
    if config is None:
        return _from_gguf(path)
    model = _from_config(config)
    return dataclasses.replace(model, digest=_digest_beside(config, model.family, any_base))


def digest_of(path: StrPath, any_base: bool = False) -> str | None:
    """`BaseModel.digest` alone, of a model of any family.

    A directory needs no weights, and they may be a pickle: not known, then.

    Args:
        any_base: nobody asks whether an adapter is of this model.
    Raises:
        FormatError: it is no model, or a file breaks its format. OSError: a file cannot be read.
    Warns:
        UserWarning: Git LFS's pointer lies in the place of the directory's weights, or a file of them is
            missing; not with any_base.
    """
    config = _config_of(path)
    if config is None:
        return model_digest.of_tensors(_open_gguf(path)[0], families.FAMILIES[0])
    family = families.find(read_fields(config).string("model_type")) or families.FAMILIES[0]
    return _digest_beside(config, family, any_base)


def _config_of(path: StrPath) -> Path | None:
    """The configuration that a path means; None where it means a GGUF file."""
    model_directory.require_no_hub_name(path)
    if Path(path).is_dir():
        return Path(path, CONFIG)
    return Path(path) if files.suffix(path) == ".json" else None


def _digest_beside(config: Path, family: Family, any_base: bool) -> str | None:
    """The digest by the weights that lie beside a config.json, if there are any."""
    if config.name != CONFIG or model_directory.weights_of(config.parent) is None:
        return None
    try:
        tensors = model_directory.open_tensors(
            config.parent, wanted=lambda name: model_digest.is_norm(family.gguf_tensor(name) or "")
        )
        return model_digest.of_tensors(tensors, family)
    except (NotFetchedError, FileNotFoundError):
        words = "weights are missing, so whether the adapter is of this model is not known"
        if not any_base:
            warnings.warn(f"{files.name(config.parent)}: {words}", stacklevel=4)
        return None


def _open_gguf(path: StrPath) -> tuple[GgufFile, str]:
    """A model's file and its architecture."""
    file = gguf.open(path)
    if gguf_adapter.is_adapter(file):
        raise FormatError(f"{file.source}: an adapter, expected a model")
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
