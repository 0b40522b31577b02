"""Check that a wheel's bill of materials lists all that was compiled into the core.

Usage: python scripts/check_sbom.py WHEEL BUILD_DIRECTORY

BUILD_DIRECTORY is the one that Ninja built the wheel in. It knows each header that the compiler read, and
each static library that was linked (with CMake 4). If one belongs to a project that the bill does not list,
the check fails. It also fails if the bill is not valid CycloneDX. Needs ninja and the package
cyclonedx-python-lib[json-validation].
"""

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).parents[1]
BUILT_IN = {"nplora", "Python", "compiler and system"}  # what no bill of a wheel lists

# Whose a file is. The first pattern that fits decides.
OWNERS = (
    (r"/(libgcc|libc_nonshared)\.a$", "compiler and system"),
    (r"\.a$", "a static library"),
    (re.escape(f"{ROOT}/csrc/"), "nplora"),
    (r"/pybind11/", "pybind11"),
    (r"/include/c\+\+/|/libcxx/include/|/MSVC/", "c++-library"),
    (r"/include/python3\.\d+t?/", "Python"),
    (r"^/usr/(lib|include)/|/lib/(gcc|clang)/|/SDKs/|/Windows Kits/", "compiler and system"),
)


def bill_of(wheel: Path) -> dict[str, object]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".dist-info/sboms/nplora.cdx.json")]
        if len(names) != 1:
            sys.exit(f"{wheel.name} has {len(names)} bills of materials of nplora")
        text = archive.read(names[0]).decode()
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        sys.exit(f"{names[0]} is not valid CycloneDX: {error}")
    bill: dict[str, object] = json.loads(text)
    return bill


def files_read(build: Path) -> set[str]:
    """Every file from outside that compiler and linker read for the core, by Ninja's log of dependencies."""
    log = subprocess.run(
        ["ninja", "-C", str(build), "-t", "deps"], capture_output=True, text=True, check=True
    ).stdout
    found, wanted, build = set(), False, build.resolve()
    for line in log.splitlines():
        if not line.startswith(" "):
            wanted = not line.startswith("tests/")
        elif wanted:
            found.add((build / line.strip()).resolve())
    return {str(file) for file in found if not file.is_relative_to(build)}


def versions(found: set[str]) -> dict[str, str]:
    """The versions that headers name themselves: pybind11's macros, and the directory of libstdc++.

    The headers of pybind11 are gone if pip built the wheel in an environment of its own, which it deletes.
    """
    named = {}
    for header in found:
        if header.endswith("/pybind11/detail/common.h") and Path(header).exists():
            macros = dict(re.findall(r"#define PYBIND11_VERSION_(\w+) (\S+)", Path(header).read_text()))
            named["pybind11"] = ".".join(macros[part] for part in ("MAJOR", "MINOR", "MICRO"))
        elif directory := re.search(r"^/usr/include/c\+\+/(\d+)/", header):
            named["c++-library"] = directory[1]
    return named


def owner(file: str) -> str:
    return next((name for pattern, name in OWNERS if re.search(pattern, file)), "unknown")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, build = map(Path, sys.argv[1:])
    bill = bill_of(wheel)
    found = files_read(build)
    owners = Counter(map(owner, found))
    if not owners["nplora"]:
        sys.exit(f"{build} is not a build of nplora by Ninja")
    listed = {component["bom-ref"]: component for component in bill["components"]}  # type: ignore[attr-defined]
    unlisted = sorted(file for file in found if owner(file) not in listed.keys() | BUILT_IN)
    if unlisted:
        sys.exit("compiled in, but not in the bill of materials:\n" + "\n".join(unlisted))
    for name, version in versions(found).items():
        if listed[name]["version"] != version:
            sys.exit(f"{name} {version} was compiled in, but the bill says {listed[name]['version']}")
    for component in listed.values():
        terms = component["licenses"][0]
        license = terms.get("expression") or terms["license"]["name"]
        count = owners[component["bom-ref"]]
        headers = f"; {count} headers" if count else ""
        print(f"{component['name']} {component['version']}: {license}{headers}")


if __name__ == "__main__":
    main()
