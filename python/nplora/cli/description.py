"""The text that `nplora info` prints about a GGUF or safetensors file, a model directory or an adapter.

For a file with weights, only the header is read. For an adapter, the factors are read too, because the text
contains their norms.
"""

import errno
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nplora.formats import (
    bitsandbytes,
    files,
    gguf,
    gguf_adapter,
    model_directory,
    peft_adapter,
    safetensors,
    sharded,
)
from nplora.formats.config_json import read_fields
from nplora.formats.errors import FormatError, brief, counted, quoted, require_not_empty
from nplora.formats.files import StrPath
from nplora.formats.gguf import GgufFile, StringArray
from nplora.formats.gguf.ggml_types import GGML_TYPES
from nplora.formats.gguf.header import MAGIC
from nplora.formats.peft_adapter import PeftAdapter
from nplora.formats.safetensors import SafetensorsFile
from nplora.models import families
from nplora.trainer.checkpoint import is_checkpoint
from nplora.weights import storages

Array: TypeAlias = NDArray[Any]
Row: TypeAlias = tuple[str, ...]

_LONGEST_VALUE = 60
_NF4 = "nf4"
_RANK = 8  # the text gives the number of parameters of an adapter with this rank
_OUTPUTS = ("output", "lm_head")
_KNOWN_IN_GGUF = frozenset(family.architecture for family in families.FAMILIES)
_KNOWN = frozenset(family.model_type for family in families.FAMILIES)
_ENCODERS_IN_GGUF = frozenset(
    {family.architecture for family in families.ENCODERS if family.architecture is not None}
    | {family.architecture for family in families.BIDIRECTIONAL}
)
_ENCODERS = frozenset(family.model_type for family in families.ENCODERS)


def describe(path: StrPath) -> str:
    """Describe a GGUF or safetensors file, an index of safetensors files, a model directory or an adapter.

    Args:
        path: a file, or the directory of a PEFT adapter or of a Hugging Face model.
    Returns:
        the description, in several lines. Control characters in names and values are escaped.
    Raises:
        ValueError: the path is empty.
        FormatError: the file is of another kind, or it is invalid.
        OSError: the file cannot be read.

    >>> from nplora.cli.description import describe
    >>> print(describe("adapter"))
    adapter: PEFT's LoRA adapter for an unnamed model
    rank 2, alpha 16, scale = alpha / rank; layers may differ
    ...
    """
    files.require_named("info", path=path)
    model_directory.require_no_hub_name(path)
    if Path(path).is_dir():
        return _directory(path)
    if model_directory.is_index(path):
        return _index(path)
    with files.reading(path) as reader:
        start, size = bytes(reader[:9]), len(reader)
    require_not_empty(size, files.name(path))
    if start.startswith(MAGIC):
        file = gguf.open(path)
        return _llama_cpp(file) if gguf_adapter.is_adapter(file) else _gguf(file, size)
    if start[8:] != b"{":
        raise FormatError(f"{files.name(path)}: begins with {quoted(start)}, expected GGUF or safetensors")
    return _safetensors(path, size)


def _directory(path: StrPath) -> str:
    names = [name for name in (peft_adapter.CONFIG, model_directory.CONFIG) if Path(path, name).exists()]
    if not names:
        peft_adapter.require_finished(path)
        neither = f"the directory has neither {peft_adapter.CONFIG} nor {model_directory.CONFIG}"
        raise FileNotFoundError(errno.ENOENT, neither, files.name(path))
    if names[0] == model_directory.CONFIG:
        return _model(path)
    with peft_adapter.reading(path) as adapter:
        return _peft(adapter)


# ---- files of weights ----


