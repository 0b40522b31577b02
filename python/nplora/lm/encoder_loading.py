"""load_encoder: reads an encoder from a directory of transformers or sentence-transformers, or from GGUF."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from nplora import _check, tokenizer
from nplora.formats import files, gguf, model_directory
from nplora.formats.config_json import Fields, read_fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import Stamp, StrPath
from nplora.formats.gguf import GgufFile
from nplora.lm import sentence_files
from nplora.lm.encoder import Encoder
from nplora.lm.pooling import POOLINGS, Pooling
from nplora.lm.sentence_files import SentenceSettings
from nplora.models import building, families
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families import TensorSpec
from nplora.models.weights import GgufWeights, SafetensorsWeights, require_decoded
from nplora.nn import Linear
from nplora.tokenizer import Tokenizer
from nplora.weights import COMPUTES

Array = npt.NDArray[Any]

# The numbers by which llama.cpp names poolings in GGUF's metadata.
_GGUF_POOLINGS = {1: "mean", 2: "cls", 3: "last"}
# llama.cpp's names for the weights of the modules 2_Dense and 3_Dense, which have no bias and no activation.
_GGUF_DENSE = ("dense_2.weight", "dense_3.weight")


@_check.keywords
def load_encoder(
    path: StrPath,
    compute: str = "float32",
    mmap: bool = True,
    check: bool = True,
    pooling: str | None = None,
) -> Encoder:
    """Load a model that turns texts into vectors. The weights are frozen.

    The model's family must be in `nplora.models.families.ENCODERS` (encoders) or in
    `nplora.models.families.FAMILIES` (language models).

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.embed(["a cat", "a dog"]).shape == (2, encoder.dim)
        True

    Args:
        path: a GGUF file, or a directory that transformers or sentence-transformers wrote, with config.json,
            model.safetensors and tokenizer.json.
        compute, mmap, check: as in `load_model`.
        pooling: how the hidden states of a text's tokens become its embedding: "cls" (the first token),
            "mean", "max", "last" (the last token), "weighted_mean" or "mean_sqrt". None: the pooling that the
            files name. If the files name no pooling, encoders use the mean, and causal language models use
            the last token. The files may also contain Dense layers, which follow the pooling. If `pooling` is
            given, the encoder ignores these layers.
    Raises:
        UnsupportedError: the architecture, a module, or the type of a tensor is not supported.
        FormatError: a file breaks its format, or the files do not contain a complete model.
        UnsafeError: the weights are a pickle, or a path leaves the directory.
        ValueError: `pooling` or `compute` is unknown.
        OSError: a file cannot be read.
    Warns:
        UserWarning: neither the files nor `pooling` name a pooling; the message names the one that is used.
    """
    files.require_named("load_encoder", path=path)
    model_directory.require_no_hub_name(path)
    _check.choice("load_encoder", "compute", compute, COMPUTES)
    if pooling is not None:
        _check.choice("load_encoder", "pooling", pooling, POOLINGS)
    read = _from_directory if Path(path).is_dir() else _from_gguf
    return _encoder(read(path, compute, mmap, check), pooling)


def is_encoder(path: StrPath) -> bool:
    """Whether a model's files say that the model computes embeddings or class scores, not text.

    >>> import nplora
    >>> from nplora.lm.encoder_loading import is_encoder
    >>> is_encoder("encoder-model"), is_encoder("model.gguf")
    (True, False)

    Raises:
        FormatError: a file breaks its format.
        OSError: a file cannot be read.
    """
    if not Path(path).is_dir():
        file = gguf.open(path, True)
        architecture = file.metadata.string("general.architecture")
        is_pooled = bool(file.metadata.integer(f"{architecture}.pooling_type", 0))
        return (
            is_pooled
            or families.encoder_by_architecture(architecture) is not None
            or families.bidirectional_by_architecture(architecture) is not None
        )
    config = Path(path, model_directory.CONFIG)
    if Path(path, sentence_files.MODULES).exists() or not config.exists():
        return Path(path, sentence_files.MODULES).exists()
    fields = read_fields(config)
    if families.encoder_by_model_type(fields.string("model_type")) is not None:
        return True
    names = dict(fields.items()).get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


@dataclass(frozen=True)
class _Parts:
    """The parts of an `Encoder`, read from a directory or a GGUF file.

    Attributes:
        prefix: as in `Encoder`.
        default: the pooling that is used if the files name none.
        read_tensor: the function with which `Encoder.head_tensor` reads the tensor of a given name.
    """

    config: EncoderConfig | ModelConfig
    model: Decoder
    prefix: str
    default: str
    settings: SentenceSettings
    load_tokenizer: Callable[[], Tokenizer]
    mapped: tuple[Stamp, ...]
    read_tensor: Callable[[str], Array | None] = lambda name: None


def _encoder(parts: _Parts, pooling: str | None) -> Encoder:
    chosen = parts.settings.pooling
    if pooling is not None:
        chosen = Pooling(pooling, normalize=chosen is not None and chosen.normalize)
    elif chosen is None:
        words = {"mean": "the mean of its tokens", "last": "its last token"}[parts.default]
        warnings.warn(
            f"{parts.config.source}: the model's files name no pooling, so a text's embedding is {words}; "
            "choose another pooling with load_encoder(path, pooling=...) or --pooling",
            stacklevel=4,
        )
        chosen = Pooling(parts.default)
    _require_fitting(chosen, parts.config)
    return Encoder(
        parts.config,
        parts.model,
        parts.load_tokenizer,
        chosen,
        prefix=parts.prefix,
        max_length=parts.settings.max_length,
        prompts=parts.settings.prompts,
        default_prompt=parts.settings.default_prompt,
        include_prompt=parts.settings.include_prompt,
        mapped=parts.mapped,
        read_tensor=parts.read_tensor,
    )


def _require_fitting(pooling: Pooling, config: EncoderConfig | ModelConfig) -> None:
    """Raise FormatError if a Dense module's `in_features` differs from the width of its input."""
    width = len(pooling.modes) * config.hidden_size
    for i, layer in enumerate(pooling.dense):
        d_out, d_in = layer.weight.shape
        if d_in != width:
            raise FormatError(
                f"{config.source}: the Dense module {i + 1} after the model has in_features {d_in}, but its "
                f"input has {width} values"
            )
        width = d_out


