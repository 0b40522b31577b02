"""A signal during the handshake of the ranks keeps what an earlier run has trained."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from distributed.faults import train
from nplora.trainer import handshake
from nplora.trainer.run_directory import RunDirectory

STEPS = 15  # of the whole run


class Mirrored(nplora.distributed.Alone):
    """Rank 0 of two. The other rank always has the same values."""

    size = 2

    def gather(self, value: Any, place: str = "") -> list[Any]:
        return [value, value]

    def start_exchange(self, parts: Any, out: Any, senders: Sequence[int]) -> None:
        raise AssertionError("a step was made after the signal")


def interrupt_the_handshake(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    described = handshake._described

    def with_signal(*arguments: Any) -> dict[str, Any]:
        act()
        return described(*arguments)

    monkeypatch.setattr(handshake, "_described", with_signal)


def saved_values(directory: Path) -> tuple[int, list[Any]]:
    with RunDirectory(directory) as found:
        assert found.newest is not None
        return found.newest.step, list(found.newest.parameters.values())


def test_ctrl_c_in_the_handshake_keeps_the_trained_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = train(None, [], tmp_path / "run")
    interrupt_the_handshake(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    resumed = train(Mirrored(), [], tmp_path / "run")
    for found, wanted in zip(resumed.parameters(), trained.parameters(), strict=True):
        np.testing.assert_array_equal(found.value, wanted.value)
    assert saved_values(tmp_path / "run")[0] == STEPS


def test_sigterm_in_the_handshake_says_the_step_that_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(None, [], tmp_path / "run")
    before = saved_values(tmp_path / "run")
    interrupt_the_handshake(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(Mirrored(), [], tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"the run is saved at step {STEPS}" in ended.value.__notes__[0]
    np.testing.assert_equal(saved_values(tmp_path / "run"), before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_handshake_leaves_the_earlier_run(
    overwrite: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def act() -> None:
        raise KeyboardInterrupt

    train(None, [], tmp_path / "run")
    before = saved_values(tmp_path / "run")
    interrupt_the_handshake(monkeypatch, act)
    with pytest.raises(KeyboardInterrupt):
        train(Mirrored(), [], tmp_path / "run", overwrite=overwrite)
    np.testing.assert_equal(saved_values(tmp_path / "run"), before)
