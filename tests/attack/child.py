"""Commands of nplora in forked children, which may be killed, run out of disk space or lose their terminal.

A forked child has imported everything already, so a short training run takes a quarter of a second.
"""

import dataclasses
import errno
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

import nplora.finetuning  # noqa: F401  here, so that no child has to import it
from nplora import cli

SECONDS = 60  # a child that takes longer counts as hanging

Action = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Ended:
    """The exit status of a child (negative: the signal that ended it), and its output."""

    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("nplora: error: ")]


def command(
    arguments: Sequence[str], prepare: Action | None = None, kill_after: float | None = None
) -> Ended:
    """Run one command of nplora in a forked child.

    Args:
        prepare: runs in the child, before the command.
        kill_after: seconds until SIGKILL.
    """
    return call(lambda: cli.main(list(arguments)), prepare, kill_after)


def call(body: Callable[[], int], prepare: Action | None = None, kill_after: float | None = None) -> Ended:
    """Run a function in a forked child. The function returns the exit status."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _run(body, prepare, out.fileno(), err.fileno())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return Ended(wait(pid), _text(out), _text(err))


def wait(pid: int, seconds: float = SECONDS) -> int:
    """The exit status of a child. A child that does not end in time is killed: an AssertionError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, state = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(state)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a child hung for {seconds} s")


def _run(body: Callable[[], int], prepare: Action | None, out: int, err: int) -> None:
    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        if prepare is not None:
            prepare()
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        status = body()
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


# ---- the disk ----

_CALLS = ("open", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "link", "fchmod")
_CREATES = os.O_CREAT | os.O_TRUNC

DiskAction = Callable[[str, tuple[Any, ...]], None]


class Disk:
    """Counts the calls of this process that change the disk, and performs an action before one of them.

    Attributes:
        names: the functions that were called, in order.
    """

    def __init__(self, at: int = 0, action: DiskAction | None = None) -> None:
        self._at, self._action = at, action
        self.names: list[str] = []

    def watch(self) -> None:
        """Wrap the functions of `os`."""
        for name in _CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            if name != "open" or arguments[1] & _CREATES:
                self.names.append(name)
                if len(self.names) == self._at and self._action is not None:
                    self._action(name, arguments)
            return call(*arguments, **keywords)

        return watched


def edges(names: Sequence[str]) -> list[int]:
    """The numbers, from 1, of all calls except those inside a sequence of writes."""
    around = zip(["", *names], names, [*names[1:], ""], strict=False)
    return [number for number, three in enumerate(around, 1) if set(three) != {"write"}]


def kill(name: str, arguments: tuple[Any, ...]) -> None:
    """SIGKILL this process. A write has written half of its bytes by then."""
    if name == "write":
        data = memoryview(arguments[1]).cast("B")
        os.writev(arguments[0], [data[: len(data) // 2]])
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str, arguments: tuple[Any, ...]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_broken(name: str, arguments: tuple[Any, ...]) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def at_step(step: int, action: Action) -> None:
    """Perform an action just before the record of this step is written to a run's log."""
    write, start = os.write, f'{{"event":"step","step":{step},'.encode()

    def watched(fd: int, data: Any) -> int:
        if bytes(data[: len(start)]) == start:
            action()
        return write(fd, data)

    os.write = watched
