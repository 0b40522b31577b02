"""Checks of training on several MPI ranks, with a real model and with faults. They measure no speed.

    python -m bench.ranks same --ranks 2 4     # SmolLM2 on one process, two and four ranks: the same adapter
    python -m bench.ranks same --cases dpo     # only this kind of run
    python -m bench.ranks resume 2 1 3         # each number of ranks continues after the last was killed
    python -m bench.ranks faults --jobs 60     # jobs with a random fault: all end, and resume to the bit

All need mpi4py and an MPI library, and use the mpiexec beside this Python, or the one in PATH.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nplora.cli.demo.dictionary as demo
from bench.bench_train import model_file
from nplora.nn.module import Parameter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from distributed import faults, launching

CHAIN = "--steps 6 --accumulate 4 --batch-tokens 384 --dropout 0.1"  # the run of `resume`
KINDS = ("error", "kill", "stop", "interrupt", "terminate", "user", "batch", "raise", "disk", *faults.TIMED)
SECONDS = 2.0  # after which a run with a timed fault is over
TIMEOUT, MOST = 3, 10  # seconds after which a rank is given up, and in which every other job must end

# The runs of `same`, each with the options of `finetune`. All make three steps.
CASES = {
    "sft": "--accumulate 4",
    "five": "--accumulate 5",  # which three or four ranks cannot share equally
    "dropout": "--accumulate 4 --dropout 0.1",
    "dpo": "--accumulate 4 --objective dpo",
    "micro-batches": "--accumulate 4 --dropout 0.1",
    "recompute": "--accumulate 4 --dropout 0.1 --recompute",
    "modules-to-save": "--accumulate 4 --modules-to-save lm_head",
}
MICRO_TOKENS = {"micro-batches": 60}
# One process adds parts of a gradient in another order here, unless it is a rank.
NEEDS_RANKS = {"modules-to-save"}
EXAMPLES = 48

# The program of a rank, which first writes its process number.
RUN = """
import os, sys, pathlib
from distributed.cases import executed
from nplora.finetuning.planning import ExecutionPlan
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
pathlib.Path(sys.argv[1], f"rank{rank}").write_text(str(os.getpid()))
from nplora import cli
micro = os.environ.get("MICRO_TOKENS")
with executed(ExecutionPlan("float32", False, int(micro)) if micro else None):
    sys.exit(cli.main(sys.argv[2:]))
