"""Sets the number of threads, releases idle memory, and prints the configuration for a bug report."""

import sys

import numpy as np

from nplora import _check, _core
from nplora.platform import host
from nplora.runtime.machine import cpu_name

_INT_MAX = 2**31 - 1  # the core counts threads in an int


def obey_threadpoolctl() -> None:
    """Let `threadpoolctl.threadpool_limits` limit nplora's threads, as it limits OpenMP's threads.

    threadpoolctl knows OpenMP's libraries, but nplora has its own thread pool. In a build with OpenMP, nplora
    follows OpenMP's limit, so this function does nothing.
    """
    if _core.config()["openmp"]:
        return
    try:
        from threadpoolctl import LibController, register
    except ImportError:
        return

    class Controller(LibController):  # type: ignore[misc, unused-ignore]
        user_api = "openmp"
        internal_api = "nplora"
        filename_prefixes = ("_core",)
        check_symbols = ("nplora_outer_threads",)

        def get_version(self) -> str:
            return str(_core.config()["version"])

        def get_num_threads(self) -> int:
            return _core.get_outer_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _core.set_outer_threads(num_threads)

    register(Controller)


def set_num_threads(n: int) -> None:
    """Use at most `n` threads. Results are bit-identical for any number of threads.

    OMP_NUM_THREADS and threadpoolctl limit the number of threads too. The smallest limit applies.

        >>> import nplora
        >>> before = nplora.get_num_threads()
        >>> nplora.set_num_threads(1)
        >>> nplora.get_num_threads()
        1
        >>> nplora.set_num_threads(before)

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1 or above 2**31 - 1.
    """
    _core.set_num_threads(_check.integer("set_num_threads", "n", n, least=1, most=_INT_MAX))


def get_num_threads() -> int:
    """The number of threads that an operation may use.

    >>> import nplora
    >>> nplora.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def release_memory() -> None:
    """Return idle memory to the system.

    When a large result is freed, its memory stays idle until a later result needs memory. The sum of used and
    idle memory never exceeds the highest amount of used memory so far plus 4 MiB.

        >>> import nplora
        >>> nplora.release_memory()
    """
    _core.release_buffers()


def show_config() -> None:
    """Print the configuration for bug reports: versions, instruction set, processor, and numbers of threads.

    >>> import nplora
    >>> nplora.show_config()  # doctest: +ELLIPSIS
    nplora:          ...
    instruction set: ...
    """
    config = _core.config()
    lines = {
        "nplora": config["version"],
        "instruction set": f"{config['isa']} (available: {', '.join(_core.available_isas())})",
        "processor": cpu_name(),
        "threads": f"{config['num_threads']} ({config['parallel']})",
        "OpenMP": config["openmp"],
        "compiler": config["compiler"],
        "Python": sys.version.split()[0],
        "NumPy": np.__version__,
        "platform": host.system_name(),
    }
    for i, pool in enumerate(_thread_pools()):
        lines[f"runtime {i}"] = pool
    for name, value in lines.items():
        print(f"{name + ':':<17}{value}")


def _thread_pools() -> list[str]:
    """Describe the thread pools of this process. Without threadpoolctl, return an empty list."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    keys = ("user_api", "internal_api", "version")  # a version may be None
    return [
        f"{' '.join(pool[key] for key in keys if pool[key])}, {pool['num_threads']} threads"
        for pool in threadpool_info()
    ]