# ---- directories ----


def _from_directory(path: StrPath, compute: str, mmap: bool, check: bool) -> _Parts:
    settings = sentence_files.read(Path(path))
    directory = Path(path, settings.transformer)
    model_directory.require_config(directory)
    fields = read_fields(directory / model_directory.CONFIG)
    file = model_directory.open_tensors(directory, mmap)
    family = families.encoder_by_model_type(fields.string("model_type"))

    def load_tokenizer() -> Tokenizer:
        return tokenizer.from_directory(directory)

    if family is None:
        # The head is not needed. With tied embeddings, the file may contain a head, but need not.
        config = dataclasses.replace(_decoder_config(fields), tie_word_embeddings=True)
        weights = SafetensorsWeights(file, compute, check, _decoder_names(file))
        model, _ = building.decoder(config, weights)
        default = "last" if config.causal else "mean"
        return _Parts(
            config, model, "model", default, settings, load_tokenizer, weights.mapped, weights.array
        )
    names = family.stored_names(tuple(file))
    weights = SafetensorsWeights(file, compute, check, names.stored)
    encoder_config = family.read_config(fields)
    encoder = building.encoder(encoder_config, weights, names.is_unused)

    def read_tensor(name: str) -> Array | None:
        own = weights.array(names.prefix + name.removeprefix(names.prefix))
        return weights.array(name) if own is None else own

    return _Parts(
        encoder_config, encoder, family.prefix, "mean", settings, load_tokenizer, weights.mapped, read_tensor
    )


def _decoder_config(fields: Fields) -> ModelConfig:
    """The configuration of a language model. If the family is unknown, the error lists all families."""
    kind = fields.string("model_type")
    family = families.find(kind)
    if family is None:
        known = [each.model_type for each in families.FAMILIES]
        known += [each.model_type for each in families.ENCODERS]
        raise UnsupportedError(
            f"{fields.source}: model_type is {brief(kind)}, expected one of {', '.join(sorted(known))}"
        )
    return family.read_config(fields)


def _decoder_names(names: Container[str]) -> Callable[[str], str]:
    """A function that maps nplora's name of a tensor to the name in the file.

    If the file has no head, the names in the file may lack the prefix "model.".
    """
    prefix = "" if "model.embed_tokens.weight" in names else "model."
    return lambda name: name.removeprefix(prefix)


# ---- GGUF ----


def _from_gguf(path: StrPath, compute: str, mmap: bool, check: bool) -> _Parts:
    file = gguf.open(path, mmap)
    architecture = file.metadata.string("general.architecture")
    require_decoded(file)
    weights = GgufWeights(file, compute, check, elsewhere=_GGUF_DENSE)
    settings = _gguf_settings(file, architecture, GgufWeights(file, "float32", check))

    def load_tokenizer() -> Tokenizer:
        return tokenizer.from_gguf(file)

    family = families.encoder_by_architecture(architecture, file.metadata.string("tokenizer.ggml.model", ""))
    if family is None:
        found = families.bidirectional_by_architecture(architecture)
        config = (found or families.by_architecture(file.source, architecture)).read_metadata(file)
        model, _ = building.decoder(config, weights)
        default = "last" if config.causal else "mean"
        return _Parts(config, model, "model", default, settings, load_tokenizer, weights.mapped)
    encoder_config = family.read_metadata(file)
    encoder = building.encoder(encoder_config, weights, family.is_unused_in_gguf)
    return _Parts(encoder_config, encoder, family.prefix, "mean", settings, load_tokenizer, weights.mapped)


def _gguf_settings(file: GgufFile, architecture: str, weights: GgufWeights) -> SentenceSettings:
    """Read the kind of pooling (from the metadata) and the Dense modules that follow the pooling.

    The embeddings are normalised, as in llama.cpp.

    Args:
        weights: the weights in the file. The products with them are computed in float32. A Dense module
            multiplies only one vector for each text, so bfloat16 or int8 would save little time.
    """
    found = file.metadata.integer(f"{architecture}.pooling_type", 0)
    dense = {name: shape for name, shape in weights.shapes().items() if name in _GGUF_DENSE}
    for name, shape in dense.items():
        if len(shape) != 2:
            raise FormatError(f"{file.source}: tensor {name} has shape {shape}, expected two axes")
    if found == 0:  # the file asks for no pooling, or says nothing
        if dense:
            raise UnsupportedError(
                f"{file.source}: {', '.join(dense)} must follow a pooling, but {architecture}.pooling_type "
                "names no pooling"
            )
        return SentenceSettings()
    if found not in _GGUF_POOLINGS:
        raise UnsupportedError(
            f"{file.source}: {architecture}.pooling_type is {found}, expected 0 (none) or one of "
            f"{', '.join(f'{number} ({name})' for number, name in _GGUF_POOLINGS.items())}"
        )
    layers = [(Linear(weights.matrix(TensorSpec(name, name, shape))), None) for name, shape in dense.items()]
    return SentenceSettings(Pooling(_GGUF_POOLINGS[found], layers, normalize=True))
