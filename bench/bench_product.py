"""The product with a frozen weight, forward x Wᵀ and backward dy W, against NumPy and torch."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench import ceilings
from bench.peft_layer import has_torch
from bench.timing import BF16_UNIT, Calls, Contestant, Result, Runtimes, assert_within_rounding, on_threads

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096), (577, 1531), (999, 1001)]
BATCHES = (8, 32, 128, 512, 2048)
INT8_SHAPES, INT8_BATCHES = SHAPES[:4], (32, 128, 512, 2048)
INT8_STORAGES = (
    "q4_1",
    "q4_k",
    "q8_0",
    "bfloat16",
    "float32",
)  # all arithmetics read the same weights
INT8_STORED, INT8_STORED_BATCHES = INT8_SHAPES[-1], (128, 512)  # for each storage after the first
INT8_ERROR = 0.02  # of the norm of a result, against float64
ROW_SHAPE, ROW_BATCHES = (8192, 4096), (1, 2, 4, 16)
COLD_BYTES = 128 * 2**20  # copies of W are used in turn, so that none is in a cache
COLD_BATCHES = 32  # batches up to this size are also timed cold
PEERS = ("NumPy", "torch", "a file", "bfloat16", "float32")  # the last two: nplora, in a race with int8
KEPT = "keep_int8"  # nplora in int8, with weights that are kept in memory as 8-bit integers
CHECKED = 4  # rows of each result that are compared with float64

Product = Callable[[], np.ndarray]


class Cell(NamedTuple):
    direction: str
    batch: int
    cold: bool

    @property
    def name(self) -> str:
        return f"{self.direction} {self.batch} {'cold' if self.cold else 'warm'}"


class Case(NamedTuple):
    d_out: int
    d_in: int
    batches: tuple[int, ...]
    dtype: str  # of the products: "float32", "bfloat16" or "int8"
    storage: str | None = None  # of the weight; None: `dtype`

    @property
    def weight_bytes(self) -> int:
        from nplora.weights import storages

        return self.d_out * storages.row_nbytes(self.storage or self.dtype, self.d_in)

    @property
    def copies(self) -> int:
        return max(1, -(-COLD_BYTES // self.weight_bytes))

    def flops(self, cell: Cell) -> float:
        return 2.0 * cell.batch * self.d_out * self.d_in

    def bytes_read(self, cell: Cell) -> float:
        return float(self.weight_bytes)

    def cells(self) -> Iterator[Cell]:
        fits = self.weight_bytes <= COLD_BYTES // 8
        for batch in self.batches:
            for direction in ("forward", "backward"):
                if batch <= COLD_BATCHES or not fits:
                    yield Cell(direction, batch, cold=True)
                if fits:
                    yield Cell(direction, batch, cold=False)


@lru_cache(maxsize=1)
def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W (d_out, d_in), x (n, d_in) and dy (n, d_out) for the largest batch."""
    rng = np.random.default_rng(0)
    n = max(case.batches)
    shapes = (case.d_out, case.d_in), (n, case.d_in), (n, case.d_out)
    W, x, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return W, x, dy


@lru_cache(maxsize=1)
def stored(case: Case) -> np.ndarray:
    """W, rounded to the case's storage if the case has one."""
    from nplora import FrozenWeight

    W = arrays(case)[0]
    return W if case.storage is None else FrozenWeight(W, case.storage).to_numpy()


def check(case: Case, cell: Cell, got: np.ndarray) -> None:
    """Compare some rows of a result with float64. bfloat16 rounds W and x (and a bfloat16 result)."""
    _, x, dy = arrays(case)
    W = stored(case)
    rows = np.linspace(0, cell.batch - 1, min(CHECKED, cell.batch)).astype(int)
    left, right = (x[rows], W.T) if cell.direction == "forward" else (dy[rows], W)
    left, right = left.astype(np.float64), right.astype(np.float64)
    if case.dtype == "int8":
        wanted = left @ right
        if not np.linalg.norm(got[rows] - wanted) < INT8_ERROR * np.linalg.norm(wanted):
            raise AssertionError(f"{case.dtype}: a product is off by more than {INT8_ERROR:.0%}")
        return
    terms, unit = (len(right) + 2, 2.0**-24) if case.dtype == "float32" else (4, BF16_UNIT)
    assert_within_rounding(got[rows], left @ right, np.abs(left) @ np.abs(right), terms, unit)


def calls_of(case: Case, product: Callable[[Cell, int], Product]) -> Calls:
    """`product(cell, copy)` returns the call on one copy of W. Cold cells use the copies in turn."""

    def call(cell: Cell) -> Callable[[], object]:
        products = [product(cell, copy) for copy in range(case.copies if cell.cold else 1)]
        check(case, cell, np.asarray(products[0](), np.float32))
        if len(products) == 1:
            return products[0]
        turn = 0

        def next_copy() -> None:
            nonlocal turn
            turn = (turn + 1) % len(products)
            products[turn]()

        return next_copy

    return {cell.name: call(cell) for cell in case.cells()}


