"""`python -m bench`: every benchmark, each contestant checked before it is timed."""

import argparse
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from bench import bench_adamw, bench_import, bench_lora_step, bench_merge, ceilings
from bench.timing import Contestant, on_threads, race

NAMES = ("lora_step", "merge", "adamw", "import")


def main() -> None:
    options = parse_arguments()
    threads = [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    results: dict[str, Any] = {"machine": machine()}
    if options.only is None:
        results["bandwidth"] = [bandwidth(options.quick, n) for n in threads]
    if options.only in (None, "lora_step"):
        results["lora_step"] = [bench_lora_step.run(options.quick, n) for n in threads]
    if options.only in (None, "merge"):
        results["merge"] = [bench_merge.run(options.quick, n) for n in threads]
        results["merge_peak_growth"] = bench_merge.run_memory()
    if options.only in (None, "adamw"):
        results["adamw"] = [bench_adamw.run(options.quick, n) for n in threads]
    if options.only in (None, "import"):
        results["import"] = bench_import.run(options.quick)
    if options.wheel is not None:
        results["wheel"] = bench_import.run_wheel(options.wheel)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that all runs, not to be quoted"
    )
    parser.add_argument("--only", choices=NAMES, help="one benchmark alone")
    parser.add_argument("--wheel", type=Path, help="print the size of this wheel too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Print and return what the figures depend on. nplora is asked here, where nothing is timed."""
    import nplora

    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = found[1] if found else platform.machine()
    cores, isa = len(os.sched_getaffinity(0)), nplora._core.config()["isa"]
    print(f"{cpu}, {cores} cores")
    print(f"nplora {nplora.__version__} on {isa}, NumPy {np.__version__} with {numpy_blas()}")
    return {"cpu": cpu, "cores": cores, "isa": isa, "nplora": nplora.__version__, "numpy": np.__version__}


def numpy_blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def bandwidth(quick: bool, threads: int) -> dict[str, Any]:
    """Print the rates of a loop that reads 256 MiB and of one that reads and writes them in place."""
    path = ceilings.library()
    if path is None:
        print("no C++ compiler: ceilings are not measured")
        return {"threads": threads}
    count = 64 * 2**20
    contestants = [
        Contestant("read", ceilings.read, (path, threads, count)),
        Contestant("rewrite", ceilings.rewrite, (path, threads, count)),
    ]
    seconds = race(contestants, rounds=3 if quick else 9, calls=3)
    read, rewrite = 4 * count / seconds["read"] / 1e9, 8 * count / seconds["rewrite"] / 1e9
    print(
        f"memory, {on_threads(threads)}: read {read:.1f} GB/s, read and written in place {rewrite:.1f} GB/s"
    )
    return {"threads": threads, "read": read, "rewrite": rewrite}


if __name__ == "__main__":
    main()
