"""LoRA adapters of language models from PEFT's directory to llama.cpp's file and back, without the model.

Both call the factors lora_a, which is this project's B, and lora_b, its A. Three things differ:

    names      PEFT's "model.layers.0.self_attn.q_proj" is "blk.0.attn_q.weight"
    rows       in architecture llama, the rows of q and k, and so those of their lora_b, are permuted
    scale      PEFT has alpha / r or, with rsLoRA, alpha / sqrt(r), and alpha and r may differ by layer;
               llama.cpp has alpha / r with one alpha, and takes alpha = 0 for a scale of 1. What that cannot
               say is folded into lora_b.
"""

import contextlib
import dataclasses
import errno
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.checkpoint import require_no_other
from nplora.formats import (
    base_model,
    files,
    gguf,
    gguf_adapter,
    gguf_names,
    model_digest,
    model_directory,
    peft_adapter,
    peft_config,
)
from nplora.formats.base_model import BaseModel
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted, in_places
from nplora.formats.files import StrPath
from nplora.formats.gguf_adapter import GgufAdapter, Pair
from nplora.formats.peft_adapter import EMBEDDING, LINEAR, MAGNITUDE, PREFIX, PeftAdapter
from nplora.formats.peft_config import Patterns, PeftConfig

Array = NDArray[Any]

_LEAST_ALPHA = 2.0**-126  # smaller ones lose digits in float32


@dataclass(frozen=True)
class AdapterConversion:
    """What a conversion wrote.

    Attributes:
        target: the file or directory.
        architecture: GGUF's name for the base model's family.
        layers: the adapted layers, by PEFT's names.
        alpha: the one of the new adapter (of most layers, where they differ).
        folded: the layers whose scale was folded into lora_b.
        passed_over: the source's tensors that are no factors; llama.cpp does not use them either.
    """

    target: str
    architecture: str
    layers: tuple[str, ...]
    alpha: float
    folded: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        layers = counted(len(self.layers), "layer")
        lines = [f"{self.target}: {layers} of {self.architecture}, alpha {self.alpha:g}"]
        if self.folded:
            lines.append(f"the scale of {counted(len(self.folded), 'layer')} is folded into lora_b")
        if self.passed_over:
            lines.append(f"passed over: {', '.join(map(brief, self.passed_over))}")
        return "\n".join(lines)


