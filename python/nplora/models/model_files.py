"""Opens a model's files, to save the model again with new values for some tensors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from nplora import tokenizer
from nplora.formats import files, gguf, gguf_rows, model_directory, safetensors
from nplora.formats.config_json import Fields, read_fields
from nplora.formats.files import NewFile, Stamp, StrPath
from nplora.formats.gguf import file_type
from nplora.formats.gguf.header import MAGIC
from nplora.formats.sharded import ShardedFile
from nplora.formats.tokenizer_json import TOKENIZER, AddedToken
from nplora.models import base_model, families
from nplora.models.families import Family
from nplora.tokenizer import Tokenizer, gguf_metadata

Array = NDArray[Any]
Tensor: TypeAlias = gguf.Tensor | safetensors.Tensor
Stream: TypeAlias = gguf.Stream | safetensors.Stream


@dataclass(frozen=True)
class NewVocabulary:
    """The tokens that a saved model has in addition to the tokens of its source.

    Attributes:
        tokens: the new tokens.
        size: the number of rows of the embedding in the saved model.
    """

    tokens: tuple[AddedToken, ...]
    size: int


@dataclass(frozen=True)
class ModelFiles:
    """The open files of a model.

    Attributes:
        suffix: the kind of file: ".gguf" or ".safetensors".
        family: the description of the model's family; Llama's if the family is not known.
        place: a function; place(layer, rows) returns a tuple (tensor, order) for a layer whose weight has
            `rows` rows. `tensor` is the name of the tensor that holds the weight, or None if there is no such
            tensor. `order` is the order of the weight's rows in the file, or None if the file does not change
            the order.
        new_files: a function; new_files(output, tensors, vocabulary) returns the files to write. The dict
            `tensors` may also contain `Stream`s. If `vocabulary` is None, the vocabulary does not change.
        tokenizer: a function that returns the model's tokenizer.
        tied: whether the head shares the embedding's weight.
        mapped: the size and the time stamp of each memory-mapped file, to detect later changes.
        shards: the names of the shard files; empty if one file holds all weights.
    """

    source: str
    suffix: str
    tensors: Mapping[str, Tensor]
    family: Family
    place: Callable[[str, int], tuple[str | None, Array | None]]
    new_files: Callable[[StrPath, Mapping[str, Any], NewVocabulary | None], list[NewFile]]
    tokenizer: Callable[[], Tokenizer]
    tied: bool
    mapped: tuple[Stamp, ...]
    shards: frozenset[str] = frozenset()


def open(base: StrPath) -> ModelFiles:
    """Open a GGUF file, a safetensors file or index, or a Hugging Face directory.

    Raises:
        FormatError: a file breaks its format.
        OSError: a file cannot be read.
    """
    model_directory.require_no_hub_name(base)
    if Path(base).is_dir():
        return _open_safetensors(base)
    with files.reading(base) as reader:
        is_gguf = bytes(reader[:4]) == MAGIC
    return _open_gguf(base) if is_gguf else _open_safetensors(base)


def is_directory(output: StrPath) -> bool:
    """Whether a new model at the path `output` is a directory, not a single file."""
    return files.suffix(output) not in (".gguf", ".safetensors")


def weights_path(output: StrPath) -> Path:
    """The path of the weights file of a new model at the path `output`."""
    return Path(output, model_directory.WEIGHTS) if is_directory(output) else Path(output)


def _open_gguf(path: StrPath) -> ModelFiles:
    file = gguf.open(path)
    facts = base_model.read(path) if "general.architecture" in file.metadata else None

    def place(layer: str, rows: int) -> tuple[str | None, Array | None]:
        stored = None if facts is None else facts.family.gguf_layer(layer)
        if facts is None or stored is None:
            return _first_of(file, f"{layer}.weight", layer), None
        heads = facts.permuted_heads(layer)
        order = None if not heads or rows % (2 * heads) else gguf_rows.row_order(rows, heads)
        return _first_of(file, f"{stored}.weight"), order

    def new_files(
        output: StrPath, tensors: Mapping[str, Any], vocabulary: NewVocabulary | None
    ) -> list[NewFile]:
        metadata = file.metadata.typed()
        if vocabulary is not None:
            metadata = gguf_metadata.with_tokens(metadata, vocabulary.tokens, vocabulary.size)
        return [gguf.new_file(output, tensors, file_type.redescribe(metadata, file, tensors))]

    tied = facts is not None and "output.weight" not in file
    family = families.FAMILIES[0] if facts is None else facts.family
    return ModelFiles(
        file.source,
        ".gguf",
        file,
        family,
        place,
        new_files,
        lambda: tokenizer.from_gguf(file),
        tied,
        file.mapped,
    )


def _open_safetensors(base: StrPath) -> ModelFiles:
    file = model_directory.open_tensors(base)

    def place(layer: str, rows: int) -> tuple[str | None, Array | None]:
        return _first_of(file, f"{layer}.weight", layer), None

    def new_files(
        output: StrPath, tensors: Mapping[str, Any], vocabulary: NewVocabulary | None
    ) -> list[NewFile]:
        metadata = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
        if not is_directory(output):
            return [safetensors.new_file(output, tensors, metadata)]
        metadata.setdefault("format", "pt")  # transformers refuses a file without this entry
        weights = safetensors.new_file(weights_path(output), tensors, metadata)
        companions = model_directory.companions(Path(base), Path(output))
        return [
            weights,
            *(companions if vocabulary is None else _extended(companions, Path(base), vocabulary)),
        ]

    config = model_directory.of(base) / model_directory.CONFIG
    fields = read_fields(config) if config.exists() else Fields(files.name(config), {})
    family = families.find(fields.string("model_type", "")) or families.FAMILIES[0]
    tied = _is_tied(fields, file, family)
    shards = file.shards if isinstance(file, ShardedFile) else frozenset[str]()
    return ModelFiles(
        file.source, ".safetensors", file, family, place, new_files,
        lambda: tokenizer.from_directory(model_directory.of(base)), tied, file.mapped, shards,
    )  # fmt: skip


def _extended(companions: list[NewFile], base: Path, vocabulary: NewVocabulary) -> list[NewFile]:
    """Return a copy of `companions`, the files that accompany a model's weights. In the copy, tokenizer.json
    also has the new tokens, and config.json has the new vocabulary size.
    """
    text = tokenizer.from_directory(base).with_tokens(vocabulary.tokens).files()[TOKENIZER]
    found = list[NewFile]()
    for file in companions:
        name = Path(file.path).name
        if name == model_directory.CONFIG:
            raw = _resized(b"".join(map(bytes, file.chunks)), vocabulary.size)
            found.append(NewFile(file.path, len(raw), [raw]))
        else:
            found.append(NewFile(file.path, len(text), [text]) if name == TOKENIZER else file)
    return found


def _resized(raw: bytes, size: int) -> bytes:
    """Return the text `raw` of a config.json with the vocabulary size replaced by `size`."""
    fields = json.loads(raw)
    for part in (fields, fields.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = size
    return json.dumps(fields, indent=2, allow_nan=False).encode()


def _is_tied(fields: Fields, names: Mapping[str, Any], family: Family) -> bool:
    """Whether the head shares the embedding's weight, even if the file has a separate (unused) head."""
    if fields.boolean("tie_word_embeddings", family.ties_embeddings):
        return True
    return "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def _first_of(names: Mapping[str, Any], *candidates: str) -> str | None:
    return next((name for name in candidates if name in names), None)