def packed_weights(case: Case) -> list[Any]:
    """Copies of W in the case's storage."""
    import nplora

    W = arrays(case)[0]
    return [nplora.FrozenWeight(W, case.storage or case.dtype, case.dtype) for _ in range(case.copies)]


def weights_kept_in_int8(case: Case) -> list[Any]:
    """Copies of W that are also kept in memory as 8-bit integers."""
    weights = packed_weights(case)
    for weight in weights:
        weight.keep_int8()
    return weights


def weights_of_a_file(case: Case) -> list[Any]:
    """The same matrix in the bytes of a safetensors file in memory, row after row."""
    import nplora
    from nplora.formats import safetensors
    from nplora.weights import storages

    elements = storages.encode(arrays(case)[0], case.dtype).view(storages.FLOATS[case.dtype])
    data = safetensors.dumps({"W": safetensors.Tensor("W", case.dtype, elements)})
    return [
        nplora.FrozenWeight.from_safetensors(safetensors.loads(bytearray(data)), "W", case.dtype)
        for _ in range(case.copies)
    ]


def nplora_products(
    case: Case, threads: int, path: str | None, bound: str, make: Callable[[Case], list[Any]] = packed_weights
) -> Calls:
    import nplora

    nplora.set_num_threads(threads)
    _, x, dy = arrays(case)
    weights = make(case)
    y, dx = np.empty((len(x), case.d_out), np.float32), np.empty((len(x), case.d_in), np.float32)

    def product(cell: Cell, copy: int) -> Product:
        weight, n = weights[copy], cell.batch
        x_rows, dy_rows, y_rows, dx_rows = x[:n], dy[:n], y[:n], dx[:n]
        if cell.direction == "forward":
            return lambda: weight.matmul(x_rows, out=y_rows)
        return lambda: weight.matmul_t(dy_rows, out=dx_rows)

    calls = calls_of(case, product)
    if path is None:
        return calls
    ceiling = getattr(ceilings, bound)(path, threads) or ceilings.multiply_add(path, threads)
    around: Calls = {}
    for name, call in calls.items():  # the ceiling is measured right before each cell
        around[f"bound {name}"] = ceiling
        around[name] = call
    return around


def numpy_products(case: Case) -> Calls:
    W, x, dy = arrays(case)
    weights = [W.copy() for _ in range(case.copies)]
    y, dx = np.empty((len(x), case.d_out), np.float32), np.empty((len(x), case.d_in), np.float32)

    def product(cell: Cell, copy: int) -> Product:
        weight, n = weights[copy], cell.batch
        if cell.direction == "forward":
            transposed, x_rows, y_rows = weight.T, x[:n], y[:n]
            return lambda: np.matmul(x_rows, transposed, out=y_rows)
        dy_rows, dx_rows = dy[:n], dx[:n]
        return lambda: np.matmul(dy_rows, weight, out=dx_rows)

    return calls_of(case, product)


def torch_products(case: Case, threads: int) -> Calls:
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, case.dtype)
    W, x, dy = (torch.from_numpy(array).to(dtype) for array in arrays(case))
    weights = [W.clone() for _ in range(case.copies)]
    y, dx = torch.empty(len(x), case.d_out, dtype=dtype), torch.empty(len(x), case.d_in, dtype=dtype)

    def product(cell: Cell, copy: int) -> Product:
        weight, n = weights[copy], cell.batch
        if cell.direction == "forward":
            transposed, x_rows, y_rows = weight.T, x[:n], y[:n]
            return lambda: torch.mm(x_rows, transposed, out=y_rows)
        dy_rows, dx_rows = dy[:n], dx[:n]
        return lambda: torch.mm(dy_rows, weight, out=dx_rows)

    def as_numpy(cell: Cell, copy: int) -> Product:
        call = product(cell, copy)
        return call if dtype == torch.float32 else _Float32Once(call)

    return calls_of(case, as_numpy)


