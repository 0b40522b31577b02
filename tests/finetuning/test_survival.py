"""A run that is killed, uses other numbers of threads, or finds the disk full; and wrong files."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import small_models
import systems
from nplora import cli
from nplora.adapters import save_adapter
from nplora.finetuning import finetune
from small_llama import save_small_llama

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")

OPTIONS = ["--rank", "2", "--lr", "0.01", "--batch-examples", "4", "--epochs", "16", "--dropout", "0.1"]
OPTIONS += ["--layers", "last:1", "--keep-prefix", "disk", "--save-every", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = ({"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def line(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    paths = [str(model), "--data", str(data), "--output", str(output)]
    return [sys.executable, "-m", "nplora", "finetune", *paths, *OPTIONS, *more]


def run(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(*arguments), capture_output=True, text=True, timeout=120, **more)


def changed_at(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() and file.stat().st_size else 0


def adapter_of(output: Path) -> tuple[bytes, bytes]:
    names = "adapter_model.safetensors", "adapter_config.json"
    return (output / names[0]).read_bytes(), (output / names[1]).read_bytes()


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The adapter of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    done = run(model, data, output)
    assert done.returncode == 0, done.stderr
    return adapter_of(output)


def test_a_run_that_is_killed_many_times_ends_with_the_same_adapter(
    model: Path, data: Path, tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    """Each of two runs is killed three times, after it has written to its log. Then it is resumed to its end.

    tests/attack kills at 120 random moments.
    """
    moments, steps = random.Random(0), list[int]()
    for number in range(6):
        output = tmp_path / f"out{number // 3}"  # three times each
        log = output / "log.jsonl"
        before = changed_at(log)
        process = subprocess.Popen(
            line(model, data, output, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and changed_at(log) == before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        if process.wait() == systems.KILLED:
            steps.append(log.read_text().count('"step":'))
    assert len(set(steps)) > 2, f"the runs were not killed in their midst: {steps}"
    for number in range(2):
        output = tmp_path / f"out{number}"
        done = run(model, data, output, "--resume")
        assert done.returncode == 0, done.stderr
        assert adapter_of(output) == whole
        if not systems.IS_WINDOWS:  # nplora cannot know whether another program writes such a file there
            assert not [file.name for file in output.iterdir() if file.name.endswith(".tmp")]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_seed_gives_the_same_bytes_on_any_number_of_threads(
    model: Path, data: Path, tmp_path: Path, whole: tuple[bytes, bytes], threads: int
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = run(model, data, tmp_path / "out", env=environment)
    assert done.returncode == 0, done.stderr
    assert adapter_of(tmp_path / "out") == whole


def test_a_disk_that_fills_up_ends_the_run_which_resumes_later(
    model: Path, data: Path, tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    """A limit on the size of files stands for a full disk: checkpoints fit, the longer log does not."""
    import resource

    limit = 2500

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    output = tmp_path / "out"
    started = run(model, data, output, "--keep-prefix", "off", preexec_fn=starve)
    assert started.returncode == 2
    [error] = [text for text in started.stderr.splitlines() if text.startswith("nplora: error: ")]
    assert "File too large: " in error
    assert str(output) in error
    assert not (output / "adapter_model.safetensors").exists()
    assert not (output / "adapter_config.json").exists()
    done = run(model, data, output, "--resume")
    assert done.returncode == 0, done.stderr
    assert adapter_of(output) == whole


@pytest.mark.parametrize("disturbance", ["killed", "full disk"])
def test_a_run_on_pairs_that_is_disturbed_ends_with_the_same_adapter(
    model: Path, tmp_path: Path, disturbance: str
) -> None:
    """The run is killed in the reference or in the steps, or its log reaches a limit on the size of files."""
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    pairs = ({"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no"} for n in range(24))
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = "--objective", "dpo"
    assert run(model, data, tmp_path / "whole", *more).returncode == 0
    if disturbance == "full disk":
        import resource

        def starve() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

        started = run(model, data, output, "--keep-prefix", "off", *more, preexec_fn=starve)
        assert (started.returncode, "File too large: " in started.stderr) == (2, True)
    for file in ("reference.safetensors", "log.jsonl") if disturbance == "killed" else ():
        before = changed_at(output / file)
        process = subprocess.Popen(line(model, data, output, *more, "--resume"), stderr=subprocess.DEVNULL)
        while process.poll() is None and changed_at(output / file) == before:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == systems.KILLED
    done = run(model, data, output, *more, "--resume")
    assert done.returncode == 0, done.stderr
    assert adapter_of(output) == adapter_of(tmp_path / "whole")


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_reader_that_goes_away_does_not_end_training(
    model: Path, data: Path, tmp_path: Path, whole: tuple[bytes, bytes], stream: str
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    done = subprocess.run(line(model, data, tmp_path / "out"), **streams, timeout=120)  # type: ignore[call-overload]
    os.close(writing)
    assert adapter_of(tmp_path / "out") == whole
    if stream == "stderr":
        assert (done.returncode, b"holds the adapter" in done.stdout) == (0, True)
    else:
        assert done.returncode == 1
        assert b"error" not in done.stderr.lower()


# ---- wrong files ----

ROW = '{"prompt": "1+1=", "completion": "2"}\n'
LONG_ROW = json.dumps({"prompt": "1", "completion": "x" * 90}) + "\n"


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {"changes": {"general.architecture": "gpt9"}},
            r"general.architecture is 'gpt9', expected one of ",
        ),
        ({"without": "blk.1.ffn_up.weight"}, r"'blk\.1\.ffn_up\.weight' is missing"),
        ({"changes": {"tokenizer.ggml.pre": "zigzag"}}, r"tokenizer.*zigzag"),
    ],
    ids=["architecture", "tensor", "tokenizer"],
)
def test_an_unknown_or_incomplete_model_is_one_line_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: dict[str, Any], message: str
) -> None:
    model = save_small_llama(tmp_path / "model.gguf", **kept)
    assert cli.main(line(model, data, tmp_path / "out")[3:]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"nplora: error: .*model\.gguf.*{message}.*\n", printed.err)
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW.encode() + b'{"prompt": "\xff", "completion": "2"}\n', "line 2: .*UTF-8"),
        (b'{"prompt": "1", "completion": " "}\n', "line 1: completion is empty"),
        (ROW.encode() + LONG_ROW.encode(), "line 2: 92 tokens, expected at most 64"),
    ],
    ids=["bytes", "empty", "long"],
)
def test_wrong_data_are_an_error_that_names_the_line_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    assert cli.main([*line(model, tmp_path, tmp_path / "out")[3:], "--strict"]) == 2
    assert re.fullmatch(rf"nplora: error: .*train\.jsonl, {message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_without_strict_an_example_longer_than_the_context_is_cut_and_counted(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text(ROW + LONG_ROW)
    report = finetune(model, tmp_path, tmp_path / "out", steps=1)
    assert (report.train.truncated, report.train.longest) == (1, 64)
    assert "1 cut to the maximum length" in str(report.train)


def test_an_adapter_of_another_model_is_refused_with_names_and_shapes(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_models.load(tmp_path)  # three blocks, and fewer heads of k and v
    other.add_lora(rank=2)
    save_adapter(other, tmp_path / "adapter")
    assert cli.main(["eval", str(model), "--data", str(data), "--adapter", str(tmp_path / "adapter")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the adapter belongs to another model (" in error
    assert ", and does not fit the model in " in error
    assert error.endswith(
        "'model.layers.0.self_attn.k_proj': the adapter is for a weight of shape (16, 32), "
        "but the model's layer has shape (32, 32); …\n"
    )


def test_a_run_does_not_resume_with_another_model(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line(model, data, tmp_path / "out")[3:]) == 0
    before = adapter_of(tmp_path / "out")
    other = save_small_llama(tmp_path / "other.gguf", "float16")
    capsys.readouterr()
    assert cli.main([*line(other, data, tmp_path / "out")[3:], "--resume"]) == 2
    assert (
        "the checkpoint is of another base model: the frozen weights or the configuration differ"
        in capsys.readouterr().err
    )
    assert adapter_of(tmp_path / "out") == before
