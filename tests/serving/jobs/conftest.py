"""A small model, data for it, and fine-tuning jobs in a temporary directory."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nplora
from nplora.serving.jobs import FineTuning
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
LONG = {"n_epochs": 25, "batch_size": 4, "learning_rate_multiplier": 3}


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def queued(jobs: FineTuning, **more: Any) -> str:
    file = jobs.create_file(jsonl(ROWS), "train.jsonl")
    job = jobs.create_job({"model": "small", "training_file": file["id"], "hyperparameters": LONG, **more})
    return str(job["id"])


def wait_until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def adapter_of(place: Path) -> tuple[bytes, bytes]:
    names = "adapter_model.safetensors", "adapter_config.json"
    return (place / names[0]).read_bytes(), (place / names[1]).read_bytes()


def steps_of(jobs: FineTuning, job_id: str) -> list[int]:
    events = jobs.events(job_id, limit=1000)["data"][::-1]
    return [event["data"]["step"] for event in events if event["type"] == "metrics"]


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


@pytest.fixture
def idle(lm: nplora.LanguageModel, tmp_path: Path) -> FineTuning:
    """Jobs whose thread is not started."""
    return FineTuning(lm, tmp_path / "jobs", model="small")
