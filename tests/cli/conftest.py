"""A small model, and the data to train and evaluate it on."""

import json
from pathlib import Path

import pytest

from small_llama import save_small_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with train.jsonl and valid.jsonl."""
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
    directory = tmp_path / "data"
    directory.mkdir()
    for name, part in (("train", rows[4:]), ("valid", rows[:4])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory
