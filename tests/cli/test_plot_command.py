"""`nplora plot`: its arguments."""

from pathlib import Path
from typing import Any

import pytest

from nplora import cli
from nplora.trainer import plot


def test_the_arguments_reach_plot_run_and_the_path_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def plot_run(*arguments: Any) -> Path:
        calls.append(arguments)
        return Path("there.png")

    monkeypatch.setattr(plot, "plot_run", plot_run)
    for line in ("plot r", "plot r --output f.png --overwrite"):
        assert cli.main(line.split()) == 0
    assert calls == [("r", None, False), ("r", "f.png", True)]
    assert capsys.readouterr().out == "there.png\nthere.png\n"
