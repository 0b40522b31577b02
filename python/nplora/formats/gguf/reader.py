"""Opens and reads GGUF files. Tensors and arrays in the metadata are views of the mapped file."""

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
    """An open GGUF file: a mapping from each tensor's name to its `Tensor`, in the file's order.

    `metadata` holds the file's metadata. `entries` maps each name to the type, shape and position of the
    tensor, without reading the tensor. `mapped` holds the `Stamp` of a mapped file, and is empty for any
    other file. The stamp can show later whether the file was changed.

    >>> from nplora.formats import gguf
    >>> file = gguf.loads(gguf.dumps({"w": np.zeros((2, 3), np.float32)}, {"general.name": "toy"}))
    >>> list(file), file["w"], file.metadata["general.name"]
    (['w'], Tensor('w', F32, (2, 3)), 'toy')
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
    """Open a GGUF file and check its header.

    The parsed header is reused when the same file is opened again, as long as its size and modification time
    stay the same. The memory map is reused too if it is still in use. So it costs little to open a file again
    for each tensor.

    Args:
        path: the file.
        mmap: map the file into memory, so that each page is read from disk when it is first used. If another
            program truncates a mapped file and this process then reads a page that was cut off, the process
            ends with a message and exit status 135. `mmap=False` copies the whole file into memory instead.
    Returns:
        a mapping from name to `Tensor`, with the file's `.metadata`. The file stays mapped as long as a
        tensor or the metadata is in use.
    Raises:
        FormatError: the file breaks the format. The subclass of FormatError, such as TruncatedError, shows
            the kind of problem.
        OSError: the file cannot be read.

    >>> import nplora
    >>> nplora.formats.gguf.save("toy.gguf", {"w": np.ones((2, 3), np.float32)}, {"general.name": "toy"})
    >>> file = nplora.formats.gguf.open("toy.gguf")
    >>> file["w"].shape, file["w"].type, file.metadata["general.name"]
    ((2, 3), 'F32', 'toy')
    >>> float(file["w"].numpy().sum())
    6.0
    """
    source = files.name(path)
    with files.reading(path) as reader:
        known = _known.get(reader.stamp)
        data: Content | None = known.mapping() if known and mmap else None
        if data is None:
            parse_start(reader[: START.size], len(reader), source)  # refuses other formats early
            data = reader.map() if mmap else reader[:]
    view = memoryview(data)
    header = known.header if known else parse(view, source)
    _remember(reader.stamp, header, data)
    return GgufFile(view, source, header, (reader.stamp,) if mmap else ())


def loads(data: bytes | bytearray | memoryview) -> GgufFile:
    """Read a GGUF file from bytes in memory. The bytes must not change while the result is in use.

    >>> from nplora.formats import gguf
    >>> list(loads(gguf.dumps({"w": np.zeros(3)})))
    ['w']
    """
    view = memoryview(data).toreadonly()
    return GgufFile(view, "<bytes>", parse(view, "<bytes>"))


# ---- the cache of headers and mappings ----


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
