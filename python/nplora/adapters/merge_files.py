"""An adapter merged into a model's file: a block of rows at a time, while the new file is written."""

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nplora import storages
from nplora.adapters.adapter import Adapter, read_adapter
from nplora.adapters.fitting import Place, Target
from nplora.checkpoint import trained
from nplora.formats import (
    base_model,
    bitsandbytes,
    files,
    gguf,
    gguf_names,
    model_digest,
    model_directory,
    peft_adapter,
    safetensors,
)
from nplora.formats.config_json import read_fields
from nplora.formats.errors import counted
from nplora.formats.files import Chunk, NewFile, Stamp, StrPath
from nplora.formats.gguf import file_type
from nplora.formats.gguf.header import MAGIC
from nplora.formats.sharded import ShardedFile
from nplora.merging import LoraDelta, Merge, MergeReport, weighted_mean
from nplora.nonfinite import require_finite

Array = NDArray[Any]
Tensor: TypeAlias = "gguf.Tensor | safetensors.Tensor"

_TOLD = 3  # tensors in a summary
_FINER = dict.fromkeys(storages.BLOCKS, "q8_0") | {
    "q8_0": "float16", "bfloat16": "float16", "float16": "float32", "float32": None, "float64": None,
}  # fmt: skip
_LITTLE = 0.5  # of a tensor's ΔW that rounding kept: less is worth a warning
_ENOUGH = 0.9  # of the adapter's ΔW: less is refused, unless it is asked for
_SAMPLED_ELEMENTS = 1 << 20  # of all tensors together, to estimate what another storage would keep
_LEAST_SAMPLED = 1 << 14  # of each tensor
_STORAGE_OF_GGML = {name: storage for storage, name in storages.GGML_NAMES.items()}


@dataclass(frozen=True)
class ModelMerge:
    """What `merge_adapter` wrote.

    Attributes:
        target: the file or directory.
        reports: one `MergeReport` for each merged tensor, in the order of the file.
        kept: how many tensors were copied as they are.
        nbytes: of all that was written.
    """

    target: str
    reports: tuple[MergeReport, ...]
    kept: int
    nbytes: int

    @property
    def total(self) -> MergeReport:
        """The report of all tensors together."""
        return MergeReport.of_all(self.target, self.reports)

    @property
    def delta_kept(self) -> float:
        """The share of ΔW that is there, of all tensors together."""
        return self.total.kept

    @property
    def error(self) -> float:
        """The relative error of all tensors' ΔW together."""
        return self.total.error

    @property
    def noise(self) -> float:
        """The part of that error that is orthogonal to ΔW: not what is lost, but what rounding adds."""
        return self.total.noise

    @property
    def change(self) -> float:
        """‖ΔW‖ / ‖W‖ of all merged weights together."""
        return self.total.norm / self.total.weight_norm if self.total.weight_norm else 0.0

    def table(self) -> str:
        """A line for every merged tensor."""
        return "\n".join(map(str, self.reports))

    def __str__(self) -> str:
        worst = sorted(self.reports, key=lambda report: report.kept)
        kinds = dict.fromkeys(report.storage for report in self.reports)
        noise = f"{100 * self.noise * self.change:.3g}% of the weights' size ({self.noise:.3g} times ΔW)"
        lines = [
            f"{self.target}: {self.nbytes:,} bytes, {counted(len(self.reports), 'tensor')} merged "
            f"({', '.join(kinds)}), {self.kept} copied",
            f"the merged weights keep {self.delta_kept:.1%} of the adapter's change (ΔW)",
            f"rounding adds noise in all directions, {noise}",
            "the tensors that keep the least:",
            *(f"  {report}" for report in worst[:_TOLD]),
        ]
        return "\n".join(lines)

    @property
    def warning(self) -> str:
        """Which tensor lost much of its ΔW by rounding, and what would keep more; empty if none did."""
        worst = min(self.reports, key=lambda report: report.kept)
        if worst.kept >= _LITTLE:
            return ""
        finer = _FINER[worst.storage]
        return f"rounding lost much of what {worst.name} learned ({worst.kept:.1%} of its ΔW is kept)" + (
            f": --dtype {finer} keeps more" if finer else ""
        )


def _least_kept(reports: Iterable[MergeReport]) -> float:
    """The share of ΔW that is kept in all: as `ModelMerge.delta_kept`, or less.

    There, a matrix with large numbers hides the others. So the mean is also taken with each tensor weighted
    by (‖ΔW‖ / ‖W‖)², its change relative to itself, and the smaller of the two counts.
    """
    changed = [report for report in reports if report.norm]
    kept = [report.kept for report in changed]
    norms = [report.norm for report in changed]
    relative = [report.norm / (report.weight_norm or report.norm) for report in changed]
    return min(weighted_mean(norms, kept, 1.0), weighted_mean(relative, kept, 1.0))


