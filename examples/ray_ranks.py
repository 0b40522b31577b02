"""Fine-tune on a Ray cluster: Ray starts a rank on each node, and starts the ranks again after a failure.

    python ray_ranks.py model.gguf --data train.jsonl --output run --accumulate 8

The options are those of `nplora finetune`. Run it on a node of the cluster, which writes the output. All
nodes need ray, nplora[mpi] and mpich, the model and the data, at the same paths.

MPICH's launcher "manual" prints a command for each node. Ray runs these commands, which start the ranks. If
a rank or a node fails, the launcher ends, and the nodes that are left continue from the last checkpoint.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

RESTARTS = 3
LAUNCH = "HYDRA_LAUNCH: "  # what MPICH writes before the command for a node
WRONG = 2  # nplora's status for wrong arguments or files
SIGNALS = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)}


@ray.remote(max_retries=0)
def start_rank(words: list[str]) -> int:
    """Run a command of MPICH, and end it with this task."""
    libc = ctypes.CDLL(None)
    ended = lambda: libc.prctl(1, signal.SIGTERM)  # noqa: E731  PR_SET_PDEATHSIG
    return subprocess.run(words, check=False, preexec_fn=ended).returncode


def living_nodes(most: int) -> list[dict[str, Any]]:
    """The nodes that have a processor. This node is the first, so that rank 0 writes to its disk."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return sorted(nodes, key=lambda node: node["NodeID"] != here)[:most]


def run(nodes: list[dict[str, Any]], options: list[str]) -> int:
    """Make a run with a rank on each node, and return its status."""
    names = ",".join(f"node{number}" for number in range(len(nodes)))  # MPICH does not look them up
    ranks = [str(shutil.which("nplora")), "finetune", *options, "--distributed", "mpi", "--resume"]
    launcher = ["mpiexec", "-launcher", "manual", "-hosts", names, "-ppn", "1", "-n", str(len(nodes)), *ranks]
    process = subprocess.Popen(launcher, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    address, waiting, tasks = ray.util.get_node_ip_address(), iter(nodes), []
    for line in process.stdout:
        if not line.startswith("HYDRA_LAUNCH"):
            print(line, end="", flush=True)
        elif line.startswith(LAUNCH):
            node, words = next(waiting), shlex.split(line.removeprefix(LAUNCH))
            port = words.index("--control-port") + 1
            words[port] = f"{address}:{words[port].rpartition(':')[2]}"
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            cores = node["Resources"]["CPU"]  # Ray sets OMP_NUM_THREADS to it
            tasks.append(start_rank.options(num_cpus=cores, scheduling_strategy=place).remote(words))
    status = process.wait()
    ray.wait(tasks, num_returns=len(tasks), timeout=30)  # so that their nodes are free again
    return status


def main() -> int:
    options = sys.argv[1:]
    if "--accumulate" not in options:
        sys.exit("ray_ranks.py: give --accumulate, the number of batches in a step, which the ranks divide")
    most = int(options[options.index("--accumulate") + 1])
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # the launcher gets Ctrl-C too, and the run is saved
    for restart in range(RESTARTS + 1):
        nodes = living_nodes(most)
        print(f"ray_ranks.py: {len(nodes)} nodes", file=sys.stderr)
        status = run(nodes, options)
        if status in {0, WRONG} | SIGNALS or restart == RESTARTS:
            break
        print(f"ray_ranks.py: the ranks ended with status {status}, so they start again", file=sys.stderr)
        time.sleep(5)  # Ray may not have noticed yet that a node is gone
    return status


if __name__ == "__main__":
    sys.exit(main())
