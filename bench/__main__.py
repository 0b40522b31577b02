"""`python -m bench`: runs every benchmark. The result of each contestant is checked before it is timed."""

import argparse
import json
import os
import platform
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import (
    bench_adamw,
    bench_classify,
    bench_dpo,
    bench_embed,
    bench_embedding_training,
    bench_import,
    bench_inference,
    bench_lora_step,
    bench_lowbit,
    bench_merge,
    bench_plan,
    bench_product,
    bench_serve,
    bench_threads,
    bench_train,
    bench_train_int8,
    bench_transformer,
    ceilings,
    plot,
)
from bench.timing import Runtimes, on_threads

NAMES = (
    "product",
    "int8",
    "rows",
    "lowbit",
    "lora_step",
    "merge",
    "adamw",
    "transformer",
    "inference",
    "serve",
    "train",
    "train_int8",
    "dpo",
    "embed",
    "embedding_training",
    "classify",
    "plan",
    "threads",
    "import",
)


def main() -> None:
    options = parse_arguments()
    threads = [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    if options.quick:
        threads = threads[-1:]
        Runtimes.once = True
    names = NAMES if options.only is None else options.only
    results: dict[str, Any] = {"machine": machine(), "ceilings": [ceilings_of(n) for n in threads]}
    for name in names:
        results |= measure(name, options.quick, threads, options.formats)
    if options.wheel is not None:
        results["wheel"] = bench_import.run_wheel(options.wheel)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot is not None and "product" in results:
        plot.plot(results, options.plot)


def measure(name: str, quick: bool, threads: list[int], formats: list[str] | None = None) -> dict[str, Any]:
    match name:
        case "product":
            return {name: [row for n in threads for row in bench_product.run(quick, n)]}
        case "int8":
            return {name: [row for n in threads for row in bench_product.run_int8(quick, n)]}
        case "rows":
            return {name: [row for n in threads for row in bench_product.run_rows(quick, n)]}
        case "lowbit":
            return {name: [row for n in threads for row in bench_lowbit.run(quick, n, formats)]}
        case "lora_step":
            return {name: [row for n in threads for row in bench_lora_step.run(quick, n)]}
        case "merge":
            races = [row for n in threads for row in bench_merge.run(quick, n)]
            return {name: races, "merge_peak_growth": bench_merge.run_memory()}
        case "adamw":
            return {name: [bench_adamw.run(quick, n) for n in threads]}
        case "transformer":
            return {name: [bench_transformer.run(quick, n) for n in threads]}
        case "inference":
            return {name: [row for n in threads for row in bench_inference.run(quick, n)]}
        case "serve":
            return {name: [row for n in threads[-1:] for row in bench_serve.run(quick, n)]}
        case "train":
            rows = [row for n in threads[-1:] for row in bench_train.run(quick, n)]
            kept = bench_train.run_kept_prefix(quick, threads[-1])
            return {
                name: rows,
                "kept_prefix": kept,
                "train_peak": [] if quick else bench_train.run_memory(threads[-1]),
            }
        case "train_int8":
            return {name: bench_train_int8.run(quick, threads[-1])}
        case "dpo":
            return {name: bench_dpo.run(quick, threads[-1])}
        case "embed":
            return {name: bench_embed.run(quick, threads[-1])}
        case "embedding_training":
            pairs, size = (48, 16) if quick else (1024, 32)
            return {name: bench_embedding_training.run(pairs, size, threads[-1])}
        case "classify":
            return {name: bench_classify.run(quick, threads[-1])}
        case "plan":
            return {name: bench_plan.run(quick, threads[-1])}
        case "threads":
            return {
                name: bench_threads.run_scaling(quick, threads[-1]),
                "after_numpy": bench_threads.run_after_numpy(quick, threads[-1]),
            }
        case _:
            return {name: bench_import.run(quick)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, only with the most threads: shows that everything runs; do not quote the figures",
    )
    parser.add_argument("--only", choices=NAMES, nargs="+", help="run only these benchmarks")
    parser.add_argument("--formats", nargs="+", help="in lowbit, time only these block formats, such as q4_k")
    parser.add_argument("--wheel", type=Path, help="also print the size of this wheel")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="plot the products to this file (.png, .svg, ...)")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Print and return the facts that the figures depend on. This process itself is not timed."""
    import nplora

    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = found[1] if found else platform.machine()
    cores, isa = len(os.sched_getaffinity(0)), nplora._core.config()["isa"]
    peers = {name: version(name) for name in ("torch", "peft", "trl") if find_spec(name)}
    print(f"{cpu}, {cores} cores")
    print(f"nplora {nplora.__version__} on {isa}, NumPy {np.__version__} with {numpy_blas()}", end="")
    print("".join(f", {name} {number}" for name, number in peers.items()))
    return {
        "cpu": cpu,
        "cores": cores,
        "isa": isa,
        "nplora": nplora.__version__,
        "numpy": np.__version__,
        **peers,
    }


def numpy_blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def ceilings_of(threads: int) -> dict[str, Any]:
    """Print the most that the machine can do at present."""
    path = ceilings.library()
    if path is None:
        print("there is no C++ compiler, so ceilings are not measured")
        return {"threads": threads}
    bf16 = ceilings.bf16_dots(path, threads)
    rates = {
        "FMA": ceilings.multiply_add(path, threads)(),
        "bf16": bf16() if bf16 else None,
        "read": ceilings.read(path, threads)(),
        "rewrite": ceilings.rewrite(path, threads)(),
    }
    dots = f", {rates['bf16'] / 1e9:.0f} by bfloat16 dot products" if rates["bf16"] else ""
    print(
        f"{on_threads(threads)}: {rates['FMA'] / 1e9:.0f} GFLOP/s with FMA{dots}; memory is read at "
        f"{rates['read'] / 1e9:.1f} GB/s, and read and written in place at {rates['rewrite'] / 1e9:.1f} GB/s"
    )
    return {"threads": threads, **rates}


if __name__ == "__main__":
    main()