"""


def start(
    place: Path, ranks: int, options: str = "", data: Path = demo.DATA, micro_tokens: int | None = None
) -> subprocess.Popen[str]:
    """Fine-tune SmolLM2 on a number of ranks; 0: one process without MPI. By default, with dropout."""
    options = options or CHAIN
    words = [sys.executable, "-c", RUN, str(place), "finetune", str(model_file()), "--data", str(data)]
    words += ["--output", str(place / "run"), "--save-every", "1", *options.split()]
    if ranks:
        words = [str(launching.MPIEXEC), "-n", str(ranks), *words, "--distributed", "mpi"]
    more = {} if micro_tokens is None else {"MICRO_TOKENS": str(micro_tokens)}
    return subprocess.Popen(
        words, env=launching.environment(**more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def digest(place: Path) -> str:
    return hashlib.sha256((place / "run" / "adapter_model.safetensors").read_bytes()).hexdigest()


def whole(place: Path, ranks: int, *more: Any) -> str:
    """The digest of a whole run."""
    place.mkdir()
    errors = (process := start(place, ranks, *more)).communicate()[1]
    if process.returncode:
        raise RuntimeError(errors)
    return digest(place)


def made(place: Path) -> int:
    """The number of steps in the log."""
    try:
        return (place / "run" / "log.jsonl").read_text().count('"event":"step"')
    except OSError:
        return 0


def write_data(directory: Path, has_pairs: bool) -> None:
    """Write examples of the demo; or pairs, in which the answer to the next question is the rejected one."""
    directory.mkdir()
    for name, count in (("train.jsonl", EXAMPLES), ("valid.jsonl", 10)):
        rows = [json.loads(line) for line in (demo.DATA / name).read_text().splitlines()[: count + 1]]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": after["completion"]}
            for row, after in itertools.pairwise(rows)
        ]
        chosen = pairs if has_pairs else rows[:-1]
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in chosen))


def same(place: Path, numbers: list[int], cases: list[str]) -> None:
    """Compare the adapters of one process and of several ranks."""
    for name in cases:
        here = place / name
        here.mkdir()
        write_data(here / "data", has_pairs=name == "dpo")
        more = f"--steps 3 --batch-tokens 150 {CASES[name]}", here / "data", MICRO_TOKENS.get(name)
        found = {"one process": whole(here / "one", int(name in NEEDS_RANKS), *more)}
        for ranks in numbers:
            found[f"{ranks} ranks"] = whole(here / str(ranks), ranks, *more)
        end = "same" if len({*found.values()}) == 1 else f"DIFFERENT: {found}"
        print(f"{name}: {', '.join(found)}: {found['one process'][:16]}, {end}", flush=True)


def resume(place: Path, numbers: list[int]) -> None:
    wanted, chain = whole(place / "whole", 0), place / "chain"
    chain.mkdir()
    for part, ranks in enumerate(numbers):
        before = made(chain)
        process = start(chain, ranks, f"{CHAIN} --resume")
        if part < len(numbers) - 1:
            while made(chain) < before + 2 and process.poll() is None:
                time.sleep(0.05)
            os.kill(int((chain / f"rank{ranks - 1}").read_text()), signal.SIGKILL)
        process.communicate()
        print(f"{ranks} ranks: steps {before + 1} to {made(chain)}, status {process.returncode}", flush=True)
    found = digest(chain)
    print(f"without a stop: {wanted}\nresumed:        {found}\n{'same' if wanted == found else 'DIFFERENT'}")


def inject(place: Path, jobs: int, seed: int, kinds: Sequence[str]) -> None:
    """Run jobs with a fault of a random kind, on a random rank and at a random moment; and resume each."""
    warnings.simplefilter("ignore")
    rng, counts, slowest, bad = random.Random(seed), Counter[str](), 0.0, 0
    late, places = 0, Counter[str]()
    expected = faults.train(None, [], None).parameters()
    for number in range(jobs):
        kind, ranks = rng.choice(kinds), rng.choice([2, 3, 4])
        is_timed = kind in faults.TIMED
        rank = 0 if kind == "disk" else rng.randrange(ranks)  # the others do not write
        moment = round(1000 * SECONDS * rng.random()) if is_timed else rng.randrange(1, 15)
        directory = place / "run"
        shutil.rmtree(directory, ignore_errors=True)
        words, begin = [launching.HERE / "faults.py", kind, rank, moment, directory], time.monotonic()
        more = {"NPLORA_RANK_TIMEOUT": str(TIMEOUT)} | ({"FAULT_SECONDS": "1"} if kind == "batch" else {})
        status, _, errors = launching.run((ranks, words), **more)
        took = time.monotonic() - begin
        resumed = resumed_here(directory)
        is_same = all(np.array_equal(a.value, b.value) for a, b in zip(resumed, expected, strict=True))
        counts[kind] += 1
        slowest, bad, late = max(slowest, took), bad + (not is_same), late + (took > MOST)
        line = f"{number} {kind}: rank {rank} of {ranks}, {moment} {'ms' if is_timed else 'th step'}"
        if is_timed:
            found = re.search("it gets a signal while (.*)", errors)
            doing = found[1] if found else "nothing: the run was over"
            places[doing] += 1
            line += f", {doing}"
        line += f": status {status}, {took:.1f} s, "
        print(line + ("same" if is_same else f"DIFFERENT: {errors[-500:]}"), flush=True)
    made = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    print(f"{jobs} jobs ({made}): {bad} resumed to other bits, {late} took more than {MOST} s")
    print(f"the slowest took {slowest:.1f} s")
    if places:
        print("the timed signals came while", ", ".join(f"{doing} ({n})" for doing, n in places.items()))


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
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="for same")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], help="for same")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="for faults")
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if given.check == "same":
            same(place, given.ranks, given.cases)
        elif given.check == "resume":
            resume(place, given.numbers)
        else:
            inject(place, given.jobs, given.seed, given.kinds)


if __name__ == "__main__":
    main()
