"""Two MPI ranks of one thread against one process of two threads: tokens per second of SmolLM2's training.

`python -m bench.bench_distributed` runs both in turns, on this machine. With `--link`, there are also two
ranks in two network namespaces, with a link of 1 Gb/s between them, which needs root. All must train the same
adapter to the bit. A step has two batches of 4 x 256 tokens, one for each rank. If a step has more batches
(`--accumulate`), the ranks over the link also run without overlap: their gradients travel only while they
wait for them.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.bench_plan import Setting
from bench.bench_train import model_file
from bench.two_nodes import INTERFACE, linked, measured_rate, sent
from nplora.distributed import Network

BATCH = 4
TRAINED = 2_442_240  # values, for rank 8 on all linear layers
ALONE, LOCAL, LINKED = "one process, two threads", "two ranks of one thread", "the same over the link"
WAITING = "the same without overlap"
# MPICH (with UCX or with libfabric) must not use shared memory, but TCP by the interface of the namespaces.
OVER_TCP = {
    "MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": INTERFACE,
    "FI_PROVIDER": "tcp", "FI_TCP_IFACE": INTERFACE,
}  # fmt: skip
# MPI may then be called from the main thread only, so nplora starts no thread that moves messages.
NO_OVERLAP = {"MPI4PY_RC_THREAD_LEVEL": "funneled"}
BUSY = 3.0  # do not quote figures if the machine's load is above this

RUN = """
import json, os, sys, nplora
given = json.loads(sys.argv[1])
report = nplora.finetune(**given["options"], progress=False)
steps = report.history.steps
if int(os.environ.get("PMI_RANK", "0")) == 0:
    exchanged = report.ranks[0].exchanged / len(steps) if report.ranks else 0.0
    with open(given["result"], "w") as file:
        json.dump({"seconds": [step.seconds for step in steps[1:]], "exchanged": exchanged}, file)
"""


def run(
    name: str, directory: Path, prefixes: list[list[str]], given: argparse.Namespace, steps: int
) -> tuple[str, dict[str, Any]]:
    """Train in new processes. Returns the digest of the adapter, and the times of its steps."""
    output, result = directory / f"{name}-run", directory / f"{name}.json"
    options = {
        "model": str(model_file()), "data": str(directory / "rows.jsonl"), "output": str(output),
        "batch_examples": BATCH, "max_length": given.length, "learn": "all", "accumulate": given.accumulate,
        "steps": steps, "dropout": 0.05, "schedule": "constant", "overwrite": True,
        "distributed": None if name == ALONE else "mpi",
    }  # fmt: skip
    program = [sys.executable, "-c", RUN, json.dumps({"options": options, "result": str(result)})]
    over_link = name in (LINKED, WAITING)
    first, second = prefixes if over_link else ([], [])
    ranks = [given.mpiexec, "-n", "1", *first, *program, ":", "-n", "1", *second, *program]
    words = program if name == ALONE else ranks
    changes = {"OMP_NUM_THREADS": "2" if name == ALONE else "1"}
    changes |= (OVER_TCP if over_link else {}) | (NO_OVERLAP if name == WAITING else {})
    done = subprocess.run(words, env=os.environ | changes, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: status {done.returncode}: {done.stdout}{done.stderr}")
    digest = hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest, json.loads(result.read_text())


def main(words: Any = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_distributed", description=__doc__)
    parser.add_argument(
        "--link", action="store_true", help="also two namespaces with a link between them; needs root"
    )
    parser.add_argument("--rate", default="1Gb", help="bits per second of the link (default: 1Gb)")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in a step (default: 2)")
    parser.add_argument("--turns", type=int, default=5, help="runs of each contestant (default: 5)")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of a run; the first is not timed (default: 6)"
    )
    beside = Path(sys.executable).parent / "mpiexec"
    parser.add_argument(
        "--mpiexec", default=str(beside) if beside.exists() else "mpiexec", help="MPICH's mpiexec"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of an example (default: 256)")
    given = parser.parse_args(words)
    length = given.length
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        rate = Network.parse(given.rate).rate
        prefixes = stack.enter_context(linked(f"{rate:.0f}bit")) if given.link else []
        if given.link:
            print(f"the link carries {measured_rate(prefixes) / 1e6:.0f} Mb/s")
        Setting(BATCH * given.accumulate, length).write(Path(place))
        overlaps = given.link and given.accumulate > 2
        names = [ALONE, LOCAL, *([LINKED] if given.link else []), *([WAITING] if overlaps else [])]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        exchanged: dict[str, list[float]] = {name: [] for name in names}
        before = sent(prefixes[0]) if given.link else 0
        digests = {name: run(name, Path(place), prefixes, given, 2)[0] for name in names}
        if len(set(digests.values())) > 1:
            raise AssertionError(f"the adapters differ: {digests}")
        if given.link and sent(prefixes[0]) - before < 4 * TRAINED:
            raise AssertionError("the ranks have not used the link, but shared memory")
        print(f"all adapters have the SHA-256 {digests[ALONE][:16]}…")
        for turn in range(given.turns):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found = run(name, Path(place), prefixes, given, given.steps)[1]
                seconds[name] += found["seconds"]
                exchanged[name].append(found["exchanged"])
    report(names, BATCH * length * given.accumulate, seconds, exchanged)
    batch = median(seconds[ALONE]) / given.accumulate
    rounds = [(1, 2 * batch)] * -(-given.accumulate // 2)  # a rank of one thread takes twice as long
    predicted = Network.parse(given.rate).sums(4 * TRAINED, 2, rounds)
    print(f"predicted for {given.rate}/s: {1e3 * predicted:.0f} ms")


def report(
    names: list[str], tokens: int, seconds: dict[str, list[float]], exchanged: dict[str, list[float]]
) -> None:
    """Print the medians.

    Args:
        tokens: the number of tokens in a step.
    """
    busy = os.getloadavg()[0]
    for name in names:
        middle = median(seconds[name])
        print(
            f"{name}: {tokens / middle:.0f} tokens/s, {median(seconds[ALONE]) / middle:.3f} of {ALONE}; "
            f"{1e3 * median(exchanged[name]):.0f} ms of a step waiting for gradients"
        )
    if busy > BUSY:
        print(f"the machine has a load of {busy:.1f}: do not quote these figures")


if __name__ == "__main__":
    main()
