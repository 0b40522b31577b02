"""Frozen weights in low-bit blocks, against float32 and bfloat16 storage and the read rate of memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench import ceilings
from bench.timing import BF16_UNIT, Calls, Contestant, Result, Runtimes, assert_within_rounding, on_threads

WIDTH, BATCH = 2048, 512  # W (WIDTH, WIDTH), for a batch
ROW_SHAPE, ROW_BATCHES = (8192, 4096), (1, 2, 4, 8)  # W larger than the caches, for a few rows
COLD_BYTES = 96 * 2**20  # copies of a weight are used in turn, so that none is in a cache
PATTERN = 256  # rows of W that are quantised; the other rows repeat them


class Case(NamedTuple):
    storages: tuple[str, ...]
    compute: str


def matrix(d_out: int, d_in: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((min(PATTERN, d_out), d_in), np.float32)
    return np.tile(rows, (d_out // len(rows), 1))


def check(got: np.ndarray, left: np.ndarray, right: np.ndarray, compute: str) -> None:
    """Compare one row of a product with float64. bfloat16 rounds both operands."""
    terms, unit = (2 * len(right), 2.0**-24) if compute == "float32" else (4, BF16_UNIT)
    left, right = left[:1].astype(np.float64), right.astype(np.float64)
    assert_within_rounding(got[:1], left @ right, np.abs(left) @ np.abs(right), terms, unit)


def check_rows(got: np.ndarray, x: np.ndarray, right: np.ndarray, compute: str) -> None:
    """In int8, the error of rounding x is judged by its size."""
    if compute == "float32":
        return check(got, x, right, compute)
    wanted = x.astype(np.float64) @ right
    if not np.linalg.norm(got - wanted) < 0.01 * np.linalg.norm(wanted):
        raise AssertionError("a product in int8 is off by more than 1 %")
    return None


def batch_products(case: Case, threads: int) -> Calls:
    """Forward and backward for every storage, each right after the unquantised one to compare with."""
    import nplora

    nplora.set_num_threads(threads)
    W = matrix(WIDTH, WIDTH)
    x = np.random.default_rng(1).standard_normal((BATCH, WIDTH), np.float32)
    out, calls = np.empty((BATCH, WIDTH), np.float32), Calls()
    plain = nplora.FrozenWeight(W, case.compute, case.compute)
    for storage in case.storages:
        weight = nplora.FrozenWeight(W, storage, case.compute)
        decoded = weight.to_numpy()
        for direction, product, plain_product, right in (
            ("forward", weight.matmul, plain.matmul, decoded.T),
            ("backward", weight.matmul_t, plain.matmul_t, decoded),
        ):
            check(product(x), x, right, case.compute)
            calls[f"{direction} plain {storage}"] = all_of([plain_product], x, out)
            calls[f"{direction} {storage}"] = all_of([product], x, out)
    return calls


def row_products(case: Case, threads: int, path: str | None) -> Calls:
    """A few rows times cold weights, each timed right after the read rate of memory."""
    import nplora

    nplora.set_num_threads(threads)
    d_out, d_in = ROW_SHAPE
    W = matrix(d_out, d_in)
    x = np.random.default_rng(1).standard_normal((max(ROW_BATCHES), d_in), np.float32)
    out, calls = np.empty((len(x), d_out), np.float32), Calls()
    for storage in case.storages:
        first = nplora.FrozenWeight(W, storage, case.compute)
        copies = -(-COLD_BYTES // first.nbytes)
        weights = [first, *(nplora.FrozenWeight(W, storage, case.compute) for _ in range(copies - 1))]
        right = first.to_numpy().T
        for rows in ROW_BATCHES:
            check_rows(first.matmul(x[:rows]), x[:rows], right, case.compute)
            if path is not None:
                calls[f"bound {storage} {rows}"] = ceilings.read(path, threads)
            calls[f"{storage} {rows}"] = all_of([w.matmul for w in weights], x[:rows], out[:rows])
    return calls


def all_of(products: list[Callable[..., np.ndarray]], x: np.ndarray, out: np.ndarray) -> Callable[[], None]:
    def call() -> None:
        for product in products:
            product(x, out=out)

    return call


def bytes_of(storage: str) -> float:
    """The bytes of all copies of one weight. One call reads them all."""
    from nplora import _core

    of = _core.block_formats()[storage]
    length, nbytes = of.elements, of.nbytes
    each = ROW_SHAPE[0] * ROW_SHAPE[1] // length * (nbytes + (4 if storage == "nf4" else 0))
    return float(-(-COLD_BYTES // each) * each)


def batch_figures(case: Case, threads: int, result: Result) -> list[dict[str, Any]]:
    rows = []
    for storage in case.storages:
        speed = {
            direction: result.ratio(
                ("nplora", f"{direction} plain {storage}"), ("nplora", f"{direction} {storage}")
            )
            for direction in ("forward", "backward")
        }
        rows.append({"storage": storage, "compute": case.compute, "threads": threads, **speed})
    return rows


def run(quick: bool, threads: int, formats: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the rates of block formats (all if None) on `threads` threads; return them."""
    found: list[dict[str, Any]] = []
    from nplora import _core

    # The weights of other formats take long to make.
    storages = tuple(formats or (("q8_0",) if quick else _core.block_formats()))
    runtimes = Runtimes(threads)
    for compute in ("float32", "bfloat16"):
        case = Case(storages, compute)
        contestant = Contestant("nplora", batch_products, (case, threads))
        result = runtimes.race([contestant], rounds=7)
        figures = batch_figures(case, threads, result)
        print(f"\nW {WIDTH}x{WIDTH}, {BATCH} rows, {on_threads(threads)}: speed over {compute} storage")
        print(f"  {'':6}{'forward':>10}{'backward':>10}")
        for row in figures:
            print(f"  {row['storage']:6}{row['forward']:10.2f}{row['backward']:10.2f}")
        found += figures
    found += run_rows(runtimes, storages, "float32", quick)
    found += run_rows(runtimes, tuple(s for s in storages if s != "nf4"), "int8", quick)
    return found


def run_rows(
    runtimes: Runtimes, storages: tuple[str, ...], compute: str, quick: bool
) -> list[dict[str, Any]]:
    path, threads = ceilings.library(), runtimes.threads
    print(f"\nW {ROW_SHAPE[0]}x{ROW_SHAPE[1]}, cold, {compute}, {on_threads(threads)}: GB/s, share of read")
    print(f"  {'':6}" + "".join(f"{f'{rows} rows':>16}" for rows in ROW_BATCHES))
    found: list[dict[str, Any]] = []
    for storage in storages:
        bounds = tuple(f"bound {storage} {rows}" for rows in ROW_BATCHES) if path else ()
        contestant = Contestant(
            "nplora", row_products, (Case((storage,), compute), threads, path), ceilings=bounds
        )
        result = runtimes.race([contestant], rounds=5)
        line = f"  {storage:6}"
        for rows in ROW_BATCHES:
            cell, bound = ("nplora", f"{storage} {rows}"), ("nplora", f"bound {storage} {rows}")
            rate = bytes_of(storage) / result.median(*cell)
            share = result.share(bytes_of(storage), cell, bound) if bound in result else None
            line += f"{rate / 1e9:10.1f}" + (f"{share:6.0%}" if share is not None else f"{'':6}")
            found.append(
                {
                    "storage": storage,
                    "compute": compute,
                    "threads": threads,
                    "rows": rows,
                    "rate": rate,
                    "of_read": share,
                }
            )
        print(line)
    return found
