"""The fuzzer of the server, for a moment."""

from pathlib import Path

import fuzzed_requests
import pytest

pytest.importorskip("starlette")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of jobs with random options
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_random_requests_never_fail(tmp_path: Path) -> None:
    statuses = fuzzed_requests.run_fuzzer(tmp_path, seed=1, count=400, seconds=20)
    assert statuses[200] > 50
    assert statuses[400] > 50
    assert statuses[404] > 10