def convert_adapter(
    source: StrPath,
    target: StrPath,
    base: StrPath | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> AdapterConversion:
    """`adapter_to_gguf` of a directory, `adapter_from_gguf` of a file: what the command does.

    Args:
        overwrite: also in the place of another adapter.
    Raises:
        ValueError: base is needed, or the target is not named as what it will be.
        FormatError: the directory is that of no adapter, and of no model either.
        FileNotFoundError: it is that of a run without an adapter. The rest as these two.
    """
    files.require_named("convert", source=source, target=target, base=base)
    if Path(source).is_dir():
        configs = (model_directory.CONFIG, peft_adapter.CONFIG)
        if not any(Path(source, name).exists() for name in configs):
            peft_adapter.require_finished(source)
            raise FormatError(f"{files.name(source)}: holds neither {configs[0]} nor {configs[1]}")
        if base is None:
            raise ValueError(
                f"convert: {files.name(source)}: the model that it is for is needed: base, --base MODEL"
            )
        return adapter_to_gguf(source, target, base, any_base=any_base, overwrite=overwrite)
    if files.suffix(target) in (".gguf", ".safetensors") and Path(source).exists():
        raise ValueError(
            f"convert: {files.name(source)} is a file, and of files only GGUF adapters are converted, "
            f"to a directory; got the file name {files.name(target)!r}"
        )
    return adapter_from_gguf(source, target, base, overwrite=overwrite, any_base=any_base)


# ---- PEFT to llama.cpp ----


def adapter_to_gguf(
    directory: StrPath,
    path: StrPath,
    base: StrPath,
    edited_config: bool = False,
    any_base: bool = False,
    overwrite: bool = False,
) -> AdapterConversion:
    """Write a PEFT adapter directory as a LoRA adapter file for llama.cpp, with factors in float32.

    llama.cpp, with a user's scale of 1, adds the ΔW that PEFT adds, but for the rounding of one float32
    factor where a scale is folded.

    Args:
        base: the model that the adapter is for: its config.json, the directory with that, or its GGUF file,
            against which names and shapes are checked too. The file keeps the digest of its norms, if they
            are there.
        edited_config: as in `load_adapter`.
        any_base: as in `load_adapter`; the new adapter is then one of base.
        overwrite: also in the place of another adapter.
    Raises:
        ValueError: a path is empty, or path is no .gguf file, or it is a file of the adapter or of base.
        FileExistsError: it is that of a model, or there is a file and `overwrite` is not set.
        UnsupportedError: the adapter has DoRA or layers trained whole, which llama.cpp's file cannot say, or
            the base model is not of a known family.
        FormatError: a file breaks its format, does not fit, all that does not fit is listed, or is of another
            model.
        CorruptError: the directory's adapter_config.json was edited.
        OSError: a file cannot be read, or the disk refuses.
    """
    files.require_named("convert", directory=directory, path=path, base=base)
    _require_no_model(path)
    _require_not_read([path], directory, base)
    files.require_new(path, overwrite)
    model = base_model.read(base, any_base)
    with peft_adapter.reading(directory) as adapter:
        if not edited_config:
            adapter.require_pair()
        _require_plain_lora(adapter)
        problems: list[str] = []
        pairs: dict[str, Pair] = {}
        for name, halves in adapter.factors(problems).items():
            with _collecting(problems):
                pairs[name] = _pair_for_gguf(adapter, name, halves, model)
    told = adapter.config.base_model_name_or_path, adapter.base_digest, model.digest
    _require_fit(adapter.directory, model.source, problems, pairs, told, any_base)
    wanted = {name: adapter.config.scale(name) * pair.rank for name, pair in pairs.items()}
    alpha = _common_alpha(wanted.values())
    folded = tuple(name for name in pairs if wanted[name] != alpha)
    for name in folded:
        pairs[name] = _folded(f"{adapter.directory}: {name}", pairs[name], wanted[name] / _rounded(alpha))
    stored = {f"{gguf_names.to_gguf(name)}.weight": pair for name, pair in pairs.items()}
    digest = model.digest or (None if any_base else adapter.base_digest)
    gguf_adapter.save(path, GgufAdapter(model.architecture, alpha, stored, base_digest=digest))
    return AdapterConversion(files.name(path), model.architecture, tuple(pairs), alpha, folded)


def _require_no_model(path: StrPath) -> None:
    """Refuse a name that is no GGUF file's, or a file there that is no adapter."""
    if files.suffix(path) != ".gguf":
        raise ValueError(f"convert: an adapter becomes a .gguf file, got {files.name(path)!r}")
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return
    try:
        is_adapter = gguf_adapter.is_adapter(gguf.open(path))
    except FormatError:
        is_adapter = False
    if not is_adapter:
        reason = "the file is no adapter, and is left as it is: name another one"
        raise FileExistsError(errno.EEXIST, reason, files.name(path))


def _require_plain_lora(adapter: PeftAdapter) -> None:
    config = adapter.config
    if config.use_dora or any(name.endswith(MAGNITUDE) for name in adapter.tensors):
        raise UnsupportedError(
            f"{adapter.directory}: DoRA rescales the rows of W + ΔW, and llama.cpp only adds ΔW to W: "
            "merge the adapter into the model instead"
        )
    if config.modules_to_save:
        names = ", ".join(map(brief, config.modules_to_save))
        raise UnsupportedError(
            f"{adapter.directory}: trained whole: {names}; llama.cpp's adapters hold low-rank factors alone"
        )


def _pair_for_gguf(adapter: PeftAdapter, name: str, halves: tuple[str, str], model: BaseModel) -> Pair:
    stored, is_embedding = gguf_names.to_gguf(name), halves[0].endswith(EMBEDDING[0])
    if stored is None or is_embedding != (stored == gguf_names.TOKEN_EMBEDDING):
        raise FormatError(f"{brief(name)}: no layer of this kind and name is known in {model.architecture}")
    shape_a, shape_b = (adapter.tensors.entries[half].shape for half in halves)
    adapter.require_rank(name, halves)
    shape = (shape_a[1], shape_b[0]) if is_embedding else (shape_b[0], shape_a[1])
    _require_shape(name, f"{stored}.weight", shape, model)
    lora_a, lora_b = (adapter.factor(half) for half in halves)
    heads = _heads(name, stored, len(lora_b), model)
    if heads:
        lora_b = gguf_names.interleave(lora_b, heads)
    return Pair(lora_a.T if is_embedding else lora_a, lora_b)


def _common_alpha(wanted: Iterable[float]) -> float:
    """The alpha that gives most layers their scale. It is never 0, which llama.cpp takes for a scale of 1."""
    usable = [alpha for alpha in wanted if _LEAST_ALPHA <= abs(_rounded(alpha)) < math.inf]
    return Counter(usable).most_common(1)[0][0] if usable else 1.0


def _rounded(alpha: float) -> float:
    """As the file holds it."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(alpha))


def _folded(where: str, pair: Pair, factor: float) -> Pair:
    with np.errstate(over="ignore"):
        lora_b = (pair.lora_b.astype(np.float64) * factor).astype(np.float32)
    if not np.isfinite(lora_b).all():
        raise FormatError(f"{where}: lora_B times {factor:g}, which its scale needs, is beyond float32")
    return Pair(pair.lora_a, lora_b)


# ---- llama.cpp to PEFT ----


def adapter_from_gguf(
    path: StrPath,
    directory: StrPath,
    base: StrPath | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    any_base: bool = False,
) -> AdapterConversion:
    """Write llama.cpp's LoRA adapter file as a PEFT adapter directory. ΔW stays the same.

    Args:
        base: as in `adapter_to_gguf`; needed where rows are permuted, for the number of heads.
        base_model_name_or_path: what the adapter says about the model that it belongs to.
        overwrite: also in the place of another adapter.
        any_base: as in `adapter_to_gguf`.
    Raises:
        ValueError: a path is empty, or base is needed, or a file to be written is the adapter or of base.
        FileExistsError: the directory holds a model or a run; or an adapter, and `overwrite` is not set.
        UnsupportedError: another kind of adapter, quantised factors, or a family that is not known.
        FormatError: a file breaks its format, does not fit, all that does not fit is listed, or is of another
            model.
        OSError: a file cannot be read, or the disk refuses.
    """
    files.require_named("convert", path=path, base=base)
    require_no_other(directory, overwrite)
    _require_not_read(peft_adapter.files_of(directory), path, base)
    adapter, layers = read_gguf_adapter(path, base, any_base)
    ranks = {layer.name: adapter.pairs[stored].rank for stored, layer in layers.items()}
    config = _config(adapter.alpha, ranks, base_model_name_or_path)
    tensors = {
        PREFIX + layer.name + suffix: a for layer in layers.values() for suffix, a in layer.factors.items()
    }
    peft_adapter.save(directory, config, tensors, adapter.base_digest)
    return AdapterConversion(
        files.name(directory),
        adapter.architecture,
        tuple(ranks),
        config.lora_alpha,
        passed_over=adapter.passed_over,
    )


@dataclass(frozen=True, eq=False)
class PeftLayer:
    """A layer's name and factors as PEFT has them: suffix of the tensor's name -> array."""

    name: str
    factors: dict[str, Array]


def read_gguf_adapter(
    path: StrPath, base: StrPath | None, any_base: bool = False
) -> tuple[GgufAdapter, dict[str, PeftLayer]]:
    """llama.cpp's adapter file, as one of base, and its layers as PEFT has them by the names of the tensors.

    Arguments and errors are those of `adapter_from_gguf`.
    """
    adapter, source = gguf_adapter.load(path), files.name(path)
    if adapter.architecture not in gguf_names.ARCHITECTURES.values():
        raise UnsupportedError(f"{source}: the layers of {brief(adapter.architecture)} are not known")
    model = None if base is None else base_model.read(base, any_base)
    if model is not None and model.architecture != adapter.architecture:
        raise FormatError(f"{source}: is for {adapter.architecture}, {model.source} is {model.architecture}")
    problems: list[str] = []
    layers: dict[str, PeftLayer] = {}
    for stored in adapter.pairs:
        with _collecting(problems):
            layers[stored] = _layer_for_peft(source, adapter, stored, model)
    target, digest = ("its architecture", None) if model is None else (model.source, model.digest)
    _require_fit(source, target, problems, layers, (None, adapter.base_digest, digest), any_base)
    known = None if any_base and model is not None else adapter.base_digest
    return dataclasses.replace(adapter, base_digest=digest or known), layers


def _layer_for_peft(source: str, adapter: GgufAdapter, stored: str, model: BaseModel | None) -> PeftLayer:
    pair, layer = adapter.pairs[stored], stored.removesuffix(".weight")
    name = gguf_names.from_gguf(layer)
    if name is None or layer == stored:
        raise FormatError(f"{brief(stored)}: no layer of this name is known in {adapter.architecture}")
    is_embedding = layer == gguf_names.TOKEN_EMBEDDING
    lora_a, lora_b = pair.lora_a.T if is_embedding else pair.lora_a, pair.lora_b
    if model is not None:
        shape = (lora_a.shape[1], len(lora_b)) if is_embedding else (len(lora_b), lora_a.shape[1])
        _require_shape(name, stored, shape, model)
        heads = _heads(name, layer, len(lora_b), model)
        if heads:
            lora_b = gguf_names.deinterleave(lora_b, heads)
    elif gguf_names.is_permuted(adapter.architecture, layer):
        raise ValueError(
            f"{source}: the rows of {stored} are permuted by heads: base (--base MODEL), which "
            "tells their number, is needed"
        )
    suffixes = EMBEDDING if is_embedding else LINEAR
    return PeftLayer(name, dict(zip(suffixes, (lora_a, lora_b), strict=True)))


def _config(alpha: float, ranks: dict[str, int], base: str | None) -> PeftConfig:
    """alpha / r is the scale of every layer; where llama.cpp has no alpha, r / r."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return PeftConfig(
        r=r,
        lora_alpha=peft_config.short_number(alpha or r),
        target_modules=tuple(ranks),
        rank_pattern=Patterns.exact(dict(others)),
        alpha_pattern=Patterns.exact({} if alpha else dict(others)),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


# ---- both ways ----


def _require_not_read(outputs: Iterable[StrPath], adapter: StrPath, base: StrPath | None) -> None:
    inputs = [("adapter", path) for path in peft_adapter.files_of(adapter)]
    if base is not None:
        inputs += [("base", path) for path in model_directory.files_of(base)]
    files.require_not_read("convert", outputs, inputs)


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Go on after what does not fit: all of it is listed at the end."""
    try:
        yield
    except FormatError as error:
        problems.append(str(error))


def _require_fit(
    source: str,
    target: str,
    problems: list[str],
    layers: Sized,
    bases: tuple[str | None, str | None, str | None],
    any_base: bool,
) -> None:
    """Args: bases: as `model_digest.refusal` takes them."""
    if problems:
        subject = model_digest.subject(*bases)
        raise FormatError(f"{source}: {subject} does not fit {target} {in_places(problems)}")
    if not any_base and (refusal := model_digest.refusal(*bases)):
        raise FormatError(f"{source}: {refusal}")
    if not layers:
        raise FormatError(f"{source}: the adapter holds no factors")


def _require_shape(name: str, stored: str, shape: tuple[int, ...], model: BaseModel) -> None:
    if model.shapes is None:
        return
    if stored not in model.shapes:
        raise FormatError(f"{brief(name)}: {model.source} has no tensor {stored}")
    if model.shapes[stored] != shape:
        raise FormatError(f"{brief(name)}: for a weight {shape}, and {stored} is {model.shapes[stored]}")


def _heads(name: str, layer: str, rows: int, model: BaseModel) -> int | None:
    """The number of heads by which the rows of lora_b are permuted in GGUF, if they are."""
    heads = model.permuted_heads(layer)
    if heads is not None and rows % (2 * heads):
        raise FormatError(f"{brief(name)}: {rows} rows do not make {heads} heads of pairs of rows")
    return heads
