"""llama.cpp's LoRA adapter: a GGUF file with two low-rank factors for each adapted tensor of a base model.

    general.type            "adapter"
    general.architecture    the base model's, for example "llama"
    adapter.type            "lora"
    adapter.lora.alpha      float32
    adapter.alora.invocation_tokens    uint32[], only for activated LoRA (aLoRA)
    nplora.base_norms.sha256           string, only from nplora: the digest of the base model
    nplora.chat_template               bool, only from nplora: whether the chat template was applied to the
                                       training data
    W.lora_a, W.lora_b      (r, d_in) and (d_out, r) for each adapted tensor W: "blk.0.attn_q.weight.lora_a"

The letters a and b are those of PEFT: lora_a is the matrix that nplora calls B, and lora_b is the matrix that
nplora calls A. llama.cpp adds the following update to W. (The user of llama.cpp chooses user_scale.)

    user_scale * s * lora_b @ lora_a        with s = alpha / r, or 1 if alpha is 0 or missing

For token_embd.weight, lora_a is stored transposed, with shape (vocab, r), and lora_b has shape (dim, r).

Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats import base_digest, bfloat16, files, gguf, model_directory
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.gguf import GgufFile

EMBEDDING = "token_embd.weight"

_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_BASE_DIGEST, _CHAT_TEMPLATE = "nplora.base_norms.sha256", "nplora.chat_template"  # llama.cpp ignores these
_SUFFIXES = (".lora_a", ".lora_b")
_FLOATS = ("F32", "F16", "BF16", "F64")

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """The two low-rank factors of one tensor: lora_a (r, d_in) and lora_b (d_out, r), float32.

    For token_embd.weight, the shapes are (r, vocab) and (dim, r).
    """

    lora_a: Array
    lora_b: Array

    @property
    def rank(self) -> int:
        return int(self.lora_b.shape[1])


@dataclass(frozen=True, eq=False)
class GgufAdapter:
    """The content of an adapter file.

    Attributes:
        pairs: maps the name of each adapted tensor in the base model to the tensor's factors.
        passed_over: the names of norm tensors in the file. nplora and llama.cpp ignore these tensors.
        base_digest: a hash that identifies the base model (see `models.model_digest.of`); None if the file
            has no such hash.
        invocation_tokens: the ids of the tokens at which an activated LoRA (aLoRA) begins to act; None for a
            normal LoRA.
        chat_template: whether the chat template was applied to the training data; None if that is not known.
    """

    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]
    passed_over: tuple[str, ...] = ()
    base_digest: str | None = None
    invocation_tokens: tuple[int, ...] | None = None
    chat_template: bool | None = None

    def scale(self, name: str) -> float:
        """The factor s of a tensor's update: alpha / r, or 1 if alpha is 0 or missing."""
        return self.alpha / self.pairs[name].rank if self.alpha else 1.0


def is_adapter(file: GgufFile) -> bool:
    """Whether the metadata entry general.type is "adapter". Raises FormatError if the entry is not a text."""
    return "general.type" in file.metadata and file.metadata.string("general.type") == "adapter"


def load(path: StrPath) -> GgufAdapter:
    """Read an adapter file.

    Raises:
        FormatError: the file is not an adapter. Or a factor is missing or not finite, or the two factors of a
            tensor have different ranks.
        UnsupportedError: the adapter is not a LoRA adapter, or its factors are quantised.
        OSError: the file cannot be read.
    """
    model_directory.require_no_hub_name(path, "an adapter")
    if files.suffix(path) == ".safetensors":
        raise FormatError(
            f"{files.name(path)}: this is one file of a PEFT adapter; pass the directory {Path(path).parent}"
        )
    return from_file(gguf.open(path))


def from_file(file: GgufFile) -> GgufAdapter:
    """Read an adapter from an open GGUF file. Raises the errors of `load`."""
    kind = file.metadata.string("general.type")
    if kind != "adapter":
        what = "; this is a model file, not an adapter" if kind == "model" else ""
        raise FormatError(f"{file.source}: general.type is {brief(kind)}, expected 'adapter'{what}")
    kind = file.metadata.string("adapter.type")
    if kind != "lora":
        raise UnsupportedError(f"{file.source}: adapter.type is {brief(kind)}, expected 'lora'")
    alpha = float(file.metadata.number(_ALPHA, 0.0))
    if not math.isfinite(alpha):
        raise FormatError(f"{file.source}: {_ALPHA} is {alpha}, expected a finite number")
    adapted, passed_over = _adapted(file)
    pairs = {name: _pair(file, name) for name in adapted}
    digest = None
    if _BASE_DIGEST in file.metadata:
        digest = base_digest.parsed(file.metadata.string(_BASE_DIGEST), f"{file.source}: {_BASE_DIGEST}")
    architecture = file.metadata.string("general.architecture")
    chat = _with_template(file)
    return GgufAdapter(architecture, alpha, pairs, passed_over, digest, _invocation(file), chat)


