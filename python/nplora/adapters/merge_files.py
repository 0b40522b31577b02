"""An adapter merged into a model's file: a block of rows at a time, while the new file is written."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import Place, Target
from nplora.adapters.merge_report import ModelMerge, least_kept
from nplora.adapters.sources import Source
from nplora.formats import (
    bitsandbytes,
    files,
    gguf,
    model_directory,
    peft_adapter,
    safetensors,
)
from nplora.formats.errors import brief
from nplora.formats.files import Chunk, StrPath
from nplora.formats.output_directory import trained
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import Merge, MergeReport
from nplora.models import model_digest, model_files
from nplora.models.model_files import ModelFiles, Stream, Tensor, is_directory, weights_path
from nplora.weights import storages
from nplora.weights.nonfinite import require_finite

Array = NDArray[Any]

_ENOUGH = 0.9  # of the adapter's ΔW: less is refused, unless it is asked for
_SAMPLED_ELEMENTS = 1 << 20  # of all tensors together, to estimate what another storage would keep
_LEAST_SAMPLED = 1 << 14  # of each tensor
# FrozenWeight's words for how the elements of a file's tensors are stored
_STORAGES = {kind: name for name, kind in storages.GGML_NAMES.items()} | {s: s for s in storages.FLOATS}


def merge_adapter(
    base: StrPath,
    adapter: Source,
    output: StrPath,
    dtype: str = "same",
    any_base: bool = False,
    overwrite: bool = False,
    lossy: bool = False,
) -> ModelMerge:
    """Write a model with an adapter merged into it: W + ΔW from float32 sums, every other byte as it was.

    No weight is held as a whole: each is read, summed, stored and compared a block of rows at a time. The
    file is complete on the disk before it takes its name.

    Args:
        base: a GGUF file, a safetensors file or index, or a Hugging Face directory.
        adapter: a PEFT directory, llama.cpp's file or an `Adapter`; DoRA too.
        output: a file of the base's kind; of a directory also a directory, which then gets the base's
            configuration and tokenizer too. Never the base itself.
        dtype: the storage of the merged weights: "same", or one of `FrozenWeight`'s that the file's kind has.
        any_base: as `nplora.adapters` says.
        overwrite: replace other files.
        lossy: write the model even if rounding leaves less than 90 % of the adapter's ΔW in it.
    Returns:
        what was written, with a report of how much of ΔW survived the rounding of each weight.
    Raises:
        FormatError: as `nplora.adapters` says, also for weights in blocks that are not decoded here; or a
            weight to be merged into holds NaN or an infinity. UnsupportedError: one is in bitsandbytes' NF4.
        UnsafeError: a file beside the base's weights is a link out of the model.
        CorruptError: another program wrote to the base meanwhile.
        ValueError: output or dtype is not of the base's kind, output is the base or the adapter or has an
            index of other weights, a sum is too large for the storage, or (without `lossy`) the storage would
            keep less than 90 % of ΔW; the message names the smallest storage that keeps more. Nothing is
            written.
        FileExistsError: output is, or lies in, a directory with an adapter or a run (a .gguf file may lie
            there); or a file is there and `overwrite` is not set.
    """
    files.require_named("merge", base=base, output=output)
    model = model_files.open(base)
    _require_output(model, base, adapter, output)
    facts = base if Path(base).is_dir() or model.suffix == ".gguf" else None
    updates = _placed(model, sources.low_rank(adapter, facts, any_base=any_base), dtype, any_base)
    merges = {
        name: _merge(model.tensors[name], name, update, dtype)
        for name, update in updates.items()
        if dtype != "same" or not update.is_zero
    }
    for name in merges:
        require_finite(model.source, model.tensors[name])
    streams = {name: _stream(model, merge) for name, merge in merges.items()}
    with _new_directory(Path(output)) if is_directory(output) else contextlib.nullcontext():
        new = model.new_files(output, {**model.tensors, **streams})
        for file in new:
            files.require_new(file.path, overwrite)
        files.require_not_read("merge", [file.path for file in new], _inputs(model, base, adapter))
        # When the last byte is made, every merge is done and no file is in place yet.
        checked = _checked(new[-1].chunks, model, merges, lossy)
        new[-1] = dataclasses.replace(new[-1], chunks=checked)
        files.replace(new)
    reports = tuple(
        merges[name].report if name in merges else _unchanged(name, model.tensors[name]) for name in updates
    )
    nbytes = sum(file.nbytes for file in new)
    return ModelMerge(files.name(output), reports, len(model.tensors) - len(reports), nbytes)


# ---- how much is kept ----


def _checked(
    chunks: Iterable[Chunk], model: ModelFiles, merges: Mapping[str, Merge], lossy: bool
) -> Iterator[Chunk]:
    """The chunks, and then a check that the base stayed as it was and that enough of ΔW is kept."""
    yield from chunks
    for stamp in model.mapped:
        stamp.require_unchanged()
    if not lossy:
        _require_kept(model, merges)


def _require_kept(model: ModelFiles, merges: Mapping[str, Merge]) -> None:
    """Raise ValueError if too little of ΔW is kept; it names the smallest storage that keeps enough."""
    kept = least_kept(merge.report for merge in merges.values())
    if kept >= _ENOUGH:
        return
    kinds = ", ".join(dict.fromkeys(merge.storage for merge in merges.values()))
    enough = _smallest_that_keeps(model, merges)
    remedy = (
        f"--dtype {enough[0]} keeps about {enough[1]:.0%}" if enough else "no other storage type keeps that"
    )
    raise ValueError(
        f"merge: {kinds} would keep {kept:.1%} of the adapter's change (ΔW), expected at least "
        f"{_ENOUGH:.0%}; {remedy}; --lossy (lossy=True) merges nevertheless"
    )


def _smallest_that_keeps(model: ModelFiles, merges: Mapping[str, Merge]) -> tuple[str, float] | None:
    """The smallest storage above the present one that keeps enough of ΔW, and about how much it keeps."""
    shapes = [merge.shape for merge in merges.values()]

    def size(storage: str) -> int:
        return sum(rows * storages.row_nbytes(storage, d_in) for rows, d_in in shapes)

    fitting = [name for name in _storages(model) if all(storages.fits(name, d_in) for _, d_in in shapes)]
    present = sum(merge.nbytes for merge in merges.values())
    for storage in sorted(fitting, key=size):
        if size(storage) > present or (size(storage) == present and storage in storages.FLOATS):
            kept = _estimated_kept(model, {name: merge.update for name, merge in merges.items()}, storage)
            if kept >= _ENOUGH:
                return storage, kept
    return None


def _estimated_kept(model: ModelFiles, updates: Mapping[str, LoraDelta], storage: str) -> float:
    """`least_kept` as evenly spaced rows of each tensor show it; 0 if a sum is too large for the storage."""
    elements = max(_LEAST_SAMPLED, _SAMPLED_ELEMENTS // len(updates))
    reports = []
    for name, update in updates.items():
        count = max(1, elements // max(1, update.shape[1]))
        rows = np.arange(0, len(update.A), max(1, -(-len(update.A) // count)))
        merge = _merge(model.tensors[name], name, update, storage, rows)
        try:
            for _ in merge.rows():
                pass
        except ValueError:
            return 0.0
        reports.append(merge.report)
    return least_kept(reports)


# ---- where it goes ----


def _require_output(model: ModelFiles, base: StrPath, adapter: Source, output: StrPath) -> None:
    if Path(base).is_dir() and is_directory(output):
        files.require_directory(output)
    elif files.suffix(output) != model.suffix:
        hint = "" if model.suffix == ".gguf" else "; nplora convert makes GGUF of safetensors"
        raise ValueError(
            f"merge: {model.source} becomes a {model.suffix} file, got {files.name(output)!r}{hint}"
        )
    weights = weights_path(output)
    files.require_not_read("merge", [output, weights], _inputs(model, base, adapter))
    found = trained(weights.parent)
    if found is not None and model.suffix != ".gguf":  # a file of whatever name would be taken for theirs
        reason = f"the directory holds {found}; name another one"
        raise FileExistsError(errno.EEXIST, reason, files.name(weights.parent))
    index = weights.with_name(model_directory.INDEX)
    if weights.name == model_directory.WEIGHTS and index.exists():
        raise ValueError(f"merge: {index} lists other weights than those to be written beside it")


def _inputs(model: ModelFiles, base: StrPath, adapter: Source) -> list[tuple[str, StrPath]]:
    """The files that are read, and the directories that they are in."""
    of_base = (base, model.source, *model.shards, *model_directory.files_of(base))
    of_adapter = (adapter, *peft_adapter.files_of(adapter)) if isinstance(adapter, str | os.PathLike) else ()
    return [("base", path) for path in of_base] + [("adapter", path) for path in of_adapter]


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[None]:
    """A directory that is gone again, if it is new, where the body fails."""
    is_new = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if is_new:
                path.rmdir()
        raise


# ---- what goes where ----


def _placed(model: ModelFiles, adapter: AdapterContent, dtype: str, any_base: bool) -> dict[str, LoraDelta]:
    """The updates by the names of the model's tensors, with their rows in the order of the file."""
    if dtype not in (possible := ("same", *_storages(model))):
        words = ", ".join(map(repr, possible))
        raise ValueError(f"merge: dtype={dtype!r} is not available in {model.suffix}; possible: {words}")
    places = {layer: model.place(layer, delta.shape[0]) for layer, delta in adapter.items()}
    for name, _ in places.values():
        if name is not None:
            bitsandbytes.refuse(model.tensors, name, model.source, "merge into")
    _target(model).check(adapter, any_base)
    deltas = {name: adapter[layer].rows(order) for layer, (name, order) in places.items() if name is not None}
    _require_blocks(model, deltas, dtype)
    return {name: deltas[name] for name in model.tensors if name in deltas}


