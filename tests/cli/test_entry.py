"""The entry point: one line for each error and warning, the exit status, and streams that are gone."""

import contextlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import nplora
import systems
from commands import command
from nplora import cli, finetuning
from nplora.cli import demo, entry
from nplora.cli.demo import dictionary


@pytest.mark.slow
def test_the_version_is_printed() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"nplora {nplora.__version__}\n")


@pytest.mark.slow
def test_a_process_prints_its_error_as_one_line() -> None:
    done = command("info", "no/such/file")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("nplora: error: .*no such file: no/such/file.*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND (try nplora --help)"),
        (["plto"], 2, "no command 'plto'; did you mean plot? (try nplora --help)"),
        (["train"], 2, "no command 'train'; did you mean finetune? (try nplora --help)"),
        (["?"], 2, "no command '?', expected one of finetune, plan, data, teach, eval, "),
        (
            ["plot", "r", "--outptu", "o"],
            2,
            "no option --outptu; did you mean --output? (try nplora plot --he",
        ),
        (["plot"], 2, "the following arguments are required: RUN_DIR (try nplora plot --help)"),
        (["info", "M", "--fast"], 2, "unrecognized arguments: --fast (try nplora info --help)"),
        (["--fast", "info"], 2, "unrecognized arguments: --fast (try nplora info --help)"),
        (["info", "M", "--a\nb"], 2, "unrecognized arguments: --a b (try nplora info --help)"),
        (
            ["plan", "m", "--data", "d", "--s=a\nb"],
            2,
            "unrecognized arguments: --s=a b (try nplora plan --help)",
        ),
        (["info", "no/such/file"], 2, "no such file: no/such/file"),
        (["convert", "a"], 2, "the following arguments are required: TARGET (try nplora convert --help)"),
        (["plot", "no/such/run"], 2, "error: no/such/run: not a run directory: it has no log.jsonl\n"),
    ],
)
def test_an_expected_error_is_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found: Any = cli.main(arguments)
    except SystemExit as end:  # of argparse
        found = end.code
    printed = capsys.readouterr()
    assert (found, printed.out) == (status, "")
    assert printed.err.startswith("nplora: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


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


@pytest.mark.parametrize("name", ["NPLORA_ISA", "NPLORA_PARALLEL"])
def test_a_mistake_in_the_environment_is_one_line(name: str, tmp_path: Path) -> None:
    script = tmp_path / "nplora"  # as pip makes it from the entry point
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


def test_ctrl_c_while_the_parser_is_made_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "parser_of", interrupt)
    assert cli.main(["finetune"]) == 130


@pytest.mark.slow
def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "nplora", "info"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
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


@pytest.mark.slow
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
    message = "nplora: error: the prompt cannot be read: standard input is closed\n"
    assert capsys.readouterr().err == message
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


@systems.needs_procfs("fd")
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
    """A run adds notes to the exception; they are printed."""

    def ended(arguments: Any) -> None:
        end = SystemExit(143)
        end.add_note("the run is saved at step 3: --resume (resume=True) continues the run")
        raise end

    monkeypatch.setattr(demo, "run", ended)
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo"])
    assert raised.value.code == 143
    assert (
        capsys.readouterr().err
        == "nplora: the run is saved at step 3: --resume (resume=True) continues the run\n"
    )
