"""Writes a copy of a model's file with an adapter merged into it, one block of rows at a time."""

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nplora import _check
from nplora.adapters import sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import Place, Target
from nplora.adapters.merge_gate import TOLERANCE, Check, MergeGate, Verdict
from nplora.adapters.merged_tensors import STORAGES, MergedTensors, kind_of, mean_row, possible_storages
from nplora.adapters.sources import Source
from nplora.adapters.trained_rows import EMBEDDING, HEAD, Ids, with_rows_beyond
from nplora.formats import bitsandbytes, files, model_directory, peft_adapter
from nplora.formats.errors import FormatError, brief
from nplora.formats.files import StrPath
from nplora.formats.output_directory import trained
from nplora.lora.delta import LoraDelta
from nplora.lora.model_merge import HeldOutLoss, ModelMerge
from nplora.lora.new_rows import NewRows
from nplora.models import model_digest, model_files
from nplora.models.model_files import ModelFiles, NewVocabulary, Tensor, is_directory, weights_path
from nplora.weights import storages
from nplora.weights.nonfinite import require_finite

_SHARED = ("embed_tokens", "lm_head")
_BOTH = "the model's embedding and its output share one weight, so a merge would change both"


@_check.keywords
def merge_adapter(
    base: StrPath,
    adapter: Source,
    output: StrPath,
    dtype: str = "same",
    any_base: bool = False,
    overwrite: bool = False,
    lossy: bool = False,
    *,
    check: Check | None = None,
    tolerance: float | None = None,
) -> ModelMerge:
    """Write a model with an adapter merged into it. Adapted weights become W + ΔW; all else is copied.

    Sums are computed in float32 and then rounded to the storage type. Only a block of rows is in memory at a
    time, never a whole weight. The output file gets its name only after its whole content is on the disk.

    If `check` is given, the new model is first written to a temporary file and loaded. The new model's loss
    is compared with the loss of the base model with the adapter attached.

    Args:
        base: a GGUF file, a safetensors file or index, or a Hugging Face directory.
        adapter: a PEFT directory, a llama.cpp file or an `Adapter`. DoRA is supported.
        output: a file of the same kind as the base, but not the base itself. If the base is a directory,
            `output` may also be a directory. The base's configuration and tokenizer are then copied into
            `output`.
        dtype: the storage type of the merged weights: "same" for the base's type, or a type of `FrozenWeight`
            that the output file can hold.
        any_base: see `nplora.adapters`.
        overwrite: replace existing files.
        lossy: write the model even if less than 90 % of the adapter's ΔW is left after rounding. If `check`
            is also given, the model is written only if its loss passes the check.
        check: a function that takes a model's path and an adapter (or None), and returns the model's loss on
            held-out data with this adapter. `nplora.finetuning.held_out_loss` makes such a function from a
            data file.
        tolerance: the largest accepted rise of the held-out loss, in nats per token; only with `check`
            (default: 0.02, which raises the perplexity by 2 %).
    Returns:
        a summary of the written model, which reports how much of each weight's ΔW is left after rounding.
    Raises:
        FormatError: see `nplora.adapters`. Or nplora cannot decode the type of a weight, or a weight to be
            merged holds NaN or an infinity.
        UnsupportedError: a weight to be merged is stored in bitsandbytes' NF4.
        UnsafeError: a file beside the base's weights is a symbolic link that leads out of the directory.
        CorruptError: another program wrote to the base during the merge.
        ValueError: `output` or `dtype` does not fit the kind of the base. `output` is the same file as the
            base or the adapter. The directory of `output` holds an index file (model.safetensors.index.json)
            that lists other weights. A sum is too large for the storage type.
        ValueError: less than 90 % of ΔW would be left after rounding, and `lossy` is not set. Or the held-out
            loss would rise by more than `tolerance`. The message suggests the smallest storage type that is
            estimated to keep enough of ΔW, if there is one. With `check`, the loss with the suggested type is
            also measured, if the disk has room for a temporary file. No output file is written, and an
            existing file stays unchanged.
        ValueError: `tolerance` is given without `check`.
        TypeError: `check` is not a function.
        FileExistsError: `output` exists, and `overwrite` is not set. Or the directory of a safetensors
            `output` holds an adapter or a training run.

    >>> check = nplora.finetuning.held_out_loss("valid.jsonl")
    >>> merged = nplora.merge_adapter("model.gguf", "adapter", "merged.gguf", check=check)
    >>> merged.delta_kept > 0.99, merged.loss.is_kept
    (True, True)
    >>> print(merged)
    held-out loss unaffected: ...
    merged.gguf: ... bytes, 14 tensors merged (float32), ... copied
    ...
    """
    files.require_named("merge", base=base, output=output)
    if tolerance is not None and check is None:
        raise ValueError("merge: tolerance is given without check, which measures the loss")
    model = model_files.open(base)
    _require_output(model, base, adapter, output)
    facts = base if Path(base).is_dir() or model.suffix == ".gguf" else None
    content = sources.read_any(adapter, facts, any_base=any_base)
    content.require_always_active("merge")
    vocabulary = _vocabulary(model, content, output)
    updates = _placed(model, content, dtype, any_base, vocabulary)
    merged = MergedTensors(model, updates, dtype, vocabulary)
    for name in merged.merges:
        require_finite(model.source, model.tensors[name])
    gate = MergeGate(base, lossy, check, TOLERANCE if tolerance is None else tolerance)
    with files.creating_directory(output) if is_directory(output) else contextlib.nullcontext():
        new = merged.new_files(output)
        for file in new:
            files.require_new(file.path, overwrite)
        files.require_not_read("merge", [file.path for file in new], _inputs(model, base, adapter))
        gate.measure(adapter)
        loss = _replace(new, merged, gate, output)
    reports = merged.reports()
    nbytes = sum(file.nbytes for file in new)
    kept = len(model.tensors) - len(reports)
    return ModelMerge(files.name(output), reports, kept, nbytes, loss)


