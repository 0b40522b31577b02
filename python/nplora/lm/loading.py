"""load_model: reads a language model from a GGUF file or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nplora import _check, tokenizer
from nplora.formats import files, gguf, model_directory
from nplora.formats.files import StrPath
from nplora.lm.language_model import LanguageModel
from nplora.models import building, gguf_config, hf_config
from nplora.models.config import ModelConfig
from nplora.models.weights import GgufWeights, SafetensorsWeights, Weights, require_decoded
from nplora.tokenizer import Tokenizer
from nplora.weights import COMPUTES


@_check.keywords
def load_model(
    path: StrPath, compute: str = "float32", mmap: bool = True, check: bool = True
) -> LanguageModel:
    """Load a language model of one of the families in `nplora.models.families`. The weights are frozen.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.logits([1, 2, 3]).shape == (3, lm.config.vocab_size)
        True

    Args:
        path: a GGUF file, or a directory with config.json and model.safetensors (one file or shards).
        compute: the arithmetic of products with frozen weights: "float32", "bfloat16" or "int8" (see
            `FrozenWeight`).
        mmap: map the files into memory. With True, weights are not copied, and the operating system decides
            how much of the files it keeps in memory. If another program truncates a mapped file, the process
            ends with a message and exit status 135. If another program writes to a mapped file, the next call
            of the model raises CorruptError. It is safe to rename another file to a mapped file's name. With
            False, the files are copied into memory.
        check: search all matrices for NaN and infinities. This search reads the whole file once. With False,
            a matrix is read only when it is first used.
    Raises:
        UnsupportedError: the architecture, or the type of a tensor, is not supported. The message lists the
            supported architectures or types, and all tensors of unsupported types.
        FormatError: a file breaks its format, a weight is NaN or infinite, or the files do not contain a
            complete model. The message lists the missing tensors (at most 20), with the most similar names
            in the files, or says where the first NaN or infinity is.
        UnsafeError: the weights are a pickle.
        OSError: a file cannot be read.
    """
    files.require_named("load_model", path=path)
    model_directory.require_no_hub_name(path)
    _check.choice("load_model", "compute", compute, COMPUTES)
    load = _from_directory if Path(path).is_dir() else _from_gguf
    return load(path, compute, mmap, check)


def _from_gguf(path: StrPath, compute: str, mmap: bool, check: bool) -> LanguageModel:
    file = gguf.open(path, mmap)
    config = gguf_config.read(file)
    require_decoded(file)
    return _build(config, GgufWeights(file, compute, check), lambda: tokenizer.from_gguf(file))


def _from_directory(path: StrPath, compute: str, mmap: bool, check: bool) -> LanguageModel:
    model_directory.require_config(path)
    config = hf_config.read(Path(path, model_directory.CONFIG))
    weights = SafetensorsWeights(model_directory.open_tensors(path, mmap), compute, check)
    return _build(config, weights, lambda: tokenizer.from_directory(path))


def _build(config: ModelConfig, weights: Weights, load_tokenizer: Callable[[], Tokenizer]) -> LanguageModel:
    model, lm_head = building.decoder(config, weights)
    return LanguageModel(config, model, lm_head, load_tokenizer, weights.mapped)