def merge_adapter(
    base: StrPath,
    adapter: "StrPath | Adapter",
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
        any_base: as in `load_adapter`.
        overwrite: also in the place of other files.
        lossy: write the model even if rounding leaves less than 90 % of the adapter's ΔW in it.
    Returns:
        what was written, with a report of how much of ΔW survived the rounding of each weight.
    Raises:
        FormatError: a file breaks its format, or the adapter is of another model or does not fit this one;
            all that does not fit is listed, weights in blocks that are not decoded here too. Or a weight to
            be merged into holds NaN or an infinity.
        UnsupportedError: a weight to be merged into is in bitsandbytes' 4 bits.
        UnsafeError: a file beside the base's weights is a link out of the model.
        CorruptError: another program wrote to the base meanwhile.
        ValueError: output or dtype is not of the base's kind, output is the base or the adapter or has an
            index of other weights, a sum is too large for the storage, or (without `lossy`) the storage would
            keep less than 90 % of ΔW; the message names the smallest storage that keeps more. Nothing is
            written.
        FileExistsError: output is, or lies in, a directory with an adapter or a run (a .gguf file may lie
            there); or a file is there and `overwrite` is not set.
        OSError: a file cannot be read, or the disk refuses.
    """
    files.require_named("merge", base=base, output=output)
    model = _open(base)
    _require_output(model, base, adapter, output)
    facts = base if Path(base).is_dir() or model.suffix == ".gguf" else None
    updates = _placed(model, read_adapter(adapter, facts, any_base=any_base), dtype, any_base)
    merges = {
        name: _merge(model.tensors[name], name, update, dtype)
        for name, update in updates.items()
        if dtype != "same" or not update.is_zero
    }
    for name in merges:
        require_finite(model.source, model.tensors[name])
    tensors: dict[str, Any] = {name: merges.get(name, tensor) for name, tensor in model.tensors.items()}
    with _new_directory(Path(output)) if _is_directory(output) else contextlib.nullcontext():
        new = model.new_files(output, tensors)
        for file in new:
            files.require_new(file.path, overwrite)
        files.require_not_read("merge", [file.path for file in new], _inputs(model, base, adapter))
        last = new[-1]  # when its last byte is made, every merge is done and no file is in place yet
        checked = _then(last.chunks, lambda: _require_sound(model, updates, merges, lossy))
        new[-1] = dataclasses.replace(last, chunks=checked)
        files.replace(new)
    reports = tuple(
        merges[name].report if name in merges else _unchanged(model.tensors[name], name) for name in updates
    )
    nbytes = sum(file.nbytes for file in new)
    return ModelMerge(files.name(output), reports, len(tensors) - len(reports), nbytes)


# ---- the two kinds of files ----


@dataclass(frozen=True)
class _Model:
    """A model's opened files.

    Attributes:
        place: the name of the tensor that a layer's weight is in, if there is one, and the order of its rows.
        new_files: what is to be written for these tensors, of which some are merges.
        mapped: the stamps of the files that the tensors are mapped from.
        shards: the files that the tensors are in, where the model is an index.
    """

    source: str
    suffix: str
    tensors: Mapping[str, Tensor]
    place: Callable[[str, int], tuple[str | None, Array | None]]
    new_files: Callable[[StrPath, Mapping[str, Any]], list[NewFile]]
    storages: tuple[str, ...]
    tied: bool
    mapped: tuple[Stamp, ...]
    shards: frozenset[str] = frozenset()


def _open(base: StrPath) -> _Model:
    if Path(base).is_dir():
        return _open_safetensors(base)
    with files.reading(base) as reader:
        is_gguf = bytes(reader[:4]) == MAGIC
    return _open_gguf(base) if is_gguf else _open_safetensors(base)


def _open_gguf(path: StrPath) -> _Model:
    file = gguf.open(path)
    facts = base_model.read(path) if "general.architecture" in file.metadata else None

    def place(layer: str, rows: int) -> tuple[str | None, Array | None]:
        stored = gguf_names.to_gguf(layer)
        if facts is None or stored is None:
            return _first_of(file, f"{layer}.weight", layer), None
        heads = facts.permuted_heads(stored)
        order = None if heads is None or rows % (2 * heads) else gguf_names.row_order(rows, heads)
        return _first_of(file, f"{stored}.weight"), order

    def new_files(output: StrPath, tensors: Mapping[str, Any]) -> list[NewFile]:
        content = {
            name: gguf.Stream(storages.GGML_NAMES[t.storage], t.shape, _chunks(t))
            if isinstance(t, Merge)
            else t
            for name, t in tensors.items()
        }
        return [gguf.new_file(output, content, file_type.redescribe(file.metadata.typed(), file, content))]

    tied = facts is not None and "output.weight" not in file
    kinds = tuple(storages.GGML_NAMES)
    return _Model(file.source, ".gguf", file, place, new_files, kinds, tied, file.mapped)


def _open_safetensors(base: StrPath) -> _Model:
    file = model_directory.open_tensors(base)

    def place(layer: str, rows: int) -> tuple[str | None, Array | None]:
        return _first_of(file, f"{layer}.weight", layer), None

    def new_files(output: StrPath, tensors: Mapping[str, Any]) -> list[NewFile]:
        content = {
            name: safetensors.Stream(t.storage, t.shape, _chunks(t)) if isinstance(t, Merge) else t
            for name, t in tensors.items()
        }
        metadata = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
        if not _is_directory(output):
            return [safetensors.new_file(output, content, metadata)]
        metadata.setdefault("format", "pt")  # transformers refuses a directory without it
        weights = safetensors.new_file(_weights(output), content, metadata)
        return [weights, *model_directory.companions(Path(base), Path(output))]

    tied = _is_tied(model_directory.of(base), file)
    shards = file.shards if isinstance(file, ShardedFile) else frozenset[str]()
    kinds = tuple(storages.FLOATS)
    return _Model(file.source, ".safetensors", file, place, new_files, kinds, tied, file.mapped, shards)


def _is_tied(directory: Path, names: Mapping[str, Any]) -> bool:
    """As config.json says: a tied model may have a head in its file, which nobody reads."""
    config = directory / model_directory.CONFIG
    if config.exists() and read_fields(config).boolean("tie_word_embeddings", False):
        return True
    return "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def _first_of(names: Mapping[str, Any], *candidates: str) -> str | None:
    return next((name for name in candidates if name in names), None)


def _chunks(merge: Merge) -> Callable[[], Iterator[memoryview]]:
    return lambda: (raw.reshape(-1).data for _, raw in merge.rows())


# ---- how much is kept ----


def _then(chunks: Iterable[Chunk], check: Callable[[], None]) -> Iterator[Chunk]:
    yield from chunks
    check()


def _require_sound(
    model: _Model, updates: Mapping[str, LoraDelta], merges: Mapping[str, Merge], lossy: bool
) -> None:
    """What can be known only after the last row: the base stayed as it was, and enough of ΔW is kept."""
    for stamp in model.mapped:
        stamp.require_unchanged()
    if not lossy:
        _require_kept(model, updates, merges)


def _require_kept(model: _Model, updates: Mapping[str, LoraDelta], merges: Mapping[str, Merge]) -> None:
    """Raise ValueError if too little of ΔW is kept; it names the smallest storage that keeps enough."""
    kept = _least_kept(merge.report for merge in merges.values())
    if kept >= _ENOUGH:
        return
    kinds = ", ".join(dict.fromkeys(merge.storage for merge in merges.values()))
    enough = _smallest_that_keeps(model, updates, merges)
    remedy = (
        f"--dtype {enough[0]} keeps about {enough[1]:.0%}" if enough else "no other storage type keeps that"
    )
    raise ValueError(
        f"merge: {kinds} would keep {kept:.1%} of the adapter's change (ΔW), expected at least "
        f"{_ENOUGH:.0%}; {remedy}; --lossy (lossy=True) merges nevertheless"
    )


def _smallest_that_keeps(
    model: _Model, updates: Mapping[str, LoraDelta], merges: Mapping[str, Merge]
) -> tuple[str, float] | None:
    """The smallest storage above the present one that keeps enough of ΔW, and about how much it keeps."""
    shapes = [merge.shape for merge in merges.values()]

    def size(storage: str) -> int:
        return sum(rows * storages.row_nbytes(storage, d_in) for rows, d_in in shapes)

    fitting = [name for name in model.storages if all(storages.fits(name, d_in) for _, d_in in shapes)]
    present = sum(merge.nbytes for merge in merges.values())
    for storage in sorted(fitting, key=size):
        if size(storage) > present or (size(storage) == present and storage in storages.FLOATS):
            kept = _estimated_kept(model, {name: updates[name] for name in merges}, storage)
            if kept >= _ENOUGH:
                return storage, kept
    return None


def _estimated_kept(model: _Model, updates: Mapping[str, LoraDelta], storage: str) -> float:
    """What `_least_kept` would be, from evenly spaced rows of each tensor; 0 if a sum is too large for it."""
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
    return _least_kept(reports)


# ---- where it goes ----


def _is_directory(output: StrPath) -> bool:
    return files.suffix(output) not in (".gguf", ".safetensors")


def _weights(output: StrPath) -> Path:
    return Path(output, model_directory.WEIGHTS) if _is_directory(output) else Path(output)


def _require_output(model: _Model, base: StrPath, adapter: "StrPath | Adapter", output: StrPath) -> None:
    if Path(base).is_dir() and _is_directory(output):
        files.require_directory(output)
    if files.suffix(output) != model.suffix and not (Path(base).is_dir() and _is_directory(output)):
        hint = "" if model.suffix == ".gguf" else "; nplora convert makes GGUF of safetensors"
        raise ValueError(
            f"merge: {model.source} becomes a {model.suffix} file, got {files.name(output)!r}{hint}"
        )
    weights = _weights(output)
    files.require_not_read("merge", [output, weights], _inputs(model, base, adapter))
    found = trained(weights.parent)
    if found is not None and model.suffix != ".gguf":  # a file of whatever name would be taken for theirs
        reason = f"the directory holds {found}; name another one"
        raise FileExistsError(errno.EEXIST, reason, files.name(weights.parent))
    index = weights.with_name(model_directory.INDEX)
    if weights.name == model_directory.WEIGHTS and index.exists():
        raise ValueError(f"merge: {index} tells of other weights than those to be written beside it")


def _inputs(model: _Model, base: StrPath, adapter: "StrPath | Adapter") -> list[tuple[str, StrPath]]:
    """The files that are read, and the directories that they are in."""
    of_base = (base, model.source, *model.shards, *model_directory.files_of(base))
    of_adapter = () if isinstance(adapter, Adapter) else (adapter, *peft_adapter.files_of(adapter))
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


def _placed(model: _Model, adapter: Adapter, dtype: str, any_base: bool) -> dict[str, LoraDelta]:
    """The updates by the names of the model's tensors, with their rows in the order of the file."""
    if dtype != "same" and dtype not in model.storages:
        words = ", ".join(map(repr, ("same", *model.storages)))
        raise ValueError(f"merge: dtype={dtype!r} is not available in {model.suffix}; possible: {words}")
    places = {layer: model.place(layer, delta.shape[0]) for layer, delta in adapter.items()}
    for name, _ in places.values():
        if name is not None:
            bitsandbytes.refuse(model.tensors, name, model.source, "merge into")
    _target(model).check(adapter, any_base)
    deltas = {name: adapter[layer].rows(order) for layer, (name, order) in places.items() if name is not None}
    _require_blocks(model, deltas, dtype)
    return {name: deltas[name] for name in model.tensors if name in deltas}


def _target(model: _Model) -> Target:
    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        name, _ = model.place(layer, shape[0])
        if model.tied and layer.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            return "the model's output shares the weight of its embedding, which would change both"
        if name is None:
            return "no tensor of this layer"
        tensor = model.tensors[name]
        if tensor.shape == shape and _storage(tensor) is None:
            return f"{name} is {_kind(tensor)}, which is not decoded here"
        return Place(name, tensor.shape)

    return Target(model.source, place, model_digest.of_tensors(model.tensors))


def _require_blocks(model: _Model, updates: Mapping[str, LoraDelta], dtype: str) -> None:
    """Refuse a dtype whose blocks do not fill the rows, and name those that do."""
    rows = {update.shape[1]: name for name, update in updates.items()}
    short = [d_in for d_in in rows if dtype != "same" and not storages.fits(dtype, d_in)]
    if short:
        fitting = [name for name in model.storages if all(storages.fits(name, d_in) for d_in in rows)]
        raise ValueError(
            f"merge: dtype {dtype} needs rows of whole blocks of {storages.block_elements(dtype)}, "
            f"and {rows[short[0]]} has rows of {short[0]}; possible: {', '.join(('same', *fitting))}"
        )


def _bytes(tensor: Tensor) -> Array:
    return tensor.data if isinstance(tensor, gguf.Tensor) else tensor.array.reshape(-1).view(np.uint8)


def _kind(tensor: Tensor) -> str:
    return tensor.type if isinstance(tensor, gguf.Tensor) else tensor.dtype


def _storage(tensor: Tensor) -> str | None:
    """FrozenWeight's word for how the elements are stored; None where they cannot be read."""
    if isinstance(tensor, gguf.Tensor):
        return _STORAGE_OF_GGML.get(tensor.type)
    return tensor.dtype if tensor.dtype in storages.FLOATS else None


def _unchanged(tensor: Tensor, name: str) -> MergeReport:
    return MergeReport.unchanged(name, _storage(tensor) or "", tensor.nbytes)


def _merge(tensor: Tensor, name: str, update: LoraDelta, dtype: str, sample: Array | None = None) -> Merge:
    """The merge of a tensor, or of a sample of its rows."""
    storage = _storage(tensor)
    assert storage is not None
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