class _RefusedError(Exception):
    """Raised if the merge gate rejects the merged model."""


def _replace(
    new: list[files.NewFile], merged: MergedTensors, gate: MergeGate, output: StrPath
) -> HeldOutLoss | None:
    """Write files under temporary names. If `gate` accepts the files, rename them; otherwise remove them."""
    verdicts = list[Verdict]()

    def check(written: list[Path]) -> None:
        verdicts.append(gate.judge(merged, written))
        if not verdicts[0].passes:
            raise _RefusedError

    try:
        files.replace(new, check=check)
    except _RefusedError:
        raise gate.refusal(verdicts[0], merged, output) from None
    return verdicts[0].loss


# ---- the output ----


def _require_output(model: ModelFiles, base: StrPath, adapter: Source, output: StrPath) -> None:
    if Path(base).is_dir() and is_directory(output):
        files.require_directory(output)
    elif files.suffix(output) != model.suffix:
        hint = "" if model.suffix == ".gguf" else "; nplora convert turns safetensors into GGUF"
        raise ValueError(
            f"merge: {model.source} can only become a {model.suffix} file, got {files.name(output)!r}{hint}"
        )
    weights = weights_path(output)
    files.require_not_read("merge", [output, weights], _inputs(model, base, adapter))
    found = trained(weights.parent)
    # Programs could mistake a safetensors file in this directory for a part of the adapter or the run.
    if found is not None and model.suffix != ".gguf":
        reason = f"the directory holds {found}; choose another one"
        raise FileExistsError(errno.EEXIST, reason, files.name(weights.parent))
    index = weights.with_name(model_directory.INDEX)
    if weights.name == model_directory.WEIGHTS and index.exists():
        raise ValueError(f"merge: {index} already lists other weights; choose another directory")


def _inputs(model: ModelFiles, base: StrPath, adapter: Source) -> list[tuple[str, StrPath]]:
    """The files and directories that the merge reads, as pairs ("base" or "adapter", path)."""
    of_base = (base, model.source, *model.shards, *model_directory.files_of(base))
    of_adapter = (adapter, *peft_adapter.files_of(adapter)) if isinstance(adapter, str | os.PathLike) else ()
    return [("base", path) for path in of_base] + [("adapter", path) for path in of_adapter]


# ---- which tensor each layer belongs to ----


def _vocabulary(model: ModelFiles, adapter: AdapterContent, output: StrPath) -> NewVocabulary | None:
    """The adapter's new tokens, and the number of rows of the merged model's embedding.

    Returns None if the adapter has no tokens that are new to the model.

    Raises:
        ValueError: the output is a safetensors file, which has no tokenizer.
        FormatError: the model has other tokens with the ids of the new tokens.
    """
    name = model.place(EMBEDDING, 0)[0]
    if not adapter.added_tokens or name is None:
        return None
    stored = model.tensors[name].shape[0]
    tokens = model.tokenizer().missing(adapter.added_tokens, stored)
    if not tokens:
        return None
    if model.suffix != ".gguf" and not is_directory(output):
        raise ValueError(
            f"merge: {adapter.source} adds tokens, so the output must have a tokenizer: merge into a GGUF "
            "file, or from a model's directory into a new directory"
        )
    return NewVocabulary(tokens, max(stored, adapter.rows))


