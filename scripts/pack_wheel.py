"""Pack the wheel for another system around an extension that was compiled for it.

Usage: python scripts/pack_wheel.py EXTENSION PLATFORM DIRECTORY

PLATFORM is what sysconfig.get_platform() is there, such as win-amd64. The wheel is the only one of DIRECTORY
afterwards. The Python that runs this script has the version of the extension, and the packages
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
