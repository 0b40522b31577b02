"""LoRA adapters of language models in llama.cpp's format, and conversion from and to PEFT directories.

Both formats name the factors lora_a and lora_b (see `letters`). The formats differ in three things:

- Names: PEFT's "model.layers.0.self_attn.q_proj" is "blk.0.attn_q.weight" in llama.cpp.
- Rows: for the architecture llama, GGUF permutes the rows of the q and k weights. The rows of lora_b are
  permuted in the same way.
- Scale: in PEFT, the scale is alpha / r, or alpha / sqrt(r) with rsLoRA, and each layer can have its own
  alpha and r. In llama.cpp, all layers have the same alpha, and the scale is alpha / r, or 1 if alpha is 0.

To keep its scale in llama.cpp, a layer needs alpha = scale · r. If the single alpha of the file differs
from this value, the layer's lora_b is multiplied by (scale · r) / alpha instead.
"""

import dataclasses
import errno
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import letters, named_base, peft_files
from nplora.adapters.content import AdapterContent, require_low_rank
from nplora.adapters.fitting import Place, Target, collecting
from nplora.formats import files, gguf, gguf_adapter, gguf_rows, model_directory, peft_adapter
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.gguf_adapter import EMBEDDING, GgufAdapter, Pair
from nplora.formats.output_directory import require_no_other
from nplora.lora.delta import LoraDelta
from nplora.models import base_model, families
from nplora.models.base_model import BaseModel
from nplora.models.families import Family

Array = NDArray[Any]

_LEAST_ALPHA = 2.0**-126  # the smallest normal float32; smaller numbers lose digits


@dataclass(frozen=True)
class AdapterConversion:
    """A summary of an adapter's conversion.

    Attributes:
        target: the file or directory that was written.
        architecture: GGUF's name for the base model's family.
        layers: the names of the adapted layers, as PEFT writes them.
        alpha: the alpha of the new adapter. If layers differ in alpha, this is the most common value.
        folded: the layers whose scale was multiplied into lora_b.
        passed_over: tensors of the source that are not LoRA factors. nplora and llama.cpp ignore such
            tensors.
        named_base: the name of the base model in adapter_config.json, if the conversion used this name to
            find the model; else empty.

    >>> done = nplora.adapter_to_gguf("adapter", "adapter.gguf", base="model.gguf")
    >>> done.architecture, len(done.layers), done.alpha, done.folded
    ('llama', 14, 16.0, ())
    """

    target: str
    architecture: str
    layers: tuple[str, ...]
    alpha: float
    folded: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    named_base: str = ""

    def __str__(self) -> str:
        layers = counted(len(self.layers), "layer")
        lines = [f"{self.target}: {layers} of {self.architecture}, alpha {self.alpha:g}"]
        if self.folded:
            lines.append(f"{counted(len(self.folded), 'layer')}: the scale is multiplied into lora_b")
        if self.named_base:
            lines.append(f"base model, named in {peft_adapter.CONFIG}: {self.named_base}")
        if self.passed_over:
            lines.append(f"ignored tensors: {', '.join(map(brief, self.passed_over))}")
        return "\n".join(lines)


