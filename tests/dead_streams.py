"""Streams that cannot be written: the reader is gone, the disk is full, or they are closed."""

import errno
import io
from typing import Any


class Dead(io.StringIO):
    """A terminal whose reader is gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


DEAD: dict[str, Any] = {
    "pipe": Dead(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "terminal": Dead(OSError(errno.EIO, "Input/output error")),
    "disk": Dead(OSError(errno.ENOSPC, "No space left on device")),
    "closed": closed(),
    "none": None,
}
