"""Checks the machine code of the hot loops: no spills, and few instructions besides the multiply-adds.

    python tests/inner_loops.py [--prefix aarch64-linux-gnu-] BINARY

BINARY holds kernel units and was built with -g1, so that the names of inlined functions identify each loop.
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

# Instructions as GNU objdump prints them for aarch64 and (in AT&T syntax) for x86-64.
MULTIPLY_ADD = re.compile(r"(fmla|bfdot|sdot|smmla)\s+v|vfmadd\d+p[sd]|vdpbf16ps|(\{vex\} )?vpdpbusd")
VECTOR = re.compile(r"[\s{][qdsv]\d|%[xyz]mm\d")
VECTOR_STORE = re.compile(r"st\w+\s+\{?[qdsv]\d|v\w+\s+%[xyz]mm\d+,[^,]*\(")
MOVED = re.compile(r"(vmov[qd]\s+%xmm|kmov[qd]\s+%k)\d+,%[re]\w+$|fmov\s+[xw]\d+, [sd]\d")
STACK = re.compile(r"\[sp\b|\(%rsp\b|-0x[0-9a-f]+\(%rbp\)")
BRANCH = re.compile(r"(?:b\.\w+|b|cbn?z|tbn?z|j\w+)\s+(?:.*,\s*)?([0-9a-f]+) <")

# The kernels, and the element types that each is built for: of w, or of a and w.
KERNELS: dict[str, list[tuple[str, ...]]] = {
    "gemm_tokens_in_lanes_fixed": [("float",), ("double",), ("Bf16Pair",)],
    "gemm_outputs_in_lanes_fixed": [
        ("float", "float"),
        ("double", "double"),
        ("float", "Bf16"),
        ("Bf16Pair", "Bf16Pair"),
        ("Bf16Pair", "Bf16"),
    ],
    "merge_tiles": [("float",), ("double",)],
    "dots_rows": [("float",), ("double",), ("Bf16",)],
    "dots_row_major": [("float",), ("double",), ("Bf16",)],
    "int8_token_tile": [()],
    "int8_group_tile": [()],
}
DOTS = "dots_rows", "dots_row_major"
INT8 = "int8_token_tile", "int8_group_tile"
# Units that multiply codes in one instruction.
HAVE_INT8 = "avxvnni", "avx512vnni", "avx512bf16", "neondot", "neonbf16", "neoni8mm"
ONLY_INT8 = "avxvnni", "avx512vnni", "neondot", "neoni8mm"  # units without other products
ONLY_PAIRS = "avx512bf16", "neonbf16"  # units whose other products are of bfloat16 pairs
INSTANCE = re.compile(rf"nplora::kernels::(\w+)::({'|'.join(KERNELS)})<(.*?)>\(")


@dataclass(frozen=True)
class Loop:
    """An innermost loop with multiplications, in one instance of a kernel.

    The template arguments are: gemm_tokens_in_lanes_fixed<float, vectors, rows, stride>,
    gemm_outputs_in_lanes_fixed<float, float, rows, vectors, partial>, merge_tiles<float, rows, vectors>,
    int8_token_tile<rows, vectors, partial>, int8_group_tile,
    dots_rows<float, tokens, rows> and dots_row_major.
    """

    isa: str
    kernel: str
    arguments: tuple[str, ...]
    instructions: tuple[str, ...]

    @property
    def elements(self) -> tuple[str, ...]:
        return tuple(argument for argument in self.arguments if re.match("float|double|Bf16", argument))

    @property
    def sizes(self) -> tuple[int, int]:
        first, second, *_ = (int(argument) for argument in self.arguments if argument.isdigit())
        return first, second

    @property
    def is_regular(self) -> bool:
        """Whether w consists of full panels and full vectors."""
        return self.arguments[-1] not in {"0", "true"}

    @property
    def multiply_adds(self) -> int:
        return sum(bool(MULTIPLY_ADD.match(line)) for line in self.instructions)

    @property
    def on_stack(self) -> list[str]:
        """Instructions that read or write vectors on the stack."""
        return [line for line in self.instructions if VECTOR.search(line) and STACK.search(line)]

    @property
    def moved(self) -> list[str]:
        """Instructions that move values out of vector or mask registers. They take a multiply-add's place."""
        return [line for line in self.instructions if MOVED.match(line)]

    @property
    def stores_results(self) -> bool:
        return any(VECTOR_STORE.match(line) and not STACK.search(line) for line in self.instructions)


