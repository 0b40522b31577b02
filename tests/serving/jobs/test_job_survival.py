"""Jobs that are killed, cancelled, paused or restarted, and records that are damaged."""

import functools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nplora
import systems
from nplora.serving.jobs import FineTuning, job_run, storage
from nplora.serving.jobs.jobs_state import JobsState
from nplora.serving.request_error import RequestError

from .conftest import adapter_of, queued, steps_of, wait_until

STEPS = 150
SERVER = """
import sys, time
import nplora
from nplora.serving.jobs import FineTuning
FineTuning(nplora.load_model(sys.argv[1], compute="int8"), sys.argv[2], model="small").start()
print("started", flush=True)
time.sleep(600)
"""


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def has_lines(path: Path, count: int) -> bool:
    return lines(path) > count


@pytest.mark.slow
def test_a_job_that_is_killed_twice_ends_with_the_same_bits(
    lm: nplora.LanguageModel, model_file: Path, tmp_path: Path
) -> None:
    with FineTuning(lm, tmp_path / "whole", model="small") as jobs:
        whole = queued(jobs, dropout=0.1)
        name = jobs.wait(whole, 60)["fine_tuned_model"]
    idle = FineTuning(lm, tmp_path / "jobs", model="small")
    job = queued(idle, dropout=0.1)
    idle.close()
    events, seen = tmp_path / "jobs" / "jobs" / job / "events.jsonl", list[int]()
    for steps in (20, 110):
        command = [sys.executable, "-c", SERVER, str(model_file), str(tmp_path / "jobs")]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(functools.partial(has_lines, events, steps))
        finally:
            server.kill()
        assert server.wait() == systems.KILLED
        seen.append(lines(events))
    assert 20 < seen[0] < seen[1] < STEPS, "the job was not killed in its midst"
    lm.delete_adapter(name)
    log = list[str]()
    with FineTuning(lm, tmp_path / "jobs", model="small", log=log.append) as jobs:
        found = jobs.wait(job, 60)
        assert found["status"] == "succeeded", found["error"]
        assert steps_of(jobs, job) == list(range(1, STEPS + 1))
        messages = [event["message"] for event in jobs.events(job, limit=1000)["data"]]
    assert messages.count("The server was restarted") == 2
    assert log[0] == f"{job}: The server was restarted"
    assert any(line.startswith(f"{job}: Fine-tuning job continues at step ") for line in log)
    assert not any("training loss" in line for line in log)
    assert list(lm.adapters) == [found["fine_tuned_model"]]
    runs = [
        tmp_path / directory / "jobs" / one / "run" for directory, one in (("whole", whole), ("jobs", job))
    ]
    assert adapter_of(runs[0]) == adapter_of(runs[1])


@pytest.mark.slow
def test_a_job_that_is_stopped_by_close_continues_after_the_next_start(
    lm: nplora.LanguageModel, tmp_path: Path
) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        job = queued(jobs)
        wait_until(lambda: len(steps_of(jobs, job)) > 20)
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        assert jobs.wait(job, 60)["status"] == "succeeded"
        assert steps_of(jobs, job) == list(range(1, STEPS + 1))
        messages = [event["message"] for event in jobs.events(job, limit=1000)["data"]]
        assert any(message.startswith("Fine-tuning job continues at step ") for message in messages)
        assert "The server is stopping; the job continues when the server starts again" in messages
        assert [path.name for path in (tmp_path / "jobs" / "jobs" / job).glob("train*")] == []


def test_a_restarted_server_has_the_adapters_and_the_files_of_before(
    lm: nplora.LanguageModel, model_file: Path, tmp_path: Path
) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        job = jobs.wait(queued(jobs, hyperparameters={"n_epochs": 1}), 60)
        before = [jobs.job(job["id"]), jobs.jobs(), jobs.files(), jobs.events(job["id"])]
    other = nplora.load_model(model_file, compute="int8")
    with FineTuning(other, tmp_path / "jobs", model="small") as jobs:
        assert [jobs.job(job["id"]), jobs.jobs(), jobs.files(), jobs.events(job["id"])] == before
        assert list(other.adapters) == [job["fine_tuned_model"]]
    other.set_adapter(job["fine_tuned_model"])
    lm.set_adapter(job["fine_tuned_model"])
    assert (other.logits([1, 2, 3]) == lm.logits([1, 2, 3])).all()
    shutil.rmtree(tmp_path / "jobs" / "jobs" / job["id"] / "run")
    jobs = FineTuning(nplora.load_model(model_file, compute="int8"), tmp_path / "jobs", model="small")
    with pytest.warns(UserWarning, match=r"the adapter .* cannot be used: ") as warned:
        jobs.publish_earlier()
    assert "Errno" not in str(warned[0].message)
    jobs.close()


