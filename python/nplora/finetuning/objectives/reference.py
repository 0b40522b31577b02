"""Reference: the log-probabilities of the model without its adapter, computed once and kept in a file.

The file holds the log-probability of each sequence. nplora uses the file only if its SHA-256 is right, and if
the following have not changed: the weights, the configuration, the arithmetic, the instruction set and the
version of nplora. Log-probabilities that are not in the file are computed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.distributed.communicator import Alone, Ranks
from nplora.finetuning.data import EVALUATION_TOKENS, TokenBatches
from nplora.finetuning.slow_progress import Progress
from nplora.formats import files, safetensors
from nplora.formats.errors import FormatError, counted
from nplora.formats.run_files import REFERENCE, REFERENCE_MARK, holds_run
from nplora.lm import LanguageModel
from nplora.models.packing import IGNORED, PackedBatch
from nplora.models.positions import rows_of
from nplora.nn.losses import NonFiniteLossError
from nplora.platform.files import remove_in
from nplora.runtime.error_text import message_of
from nplora.runtime.user_warning import warn_user
from nplora.trainer.fingerprint import base_fingerprint
from nplora.trainer.interrupts import Terminated
from nplora.trainer.run_checkpoints import RESUME_HINT

Array = npt.NDArray[Any]

_SCHEMA = "1"
_PLACE = "the log-probabilities of the reference"
_WRITE_SECONDS = 60.0  # the least time between two writes of the file


class Reference:
    """Holds the log-probability that the model without its adapter gives to the targets of each sequence.

    A sequence is found by a digest of its tokens and targets, so the data may be in any order.

    Args:
        known: maps the key of a sequence (see `sequence_keys`) to the log-probability of the sequence.
    """

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._set(dict(known or {}))
        self._model = ""
        self._is_kept = True  # whether the file holds what was computed

    def log_probs_of(self, batch: PackedBatch) -> Array:
        """The log-probability of each sequence of a batch, float64.

        Raises:
            LookupError: a sequence was not in the data that `compute` got.
        """
        keys = sequence_keys(batch)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        if not len(self._keys) or (self._keys[places] != keys).any():
            raise LookupError("the reference lacks the log-probability of a sequence of this batch")
        return np.asarray(self._values[places])

    def compute(
        self,
        lm: LanguageModel,
        batches: list[TokenBatches],
        sequences_of: Callable[[PackedBatch, Any], Iterable[PackedBatch]],
        directory: files.Directory | None,
        say: Callable[[str], None],
        writes: bool,
        ranks: Ranks | None = None,
    ) -> None:
        """Read the log-probabilities of the data's sequences from the file, and compute the missing ones.

        Args:
            lm: the model without the adapter.
            batches: the training data, and the validation data, if there are any.
            sequences_of: a function that returns the sequences of a batch for which log-probabilities are
                needed.
            directory: the output directory; None on all ranks except rank 0.
            writes: whether to write the file every minute and at the end. If False, the caller must call
                `keep` later.
            ranks: the processes that train together. Each rank computes some of the log-probabilities.
        Raises:
            NonFiniteLossError: a log-probability is NaN or infinite.
            ValueError: the ranks have different models.
        Warns:
            UserWarning: the file cannot be written. The run can continue without the file.
        """
        ranks, self._model = ranks or Alone(), _identity(lm)
        known, problem = ({}, "") if directory is None else _read(directory, self._model)
        for rank, model in enumerate(models := ranks.gather(self._model, _PLACE)):
            if model != models[0]:
                raise ValueError(f"finetune: the ranks do not agree: rank {rank} differs in base model")
        known = ranks.broadcast(known, _PLACE) | self._found()
        if directory is not None and problem:
            say(f"{Path(directory, REFERENCE)}: {problem}; the reference is computed again")
        progress = Progress("reference", "examples", sum(len(source.dataset) for source in batches), say)
        shared = _SharedParts(lm, ranks, known)

        def store() -> bool:
            if directory is None or not (writes and is_computed and known):
                return False
            return _write(directory, self._model, *_sorted(known))

        seen, written_at, is_computed = set(self._found()), time.monotonic(), False
        try:
            for source in batches:
                for x, y in source.epoch(0):
                    for part in _parts(sequences_of(x, y)):
                        seen.update(sequence_keys(part).tolist())
                        if shared.lacks(part):
                            progress.begin("computing the log-probabilities of the model without its adapter")
                            is_computed = True
                            shared.add(part)
                    progress.add((len(x.starts) - 1) // source.dataset.sequences)
                    if (
                        writes
                        and directory
                        and is_computed
                        and time.monotonic() - written_at > _WRITE_SECONDS
                    ):
                        _write(directory, self._model, *_sorted(known))
                        written_at = time.monotonic()
            shared.compute()
            known = {key: known[key] for key in seen}
        except BaseException as error:  # also after Ctrl-C, so that the next start continues from here
            if store() and isinstance(error, KeyboardInterrupt | Terminated):
                error.add_note(f"the log-probabilities computed so far are saved: {RESUME_HINT}")
            raise
        store()
        self._set(known)
        self._is_kept = self._is_kept and (writes or not is_computed)

    def keep(self, directory: files.Directory) -> None:
        """Write the file, unless it already holds all log-probabilities."""
        if not self._is_kept:
            _write(directory, self._model, self._keys, self._values)
        self._is_kept = True

    def _set(self, found: dict[int, float]) -> None:
        self._keys, self._values = _sorted(found)

    def _found(self) -> dict[int, float]:
        return dict(zip(self._keys.tolist(), self._values.tolist(), strict=True))


class _SharedParts:
    """Divides the computation of log-probabilities among the ranks, in rounds.

    In a round, each rank computes one part of a batch (see `_parts`), and waits until the slowest rank is
    done. At the end of a round, the ranks exchange the results, so that each rank knows the results of all
    finished rounds.

    Args:
        known: maps the key of a sequence to its log-probability. The results are added to this dictionary.
    """

    def __init__(self, lm: LanguageModel, ranks: Ranks, known: dict[int, float]) -> None:
        self._lm, self._ranks, self._known = lm, ranks, known
        self._round: list[PackedBatch] = []
        self._keys: set[int] = set()  # the keys of the sequences in the round

    def lacks(self, part: PackedBatch) -> bool:
        """Whether the part has a sequence that is not in the round and has no known log-probability."""
        return any(key not in self._known and key not in self._keys for key in sequence_keys(part).tolist())

    def add(self, part: PackedBatch) -> None:
        """Add a part to the round. If the round now has a part for each rank, compute the round.

        All sequences of the part are computed, even those with a known log-probability. So the bits of the
        new results do not depend on which log-probabilities are known already.
        """
        self._round.append(part)
        self._keys.update(sequence_keys(part).tolist())
        if len(self._round) == self._ranks.size:
            self.compute()

    def compute(self) -> None:
        """Compute the parts of the round.

        If a sequence is in several parts, its results may differ by rounding. The result of the last part is
        kept, as in a run with a single rank.
        """
        if not self._round:
            return
        own: list[float] = []
        if self._ranks.rank < len(self._round):
            own = _log_probs(self._lm, self._round[self._ranks.rank]).tolist()
        for part, values in zip(self._round, self._ranks.gather(own, _PLACE), strict=False):
            self._known.update(zip(sequence_keys(part).tolist(), values, strict=True))
        self._round.clear()
        self._keys.clear()


def sequence_keys(batch: PackedBatch) -> Array:
    """Return a uint64 array: for each sequence, a digest of its tokens and targets."""
    spans = itertools.pairwise(batch.starts.tolist())
    keys = [_key(batch.ids[begin:end].tobytes() + batch.targets[begin:end].tobytes()) for begin, end in spans]
    return np.array(keys, np.uint64)


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def by_sequence(batch: PackedBatch) -> Array:
    """For each target of a batch, the index of its sequence."""
    return np.asarray(rows_of(batch.starts)[batch.targets != IGNORED])


def sums(batch: PackedBatch, log_probs: Array) -> Array:
    """For each sequence of the batch, add up the `log_probs` of the sequence's targets."""
    return np.bincount(by_sequence(batch), log_probs, len(batch.starts) - 1)