def _target(model: ModelFiles) -> Target:
    taken: dict[str, str] = {}

    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        name, _ = model.place(layer, shape[0])
        if model.tied and layer.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            return "the model's output shares the weight of its embedding, which would change both"
        if name is None:
            return "no tensor of this layer"
        if (other := taken.setdefault(name, layer)) != layer:
            return f"{name} is the tensor of {brief(other)} too"
        tensor = model.tensors[name]
        if tensor.shape == shape and _kind(tensor) not in _STORAGES:
            return f"{name} is {_kind(tensor)}, which is not decoded here"
        return Place(name, tensor.shape)

    return Target(model.source, place, model_digest.of_tensors(model.tensors, model.family))


def _require_blocks(model: ModelFiles, updates: Mapping[str, LoraDelta], dtype: str) -> None:
    """Refuse a dtype whose blocks do not fill the rows, and name those that do."""
    rows = {update.shape[1]: name for name, update in updates.items()}
    short = [d_in for d_in in rows if dtype != "same" and not storages.fits(dtype, d_in)]
    if short:
        fitting = [name for name in _storages(model) if all(storages.fits(name, d_in) for d_in in rows)]
        raise ValueError(
            f"merge: dtype {dtype} needs rows of whole blocks of {storages.block_elements(dtype)}, "
            f"and {rows[short[0]]} has rows of {short[0]}; possible: {', '.join(('same', *fitting))}"
        )


