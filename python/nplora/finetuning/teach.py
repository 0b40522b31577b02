"""teach: store the predictions of a teacher for a data set, so that students learn without the teacher."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.attach import Adapters, files_of, with_adapters
from nplora.finetuning.data import EVALUATION_TOKENS, Data, TokenBatches
from nplora.finetuning.data.dataset import Dataset, read_sources
from nplora.finetuning.data.sources import Source, sources_of, splits_of
from nplora.finetuning.load import opened, require_vocabulary
from nplora.finetuning.objectives.reference import sequence_keys
from nplora.finetuning.options import TeachOptions, from_arguments
from nplora.finetuning.slow_progress import Progress
from nplora.finetuning.teachers import model_digest, stored
from nplora.finetuning.token_progress import speaker
from nplora.formats import files, model_directory
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.models.divergence import TopK, most_likely
from nplora.models.head import chunks
from nplora.models.packing import IGNORED, PackedBatch, pack
from nplora.nn.losses import NonFiniteLossError

Array = npt.NDArray[Any]

_COPIED = 1 << 20  # bytes


@dataclass(frozen=True)
class Taught:
    """The file that `teach` wrote; `print` describes it.

    Attributes:
        output: the file.
        examples: the number of different examples in the file.
        tokens: the number of trained tokens in these examples.
        top_k: the number of tokens that are stored for each trained token.
        nbytes: the size of the file.
        kept: the sum of the stored probabilities of a trained token, averaged over all trained tokens.

    >>> print(nplora.finetuning.teach("model.gguf", "train.jsonl", "taught.safetensors", top_k=4))
    taught.safetensors: 16 examples, ... tokens, the 4 most likely predictions for each (... % ...), ...
    """

    output: Path
    examples: int
    tokens: int
    top_k: int
    nbytes: int
    kept: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {counted(self.examples, 'example')}, {counted(self.tokens, 'token')}, the "
            f"{self.top_k} most likely predictions for each ({100 * self.kept:.1f} % of the probability), "
            f"{self.nbytes / 1e6:.1f} MB"
        )


@_check.keywords
def teach(
    model: StrPath | LanguageModel,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    adapter: Adapters | None = None,
    any_base: bool = False,
    progress: bool | None = None,
    top_k: int = 32,
    temperature: float = 1.0,
    dtype: str = "float16",
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_length: int = 1024,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
    compute: str | None = None,
    overwrite: bool = False,
) -> Taught:
    """Store the teacher's most likely tokens and their log-probabilities for each trained token of the data.

    `finetune` with objective="distill" and this file as `teacher` does not need the teacher itself. In
    float16, the file has 6 * top_k + 2 bytes for each trained token: 194 bytes if `top_k` is 32. Equal
    examples are stored once. Fine-tuning may split and weight the data in another way, but must convert each
    example to the same tokens as this call.

    Args:
        model: the teacher: a GGUF file or a Hugging Face directory, as for `load_model`; or a loaded model.
        data: the data set, in any form that `finetune` accepts. If `data` is a directory, its valid.jsonl is
            read too.
        output: the file to write, which appears only when it is complete.
        valid: more data, which `finetune` can later use as its validation data.
        adapter: an adapter that is added to the teacher, as for `evaluate`.
        any_base: accept an adapter that was trained on another model with the same shapes.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        top_k: how many of the most likely tokens to store for each trained token.
        temperature: softmax temperature of the stored probabilities; fine-tuning uses the same temperature.
        dtype: storage type of the log-probabilities: float16 or float32.
        format: format of the rows: messages, sharegpt, alpaca, completion or text (default: the names of the
            fields decide).
        columns: names of fields in the data, as in prompt=question,completion=answer.
        chat: write prompts and completions with the model's chat template.
        max_length: maximum tokens of an example; longer examples are cut.
        learn: tokens to predict: completion (completions and assistant turns) or all.
        skip_bad: skip bad lines of the data, and count them.
        strict: refuse examples that are longer than `max_length`.
        compute: arithmetic of the products with frozen weights: float32 or bfloat16 (default: float32).
        overwrite: replace an existing file.
    Returns:
        a summary of the file.
    Raises:
        DataError: a line of the data is wrong.
        ValueError, TypeError: an option is out of range, or the output is one of the input files.
        FormatError: a file is invalid, or the adapter does not fit the model.
        NonFiniteLossError: the teacher's outputs are not finite.
        FileExistsError: the output exists, and `overwrite` is not set.
        OSError: a file cannot be read or written. After such an error, an existing output file is unchanged.

    >>> taught = nplora.finetuning.teach("model.gguf", "train.jsonl", "taught.safetensors", top_k=4)
    >>> taught.tokens, taught.nbytes < 20_000
    (42, True)
    >>> report = nplora.finetune(
    ...     "model.gguf", "train.jsonl", "out", objective="distill", teacher="taught.safetensors", steps=2
    ... )
    """
    options = from_arguments("teach", TeachOptions, locals())
    files.require_named("teach", output=output)
    files.require_new(output, overwrite)
    sources, held_out = splits_of("teach", data)
    groups = [sources, (held_out or []) if valid is None else sources_of("teach", valid)]
    lm = opened("teach", model, compute)
    if adapter is not None:
        lm = with_adapters("teach", lm, adapter, any_base)
    lm = lm.selected_model("teach")  # the call keeps these adapters
    if top_k > _vocab(lm):
        raise ValueError(f"teach: top_k is {top_k}, but the vocabulary has {_vocab(lm):,} tokens")
    _require_not_read(output, lm, files_of("teach", adapter), groups)
    options = replace(options, max_length=min(max_length, lm.config.max_position_embeddings))
    reading = options.reading(options.max_length)
    datasets = [
        read_sources("teach", group, lm.tokenizer, replace(reading, any_names=group is not sources))
        for group in groups
        if group
    ]
    say = speaker(progress)
    for dataset in datasets:
        require_vocabulary(lm, dataset.report.source, dataset.largest_id)
        say(str(dataset.report))
    return _Writer(lm, datasets, options, say).write(Path(output))


def _vocab(lm: LanguageModel) -> int:
    """The number of token ids in use. Other rows of the head are padding."""
    return min(lm.tokenizer.vocab_size, lm.vocab_size)


def _require_not_read(
    output: StrPath, lm: LanguageModel, adapters: list[Path], groups: list[list[Source]]
) -> None:
    read: list[tuple[str, StrPath]] = [
        ("teacher", path) for path in model_directory.files_of(lm.config.source)
    ]
    read += [("adapter", path) for path in adapters]
    read += [("data", source.path) for group in groups for source in group if source.path]
    files.require_not_read("teach", [output], read)


class _Writer:
    """Computes the rows of the file while the file is written."""

    def __init__(
        self, lm: LanguageModel, datasets: list[Dataset], options: TeachOptions, say: Callable[[str], None]
    ) -> None:
        self._lm, self._datasets, self._options, self._say = lm, datasets, options, say
        self._kept = 0.0
        self._total = 0

    def write(self, output: Path) -> Taught:
        keys, counts = self._sequences()
        self._total = int(counts.sum())
        lm, k = self._lm, self._options.top_k
        with _Spool(output.parent) as spool:
            streams = _Streams(self._rows, spool)
            new = stored.new_file(
                output, keys, counts, lm.tokenizer.tokens()[: _vocab(lm)], self._metadata(), k,
                self._options.dtype, lambda: streams.stream(0), lambda: streams.stream(1),
            )  # fmt: skip
            files.replace([new])
        kept = self._kept / max(1, self._total)
        return Taught(output, len(keys), self._total, k, new.nbytes, kept)

    def _metadata(self) -> dict[str, str]:
        options = self._options
        return {
            "teacher": str(self._lm.source),
            "teacher_digest": model_digest(self._lm),
            "temperature": repr(float(options.temperature)),
            "data": ", ".join(dataset.report.source for dataset in self._datasets),
            "data_digest": " ".join(dataset.fingerprint() for dataset in self._datasets),
            **{name: str(getattr(options, name)) for name in stored.READING},
        }

    def _batches(self) -> Iterator[PackedBatch]:
        for dataset in self._datasets:
            batches = TokenBatches(dataset, batch_tokens=EVALUATION_TOKENS, shuffle=False)
            yield from (batch for batch, _ in batches.epoch(0))

    def _sequences(self) -> tuple[Array, Array]:
        """Two arrays: the digest of each different sequence, in order, and its number of trained tokens."""
        found = dict[int, int]()
        for batch in self._batches():
            ends = np.cumsum(batch.targets != IGNORED)[batch.starts[1:] - 1]
            found |= zip(sequence_keys(batch).tolist(), np.diff(ends, prepend=0).tolist(), strict=True)
        return np.array(list(found), np.uint64), np.array(list(found.values()), np.int64)

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield pairs (ids, log-probabilities): the next rows of these two arrays of the file, as bytes."""
        seen, progress = set[int](), Progress("", "tokens", self._total, self._say)
        progress.begin(f"computing the teacher's predictions for {counted(self._total, 'token')}")
        for batch in self._batches():
            new = _without(batch, seen)
            if new is None:
                continue
            yield from self._rows_of_batch(new)
            progress.add(new.num_targets)

    def _rows_of_batch(self, batch: PackedBatch) -> Iterator[tuple[bytes, bytes]]:
        lm, options = self._lm, self._options
        hidden = lm.residual_stream(batch)
        for rows in chunks(np.flatnonzero(batch.targets != IGNORED), lm.config.vocab_size):
            logits = np.ascontiguousarray(lm.logits_of(hidden[rows])[:, : _vocab(lm)])
            if not np.isfinite(logits.max(axis=1)).all():
                raise NonFiniteLossError(f"teach: the outputs of the teacher {lm.source} are not finite")
            top = most_likely(logits, options.top_k, options.temperature)
            self._kept += float(np.exp(top.log_probs[:, :-1]).sum())
            yield top.ids.astype("<i4").tobytes(), self._rounded(top).tobytes()

    def _rounded(self, top: TopK) -> Array:
        """Convert the log-probabilities to `dtype`, little-endian.

        Raises:
            ValueError: `dtype` cannot represent a log-probability, so no student could use the file.
        """
        with np.errstate(over="ignore"):
            stored = top.log_probs.astype(np.dtype(self._options.dtype).newbyteorder("<"))
        has_rest = top.ids.shape[1] < _vocab(self._lm)
        if not np.isfinite(stored if has_rest else stored[:, :-1]).all():
            raise ValueError(
                f"teach: a log-probability of {self._lm.source} does not fit into {self._options.dtype}: a "
                "higher temperature or dtype='float32' may help"
            )
        return stored