class _Tensor(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


def _gguf(file: GgufFile, size: int) -> str:
    tensors = [_Tensor(name, e.type.name, e.shape, e.nbytes) for name, e in file.entries.items()]
    architecture = file.metadata.get("general.architecture")
    return _text(
        f"{file.source}: GGUF version {file.version}, {counted(len(file), 'tensor')}, {size:,} bytes",
        _unknown(
            architecture,
            _KNOWN_IN_GGUF,
            "finetune, eval, generate, merge and convert",
            _ENCODERS_IN_GGUF,
        ),
        metadata=[(key, _value(file.metadata[key])) for key in file.metadata],
        **_listed(tensors, _is_read),
        **_trainable({_target(t.name, architecture): t.shape for t in tensors if _is_float(t.type)}),
    )


def _unknown(family: object, known: Collection[str], commands: str, encoders: Collection[str] = ()) -> str:
    """A line about an encoder or an unsupported family, with the commands that refuse the model.

    For other models, the line is "".
    """
    if family is None or (isinstance(family, str) and family in known):
        return ""
    if isinstance(family, str) and family in encoders:
        return f"an encoder: embed, classify and serve read it; {commands} refuse it"
    families = ", ".join(sorted(known))
    return f"architecture {brief(family)} is not supported: {commands} refuse it; supported: {families}"


def _target(stored: str, architecture: object) -> str:
    """Return the name that --targets uses for a tensor's layer.

    If there is no such name, return the tensor's name without ".weight".
    """
    layer = stored.removesuffix(".weight")
    name = architecture if isinstance(architecture, str) else ""
    family = (
        families.find_architecture(name)
        or families.encoder_by_architecture(name)
        or families.bidirectional_by_architecture(name)
        or families.FAMILIES[0]
    )
    return family.hf_layer(layer) or layer


def _is_float(name: str) -> bool:
    dtype = GGML_TYPES[name].dtype
    return dtype is None or dtype.kind == "f" or name == "BF16"


def _is_read(name: str) -> bool:
    return name in storages.GGML_BLOCKS or GGML_TYPES[name].dtype is not None


def _safetensors(path: StrPath, size: int) -> str:
    with safetensors.reading(path) as file:
        tensors = _tensors(file)
        return _text(
            f"{file.source}: safetensors, {counted(len(file), 'tensor')}, {size:,} bytes",
            metadata=[(key, _value(value)) for key, value in file.metadata.items()],
            **(_listed(tensors) if _is_trained(file) else _matrices(tensors)),
        )


def _is_trained(file: SafetensorsFile) -> bool:
    """Whether the file holds an adapter's factors or a checkpoint. Such a file has no layers to adapt."""
    return is_checkpoint(file.metadata) or any(".lora_" in name for name in file)


def _index(path: StrPath) -> str:
    file = sharded.open(path)
    head = f"{file.source}: safetensors in several files, {counted(len(file), 'tensor')}"
    return _text(head, **_matrices(_tensors(file)))


def _model(directory: StrPath) -> str:
    config = read_fields(Path(directory, model_directory.CONFIG))
    tensors = _tensors(model_directory.open_tensors(directory))
    family, nbytes = config.string("model_type", "(not named)"), sum(t.nbytes for t in tensors)
    said = {
        key: value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        for key, value in config.items()
    }
    return _text(
        f"{files.name(directory)}: a model of architecture {family}, "
        f"{counted(len(tensors), 'tensor')}, {nbytes:,} bytes",
        _unknown(said.get("model_type"), _KNOWN, "finetune, eval, generate and convert", _ENCODERS),
        config=[(key, _value(value)) for key, value in said.items()],
        **_matrices(tensors),
    )


def _matrices(tensors: list[_Tensor]) -> dict[str, list[Row]]:
    floats = {t.name: t.shape for t in tensors if "float" in t.type or t.type == _NF4}
    return _listed(tensors) | _trainable(floats)


def _tensors(file: model_directory.Tensors) -> list[_Tensor]:
    """The tensors of a file. All tensors that make up one bitsandbytes matrix count as one tensor."""
    if isinstance(file, SafetensorsFile):
        found = [_Tensor(name, e.dtype, e.shape, e.end - e.begin) for name, e in file.entries.items()]
    else:
        found = [_Tensor(name, t.dtype, t.shape, t.nbytes) for name, t in file.items()]
    parts = bitsandbytes.parts(file)
    nbytes = Counter[str]()
    for tensor in found:
        nbytes[parts.get(tensor.name, tensor.name)] += tensor.nbytes
    matrices = set(parts.values())
    return [
        _Tensor(t.name, _NF4, bitsandbytes.shape(file, t.name), nbytes[t.name]) if t.name in matrices else t
        for t in found
        if t.name not in parts
    ]


def _listed(
    tensors: list[_Tensor], is_read: Callable[[str], bool] = lambda name: True
) -> dict[str, list[Row]]:
    """Two tables: one with a row for each tensor, and one with a row for each type of tensor."""
    counts, nbytes = Counter[str](), Counter[str]()
    for tensor in tensors:
        counts[tensor.type] += 1
        nbytes[tensor.type] += tensor.nbytes
    return {
        "tensors": [
            (t.name, t.type, " x ".join(map(str, t.shape)) or "scalar", counted(t.nbytes, "byte"))
            for t in tensors
        ],
        "types": [
            (name, f"{count:,}", counted(nbytes[name], "byte"), "" if is_read(name) else "not supported")
            for name, count in counts.most_common()
        ],
    }


def _trainable(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Row]]:
    """A table of the kinds of matrices that LoRA can adapt, with the parameters of an adapter of rank 8.

    As in PEFT, "all-linear" means all matrices except the embedding and the output layer.
    """
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    kinds: dict[str, list[str]] = {}
    for name in matrices:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)

    def row(title: str, names: list[str]) -> Row:
        each = {" x ".join(map(str, matrices[name])) for name in names}
        parameters = sum(_RANK * sum(matrices[name]) for name in names)
        return (
            title,
            counted(len(names), "layer"),
            each.pop() if len(each) == 1 else "",
            f"{parameters:,} parameters",
        )

    linear = [
        name for name in matrices if "embd" not in name and "embed" not in name and name not in _OUTPUTS
    ]
    rows = [row(kind, names) for kind, names in kinds.items()]
    return {f"LoRA of rank {_RANK}": [*rows, row("all-linear", linear)] if matrices else []}


