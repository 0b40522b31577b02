"""Opening GGUF files: tensors and metadata are views of the mapped file."""

import mmap
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from nplora.formats import files
from nplora.formats.errors import missing_name
from nplora.formats.files import StrPath
from nplora.formats.gguf.header import START, Header, parse, parse_start
from nplora.formats.gguf.metadata import Metadata
from nplora.formats.gguf.tensor import Tensor

_MAX_REMEMBERED = 8

Content: TypeAlias = mmap.mmap | memoryview


class GgufFile(Mapping[str, Tensor]):
    """The tensors of an opened file by name, in the file's order, and its `metadata`.

    `entries` has their types, shapes and places, for which no tensor is made. `mapped` is the stamp of the
    file if it is mapped.
    """

    def __init__(
        self, data: memoryview, source: str, header: Header, mapped: tuple[files.Stamp, ...] = ()
    ) -> None:
        self.source, self._data, self.mapped = source, data, mapped
        self.version, self.alignment = header.version, header.alignment
        self.entries = header.entries
        self.metadata = Metadata(data, source, header.values, header.types)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries.get(name)
        if entry is None:
            raise missing_name(self.source, name, self.entries)
        data = np.frombuffer(self._data[entry.begin : entry.end], np.uint8)
        return Tensor(name, entry.type.name, entry.shape, data, entry.begin, self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"GgufFile({self.source!r}, {len(self)} tensors)"


def open(path: StrPath, mmap: bool = True) -> GgufFile:
    """Open a file and check its header.

    The header is remembered, and the mapping shared with whatever still uses it, until the file's size or
    time of change differ: opening a file again for each of its tensors costs little.

    Args:
        mmap: map the file, so that nothing is read before it is used. If another program cuts a mapped file
            short, a process that reads it ends with a message and status 135; False copies the file into
            memory instead.
    Returns:
        a mapping name -> `Tensor` with `.metadata`. Both keep the file mapped.
    Raises:
        FormatError: the file breaks the format; the subclass says how. OSError: it cannot be read.
    """
    source = files.name(path)
    with files.reading(path) as reader:
        known = _known.get(reader.stamp)
        data: Content | None = known.mapping() if known and mmap else None
        if data is None:
            parse_start(reader[: START.size], len(reader), source)  # before nonsense is copied
            data = reader.map() if mmap else reader[:]
    view = memoryview(data)
    header = known.header if known else parse(view, source)
    _remember(reader.stamp, header, data)
    return GgufFile(view, source, header, (reader.stamp,) if mmap else ())


def loads(data: bytes | bytearray | memoryview) -> GgufFile:
    """As `open`, over bytes in memory, which must not change while the file is in use."""
    view = memoryview(data).toreadonly()
    return GgufFile(view, "<bytes>", parse(view, "<bytes>"))


# ---- what is remembered of files ----


@dataclass(frozen=True)
class _Known:
    header: Header
    mapping: weakref.ref[Content]


_known: dict[files.Stamp, _Known] = {}


def _remember(stamp: files.Stamp, header: Header, data: Content) -> None:
    if not stamp.settled:
        return
    _known.pop(stamp, None)
    while len(_known) >= _MAX_REMEMBERED:
        _known.pop(next(iter(_known)), None)
    _known[stamp] = _Known(header, weakref.ref(data))
