"""`nplora info`: versions and threads, or the description of a file."""

import pytest

import nplora
from nplora import cli
from nplora.cli import description


def test_info_prints_what_show_config_prints(capsys: pytest.CaptureFixture[str]) -> None:
    nplora.show_config()
    expected = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == expected
    assert "instruction set:" in expected


def test_a_file_is_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(description, "describe", lambda *arguments: f"described {arguments}")
    assert cli.main(["info", "f"]) == 0
    assert capsys.readouterr().out == "described ('f',)\n"