def trained_with_template(path: StrPath) -> bool | None:
    """Whether the chat template was applied to the training data of an adapter; None if that is not known."""
    return _with_template(gguf.open(path))


def _with_template(file: GgufFile) -> bool | None:
    return file.metadata.boolean(_CHAT_TEMPLATE) if _CHAT_TEMPLATE in file.metadata else None


def _invocation(file: GgufFile) -> tuple[int, ...] | None:
    """The invocation tokens of an activated LoRA, or None."""
    if _INVOCATION not in file.metadata:
        return None
    tokens = tuple(file.metadata.array(_INVOCATION, "UINT32").tolist())
    if not tokens:
        raise FormatError(f"{file.source}: {_INVOCATION} is empty, expected token ids")
    return tokens


def save(path: StrPath, adapter: GgufAdapter) -> None:
    """Write an adapter file. Raises the errors of `gguf.save`."""
    tokens = adapter.invocation_tokens
    metadata = {
        "general.architecture": adapter.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        _ALPHA: np.float32(adapter.alpha),
        **({} if adapter.base_digest is None else {_BASE_DIGEST: adapter.base_digest}),
        **({} if adapter.chat_template is None else {_CHAT_TEMPLATE: adapter.chat_template}),
        **({} if tokens is None else {_INVOCATION: np.array(tokens, np.uint32)}),
    }
    tensors = dict[str, Array]()
    for name, pair in adapter.pairs.items():
        lora_a = pair.lora_a.T if name == EMBEDDING else pair.lora_a
        tensors |= {name + _SUFFIXES[0]: lora_a, name + _SUFFIXES[1]: pair.lora_b}
    gguf.save(path, tensors, metadata)


def _adapted(file: GgufFile) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the adapted tensors in the base model, and the names of the ignored norm tensors.

    Raises:
        FormatError: one of a layer's two factors is missing, or a tensor is neither a factor nor a norm.
    """
    adapted: dict[str, None] = {}
    passed_over = []
    for name in file:
        if name.endswith(_SUFFIXES):
            adapted[name[: -len(_SUFFIXES[0])]] = None
        elif name.endswith("_norm.weight"):
            passed_over.append(name)
        else:
            raise FormatError(
                f"{file.source}: tensor {brief(name)}, expected a name that ends in .lora_a or .lora_b"
            )
    for name in adapted:
        for suffix in _SUFFIXES:
            if name + suffix not in file:
                raise FormatError(
                    f"{file.source}: tensor {brief(name + suffix)} is missing, but the layer's other factor "
                    "is present"
                )
    return list(adapted), tuple(passed_over)


def _pair(file: GgufFile, name: str) -> Pair:
    lora_a, lora_b = (_factor(file, name + suffix) for suffix in _SUFFIXES)
    rank = lora_a.shape[1 if name == EMBEDDING else 0]
    if rank != lora_b.shape[1]:
        raise FormatError(
            f"{file.source}: {brief(name)}: .lora_a has shape {lora_a.shape}, .lora_b {lora_b.shape}, "
            "expected equal ranks"
        )
    return Pair(lora_a.T if name == EMBEDDING else lora_a, lora_b)


def _factor(file: GgufFile, name: str) -> Array:
    tensor = file[name]
    where = f"{file.source}: tensor {brief(name)}"
    if tensor.type not in _FLOATS:
        raise UnsupportedError(f"{where} is {tensor.type}, expected one of {', '.join(_FLOATS)}")
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise FormatError(f"{where} has shape {tensor.shape}, expected two dimensions of at least 1")
    array = bfloat16.widen(tensor.numpy()) if tensor.type == "BF16" else tensor.numpy()
    with np.errstate(over="ignore"):
        factor = array.astype(np.float32)
    if not np.isfinite(factor).all():
        raise FormatError(f"{where} holds NaN or an infinity")
    return factor
