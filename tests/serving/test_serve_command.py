"""`nplora serve` as a process: curl, litellm, signals, and the errors of its arguments."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server
import numpy as np
import pytest

import nplora
import systems
from commands import command
from nplora import cli
from nplora.serving.api import http_server
from nplora.serving.jobs import FineTuning
from small_encoder import save_small_encoder

pytest.importorskip("uvicorn")

ROWS = b'{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "1"}]}\n' * 4
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}


@contextlib.contextmanager
def process(*arguments: object, **more: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server, and its address."""
    line = [sys.executable, "-m", "nplora", "serve", *map(str, arguments), "--port", "0"]
    made = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    try:
        assert made.stdout is not None
        first = made.stdout.readline()
        assert first.startswith("serving "), made.communicate()[1]
        yield made, first.split()[-1]
    finally:
        made.kill()
        made.communicate()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    directory = tmp_path_factory.mktemp("served")
    model = live_server.save_model(directory)
    return model, live_server.save_adapters(model, directory)


def curl(url: str, *more: str) -> str:
    return subprocess.run(["curl", "-sS", *more, url], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def served(files: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that ends without an error after the tests."""
    model, adapters = files
    arguments = model, "--adapter", f"mine={adapters[0]}", "--adapter", adapters[1], "--memory", "1G"
    arguments += "--jobs", tmp_path_factory.mktemp("jobs")
    with process(*arguments, env={**os.environ, "NPLORA_API_KEY": "secret"}) as (server, url):
        yield url
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None
        lines = server.stdout.read()
        _, errors = server.communicate(timeout=20)
        assert server.returncode == 0
        assert errors == ""
        for text in ("models: small, mine, adapter1", "context: 512 tokens", "(the limit is 1G)",
                     "MB  keys and values of", "stopping; a second signal ends the server at once",
                     "MB  adapters of jobs"):  # fmt: skip
            assert text in lines


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_server_answers_curl_and_ends_with_sigterm(served: str) -> None:
    key = "-H", "authorization: Bearer secret"
    names = [one["id"] for one in json.loads(curl(f"{served}/v1/models", *key))["data"]]
    assert names == ["small", "mine", "adapter1"]
    answer = json.loads(curl(f"{served}/v1/chat/completions", *key, "-d", json.dumps(CHAT)))
    assert answer["choices"][0]["message"]["content"]
    assert "data: [DONE]" in curl(
        f"{served}/v1/completions", *key, "-N", "-d", json.dumps({"prompt": "a", "stream": True})
    )
    assert json.loads(curl(f"{served}/v1/models"))["error"]["code"] == "invalid_api_key"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_reads_log_probabilities_uploads_rows_and_trains_an_adapter(served: str, tmp_path: Path) -> None:
    def ask(route: str, *more: str, **body: Any) -> Any:
        content = ["-d", json.dumps(body)] if body else []
        return json.loads(curl(f"{served}/v1/{route}", "-H", "authorization: Bearer secret", *more, *content))

    tokens = ask("chat/completions", **CHAT, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"][
        "content"
    ]
    assert len(tokens) == CHAT["max_tokens"]
    for token in tokens:  # with temperature 0, the most likely token is chosen
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    file = ask("files", "-F", "purpose=fine-tune", "-F", f"file=@{tmp_path / 'rows.jsonl'}")
    assert ask("files")["data"] == [file]
    assert (
        curl(f"{served}/v1/files/{file['id']}/content", "-H", "authorization: Bearer secret").encode() == ROWS
    )
    job = ask("fine_tuning/jobs", model="small", training_file=file["id"], hyperparameters={"n_epochs": 1})
    end = time.monotonic() + 60
    while job["status"] not in ("succeeded", "failed"):
        assert time.monotonic() < end
        time.sleep(0.05)
        job = ask(f"fine_tuning/jobs/{job['id']}")
    assert job["status"] == "succeeded", job["error"]
    assert ask("chat/completions", **CHAT, model=job["fine_tuned_model"])["model"] == job["fine_tuned_model"]
    assert any(event["type"] == "metrics" for event in ask(f"fine_tuning/jobs/{job['id']}/events")["data"])
    assert ask(f"models/{job['fine_tuned_model']}", "-X", "DELETE")["deleted"]
    assert ask(f"files/{file['id']}", "-X", "DELETE")["deleted"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="needs litellm")
def test_a_server_answers_litellm(served: str) -> None:
    ask_litellm(served)


def ask_litellm(url: str) -> None:
    program = f"""if True:
        import litellm, time
        options = dict(base_url={url + "/v1"!r}, api_key="secret", temperature=0, max_tokens=5)
        chat = [{{"role": "user", "content": "hello"}}]
        whole = litellm.completion("openai/mine", chat, **options)
        pieces = litellm.completion("openai/mine", chat, stream=True, **options)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == whole.choices[0].message.content, (text, whole)
        assert whole.usage.completion_tokens == 5
        other = litellm.text_completion(prompt="hello", model="text-completion-openai/small", **options)
        assert other.choices[0].text
        scored = litellm.completion("openai/mine", chat, logprobs=True, top_logprobs=2, **options)
        tokens = scored.choices[0].logprobs.content
        assert len(tokens) == 5 and all(len(token.top_logprobs) == 2 for token in tokens), tokens
        there = dict(custom_llm_provider="openai", api_base={url + "/v1"!r}, api_key="secret")
        file = litellm.create_file(file=("rows.jsonl", {ROWS!r}), purpose="fine-tune", **there)
        assert litellm.file_content(file.id, **there).content == {ROWS!r}
        job = litellm.create_fine_tuning_job(model="small", training_file=file.id, **there)
        for _ in range(600):
            if job.status in ("succeeded", "failed"):
                break
            time.sleep(0.1)
            job = litellm.retrieve_fine_tuning_job(job.id, **there)
        assert job.status == "succeeded", job
        assert job.id in [one.id for one in litellm.list_fine_tuning_jobs(**there)]
        tuned = litellm.completion("openai/" + job.fine_tuned_model, chat, **options)
        assert tuned.usage.completion_tokens
        assert litellm.file_delete(file.id, **there).deleted
        try:
            litellm.completion("openai/nothing", chat, **options)
        except litellm.NotFoundError:
            print("done")
    """
    alone = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it would load a list from the network
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=alone)
    assert made.stdout.endswith("done\n"), made.stderr


@pytest.mark.slow
def test_the_address_comes_before_the_events_of_an_open_job(
    files: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    jobs = FineTuning(nplora.load_model(files[0]), tmp_path / "jobs", model="small")
    file = jobs.create_file(ROWS, "rows.jsonl")
    job = jobs.create_job({"model": "small", "training_file": file["id"]})
    jobs._state.change(job["id"], status="running")
    jobs.close()
    with process(files[0], "--memory", "1G", "--jobs", tmp_path / "jobs") as (server, _):
        assert server.stdout is not None
        event = f"{job['id']}: The server was restarted\n"
        assert next(line for line in server.stdout if line.startswith("ftjob")) == event


@pytest.mark.slow
@systems.needs_signals
def test_ctrl_c_says_what_the_server_waits_for_and_a_second_one_ends_it(
    files: tuple[Path, list[Path]],
) -> None:
    with process(files[0], "--memory", "1G") as (server, url):
        address = "127.0.0.1", int(url.rpartition(":")[2])
        body = json.dumps({"prompt": "a", "max_tokens": 500, "n": 16, "stream": True, "temperature": 0})
        with socket.create_connection(address, timeout=20) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
            assert b"200 OK" in client.recv(1000)
            server.send_signal(signal.SIGINT)
            assert server.stdout is not None
            line = next(line for line in server.stdout if line.startswith("stopping"))
            assert (
                line
                == "stopping: waiting at most 30 s for 16 answers; Ctrl-C again ends the server at once\n"
            )
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=20)
        assert server.returncode == 0
        assert errors == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_an_encoder_is_served_with_embeddings(tmp_path: Path) -> None:
    model = save_small_encoder(tmp_path / "small")
    classifier = nplora.new_classifier(nplora.load_encoder(model), ["a", "b"])
    classifier.add_lora(rank=2)
    nplora.save_adapter(classifier, tmp_path / "kinds")
    with process(model, "--adapter", tmp_path / "kinds", "--memory", "1G") as (server, url):
        answer = json.loads(curl(f"{url}/v1/embeddings", "-d", '{"input": ["a cat", "a dog"]}'))
        wanted = nplora.load_encoder(model).embed(["a cat", "a dog"])
        np.testing.assert_allclose([one["embedding"] for one in answer["data"]], wanted, atol=1e-6)
        answer = json.loads(curl(f"{url}/classify", "-d", '{"model": "kinds", "input": "a cat"}'))
        assert sum(answer["data"][0]["probs"]) == pytest.approx(1)
        assert "unsupported_task" in curl(f"{url}/v1/completions", "-d", '{"prompt": "a"}')
        assert "unknown_route" in curl(f"{url}/v1/files")
        error = json.loads(curl(f"{url}/v1/embedding", "-d", "{}"))["error"]
        assert error["message"] == "there is no route '/v1/embedding'; the nearest one is '/v1/embeddings'"
        error = json.loads(curl(f"{url}/v1/embeddings"))["error"]
        assert error["message"] == "the route '/v1/embeddings' does not support 'GET', only POST"
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None
        lines = server.stdout.read()
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert errors == ""
    for text in ("models: small, kinds", "embeddings of 32 values: Pooling(mean, normalize)",
                 "texts of at most 32 tokens", "(the limit is 1G)", "stopping"):  # fmt: skip
        assert text in lines


def test_an_encoder_has_neither_fine_tuning_jobs_nor_rounded_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small_encoder(tmp_path / "small")
    assert cli.main(["serve", str(model), "--port", "0", "--jobs", str(tmp_path / "jobs")]) == 2
    assert "fine-tuning jobs need a language model" in capsys.readouterr().err
    assert cli.main(["serve", str(model), "--port", "0", "--adapter-dtype", "bfloat16"]) == 2
    assert "adapter-dtype needs a language model that generates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--pooling", "best"], "pooling"),
        (["m", "--host", "0.0.0.0"], "other machines could use the server without a key"),
        (["m", "--port", "70000"], "port is 70000, expected at most 65535"),
        (["m", "--memory", "lots"], "expected a size like 600M"),
        (["m", "--memory", "0"], "memory is '0', expected a size like 600M"),
        (["m", "--max-body", "0"], "max-body is '0', expected a size like 600M"),
        (["m", "--max-file", "0"], "max-file is '0', expected a size like 600M"),
        (["m", "--max-files", "0"], "max-files is '0', expected a size like 600M"),
        (["m", "--adapter-dtype", "half"], "--adapter-dtype half is not available; possible: 'bfloat16'"),
        (["m", "--adapter-memory", "-1"], "adapter-memory is '-1', expected a size like 600M"),
        (["m", "--adapter", "a=x", "--adapter", "a=y"], "two adapters have the name 'a'"),
        (["m", "--api-key", "a b"], "--api-key has an empty or invalid value, expected ASCII"),
        (["m", "--train-share", "0"], "expected above 0 and at most 1"),
        (["m", "--timeout", "0"], "timeout is 0.0, expected above 0"),
        (["nowhere.gguf", "--port", "0"], "no such file"),
    ],
)
def test_wrong_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("NPLORA_API_KEY", raising=False)
    assert cli.main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "small=ADAPTER"], "'small' is the name of the base model"),
        (["--name", "a", "--adapter", "a=ADAPTER"], "'a' is the name of the base model"),
        (["--adapter-dir", "nowhere"], "adapter-dir is 'nowhere', expected an existing directory"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_at_the_start(
    files: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    model, adapters = files
    arguments = [word.replace("ADAPTER", str(adapters[0])) for word in more]
    assert cli.main(["serve", str(model), "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_the_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "nowhere.gguf", "--port", port]) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_port_is_taken_from_the_beginning() -> None:
    """Two servers that start at the same time: the second one must not load its model in vain."""
    with http_server.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            http_server.bind("127.0.0.1", port)


@pytest.mark.slow
def test_help_names_the_options() -> None:
    text = command("serve", "--help").stdout
    for option in ("--adapter", "--jobs", "--api-key", "--adapter-dir", "--allow-origin", "--train-share"):
        assert option in text
