"""Tests on systems that lack something of Linux: signals, forks, symbolic links, /proc, ...

A test says what it needs by using it. If the system lacks it, the test is skipped, and the reason says what
is lacking. Only the code of tests is excused: the same error inside the package is a failure.
"""

import ctypes
import os
import re
import shlex
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

import pytest

from nplora.platform import files

IS_WINDOWS = sys.platform == "win32"
IS_BROWSER = sys.platform == "emscripten"
# musl's malloc gives freed memory back to the system at once, so each new array has new pages.
HAS_MUSL = "musl" in str(sysconfig.get_config_var("SOABI"))
IS_WINE = IS_WINDOWS and hasattr(ctypes.windll.ntdll, "wine_get_version")  # type: ignore[attr-defined]

_TESTS = Path(__file__).parent
_OURS = re.compile(r"[\\/](tests|nplora|bench)[\\/]")  # frames of the standard library are left out
_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
_SYSTEM_MODULES = {"os", "posix", "nt", "signal", "socket", "time"}
_DIRECTORIES = re.compile(r"(?:[A-Za-z]:)?[\\/](proc|sys|dev)[\\/]")
_NO_PRIVILEGE = 1314  # Windows allows symbolic links to few users

needs_signals = pytest.mark.skipif(IS_WINDOWS, reason="this system sends no signals to other processes")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or IS_BROWSER, reason="this system has no fork")
needs_new_paths = pytest.mark.skipif(
    IS_WINE or IS_BROWSER, reason="this system does not know an open directory's new path"
)
needs_locks = pytest.mark.skipif(IS_BROWSER, reason="this system has no locks of files")
needs_links = pytest.mark.skipif(IS_WINDOWS, reason="this system's links are second names of the file")
needs_flushing = pytest.mark.skipif(IS_WINDOWS, reason="this system flushes directories by itself")
needs_resizing = pytest.mark.skipif(sys.platform != "linux", reason="this system cannot resize mappings")
needs_bash = pytest.mark.skipif(IS_WINDOWS, reason="this system runs no scripts of bash")
needs_cpuinfo = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="this system has the processor's name in no file"
)
needs_counted_pages = pytest.mark.skipif(IS_WINE, reason="Wine does not count a process's mapped pages")
needs_cut_files = pytest.mark.skipif(IS_WINDOWS, reason="this system refuses to shorten mapped files")


def needs_procfs(name: str) -> pytest.MarkDecorator:
    """Skip a test where the system does not have this file of each process in /proc."""
    there = not IS_WINDOWS and Path("/proc/self", name).exists()  # Wine shows that of another process
    return pytest.mark.skipif(not there, reason=f"this system has no /proc/self/{name}")


# The return code of a process after Popen.kill(). On Windows, a Python error gives the same code.
KILLED = 1 if IS_WINDOWS else -signal.SIGKILL

# Code by which a process sends itself Ctrl-C. On Windows, os.kill would end it.
CTRL_C = "signal.raise_signal(signal.SIGINT)" if IS_WINDOWS else "os.kill(os.getpid(), signal.SIGINT)"


# Code after which a process rounds upward.
if IS_WINDOWS:
    ROUND_UPWARD = "import ctypes; assert ctypes.CDLL('ucrtbase').fesetround(0x200) == 0\n"
else:
    ROUND_UPWARD = (
        "import ctypes, ctypes.util, platform\n"
        "upward = {'x86_64': 0x800, 'aarch64': 0x400000, 'arm64': 0x400000}[platform.machine()]\n"
        "assert ctypes.CDLL(ctypes.util.find_library('m')).fesetround(upward) == 0\n"
    )


def _can_link() -> bool:
    """Whether symbolic links can be made. Wine says yes, and makes none."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            os.symlink(directory, os.path.join(directory, "link"))
        except OSError:
            return False
        return os.path.lexists(os.path.join(directory, "link"))


def _refuse_link(*arguments: object, **keywords: object) -> None:
    raise OSError(0, "symbolic links are not allowed", None, _NO_PRIVILEGE)


HAS_LINKS = not IS_WINDOWS or _can_link()
if not HAS_LINKS:
    os.symlink = _refuse_link


def path_of(descriptor: int) -> str:
    """The path of an open file, or what the system says about a descriptor of another kind."""
    if not IS_WINDOWS:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    try:
        return files.path_of(descriptor)
    except OSError:
        return ""


def words_of(line: str) -> list[str]:
    """The words of a command line, as this system's shell or program reads them."""
    if not IS_WINDOWS:
        return shlex.split(line)
    count, shell = ctypes.c_int(), ctypes.windll.shell32  # type: ignore[attr-defined]
    shell.CommandLineToArgvW.restype = ctypes.POINTER(ctypes.c_wchar_p)
    return shell.CommandLineToArgvW(ctypes.c_wchar_p(line), ctypes.byref(count))[: count.value]


def lacking(error: BaseException) -> str | None:
    """The feature that the system lacks, if an error means this and a test asked for the feature."""
    if not _is_of_a_test(error.__traceback__):
        return None
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return f"{error.obj.__name__}.{error.name}" if error.obj.__name__ in _SYSTEM_MODULES else None
    if isinstance(error, ModuleNotFoundError):
        return f"the module {error.name}" if error.name in _MODULES else None
    if isinstance(error, FileNotFoundError) and _DIRECTORIES.match(str(error.filename)):
        return str(error.filename)
    if isinstance(error, OSError) and getattr(error, "winerror", None) == _NO_PRIVILEGE:
        return "symbolic links for this user"
    if isinstance(error, ValueError) and "preexec_fn is not supported" in str(error):
        return "preexec_fn"
    if IS_BROWSER and isinstance(error, OSError) and "does not support processes" in str(error):
        return "processes"
    if IS_BROWSER and isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "threads"
    return None


def _frames(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename
        traceback = traceback.tb_next


def _is_of_a_test(traceback: TracebackType | None) -> bool:
    ours = [name for name in _frames(traceback) if _OURS.search(name)]
    return bool(ours) and Path(ours[-1]).is_relative_to(_TESTS)
