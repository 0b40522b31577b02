"""The installed package: versions that agree, types, and an import that loads nothing else."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nplora
from nplora import _core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert nplora.__version__ == version
    assert _core.config()["version"] == version
    build = (ROOT / "CMakeLists.txt").read_text()
    assert re.search(rf"^project\(nplora VERSION {re.escape(version)} ", build, flags=re.MULTILINE)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def test_the_package_is_typed() -> None:
    package = Path(nplora.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()


def test_every_public_name_exists_and_is_documented() -> None:
    assert len(nplora.__all__) == len(set(nplora.__all__))
    for name in nplora.__all__:
        value = getattr(nplora, name)
        assert name == "__version__" or (getattr(value, "__doc__", "") or "").strip(), (
            f"{name} has no docstring"
        )


def test_numpy_is_the_only_required_dependency() -> None:
    assert [re.split(r"[<>=!~ ]", line)[0] for line in PROJECT["dependencies"]] == ["numpy"]


@pytest.mark.slow
def test_import_loads_only_numpy() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import nplora; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    learns = {"threadpoolctl"}  # if it is installed, it learns of nplora's threads; it imports nothing else
    assert set(run.stdout.split()) <= {"nplora", "numpy"} | learns | sys.stdlib_module_names


@pytest.mark.slow
def test_import_does_not_load_files_models_and_training() -> None:
    code = "import sys, nplora; print(*(m for m in sys.modules if m.startswith('nplora.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    late = ("formats", "models", "tokenizer", "trainer", "adapters", "data", "cli")
    assert not [m for m in run.stdout.split() if m.split(".")[1] in late]


@pytest.mark.slow
def test_modules_that_are_imported_lazily_are_available() -> None:
    late = {name: name for name in ("trainer", "finetuning", "formats", "adapters", "models", "tokenizer")}
    late |= {"data": "finetuning.data", "generate": "lm.generation", "plot": "trainer.plot"}
    code = (
        f"import sys, nplora; late = {late!r}; shown = set(dir(nplora)); before = set(sys.modules)\n"
        "print([n for n, path in late.items() if n not in shown or 'nplora.' + path in before])\n"
        "print([n for n, path in late.items() if getattr(nplora, n).__name__ != 'nplora.' + path])\n"
        "print(nplora.trainer.Callback)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "[]", "<class 'nplora.trainer.callbacks.Callback'>"]


@pytest.mark.slow
def test_modules_can_be_imported_by_the_names_that_the_docs_use() -> None:
    code = (
        "import importlib, types, nplora\n"
        "from nplora.embedding import train\n"
        "names = [n for n in nplora.__all__ if isinstance(getattr(nplora, n), types.ModuleType)]\n"
        "same = [importlib.import_module('nplora.' + n) is getattr(nplora, n) for n in names]\n"
        "print(len(same) > 10, all(same))\n"
        "print(train is nplora.embedding.train, nplora.data.__name__, nplora.losses is nplora.nn.losses)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["True True", "True nplora.finetuning.data True"]


@pytest.mark.slow
def test_import_does_not_change_the_floating_point_mode() -> None:
    """A subnormal survives. -ffast-math would set flush-to-zero when the library is loaded."""
    code = "import nplora, numpy as np; print(np.float32(2.0**-130) * np.float32(0.5) > 0, 5e-324 * 1.0 > 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"]


def test_the_command_is_installed_under_its_name() -> None:
    assert PROJECT["scripts"] == {"nplora": "nplora.cli:main"}
    try:
        installed = importlib.metadata.distribution("nplora")
    except importlib.metadata.PackageNotFoundError:  # run from the checkout
        return
    assert [(e.name, e.value) for e in installed.entry_points] == [("nplora", "nplora.cli:main")]


def test_a_wheel_contains_the_licences_of_its_parts() -> None:
    texts = {path.name: path.read_text() for name in PROJECT["license-files"] for path in ROOT.glob(name)}
    assert "Redistributions in binary form" in texts["LICENSE"]
    assert "Wenzel Jakob" in texts["pybind11.txt"]
    assert "Redistributions in binary form" in texts["pybind11.txt"]
    assert "libgomp" in texts["gcc-runtime.txt"]
    assert "GCC RUNTIME LIBRARY EXCEPTION" in texts["gcc-runtime.txt"]
    assert "GNU GENERAL PUBLIC LICENSE" in texts["GPL-3.0.txt"]
    try:
        installed = importlib.metadata.distribution("nplora")
    except importlib.metadata.PackageNotFoundError:  # run from the checkout
        return
    if Path(str(installed.locate_file("nplora/__init__.py"))).resolve() != Path(nplora.__file__).resolve():
        return  # a checkout is used instead of the installed package
    shipped = {f.name: f.read_text() for f in installed.files or [] if "licenses" in f.parts}
    assert shipped == texts


def test_dir_shows_what_is_public() -> None:
    shown = {name for name in dir(nplora) if not name.startswith("__")}
    assert shown == set(nplora.__all__)
    assert "__version__" in dir(nplora)
