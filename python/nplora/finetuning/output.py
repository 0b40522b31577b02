"""The output directory of a run, and the checks before anything is written to it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nplora.adapters import Adapter
from nplora.distributed.communicator import Communicator
from nplora.finetuning.load import RunInputs
from nplora.finetuning.options import FinetuneOptions
from nplora.formats import files, model_directory, peft_adapter, run_files, tokenizer_json
from nplora.formats.errors import UnsafeError
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.trainer.run_directory import RunDirectory

REPORTS = "reports"  # the directory in the output directory for the reports of `report_to`


@contextlib.contextmanager
def opened_output(place: Path, ranks: Communicator) -> Iterator[files.Directory | None]:
    """Open the output directory on rank 0. On other ranks, which may have no access to it, yield None."""
    if ranks.rank:
        yield None
        return
    with files.Directory(place) as directory:
        yield directory


def require_not_read(output: StrPath, inputs: RunInputs, adapter: StrPath | Adapter | None) -> None:
    """Raise an error if a run with this output directory would overwrite one of its input files.

    Args:
        adapter: the adapter that the run continues from.
    """
    read: list[tuple[str, StrPath]] = [*inputs.paths]
    if adapter is not None and not isinstance(adapter, Adapter):
        read += [("adapter", path) for path in peft_adapter.files_of(adapter)]
    more = tokenizer_json.FILES if inputs.added_tokens else ()
    require_inputs_kept("finetune", output, inputs.lm.config.source, read, more)


def require_inputs_kept(
    op: str,
    output: StrPath,
    model: StrPath,
    read: Iterable[tuple[str, StrPath]],
    more: Iterable[str] = (),
) -> None:
    """Raise an error if a run with this output directory would overwrite the model or another input.

    Args:
        read: a tuple for each other input file: what messages call the file, and its path.
        more: names of further files that this run writes.
    """
    names = [*run_files.NAMES, peft_adapter.CONFIG, peft_adapter.TENSORS, *more]
    inputs = [("model", path) for path in model_directory.files_of(model)]
    files.require_not_read(op, [Path(output, name) for name in names], [*inputs, *read])


def require_free(output: StrPath, options: FinetuneOptions, adds_tokens: bool) -> None:
    """Raise an error if the output directory holds a model.

    Also raise an error if it holds a run, unless `options.resume` or `options.overwrite` is set; or if it
    holds an adapter without a run, unless `options.overwrite` is set.

    Args:
        adds_tokens: whether the adapter adds tokens, so that a tokenizer is saved with it.
    """
    if options.report_to and Path(output, REPORTS).is_symlink():
        raise UnsafeError(f"{Path(output, REPORTS)}: a symbolic link, expected a directory for reports")
    require_free_directory(output, options.resume, options.overwrite, adds_tokens)


def require_free_directory(output: StrPath, resume: bool, overwrite: bool, adds_tokens: bool = False) -> None:
    """Raise an error if the directory holds something that the run must not replace; see `require_free`."""
    model_directory.require_no_model(output)
    if peft_adapter.lies_in(output) and not (holds_run(output) or overwrite):
        raise FileExistsError(
            errno.EEXIST,
            "the directory holds an adapter but no run: --overwrite (overwrite=True) replaces it",
            os.fspath(output),
        )
    peft_adapter.require_ours(output, overwrite, adds_tokens)
    if holds_run(output) and not (resume or overwrite):
        raise FileExistsError(
            errno.EEXIST,
            "the directory holds a run: --resume (resume=True) continues it, "
            "--overwrite (overwrite=True) deletes it",
            os.fspath(output),
        )
    with RunDirectory(output):  # fails if it cannot be locked or written
        pass
