"""Builds of the extension against each other, for example those of two compilers.

Usage: python -m bench.builds REFERENCE=FILE OTHER=FILE... [--threads N] [--only PART...] [--match TEXT]
       [--rounds N] [--runs N]

FILE is a compiled _core. Each ratio is the time of the reference divided by that of the other build, in the
same turn: 0.95 means that the other build has 95 % of the reference's speed. NPLORA_ISA chooses the
instruction set of all builds.

Two processes with the same file can differ in speed, for example because their arrays are at other addresses.
So each race can run several times, each time in new processes, and the medians are printed. To see how much
equal builds differ, name the file of the reference a second time: `same=FILE`.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from bench import bench_lora_step, bench_lowbit, bench_product, bench_train, bench_transformer
from bench.timing import Calls, Contestant, Runtimes, on_threads

SLOW = 0.95  # slower cells are listed
BATCHES = (8, 128, 512)  # of products


class Race(NamedTuple):
    """What is timed: a function of another benchmark, which makes and checks the calls."""

    title: str
    prepare: Callable[..., Calls]
    arguments: tuple[Any, ...]


def products(threads: int) -> Iterator[Race]:
    cases = [
        bench_product.Case(*shape, BATCHES, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in bench_product.SHAPES
    ]
    for dtype in ("float32", "bfloat16"):
        cases.append(bench_product.Case(*bench_product.ROW_SHAPE, (1, 4), dtype))
    cases += [bench_product.Case(*s, (32, 512), "int8", "q4_1") for s in bench_product.INT8_SHAPES]
    for case in cases:
        title = f"W {case.d_out}x{case.d_in} {case.dtype}"
        yield Race(title, bench_product.nplora_products, (case, threads, None, ""))


def blocks(threads: int) -> Iterator[Race]:
    from nplora import _core

    for storage in _core.block_formats():
        for compute in ("float32", "bfloat16"):
            case = bench_lowbit.Case((storage,), compute)
            yield Race(f"{storage} {compute}, batch", bench_lowbit.batch_products, (case, threads))
        for compute in ("float32",) if storage == "nf4" else ("float32", "int8"):
            case = bench_lowbit.Case((storage,), compute)
            yield Race(f"{storage} {compute}, a few rows", bench_lowbit.row_products, (case, threads, None))


def steps(threads: int) -> Iterator[Race]:
    for dtype in ("float32", "bfloat16"):
        for shape in bench_lora_step.SHAPES:
            case = bench_lora_step.Case(bench_lora_step.BATCHES[0], *shape, 8, dtype)
            title = f"LoRALinear {case.d_out}x{case.d_in} {dtype}"
            yield Race(title, bench_lora_step.nplora_step, (case, threads))
    for heads in bench_transformer.SMOLLM2:
        title = f"attention, {heads.sequences} x {heads.tokens} tokens"
        yield Race(title, bench_transformer.nplora_attention, (heads, threads, None))
    for cache in bench_transformer.CACHES:
        title = f"attention, cache {cache.rows} x {cache.length}"
        yield Race(title, bench_transformer.nplora_cached, (cache, threads, None))
    yield Race("functions of rows", bench_transformer.nplora_rows, (threads, None))
    for dtype in bench_train.DTYPES if bench_train.model_file() else ():
        setting = bench_train.full_text(4, 256, dtype)
        title = f"training SmolLM2, {setting.name} {dtype}"
        yield Race(title, bench_train.nplora_cells, (setting, threads, None, "file"))


PARTS = {"products": products, "blocks": blocks, "steps": steps}


def load(file: str) -> None:
    """Make this file the _core of this process."""
    if "nplora._core" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("nplora._core", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no extension of this Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nplora._core"] = module
    spec.loader.exec_module(module)


def calls_of(file: str, race: Race) -> Calls:
    load(file)
    return race.prepare(*race.arguments)


def ratios(
    runtimes: Runtimes, builds: dict[str, str], race: Race, rounds: int
) -> dict[tuple[str, str], float]:
    """The speed of each build but the first, by build and cell."""
    reference, *others = builds
    contestants = [Contestant(name, calls_of, (file, race), name) for name, file in builds.items()]
    result = runtimes.race(contestants, rounds=rounds, seconds=0.02)
    cells = [cell for name, cell in result.turns if name == reference]
    return {(name, cell): result.ratio((reference, cell), (name, cell)) for name in others for cell in cells}


def medians(
    runtimes: Runtimes, builds: dict[str, str], race: Race, rounds: int, runs: int
) -> dict[tuple[str, str], float]:
    """The median ratios of several runs, each in new processes."""
    found = list[dict[tuple[str, str], float]]()
    for _ in range(runs):
        runtimes.restart()
        found.append(ratios(runtimes, builds, race, rounds))
    return {key: median(run[key] for run in found) for key in found[0]}


def show(name: str, speeds: dict[str, float]) -> None:
    """Print the mean, the smallest, and each that is below SLOW."""
    mean = math.exp(math.fsum(map(math.log, speeds.values())) / len(speeds))
    slow = {cell: speed for cell, speed in speeds.items() if speed < SLOW}
    print(
        f"\n{name}: {len(speeds)} figures, geometric mean {mean:.3f}, smallest {min(speeds.values()):.3f}, "
        f"{len(slow)} below {SLOW}"
    )
    for cell, speed in sorted(slow.items(), key=lambda item: item[1]):
        print(f"  {speed:.3f}  {cell}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--match", default="", help="only races whose title contains this text")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each race (9)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each race, each in new processes (1)")
    options = parser.parse_args()
    builds = dict(build.split("=", 1) for build in options.builds)
    reference, *others = builds
    if not others:
        parser.error("name at least two builds")
    runtimes = Runtimes(options.threads)
    for part in options.only:
        found: dict[str, dict[str, float]] = {name: {} for name in others}
        print(f"\n{part}, {on_threads(options.threads)}: speed over {reference}")
        for race in PARTS[part](options.threads):
            if options.match not in race.title:
                continue
            speeds = medians(runtimes, builds, race, options.rounds, options.runs)
            for (name, cell), speed in speeds.items():
                found[name][f"{race.title}, {cell}"] = speed
            line = "  ".join(f"{cell} {speed:.2f}" for (_, cell), speed in speeds.items())
            print(f"  {race.title}: {line}", flush=True)
        for name, speeds_of in found.items():
            if speeds_of:
                show(name, speeds_of)


if __name__ == "__main__":
    main()
