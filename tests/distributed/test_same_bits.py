"""One process, two ranks and three ranks train the same adapter, bit for bit."""

import json
from pathlib import Path

import pytest

from distributed import cases
from distributed.launching import HERE, needs_mpi, run
from small_llama import save_small_llama

pytest.importorskip("tokenizers")
pytestmark = [needs_mpi, pytest.mark.slow]

NAMES = [*cases.NUMPY, *cases.LANGUAGE]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("alone")
    save_small_llama(directory / "model.gguf")
    return cases.results(directory, None)


@pytest.fixture(scope="module", params=[2, 3])
def on_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("ranks")
    save_small_llama(directory / "model.gguf")
    status, _, errors = run((request.param, [HERE / "cases.py", directory]))
    assert status == 0, errors
    found: dict[str, str] = json.loads((directory / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_the_same_values_and_record_the_same_numbers(
    name: str, alone: dict[str, str], on_ranks: dict[str, str]
) -> None:
    assert on_ranks[name] == alone[name]


def test_the_cases_are_different_runs(alone: dict[str, str]) -> None:
    different = {name: digest for name, digest in alone.items() if name != "numpy_resumed"}
    assert len(set(different.values())) == len(different)
    assert alone["numpy_resumed"] == alone["numpy_model"]


def test_a_run_is_resumed_by_other_numbers_of_ranks(alone: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert run((2, [HERE / "cases.py", place, 2]))[0] == 0
    assert cases.resumed_part(None, place, 4) != alone["numpy_model"]
    assert run((3, [HERE / "cases.py", place, 6]))[0] == 0
    assert cases.resumed_part(None, place, None) == alone["numpy_model"]
