"""The scripts and notebooks of examples/: each one runs, and its own assertions hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nplora

EXAMPLES = Path(__file__).parents[2] / "examples"

NUMPY_SCRIPTS = ["own_network.py", "custom_loss.py", "digits.py", "comparing_adapters.py", "convolution.py"]
TORCH_SCRIPTS = ["torch_in_and_out.py"]
SMOLLM2_SCRIPTS = {"chat_finetuning.py": ["--steps", "12"]}  # half the usual number
NUMPY_NOTEBOOKS = ["numpy_layer.ipynb"]
SMOLLM2_NOTEBOOKS = ["language_model.ipynb"]


def run(script: str, directory: Path, *arguments: str) -> str:
    """The output of a script, which runs in an empty directory, with warnings as errors, and leaves no
    file."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(Path(nplora.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(directory.iterdir())
    return done.stdout


@pytest.mark.slow
def test_the_textbook_script_runs(tmp_path: Path) -> None:
    assert "rank of the update: 2" in run("textbook_lora.py", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", NUMPY_SCRIPTS)
def test_a_script_runs_and_its_assertions_hold(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", TORCH_SCRIPTS)
def test_a_script_beside_torch_runs_and_its_assertions_hold(script: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert run(script, tmp_path)


@pytest.mark.parametrize("script", SMOLLM2_SCRIPTS)
def test_a_script_on_a_real_model_runs_and_its_assertions_hold(
    script: str, smollm2: Path, tmp_path: Path
) -> None:
    assert run(script, tmp_path, *SMOLLM2_SCRIPTS[script])


def execute(path: Path) -> None:
    """Run a notebook in a fresh kernel; an error in a cell is raised."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    run_cells = (
        "import sys, nbformat, nbclient; "
        "nbclient.NotebookClient(nbformat.read(sys.argv[1], 4), timeout=600, kernel_name='python3').execute()"
    )
    assert nbclient
    assert nbformat
    done = subprocess.run(
        [sys.executable, "-c", run_cells, str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(nplora.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NUMPY_NOTEBOOKS)
def test_a_notebook_runs_and_its_assertions_hold(notebook: str) -> None:
    execute(EXAMPLES / notebook)


@pytest.mark.parametrize("notebook", SMOLLM2_NOTEBOOKS)
def test_a_notebook_on_a_real_model_runs_and_its_assertions_hold(
    notebook: str, smollm2: Path, tmp_path: Path
) -> None:
    """With a third of its steps. What all of them print is stored in the notebook."""
    text = (EXAMPLES / notebook).read_text(encoding="utf-8")
    assert text.count(r"\"steps\": 80") == 1
    shorter = tmp_path / notebook
    shorter.write_text(text.replace(r"\"steps\": 80", r"\"steps\": 25"), encoding="utf-8")
    execute(shorter)


def test_every_example_is_tested_and_listed() -> None:
    listed = re.findall(r"^\| \[`(\S+)`\]\((\S+)\)", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert all(name == link for name, link in listed)
    files = {path.name for pattern in ("*.py", "*.ipynb") for path in EXAMPLES.glob(pattern)}
    others = {"browser/", "federated/"}  # with tests of their own: test_browser.py, test_federated.py
    assert {name for name, _ in listed} == files | others
    tested = ["textbook_lora.py", *NUMPY_SCRIPTS, *TORCH_SCRIPTS, *SMOLLM2_SCRIPTS]
    files.remove("ray_ranks.py")  # it needs a Ray cluster
    assert {*tested, *NUMPY_NOTEBOOKS, *SMOLLM2_NOTEBOOKS} == files
