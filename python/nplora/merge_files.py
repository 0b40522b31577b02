"""An adapter merged into a model's file: a block of rows at a time, while the new file is written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nplora import storages
from nplora.formats import base_model, files, gguf, gguf_names, safetensors, sharded
from nplora.formats.errors import FormatError, brief
from nplora.formats.files import NewFile, StrPath
from nplora.formats.gguf.header import MAGIC
from nplora.merging import Merge, MergeReport, Update
from nplora.updates import Adapter, read_adapter

Array = NDArray[Any]
Tensor: TypeAlias = "gguf.Tensor | safetensors.Tensor"

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_COMPANIONS = (".json", ".txt", ".model", ".jinja")  # configuration, tokenizer, chat template
_MAX_COMPANION = 64 << 20
_STORAGE_OF_GGML = {name: storage for storage, name in storages.GGML_NAMES.items()}


@dataclass(frozen=True)
class ModelMerge:
    """What `merge_adapter` wrote.

    Attributes:
        target: the file or directory.
        reports: one `MergeReport` for each merged tensor, in the order of the file.
        kept: how many tensors were copied as they are.
    """

    target: str
    reports: tuple[MergeReport, ...]
    kept: int

    def __str__(self) -> str:
        worst = min(self.reports, key=lambda report: report.kept)
        return "\n".join(
            [
                *map(str, self.reports),
                f"{self.target}: {len(self.reports)} tensors merged, {self.kept} kept; "
                f"the least of ΔW, {worst.kept:.1%}, is kept in {worst.name}",
            ]
        )


def merge_adapter(
    base: StrPath, adapter: "StrPath | Adapter", output: StrPath, dtype: str = "same"
) -> ModelMerge:
    """Write a model with an adapter merged into it: W + ΔW from float32 sums, every other byte as it was.

    No weight is held as a whole: each is read, summed, stored and compared a block of rows at a time. The
    file is complete on the disk before it takes its name.

    Args:
        base: a GGUF file, a safetensors file or index, or a Hugging Face directory.
        adapter: a PEFT directory, llama.cpp's file or an `Adapter`; DoRA too.
        output: a file of the base's kind; of a directory also a directory, which then gets the base's
            configuration and tokenizer too.
        dtype: the storage of the merged weights: "same", or one of `FrozenWeight`'s that the file's kind has.
    Returns:
        what was written, with a report of how much of ΔW survived the rounding of each weight.
    Raises:
        FormatError: a file breaks its format, or the adapter does not fit the model; all that does not fit is
            listed. UnsupportedError: among that, weights in blocks that are not decoded here.
        ValueError: output or dtype is not of the base's kind, or a sum is too large for the storage.
        OSError: a file cannot be read, or the disk refuses.
    """
    model = _open(base)
    _require_kind(model, base, output)
    facts = base if Path(base).is_dir() or model.suffix == ".gguf" else None
    updates = _placed(model, read_adapter(adapter, facts), dtype)
    merges = {name: _merge(model.tensors[name], name, update, dtype) for name, update in updates.items()}
    tensors: dict[str, Any] = {name: merges.get(name, tensor) for name, tensor in model.tensors.items()}
    files.replace(model.new_files(output, tensors))
    reports = tuple(merge.report for merge in merges.values())
    return ModelMerge(files.name(output), reports, len(tensors) - len(reports))


# ---- the two kinds of files ----


@dataclass(frozen=True)
class _Model:
    """A model's opened files.

    Attributes:
        place: the name of the tensor that a layer's weight is in, if there is one, and the order of its rows.
        new_files: what is to be written for these tensors, of which some are merges.
    """

    source: str
    suffix: str
    tensors: Mapping[str, Tensor]
    place: Callable[[str, int], tuple[str | None, Array | None]]
    new_files: Callable[[StrPath, Mapping[str, Any]], list[NewFile]]
    storages: tuple[str, ...]
    tied: bool


def _open(base: StrPath) -> _Model:
    if Path(base).is_dir():
        return _open_safetensors(base, _index_or_file(Path(base)))
    with files.reading(base) as reader:
        is_gguf = bytes(reader[:4]) == MAGIC
    return _open_gguf(base) if is_gguf else _open_safetensors(base, Path(base))


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
        return [gguf.new_file(output, content, file.metadata.typed())]

    tied = facts is not None and "output.weight" not in file
    return _Model(file.source, ".gguf", file, place, new_files, tuple(storages.GGML_NAMES), tied)


def _open_safetensors(base: StrPath, path: Path) -> _Model:
    file = sharded.open(path) if path.name.endswith(".index.json") else safetensors.open(path)

    def place(layer: str, rows: int) -> tuple[str | None, Array | None]:
        return _first_of(file, f"{layer}.weight", layer), None

    def new_files(output: StrPath, tensors: Mapping[str, Any]) -> list[NewFile]:
        content = {
            name: safetensors.Stream(t.storage, t.shape, _chunks(t)) if isinstance(t, Merge) else t
            for name, t in tensors.items()
        }
        metadata = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
        if Path(output).suffix == ".safetensors":
            return [safetensors.new_file(output, content, metadata)]
        metadata.setdefault("format", "pt")  # transformers refuses a directory without it
        Path(output).mkdir(exist_ok=True)
        weights = safetensors.new_file(Path(output, _WEIGHTS), content, metadata)
        return [weights, *_companions(Path(base), Path(output))]

    tied = "model.embed_tokens.weight" in file and "lm_head.weight" not in file
    return _Model(file.source, ".safetensors", file, place, new_files, tuple(storages.FLOATS), tied)


def _index_or_file(directory: Path) -> Path:
    index = directory / _INDEX
    return index if index.exists() else directory / _WEIGHTS


def _first_of(names: Mapping[str, Any], *candidates: str) -> str | None:
    return next((name for name in candidates if name in names), None)


def _chunks(merge: Merge) -> Callable[[], Iterator[memoryview]]:
    return lambda: (raw.reshape(-1).data for _, raw in merge.rows())


def _companions(source: Path, target: Path) -> list[NewFile]:
    """What lies beside a model's weights and belongs to it."""
    found = []
    for path in sorted(source.iterdir()):
        if path.suffix in _COMPANIONS and not path.name.endswith(".index.json") and path.is_file():
            text = files.read(path, _MAX_COMPANION)
            found.append(NewFile(target / path.name, len(text), [text]))
    return found


