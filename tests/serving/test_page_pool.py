"""The pool of pages and the queue: against plain models of what they should do."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from nplora.serving.fair_queue import FairQueue
from nplora.serving.page_pool import PagePool, page_keys


def test_pages_are_shared_kept_and_reused_in_order() -> None:
    pool = PagePool(3)
    first, second = pool.new(), pool.new()
    assert first is not None
    assert second is not None
    pool.publish(first, b"1")
    pool.publish(second, b"2")
    assert pool.share(b"1") == first
    pool.release([first, second])
    assert (pool.available, pool.kept) == (2, 1)  # a free one, and the second; the first has another user
    pool.release([first])
    assert (pool.available, pool.kept) == (3, 2)
    assert pool.new() not in (first, second)
    assert pool.new() == second  # it was released first
    assert pool.has(b"1")
    assert not pool.has(b"2")
    assert pool.share(b"1") == first
    assert pool.new() is None


def test_of_one_sequence_the_last_pages_go_first() -> None:
    pool = PagePool(3)
    pages = [page for _ in range(3) if (page := pool.new()) is not None]
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.release(pages)
    assert [pool.new() for _ in range(3)] == pages[::-1]


def test_a_pool_under_random_use_gives_no_page_twice() -> None:
    rng, pool = np.random.default_rng(0), PagePool(10)
    users: list[list[int]] = []
    content: dict[bytes, int] = {}
    for step in range(3000):
        used = Counter(page for pages in users for page in pages)
        assert pool.available == 10 - len(used)
        match rng.integers(4):
            case 0:
                page = pool.new()
                assert (page is None) == (len(used) == 10)
                if page is not None:
                    assert page not in used
                    users.append([page])
                    content = {key: held for key, held in content.items() if held != page}
                    if rng.random() < 0.7:
                        key = str(step).encode()
                        pool.publish(page, key)
                        content[key] = page
            case 1 if content:
                key = list(content)[rng.integers(len(content))]
                assert pool.share(key) == content[key]
                users.append([content[key]])
            case _ if users:
                pool.release(users.pop(rng.integers(len(users))))
    for key, page in content.items():
        assert pool.share(key) == page


def test_a_key_stands_for_all_tokens_before_and_for_the_adapter() -> None:
    ids = list(range(10))
    keys = list(page_keys("a", ids, 4))
    assert len(keys) == 2
    assert keys == list(page_keys("a", [*ids[:8], 99], 4))
    assert keys[0] == next(page_keys("a", [*ids[:4], 7, 7, 7, 7], 4))
    changed = list(page_keys("a", [5, *ids[1:]], 4))
    others = [
        *keys,
        *changed,
        *page_keys("b", ids, 4),
        *page_keys("a", ids, 4, 0),
        *page_keys("a", ids, 4, 3),
    ]
    assert len(set(others)) == len(others)
    late = list(page_keys("a", ids, 4, 5))  # an activated LoRA that acts from position 5 on
    assert late[0] == keys[0]
    assert late[1] != keys[1]


@dataclass(eq=False)
class Item:
    client: str
    priority: int = 0
    started: int | None = None


def order_of(queue: FairQueue[Item]) -> list[Item]:
    found = []
    while (item := queue.first()) is not None:
        assert queue.take(item)
        found.append(item)
    return found


def test_clients_take_turns_and_requests_that_come_back_are_first_of_their_priority() -> None:
    queue = FairQueue[Item]()
    a, b, c = [Item("a") for _ in range(3)], [Item("b") for _ in range(2)], [Item("c", priority=1)]
    back = [Item("a", started=4), Item("b", started=2)]
    for item in (*a, *b, *c, *back):
        queue.push(item)
    assert len(queue) == 8
    assert order_of(queue) == [c[0], back[1], back[0], a[0], b[0], a[1], b[1], a[2]]
    assert len(queue) == 0


def test_a_request_that_passes_its_turn_stays_the_first_of_its_client() -> None:
    queue = FairQueue[Item]()
    a, b = [Item("a") for _ in range(2)], [Item("b") for _ in range(2)]
    for item in (*a, *b):
        queue.push(item)
    queue.pass_turn(b[0])  # it is not the first one
    assert queue.first() is a[0]
    queue.pass_turn(a[0])
    assert order_of(queue) == [b[0], a[0], b[1], a[1]]


def test_among_requests_that_come_back_the_priority_decides_first() -> None:
    queue = FairQueue[Item]()
    low, high, older = Item("a", 0, started=1), Item("a", 5, started=9), Item("b", 5, started=3)
    new, between = Item("c", 5), Item("c", 2)
    for item in (low, between, high, new, older):
        queue.push(item)
    assert order_of(queue) == [older, high, new, between, low]


@pytest.mark.parametrize("gone", range(5))
def test_a_request_that_leaves_the_queue_changes_nothing_for_the_others(gone: int) -> None:
    queue = FairQueue[Item]()
    items = [Item("a"), Item("a"), Item("b"), Item("b"), Item("c")]
    for item in items:
        queue.push(item)
    assert queue.remove(items[gone])
    assert not queue.remove(items[gone])
    assert not queue.take(items[gone])
    a1, a2, b1, b2, c1 = items
    orders = [a2, b1, c1, b2], [a1, b1, c1, b2], [a1, b2, c1, a2], [a1, b1, c1, a2], [a1, b1, a2, b2]
    assert order_of(queue) == orders[gone]