def test_a_cancelled_job_ends_before_the_next_block_and_for_ever(
    lm: nplora.LanguageModel, tmp_path: Path
) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        job, next_job = queued(jobs), queued(jobs, hyperparameters={"n_epochs": 1})
        wait_until(lambda: steps_of(jobs, job))
        assert jobs.cancel(job)["status"] == "cancelled"
        assert jobs.wait(job, 60)["finished_at"]
        assert len(steps_of(jobs, job)) < STEPS
        for refused in (jobs.cancel, jobs.resume, jobs.pause):
            with pytest.raises(RequestError, match="is cancelled, expected"):
                refused(job)
        assert jobs.wait(next_job, 60)["status"] == "succeeded"
        third = queued(jobs)
        wait_until(lambda: steps_of(jobs, third))
        assert jobs.cancel(third)["status"] == "cancelled"
    for one in (job, third):
        assert "The server stops" not in (jobs._state.storage.place(one) / "events.jsonl").read_text()
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        assert [one["status"] for one in jobs.jobs()["data"]] == ["cancelled", "succeeded", "cancelled"]


def names_in(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


@pytest.mark.parametrize("first", [FineTuning.cancel, FineTuning.pause], ids=["running", "paused"])
def test_a_cancelled_job_leaves_only_its_record_and_its_events(
    jobs: FineTuning, tmp_path: Path, first: Callable[[FineTuning, str], Any]
) -> None:
    model = jobs.wait(queued(jobs, hyperparameters={"n_epochs": 1}), 60)["fine_tuned_model"]
    job = queued(jobs, model=model)
    place = tmp_path / "jobs" / "jobs" / job
    wait_until(lambda: len(steps_of(jobs, job)) > 20)
    assert names_in(place) >= {"run", "start", "train.jsonl"}
    first(jobs, job)
    if jobs.wait(job, 60)["status"] == "paused":
        assert names_in(place) >= {"run", "start", "train.jsonl"}
        jobs.cancel(job)
    assert names_in(place) == {"job.json", "events.jsonl"}


def test_an_adapter_checkpoint_that_no_record_names_is_removed_when_its_job_succeeds(
    idle: FineTuning, tmp_path: Path
) -> None:
    job = queued(idle, hyperparameters={"n_epochs": 1})
    place = tmp_path / "jobs" / "jobs" / job
    (place / "checkpoints" / "step-3").mkdir(parents=True)
    with idle:
        assert idle.wait(job, 60)["status"] == "succeeded"
    assert names_in(place) - {"checkpoints"} == {"job.json", "events.jsonl", "run"}
    assert not list(place.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_paused_job_continues_to_the_same_bits(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        whole, job = queued(jobs), queued(jobs)
        jobs.wait(whole, 60)
        wait_until(lambda: len(steps_of(jobs, job)) > 10)
        assert jobs.pause(job)["status"] == "paused"
        assert jobs.wait(job, 60)["status"] == "paused"
        count = len(steps_of(jobs, job))
        time.sleep(0.05)
        assert len(steps_of(jobs, job)) == count < STEPS
        assert jobs.resume(job)["status"] == "queued"
        assert jobs.wait(job, 60)["status"] == "succeeded"
        assert steps_of(jobs, job) == list(range(1, STEPS + 1))
    adapters = [adapter_of(tmp_path / "jobs" / "jobs" / one / "run") for one in (whole, job)]
    assert adapters[0] == adapters[1]


def test_a_deleted_file_does_not_disturb_a_job(idle: FineTuning) -> None:
    job = queued(idle, hyperparameters={"n_epochs": 1})
    [file] = idle.files()["data"]
    idle.delete_file(file["id"])
    with pytest.raises(RequestError) as refused:
        idle.file_content(file["id"])
    assert refused.value.status == 404
    with idle:
        assert idle.wait(job, 60)["status"] == "succeeded"


def test_what_a_killed_upload_left_is_removed_and_damaged_records_are_ignored(
    lm: nplora.LanguageModel, tmp_path: Path
) -> None:
    place = tmp_path / "jobs"
    idle = FineTuning(lm, place, model="small")
    job = queued(idle)
    idle.close()
    one, two = 24 * "1", 24 * "2"
    others = ("files/mine/content.jsonl", "jobs/ftjob-x/train.jsonl")
    for orphan in (f"files/file-{one}/content.jsonl", f"jobs/ftjob-{one}/train.jsonl", *others):
        (place / orphan).parent.mkdir()
        (place / orphan).write_text("{}")
    damaged = ((f"files/file-{two}/file.json", "{"), (f"jobs/ftjob-{two}/job.json", '{"id": "ftjob-9"}'))
    for name, content in damaged:
        (place / name).parent.mkdir()
        (place / name).write_text(content)
    events = place / "jobs" / job / "events.jsonl"
    whole = events.read_bytes()
    events.write_bytes(whole + b'{"id": "cut sh')
    with pytest.warns(UserWarning, match="the record is ignored"):
        idle = FineTuning(lm, place, model="small")
    assert [one["id"] for one in idle.jobs()["data"]] == [job]
    assert len(idle.files()["data"]) == 1
    assert len(idle.events(job)["data"]) == len(whole.splitlines())
    assert events.read_bytes() == whole
    assert not list(place.glob(f"*/*{one}"))
    assert all((place / other).exists() for other in others), "a directory of somebody else was removed"
    idle.close()


WRONG = {
    "serial": "x", "checkpoints": None, "data": {"train": "../../x"}, "status": 5, "options": [],
    "fine_tuned_model": 7, "schema": 2, "filenames": {"train": None},
}  # fmt: skip


def test_wrong_fields_of_a_record_do_not_stop_the_server(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    place = tmp_path / "jobs"
    idle = FineTuning(lm, place, model="small")
    job = queued(idle)
    idle.close()
    path = place / "jobs" / job / "job.json"
    whole = json.loads(path.read_text())
    [file] = place.glob("files/*/file.json")
    damaged = [{**whole, name: value} for name, value in WRONG.items()]
    damaged += [{other: whole[other] for other in whole if other != name} for name in whole]
    damaged.append({**whole, "checkpoints": [{"name": "a", "step": 1}]})
    for record in damaged:
        path.write_text(json.dumps(record))
        with pytest.warns(UserWarning, match="the record is ignored"):
            made = FineTuning(lm, place, model="small")
        assert made.jobs()["data"] == []
        assert len(made.files()["data"]) == 1
        made.close()
    path.write_text(json.dumps(whole))
    file.write_text(json.dumps({**json.loads(file.read_text()), "content": "../../x"}))
    with pytest.warns(UserWarning, match="the field content is missing or wrong"):
        made = FineTuning(lm, place, model="small")
    assert made.files()["data"] == []
    assert [one["id"] for one in made.jobs()["data"]] == [job]
    made.close()


def test_a_server_that_cannot_read_its_records_unlocks_the_directory(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def failing(*arguments: object) -> None:
            raise PermissionError("no")

        patch.setattr(storage, "_read", failing)
        with pytest.raises(PermissionError):
            FineTuning(lm, tmp_path / "jobs", model="small")
    FineTuning(lm, tmp_path / "jobs", model="small").close()


def test_a_deleted_model_does_not_come_back(lm: nplora.LanguageModel, tmp_path: Path) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        first, second = (
            jobs.wait(queued(jobs, hyperparameters={"n_epochs": 1}), 60)["fine_tuned_model"] for _ in range(2)
        )
        lm.delete_adapter(first)
        assert jobs.delete_model(first)
        assert not jobs.delete_model(first)
        assert not jobs.delete_model("small")
        assert len(list((tmp_path / "jobs").glob("jobs/*/run"))) == 1
    lm.delete_adapter(second)
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        assert list(lm.adapters) == [second]
        assert [job["status"] for job in jobs.jobs()["data"]] == ["succeeded"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["a new checkpoint", "too little memory"])
def test_a_checkpoint_that_is_deleted_while_its_record_changes_does_not_come_back(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(job_run, "CHECKPOINT_SECONDS", 0)
    change, deleting = JobsState.change, list[threading.Thread]()

    def publish(name: str, directory: Path) -> None:
        if reason == "too little memory" and len(names()) == 2 and not deleting:
            raise RequestError("there is no memory", 507, code="insufficient_memory")
        lm.load_adapter(directory, name)

    def changed(self: JobsState, job_id: str, **changes: Any) -> bool:
        if "checkpoints" in changes and len(names()) == 2 and not deleting:
            deleted.append(names()[0])
            thread = threading.Thread(target=jobs.delete_model, args=deleted)
            thread.start()
            deleting.append(thread)
            thread.join(0.3)
        return change(self, job_id, **changes)

    def names() -> list[str]:
        return [one["fine_tuned_model_checkpoint"] for one in jobs.checkpoints(job)["data"]]

    monkeypatch.setattr(JobsState, "change", changed)
    deleted = list[str]()
    with FineTuning(lm, tmp_path / "jobs", model="small", publish=publish) as jobs:
        job = queued(jobs, hyperparameters={"n_epochs": 500})
        wait_until(lambda: deleting)
        deleting[0].join()
        assert deleted[0] not in names()
        jobs.cancel(job)


def test_only_one_server_uses_a_directory(idle: FineTuning, lm: nplora.LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="another server"):
        FineTuning(lm, tmp_path / "jobs", model="small")
    idle.close()


def test_many_threads_upload_and_list_at_once(idle: FineTuning) -> None:
    errors = list[BaseException]()

    def upload(number: int) -> None:
        try:
            for n in range(5):
                made = idle.create_file(f"{number} {n}".encode(), f"{number}.jsonl")
                assert idle.file_content(made["id"]).read_text() == f"{number} {n}"
                idle.files(limit=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({file["id"] for file in idle.files()["data"]}) == 40
    idle.close()


def test_records_are_plain_json(idle: FineTuning, tmp_path: Path) -> None:
    job = queued(idle, metadata={"name": "Zoë\u2028"})
    record = json.loads((tmp_path / "jobs" / "jobs" / job / "job.json").read_text(encoding="utf-8"))
    assert record["metadata"] == {"name": "Zoë\u2028"}
    idle.close()