def convert_adapter(
    source: StrPath,
    target: StrPath,
    base: StrPath | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> AdapterConversion:
    """Convert a PEFT directory with `adapter_to_gguf`, or a llama.cpp file with `adapter_from_gguf`.

    The command `nplora convert` calls this function. For a PEFT directory, the default of `base` is the model
    that the directory's adapter_config.json names.

    Raises:
        ValueError: the suffix of `target` does not match the kind of the output. Or `base` is not given, and
            the model that adapter_config.json names is not on this machine.
        FormatError: the directory `source` holds neither an adapter nor a model.
        FileNotFoundError: the directory holds a training run that has no adapter yet.
        The errors of `adapter_to_gguf` and `adapter_from_gguf`.

    >>> print(nplora.adapters.convert_adapter("adapter", "adapter.gguf", base="model.gguf"))
    adapter.gguf: 14 layers of llama, alpha 16
    >>> print(nplora.adapters.convert_adapter("adapter.gguf", "converted", base="model.gguf"))
    converted: 14 layers of llama, alpha 16
    """
    files.require_named("convert", source=source, target=target, base=base)
    if not Path(source).is_dir():
        if files.suffix(target) in (".gguf", ".safetensors") and Path(source).exists():
            raise ValueError(
                f"convert: {files.name(source)} is a file. A GGUF adapter is converted to a directory, "
                f"but the output {files.name(target)!r} has the suffix of a file"
            )
        return adapter_from_gguf(source, target, base, overwrite=overwrite, any_base=any_base)
    configs = (model_directory.CONFIG, peft_adapter.CONFIG)
    if not any(Path(source, name).exists() for name in configs):
        peft_adapter.require_finished(source)
        raise FormatError(f"{files.name(source)}: the directory holds neither {configs[0]} nor {configs[1]}")
    found = named_base.find(source) if base is None else base
    done = adapter_to_gguf(source, target, found, any_base=any_base, overwrite=overwrite)
    return done if base is not None else dataclasses.replace(done, named_base=files.name(found))


def _target(model: BaseModel | None, family: Family) -> Target:
    """The `Target` that describes a base model. Without a model, any shape of a weight is accepted."""
    title, digest = ("its architecture", None) if model is None else (model.source, model.digest)
    shapes = None if model is None else model.shapes

    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        stored = family.gguf_layer(layer)
        if stored is None:
            return f"{family.architecture} has no layer of this name"
        weight = f"{stored}.weight"
        if shapes is not None and weight not in shapes:
            return f"{title} has no tensor {weight}"
        heads = 0 if model is None else model.permuted_heads(layer)
        if heads and shape[0] % (2 * heads):
            return f"{shape[0]} rows cannot be divided into {heads} heads with an even number of rows each"
        return Place(weight, None if shapes is None else shapes[weight], weight == EMBEDDING, kernel=())

    return Target(title, place, digest, require_kind=_require_sums)


def _require_sums(
    source: str, task_type: str | None, has_dora: bool, whole: Collection[str], tokens: Collection[str]
) -> None:
    if has_dora:
        raise UnsupportedError(
            f"{source}: the adapter uses DoRA, which rescales the rows of W + ΔW. llama.cpp only adds ΔW, so "
            "merge the adapter into the model instead"
        )
    ending = (
        "; a llama.cpp adapter can only hold low-rank factors, so merge the adapter into the model instead "
        "(nplora merge)"
    )
    require_low_rank(source, task_type, whole, tokens, ending)


def _require_not_read(outputs: Iterable[StrPath], adapter: StrPath | None, base: StrPath | None) -> None:
    inputs = [] if adapter is None else [("adapter", path) for path in peft_adapter.files_of(adapter)]
    if base is not None:
        inputs += [("base", path) for path in model_directory.files_of(base)]
    files.require_not_read("convert", outputs, inputs)


# ---- to llama.cpp ----


def adapter_to_gguf(
    directory: StrPath,
    path: StrPath,
    base: StrPath,
    edited_config: bool = False,
    any_base: bool = False,
    overwrite: bool = False,
) -> AdapterConversion:
    """Convert a PEFT adapter directory to a LoRA adapter file for llama.cpp, with factors in float32.

    If llama.cpp loads the file with the default scale of 1, llama.cpp adds the same ΔW as PEFT. In layers
    whose scale is multiplied into lora_b, rounding may change ΔW slightly. The file stores the digest of the
    base model's norm weights, if known. See `nplora.adapters` for the arguments and the other errors.

    Raises:
        ValueError: `path` does not end in .gguf, or is a file of the adapter or of the base model.
        FileExistsError: `path` is a file that is not an adapter.
        UnsupportedError: the adapter has DoRA or fully trained layers, or nplora does not know the base
            model's family.

    >>> print(nplora.adapter_to_gguf("adapter", "adapter.gguf", base="model.gguf"))
    adapter.gguf: 14 layers of llama, alpha 16
    """
    files.require_named("convert", directory=directory)
    model = _base_of(path, directory, base, any_base, overwrite)
    adapter = peft_files.read(directory, _target(model, model.family), edited_config, any_base)
    return _write(adapter, path, model, any_base)


def save(
    adapter: AdapterContent, path: StrPath, base: StrPath, any_base: bool, overwrite: bool
) -> AdapterConversion:
    """Write an adapter in memory as a llama.cpp file, as `adapter_to_gguf` does."""
    model = _base_of(path, None, base, any_base, overwrite)
    _target(model, model.family).check(adapter, any_base)
    return _write(adapter, path, model, any_base)


def _base_of(
    path: StrPath, adapter: StrPath | None, base: StrPath, any_base: bool, overwrite: bool
) -> BaseModel:
    """Check that `path` may be written, then read the base model's family, shapes and digest."""
    files.require_named("convert", path=path, base=base)
    if files.suffix(path) != ".gguf":
        raise ValueError(f"convert: the output must end in .gguf, got {files.name(path)!r}")
    if Path(path).is_file() and Path(path).stat().st_size and not _is_adapter(path):
        reason = "the file exists and is not an adapter; choose another name"
        raise FileExistsError(errno.EEXIST, reason, files.name(path))
    _require_not_read([path], adapter, base)
    files.require_new(path, overwrite)
    return base_model.read(base, any_base)


def _is_adapter(path: StrPath) -> bool:
    try:
        return gguf_adapter.is_adapter(gguf.open(path))
    except FormatError:
        return False


def _write(adapter: AdapterContent, path: StrPath, model: BaseModel, any_base: bool) -> AdapterConversion:
    """Write an adapter that already passed the checks of `_target`."""
    wanted = {name: delta.scale * delta.rank for name, delta in adapter.items()}
    alpha = _common_alpha(wanted.values())
    folded = tuple(name for name in adapter if wanted[name] != alpha)
    pairs = dict[str, Pair]()
    for name, delta in adapter.items():
        where = f"{adapter.source}: {name}"
        lora_a, lora_b = letters.to_peft(delta.A, delta.B, delta.embedding)
        if heads := model.permuted_heads(name):
            lora_b = gguf_rows.interleave(lora_b, heads)
        if name in folded:
            lora_b = _folded(where, lora_b, wanted[name] / _rounded(alpha))
        pair = Pair(_float32(where, lora_a), _float32(where, lora_b))
        pairs[model.family.gguf_tensor(f"{name}.weight") or ""] = pair
    digest = model.digest or (None if any_base else adapter.base_digest)
    architecture, tokens = model.family.architecture, adapter.invocation_tokens
    stored = GgufAdapter(architecture, alpha, pairs, (), digest, tokens, chat_template=adapter.chat_template)
    gguf_adapter.save(path, stored)
    return AdapterConversion(files.name(path), model.family.architecture, tuple(adapter), alpha, folded)


def _common_alpha(wanted: Iterable[float]) -> float:
    """The most common alpha of the layers. The result is never 0, which llama.cpp reads as a scale of 1."""
    usable = [alpha for alpha in wanted if _LEAST_ALPHA <= abs(_rounded(alpha)) < math.inf]
    return Counter(usable).most_common(1)[0][0] if usable else 1.0


def _rounded(alpha: float) -> float:
    """`alpha` rounded to float32, as the file stores it."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(alpha))


def _folded(where: str, lora_b: Array, factor: float) -> Array:
    with np.errstate(over="ignore"):
        product = (lora_b.astype(np.float64) * factor).astype(np.float32)
    if not np.isfinite(product).all():
        raise FormatError(
            f"{where}: lora_B times {factor:g} (the ratio of the alphas) exceeds the range of float32"
        )
    return product


def _float32(where: str, factor: Array) -> Array:
    with np.errstate(over="ignore"):
        converted = factor.astype(np.float32, copy=False)
    if not np.isfinite(converted).all():
        raise ValueError(f"convert: {where}: a factor holds NaN, an infinity or a value beyond float32")
    return converted


# ---- from llama.cpp ----


def adapter_from_gguf(
    path: StrPath,
    directory: StrPath,
    base: StrPath | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    any_base: bool = False,
) -> AdapterConversion:
    """Convert a llama.cpp LoRA adapter file to a PEFT adapter directory. ΔW does not change.

    Args:
        base_model_name_or_path: the name of the base model, to be stored with the adapter. See
            `nplora.adapters` for the other arguments and errors.
    Raises:
        ValueError: an output file is the source adapter or a file of the base model.
        FileExistsError: the directory holds a model or a training run.
        UnsupportedError: the factors are quantised, or nplora does not know the model's family.

    >>> done = nplora.adapter_to_gguf("adapter", "adapter.gguf", base="model.gguf")
    >>> print(nplora.adapter_from_gguf("adapter.gguf", "converted", base="model.gguf"))
    converted: 14 layers of llama, alpha 16
    """
    files.require_named("convert", path=path, base=base)
    require_no_other(directory, overwrite)
    _require_not_read(peft_adapter.files_of(directory), path, base)
    adapter, stored = read(path, base, any_base)
    adapter.base_model_name_or_path = base_model_name_or_path
    peft_files.save(adapter, directory)
    alpha = float(peft_files.config_of(adapter).lora_alpha)
    return AdapterConversion(
        files.name(directory), stored.architecture, tuple(adapter), alpha, passed_over=stored.passed_over
    )


def read(path: StrPath, base: StrPath | None, any_base: bool = False) -> tuple[AdapterContent, GgufAdapter]:
    """Read a llama.cpp adapter file.

    Returns the adapter twice: with the layer names and row order of PEFT, and as the file stores it.

    The arguments and errors are those of `adapter_from_gguf`.
    """
    stored, source = gguf_adapter.load(path), files.name(path)
    family = families.by_architecture(source, stored.architecture)
    model = None if base is None else base_model.read(base, any_base)
    if model is not None and model.family.architecture != stored.architecture:
        raise FormatError(
            f"{source}: the adapter is for {stored.architecture}, but {model.source} is "
            f"{model.family.architecture}"
        )
    target, problems, deltas = _target(model, family), list[str](), dict[str, LoraDelta]()
    for tensor, pair in stored.pairs.items():
        layer = tensor.removesuffix(".weight")
        name, embedding = family.hf_layer(layer), tensor == EMBEDDING
        with collecting(problems):
            if name is None or layer == tensor:
                raise FormatError(f"{brief(tensor)}: {stored.architecture} has no layer of this name")
            shape = letters.weight_shape(pair.lora_a.shape, pair.lora_b.shape, embedding)
            target.place_of(name, shape, embedding, False)
            if model is None and family.permuted_heads(name, 1, 1):
                raise ValueError(
                    f"{source}: the order of the rows of {tensor} depends on the number of heads; "
                    "name the base model with --base MODEL (base)"
                )
            heads = 0 if model is None else model.permuted_heads(name)
            lora_b = gguf_rows.deinterleave(pair.lora_b, heads) if heads else pair.lora_b
            a, b = letters.from_peft(pair.lora_a, lora_b, embedding)
            alpha = stored.alpha or pair.rank
            deltas[name] = LoraDelta.of_alpha(a, b, alpha, False, None, embedding)
    adapter = AdapterContent(source, deltas, task_type="CAUSAL_LM", base_digest=stored.base_digest)
    adapter.invocation_tokens, adapter.chat_template = stored.invocation_tokens, stored.chat_template
    target.require(adapter, problems, any_base)
    if model is not None:
        adapter.base_digest = model.digest or (None if any_base else stored.base_digest)
    return adapter, stored