def _require_kind(model: _Model, base: StrPath, output: StrPath) -> None:
    suffix = Path(output).suffix
    if suffix == model.suffix or (Path(base).is_dir() and suffix not in (".gguf", ".safetensors")):
        return
    raise ValueError(
        f"merge: {model.source} becomes a {model.suffix} file, got {files.name(output)!r}; "
        "nplora convert makes GGUF of safetensors"
    )


# ---- what goes where ----


def _placed(model: _Model, adapter: Adapter, dtype: str) -> dict[str, Update]:
    """The updates by the names of the model's tensors, with their rows in the order of the file."""
    problems, updates = [], {}
    if dtype != "same" and dtype not in model.storages:
        words = ", ".join(map(repr, ("same", *model.storages)))
        raise ValueError(f"merge: dtype={dtype!r} is not available in {model.suffix}; possible: {words}")
    for layer, update in adapter.items():
        name, order = model.place(layer, update.shape[0])
        problem = _misfit(model, layer, name, update, dtype)
        if problem or name is None:
            problems.append(problem)
        elif order is None:
            updates[name] = update
        else:
            m = None if update.m is None else update.m[order]
            updates[name] = Update(update.A[order], update.B, update.scale, m)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise FormatError(
            f"{adapter.source}: the adapter does not fit {model.source} in {len(problems)} places:{lines}"
        )
    if not updates:
        raise FormatError(f"{adapter.source}: the adapter holds no factors")
    return {name: updates[name] for name in model.tensors if name in updates}


def _misfit(model: _Model, layer: str, name: str | None, update: Update, dtype: str) -> str:
    layer = brief(layer)
    if model.tied and (name is None or update.embedding):
        return f"{layer}: the model's output shares the weight of its embedding, which would change both"
    if name is None:
        return f"{layer}: no tensor of this layer"
    tensor = model.tensors[name]
    if tensor.shape != update.shape:
        return f"{layer}: for a weight {update.shape}, and {name} is {tensor.shape}"
    storage = _storage(tensor)
    if storage is None:
        return f"{layer}: {name} is {_kind(tensor)}, which is not decoded here"
    target = storage if dtype == "same" else dtype
    if not storages.fits(target, tensor.shape[1]):
        elements = storages.block_elements(target)
        return f"{layer}: rows of {tensor.shape[1]} are no whole blocks of {elements}, which {target} needs"
    return ""


def _kind(tensor: Tensor) -> str:
    return tensor.type if isinstance(tensor, gguf.Tensor) else tensor.dtype


def _storage(tensor: Tensor) -> str | None:
    """FrozenWeight's word for how the elements are stored; None where they cannot be read."""
    if isinstance(tensor, gguf.Tensor):
        return _STORAGE_OF_GGML.get(tensor.type)
    return tensor.dtype if tensor.dtype in storages.FLOATS else None


def _merge(tensor: Tensor, name: str, update: Update, dtype: str) -> Merge:
    storage = _storage(tensor)
    assert storage is not None
    d_out, d_in = update.shape
    data = tensor.data if isinstance(tensor, gguf.Tensor) else tensor.array.reshape(-1).view(np.uint8)
    rows = data.reshape(d_out, storages.row_nbytes(storage, d_in))
    return Merge(
        name,
        (d_out, d_in),
        lambda first, last: storages.decode(rows[first:last], storage, d_in),
        update,
        storage if dtype == "same" else dtype,
    )
