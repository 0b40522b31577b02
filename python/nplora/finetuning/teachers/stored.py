"""StoredTeacher: the most likely tokens of a teacher for each trained token of a data set, in a file.

The file is a safetensors file. n is the number of trained tokens of all its sequences, m the number of
different sequences, and k the number of tokens that are stored for each trained token.

    sequences   uint64 (m,)      a digest of the tokens and targets of each sequence (`sequence_keys`)
    starts      int64 (m + 1,)   each sequence's first row in `ids` and `log_probs`; the last element is n
    ids         int32 (n, k)     the k most likely tokens, the most likely first
    log_probs   (n, k + 1)       float16 or float32: the log-probabilities of these tokens, and in the last
                                 column the log-probability of all other tokens together; all at the
                                 temperature in the metadata
    tokens      uint8            the vocabulary: the tokens in UTF-8, one after another
    token_ends  int64 (v,)       the end of each token in `tokens`; an id without a token has no bytes

The rows are read from the file when they are needed, and are not kept in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data.batches import EVALUATION_TOKENS, TokenBatches
from nplora.finetuning.data.stored import Examples
from nplora.finetuning.objective_options import TEMPERATURES
from nplora.finetuning.objectives.reference import by_sequence, sequence_keys
from nplora.finetuning.teachers.teacher import DistributionsAt
from nplora.finetuning.teachers.vocabulary import require_same_vocabulary
from nplora.formats import files, safetensors
from nplora.formats.errors import CorruptError, FormatError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.gguf.header import MAGIC
from nplora.formats.safetensors import Entry, SafetensorsFile, Stream
from nplora.lm import LanguageModel
from nplora.models.divergence import TopK
from nplora.models.packing import IGNORED, PackedBatch

Array = npt.NDArray[Any]

FORMAT = "nplora teacher"  # the metadata key of such a file; its value is the version
VERSION = "1"
READING = ("max_length", "learn", "chat")  # reading options that decide the tokens
_KINDS = {
    "sequences": ("U64", 1), "starts": ("I64", 1), "ids": ("I32", 2), "log_probs": ("F16 or F32", 2),
    "tokens": ("U8", 1), "token_ends": ("I64", 1),
}  # fmt: skip


def is_stored(path: StrPath) -> bool:
    """Whether a path leads to a stored teacher: a file that is not GGUF. (A model is GGUF or a directory.)"""
    if not Path(path).is_file():
        return False
    with files.reading(path) as reader:
        return bytes(reader[: len(MAGIC)]) != MAGIC


def new_file(
    path: StrPath,
    keys: Array,
    counts: Array,
    tokens: Sequence[str | None],
    metadata: Mapping[str, str],
    k: int,
    dtype: str,
    ids: Callable[[], Iterable[files.Chunk]],
    log_probs: Callable[[], Iterable[files.Chunk]],
) -> files.NewFile:
    """Describe a file of predictions, which `files.replace` then writes.

    Args:
        keys, counts: for each sequence, its digest and its number of trained tokens.
        ids, log_probs: functions that return the bytes of the arrays `ids` and `log_probs` in chunks, from
            the first row to the last. Either function may be called first.
    """
    rows = int(counts.sum())
    texts = [(token or "").encode() for token in tokens]
    tensors: dict[str, Any] = {
        "sequences": keys,
        "starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "ids": Stream("int32", (rows, k), ids),
        "log_probs": Stream(dtype, (rows, k + 1), log_probs),
        "tokens": np.frombuffer(b"".join(texts), np.uint8),
        "token_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }
    return safetensors.new_file(path, tensors, {FORMAT: VERSION, **metadata})


class StoredTeacher:
    """An open file of log-probabilities.

    Raises:
        FormatError: the file is invalid, or was not made by `teach`.
        OSError: the file cannot be read.
    """

    def __init__(self, path: StrPath) -> None:
        self.model: LanguageModel | None = None
        self.name, self.paths = files.name(path), [Path(path)]
        self._opened = contextlib.ExitStack()  # closes the file when this object is deleted
        self._reader = self._opened.enter_context(files.reading(path))
        file = SafetensorsFile(self._reader, self.name)
        if FORMAT not in file.metadata:
            raise FormatError(f"{self.name}: expected a teacher: a model, or a file that nplora teach made")
        if file.metadata[FORMAT] != VERSION:
            raise FormatError(
                f"{self.name}: is of version {brief(file.metadata[FORMAT])}, expected {VERSION}"
            )
        self.metadata = file.metadata
        self._entries = self._checked(file)
        self._starts = file["starts"].array
        keys = file["sequences"].array
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._tokens = self._vocabulary(file)
        rows, self.top_k = self._entries["ids"].shape
        self._check_starts(rows)
        self._common = len(self._tokens)  # the number of ids that the student has too
        self._header = hashlib.sha256(repr((sorted(file.metadata.items()), self._entries)).encode())
        self._header.update(keys.tobytes() + self._starts.tobytes())

    @property
    def temperature(self) -> float:
        try:
            found = float(self.metadata["temperature"])
        except (KeyError, ValueError):
            found = math.nan
        least, most = TEMPERATURES
        if not least <= found <= most:
            raise FormatError(
                f"{self.name}: temperature is {brief(self.metadata.get('temperature'))}, expected a number "
                f"from {least} to {most}"
            )
        return found

    # ---- checks of the student and the data ----

    def require_student(self, op: str, student: LanguageModel) -> None:
        theirs, ours = self._tokens, student.tokenizer.tokens()
        require_same_vocabulary(op, self.name, theirs, str(student.source), ours)
        self._common = min(len(self._tokens), student.config.vocab_size)

    def require_data(self, op: str, dataset: Examples) -> None:
        missing = total = 0
        for batch, _ in TokenBatches(dataset, batch_tokens=EVALUATION_TOKENS, shuffle=False).epoch(0):
            _, is_found = self._places(batch)
            missing, total = missing + int((~is_found).sum()), total + len(is_found)
        if missing:
            raise FormatError(
                f"{op}: {dataset.report.source}: the teacher {self.name} has no log-probabilities of "
                f"{missing:,} of {counted(total, 'example')}: run nplora teach again with this run's data, "
                "tokenizer and reading options, or use the data and options from which the teacher file was "
                f"made: {self._made_from()}"
            )

    def _made_from(self) -> str:
        reading = ", ".join(f"{name} {self.metadata[name]}" for name in READING if name in self.metadata)
        return f"{brief(self.metadata.get('data', 'unnamed data'))} ({reading})"

    # ---- the distributions ----

    def prepare_batch(self, batch: PackedBatch) -> DistributionsAt:
        self._reader.stamp.require_unchanged()
        places, is_found = self._places(batch)
        if not is_found.all():
            raise FormatError(f"{self.name}: has no log-probabilities of an example of this batch")
        spans = [(int(self._starts[place]), int(self._starts[place + 1])) for place in places]
        ids, log_probs = (
            np.concatenate([self._rows(name, *span) for span in spans]) for name in ("ids", "log_probs")
        )
        counts = np.bincount(by_sequence(batch), minlength=len(batch.starts) - 1)
        if not np.array_equal(np.diff(spans)[:, 0], counts):
            raise CorruptError(f"{self.name}: a sequence has more or fewer rows than trained tokens")
        top = self._distributions(ids, log_probs)
        numbers = np.cumsum(batch.targets != IGNORED) - 1
        return lambda rows: top[numbers[rows]]

    def _places(self, batch: PackedBatch) -> tuple[Array, Array]:
        """Two arrays: each sequence's index in the file, and whether the file has the sequence."""
        keys = sequence_keys(batch)
        found = np.minimum(np.searchsorted(self._keys, keys), max(0, len(self._keys) - 1))
        return self._order[found], self._keys[found] == keys

    def _rows(self, name: str, begin: int, end: int) -> Array:
        entry = self._entries[name]
        dtype = np.dtype({"I32": "<i4", "F16": "<f2", "F32": "<f4"}[entry.tag])
        width = entry.shape[1] * dtype.itemsize
        data = self._reader[entry.begin + begin * width : entry.begin + end * width]
        return np.frombuffer(data, dtype).reshape(-1, entry.shape[1])

    def _distributions(self, ids: Array, log_probs: Array) -> TopK:
        """Check the rows, leave out tokens that the student lacks, and make the probabilities add up to 1.

        The probabilities must be scaled even if the student has all tokens, because the stored values are
        rounded.
        """
        ordered = np.sort(ids, axis=1)
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= len(self._tokens):
            raise CorruptError(
                f"{self.name}: ids holds {int(ids.min())} to {int(ids.max())}, expected tokens from 0 to "
                f"{len(self._tokens) - 1}"
            )
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise CorruptError(f"{self.name}: ids holds a token twice in one row")
        exact = log_probs.astype(np.float64)
        known = exact if self.top_k < len(self._tokens) else exact[:, :-1]
        if not np.isfinite(known).all() or known.max(initial=0) > 0.01:
            raise CorruptError(
                f"{self.name}: log_probs holds NaN, an infinity or a number above 0.01, expected "
                "logarithms of probabilities"
            )
        is_lacking = ids >= self._common
        exact[:, :-1][is_lacking] = -np.inf
        known -= np.log(np.exp(known).sum(axis=1, keepdims=True))
        return TopK(np.where(is_lacking, -1, ids), exact)

    def digest(self) -> str:
        return self._header.hexdigest()

    def blame(self, batch: PackedBatch) -> str:
        return ""  # `prepare_batch` raises an error if the numbers are wrong

    # ---- the file ----

    def _checked(self, file: SafetensorsFile) -> dict[str, Entry]:
        """Check that the types and shapes of the file's entries fit together, and return the entries."""
        problems = []
        for name, (tag, axes) in _KINDS.items():
            entry = file.entries.get(name)
            if entry is None:
                problems.append(f"{name} is missing")
            elif entry.tag not in tag or len(entry.shape) != axes:
                problems.append(
                    f"{name} is {entry.tag} of shape {entry.shape}, expected {tag} with {axes} axes"
                )
        if not problems:
            found = {name: file.entries[name].shape for name in _KINDS}
            (rows, k), m = found["ids"], found["sequences"][0]
            if found["log_probs"] != (rows, k + 1) or found["starts"] != (m + 1,) or not (m and k):
                problems.append(
                    f"ids, log_probs, sequences and starts have shapes {found['ids']}, {found['log_probs']}, "
                    f"{found['sequences']} and {found['starts']}, expected (rows, k), (rows, k + 1), (m,) "
                    "and (m + 1,), where k and m are at least 1"
                )
        if problems:
            raise FormatError(f"{self.name}: {'; '.join(problems)}")
        return {name: file.entries[name] for name in _KINDS}

    def _check_starts(self, rows: int) -> None:
        starts = self._starts
        if starts[0] != 0 or starts[-1] != rows or (np.diff(starts) < 0).any():
            raise FormatError(f"{self.name}: starts do not ascend from 0 to {rows}, the number of rows")

    def _vocabulary(self, file: SafetensorsFile) -> list[str | None]:
        data, ends = file["tokens"].array.tobytes(), file["token_ends"].array
        bounds = np.concatenate([[0], ends])
        if bounds[-1] != len(data) or (np.diff(bounds) < 0).any():
            raise FormatError(
                f"{self.name}: token_ends do not ascend to {len(data)}, the number of bytes in tokens"
            )
        texts = (data[begin:end] for begin, end in itertools.pairwise(bounds.tolist()))
        return [text.decode(errors="replace") or None for text in texts]
