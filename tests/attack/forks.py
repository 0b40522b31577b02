"""Forks while other threads work. The child must be able to do the same work without waiting for a lock."""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nplora
from attack.case import Case
from attack.child import wait
from small_llama import save_small_llama

FORKS = 30  # of each kind
THREADS = 2
SECONDS = 10.0  # a child that takes longer counts as hanging
CHAT = [{"role": "user", "content": "hello 123"}]


def fork_beside(work: Callable[[], object]) -> int:
    """Fork while threads do the work. Each child does it too. Returns the number of forks."""
    over = threading.Event()
    expected = work()

    def again_and_again() -> None:
        while not over.is_set():
            work()

    threads = [threading.Thread(target=again_and_again) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        for number in range(FORKS):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = int(work() != expected)
                finally:
                    os._exit(status)
            status = wait(pid, SECONDS)
            assert status == 0, f"child {number} ended with {status}"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return FORKS


def cases(room: Path) -> Iterator[Case]:
    lm = nplora.load_model(save_small_llama(room / "model.gguf"))
    text = "hello 123 " * 200
    ids = lm.tokenizer.encode(text)
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: lm.tokenizer.encode(text),
        "decode": lambda: [lm.tokenizer.decode(ids[:n]) for n in range(1, 40)],
        "render a chat": lambda: lm.tokenizer.apply_chat_template(CHAT),
        "generate": lambda: lm.generate("hello", max_new_tokens=3),
    }
    for name, work in works.items():
        yield Case("forks beside threads", name, partial(fork_beside, work))
