"""The parser: help, paths, storage types, and the modules that are loaded for a command."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nplora
from nplora import adapters, cli, finetuning
from nplora.cli import description
from nplora.cli.parser import COMMANDS, adapter_path, parser_of, weighted_path
from nplora.models import gguf_export
from nplora.trainer import Trainer, plot
from nplora.weights import storages


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in COMMANDS)], ids=lambda arguments: " ".join(arguments) or "all"
)
def test_every_command_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['nplora', *arguments])}")


@pytest.mark.parametrize(
    "line",
    [
        "finetune @ --data d --output o", "finetune m --data @ --output o", "finetune m --data d --output @",
        "finetune m --data d --valid @ --output o", "plan @ --data d", "plan m --data @", "eval m --data @",
        "eval m --data d --adapter @", "generate @ p", "info @", "convert @ t", "convert s @",
        "convert s t --base @", "combine @ --output o", "combine @:0.5 --output o", "combine a --output @",
        "merge @ a --output o", "merge b @ --output o", "merge b a --output @", "demo --output @", "plot @",
    ],
)  # fmt: skip
def test_an_empty_path_is_refused_at_once(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main([word.replace("@", "") for word in line.split()])
    assert exit_.value.code == 2
    assert "the path is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda: nplora.finetune("m", "d", ""),
        lambda: nplora.finetune("m", "", "o"),
        lambda: nplora.load_model(""),
        lambda: finetuning.evaluate("m", ""),
        lambda: adapters.convert_adapter("a.gguf", ""),
        lambda: adapters.adapter_to_gguf("", "a.gguf", "b"),
        lambda: adapters.adapter_to_gguf("a", "a.gguf", ""),
        lambda: adapters.adapter_from_gguf("", "a", "b"),
        lambda: adapters.adapter_from_gguf("a.gguf", "", "b"),
        lambda: adapters.adapter_from_gguf("a.gguf", "a", ""),
        lambda: description.describe(""),
        lambda: plot.plot_run(""),
        lambda: plot.plot_run("run", ""),
        lambda: adapters.merge_adapter("b", "a", ""),
        lambda: adapters.combine([("", 1.0)]),
        lambda: Trainer(nplora.Sequential(nplora.LoRALinear(np.eye(2), rank=1))).fit(
            np.eye(2), np.eye(2), checkpoint_dir=""
        ),
    ],
)
def test_an_empty_path_is_refused_in_python(
    call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an empty path"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nplora.finetune("m.gguf", data=3, output="out"),
            "finetune: data is a int, expected a path, paths, or rows",
        ),
        (
            lambda: nplora.finetune("m.gguf", data=["a.jsonl", 3], output="out"),
            r"finetune: data contains 3, expected paths, pairs \(path, weight\), or rows",
        ),
        (
            lambda: nplora.finetune("m.gguf", data={"text": "a"}, output="out"),
            r"finetune: data is a dictionary with the keys \['text'\], expected a split named 'train'; rows ",
        ),
        (
            lambda: nplora.evaluate("m.gguf", data={"text": "a"}),
            r"evaluate: data is a dictionary with the keys \['text'\], expected a split named 'valid' or ",
        ),
        (
            lambda: nplora.finetune("m.gguf", data="d.jsonl", output=3),
            "finetune: output is 3, expected a path",
        ),
        (lambda: nplora.merge_adapter(3, "a", "out.gguf"), "merge: base is 3, expected a path"),
    ],
)
def test_what_is_not_a_path_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "line", ["finetune m --data d --output {}", "convert a.gguf {}", "combine a --output {}"]
)
@pytest.mark.parametrize(("file", "kind"), [("f", "a file"), ("/dev/null", "a character device")])
def test_a_file_instead_of_a_directory_is_the_first_error(
    line: str,
    file: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("", encoding="utf-8")
    assert cli.main(line.format(file).split()) == 2
    message = f"nplora: error: {file}: is {kind}, expected a directory\n"
    assert capsys.readouterr().err == message


def test_the_storages_are_those_that_can_be_written() -> None:
    merged = {*storages.STORAGES, "same"} - {"nf4"}
    for text, known in (("convert a b", gguf_export.DTYPES), ("merge a b --output c", merged)):
        for dtype in known:
            parsed = parser_of(text.split()).parse_args([*text.split(), "--dtype", dtype])
            assert parsed.dtype == dtype


# The options of these commands are in rooms that take time to load.
HEAVY = {"finetune", "plan", "eval", "generate", "merge", "tune"}


@pytest.mark.slow
@pytest.mark.parametrize("word", ["generate", "info", "combine", "--help"])
def test_a_parser_loads_what_its_command_needs_and_no_other_command(word: str) -> None:
    program = (
        "import sys; from nplora.cli.parser import COMMANDS, parser_of; parser_of([sys.argv[1]])\n"
        "print([name for name in COMMANDS if f'nplora.cli.{COMMANDS[name]}' in sys.modules])\n"
        "print([room for room in ('lm', 'trainer', 'finetuning') if f'nplora.{room}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=True)
    commands, rooms = done.stdout.splitlines()
    assert commands == str([word] if word in COMMANDS else list(COMMANDS))
    assert bool(rooms != "[]") == (word in HEAVY)


def test_the_colon_of_a_drive_begins_no_weight(tmp_path: Path) -> None:
    """Such as the one in C:\\missing on Windows."""
    missing = str(tmp_path / "missing")
    assert weighted_path(missing) == (missing, 1.0)
    assert weighted_path(f"{missing}:0.5") == (missing, 0.5)
    assert adapter_path(missing) == missing
