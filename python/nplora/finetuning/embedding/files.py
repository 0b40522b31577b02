"""embed_file: the embeddings of the texts of a file, written to a .npy, .csv or .jsonl file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter, read_adapter
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.sources import Data, Source, sources_of
from nplora.finetuning.slow_progress import Progress
from nplora.finetuning.token_progress import speaker
from nplora.formats import files, model_directory, peft_adapter
from nplora.formats.errors import DataError, brief, counted
from nplora.formats.files import NewFile, StrPath
from nplora.lm import Encoder, load_encoder

Array = npt.NDArray[Any]

OUTPUTS = (".npy", ".csv", ".jsonl")
_TEXTS = 512  # texts between two reports of the progress
_ROWS = 256  # rows that are written at once


@dataclass(frozen=True)
class Embedded:
    """The file that `embed_file` wrote; `print` describes it.

    Attributes:
        output: the file.
        texts: the number of texts.
        dim: the width of an embedding.
        cut: the number of texts that were longer than `max_length` tokens, and were cut.
        max_length: the maximum number of tokens that a text may have.

    >>> import nplora
    >>> made = nplora.embedding.embed_file("encoder-model", [{"text": "a cat"}], "cat.npy")
    >>> made.texts, made.dim, made.cut
    (1, 32, 0)
    """

    output: Path
    texts: int
    dim: int
    cut: int
    max_length: int

    def __str__(self) -> str:
        words = f"{self.output}: {counted(self.texts, 'embedding')} of {self.dim:,} values"
        return words + (
            f"; {counted(self.cut, 'text')} cut to {self.max_length:,} tokens" if self.cut else ""
        )


@_check.keywords
def embed_file(
    model: StrPath | Encoder,
    data: Data,
    output: StrPath,
    *,
    adapter: StrPath | Adapter | None = None,
    any_base: bool = False,
    pooling: str | None = None,
    column: str = "text",
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Embedded:
    """Compute the embeddings of all texts of a file, and write them to another file.

        >>> import nplora
        >>> rows = [{"text": "a cat"}, {"text": "a dog"}]
        >>> print(nplora.embedding.embed_file("encoder-model", rows, "vectors.npy"))
        vectors.npy: 2 embeddings of 32 values

    Args:
        model: a directory or GGUF file, as for `load_encoder`, or an encoder.
        data: rows, as in `nplora.data.read_dataset`, or a .txt file with a text in each line.
        output: the file to write. .npy: float32 (texts, dim); .csv: a column for the text, and a column for
            each value of its embedding; .jsonl: {"text": …, "embedding": […]}. The rows have the order of
            the data.
        adapter: a PEFT directory, or an `Adapter`. With an adapter, `model` must be a path.
        any_base: accept an adapter that was trained on another model with the same shapes. With `any_base`,
            `model` must be a path.
        pooling: as in `load_encoder`. With `pooling`, `model` must be a path.
        column: the field that holds the text.
        normalize, prompt, prompt_name, batch_size, max_length: as in `Encoder.embed`.
        overwrite: replace an existing file.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
    Raises:
        DataError: a text is missing or empty, or there are no texts. The message names the file and the line.
        ValueError, TypeError: an argument has a wrong value or type; or the output is one of the
            input files; or an embedding has NaN or infinity.
        FileExistsError: the output exists, and `overwrite` is not set.
        OSError: a file cannot be read or written. If the output existed before, it stays unchanged.
    """
    op = "embed_file"
    files.require_named(op, output=output)
    if files.suffix(Path(output)) not in OUTPUTS:
        raise ValueError(
            f"{op}: output is {files.name(output)}, expected a file that ends in {', '.join(OUTPUTS)}"
        )
    if batch_size is not None:
        _check.integer(op, "batch_size", batch_size, least=1)
    files.require_new(output, overwrite)
    files.require_parent(output)
    sources = sources_of(op, data)
    texts = [text for source in sources for text in _texts(source, column)]
    if not texts:
        raise DataError(f"{', '.join(source.name for source in sources)}: there are no texts")
    encoder = _opened(op, model, adapter, any_base, pooling)
    _require_not_read(op, output, encoder, sources, adapter)
    longest = encoder.max_length
    if max_length is not None:
        longest = _check.integer(op, "max_length", max_length, 1, encoder.config.max_position_embeddings)
    before = encoder.prompt_text(prompt, prompt_name)
    ids, cut = encoder.token_ids([before + text for text in texts], longest)
    vectors = _embedded(encoder, ids, batch_size, normalize, speaker(progress))
    _require_finite(op, vectors, texts)
    files.replace([_new_file(output, texts, vectors)])
    return Embedded(Path(output), len(texts), encoder.dim, cut, longest)


def _opened(
    op: str, model: StrPath | Encoder, adapter: StrPath | Adapter | None, any_base: bool, pooling: str | None
) -> Encoder:
    if isinstance(model, Encoder):
        for name, value in (("adapter", adapter), ("any_base", any_base), ("pooling", pooling)):
            if value not in (None, False):
                raise ValueError(
                    f"{op}: {name} is given, but model is an encoder; expected a path to a model"
                )
        return model
    encoder = load_encoder(model, pooling=pooling)
    if adapter is not None:
        found = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, any_base=any_base)
        found.attach(encoder, any_base)
    return encoder


def _require_not_read(
    op: str, output: StrPath, encoder: Encoder, sources: Sequence[Source], adapter: StrPath | Adapter | None
) -> None:
    read = [("model", path) for path in model_directory.files_of(encoder.config.source)]
    read += [("data", source.path) for source in sources if source.path is not None]
    if adapter is not None and not isinstance(adapter, Adapter):
        read += [("adapter", path) for path in peft_adapter.files_of(adapter)]
    files.require_not_read(op, [output], read)


def _require_finite(op: str, vectors: Array, texts: Sequence[str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{op}: {len(wrong):,} of {counted(len(texts), 'embedding')} have NaN or infinity, the first one "
            f"for text {first + 1:,}, {brief(texts[first])}: the outputs of the model are not finite"
        )


def _texts(source: Source, column: str) -> Iterator[str]:
    """The texts of a source. If a text is missing, raises a DataError that names the file and the line."""
    number = 0
    for row in source.read():
        if row.error is not None:
            raise row.error
        if not source.is_text:
            if row.values.get(column) is None:
                words = f"{column} is missing; the row has {brief(list(row.values))}"
                raise DataError(
                    f"{row.where}: {words}; set --column (column=) to the name of the text's field"
                )
            yield Fields(row.values, row.where).text(column)
            continue
        for line in str(row.values["text"]).removesuffix("\n").split("\n"):
            number += 1
            if not line.strip():
                raise DataError(f"{source.name}, line {number}: the line is empty, expected a text")
            yield line


def _embedded(
    encoder: Encoder,
    ids: list[list[int]],
    batch_size: int | None,
    normalize: bool | None,
    say: Callable[[str], None],
) -> Array:
    progress = Progress("", "texts", len(ids), say)
    progress.begin(f"{counted(len(ids), 'text')}, {counted(sum(map(len, ids)), 'token')}")
    made = np.empty((len(ids), encoder.dim), np.float32)
    size = batch_size or 1
    for begin in range(0, len(ids), size * -(-_TEXTS // size)):
        rows = slice(begin, begin + size * -(-_TEXTS // size))
        made[rows] = encoder.embed_ids(ids[rows], batch_size, normalize)
        progress.add(len(ids[rows]))
    return made


def _new_file(output: StrPath, texts: list[str], vectors: Array) -> NewFile:
    suffix = files.suffix(Path(output))
    if suffix == ".npy":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(vectors))
        return NewFile(output, header.tell() + vectors.nbytes, [header.getvalue(), vectors.data.cast("B")])
    made = (_table if suffix == ".csv" else _objects)(texts, vectors)
    chunks = [chunk.encode() for chunk in made]
    return NewFile(output, sum(map(len, chunks)), chunks)


def _table(texts: list[str], vectors: Array) -> Iterator[str]:
    """The lines of a table. Values have nine significant digits, enough to restore each float32 exactly."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["text", *range(vectors.shape[1])])
    for begin in range(0, len(texts), _ROWS):
        rows = slice(begin, begin + _ROWS)
        for text, vector in zip(texts[rows], vectors[rows].tolist(), strict=True):
            writer.writerow([text, *(f"{value:.9g}" for value in vector)])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


def _objects(texts: list[str], vectors: Array) -> Iterator[str]:
    for text, vector in zip(texts, vectors.tolist(), strict=True):
        values = ", ".join(f"{value:.9g}" for value in vector)
        written = json.dumps(text, ensure_ascii=False, allow_nan=False)
        yield f'{{"text": {written}, "embedding": [{values}]}}\n'
