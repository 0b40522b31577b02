"""The command line: one call for each command, one line for each error, and its exit status."""

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import adapters, finetuning
from nplora.cli import commands as cli
from nplora.cli import info
from nplora.cli.demo import dictionary, digits
from nplora.models import gguf_export as model_conversion
from nplora.trainer import Trainer, plot
from nplora.weights import storages


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nplora", *arguments], capture_output=True, text=True)


def test_info_prints_what_show_config_prints(capsys: pytest.CaptureFixture[str]) -> None:
    nplora.show_config()
    expected = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == expected
    assert "instruction set:" in expected


def test_the_version_is_printed() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"nplora {nplora.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["finetune"],
        ["plan"],
        ["eval"],
        ["generate"],
        ["merge"],
        ["combine"],
        ["convert"],
        ["info"],
        ["demo"],
        ["plot"],
    ],
    ids=" ".join,
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
        lambda: info.describe(""),
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
    "line", ["finetune m --data d --output {}", "convert a.gguf {}", "combine a --output {}"]
)
@pytest.mark.parametrize(("file", "kind"), [("f", "a file"), ("/dev/null", "a character device")])
def test_a_file_in_the_place_of_a_directory_is_told_first(
    line: str,
    file: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("")
    assert cli.main(line.format(file).split()) == 2
    told = f"nplora: error: {file}: is {kind}, expected a directory: name another one\n"
    assert capsys.readouterr().err == told


def test_demo_and_plot_hand_their_arguments_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dictionary, "run", lambda *arguments: calls.append(("dictionary", *arguments)))
    monkeypatch.setattr(digits, "run", lambda *arguments: calls.append(("digits", *arguments)))

    def plot_run(*arguments: Any) -> Path:
        calls.append(arguments)
        return Path("there.png")

    monkeypatch.setattr(plot, "plot_run", plot_run)
    given = "--output d --rank 2 --seed 1"
    lines = (
        "demo",
        "demo digits",
        f"demo {given} --overwrite",
        f"demo digits {given} --overwrite",
        "plot r",
        "plot r --output f.png --overwrite",
    )
    for line in lines:
        assert cli.main(line.split()) == 0
    assert calls == [
        ("dictionary", "demo-dictionary", 8, 0, False),
        ("digits", "demo-digits", 4, 0, False),
        ("dictionary", "d", 2, 1, True),
        ("digits", "d", 2, 1, True),
        ("r", None, False),
        ("r", "f.png", True),
    ]
    assert capsys.readouterr().out == "there.png\nthere.png\n"