def _placed(
    model: ModelFiles,
    adapter: AdapterContent,
    dtype: str,
    any_base: bool,
    vocabulary: NewVocabulary | None,
) -> dict[str, LoraDelta | NewRows]:
    """Map tensor names to updates. The rows of an update are in the order of the rows in the model's file."""
    if dtype not in (possible := ("same", *possible_storages(model))):
        words = ", ".join(map(repr, possible))
        raise ValueError(f"merge: a {model.suffix} file cannot hold dtype={dtype!r}; possible: {words}")
    layers = [*adapter, *adapter.token_rows, *adapter.modules_to_save]
    for name in (model.place(layer, 0)[0] for layer in layers):
        if name is not None:
            bitsandbytes.refuse(model.tensors, name, model.source, "merge into")
    _target(model, adapter).check(adapter, any_base)
    deltas = dict[str, LoraDelta | NewRows]()
    for layer, delta in adapter.items():
        name, order = model.place(layer, delta.shape[0])
        deltas[name or ""] = delta.rows(order)
    trained, sizes = adapter.trained_rows, dict[str, int]()
    if not model.tied:
        trained |= dict.fromkeys(adapter.modules_to_save)
    if vocabulary is not None:
        stored = model.tensors[model.place(EMBEDDING, 0)[0] or ""].shape[0]
        sizes = dict.fromkeys((EMBEDDING, HEAD), vocabulary.size)
        trained = with_rows_beyond(model.tied, trained, stored, vocabulary.size)
    for layer, ids in trained.items():
        name = model.place(layer, 0)[0] or ""
        if name in deltas:
            rows = "and trained rows" if layer in adapter.trained_rows else "but no rows for the new tokens"
            raise FormatError(
                f"{adapter.source}: {layer}: for this weight, the adapter has LoRA factors {rows}, "
                "which is not supported"
            )
        tensor = model.tensors[name]
        deltas[name] = _new_rows(adapter, layer, ids, tensor, sizes.get(layer, tensor.shape[0]))
    _require_blocks(model, deltas, dtype)
    return {name: deltas[name] for name in model.tensors if name in deltas}


def _new_rows(adapter: AdapterContent, layer: str, ids: Ids, tensor: Tensor, size: int) -> NewRows:
    """The rows that a merge writes into a layer. These rows replace old rows or follow the last old row.

    If the adapter has no values for one of these rows, the row is the mean of all rows of the model's weight.
    In training, this mean is also the initial value of new rows.
    """
    width = tensor.shape[1]
    values = np.empty((0, width), np.float32)
    if layer in adapter.token_rows:
        values = adapter.token_rows[layer].values
    elif layer in adapter.modules_to_save:
        values = adapter.modules_to_save[layer]["weight"]
    missing = (size if ids is None else len(ids)) - len(values)
    if missing > 0:
        values = np.concatenate([values, np.tile(mean_row(tensor), (missing, 1))])
    return NewRows(ids, values, (size, width))


def _target(model: ModelFiles, adapter: AdapterContent) -> Target:
    taken: dict[str, str] = {}

    def tensor(layer: str, shape: tuple[int, ...] | None = None) -> Tensor | str:
        """The tensor of a layer's weight, or a text that says why nothing can be merged into it.

        The type of the tensor is checked only if the tensor has the shape `shape`, or if `shape` is None.
        """
        name, _ = model.place(layer, 0)
        if name is None:
            return "the model has no tensor for this layer"
        if (other := taken.setdefault(name, layer)) != layer:
            return f"its tensor {name} also belongs to {brief(other)}"
        found = model.tensors[name]
        if shape in (None, found.shape) and kind_of(found) not in STORAGES:
            return f"{found.name} has type {kind_of(found)}, which nplora cannot decode"
        return found

    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        if model.tied and layer.rpartition(".")[2] in _SHARED:
            return _BOTH
        found = tensor(layer, shape)
        return found if isinstance(found, str) else Place(found.name, found.shape, kernel=())

    def rows(layer: str) -> tuple[int, int] | str:
        """Return the shape of a layer's weight, or the reason why the adapter cannot replace its rows."""
        if model.tied and adapter.is_tied and layer == HEAD:
            return rows(EMBEDDING)
        if model.tied and layer in adapter.trained_rows and not _replaces_both(layer, adapter):
            return _BOTH
        found = tensor(layer)
        return found if isinstance(found, str) else found.shape  # type: ignore[return-value]

    shapes = {layer: rows(layer) for layer in adapter.modules_to_save}
    whole = {layer: {"weight": Place(shape=s)} for layer, s in shapes.items() if not isinstance(s, str)}
    digest = model_digest.of_tensors(model.tensors, model.family)
    return Target(model.source, place, digest, whole=whole, rows=rows)


def _replaces_both(layer: str, adapter: AdapterContent) -> bool:
    """Whether the new rows of `layer` are for both the embedding and the head, which share one weight."""
    if layer in adapter.modules_to_save:
        return adapter.is_tied
    return layer == EMBEDDING and HEAD not in adapter.token_rows


def _require_blocks(model: ModelFiles, updates: Mapping[str, LoraDelta | NewRows], dtype: str) -> None:
    """Raise ValueError if a row cannot be divided into whole blocks of the storage type `dtype`.

    The message names the types that fit.
    """
    rows = {update.shape[1]: name for name, update in updates.items()}
    short = [d_in for d_in in rows if dtype != "same" and not storages.fits(dtype, d_in)]
    if short:
        fitting = possible_storages(model, rows)
        raise ValueError(
            f"merge: dtype {dtype} needs a multiple of {storages.block_elements(dtype)} elements in each "
            f"row, but {rows[short[0]]} has rows of {short[0]} elements; "
            f"possible: {', '.join(('same', *fitting))}"
        )
