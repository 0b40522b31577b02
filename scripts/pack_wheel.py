"""Pack the wheel for another system around an extension that was compiled for it.

Usage: python scripts/pack_wheel.py EXTENSION PLATFORM DIRECTORY

PLATFORM is the value of sysconfig.get_platform() on that system, such as win-amd64. Older wheels of nplora in
DIRECTORY are removed. This script needs the same version of Python as the extension, and the packages
scikit-build-core, pybind11, cmake and wheel.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    extension, directory = Path(sys.argv[1]).absolute(), Path(sys.argv[3]).absolute()
    os.environ["_PYTHON_HOST_PLATFORM"] = sys.argv[2]
    os.chdir(ROOT)
    from scikit_build_core import build  # reads the variable

    for old in directory.glob("nplora-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as tree:
        build.prepare_metadata_for_build_wheel(tree)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
        package = shutil.copytree(ROOT / "python/nplora", Path(tree, "nplora"), ignore=ignored)
        shutil.copy(extension, package)
        subprocess.run([sys.executable, "-m", "wheel", "pack", "-d", directory, tree], check=True)
    (wheel,) = directory.glob("nplora-*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
