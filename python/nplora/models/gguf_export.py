"""Converts a language model from Hugging Face's files to GGUF: names, row order, types, hyperparameters.

The file is written while the source is read, a few rows at a time. The tokenizer is included if it is a
byte-level BPE that llama.cpp has a name for. The matrices of a GGUF model can be converted to another type.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.formats import bitsandbytes, files, gguf, gguf_adapter, gguf_rows, model_directory
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted, require_not_empty
from nplora.formats.files import StrPath
from nplora.formats.gguf import file_type
from nplora.formats.gguf.ggml_types import GGML_TYPES
from nplora.formats.gguf.header import MAGIC
from nplora.formats.model_directory import CONFIG, Tensors
from nplora.models import families, hf_config, retyping
from nplora.models.config import ModelConfig
from nplora.models.weights import SafetensorsWeights, require_tensors
from nplora.tokenizer import gguf_metadata
from nplora.weights import storages
from nplora.weights.nonfinite import require_finite

Array = NDArray[Any]

DTYPES = ("same", *(name for name in storages.GGML_NAMES if name != "float64"))


@dataclass(frozen=True)
class ModelConversion:
    """The result of `model_to_gguf`.

    Attributes:
        target: the written file.
        architecture: GGUF's name for the model's family.
        types: the number of tensors of each ggml type.
        why_no_tokenizer: why the file has no tokenizer; empty if the file has a tokenizer.
        short: a sentence about the matrices that did not get the requested type, because their rows cannot be
            divided into whole blocks of this type; empty if all matrices got the type.
    """

    target: str
    architecture: str
    types: dict[str, int]
    why_no_tokenizer: str = ""
    short: str = ""

    @property
    def tokenizer(self) -> bool:
        """Whether the tokenizer is in the file."""
        return not self.why_no_tokenizer

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        lines = [
            f"{self.target}: {self.architecture}, {counted(sum(self.types.values()), 'tensor')}: {types}"
        ]
        if self.short:
            lines.append(self.short)
        if not self.tokenizer:
            lines.append(f"without a tokenizer: {self.why_no_tokenizer}")
        return "\n".join(lines)


def is_model(source: StrPath) -> bool:
    """Whether the path holds a model: a safetensors file, an index of shards, a directory or a GGUF file."""
    path = Path(source)
    if path.is_dir():
        return (path / CONFIG).exists() and not (path / model_directory.ADAPTER_CONFIG).exists()
    if files.suffix(path) == ".safetensors" or model_directory.is_index(path):
        return True
    return _is_gguf(path) and not gguf_adapter.is_adapter(gguf.open(path))


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with files.reading(path) as reader:
        require_not_empty(len(reader), files.name(path))
        return bytes(reader[:4]) == MAGIC


def model_to_gguf(
    source: StrPath, path: StrPath, dtype: str = "same", overwrite: bool = False
) -> ModelConversion:
    """Convert a Hugging Face model to a GGUF file, or the matrices of a GGUF model to another type.

    The model must belong to one of the families in `nplora.models.families`. Matrices get the requested type.
    If a matrix has rows that cannot be divided into whole blocks of this type, the matrix gets a type with
    shorter blocks, as in llama.cpp. Norms and biases are float32. If the architecture requires it, the rows
    of the q and k layers are permuted.

    If the source is a GGUF model, the new file has the source's metadata, tokenizer and vectors. A more
    precise type does not remove the rounding errors of the source.

    Args:
        source: a GGUF file, or a directory with config.json and model.safetensors (one file or shards).
            Instead of the directory, its safetensors file or its shard index can be given.
        path: the GGUF file to write.
        dtype: "float32", "float16", "bfloat16", or a ggml type such as "q8_0" or "q4_k" (`nplora convert
            --help` lists all types). "same" keeps the types of the source, which must not be a GGUF file.
        overwrite: replace an existing file.
    Returns:
        a summary of the conversion.
    Raises:
        UnsupportedError: nplora or GGUF does not support the family or a setting of config.json; or matrices
            are quantised to 4 bits by bitsandbytes.
        FormatError: a file breaks its format, does not match config.json, or has a NaN or infinite weight.
        ValueError: `path` is not a .gguf file, or is one of the model's files; `dtype` is unknown; `dtype` is
            "same", but the source is a GGUF file; or a weight is out of the range of `dtype`.
        CorruptError: another program wrote to a GGUF source during the conversion.
        FileExistsError: the file exists, and `overwrite` is not set.
        OSError: a file cannot be read, or the disk fails.

    >>> import json
    >>> from nplora.formats import safetensors
    >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "max_position_embeddings": 16}
    >>> counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    >>> Path("toy-model").mkdir(exist_ok=True)
    >>> _ = Path("toy-model/config.json").write_text(json.dumps({"model_type": "llama", **sizes, **counts}))
    >>> config = hf_config.read("toy-model/config.json")
    >>> tensors = {spec.name: np.ones(spec.shape, np.float32) for spec in families.of(config).tensors(config)}
    >>> safetensors.save("toy-model/model.safetensors", tensors)
    >>> print(model_to_gguf("toy-model", "toy.gguf", dtype="float16", overwrite=True))
    toy.gguf: llama, 11 tensors: 8 F16, 3 F32
    without a tokenizer: there is no tokenizer.json
    >>> print(model_to_gguf("toy.gguf", "toy-half.gguf", dtype="bfloat16", overwrite=True))
    toy-half.gguf: llama, 11 tensors: 8 BF16, 3 F32
    """
    op = "model_to_gguf"
    _check.choice(op, "dtype", dtype, DTYPES)
    if files.suffix(path) != ".gguf":
        raise ValueError(f"{op}: path is {files.name(path)!r}, expected a .gguf file")
    model_directory.require_no_hub_name(source)
    files.require_not_read(op, [path], [("model", file) for file in model_directory.files_of(source)])
    files.require_new(path, overwrite)
    if _is_gguf(Path(source)):
        return _retyped(source, path, dtype)
    directory = model_directory.of(source)
    config = hf_config.read(directory / CONFIG)
    file = model_directory.open_tensors(source)
    family = families.of(config)
    for tensor in family.tensors(config):
        bitsandbytes.refuse(file, tensor.name, file.source, "convert")
    require_tensors(SafetensorsWeights(file, "float32"), config)
    tensors = dict(_tensors(file, config, dtype))
    types = Counter(tensor.type for tensor in tensors.values())
    words, why_not = _tokenizer(directory, config.vocab_size)
    metadata = _metadata(directory.resolve().name, config) | file_type.describe(tensors)
    files.replace([gguf.new_file(path, tensors, metadata | words)])
    return ModelConversion(
        files.name(path),
        family.architecture,
        dict(types.most_common()),
        why_not,
        retyping.short(tensors, dtype),
    )


def _retyped(source: StrPath, path: StrPath, dtype: str) -> ModelConversion:
    """Convert the matrices of a GGUF model to another type."""
    file = gguf.open(source)
    if gguf_adapter.is_adapter(file):
        raise FormatError(f"{file.source}: the file is an adapter, expected a model")
    if dtype == "same":
        raise ValueError(
            f"model_to_gguf: {file.source} is a GGUF model already; expected a dtype other than 'same'"
        )
    if (count := file.metadata.number("split.count", 1)) > 1:
        raise UnsupportedError(
            f"{file.source}: the file is one of {count} files of a model; join them with "
            "llama-gguf-split --merge"
        )
    architecture = file.metadata.string("general.architecture")
    families.by_architecture(file.source, architecture)
    tensors = {name: _in_type(file, name, dtype) for name in file}
    types = Counter(tensor.type for tensor in tensors.values())
    metadata = file_type.redescribe(file.metadata.typed(), file, tensors)

    def require_unchanged(_: list[Path]) -> None:
        for stamp in file.mapped:
            stamp.require_unchanged()

    files.replace([gguf.new_file(path, tensors, metadata)], check=require_unchanged)
    return ModelConversion(
        files.name(path), architecture, dict(types.most_common()), short=retyping.short(tensors, dtype)
    )


def _in_type(file: gguf.GgufFile, name: str, dtype: str) -> gguf.Tensor | gguf.Stream:
    """A tensor of a GGUF file, converted to another type. Vectors and integers are not converted."""
    tensor = file[name]
    given = {kind: storage for storage, kind in storages.GGML_NAMES.items()}.get(tensor.type)
    if len(tensor.shape) < 2 or (given is None and GGML_TYPES[tensor.type].dtype is not None):
        return tensor
    if given is None:
        raise UnsupportedError(
            f"{file.source}: tensor {brief(name)} is {tensor.type}, which nplora cannot decode"
        )
    require_finite(file.source, tensor)
    storage = retyping.storage_of(given, tensor.shape, dtype)
    if storage == given:
        return tensor
    d_in = tensor.shape[-1]
    raw = tensor.data.reshape(-1, storages.row_nbytes(given, d_in))
    chunks = retyping.chunks(name, raw, given, d_in, storage)
    return gguf.Stream(storages.GGML_NAMES[storage], tensor.shape, chunks)


def why_no_tokenizer(directory: StrPath) -> str:
    """Return why `model_to_gguf` would write the model without a tokenizer; "" if it would write one."""
    return _tokenizer(Path(directory), hf_config.read(Path(directory, CONFIG)).vocab_size)[1]


def _tokenizer(directory: Path, vocab_size: int) -> tuple[dict[str, Any], str]:
    """Return the tokenizer's metadata and "". Without a tokenizer, return an empty dict and the reason."""
    try:
        return gguf_metadata.from_directory(directory, vocab_size), ""
    except FileNotFoundError:
        return {}, "there is no tokenizer.json"
    except UnsupportedError as error:
        return {}, str(error)


