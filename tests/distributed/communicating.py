"""Checks of MPICommunicator on its ranks: `python communicating.py CHECK`."""

import os
import sys
import time
import warnings
from typing import Any

import numpy as np

import nplora
from nplora import get_num_threads, set_num_threads
from nplora.distributed import MPICommunicator


class Pickled:
    """Counts how often it is made into bytes."""

    times = 0

    def __reduce__(self) -> Any:
        Pickled.times += 1
        return Pickled, ()


def pickle_once() -> None:
    with MPICommunicator(share_cores=False) as ranks:
        ranks.broadcast(Pickled() if ranks.rank == 0 else None)
        assert Pickled.times == (ranks.rank == 0), Pickled.times
        ranks.gather(Pickled())
        assert Pickled.times == 1 + (ranks.rank == 0), Pickled.times
        large = ranks.broadcast(np.arange(3_000_000) if ranks.rank == 0 else None)
        assert large[-1] == 2_999_999


def threads() -> None:
    set_num_threads(2)
    with MPICommunicator() as ranks:
        assert ranks.size == 1 or get_num_threads() == 1
    assert get_num_threads() == 2


def crowded() -> None:
    """Each rank runs as many threads as there are cores: rank 0 warns once, for all ranks of the machine."""
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(cores)
    set_num_threads(cores)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MPICommunicator() as ranks:
            assert get_num_threads() == cores
    words = (
        f"the ranks on {os.uname().nodename} run {2 * cores} threads on {cores} cores, so they wait for each"
    )
    messages = [str(one.message) for one in caught]
    assert len(messages) == (ranks.rank == 0), messages
    assert all(words in text and "or a smaller OMP_NUM_THREADS" in text for text in messages), messages


def many() -> None:
    for _ in range(2100):  # MPICH has room for 2,048
        with MPICommunicator():
            pass


def travel() -> None:
    """Rows arrive while the ranks compute, and call no method of the communicator."""
    size, columns = 3, 2_000_000  # far more than MPI sends without the help of the receiver
    with MPICommunicator(share_cores=False) as ranks:
        for turn in range(2):
            parts = np.arange(size)[:, None] + np.full((size, columns), 10.0 * ranks.rank + 100 * turn)
            outs = [np.zeros((size, columns)) for _ in range(2)]
            ranks.start_exchange(parts, outs[0], range(size))
            ranks.start_exchange(parts, outs[1], [0, 2])
            wanted = 10 * np.arange(size) + ranks.rank + 100 * turn
            deadline = time.monotonic() + 60
            while any((out[[0, 2]] != wanted[[0, 2], None]).any() for out in outs):
                assert time.monotonic() < deadline, "nothing arrives"
            ranks.gather(turn, "while rows of others may travel")
            ranks.wait_for_exchanges()
            assert (outs[0] == wanted[:, None]).all()
            assert (outs[1][1] == 0).all() or ranks.rank == 1
            ranks.join(np.full(columns, float(ranks.rank)), outs[0])
            assert (outs[0] == np.arange(size)[:, None]).all()


def fail_while_rows_travel(failing: str) -> None:
    """Some ranks fail after an exchange has started; the others come to it before, later or never."""
    with MPICommunicator(share_cores=False, timeout=20) as ranks:
        parts, out = np.ones((3, 500_000)), np.zeros((3, 500_000))
        if failing == "all" or ranks.rank == 1:
            ranks.start_exchange(parts, out, range(3))
            raise MemoryError("no memory for a test")
        if failing == "one, and the others come later":
            time.sleep(0.3)
        if failing == "one, and the others do not come":
            ranks.gather(1, "another place")
        ranks.start_exchange(parts, out, range(3))
        time.sleep(0.3)
        ranks.wait_for_exchanges()


def elsewhere() -> None:
    with MPICommunicator(share_cores=False) as ranks:
        ranks.gather(1, "the first place" if ranks.rank != 1 else "the second place")


def beside_a_fit() -> None:
    with MPICommunicator(share_cores=False) as ranks:
        if ranks.rank:
            model = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
            trainer = nplora.Trainer(model, "mse", accumulate=2, progress=False, communicator=ranks)
            trainer.fit(np.eye(4), np.eye(4))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    globals()[sys.argv[1]](*sys.argv[2:])
