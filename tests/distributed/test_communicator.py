"""MPICommunicator: the values that it sends, its cleaning up, and its errors for ranks at different
places."""

import time
from typing import Any

import pytest

from distributed.launching import HERE, needs_mpi, run
from nplora.distributed import MPICommunicator, mpi
from nplora.distributed.launch import launched_ranks
from nplora.distributed.messages import Messages, Progress

PROGRAM = HERE / "communicating.py"


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "ranks"), [("pickle_once", 3), ("threads", 2), ("crowded", 2), ("many", 1), ("travel", 3)]
)
def test_a_communicator(check: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are made into bytes once; the number of threads is restored; too many
    threads are noticed; communicators are given back; messages travel while ranks compute."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it would be the most threads
    status, _, errors = run((ranks, [PROGRAM, check]))
    assert status == 0, errors


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    "failing", ["all", "one, and the others come later", "one, and the others do not come"]
)
def test_ranks_that_fail_while_rows_travel_end_the_job(failing: str) -> None:
    begin = time.monotonic()
    status, _, errors = run((3, [PROGRAM, "fail_while_rows_travel", failing]))
    assert status != 0
    # The ranks write at the same time, in pieces. In the line of the source, the words stand in quotes.
    assert errors.count("no memory for a test") - errors.count('"no memory for a test"') == 3, errors
    assert "did not react" not in errors
    assert time.monotonic() - begin < 18  # before the timeout


def test_an_error_of_mpi_in_the_thread_that_moves_messages_is_raised() -> None:
    class Broken:
        """MPI sets a request that has failed to a request that is complete."""

        calls = 0

        def Test(self) -> bool:  # noqa: N802
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("the connection is lost")
            return self.calls > 2

    messages = Messages()
    messages.receives.append((1, Broken()))
    progress = Progress(messages, is_allowed=True)
    progress.start()
    while messages.receives[0][1].calls < 2:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="the connection is lost"):
        progress.stop()
    progress.stop()


def test_abandoned_messages_keep_their_requests_even_if_mpi_fails() -> None:
    class Broken:
        def Test(self) -> bool:  # noqa: N802
            raise RuntimeError("the connection is lost")

    messages, pending, requests = Messages(), list[Any](), [Broken(), Broken()]
    messages.receives.append((1, requests[0]))
    messages.sends.append((2, requests[1]))
    messages.abandon(pending)
    assert pending == requests
    assert messages.unfinished() == []


@needs_mpi
@pytest.mark.slow
def test_ranks_at_different_places_are_one_error_that_names_both() -> None:
    status, _, errors = run((3, [PROGRAM, "elsewhere"]))
    assert status != 0
    words = "rank 1: this rank has reached the second place, but rank 0 has reached the first place"
    assert errors.count(words) == 3


@needs_mpi
@pytest.mark.slow
def test_a_run_on_one_rank_only_is_named() -> None:
    status, _, errors = run((2, [PROGRAM, "beside_a_fit"]))
    assert status != 0
    end = "the end of the communicator's with block"
    words = f"rank 1: this rank has reached the handshake, but rank 0 has reached {end}"
    assert errors.count(words) == 2


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 0),
        ({"PMI_SIZE": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, 1),  # mpiexec -n 1 in a step of four tasks
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"}, 2),
    ],
)
def test_the_innermost_launcher_counts(environment: dict[str, str], ranks: int) -> None:
    assert launched_ranks(environment) == ranks


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_the_timeout_must_be_above_zero(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^MPICommunicator: timeout is .*, expected a"):
        mpi._checked_timeout(seconds)
    with pytest.raises(TypeError, match="MPICommunicator: timeout is '60', expected a number"):
        mpi._checked_timeout("60")  # type: ignore[arg-type]


@needs_mpi
def test_the_mpirun_of_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "launched_ranks", lambda: 2)
    with pytest.raises(ValueError, match=r"has started 2 ranks, but mpi4py uses .* sees only one"):
        MPICommunicator()
