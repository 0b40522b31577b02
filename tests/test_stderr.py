"""stderr: whatever is wrong with it, writing to it ends nothing."""

import errno
import io
import sys
from typing import Any

import pytest

from nplora.stderr import stderr


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


@pytest.mark.parametrize("kind", DEAD)
def test_what_cannot_be_written_is_dropped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", DEAD[kind])
    print("lost", file=stderr, flush=True)
    assert stderr.isatty() == isinstance(DEAD[kind], Dead)


def test_what_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    print("read", file=stderr, flush=True)
    assert capsys.readouterr().err == "read\n"
    assert stderr.encoding == sys.stderr.encoding
    assert not stderr.isatty()
