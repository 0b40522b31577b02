"""Files and jobs as OpenAI's client reads them, from the upload to the adapter that answers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import finetune
from nplora.serving.jobs import FineTuning, job_run
from nplora.serving.jobs.storage import Storage
from nplora.serving.request_error import RequestError

from .conftest import ROWS, jsonl

types = pytest.importorskip("openai.types")
tuning = pytest.importorskip("openai.types.fine_tuning")
checkpoints = pytest.importorskip("openai.types.fine_tuning.jobs")

FAST = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 5}


def create(jobs: FineTuning, rows: Any = ROWS, **more: Any) -> dict[str, Any]:
    file = jobs.create_file(jsonl(rows), "train.jsonl")
    return jobs.create_job({"model": "small", "training_file": file["id"], "hyperparameters": FAST, **more})


def done(jobs: FineTuning, job: dict[str, Any]) -> dict[str, Any]:
    return jobs.wait(job["id"], 60)


def test_a_job_ends_as_an_adapter_that_answers(jobs: FineTuning, lm: nplora.LanguageModel) -> None:
    before = lm.generate("1+1=", max_new_tokens=4)
    job = create(jobs, suffix="sums", seed=3, metadata={"team": "a"})
    assert job["status"] == "queued"
    job = done(jobs, job)
    assert job["status"] == "succeeded", job["error"]
    assert job["fine_tuned_model"].startswith("ft:small:sums:")
    assert list(lm.adapters) == [job["fine_tuned_model"]]
    assert lm.generate("1+1=", max_new_tokens=4) == before
    assert not lm.adapter_layers()
    assert job["trained_tokens"] > 0
    assert job["finished_at"] >= job["created_at"]
    assert job["hyperparameters"] == FAST


def test_a_job_gives_the_bytes_of_finetune(
    jobs: FineTuning, lm: nplora.LanguageModel, model_file: Path, tmp_path: Path
) -> None:
    """With the same options, from a model that is loaded in float32."""
    job = done(jobs, create(jobs, rank=3, targets="q_proj,down_proj", seed=5))
    data = tmp_path / "train.jsonl"
    data.write_bytes(jsonl(ROWS))
    lr = 5 * nplora.finetuning.options.default_lr(lm.config.hidden_size)
    finetune(
        model_file, data, tmp_path / "out", rank=3, targets="q_proj,down_proj", seed=5, epochs=2,
        batch_examples=8, lr=lr, progress=False,
    )  # fmt: skip
    run = tmp_path / "jobs" / "jobs" / job["id"] / "run"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert list(lm.adapters) == [job["fine_tuned_model"]]


def test_openais_types_accept_every_object(jobs: FineTuning) -> None:
    valid = jobs.create_file(io.BytesIO(jsonl(ROWS[:4])), "valid.jsonl")
    job = done(jobs, create(jobs, validation_file=valid["id"]))
    assert job["status"] == "succeeded", job["error"]
    types.FileObject.model_validate(valid)
    read = tuning.FineTuningJob.model_validate(job)
    assert read.method.type == "supervised"
    assert read.hyperparameters.n_epochs == 2
    for shape in jobs.files()["data"]:
        types.FileObject.model_validate(shape)
    for shape in jobs.events(job["id"], limit=100)["data"]:
        tuning.FineTuningJobEvent.model_validate(shape)
    [final] = jobs.checkpoints(job["id"])["data"]
    read = checkpoints.FineTuningJobCheckpoint.model_validate(final)
    assert read.fine_tuned_model_checkpoint == job["fine_tuned_model"]
    assert read.metrics.full_valid_loss > 0
    assert types.FileDeleted.model_validate(jobs.delete_file(valid["id"])).deleted


def test_events_have_every_step_and_every_evaluation(jobs: FineTuning) -> None:
    valid = jobs.create_file(jsonl(ROWS[:4]), "valid.jsonl")
    job = done(jobs, create(jobs, validation_file=valid["id"], eval_every=2))
    events = jobs.events(job["id"], limit=100)["data"][::-1]
    data = [event["data"] for event in events if event["type"] == "metrics"]
    trained = [one for one in data if "train_loss" in one]
    assert [one["step"] for one in trained] == [1, 2, 3, 4, 5, 6]
    assert {one["total_steps"] for one in trained} == {6}
    assert [one["step"] for one in data if "valid_loss" in one] == [2, 3, 4, 6]
    assert trained[-1]["train_loss"] < trained[0]["train_loss"]
    messages = [event["message"] for event in events if event["type"] == "message"]
    assert messages[0] == f"Created fine-tuning job: {job['id']}"
    assert messages[-1] == "The job has successfully completed"
    [results] = job["result_files"]
    table = jobs.file_content(results).read_text().splitlines()
    assert table[0] == "step,train_loss,full_valid_loss"
    assert float(table[1].split(",")[1]) == trained[0]["train_loss"]
    assert len(table) == 7


def test_lists_are_read_page_by_page(jobs: FineTuning) -> None:
    job = done(jobs, create(jobs))
    whole = [event["id"] for event in jobs.events(job["id"], limit=100)["data"]]
    assert len(set(whole)) == len(whole) > 6
    found, after = list[str](), None
    while True:
        page = jobs.events(job["id"], after=after, limit=4)
        found += [event["id"] for event in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert found == whole
    ids = [jobs.create_file(b"{}\n", f"{n}.jsonl")["id"] for n in range(3)]
    assert [file["id"] for file in jobs.files(purpose="fine-tune", limit=3)["data"]] == ids[::-1]
    assert [file["id"] for file in jobs.files(order="asc")["data"]][-3:] == ids
    other = create(jobs, metadata={"team": "a"})
    assert [one["id"] for one in jobs.jobs()["data"]] == [other["id"], job["id"]]
    assert [one["id"] for one in jobs.jobs(metadata={"team": "a"})["data"]] == [other["id"]]
    assert jobs.jobs(metadata={"team": "b"})["data"] == []


def test_a_job_continues_an_adapter(jobs: FineTuning, lm: nplora.LanguageModel) -> None:
    first = done(jobs, create(jobs, rank=2))
    second = done(jobs, create(jobs, model=first["fine_tuned_model"]))
    assert second["status"] == "succeeded", second["error"]
    losses = [jobs.events(job["id"], limit=100)["data"][::-1] for job in (first, second)]
    starts = [next(e["data"]["train_loss"] for e in events if e["data"]) for events in losses]
    assert starts[1] < starts[0]
    with pytest.raises(
        RequestError, match="unrecognized field 'n_epochs': put it into the object hyper"
    ) as e:
        create(jobs, n_epochs=3)
    assert (e.value.param, e.value.code) == ("n_epochs", "unknown_parameter")
    with pytest.raises(RequestError, match="rank is decided by the adapter"):
        create(jobs, model=first["fine_tuned_model"], rank=4)


def test_preferences_in_openais_form_are_trained(jobs: FineTuning) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"{n}+{n}="}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": str(2 * n)}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for n in range(8)
    ]
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": "auto"}}}
    job = done(jobs, create(jobs, rows, method=method, hyperparameters=None))
    assert job["status"] == "succeeded", job["error"]
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
    data = [event["data"] for event in jobs.events(job["id"], limit=100)["data"] if event["data"]]
    assert data[-1]["train_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert "rewards/margins" in data[0]


def test_epochs_leave_checkpoints_that_answer_while_the_job_trains(
    jobs: FineTuning, lm: nplora.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "CHECKPOINT_SECONDS", 0)
    job = create(jobs, hyperparameters={**FAST, "n_epochs": 200})
    while len(found := jobs.checkpoints(job["id"])["data"]) < 3:
        pass
    names = {one["fine_tuned_model_checkpoint"] for one in found}
    assert len(names & lm.adapters.keys()) >= 1
    jobs.cancel(job["id"])
    job = done(jobs, job)
    assert job["status"] == "cancelled"
    kept = {one["fine_tuned_model_checkpoint"] for one in jobs.checkpoints(job["id"])["data"]}
    assert len(kept) == 3
    assert lm.adapters.keys() == kept


def test_a_job_has_not_succeeded_before_its_adapter_is_there(
    lm: nplora.LanguageModel, tmp_path: Path
) -> None:
    seen = list[str]()

    def publish(name: str, directory: Path) -> None:
        seen.extend(job["status"] for job in jobs.jobs()["data"])
        lm.load_adapter(directory, name)

    with FineTuning(lm, tmp_path / "jobs", model="small", publish=publish) as jobs:
        job = done(jobs, create(jobs))
        assert seen == ["running"]
        assert job["status"] == "succeeded"
        assert list(lm.adapters) == [job["fine_tuned_model"]]


def test_an_adapter_without_memory_fails_its_job_which_can_be_resumed(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the oldest checkpoints of the job make room. A checkpoint that does not fit is left out."""
    monkeypatch.setattr(job_run, "CHECKPOINT_SECONDS", 0)
    most, published = 2, list[str]()

    def publish(name: str, directory: Path) -> None:
        if len(published) >= most:
            raise RequestError("there is no memory", 507, code="insufficient_memory")
        published.append(name)

    with FineTuning(lm, tmp_path / "jobs", model="small", publish=publish, withdraw=published.remove) as jobs:
        job = done(jobs, create(jobs, hyperparameters={**FAST, "n_epochs": 6}))
        assert job["status"] == "succeeded", job["error"]
        assert published == [job["fine_tuned_model"]]
        messages = [event["message"] for event in jobs.events(job["id"], limit=100)["data"]]
        assert sum(message.startswith("Checkpoint created") for message in messages) == 5
        most = 1
        job = done(jobs, create(jobs))
        assert job["status"] == "failed"
        assert job["error"]["code"] == "insufficient_memory"
        events = jobs.events(job["id"], limit=100)["data"]
        assert any("cannot be used: there is no memory" in event["message"] for event in events)
        most = 2
        jobs.resume(job["id"])
        job = done(jobs, job)
        assert job["status"] == "succeeded", job["error"]
        assert job["fine_tuned_model"] in published
        after = jobs.events(job["id"], limit=100)["data"]
        assert [one for one in after if one["type"] == "metrics"] == [
            one for one in events if one["type"] == "metrics"
        ]