class _Float32Once:
    """A torch call whose first result is converted so that NumPy, which has no bfloat16, can check it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._checked = call, False

    def __call__(self) -> Any:
        result = self._call()
        if self._checked:
            return result
        self._checked = True
        return result.float()


def race(runtimes: Runtimes, case: Case, bound: str) -> Result:
    path = ceilings.library()
    names = tuple(f"bound {cell.name}" for cell in case.cells()) if path else ()
    contestants = [
        Contestant("nplora", nplora_products, (case, runtimes.threads, path, bound), ceilings=names)
    ]
    if case.dtype == "int8":
        for compute in ("bfloat16", "float32"):
            arguments = case._replace(dtype=compute), runtimes.threads, None, bound
            contestants.append(Contestant(compute, nplora_products, arguments))
        kept = case, runtimes.threads, None, bound, weights_kept_in_int8
        contestants.append(Contestant(KEPT, nplora_products, kept))
        return runtimes.race(contestants, rounds=7)
    if case.dtype == "float32":
        contestants.append(Contestant("NumPy", numpy_products, (case,), "numpy"))
    if has_torch():
        contestants.append(Contestant("torch", torch_products, (case, runtimes.threads), "torch"))
    if bound == "read":
        arguments = case, runtimes.threads, None, bound, weights_of_a_file
        contestants.append(Contestant("a file", nplora_products, arguments))
    return runtimes.race(contestants, rounds=7)


Amount = Callable[[Cell], float]  # the operations, or the bytes, of one call


def figures(case: Case, threads: int, result: Result, amount: Amount) -> list[dict[str, Any]]:
    """One row for each cell: its rate, its share of the ceiling, and its speed relative to each peer."""
    rows = []
    for cell in case.cells():
        mine, bound = ("nplora", cell.name), ("nplora", f"bound {cell.name}")
        peers = [peer for peer in PEERS if (peer, cell.name) in result]
        rows.append(
            {
                "d_out": case.d_out,
                "d_in": case.d_in,
                "dtype": case.dtype,
                "storage": case.storage or case.dtype,
                "threads": threads,
                **cell._asdict(),
                "rate": amount(cell) / result.median(*mine),
                "of_bound": result.share(amount(cell), mine, bound) if bound in result else None,
                "over": {peer: result.ratio((peer, cell.name), mine) for peer in peers},
            }
        )
        if (KEPT, cell.name) in result:
            rows[-1]["kept_over_bfloat16"] = result.ratio(("bfloat16", cell.name), (KEPT, cell.name))
    return rows


def show(case: Case, threads: int, unit: str, bound: str, rows: list[dict[str, Any]]) -> None:
    peers, kept = list(rows[0]["over"]), "kept_over_bfloat16" in rows[0]
    storage = f" from {case.storage}" if case.storage else ""
    print(f"\nW {case.d_out}x{case.d_in} {case.dtype}{storage}, {on_threads(threads)}")
    print(
        f"  {'rows':>5} {'':9}{'':5} {unit:>8} {bound:>9}"
        + "".join(f"{'× ' + peer:>11}" for peer in peers)
        + ("  keep_int8 × bfloat16" if kept else "")
    )
    for row in rows:
        share = f"{row['of_bound']:9.1%}" if row["of_bound"] is not None else f"{'':9}"
        over = "".join(f"{row['over'][peer]:11.2f}" for peer in peers)
        if kept:
            over += f"{row['kept_over_bfloat16']:22.2f}"
        where = "cold" if row["cold"] else "warm"
        print(f"  {row['batch']:5} {row['direction']:9}{where:5} {row['rate'] / 1e9:8.1f} {share}{over}")


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races on `threads` threads, and return their figures."""
    rows: list[dict[str, Any]] = []
    runtimes = Runtimes(threads)
    for dtype in ("float32", "bfloat16"):
        for shape in [SHAPES[-2]] if quick else SHAPES:
            case = Case(*shape, (8, 128) if quick else BATCHES, dtype)
            bound = "multiply_add" if dtype == "float32" else "bf16_dots"
            result = race(runtimes, case, bound)
            found = figures(case, threads, result, case.flops)
            show(case, threads, "GFLOP/s", "of peak", found)
            rows += found
    return rows


def run_int8(quick: bool, threads: int) -> list[dict[str, Any]]:
    """The same in int8, against nplora's own products in bfloat16 and float32 from the same storage."""
    cases = [Case(*shape, INT8_BATCHES, "int8", INT8_STORAGES[0]) for shape in INT8_SHAPES]
    cases += [Case(*INT8_STORED, INT8_STORED_BATCHES, "int8", storage) for storage in INT8_STORAGES[1:]]
    rows: list[dict[str, Any]] = []
    runtimes = Runtimes(threads)
    for case in [cases[0]._replace(batches=(128,))] if quick else cases:
        result = race(runtimes, case, "int8_dots")
        found = figures(case, threads, result, case.flops)
        show(case, threads, "GFLOP/s", "of peak", found)
        rows += found
    return rows


def run_rows(quick: bool, threads: int) -> list[dict[str, Any]]:
    """The same for a few rows of a large W, against the read rate of memory.

    "a file": the same weight in the bytes of a safetensors file, row after row.
    """
    rows: list[dict[str, Any]] = []
    runtimes = Runtimes(threads)
    for dtype in ("float32", "bfloat16"):
        case = Case(*ROW_SHAPE, (1,) if quick else ROW_BATCHES, dtype)
        result = race(runtimes, case, "read")
        found = figures(case, threads, result, case.bytes_read)
        show(case, threads, "GB/s of W", "of read", found)
        rows += found
    return rows
