"""Checks of training on several MPI ranks, with a real model and with faults. They measure no speed.

    python -m bench.ranks same --ranks 4       # SmolLM2 on one process and on four ranks: the same adapter
    python -m bench.ranks resume 2 1 3         # each number of ranks continues after the last was killed
    python -m bench.ranks faults --jobs 60     # jobs with a random fault: all end, and resume to the bit

All need mpi4py and an MPI library, and use the mpiexec beside this Python, or the one in PATH.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import nplora.cli.demo.dictionary as demo
from bench.bench_train import model_file
from nplora.nn.module import Parameter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from distributed import faults, launching

STEPS, ACCUMULATE = 6, 4
KINDS = ("error", "kill", "stop", "interrupt", "terminate", "user", "batch", "raise")
TIMEOUT, MOST = 3, 10  # seconds after which a rank is given up, and in which every other job must end

# The program of a rank, which first writes its process number.
RUN = """
import os, sys, pathlib
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
pathlib.Path(sys.argv[1], f"rank{rank}").write_text(str(os.getpid()))
from nplora import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def start(place: Path, ranks: int, *more: str) -> subprocess.Popen[str]:
    """Fine-tune SmolLM2 with dropout on a number of ranks; 0: one process without MPI."""
    options = f"--steps {STEPS} --accumulate {ACCUMULATE} --batch-tokens 384 --dropout 0.1 --save-every 1"
    words = [sys.executable, "-c", RUN, str(place), "finetune", str(model_file()), "--data", str(demo.DATA)]
    words += ["--output", str(place / "run"), *options.split(), *more]
    if ranks:
        words = [str(launching.MPIEXEC), "-n", str(ranks), *words, "--distributed", "mpi"]
    return subprocess.Popen(
        words, env=launching.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def digest(place: Path) -> str:
    return hashlib.sha256((place / "run" / "adapter_model.safetensors").read_bytes()).hexdigest()


def whole(place: Path, ranks: int) -> str:
    """The digest of a whole run."""
    place.mkdir()
    errors = (process := start(place, ranks)).communicate()[1]
    if process.returncode:
        raise RuntimeError(errors)
    return digest(place)


def made(place: Path) -> int:
    """The number of steps in the log."""
    try:
        return (place / "run" / "log.jsonl").read_text().count('"event":"step"')
    except OSError:
        return 0


def same(place: Path, ranks: int) -> None:
    one, several = whole(place / "one", 0), whole(place / "several", ranks)
    print(f"one process:  {one}\n{ranks} ranks:      {several}\n{'same' if one == several else 'DIFFERENT'}")


def resume(place: Path, numbers: list[int]) -> None:
    wanted, chain = whole(place / "whole", 0), place / "chain"
    chain.mkdir()
    for part, ranks in enumerate(numbers):
        before = made(chain)
        process = start(chain, ranks, "--resume")
        if part < len(numbers) - 1:
            while made(chain) < before + 2 and process.poll() is None:
                time.sleep(0.05)
            os.kill(int((chain / f"rank{ranks - 1}").read_text()), signal.SIGKILL)
        process.communicate()
        print(f"{ranks} ranks: steps {before + 1} to {made(chain)}, status {process.returncode}", flush=True)
    found = digest(chain)
    print(f"without a stop: {wanted}\nresumed:        {found}\n{'same' if wanted == found else 'DIFFERENT'}")


def inject(place: Path, jobs: int, seed: int) -> None:
    """Run jobs with a fault of a random kind, on a random rank and at a random step; and resume each."""
    warnings.simplefilter("ignore")
    rng, counts, slowest, bad = random.Random(seed), Counter[str](), 0.0, 0
    expected = faults.train(None, [], None).parameters()
    for number in range(jobs):
        kind, ranks, step = rng.choice(KINDS), rng.choice([2, 3, 4]), rng.randrange(1, 15)
        rank, directory = rng.randrange(ranks), place / "run"
        shutil.rmtree(directory, ignore_errors=True)
        words, begin = [launching.HERE / "faults.py", kind, rank, step, directory], time.monotonic()
        more = {"NPLORA_RANK_TIMEOUT": str(TIMEOUT)} | ({"FAULT_SECONDS": "1"} if kind == "batch" else {})
        status, _, errors = launching.run((ranks, words), **more)
        took = time.monotonic() - begin
        resumed = resumed_here(directory)
        is_same = all(np.array_equal(a.value, b.value) for a, b in zip(resumed, expected, strict=True))
        counts[kind] += 1
        slowest, bad = max(slowest, took), bad + (not is_same or took > MOST)
        line = f"{number} {kind}: rank {rank} of {ranks}, step {step}: status {status}, {took:.1f} s, "
        print(line + ("same" if is_same else f"DIFFERENT: {errors[-500:]}"), flush=True)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    print(f"{jobs} jobs ({kinds}): {bad} failed, the slowest took {slowest:.1f} s")


def resumed_here(directory: Path) -> list[Parameter]:
    """Continue the run in this process, as soon as all of its ranks have ended."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            return faults.train(None, [], directory).parameters()
        time.sleep(0.1)
    raise AssertionError("a rank is still alive")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("check", choices=["same", "resume", "faults"])
    parser.add_argument("numbers", nargs="*", type=int, default=[2, 1, 3], help="ranks, for resume")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if given.check == "same":
            same(place, given.ranks)
        elif given.check == "resume":
            resume(place, given.numbers)
        else:
            inject(place, given.jobs, given.seed)


if __name__ == "__main__":
    main()
