"""Files and fine-tuning jobs, as OpenAI's own Python client uses them."""

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import live_server
import pytest

import nplora
from nplora.finetuning.planning import current_memory
from nplora.serving import run
from nplora.serving.api import tuning_routes
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models
from nplora.serving.api.service import TextService
from nplora.serving.jobs import FineTuning
from nplora.serving.jobs.storage import Storage
from nplora.serving.options import ServeOptions
from nplora.serving.request_error import RequestError

openai = pytest.importorskip("openai")

# Starlette leaves the temporary file of an upload that is too large to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROWS = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"{n}"}]}
    for n in range(9)
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("jobs")
    lm = nplora.load_model(live_server.save_model(directory))
    models = Models(lm, "base")
    options = ServeOptions(jobs=str(directory / "jobs"), memory="8G")
    with run.running(lm, models, options) as (engine, jobs):
        assert jobs is not None
        jobs.start()
        app = Application(TextService(engine, models, jobs, max_file=100_000))
        with (
            live_server.running(app) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as made,
        ):
            yield made


@pytest.fixture(scope="module")
def file(client: Any) -> Any:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune")


def wait(client: Any, job: Any) -> Any:
    end = time.monotonic() + 30
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < end
        time.sleep(0.05)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def test_files_are_stored_listed_and_deleted(client: Any, file: Any) -> None:
    other = client.files.create(file=("../../etc/passwd", b'{"text": "x"}\n'), purpose="fine-tune")
    assert other.filename == "passwd"
    assert {one.id for one in client.files.list()} >= {file.id, other.id}
    assert next(iter(client.files.list(order="asc", limit=1))).id == file.id
    assert client.files.content(other.id).read() == b'{"text": "x"}\n'
    assert client.files.retrieve(other.id) == other
    assert client.files.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(other.id)


def test_a_file_that_is_deleted_while_it_is_read_is_missing(tmp_path: Path) -> None:
    service: Any = SimpleNamespace(jobs=SimpleNamespace(file_content=lambda id_: tmp_path / id_))
    with pytest.raises(RequestError, match="the content of the file 'file-1' is missing") as caught:
        tuning_routes.open_content(service, "file-1")
    assert caught.value.status == 404


def test_a_part_of_a_file_is_answered_with_the_whole_file(client: Any, file: Any) -> None:
    whole = client.files.content(file.id).read()
    for part in ("bytes=0-1", "bytes=x", "bytes=999999-"):
        assert client.files.content(file.id, extra_headers={"range": part}).read() == whole


def test_a_job_makes_an_adapter_that_answers(client: Any, file: Any) -> None:
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        suffix="mine",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 3}}},
    )
    job = wait(client, job)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert any(event.type == "metrics" for event in events)
    assert next(iter(client.fine_tuning.jobs.list(limit=1))).id == job.id
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=messages, max_tokens=4, temperature=0
    )
    assert answer.model == job.fine_tuned_model
    checkpoints = client.fine_tuning.jobs.checkpoints
    assert [one.fine_tuned_model_checkpoint for one in checkpoints.list(job.id)] == [job.fine_tuned_model]
    assert client.models.delete(job.fine_tuned_model).deleted
    assert list(checkpoints.list(job.id)) == []
    assert client.fine_tuning.jobs.retrieve(job.id) == job


@pytest.fixture
def trained(client: Any, file: Any) -> Any:
    """A job that has succeeded."""
    job = client.fine_tuning.jobs.create(model="base", training_file=file.id, hyperparameters={"n_epochs": 1})
    return wait(client, job)


def deleted_for_ever(client: Any, job: Any) -> bool:
    """Delete the adapter of a job. Return whether its job no longer names it."""
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.delete(job.fine_tuned_model)
    return not list(client.fine_tuning.jobs.checkpoints.list(job.id))


def test_an_unloaded_adapter_of_a_job_can_be_deleted(client: Any, trained: Any) -> None:
    client.post("/unload_lora_adapter", body={"lora_name": trained.fine_tuned_model}, cast_to=object)
    assert trained.fine_tuned_model not in [model.id for model in client.models.list()]
    assert deleted_for_ever(client, trained)


def test_an_adapter_that_a_full_disk_does_not_delete_can_be_deleted_later(
    client: Any, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **changes: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "change_job", full)
        with pytest.raises(openai.APIStatusError) as caught:
            client.models.delete(trained.fine_tuned_model)
    assert (caught.value.status_code, caught.value.code) == (507, "disk_full")
    assert deleted_for_ever(client, trained)