def _without(batch: PackedBatch, seen: set[int]) -> PackedBatch | None:
    """A batch of the sequences of `batch` whose digests are not yet in `seen`; None if there are none.

    The function adds these sequences' digests to `seen`.
    """
    kept = []
    for index, key in enumerate(sequence_keys(batch).tolist()):
        if key not in seen:
            seen.add(key)
            kept.append(slice(int(batch.starts[index]), int(batch.starts[index + 1])))
    if len(kept) == len(batch.starts) - 1:
        return batch
    # `pack` takes a label at the position of its token; `targets` holds it one position earlier.
    return pack((batch.ids[s], np.append(IGNORED, batch.targets[s][:-1])) for s in kept) if kept else None


class _Spool:
    """An unnamed file beside the output. The file disappears when the process ends, even if it crashes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with files.disk_errors(directory, "a temporary file cannot be made"):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

    def add(self, data: bytes) -> None:
        with files.disk_errors(self._directory, "the temporary file cannot be written"):
            self._file.write(data)

    def chunks(self) -> Iterator[bytes]:
        with files.disk_errors(self._directory, "the temporary file cannot be read"):
            self._file.seek(0, os.SEEK_SET)
        while data := self._file.read(_COPIED):
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _Streams:
    """Two streams of bytes that are computed together, but are written to the file one after the other.

    While the first stream is written, the second one is stored in a temporary file, the spool.
    """

    def __init__(self, rows: Callable[[], Iterator[tuple[bytes, bytes]]], spool: _Spool) -> None:
        self._rows, self._spool, self._computed = rows, spool, False

    def stream(self, which: int) -> Iterator[files.Chunk]:
        if self._computed:
            yield from self._spool.chunks()
            return
        self._computed = True
        for pair in self._rows():
            self._spool.add(pair[1 - which])
            yield pair[which]
