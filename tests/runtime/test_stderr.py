"""stderr: a write that fails, for any reason, never ends the program."""

import sys

import pytest

from dead_streams import DEAD, Dead
from notebooks import notebook
from nplora.runtime.stderr import in_notebook, stderr


@pytest.mark.parametrize("kind", DEAD)
def test_what_cannot_be_written_is_dropped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", DEAD[kind])
    print("lost", file=stderr, flush=True)
    assert stderr.isatty() == isinstance(DEAD[kind], Dead)


def test_what_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    print("read", file=stderr, flush=True)
    assert capsys.readouterr().err == "read\n"
    assert stderr.encoding == sys.stderr.encoding
    assert not stderr.isatty()


def test_a_notebook_shows_what_is_written_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_notebook()
    with notebook(monkeypatch):
        assert in_notebook()
        assert stderr.is_watched()
        monkeypatch.setattr(sys, "stderr", None)
        assert not stderr.is_watched()
    with notebook(monkeypatch, shell="TerminalInteractiveShell"):
        assert not in_notebook()