def _storages(model: ModelFiles) -> tuple[str, ...]:
    """The storages that the model's kind of file has."""
    return tuple(storages.GGML_NAMES if model.suffix == ".gguf" else storages.FLOATS)


def _stream(model: ModelFiles, merge: Merge) -> Stream:
    def chunks() -> Iterator[memoryview]:
        return (raw.reshape(-1).data for _, raw in merge.rows())

    if model.suffix == ".gguf":
        return gguf.Stream(storages.GGML_NAMES[merge.storage], merge.shape, chunks)
    return safetensors.Stream(merge.storage, merge.shape, chunks)


def _bytes(tensor: Tensor) -> Array:
    return tensor.data if isinstance(tensor, gguf.Tensor) else tensor.array.reshape(-1).view(np.uint8)


def _kind(tensor: Tensor) -> str:
    return tensor.type if isinstance(tensor, gguf.Tensor) else tensor.dtype


def _unchanged(name: str, tensor: Tensor) -> MergeReport:
    return MergeReport.unchanged(name, _STORAGES[_kind(tensor)], tensor.nbytes)


def _merge(tensor: Tensor, name: str, update: LoraDelta, dtype: str, sample: Array | None = None) -> Merge:
    """The merge of a tensor, or of a sample of its rows."""
    storage = _STORAGES[_kind(tensor)]
    d_out, d_in = update.shape
    rows = _bytes(tensor).reshape(d_out, storages.row_nbytes(storage, d_in))
    if sample is not None:
        rows, update = rows[sample], update.rows(sample)
    return Merge(
        name,
        update.shape,
        lambda first, last: storages.decode(rows[first:last], storage, d_in),
        update,
        storage if dtype == "same" else dtype,
    )
