"""Fixtures that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import nplora
from figures import Figure
from nplora.cli.demo import dictionary

_FIGURES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skipped", type=Path, metavar="FILE", help="write what was skipped, for pytest @FILE")


class _Skipped:
    """Writes the ids of skipped tests, and of files that were skipped as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.keep(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.keep(report)

    def keep(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.skipped:
        config.pluginmanager.register(_Skipped(config.option.skipped))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the real model are slow."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts the same way in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """figure(what, value) has the largest value of the tests of a file printed at the end of the run."""
    largest, file = request.config.stash.setdefault(_FIGURES, {}), request.path.name

    def report(what: str, value: float) -> None:
        key = f"{file}: {what}"
        largest[key] = max(float(value), largest.get(key, float(value)))

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest = terminalreporter.config.stash.get(_FIGURES, {})
    if largest:
        terminalreporter.section("the largest figures that tests measured")
    for what, value in sorted(largest.items()):
        terminalreporter.write_line(f"{what}: {value:.6g}")


@pytest.fixture
def thread_limit() -> Iterator[None]:
    """Let the test set the number of threads, up to eight with OpenMP, and restore it."""
    before = nplora.get_num_threads()
    with threadpoolctl.threadpool_limits(8, user_api="openmp"):
        yield
    nplora.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of a real model, SmolLM2-135M in Q4_1, if its package is installed."""
    try:
        return dictionary.find_model()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
