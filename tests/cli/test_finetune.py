"""`nplora finetune`: options, errors and interruption; and `eval` and `generate` with its adapter."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import systems
from commands import command
from dead_streams import DEAD
from nplora import cli
from nplora.finetuning import FinetuneOptions, load_with_adapter
from nplora.lm import load_model


def files_of(directory: Path) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return {name: (directory / name).read_bytes() for name in names}


@pytest.mark.slow
def test_training_data_that_are_evaluated_are_reported(model: Path, data: Path, tmp_path: Path) -> None:
    both = data / "valid.jsonl"
    done = command(
        "finetune", model, "--data", both, "--valid", both, "--output", tmp_path / "o", "--steps", 1
    )
    words = "the training data contain 4 of 4 validation examples, so the validation loss is too low"
    assert words in done.stderr.splitlines()


@pytest.mark.slow
def test_the_commands_train_evaluate_and_answer(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = command(
        "finetune", model, "--data", data, "--output", output, "--rank", 2, "--lr", 0.01, "--epochs", 2,
        "--targets", "q_proj,v_proj", "--targets", "o_proj", "--sample", "1+1=", "--batch-examples", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train.jsonl (completion): 20 examples" in done.stderr
    assert re.search(r"^step 1/10, loss [\d.]+, \d+ tokens/s \(\d+ trained\), ", done.stderr, re.MULTILINE)
    assert re.search(r"^step 10/10, loss [\d.]+ \(mean of 10 steps\), ", done.stderr, re.MULTILINE)
    assert re.search(
        r", loss [\d.]+ in the first step, [\d.]+ on average in the last 5 steps$", done.stdout, re.MULTILINE
    )
    config = json.loads((output / "adapter_config.json").read_text())
    parts = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert parts == {"q_proj", "v_proj", "o_proj"}
    assert " left" in done.stderr
    assert "validation loss " in done.stdout
    assert "the training data contain" not in done.stderr
    base = json.loads(command("eval", model, "--data", data, "--json").stdout)
    adapted = json.loads(command("eval", model, "--data", data, "--adapter", output, "--json").stdout)
    assert adapted["loss"] < base["loss"]
    assert f"-> {adapted['loss']:.4f}" in done.stdout
    plain = command("eval", model, "--data", data)
    assert plain.stdout.startswith(f"loss {base['loss']:.4f} over {base['tokens']:,} tokens (95 % interval ")
    assert plain.stderr.startswith(f"{data / 'valid.jsonl'} (completion): 4 examples, ")
    answer = command("generate", model, "1+1=", "--adapter", output, "--max-new-tokens", 5)
    lm = load_with_adapter(model, output)
    assert answer.stdout == f"{lm.generate('1+1=', 5)}\n"
    asked = command("generate", model, "-", "--max-new-tokens", 5, input="1+1=")
    assert asked.stdout == f"{load_model(model).generate('1+1=', 5)}\n"
    assert asked.stderr == ""
    for prompt, given in (("-", b"1\xff"), (b"1\xff", b"")):
        if systems.IS_WINDOWS and isinstance(prompt, bytes):  # words of a command are text there
            continue
        line = [sys.executable, "-m", "nplora", "generate", str(model), prompt]
        odd = subprocess.run(line, input=given, capture_output=True)
        assert odd.returncode == 2
        assert odd.stderr.splitlines() == [b"nplora: error: the prompt is not UTF-8, at byte 1"]
    full = command("generate", model, "1" * 58)
    assert full.stderr == (
        "nplora: warning: generate: the text ends after 6 tokens because the model's context of 64 is full\n"
    )
    chat = command("generate", model, "b", "--chat", "--system", "a", "--max-new-tokens", 5)
    assert chat.stdout == f"{load_model(model).generate('ab', 5)}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("finetune M --data D --output O --rank 0", 2, "rank is 0"),
        ("finetune M --data D --output O --rank x", 2, "argument --rank: invalid int value: 'x'"),
        ("finetune M --data D --output O --epochs 1 --steps 2", 2, "--epochs and --steps are both given"),
        ("finetune M --data D", 2, "the following arguments are required: --output"),
        ("finetune M --data D --output O --schedule sine", 2, "invalid choice: 'sine'"),
        ("finetune M --data no.jsonl --output O", 2, "no such file: no.jsonl"),
        ("finetune no.gguf --data D --output O", 2, "no such file: no.gguf"),
        ("finetune M --data D --output O --rank 100000000", 2, "rank is 100000000, expected at most 65536"),
        ("finetune M --data D --output O --dropout 2", 2, "dropout is 2.0"),
        ("finetune M --data D --output O --weight-decay nan", 2, "--weight-decay is nan"),
        ("finetune M --data D --output O --weight-decay -1", 2, "--weight-decay is -1.0"),
        ("finetune M --data D --output O --save-minutes -1", 2, "--save-minutes is -1.0"),
        (
            "finetune M --data D --output O --layers 4",
            2,
            "finetune: --layers 4, expected 'last:N' or 'first:N'",
        ),
        ("finetune . --data D --output O", 2, ".: the directory holds no config.json"),
        ("finetune M --data D --output O --layers first:0", 2, "--layers first:0, expected 'last:N'"),
        ("finetune M --data D --output O --targets nope", 2, "no layer 'nope'"),
        ("finetune M --data D --output O --targets q_proj,nope", 2, "no layer 'nope'"),
        ("eval M --data D --max-length 1", 2, "--max-length is 1"),
        ("eval M --data D --max-length 0", 2, "--max-length is 0"),
        ("eval M --data D --adapter no", 2, "no such file: no\n"),
        ("finetune M --data D --output O --memory 600", 2, "memory is '600', which means 600 bytes: give"),
        ("plan M --data D --memory 600", 2, "memory is '600', which means 600 bytes: give"),
        ("generate M x --temperature -1", 2, "temperature is -1.0"),
        ("generate M x --top-p 2", 2, "--top-p is 2.0"),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"M": str(model), "D": str(data), "O": str(tmp_path / "out")}
    try:
        found = cli.main([words.get(word, word) for word in arguments.split()])
    except SystemExit as end:  # of argparse
        found = end.code
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("nplora: error: ")]
    assert (found, printed.out, len(errors)) == (status, "", 1), printed.err
    assert message in f"{errors[0]}\n"
    assert not (tmp_path / "out").exists()


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(FinetuneOptions):
        name = f"--{field.name.replace('_', '-')}"
        words = re.sub(r"`(\w+)`", lambda match: f"--{match[1].replace('_', '-')}", field.metadata["help"])
        assert re.search(rf" {name}( \S+)? {re.escape(words)}", text), name
    for title in ("adapter", "training", "batches", "data", "memory and speed", "run"):
        assert f" {title}: --" in text
    for words in (
        "rises to its peak (default: 0) ", "LoRA dropout probability (default: 0.0) ",
        "q_proj,v_proj (repeatable) (default: all-linear) ", "a chat if the training data are chats ",
        "first:N (default: all) ", "backward pass; slower, but saves memory --filter-vocabulary P ",
    ):  # fmt: skip
        assert words in text


def test_resuming_without_a_run_says_that_a_new_one_starts(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    line = ["finetune", *paths, "--steps", "1", "--resume"]
    message = f"{tmp_path / 'out'}: there is no run to resume, so a new run starts\n"
    assert cli.main(line) == 0
    assert capsys.readouterr().err.count(message) == 1
    assert cli.main(line) == 0
    done = capsys.readouterr()
    assert message not in done.err
    assert "\n1 step in " in done.out


def test_a_resumed_run_says_what_it_keeps_and_which_options_continue_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    paths = [str(model), "--data", str(data), "--output", str(out)]
    line = ["finetune", *paths, "--rank", "2", "--steps", "1", "--batch-examples", "4"]
    started = [*line, "--compute", "int8", "--int8-head", "off", "--filter-vocabulary", "1e-5", "--keep-int8"]
    assert cli.main(started) == 0
    assert "continues" not in capsys.readouterr().err

    def refused(*changes: str) -> str:
        assert cli.main([*line, "--filter-vocabulary", "1e-5", *changes, "--resume"]) == 2
        start = f"nplora: error: {out}: the run cannot continue with other data or settings: "
        return capsys.readouterr().err.splitlines()[-1].removeprefix(start)

    advice = "to continue, use the run's earlier settings: "
    end, change = (
        "; --overwrite starts a new run",
        "; --change-compute continues the run in the new arithmetic",
    )
    assert refused("--compute", "float32").endswith(
        f"is float32 in 14 layers; {advice}--compute int8{change}{end}"
    )
    assert refused("--rank", "3", "--alpha", "8").endswith(f"is 8.0 in 14 layers{end}")
    assert refused("--filter-vocabulary", "0") == (
        f"--filter-vocabulary was 1e-05, is not set; {advice}--filter-vocabulary 1e-05{end}"
    )
    assert cli.main([*line, "--overwrite", "--compute", "int8", "--int8-head", "on"]) == 0
    assert cli.main([*line, "--resume"]) == 0
    kept = f"{out}: the run still uses --compute int8 and --int8-head on"
    assert capsys.readouterr().err.splitlines().count(kept) == 1
    assert cli.main([*line, "--resume", "--int8-head", "off", "--compute", "int8"]) == 2
    assert f"--int8-head was on, is off; {advice}--int8-head on{change}{end}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--change-compute"], "--change-compute needs --resume: "),
        (["--patience", "2"], "--patience 2 needs validation data: give --valid or --valid-split"),
    ],
)
def test_an_option_that_needs_another_is_spelled_as_on_the_command_line(
    options: list[str],
    message: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["finetune", str(model), "--data", str(data / "train.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.main([*line, *options]) == 2
    assert f"nplora: error: finetune: {message}" in capsys.readouterr().err


def test_a_report_that_cannot_be_printed_says_that_the_adapter_is_saved(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", DEAD["disk"])
    paths = [str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    assert cli.main(["finetune", *paths, "--rank", "2", "--steps", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "nplora: error: no space left on device; "
        f"stdout could not be written; {tmp_path / 'out'} holds the adapter"
    )
    assert len(files_of(tmp_path / "out")) == 2


@systems.needs_signals
@pytest.mark.slow
def test_ctrl_c_saves_and_the_command_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--rank", "2", "--lr", "0.01", "--steps", "400", "--batch-examples", "4"]
    for output in (tmp_path / "whole", tmp_path / "cut"):
        line = [
            sys.executable,
            "-m",
            "nplora",
            "finetune",
            model,
            "--data",
            data,
            "--output",
            output,
            *options,
        ]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if output.name == "cut":
            log = output / "log.jsonl"
            while process.poll() is None and not (log.exists() and log.read_text().count('"step"') > 20):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == (130 if output.name == "cut" else 0), errors.decode()
    assert b"interrupted: --resume continues" in printed
    assert (tmp_path / "cut" / "adapter_model.safetensors").exists()
    assert files_of(tmp_path / "cut") != files_of(tmp_path / "whole")
    done = command("finetune", model, "--data", data, "--output", tmp_path / "cut", *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
