"""A small model, data for it, and fine-tuning jobs in a temporary directory."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import nplora
from nplora.serving.jobs import FineTuning
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("served") / "small.gguf", "q8_0")


@pytest.fixture
def lm(model_file: Path) -> nplora.LanguageModel:
    return nplora.load_model(model_file, compute="int8")


@pytest.fixture
def jobs(lm: nplora.LanguageModel, tmp_path: Path) -> Iterator[FineTuning]:
    with FineTuning(lm, tmp_path / "jobs", model="small") as made:
        yield made