# ---- tensors ----


def _tensors(file: Tensors, config: ModelConfig, dtype: str) -> Iterator[tuple[str, gguf.Stream]]:
    family = families.of(config)
    for name, factors in family.rope_factors(config).items():
        raw = np.ascontiguousarray(factors, "<f4")
        yield name, gguf.Stream("F32", raw.shape, partial(list, [raw.data]))
    for tensor in family.tensors(config):
        source = file[tensor.name]
        if source.dtype not in storages.FLOATS:
            raise UnsupportedError(f"{file.source}: tensor {tensor.name} is {source.dtype}, expected floats")
        require_finite(file.source, source)
        storage = retyping.storage_of(source.dtype, tensor.shape, dtype)
        rows = source.array.reshape(tensor.shape[0], -1)
        order = gguf_rows.row_order(len(rows), tensor.heads) if tensor.heads else None
        chunks = retyping.chunks(
            tensor.name, _bytes(rows), source.dtype, rows.shape[1], storage, order, tensor.offset
        )
        yield tensor.gguf, gguf.Stream(storages.GGML_NAMES[storage], tensor.shape, chunks)


def _bytes(rows: Array) -> Array:
    return rows.view(np.uint8) if rows.flags.c_contiguous else np.ascontiguousarray(rows).view(np.uint8)


# ---- metadata ----


def _metadata(name: str, config: ModelConfig) -> dict[str, Any]:
    """A model's hyperparameters as GGUF metadata, under llama.cpp's keys."""
    family = families.of(config)
    metadata = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": name,
    }
    return metadata | {f"{family.architecture}.{key}": v for key, v in family.metadata(config).items()}