def drop(directory: files.Directory) -> None:
    """Remove the reference's file, which an earlier run with another objective may have left."""
    with contextlib.suppress(FormatError, FileNotFoundError):
        with safetensors.reading(Path(directory, REFERENCE), follow_links=False) as content:
            is_ours = REFERENCE_MARK in content.metadata
        if is_ours:
            remove_in(directory.fd, REFERENCE)


def _parts(sequences: Iterable[PackedBatch]) -> Iterable[PackedBatch]:
    for batch in sequences:
        yield from batch.pieces(EVALUATION_TOKENS)


def _log_probs(lm: LanguageModel, part: PackedBatch) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        values = sums(part, lm.log_probs(part))
    if not np.isfinite(values).all():
        bad = values[~np.isfinite(values)][0]
        raise NonFiniteLossError(
            f"finetune: without an adapter, the log-probability of an answer is {bad}, expected a finite "
            "number"
        )
    return values


# ---- the file ----


def _identity(lm: LanguageModel) -> str:
    """A hash of the model, the arithmetic, the instruction set and the version of nplora.

    The log-probabilities depend on all of these, and on the data.
    """
    config = _core.config()
    parts = base_fingerprint(lm, whole=True), lm.compute, str(config["isa"]), str(config["version"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(directory: files.Directory, model: str) -> tuple[dict[int, float], str]:
    """Return a dict of the log-probabilities in the file, and a text that says what is wrong with the file.

    If the file can be used, the text is empty. If there is no file, the dict and the text are empty.

    Raises:
        FileExistsError: the file is not in the safetensors format, and the directory holds no run.
    """
    path = Path(directory, REFERENCE)
    if not os.path.lexists(path):
        return {}, ""
    try:
        with safetensors.reading(path, follow_links=False) as content:
            metadata = content.metadata
            if REFERENCE_MARK not in metadata and not holds_run(directory):
                raise FormatError(f"{path}: is not a reference")
            if metadata.get(REFERENCE_MARK) != _SCHEMA or metadata.get("model") != model:
                return {}, "it is from another model, arithmetic, instruction set or version of nplora"
            keys, values = (content[name].numpy() for name in ("keys", "values"))
            if metadata.get("sha256") != _digest(keys, values):
                return {}, "it is damaged"
    except KeyError:
        return {}, "it is damaged"
    except (FormatError, OSError) as error:
        if not holds_run(directory):
            reason = "no run made the file: move it, or choose another directory"
            raise FileExistsError(errno.EEXIST, reason, str(path)) from error
        return {}, f"it is damaged ({message_of(error)})"
    if len(keys) != len(values) or not np.isfinite(values).all():
        return {}, "it is damaged"
    return dict(zip(keys.tolist(), values.tolist(), strict=True)), ""


def _sorted(found: Mapping[int, float]) -> tuple[Array, Array]:
    """The keys in ascending order, uint64, and their log-probabilities, float64."""
    keys = sorted(found)
    return np.array(keys, np.uint64), np.array([found[key] for key in keys], np.float64)


def _write(directory: files.Directory, model: str, keys: Array, values: Array) -> bool:
    """Write the file, or warn if this is not possible. Return whether the file was written.

    No error is raised here: if the disk is full, the first checkpoint raises one anyway.
    """
    metadata = {REFERENCE_MARK: _SCHEMA, "model": model, "sha256": _digest(keys, values)}
    path = Path(directory, REFERENCE)
    try:
        new = safetensors.new_file(path, {"keys": keys, "values": values}, metadata)
        files.replace([new], directory)
    except OSError as error:
        size = counted(len(keys), "log-probability").replace("ys", "ies")
        warn_user(
            f"finetune: {size} of the reference could not be saved ({message_of(error)}); a resumed run "
            "computes them again"
        )
        return False
    return True


def _digest(keys: Array, values: Array) -> str:
    parts = f"{keys.dtype} {keys.shape} {values.dtype} {values.shape}\n".encode()
    return hashlib.sha256(parts + keys.tobytes() + values.tobytes()).hexdigest()
