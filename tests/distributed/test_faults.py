"""A rank that fails, is killed, hangs or gets a signal ends the job, which says why and can be resumed."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distributed import faults
from distributed.launching import HERE, needs_mpi, run, started
from nplora.trainer.run_directory import RunDirectory

# The steps that rank 0 may have saved if the launcher has ended it. MPICH kills it, so the newest checkpoint
# is the one after the first step. Open MPI sends SIGTERM before, and rank 0 may still save the run.
BY_FORCE = {1, 5}

pytestmark = [needs_mpi, pytest.mark.slow]


def saved_step(directory: Path) -> int:
    for _ in range(100):
        try:
            with RunDirectory(directory) as found:
                assert found.newest is not None
                return found.newest.step
        except BlockingIOError:  # mpiexec has ended before a rank that it kills
            time.sleep(0.1)
    raise AssertionError("a rank is still alive")


def require_same_end(directory: Path) -> None:
    """The resumed run ends with the bits of a run without a fault."""
    resumed, whole = faults.train(None, [], directory), faults.train(None, [], None)
    for found, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        np.testing.assert_array_equal(found.value, wanted.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_and_the_run_is_saved(rank: int, tmp_path: Path) -> None:
    status, _, errors = run((3, [HERE / "faults.py", "error", rank, 5, tmp_path / "run"]))
    assert status != 0
    assert errors.count(f"rank {rank}: no memory for a test") == 2
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


def test_a_full_disk_of_rank_0_ends_all_and_the_last_checkpoint_is_resumed(tmp_path: Path) -> None:
    status, _, errors = run((2, [HERE / "faults.py", "disk", 0, 5, tmp_path / "run"]))
    assert status != 0
    assert "the error occurred on rank 0" in errors
    assert f"rank 0: {tmp_path}/run/log.jsonl: File too large: " in errors
    assert saved_step(tmp_path / "run") == 1  # the checkpoint after the first step
    require_same_end(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_last_checkpoint_is_resumed(rank: int, tmp_path: Path) -> None:
    status, _, _ = run((2, [HERE / "faults.py", "kill", rank, 5, tmp_path / "run"]))
    assert status != 0
    assert saved_step(tmp_path / "run") == 1  # the checkpoint after the first step
    require_same_end(tmp_path / "run")


def test_a_rank_that_is_killed_while_it_writes_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    status, _, _ = run((2, [HERE / "faults.py", "checkpoint", 0, 5, tmp_path / "run"]))
    assert status != 0
    with pytest.warns(UserWarning, match="removed, because a run that was killed left this file unfinished"):
        assert saved_step(tmp_path / "run") == 4
    require_same_end(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_ended(rank: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    status, _, errors = run(
        (2, [HERE / "faults.py", "stop", rank, 5, tmp_path / "run"]), NPLORA_RANK_TIMEOUT="2"
    )
    assert status != 0
    assert f"rank {rank}: no answer for 2 s: the rank hangs, is stopped, or needs more time" in errors
    assert time.monotonic() - begin < 60  # far less than the timeout without the environment variable
    assert saved_step(tmp_path / "run") in ({5} if rank else BY_FORCE)
    require_same_end(tmp_path / "run")


@pytest.mark.parametrize(("kind", "wanted"), [("interrupt", 0), ("terminate", 143), ("user", 138)])
def test_a_signal_to_one_rank_ends_all_at_the_same_step(kind: str, wanted: int, tmp_path: Path) -> None:
    status, _, errors = run((2, [HERE / "faults.py", kind, 1, 5, tmp_path / "run"]))
    assert status == wanted, errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


def test_a_rank_without_work_waits_until_rank_0_has_saved_the_run(tmp_path: Path) -> None:
    words = [HERE / "faults.py", "user", 1, 5, tmp_path / "run"]
    status, _, errors = run((2, words), FAULT_SECONDS="6")
    assert status == 138, errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


def test_a_rank_that_fails_waits_until_the_batch_of_rank_0_is_computed(tmp_path: Path) -> None:
    words = [HERE / "faults.py", "batch", 1, 5, tmp_path / "run"]
    status, _, errors = run((2, words), FAULT_SECONDS="6")
    assert status != 0
    assert "rank 1 has failed (no memory for a test) and waits up to" in errors
    assert "s for rank 0, which may be computing a batch" in errors
    assert "rank 1: no memory for a test" in errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


def test_a_rank_that_fails_does_not_wait_longer_than_the_timeout(tmp_path: Path) -> None:
    words, begin = [HERE / "faults.py", "batch", 1, 5, tmp_path / "run"], time.monotonic()
    status, _, _ = run((2, words), FAULT_SECONDS="110", NPLORA_RANK_TIMEOUT="2")
    assert status != 0
    assert time.monotonic() - begin < 60
    assert saved_step(tmp_path / "run") in BY_FORCE


def test_ranks_wait_for_rank_0_which_saves_the_run_after_another_rank_has_stopped(tmp_path: Path) -> None:
    words = [HERE / "faults.py", "stop", 1, 5, tmp_path / "run"]
    status, _, errors = run((3, words), FAULT_SECONDS="3", NPLORA_RANK_TIMEOUT="4")
    assert status != 0
    assert "rank 1: no answer for 4 s: the rank hangs, is stopped, or needs more time" in errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_that_a_callback_raises_on_one_rank_ends_all(rank: int, tmp_path: Path) -> None:
    status, _, errors = run((2, [HERE / "faults.py", "raise", rank, 5, tmp_path / "run"]))
    assert status != 0
    assert f"rank {rank}: interrupted" in errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


def test_a_signal_to_all_ranks_saves_the_run(tmp_path: Path) -> None:
    """A launcher passes Ctrl-C and SIGUSR1 on to all ranks, which notice them at different times."""
    status, _, errors = run((3, [HERE / "faults.py", "user", -1, 5, tmp_path / "run"]))
    assert status == 138, errors
    assert saved_step(tmp_path / "run") == 5
    require_same_end(tmp_path / "run")


@pytest.mark.parametrize(("name", "wanted"), [("SIGINT", 0), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_the_launcher_saves_the_run(name: str, wanted: int, tmp_path: Path) -> None:
    with started((2, [HERE / "faults.py", "announce", -1, 5, tmp_path / "run"])) as process:
        assert process.stdout is not None
        assert "now" in process.stdout.readline()
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
    assert process.returncode == wanted
    assert saved_step(tmp_path / "run") in range(5, 15)
    require_same_end(tmp_path / "run")


def test_a_handler_of_the_program_is_called_on_all_ranks_and_may_let_the_run_continue(tmp_path: Path) -> None:
    status, out, errors = run((2, [HERE / "faults.py", "handled", 1, 5, tmp_path / "run"]))
    assert status == 0, errors
    assert [out.count(f"rank {rank} handles it") for rank in (0, 1)] == [1, 1]
    assert saved_step(tmp_path / "run") == 15


def test_a_loss_that_is_not_finite_on_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    status, _, errors = run((2, [HERE / "faults.py", "nan", 1, 5, tmp_path / "run"]))
    assert status != 0
    assert errors.count("step 6 (epoch 2): the loss of batch 2 is nan") == 2


@pytest.mark.parametrize(
    ("kind", "what"), [("data", "x"), ("settings", "clip_norm: 0.5, but not set on rank 0")]
)
def test_ranks_with_other_data_or_settings_are_named(kind: str, what: str, tmp_path: Path) -> None:
    status, _, errors = run((2, [HERE / "faults.py", kind, 1, 0, tmp_path / "run"]))
    assert status != 0
    assert f"the ranks do not agree: rank 1 differs in {what}" in errors


def test_ranks_with_other_instruction_sets_are_named(tmp_path: Path) -> None:
    words = [HERE / "faults.py", "none", 0, 0, tmp_path / "run"]
    other = "import os, runpy, sys; os.environ['NPLORA_ISA'] = 'generic'; sys.argv = sys.argv[1:]; "
    program = ["-c", f"{other}runpy.run_path(sys.argv[0], run_name='__main__')", *words]
    status, _, errors = run((1, words), (1, program))
    assert status != 0
    assert "rank 1 differs in instruction set: generic, but " in errors