def _value(value: object) -> str:
    """A metadata value as text. An array is shown by its length and type."""
    if isinstance(value, StringArray):
        return counted(len(value), "string")
    if isinstance(value, np.ndarray):
        return f"{len(value):,} x {value.dtype}"
    return value if isinstance(value, str) and len(value) <= _LONGEST_VALUE else brief(value, _LONGEST_VALUE)


# ---- adapters ----


def _peft(adapter: PeftAdapter) -> str:
    config = adapter.config
    others: list[str] = []
    layers = []
    whole, tokens = adapter.whole(), adapter.tokens(others)
    for name, halves in adapter.factors(others, whole).items():
        try:
            adapter.require_rank(name, halves)
            lora_a, lora_b = (adapter.array(half) for half in halves)
        except FormatError as error:
            others.append(str(error))
        else:
            layers.append(_layer(name, lora_a, lora_b, config.scale(name), config.use_dora))
    layers.sort(key=lambda layer: _by_numbers(layer[0]))
    kind, rule = "DoRA" if config.use_dora else "LoRA", "sqrt(rank)" if config.use_rslora else "rank"
    base = config.base_model_name_or_path or "an unnamed model"
    return _text(
        f"{adapter.directory}: PEFT's {kind} adapter for {base}",
        f"rank {config.r:,}, alpha {config.lora_alpha:g}, scale = alpha / {rule}; layers may differ",
        _activated(config.alora_invocation_tokens),
        ""
        if adapter.paired
        else f"{peft_adapter.CONFIG} differs from the configuration that was saved with the tensors",
        targets=_targets(layer[0] for layer in layers),
        layers=layers,
        **_trained_rows(adapter, tokens, whole),
        others=[(other,) for other in others],
    )


