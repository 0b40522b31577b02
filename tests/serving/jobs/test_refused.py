"""Requests and data that are wrong, and their error objects."""

import json
from pathlib import Path
from typing import Any

import pytest

import nplora
from nplora.serving.jobs import FineTuning, fine_tuning
from nplora.serving.request_error import RequestError

from .conftest import ROWS, jsonl

FAST = {"n_epochs": 1, "batch_size": 8}
BETA = {"beta": 0.3}


@pytest.fixture
def idle(lm: nplora.LanguageModel, tmp_path: Path) -> Any:
    made = FineTuning(lm, tmp_path / "jobs", model="small", max_file_bytes=10_000)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"model": None}, "model is missing", "model"),
        ({"model": 5}, "model is 5, expected a text", "model"),
        ({"model": "../small"}, "no model has the name '../small'", "model"),
        ({"training_file": None}, "training_file is missing", "training_file"),
        ({"training_file": "../../etc/passwd"}, "no file has the id", "training_file"),
        ({"validation_file": "file-0"}, "no file has the id 'file-0'", "validation_file"),
        ({"suffix": "../x"}, "suffix is '../x', expected 1 to 64 letters", "suffix"),
        ({"suffix": "a..b"}, "suffix is 'a..b', expected", "suffix"),
        ({"suffix": 5}, "suffix is 5", "suffix"),
        ({"seed": -1}, "seed is -1, expected 0 to 2147483647", "seed"),
        ({"seed": True}, "seed is True", "seed"),
        ({"metadata": {"a": "\ud800"}}, "not JSON in UTF-8", "metadata"),
        ({"metadata": {"a": 5}}, "metadata.a is 5, expected a text of at most 512 characters", "metadata"),
        ({"metadata": {"a" * 65: ""}}, "expected at most 64 characters", "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "at most 16 texts", "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations is not supported", "integrations"),
        ({"method": "dpo"}, "method is 'dpo', expected an object", "method"),
        (
            {"method": {"type": "reinforcement"}},
            "'reinforcement', expected one of supervised, dpo",
            "method.type",
        ),
        ({"method": {}}, "method.type is missing", "method.type"),
        (
            {"method": {"typ": "dpo", "dpo": {"hyperparameters": BETA}}},
            "method.type is missing",
            "method.type",
        ),
        ({"method": {"dpo": {"hyperparameters": BETA}}}, "method.type is missing", "method.type"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameter": {"n_epochs": 9}}}},
            "unrecognized field 'hyperparameter'; did you mean hyperparameters?",
            "hyperparameter",
        ),
        (
            {"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 9}}}},
            "unrecognized field 'supervised'",
            "supervised",
        ),
        ({"method": {"type": "dpo", "dpo": 5}}, "method.dpo is 5, expected an object", "method.dpo"),
        ({"hyperparameters": 5}, "hyperparameters is 5, expected an object", "hyperparameters"),
        (
            {"hyperparameters": {"n_epoch": 5}},
            "unrecognized field 'n_epoch'; did you mean n_epochs?",
            "n_epoch",
        ),
        (
            {"hyperparameters": {"n_epochs": 0}},
            "n_epochs is 0, expected an integer above 0",
            "hyperparameters",
        ),
        ({"hyperparameters": {"n_epochs": 1.5}}, "n_epochs is 1.5", "hyperparameters"),
        ({"hyperparameters": {"n_epochs": "two"}}, "n_epochs is 'two'", "hyperparameters"),
        ({"hyperparameters": {"batch_size": 1e300}}, "batch_size is 1e+300", "hyperparameters"),
        ({"hyperparameters": {"learning_rate_multiplier": "nan"}}, "is 'nan'", "hyperparameters"),
        ({"hyperparameters": {"learning_rate_multiplier": float("nan")}}, "is not JSON", "hyperparameters"),
        ({"epochs": 2}, "n_epochs and epochs are both given", "hyperparameters"),
        ({"rank": 0}, "rank is 0", "rank"),
        ({"rank": "8"}, "rank is '8'", "rank"),
        ({"use_dora": "no"}, "use_dora is 'no', expected True or False", "use_dora"),
        ({"hyperparameters": {"chat": 0}}, "chat is 0, expected True or False", "chat"),
        ({"layers": "some"}, "layers='some'", "layers"),
        (
            {"trainable_tokens": [1] * 30_000},
            "the options of the job have 90,0",
            "trainable_tokens",
        ),
        (
            {"rank": 3, "hyperparameters": {"targets": "q_proj," * 10_000}},
            "bytes as JSON, expected at most 65,536: targets is too long",
            "targets",
        ),
        ({"rnk": 8}, "unrecognized field 'rnk'; did you mean rank?", "rnk"),
        ({"adapter": "/etc"}, "unrecognized field 'adapter'", "adapter"),
        ({"teacher": "/etc/passwd"}, "unrecognized field 'teacher'", "teacher"),
        ({"resume": True}, "unrecognized field 'resume'", "resume"),
        ({"report_to": "wandb"}, "unrecognized field 'report_to'", "report_to"),
        ({"memory": "1M"}, "unrecognized field 'memory'", "memory"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_wrong_request_is_refused(
    idle: FineTuning, changes: dict[str, Any], message: str, param: str | None
) -> None:
    file = idle.create_file(jsonl(ROWS), "train.jsonl")
    request = {"model": "small", "training_file": file["id"], "hyperparameters": FAST, **changes}
    with pytest.raises(RequestError) as refused:
        idle.create_job(request)
    assert message in str(refused.value)
    assert refused.value.param == param
    assert refused.value.code
    assert refused.value.status in (400, 404)
    assert idle.jobs()["data"] == []


def test_a_job_whose_model_would_have_too_long_a_name_is_refused(
    lm: nplora.LanguageModel, tmp_path: Path
) -> None:
    idle = FineTuning(lm, tmp_path / "jobs", model="m" * 150)
    file = idle.create_file(jsonl(ROWS), "train.jsonl")
    request = {"model": "m" * 150, "training_file": file["id"]}
    with pytest.raises(RequestError, match="expected at most 200") as refused:
        idle.create_job({**request, "suffix": "s" * 60})
    assert refused.value.param == "suffix"
    assert idle.create_job(request)["status"] == "queued"
    idle.close()


def test_too_many_jobs_that_have_not_ended_are_refused(
    idle: FineTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "MOST_JOBS", 3)
    file = idle.create_file(jsonl(ROWS), "train.jsonl")
    request = {"model": "small", "training_file": file["id"]}
    first, second, _ = (idle.create_job(request)["id"] for _ in range(3))
    idle.pause(first)
    with pytest.raises(RequestError, match="3 jobs have not ended") as refused:
        idle.create_job(request)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert len(idle.jobs()["data"]) == 3
    idle.cancel(second)
    assert idle.create_job(request)["status"] == "queued"


@pytest.mark.parametrize("file_id", ["", ".", "..", "../files", "file-\0", "a" * 5000, None, 5, "file.json"])
def test_an_unknown_id_is_not_found(idle: FineTuning, file_id: Any) -> None:
    for method in (idle.file, idle.file_content, idle.delete_file, idle.job, idle.events, idle.checkpoints,
                   idle.cancel, idle.pause, idle.resume):  # fmt: skip
        with pytest.raises(RequestError) as refused:
            method(file_id)
        assert refused.value.status == 404


def test_wrong_files_and_pages_are_refused(idle: FineTuning, tmp_path: Path) -> None:
    for arguments, message in (
        ((b"", "a.jsonl"), "the file is empty"),
        ((b"x" * 10_001, "a.jsonl"), "more than 10,000 bytes"),
        ((iter([b"x" * 9000, b"x" * 9000]), "a.jsonl"), "more than 10,000 bytes"),
        ((b"x", ""), "the name of the file is ''"),
        ((b"x", "n" * 300), "the name of the file is"),
        ((b"x", "\ud800"), "not JSON in UTF-8"),
        ((b"x", "a.jsonl", "assistants"), "purpose is 'assistants', expected 'fine-tune'"),
    ):
        with pytest.raises(RequestError, match=message):
            idle.create_file(*arguments)  # type: ignore[arg-type]
    for page in ({"limit": 0}, {"limit": 10_001}, {"limit": "5"}, {"after": "x"}, {"order": "up"}):
        with pytest.raises(RequestError):
            idle.files(**page)
    assert not any((tmp_path / "jobs" / "files").iterdir())


def test_all_files_together_have_a_limit(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    """A deleted file counts as long as a job needs it."""
    jobs = FineTuning(lm, tmp_path / "jobs", model="small", max_files_bytes=1000)
    try:
        file = jobs.create_file(b'{"text": "x"}\n' * 40, "a.jsonl")
        job = jobs.create_job({"model": "small", "training_file": file["id"]})
        jobs.delete_file(file["id"])
        for content in (b"x" * 600, iter([b"x" * 300, b"x" * 300])):
            with pytest.raises(RequestError, match="more than 1,000 bytes, which is the limit") as refused:
                jobs.create_file(content, "b.jsonl")
            assert (refused.value.status, refused.value.code) == (507, "storage_limit_exceeded")
        assert jobs.files()["data"] == []
        jobs.create_file(b"x" * 400, "c.jsonl")
        jobs.cancel(job["id"])
        jobs.create_file(b"x" * 600, "d.jsonl")
    finally:
        jobs.close()


def test_a_failed_job_that_is_cancelled_frees_its_data(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small", max_files_bytes=1000) as jobs:
        file = jobs.create_file(b'{"bad": 1}\n' * 80, "a.jsonl")
        job = jobs.wait(jobs.create_job({"model": "small", "training_file": file["id"]})["id"], 60)
        assert job["status"] == "failed"
        jobs.delete_file(file["id"])
        with pytest.raises(RequestError, match="cancel failed jobs"):
            jobs.create_file(b"x" * 500, "b.jsonl")
        cancelled = jobs.cancel(job["id"])
        assert (cancelled["status"], cancelled["error"]) == ("cancelled", job["error"])
        jobs.create_file(b"x" * 500, "b.jsonl")


@pytest.mark.parametrize("status", ["succeeded", "cancelled"])
def test_files_that_a_crash_left_are_removed_at_the_next_start(
    idle: FineTuning, lm: nplora.LanguageModel, tmp_path: Path, status: str
) -> None:
    file = idle.create_file(jsonl(ROWS), "a.jsonl")
    job = idle.create_job({"model": "small", "training_file": file["id"]})["id"]
    known = {"id": "a", "created_at": 0, "step": 2, "name": "b", "train_loss": None, "valid_loss": None}
    idle._state.storage.change_job(job, status=status, checkpoints=[known])
    idle.close()
    place = tmp_path / "jobs" / "jobs" / job
    for name in ("run", "start", "checkpoints/step-1", "checkpoints/step-2"):
        (place / name).mkdir(parents=True)
    FineTuning(lm, tmp_path / "jobs", model="small").close()
    kept = {"job.json", "events.jsonl", "checkpoints"} | ({"run"} if status == "succeeded" else set())
    assert {path.name for path in place.iterdir()} == kept
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-2"]


def test_a_file_name_is_never_a_path(idle: FineTuning, tmp_path: Path) -> None:
    for name in ("../../x.jsonl", "/etc/passwd", "a\0b.csv", "..", "x.parquet/../y"):
        made = idle.create_file(b"text", name)
        assert made["filename"] == name
        content = idle.file_content(made["id"])
        assert content.parent.parent == tmp_path / "jobs" / "files"
        assert content.read_bytes() == b"text"


@pytest.mark.parametrize(
    ("content", "filename", "code", "message"),
    [
        (jsonl(ROWS[:2]) + b'{"prompt": 5, "completion": "a"}\n', "mine.jsonl", "invalid_training_file",
         "mine.jsonl, line 3: prompt is 5, expected a string"),
        (jsonl(ROWS[:2]) + b"{\n", "mine.jsonl", "invalid_training_file", "mine.jsonl, line 3: "),
        (b"\xff\xfe\n", "mine.jsonl", "invalid_training_file", "mine.jsonl"),
        (b"not a table", "mine.parquet", "invalid_training_file", "mine.parquet"),
        (jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "pairs.jsonl", "invalid_training_file",
         "pairs.jsonl, line 1: the row has chosen and rejected"),
    ],
    ids=["type", "json", "utf-8", "parquet", "pairs"],
)  # fmt: skip
def test_wrong_data_fail_the_job(
    jobs: FineTuning, tmp_path: Path, content: bytes, filename: str, code: str, message: str
) -> None:
    if filename.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    file = jobs.create_file(content, filename)
    job = jobs.create_job({"model": "small", "training_file": file["id"], "hyperparameters": FAST})
    job = jobs.wait(job["id"], 60)
    assert job["status"] == "failed"
    assert job["error"]["code"] == code
    assert message in job["error"]["message"]
    assert str(tmp_path) not in job["error"]["message"]
    assert job["error"]["param"] == "training_file"
    [event] = [event for event in jobs.events(job["id"])["data"] if event["level"] == "error"]
    assert message in event["message"]


def test_a_wrong_validation_file_is_named(jobs: FineTuning) -> None:
    files = [
        jobs.create_file(content, name) for content, name in ((jsonl(ROWS), "t.jsonl"), (b"{\n", "v.jsonl"))
    ]
    request = {"model": "small", "training_file": files[0]["id"], "validation_file": files[1]["id"]}
    error = jobs.wait(jobs.create_job(request)["id"], 60)["error"]
    assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")
    assert error["message"].startswith("v.jsonl, line 1: ")


def test_options_that_do_not_fit_the_model_fail_the_job(jobs: FineTuning, lm: nplora.LanguageModel) -> None:
    file = jobs.create_file(jsonl(ROWS), "train.jsonl")
    request = {"model": "small", "training_file": file["id"], "hyperparameters": FAST}
    error = jobs.wait(jobs.create_job({**request, "targets": "no_proj"})["id"], 60)["error"]
    assert error["code"] == "invalid_hyperparameters"
    assert "no layer 'no_proj'" in error["message"]
    diverging = {**request, "hyperparameters": {"n_epochs": 4, "learning_rate_multiplier": 1e8}}
    job = jobs.wait(jobs.create_job({**diverging, "max_grad_norm": 1e30, "rank": 32})["id"], 60)
    assert job["status"] in ("failed", "succeeded")
    assert job["error"] is None or job["error"]["code"] == "training_diverged"
    assert jobs.wait(jobs.create_job(request)["id"], 60)["status"] == "succeeded"


def test_a_job_that_does_not_fit_into_memory_fails(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small", memory="2M") as jobs:
        file = jobs.create_file(jsonl(ROWS), "train.jsonl")
        job = jobs.create_job({"model": "small", "training_file": file["id"]})
        error = jobs.wait(job["id"], 60)["error"]
    assert error["code"] == "insufficient_memory"
    assert "no plan fits into 2 MB" in error["message"]
    assert "the server's --memory must be larger, because requests need memory too" in error["message"]
