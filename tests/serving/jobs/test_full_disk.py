"""Jobs on a disk that is full for a while."""

import contextlib
import errno
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import nplora
from nplora.formats import files
from nplora.serving.jobs import FineTuning, job_run
from nplora.serving.jobs.jobs_state import JobsState
from nplora.serving.request_error import RequestError

from .conftest import ROWS, adapter_of, jsonl, queued, steps_of, wait_until


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every write fails as on a full disk."""

    def write(fd: int, chunk: files.Chunk, progress: files.Progress) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        yield


@contextlib.contextmanager
def full_for_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the records of jobs cannot be written."""
    replace = files.replace

    def refusing(new: Sequence[files.NewFile], *arguments: Any) -> None:
        if any(Path(one.path).name == "job.json" for one in new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), new[0].path)
        replace(new, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", refusing)
        yield


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_a_full_disk_fails_a_job_which_continues_later_to_the_same_bits(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        whole, job = queued(jobs), queued(jobs)
        jobs.wait(whole, 60)
        wait_until(lambda: len(steps_of(jobs, job)) > 120)
        with full_disk(monkeypatch):
            found = jobs.wait(job, 60)
            with pytest.raises(RequestError) as refused:
                jobs.create_file(jsonl(ROWS), "train.jsonl")
            assert (refused.value.status, refused.value.code) == (507, "disk_full")
            assert str(tmp_path) not in str(refused.value)
            with pytest.raises(RequestError, match="disk is full"):
                jobs.create_job({"model": "small", "training_file": jobs.files()["data"][0]["id"]})
            assert len(jobs.jobs()["data"]) == 2
        assert found["status"] == "failed"
        assert found["error"]["code"] == "disk_full"
        assert len(jobs.files(purpose="fine-tune")["data"]) == 2
        jobs.resume(job)
        found = jobs.wait(job, 60)
        assert found["status"] == "succeeded", found["error"]
    adapters = [adapter_of(tmp_path / "jobs" / "jobs" / one / "run") for one in (whole, job)]
    assert adapters[0] == adapters[1]
    assert not list((tmp_path / "jobs").rglob("*.tmp"))


def test_a_change_that_the_disk_refuses_is_kept_in_memory(
    idle: FineTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queued(idle)
    words = rf"^{job}: .*\bjob\.json: No space left on device: .*; a change to the job was not written to "
    words += "the disk$"
    with full_disk(monkeypatch), pytest.warns(UserWarning, match=words):
        idle._state.change(job, status="paused")
    assert idle.job(job)["status"] == "paused"
    idle.close()


def refused(change: Callable[[str], Any], job: str) -> None:
    """The change is refused because the disk is full."""
    with pytest.raises(RequestError) as error:
        change(job)
    assert (error.value.status, error.value.code) == (507, "disk_full")


def test_a_job_that_a_full_disk_does_not_resume_can_be_resumed_later(
    jobs: FineTuning, lm: nplora.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jobs.create_file(b'{"bad": 1}\n', "train.jsonl")
    job = jobs.wait(jobs.create_job({"model": "small", "training_file": file["id"]})["id"], 60)
    with full_disk(monkeypatch):
        refused(jobs.resume, job["id"])
        assert jobs.job(job["id"]) == job
    assert jobs.resume(job["id"])["status"] == "queued"
    assert jobs.wait(job["id"], 60)["status"] == "failed", "nobody wakes the training thread"


@pytest.mark.parametrize("change", [FineTuning.cancel, FineTuning.pause], ids=["cancel", "pause"])
def test_a_change_that_a_full_disk_refuses_does_not_stop_the_job(
    jobs: FineTuning, change: Callable[[FineTuning, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, next_job = (queued(jobs, hyperparameters={"n_epochs": epochs}) for epochs in (15, 500))
    wait_until(lambda: steps_of(jobs, job))
    with full_for_records(monkeypatch):
        for one, status in ((job, "running"), (next_job, "queued")):
            refused(functools.partial(change, jobs), one)
            assert jobs.job(one)["status"] == status
    assert change(jobs, next_job)["status"] in ("cancelled", "paused")
    assert jobs.wait(job, 60)["status"] == "succeeded"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_job_whose_end_cannot_be_recorded_ends_again_after_a_restart(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "CHECKPOINT_SECONDS", 0)
    add_results = JobsState.add_results
    with contextlib.ExitStack() as end, FineTuning(lm, tmp_path / "jobs", model="small") as jobs:

        def results(self: JobsState, job_id: str, content: bytes) -> list[str]:
            end.enter_context(full_for_records(monkeypatch))
            return add_results(self, job_id, content)

        end.enter_context(monkeypatch.context()).setattr(JobsState, "add_results", results)
        job = queued(jobs, hyperparameters={"n_epochs": 3})
        before = jobs.wait(job, 60)
        assert before["status"] == "succeeded"
        assert list(lm.adapters) == [before["fine_tuned_model"]]
    place = tmp_path / "jobs" / "jobs" / job
    assert json.loads((place / "job.json").read_text())["status"] == "running"
    adapter = adapter_of(place / "run")
    lm.delete_adapter(before["fine_tuned_model"])
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        after = jobs.wait(job, 60)
        assert after["status"] == "succeeded", after["error"]
        assert list(lm.adapters) == [after["fine_tuned_model"]] == [before["fine_tuned_model"]]
    assert adapter_of(place / "run") == adapter
    lm.set_adapter(after["fine_tuned_model"])
    assert lm.generate("1+1=", max_new_tokens=2)
    assert not list(place.glob("train*"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapter_checkpoints_are_kept_as_long_as_the_record_on_the_disk_names_them(
    lm: nplora.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "CHECKPOINT_SECONDS", 0)
    with FineTuning(lm, tmp_path / "jobs", model="small") as jobs:
        job = queued(jobs, hyperparameters={"n_epochs": 500})
        wait_until(lambda: len(jobs.checkpoints(job)["data"]) == job_run.KEPT_CHECKPOINTS)
        with full_for_records(monkeypatch):
            count = len(steps_of(jobs, job))
            wait_until(lambda: len(steps_of(jobs, job)) > count + 30)
            place = tmp_path / "jobs" / "jobs" / job
            named = json.loads((place / "job.json").read_text())["checkpoints"]
            assert len(named) == job_run.KEPT_CHECKPOINTS
            assert all(adapter_of(place / "checkpoints" / f"step-{one['step']}") for one in named)
        jobs.cancel(job)


def test_deleting_an_adapter_frees_a_full_disk(
    jobs: FineTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.wait(queued(jobs, hyperparameters={"n_epochs": 1}), 60)
    place = tmp_path / "jobs" / "jobs" / job["id"] / "run"
    assert adapter_of(place)
    with full_for_records(monkeypatch):
        refused(jobs.delete_model, job["fine_tuned_model"])
        assert not place.exists()
    assert jobs.delete_model(job["fine_tuned_model"])
    assert not jobs.delete_model(job["fine_tuned_model"])
