"""Check an extension for macOS without a Mac: its imports, its exports, and that macOS may run it at all.

Usage: python scripts/cross/check_macos.py _core.cpython-311-darwin.so

The extension must be compiled by zig, which links libc++ into it. zig's linker ignores the list of exports,
so the extension may export more symbols.

The oracle for the system's symbols is the list of libSystem in the package ziglang, and for Python's symbols
the interpreter that runs this script.
"""

import ctypes
import importlib.util
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC, DYLIB, BUNDLE = 0xFEEDFACF, 6, 8
PROCESSORS = {0x0100000C: "arm64", 0x01000007: "x86_64"}
SYMTAB, LOAD_DYLIB, CODE_SIGNATURE, BUILD_VERSION = 0x2, 0xC, 0x1D, 0x32
OLDEST = (11, 0)
EXPORTS = {"_PyInit__core", "_nplora_outer_threads"}
LIBRARIES = {"/usr/lib/libSystem.B.dylib"}
SUPER_BLOB, CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
EXTERNAL, TYPE, UNDEFINED, PRIVATE, STAB = 0x01, 0x0E, 0x00, 0x10, 0xE0


class Extension(NamedTuple):
    """The content of the load commands of a file."""

    processor: str
    kind: int
    oldest: tuple[int, int]
    libraries: set[str]
    needed: set[str]
    exports: set[str]
    signature: bytes


def commands(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The load commands: kind and bytes."""
    count, at = struct.unpack_from("<I", data, 16)[0], 32
    for _ in range(count):
        kind, size = struct.unpack_from("<II", data, at)
        yield kind, data[at : at + size]
        at += size


def text_at(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def parsed(data: bytes) -> Extension:
    magic, processor, _, kind = struct.unpack_from("<IIII", data)
    if magic != MAGIC:
        sys.exit("expected a 64-bit Mach-O file for one processor")
    oldest, libraries, needed, exports, signature = (0, 0), set(), set(), set(), b""
    for command, content in commands(data):
        kind_of_command = command & 0x7FFFFFFF
        if kind_of_command == BUILD_VERSION:
            version = struct.unpack_from("<I", content, 12)[0]
            oldest = version >> 16, version >> 8 & 255
        elif kind_of_command == LOAD_DYLIB:
            libraries.add(text_at(content, struct.unpack_from("<I", content, 8)[0]))
        elif kind_of_command == CODE_SIGNATURE:
            at, size = struct.unpack_from("<II", content, 8)
            signature = data[at : at + size]
        elif kind_of_command == SYMTAB:
            symbols, count, strings, _ = struct.unpack_from("<IIII", content, 8)
            for i in range(count):
                name, flags = struct.unpack_from("<IB", data, symbols + 16 * i)
                if flags & (STAB | PRIVATE) or not flags & EXTERNAL:
                    continue
                (needed if flags & TYPE == UNDEFINED else exports).add(text_at(data, strings + name))
    return Extension(PROCESSORS.get(processor, "?"), kind, oldest, libraries, needed, exports, signature)


def system_symbols() -> set[str]:
    """The symbols of macOS' libSystem, by the list in ziglang."""
    package = importlib.util.find_spec("ziglang")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package ziglang is missing")
    listing = Path(package.submodule_search_locations[0], "lib/libc/darwin/libSystem.tbd").read_text()
    return set(re.findall(r"[\w$.]+", listing))


def is_of_python(name: str) -> bool:
    return name.startswith(("_Py", "__Py")) and hasattr(ctypes.pythonapi, name[1:])


def problems(found: Extension) -> Iterator[str]:
    if found.processor == "?" or found.kind not in (BUNDLE, DYLIB):
        yield "not an extension for arm64 or x86_64"
    if found.oldest != OLDEST:
        yield f"needs macOS {found.oldest[0]}.{found.oldest[1]}, expected {OLDEST[0]}.{OLDEST[1]}"
    if found.libraries - LIBRARIES:
        yield f"needs the libraries {', '.join(sorted(found.libraries - LIBRARIES))}"
    unknown = {name for name in found.needed - system_symbols() if not is_of_python(name)}
    if unknown:
        yield f"needs symbols that neither macOS nor Python has: {', '.join(sorted(unknown))}"
    if EXPORTS - found.exports:
        yield f"does not export {', '.join(sorted(EXPORTS - found.exports))}"
    # Apple's processors run signed code only. A signature without a certificate is enough.
    if found.processor == "arm64" and not is_signed(found.signature):
        yield "is not signed"


def is_signed(signature: bytes) -> bool:
    if len(signature) < 20 or struct.unpack_from(">I", signature)[0] != SUPER_BLOB:
        return False
    count = struct.unpack_from(">I", signature, 8)[0]
    places = [struct.unpack_from(">II", signature, 12 + 8 * i)[1] for i in range(count)]
    return any(struct.unpack_from(">I", signature, place)[0] == CODE_DIRECTORY for place in places)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = parsed(Path(sys.argv[1]).read_bytes())
    python = sum(map(is_of_python, found.needed))
    print(
        f"{found.processor}, macOS {found.oldest[0]}.{found.oldest[1]} or newer; needs {python} symbols of "
        f"Python and {len(found.needed) - python} of macOS; exports {len(found.exports)} symbols"
    )
    wrong = list(problems(found))
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