def test_the_memory_limit_is_asked_for_when_a_job_begins(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    limits = iter([10**7, 10**12])
    with FineTuning(lm, tmp_path / "jobs", model="small", memory=lambda: next(limits)) as jobs:
        assert done(jobs, create(jobs))["error"]["code"] == "insufficient_memory"
        assert done(jobs, create(jobs))["status"] == "succeeded"


def test_a_log_that_fails_ends_neither_a_request_nor_a_job(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    def closed(line: str) -> None:
        raise BrokenPipeError("the terminal is closed")

    with (
        pytest.warns(UserWarning, match="events of jobs are no longer printed: BrokenPipeError"),
        FineTuning(lm, tmp_path / "jobs", model="small", log=closed) as jobs,
    ):
        assert done(jobs, create(jobs))["status"] == "succeeded"


def test_the_stored_files_are_counted_once_for_a_long_upload(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = list[int]()
    count = Storage._stored_bytes
    monkeypatch.setattr(Storage, "_stored_bytes", lambda self: counts.append(count(self)) or counts[-1])
    rows = jsonl([{"prompt": "1+1=", "completion": "2" * 1000}]) * 4000  # 4 MB, which come in 4 parts
    with FineTuning(lm, tmp_path / "jobs", model="small", max_files_bytes=3 * len(rows) - 1) as jobs:
        for name in ("a.jsonl", "b.jsonl"):
            jobs.create_file(io.BytesIO(rows), name)
        with pytest.raises(RequestError, match="all files together would have more than"):
            jobs.create_file(io.BytesIO(rows), "c.jsonl")
    assert counts == [0, len(rows), 2 * len(rows)]