# ---- the number of instructions that a loop needs ----


@dataclass(frozen=True)
class Need:
    """The multiply-adds in one iteration of a loop, and the other instructions that it cannot avoid.

    Multiply-adds determine the speed of a loop with at most one other instruction for each: cores start at
    least twice as many instructions as multiply-adds per cycle (Cortex-A76 and Neoverse N1: 4 and 2; Neoverse
    V1: 8 and 4; Zen 4: 6 and 2). Tiles of 24 achieve that: gemm_tokens_in_lanes has 20 others,
    gemm_outputs_in_lanes 22, merge_tiles 24 (vectors longer than NEON's need up to two more for prefetching).
    AVX2's tiles of 12 need up to 18 and 22 of the 24 that Zen starts meanwhile; 23 if they widen bfloat16.
    """

    multiply_adds: int
    others: int


def is_split(isa: str, element: str) -> bool:
    """Whether pairs are multiplied as floats: split first, then two multiply-adds."""
    return element == "Bf16Pair" and not isa.endswith("bf16")


def register_bytes(isa: str) -> int:
    return 16 if isa.startswith("neon") else 32 if isa == "avx2" else 64


def gemm_tokens_in_lanes_step(loop: Loop) -> Need:
    """Rows of w times vectors of x. NEON splits one pair with a shift, a vector with a shift and a mask."""
    vectors, rows = loop.sizes
    split = is_split(loop.isa, loop.elements[0])
    loads, splits, fetches = rows + vectors, split * (rows + 2 * vectors), 1
    control = 5  # three pointers advance (w, x, prefetches), one comparison, a branch
    return Need(rows * vectors * (1 + split), loads + splits + fetches + control)


