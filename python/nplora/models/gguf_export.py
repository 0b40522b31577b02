"""Converts a language model from Hugging Face's files to GGUF: names, row order, types, hyperparameters.

The file is written while the source is read, a few rows at a time. The tokenizer is included if it is a
byte-level BPE that llama.cpp has a name for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.formats import bitsandbytes, files, gguf, gguf_rows, model_directory
from nplora.formats.errors import UnsupportedError, counted
from nplora.formats.files import StrPath
from nplora.formats.gguf import file_type
from nplora.formats.model_directory import CONFIG, Tensors
from nplora.models import families, hf_config
from nplora.models.config import ModelConfig
from nplora.models.families import TensorSpec
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
        why_no_tokenizer: why the file has no tokenizer; empty if it has one.
        short: a sentence about matrices that could not get the requested type, because their rows are not
            whole blocks of that type; empty if all matrices got it.
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
    """Whether the path is a Hugging Face model: a safetensors file, an index of shards, or a directory."""
    path = Path(source)
    if path.is_dir():
        return (path / CONFIG).exists() and not (path / "adapter_config.json").exists()
    return files.suffix(path) == ".safetensors" or model_directory.is_index(path)


def model_to_gguf(
    source: StrPath, path: StrPath, dtype: str = "same", overwrite: bool = False
) -> ModelConversion:
    """Convert a Hugging Face model to a GGUF file.

    The model must belong to one of the families in `nplora.models.families`. Matrices get the requested type.
    A matrix whose rows are not whole blocks of that type gets the next type that fits, as in llama.cpp. Norms
    and biases are float32. Rows of the q and k layers are permuted if the architecture requires that.

    Args:
        source: a directory with config.json and model.safetensors (one file or shards), or the file or index
            in such a directory.
        path: the GGUF file to write.
        dtype: "same", "float32", "float16", "bfloat16", or a ggml type such as "q8_0" or "q4_k" (`nplora
            convert --help` lists all).
        overwrite: replace an existing file.
    Returns:
        a summary of the conversion.
    Raises:
        UnsupportedError: nplora or GGUF does not support the family or a setting of config.json; or matrices
            are quantised to 4 bits by bitsandbytes.
        FormatError: a file breaks its format, does not match config.json, or has a NaN or infinite weight.
        ValueError: `path` is not a .gguf file or is one of the model's files, `dtype` is not available, or a
            weight is out of the range of `dtype`.
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
    """
    op = "model_to_gguf"
    _check.choice(op, "dtype", dtype, DTYPES)
    if files.suffix(path) != ".gguf":
        raise ValueError(f"{op}: path is {files.name(path)!r}, expected a .gguf file")
    model_directory.require_no_hub_name(source)
    files.require_not_read(op, [path], [("model", file) for file in model_directory.files_of(source)])
    files.require_new(path, overwrite)
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
        files.name(path), family.architecture, dict(types.most_common()), why_not, _short(tensors, dtype)
    )


def _tokenizer(directory: Path, vocab_size: int) -> tuple[dict[str, Any], str]:
    """Return the tokenizer's metadata and an empty text; or no metadata, and the reason for that."""
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
        storage = _storage(source.dtype, tensor.shape, dtype)
        chunks = _chunks(tensor, source.array.reshape(tensor.shape[0], -1), source.dtype, storage)
        yield tensor.gguf, gguf.Stream(storages.GGML_NAMES[storage], tensor.shape, chunks)


def _storage(given: str, shape: tuple[int, ...], dtype: str) -> str:
    """Choose the storage type of a tensor.

    Vectors are float32, because ggml computes with float32 vectors. A matrix gets the requested type if its
    rows are whole blocks of that type. Otherwise it gets a type with shorter blocks, or float16.
    """
    if len(shape) == 1:
        return "float32"
    wanted = given if dtype == "same" else dtype
    shorter = storages.FORMATS[wanted].shorter if wanted in storages.FORMATS else None
    for storage in (wanted, shorter or wanted):
        if storages.fits(storage, shape[-1]):
            return "float32" if storage == "float64" else storage
    return "float16"


def _short(tensors: dict[str, gguf.Stream], dtype: str) -> str:
    """A sentence about the matrices that did not get the requested type; empty if all did."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    others = [t for t in matrices if dtype != "same" and t.type != storages.GGML_NAMES[dtype]]
    if not others:
        return ""
    kinds = ", ".join(dict.fromkeys(tensor.type for tensor in others))
    rows = f"their rows are not whole blocks of {storages.block_elements(dtype)} values"
    return f"{len(others)} of {len(matrices)} matrices are {kinds} instead of {dtype}: {rows}"


def _chunks(tensor: TensorSpec, rows: Array, given: str, storage: str) -> Callable[[], Iterator[memoryview]]:
    order = gguf_rows.row_order(len(rows), tensor.heads) if tensor.heads else None

    def chunks() -> Iterator[memoryview]:
        for block in storages.row_blocks(*rows.shape):
            piece = np.ascontiguousarray(rows[block] if order is None else rows[order[block]])
            raw = piece.reshape(len(piece), -1).view(np.uint8)
            if storage != given or tensor.offset:
                values = storages.decode(raw, given, piece.shape[1])
                values = values + np.float32(tensor.offset) if tensor.offset else values
                raw = _stored(tensor.name, values, storage)
            yield raw.reshape(-1).data

    return chunks


def _stored(name: str, values: Array, storage: str) -> Array:
    try:
        raw = storages.encode(values, storage)
    except ValueError as error:
        raise ValueError(f"model_to_gguf: tensor {name}: {error}") from error
    after = storages.decode(raw, storage, values.shape[1]) if storage in storages.FLOATS else values
    lost = int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(after)))
    if lost:
        raise ValueError(f"model_to_gguf: tensor {name}: {lost} finite values become infinite in {storage}")
    return raw


# ---- metadata ----


def _metadata(name: str, config: ModelConfig) -> dict[str, Any]:
    """The metadata that describe a model, under llama.cpp's keys."""
    family = families.of(config)
    metadata = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": name,
    }
    return metadata | {f"{family.architecture}.{key}": v for key, v in family.metadata(config).items()}