def test_info_and_convert_hand_their_arguments_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "describe", lambda *arguments: f"described {arguments}")
    monkeypatch.setattr(adapters, "convert_adapter", lambda *arguments: f"converted {arguments}")
    base = "convert a b --base m"
    for line in ("info f", "convert a b", base, f"{base} --any-base", "convert a b --overwrite"):
        assert cli.main(line.split()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "described ('f',)",
        "converted ('a', 'b', None, False, False)",
        "converted ('a', 'b', 'm', False, False)",
        "converted ('a', 'b', 'm', True, False)",
        "converted ('a', 'b', None, False, True)",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND (try nplora --help)"),
        (["plto"], 2, "invalid choice: 'plto'"),
        (["plot"], 2, "the following arguments are required: RUN_DIR (try nplora plot --help)"),
        (["info", "M", "--fast"], 2, "unrecognized arguments: --fast (try nplora info --help)"),
        (["--fast", "info"], 2, "unrecognized arguments: --fast (try nplora info --help)"),
        (["info", "M", "--a\nb"], 2, "unrecognized arguments: --a b (try nplora info --help)"),
        (["plan", "m", "--data", "d", "--s=a\nb"], 2, "ambiguous option: --s=a b could match"),
        (["info", "no/such/file"], 2, "no such file: no/such/file"),
        (["convert", "a"], 2, "the following arguments are required: TARGET (try nplora convert --help)"),
        (["plot", "no/such/run"], 2, "error: no/such/run: no run directory, it has no log.jsonl\n"),
    ],
)
def test_an_expected_error_is_one_line(arguments: list[str], status: int, message: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("nplora: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("a\n  b"), 2, "a b"),
        (ValueError("it fits not:\n  a b\n  c"), 2, "it fits not: a b; c"),
        (ValueError("in 180 places:" + "\n  a b" * 20 + "\n  …"), 2, "in 180 places: " + "a b; " * 20 + "…"),
        (ValueError("in 180 places:" + f"\n  {'a' * 90}" * 20), 2, f"in 180 places: {'a' * 90}; …"),
        (FileNotFoundError(2, os.strerror(2), "x"), 2, "no such file: x"),
        (FileNotFoundError(2, "gone", b"x\n y"), 2, "x y: gone"),
        (PermissionError(13, os.strerror(13), Path("x")), 2, "permission denied: x"),
        (PermissionError(13, "locked"), 2, "locked"),
        (OSError(28, f"{os.strerror(28)}: 5 bytes", "x"), 2, "x: No space left on device: 5 bytes"),
        (OSError(28, os.strerror(28)), 2, "no space left on device"),
        (OSError("odd"), 2, "odd"),
        (ImportError("no x"), 1, "no x"),
        (ModuleNotFoundError('no x: pip install "nplora[x]"', name="x"), 2, 'no x: pip install "nplora[x]"'),
        (OverflowError("z"), 1, "z"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: Exception,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(dictionary, "run", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err == f"nplora: error: {message}\n"


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(*arguments: object) -> None:
        warnings.warn("a\n b", stacklevel=1)

    monkeypatch.setattr(dictionary, "run", warn)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["demo"]) == 0
    assert capsys.readouterr().err == "nplora: warning: a b\n"
    assert warnings.showwarning is shown


def test_the_storages_are_those_that_can_be_written() -> None:
    merged = {*storages.STORAGES, "same"} - {"nf4"}
    for text, known in (("convert a b", model_conversion.DTYPES), ("merge a b --output c", merged)):
        for dtype in known:
            parsed = cli._parser("convert").parse_args([*text.split(), "--dtype", dtype])
            assert parsed.dtype == dtype


def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for line, message in (
        (f"convert {tmp_path} x.gguf --base m", "--base is the model of an adapter, SOURCE is a model"),
        (f"convert {tmp_path} x.gguf --any-base", "--any-base is of an adapter, SOURCE is a model"),
        (
            "convert . x.gguf --dtype q8_0",
            "--dtype is for a Hugging Face model, and SOURCE is not one",
        ),
        ("convert nowhere x.gguf --dtype q8_0", "no such file: nowhere"),
        (
            "combine a b --output c.gguf",
            "--output names a directory, got 'c.gguf'; nplora convert makes",
        ),
        ("combine a b --output c.GGUF", "--output names a directory, got 'c.GGUF'"),
        ("combine a b --output c.safetensors", "--output names a directory, got 'c.safetensors'"),
        ("generate m x --system y", "--system is a message of a chat, which needs --chat"),
    ):
        assert cli.main(line.split()) == 2
        assert message in capsys.readouterr().err
    for line in ("convert a b --dtype bogus", "merge a b --output c --dtype foo"):
        with pytest.raises(SystemExit) as caught:
            cli.main(line.split())
        assert caught.value.code == 2


@pytest.mark.parametrize("name", ["NPLORA_ISA", "NPLORA_PARALLEL"])
def test_a_mistake_in_the_environment_is_one_line(name: str, tmp_path: Path) -> None:
    script = tmp_path / "nplora"  # as pip makes it of the entry point
    script.write_text("import sys\nfrom nplora.cli import main\nsys.exit(main())\n")
    environment = os.environ | {name: "foo", "PYTHONPATH": str(Path(nplora.__file__).parents[1])}
    for line in (["-m", "nplora", "info"], [str(script), "info"]):
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"nplora: error: {name}=foo: ")
        assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "-c", "import nplora"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert f"ImportError: {name}=foo: " in done.stderr


def test_what_is_neither_an_adapter_nor_one_with_a_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, weight in (("full:x", "x"), ("full:0,5", "0,5"), ("full:", "")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["combine", word, "--output", "o"])
        assert exit_.value.code == 2
        told = f"'{word}' is not there, and for ADAPTER:WEIGHT '{weight}' is no number"
        assert told in capsys.readouterr().err
    (tmp_path / "full:x").mkdir()
    assert cli.main(["combine", "full:x", "--output", "o"]) == 2
    assert "no such file: full:x/adapter_config.json" in capsys.readouterr().err


def test_a_rank_of_0_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []
    for what in (dictionary, digits):
        monkeypatch.setattr(what, "run", lambda output, rank, *_: ranks.append(rank))
    assert cli.main(["demo", "--rank", "0"]) == cli.main(["demo", "digits", "--rank", "0"]) == 0
    assert ranks == [0, 0]


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(dictionary, "run", fail)
    with pytest.raises(AssertionError):
        cli.main(["demo"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dictionary, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_the_options_are_looked_up_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupt)
    assert cli.main(["finetune"]) == 130


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "nplora", "info"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "status"), [("info", 0), ("info missing", 2), ("combine a --output b --rank x", 2)]
)
def test_a_stderr_that_nobody_reads_changes_no_exit_status(
    arguments: str, status: int, tmp_path: Path
) -> None:
    program = "import sys, warnings; from nplora import cli, runtime; show = runtime.show_config\n"
    program += "runtime.show_config = lambda: (warnings.warn('of something'), show())\n"
    program += "sys.exit(cli.main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=writing, cwd=tmp_path, text=True)
    os.close(writing)
    assert done.returncode == status
    assert ("nplora" in done.stdout) == (status == 0)


def test_the_notes_on_an_error_are_in_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        error = ValueError("two problems:\n  one\n  two")
        error.add_note("a note")
        raise error

    monkeypatch.setattr(dictionary, "run", fail)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "nplora: error: two problems: one; two; a note\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_a_terminal_cannot_show_are_replaced(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nplora", "merge", "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "ΔW kept".encode(encoding, "replace") in done.stdout


def test_streams_that_are_closed_leave_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetuning, "load_with_adapter", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["generate", "m", "-"]) == 2
    assert (
        capsys.readouterr().err
        == "nplora: error: the prompt is to come from standard input, which is closed\n"
    )
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def test_a_reader_of_stdout_that_goes_away_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(["info"]) == 1

    run()
    before = os.listdir("/proc/self/fd")
    run()
    assert os.listdir("/proc/self/fd") == before


def test_a_signal_that_ends_training_says_what_is_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The notes on the exception, as a run adds them."""

    def ended(arguments: Any) -> None:
        end = SystemExit(143)
        end.add_note("the run is saved at step 3: --resume (resume=True) continues it")
        raise end

    monkeypatch.setattr(cli, "_demo", ended)
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo"])
    assert raised.value.code == 143
    assert (
        capsys.readouterr().err == "nplora: the run is saved at step 3: --resume (resume=True) continues it\n"
    )