def test_the_adapters_of_earlier_jobs_are_there_when_the_engine_divides_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = live_server.save_model(tmp_path)
    with FineTuning(nplora.load_model(path), tmp_path / "jobs", model="base") as jobs:
        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        file = jobs.create_file(content, "rows.jsonl")
        request = {"model": "base", "training_file": file["id"], "hyperparameters": {"n_epochs": 1}}
        name = jobs.wait(jobs.create_job(request)["id"], 60)["fine_tuned_model"]
    lm, seen = nplora.load_model(path), list[list[str]]()
    engine = run.Engine

    def planned(lm: nplora.LanguageModel, **options: Any) -> Any:
        seen.append(list(lm.adapters))
        return engine(lm, **options)

    monkeypatch.setattr(run, "Engine", planned)
    options = ServeOptions(jobs=str(tmp_path / "jobs"), memory="8G")
    with run.running(lm, Models(lm, "base"), options):
        assert seen == [[name]]


def test_training_does_not_get_the_memory_that_the_engine_will_still_take() -> None:
    for later, limit in ((100e6, 900e6), (-100e6, 1e9)):
        engine: Any = SimpleNamespace(plan=SimpleNamespace(total=current_memory() + int(later)))
        assert run.training_memory(ServeOptions(memory="1G"), engine) == pytest.approx(limit, abs=30e6)


def test_a_job_is_cancelled(client: Any, file: Any) -> None:
    job = client.fine_tuning.jobs.create(
        model="base", training_file=file.id, hyperparameters={"n_epochs": 50, "batch_size": 1}
    )
    client.fine_tuning.jobs.cancel(job.id)
    assert wait(client, job).status == "cancelled"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.files.retrieve("..%2f..%2fetc"), openai.NotFoundError),
        (lambda c: c.files.content("../jobs"), openai.NotFoundError),
        (
            lambda c: c.files.create(file=("x.jsonl", b"x" * 2_000_000), purpose="fine-tune"),
            openai.APIStatusError,
        ),
        (lambda c: c.files.create(file=("x.jsonl", b"x"), purpose="nonsense"), openai.BadRequestError),
        (lambda c: c.fine_tuning.jobs.retrieve("ftjob-nothing"), openai.NotFoundError),
        (
            lambda c: c.fine_tuning.jobs.create(model="base", training_file="file-nothing"),
            openai.APIStatusError,
        ),
        (
            lambda c: c.fine_tuning.jobs.create(model="other", training_file="file-nothing"),
            openai.APIStatusError,
        ),
        (lambda c: c.fine_tuning.jobs.list(limit=-1), openai.BadRequestError),
        (lambda c: c.post("/files", body={"file": "x"}, cast_to=object), openai.APIStatusError),
        (lambda c: c.post("/fine_tuning/jobs", body=[1], cast_to=object), openai.BadRequestError),
    ],
)
def test_wrong_requests_get_an_error_object(client: Any, call: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        call(client)
    assert 400 <= caught.value.status_code < 500
    assert caught.value.body["message"]


def test_a_full_disk_refuses_an_upload_and_the_server_keeps_running(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be full before the file reaches the jobs: a large upload has a temporary file first."""

    async def write(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/upload")

    with monkeypatch.context() as patch:
        patch.setattr("starlette.datastructures.UploadFile.write", write)
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("rows.jsonl", b"x" * 5000), purpose="fine-tune")
    assert (caught.value.status_code, caught.value.code) == (507, "disk_full")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "/tmp" not in str(caught.value)
    client.files.delete(client.files.create(file=("rows.jsonl", b"x" * 5000), purpose="fine-tune").id)


def test_forms_that_cannot_be_read_are_refused(client: Any, tmp_path: Path) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    raw = client.with_options(default_headers=kind)._client
    for content, headers in [
        (b"nonsense", kind),
        (b"--x\r\n\r\n", kind),
        (b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--x--\r\n', kind),
        (b"", {"content-type": "multipart/form-data"}),
        (b'--x\r\ncontent-disposition: form-data; name="file"; filename="\xff"\r\n\r\nx', kind),
        (b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nx\r\n' * 50 + b"--x--\r\n", kind),
    ]:
        answer = raw.post(f"{client.base_url}files", content=content, headers=headers)
        assert 400 <= answer.status_code < 500, content
        assert answer.json()["error"]["message"]
