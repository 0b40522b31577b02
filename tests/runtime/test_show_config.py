"""The configuration that users paste into reports, and the public limits of threads."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import systems
from nplora.platform import host
from nplora.runtime import machine


def test_the_report_names_what_a_maintainer_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    nplora.show_config()
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["nplora"].strip() == nplora.__version__
    assert lines["NumPy"].strip() == np.__version__
    assert lines["threads"].strip().startswith(str(nplora.get_num_threads()))
    assert {"instruction set", "processor", "OpenMP", "compiler", "Python", "platform"} <= set(lines)


def test_a_runtime_may_have_no_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    pool = {"user_api": "openmp", "internal_api": "openmp", "version": None, "num_threads": 2}
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [pool, {**pool, "version": "5.1"}])
    nplora.show_config()
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":", 1)[1].strip() for line in shown] == [
        "openmp openmp, 2 threads",
        "openmp openmp 5.1, 2 threads",
    ]


@systems.needs_cpuinfo
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD  EPYC 9B45\n", "AMD EPYC 9B45"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor\t: 0\nmodel name\t:\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processor_has_the_name_that_the_system_gives_it(
    text: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(host, "_CPU_INFO", tmp_path / "cpuinfo")
    assert machine.cpu_name.__wrapped__() == name


@pytest.mark.usefixtures("thread_limit")
def test_the_number_of_threads_can_be_lowered() -> None:
    nplora.set_num_threads(1)
    assert nplora.get_num_threads() == 1


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_a_number_of_threads_is_an_integer_of_at_least_one(n: Any) -> None:
    before = nplora.get_num_threads()
    with pytest.raises((ValueError, TypeError), match="set_num_threads: n is"):
        nplora.set_num_threads(n)
    assert nplora.get_num_threads() == before


def test_late_names_are_listed_and_unknown_ones_refused() -> None:
    assert {"Trainer", "formats", "save_adapter", "load_adapter"} <= set(dir(nplora))
    assert nplora.formats.__name__ == "nplora.formats"
    with pytest.raises(AttributeError, match="module 'nplora' has no attribute 'trainr'"):
        _ = nplora.trainr