def gemm_outputs_in_lanes_step(loop: Loop) -> Need:
    """Rows of a times vectors of w. bfloat16 in w is widened, or read from two rows and paired."""
    rows, vectors = loop.sizes
    element, stored = loop.elements
    split = is_split(loop.isa, element)
    paired = (element, stored) == ("Bf16Pair", "Bf16")
    loads, splits = rows + vectors * (1 + paired), split * (rows + 2 * vectors)
    row = vectors * register_bytes(loop.isa) // (2 if stored == "Bf16" else 1)  # bytes of w
    if loop.isa == "avx2":  # the rows of a wide tile span several cache lines, of which it prefetches one
        row = min(row, 64)
    fetches = -(-(1 + paired) * row // 64) if row > 64 else 1 + paired
    # AVX-512 pairs with a permutation that overwrites the register of indices, which must be copied before.
    widened = vectors * (2 if paired and loop.isa == "avx512bf16" else 1) if stored == "Bf16" else 0
    # Three pointers advance (a, w, prefetches), the depth is counted, a branch. Only the caller knows the
    # stride of a's rows. So up to three of these offsets are added in each step, or read from the stack: AVX2
    # has half as many registers for them.
    control = 9 if loop.isa == "avx2" and rows > 3 else 8
    return Need(rows * vectors * (1 + split), loads + splits + widened + fetches + control)


def merge_tiles_step(loop: Loop) -> Need:
    """Rows of a times vectors of w, and one row of a later tile, as long as there is one."""
    rows, vectors = loop.sizes
    loads, fetches = rows + vectors, -(-vectors * register_bytes(loop.isa) // 64)
    fetching = 4  # a comparison, a branch, a count, a pointer advances
    control = 9 if loop.isa == "avx2" else 8  # as in gemm_outputs_in_lanes_step
    return Need(rows * vectors, loads + fetches + fetching + control)


def dots_rows_turn(loop: Loop) -> Need:
    """Rows of w, one panel wide, times some tokens. Vectors of x are read once for all rows, if at all."""
    tokens, rows = loop.sizes
    element = loop.elements[0]
    size, lanes = {"float": (4, 4), "double": (8, 2), "Bf16": (2, 4)}[element]
    vectors = 48 // lanes
    loads = (rows + tokens) * vectors
    widened = rows * vectors * (element == "Bf16")
    fetches = rows * -(-48 * size // 64)
    sums = rows * tokens * 8  # four for each row: one is loaded and stored, three are set to zero and added
    # In row-major layout, sums are loaded and stored outside the loop. Row pointers take their registers.
    # Four pointers advance (w, the next rows, prefetches, sums), a count, a branch; rows of x.
    control = 6 + tokens
    others = loads + widened + fetches + sums + control
    # With several tokens, GCC reads some vectors of w a second time, and copies zeros into the sums.
    again = others // 3 if tokens > 1 else 0
    return Need(rows * tokens * vectors, others + again)


def int8_step(loop: Loop) -> Need:
    """Four codes of rows of x times vectors of w."""
    rows, vectors = loop.sizes
    # Four pointers advance (w, and x from up to three rows on), a comparison, a branch; AVX2 reads offsets of
    # rows from the stack, or spills one of the 16 vectors. NEON reads two numbers from the stack.
    control = 9 if loop.isa in ("avxvnni", "neondot", "neonbf16") else 7
    if loop.isa == "neoni8mm":  # two steps: two vectors of w are loaded and zipped, and rows of x in halves
        return Need(rows * vectors, rows + 4 * vectors + control)
    return Need(rows * vectors, rows + vectors + control)


NEEDS = {
    "gemm_tokens_in_lanes_fixed": gemm_tokens_in_lanes_step,
    "gemm_outputs_in_lanes_fixed": gemm_outputs_in_lanes_step,
    "merge_tiles": merge_tiles_step,
    "dots_rows": dots_rows_turn,
    "dots_row_major": dots_rows_turn,
    "int8_token_tile": int8_step,
    "int8_group_tile": int8_step,
}


# ---- the loops of a binary ----


def run(*command: str, text: str = "") -> list[str]:
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def functions(binary: str, prefix: str) -> Iterator[list[tuple[int, str]]]:
    """The instructions of each function of a kernel unit, with their addresses."""
    body: list[tuple[int, str]] = []
    wanted = False
    for line in run(f"{prefix}objdump", "-d", "-C", "--no-show-raw-insn", binary):
        if line.endswith(">:"):
            yield body
            body, wanted = [], "nplora::kernels::" in line
        elif wanted and (match := re.match(r"\s*([0-9a-f]+):\s+(.*)", line)):
            body.append((int(match[1], 16), match[2]))
    yield body


def innermost_loops(body: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The code between a branch and its earlier target that contains no other such code."""
    index = {address: i for i, (address, _) in enumerate(body)}
    pieces = set()
    for last, (_, line) in enumerate(body):
        if (match := BRANCH.match(line)) and index.get(int(match[1], 16), last + 1) <= last:
            pieces.add((index[int(match[1], 16)], last))
    for first, last in pieces:
        inside = [piece for piece in pieces if first <= piece[0] and piece[1] <= last]
        if len(inside) == 1:
            yield body[first : last + 1]


def frames(binary: str, prefix: str, addresses: list[int]) -> dict[int, list[str]]:
    """The function at each address, and the functions that it is inlined into, innermost first."""
    found: dict[int, list[str]] = defaultdict(list)
    address = 0
    for line in run(f"{prefix}addr2line", "-aifC", "-e", binary, text="\n".join(map(hex, addresses))):
        if line.startswith("0x"):
            address = int(line, 16)
        else:
            found[address].append(line)
    return found


def multiplying_loops(binary: str, prefix: str) -> Iterator[Loop]:
    pieces = {}
    for body in functions(binary, prefix):
        for piece in innermost_loops(body):
            at = next((address for address, line in piece if MULTIPLY_ADD.match(line)), None)
            if at is not None:
                pieces[at] = tuple(line for _, line in piece)
    for at, names in frames(binary, prefix, list(pieces)).items():
        instance = next(filter(None, map(INSTANCE.search, names)), None)
        if instance:
            arguments = re.sub(r"nplora::kernels::|(?<=\d)ul\b", "", instance[3]).split(", ")
            yield Loop(instance[1], instance[2], tuple(arguments), pieces[at])


# ---- the check ----


def checked_elements(isa: str, kernel: str) -> list[tuple[str, ...]]:
    """All elements on NEON. On x86, operands of dots can be in memory, so there is little to count, and split
    pairs are spilled: tiles small enough to hold all halves would hardly be faster."""
    if kernel in INT8:
        return KERNELS[kernel] if isa in HAVE_INT8 else []
    if isa in ONLY_INT8:
        return []
    if isa in ONLY_PAIRS:
        return [e for e in KERNELS[kernel] if e[0] == "Bf16Pair"]
    if isa.startswith("neon"):
        return KERNELS[kernel]
    return [e for e in KERNELS[kernel] if kernel not in DOTS and not is_split(isa, e[0])]


def full_tiles(loops: list[Loop]) -> list[Loop]:
    """The loops over the steps of a kernel's largest tiles; all loops for dots."""
    if loops and loops[0].kernel in DOTS:
        return loops
    tiles = [loop for loop in loops if loop.is_regular and not loop.stores_results]
    largest = max((prod(loop.sizes) for loop in tiles), default=0)
    return [loop for loop in tiles if prod(loop.sizes) == largest]


def complaint(loop: Loop) -> str | None:
    # GCC splits the x of dots before the loop, keeps the halves wherever it finds room, and only reads them.
    spills = [line for line in loop.on_stack if loop.kernel not in DOTS or VECTOR_STORE.match(line)]
    if spills:
        return f"{len(spills)} spilled vectors, such as {spills[0]}"
    if loop.moved:
        return f"{len(loop.moved)} numbers from other registers, such as {loop.moved[0]}"
    needed, count = NEEDS[loop.kernel](loop), len(loop.instructions)
    turns, rest = divmod(loop.multiply_adds, needed.multiply_adds)
    most = turns * (needed.multiply_adds + needed.others)
    if rest or count > most:
        return f"{count} instructions with {loop.multiply_adds} multiply-adds, {most} should do"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("binary")
    parser.add_argument("--prefix", default="", help="prefix of objdump and addr2line")
    options = parser.parse_args()
    found: dict[tuple[str, str, tuple[str, ...]], list[Loop]] = defaultdict(list)
    for loop in multiplying_loops(options.binary, options.prefix):
        found[loop.isa, loop.kernel, loop.elements].append(loop)

    passed = failed = 0
    for isa in sorted({isa for isa, _, _ in found} - {"generic"}):
        for kernel in KERNELS:
            for elements in checked_elements(isa, kernel):
                name = f"{isa} {kernel}<{', '.join(elements)}>"
                loops = full_tiles(found[isa, kernel, elements])
                complaints = [f"{loop.sizes}: {text}" for loop in loops if (text := complaint(loop))]
                if not loops:
                    complaints = ["has no loop over its steps"]
                for text in complaints:
                    print(f"FAILED {name} {text}")
                most = max((len(loop.instructions) / loop.multiply_adds for loop in loops), default=0)
                print(f"{name}: at most {most:.2f} instructions for each multiply-add")
                passed += max(0, len(loops) - len(complaints))
                failed += len(complaints)
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