def _trained_rows(
    adapter: PeftAdapter,
    tokens: Mapping[str, tuple[str, tuple[int, ...]]],
    whole: Mapping[str, Mapping[str, str]],
) -> dict[str, list[Row]]:
    """Return three tables by title: new tokens, trained tokens, and fully trained layers."""
    shapes = {
        layer: [" x ".join(map(str, adapter.tensors.entries[tensor].shape)) for tensor in parameters.values()]
        for layer, parameters in whole.items()
    }
    added = adapter.added_tokens(())
    return {
        "new tokens": [(brief(token.text), str(token.id)) for token in added],
        "trained tokens": [
            (layer, counted(len(ids), "token"), _shortened(", ".join(map(str, ids))))
            for layer, (_, ids) in tokens.items()
        ],
        "fully trained layers": [(layer, ", ".join(found)) for layer, found in shapes.items()],
    }


def _activated(tokens: tuple[int, ...] | None) -> str:
    """A line for activated LoRA, or "" for other adapters."""
    if tokens is None:
        return ""
    return (
        "activated LoRA: acts from the last occurrence of the tokens "
        f"{_shortened(', '.join(map(str, tokens)))} onwards"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _llama_cpp(file: GgufFile) -> str:
    adapter = gguf_adapter.from_file(file)
    layers = []
    for name, pair in adapter.pairs.items():
        layers.append(_layer(name, pair.lora_a, pair.lora_b, adapter.scale(name)))
    return _text(
        f"{file.source}: llama.cpp's LoRA adapter for a model of architecture {adapter.architecture}",
        _unknown(adapter.architecture, _KNOWN_IN_GGUF, "eval, generate, merge, combine and convert"),
        f"alpha {adapter.alpha:g}, scale = {'alpha / rank' if adapter.alpha else '1'}",
        _activated(adapter.invocation_tokens),
        targets=_targets(_target(name, adapter.architecture) for name in adapter.pairs),
        layers=layers,
        others=[(name,) for name in adapter.passed_over],
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A sort key that compares the digits in names as whole numbers: layer 2 comes before layer 10."""
    parts = re.split(r"0*([0-9]+)", name)  # texts and numbers in turn
    return [(len(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def _layer(name: str, lora_a: Array, lora_b: Array, scale: float, is_dora: bool = False) -> Row:
    """A table row with the norms of three matrices of a layer: a, b and ΔW = s b a, where s is the scale.

    The norm of ΔW is computed without forming ΔW: ‖s b a‖² = s² Σ (bᵀ b) ∘ (a aᵀ). With DoRA, the row has no
    ‖ΔW‖, because ΔW depends on the base model.
    """
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    delta = abs(scale) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))
    norms = {"lora_A": np.linalg.norm(a), "lora_B": np.linalg.norm(b)} | ({} if is_dora else {"ΔW": delta})
    return name, f"rank {len(a)}", f"scale {scale:g}", *(f"‖{key}‖ {norm:.4g}" for key, norm in norms.items())


def _targets(layers: Iterable[str]) -> list[Row]:
    """A table with the number of layers of each kind."""
    kinds = Counter(layer.rpartition(".")[2] for layer in layers)
    return [(kind, counted(count, "layer")) for kind, count in kinds.items()]


# ---- text ----


def _text(*head: str, **sections: list[Row]) -> str:
    """Join the lines of `head` and the titled tables of `sections`. Empty lines and tables are left out."""
    lines = [_printable(line) for line in head if line]
    for title, rows in sections.items():
        if rows:
            table = [[_printable(cell) for cell in row] for row in rows]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["", title]
            lines += [("  " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in table]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Escape the control characters in a text, so that the text cannot control the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
