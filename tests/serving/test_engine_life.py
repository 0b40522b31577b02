"""The end of requests and engines: errors, cancellations and closing. Afterwards, nothing stays in memory."""

import asyncio
import gc
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engines import engine_with, prompt, small

from nplora.adapters import Adapter
from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE, Sampling, generate_ids
from nplora.serving import Chunk, Engine, Ticket

pytest.importorskip("tokenizers")

ENDLESS = {0: -np.inf}  # the end token is never chosen


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small(tmp_path_factory.mktemp("life"))


def ends(function: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether a function returns within this time."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def small_adapter(directory: Path, seed: int = 0) -> Adapter:
    lm, rng = small(directory), np.random.default_rng(seed)
    lm.add_lora(targets="q_proj,v_proj", rank=2)
    for parameter in lm.parameters():
        parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
    return Adapter.from_model(lm)


class Failing:
    """A guide that raises an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def restrict(self, scores: Any) -> None:
        raise self.error

    def advance(self, token: int) -> None:
        pass


# ---- errors ----


@pytest.mark.parametrize("error", [asyncio.CancelledError("gone"), SystemExit(3), RuntimeError("broken")])
def test_an_error_of_a_guide_ends_its_request_only(lm: LanguageModel, error: BaseException) -> None:
    with Engine(lm) as engine:
        bad = engine.submit([5, 6, 7], guide=Failing(error))
        good = engine.submit([5, 6], Sampling(max_new_tokens=20))
        texts = list[str]()
        assert ends(lambda: texts.append(good.text()))
        assert texts == generate_ids(lm, [[5, 6]], Sampling(max_new_tokens=20))
        assert bad.finish_reason == "error"
        assert bad.error is error


@pytest.mark.parametrize("kind", [SystemExit, RuntimeError])
def test_an_error_in_a_round_ends_the_requests_and_the_engine_keeps_running(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    engine = Engine(lm)
    usual, failures = engine._scheduler.round, [kind("a mistake")]

    def once() -> bool:
        if engine.busy and failures:
            raise failures.pop()
        return usual()

    monkeypatch.setattr(engine._scheduler, "round", once)
    with engine:
        ticket = engine.submit([5, 6])
        assert ends(lambda: list_of(ticket))
        assert ticket.finish_reason == "error"
        later = engine.submit([5, 6], Sampling(max_new_tokens=3))
        assert ends(later.text)
        assert later.finish_reason in ("stop", "length")


def list_of(ticket: Ticket) -> None:
    """Wait for the end of a ticket."""
    with pytest.raises(BaseException, match="a mistake"):
        list(ticket)


def test_a_dead_thread_does_not_stop_the_waiting_ones(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm)
    monkeypatch.setattr(engine, "_serve", lambda: None)
    engine.start()
    assert engine._thread is not None
    engine._thread.join()
    assert ends(engine.submit([5, 6], Sampling(max_new_tokens=3)).text)
    engine.submit([5, 6], Sampling(max_new_tokens=3))
    assert ends(engine.close)


def test_scores_that_are_nan_end_their_request_only(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, usual = Engine(lm), LanguageModel.decode
    bad, good = engine.submit([5, 6, 7]), engine.submit([5, 6], Sampling(max_new_tokens=9))

    def decode(self: LanguageModel, ids: Any, slots: Any, cache: Any) -> Any:
        rows = usual(self, ids, slots, cache)
        rows[np.asarray(slots) == 0] = np.nan  # the slot of the request that came first
        return rows

    expected = generate_ids(lm, [[5, 6]], Sampling(max_new_tokens=9))
    monkeypatch.setattr(LanguageModel, "decode", decode)
    assert [good.text()] == expected
    with pytest.raises(FloatingPointError, match="NaN"):
        bad.text()


def test_a_request_that_fails_in_a_batch_does_not_end_the_others(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, usual, sampling = (
        Engine(lm),
        LanguageModel.decode,
        Sampling(max_new_tokens=20, logit_bias=ENDLESS),
    )
    prompts = [[5, 6, 7], [5, 6], [8, 9]]
    expected = generate_ids(lm, prompts, sampling)
    tickets = [engine.submit(ids, sampling) for ids in prompts]

    def decode(self: LanguageModel, ids: Any, slots: Any, cache: Any) -> Any:
        if any(slot == 1 and cache.lengths[slot] >= 5 for slot in slots):
            raise MemoryError("no memory for slot 1")
        return usual(self, ids, slots, cache)

    monkeypatch.setattr(LanguageModel, "decode", decode)
    assert (tickets[0].text(), tickets[2].text()) == (expected[0], expected[2])
    with pytest.raises(MemoryError, match="slot 1"):
        tickets[1].text()


# ---- listeners ----


@pytest.mark.filterwarnings("ignore:Engine. a ticket's listener failed")
@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("threaded", [True, False])
def test_a_listener_may_not_close_its_engine(lm: LanguageModel, drain: bool, threaded: bool) -> None:
    engine, errors = Engine(lm), list[str]()

    def close(chunk: Chunk | None) -> None:
        try:
            engine.close(drain)
        except RuntimeError as error:
            errors.append(str(error))
            raise

    bad, good = (engine.submit(ids, Sampling(max_new_tokens=30, logit_bias=ENDLESS)) for ids in ([5, 6], [7]))
    bad.listen(close)
    if threaded:
        engine.start()
    assert ends(good.text)
    assert errors == [
        "Engine.close: a listener, guide or turn called this method during a round, and would wait forever"
    ]
    assert (bad.finish_reason, good.finish_reason) == ("cancelled", "length")
    assert ends(engine.close)


@pytest.mark.filterwarnings("ignore:Engine. a ticket's listener failed")
@pytest.mark.parametrize("threaded", [True, False])
def test_a_listener_may_not_wait_for_another_answer(lm: LanguageModel, threaded: bool) -> None:
    engine, errors = Engine(lm), list[str]()
    sampling = Sampling(max_new_tokens=6, logit_bias=ENDLESS)
    bad, good = engine.submit([5, 6, 7], sampling), engine.submit([5, 6], sampling)

    def wait(chunk: Chunk | None) -> None:
        try:
            good.text()
        except RuntimeError as error:
            errors.append(str(error))
            raise

    bad.listen(wait)
    if threaded:
        engine.start()
    texts = list[str]()
    assert ends(lambda: texts.append(good.text()))
    assert texts == generate_ids(lm, [[5, 6]], sampling)
    assert bad.finish_reason == "cancelled"
    assert len(errors) == 1
    engine.close()


def test_a_listener_runs_without_the_lock_of_its_ticket(lm: LanguageModel) -> None:
    engine, seen = Engine(lm), list[bool]()
    ticket = engine.submit([5, 6], Sampling(max_new_tokens=5, logit_bias=ENDLESS))

    def touch() -> None:
        with ticket._changed:
            pass

    ticket.listen(lambda chunk: seen.append(ends(touch, 2)))
    while engine.step():
        pass
    assert seen
    assert all(seen)


@pytest.mark.parametrize("error", [OSError("gone"), asyncio.CancelledError("gone")])
def test_a_listener_that_fails_for_earlier_chunks_cancels_the_request(
    lm: LanguageModel, error: BaseException
) -> None:
    engine = Engine(lm)
    ticket = engine.submit([5, 6, 7], Sampling(max_new_tokens=50, logit_bias=ENDLESS))
    for _ in range(3):
        engine.step()

    def fails(chunk: Chunk | None) -> None:
        raise error

    with pytest.warns(UserWarning, match="a ticket's listener failed and is not called again"):
        ticket.listen(fails)
    while engine.step():
        pass
    assert ticket.finish_reason == "cancelled"
    assert ticket.usage.generated < 10


@pytest.mark.slow
def test_chunks_keep_their_order_while_a_listener_joins(lm: LanguageModel) -> None:
    """The first chunks come from the thread that listens, and the engine's thread adds more meanwhile."""
    sampling = Sampling(max_new_tokens=200, logit_bias=ENDLESS, temperature=1.0)  # few tokens twice
    with Engine(lm) as engine:
        ticket, heard, done = engine.submit([5, 6, 7], sampling), list[Chunk | None](), threading.Event()
        while ticket.usage.generated < 20:
            pass

        def slow(chunk: Chunk | None) -> None:
            if threading.current_thread() is threading.main_thread():
                threading.Event().wait(0.005)
            heard.append(chunk)
            if chunk is None:
                done.set()

        ticket.listen(slow)
        assert done.wait(10)
    assert heard.index(None) == len(heard) - 1
    assert "".join(chunk.text for chunk in heard if chunk) == generate_ids(lm, [[5, 6, 7]], sampling)[0]


@pytest.mark.parametrize("threaded", [True, False])
def test_a_listener_that_fails_ends_only_its_request_if_warnings_are_errors(
    lm: LanguageModel, threaded: bool
) -> None:
    engine, sampling = Engine(lm), Sampling(max_new_tokens=6, logit_bias=ENDLESS)

    def fails(chunk: Chunk | None) -> None:
        raise OSError("gone")

    bad, last, good = (engine.submit(ids, sampling) for ids in ([5, 6, 7], [8, 9], [5, 6]))
    bad.listen(fails)
    last.listen(lambda chunk: fails(chunk) if chunk is None else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if threaded:
            engine.start()
        texts = list[str]()
        assert ends(lambda: texts.append(good.text()))
        assert ends(engine.close)
    assert texts == generate_ids(lm, [[5, 6]], sampling)
    assert (bad.finish_reason, last.finish_reason, good.finish_reason) == ("cancelled", "length", "length")
    assert not engine.busy


def test_an_interrupt_in_a_listener_leaves_no_request_behind(lm: LanguageModel) -> None:
    engine = Engine(lm)
    ticket = engine.submit([5, 6], Sampling(max_new_tokens=1))

    def interrupted(chunk: Chunk | None) -> None:
        if chunk is None:
            raise KeyboardInterrupt

    ticket.listen(interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.busy
    assert engine.metrics().finished == {ticket.finish_reason: 1}


def test_closing_ends_if_a_round_finds_nothing_to_do(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm)
    ticket = engine.submit([5, 6])
    monkeypatch.setattr(engine._scheduler, "round", lambda: False)
    assert ends(engine.close)
    assert ticket.finish_reason == "cancelled"


# ---- queue and pages ----


def test_requests_with_a_common_beginning_run_together(lm: LanguageModel) -> None:
    """The shared pages count once: 5 pages, and one more for each of the six requests."""
    rng, sampling = np.random.default_rng(0), Sampling(max_new_tokens=20, logit_bias=ENDLESS)
    system, engine = prompt(rng, 5 * PAGE), engine_with(lm, pages=18, max_requests=6)
    for _ in range(2):  # the beginning is unknown, and then it is kept
        prompts = [system + prompt(rng, 5) for _ in range(6)]
        tickets = [engine.submit(ids, sampling) for ids in prompts]
        engine.step()
        assert engine.metrics().running == 6
        assert [ticket.text() for ticket in tickets] == generate_ids(lm, prompts, sampling)
    assert engine.metrics().put_back == 0


def test_cancelled_requests_do_not_fill_the_queue(lm: LanguageModel) -> None:
    engine = Engine(lm, max_requests=1, max_waiting=1)
    tickets = [engine.submit([5]), engine.submit([6])]
    for ticket in tickets:
        ticket.cancel()
    assert engine.metrics().waiting == 0
    assert (
        engine.submit([7], Sampling(max_new_tokens=2)).text()
        == generate_ids(lm, [[7]], Sampling(max_new_tokens=2))[0]
    )
    assert [ticket.finish_reason for ticket in tickets] == ["cancelled"] * 2
    assert not engine.busy


def test_a_ticket_exists_until_its_request_is_looked_up(lm: LanguageModel) -> None:
    """A new ticket may get the address of a ticket that is gone."""
    engine, exists = Engine(lm), list[bool]()
    tickets = [engine.submit([5]), engine.submit([6])]
    for ticket in (*tickets, tickets[0]):  # the second time, the request of the first ticket has ended
        ticket.cancel()
    first = weakref.ref(ticket)
    del ticket
    tickets.clear()

    class Requests(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            exists.append(first() is not None)
            return super().get(key, default)

    engine._requests = Requests(engine._requests)
    while engine.step():
        pass
    assert exists == [True] * 3
    assert first() is None


@pytest.mark.slow
def test_a_request_of_higher_priority_keeps_its_pages(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(1), Sampling(max_new_tokens=3 * PAGE, logit_bias=ENDLESS)
    engine = engine_with(lm, pages=6, max_requests=2)
    prompts = [prompt(rng, 2 * PAGE), prompt(rng, PAGE)]
    low = engine.submit(prompts[0], sampling)
    engine.step()
    high = engine.submit(prompts[1], sampling, priority=5)
    while high.finish_reason is None:
        engine.step()
    assert low.finish_reason is None
    assert engine.metrics().put_back > 0
    assert [low.text(), high.text()] == generate_ids(lm, prompts, sampling)


# ---- memory ----


def test_a_deleted_adapter_is_not_built_again_for_waiting_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, built = small(tmp_path), list[Adapter]()
    lm.load_adapter(small_adapter(tmp_path), "x")
    engine, usual = Engine(lm, max_requests=2), LanguageModel.with_adapter
    sampling = Sampling(max_new_tokens=4)
    tickets = [engine.submit([5, 6, token], sampling, adapter="x") for token in range(1, 8)]

    def with_adapter(self: LanguageModel, adapter: Adapter, **options: Any) -> LanguageModel:
        built.append(adapter)
        return usual(self, adapter, **options)

    monkeypatch.setattr(LanguageModel, "with_adapter", with_adapter)
    lm.delete_adapter("x")
    for ticket in tickets:
        ticket.text()
        assert ticket.finish_reason in ("stop", "length")
    assert not built


def test_deleted_adapters_leave_the_memory(tmp_path: Path) -> None:
    lm = small(tmp_path)
    adapter, engine, gone = small_adapter(tmp_path), Engine(lm), list[weakref.ref[Any]]()
    for round in range(3):
        names = [f"{round} {number}" for number in range(2)]
        for name in names:
            lm.load_adapter(adapter, name)
            gone += [weakref.ref(lm.adapters[name]), weakref.ref(lm.named_model(name))]
        tickets = [engine.submit([5, 6], Sampling(max_new_tokens=3), adapter=name) for name in names]
        for ticket in tickets:
            ticket.text()
        for name in names:
            lm.delete_adapter(name)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 12


def test_closing_frees_the_keys_and_values(lm: LanguageModel) -> None:
    engine = Engine(lm)
    ticket = engine.submit([5, 6], Sampling(max_new_tokens=3))
    ticket.text()
    cache = weakref.ref(engine._scheduler._cache)
    engine.close()
    assert cache() is None
    assert engine.metrics().finished == {ticket.finish_reason: 1}
    assert not engine.step()
    engine.close()


def test_the_error_of_a_ticket_does_not_keep_the_keys_and_values(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: LanguageModel, ids: Any, slots: Any, cache: Any) -> Any:
        raise MemoryError("too little")

    monkeypatch.setattr(LanguageModel, "decode", decode)
    engine = Engine(lm)
    ticket = engine.submit([5, 6, 7])
    while engine.step():
        pass
    cache = weakref.ref(engine._scheduler._cache)
    engine.close()
    assert cache() is None
    assert ticket.error is not None
    assert traceback.extract_tb(ticket.error.__traceback__)[-1].name == "decode"


def test_a_ticket_that_has_ended_holds_neither_engine_nor_listener(lm: LanguageModel) -> None:
    engine = Engine(lm)
    heard, ticket = list[Chunk | None](), engine.submit([5, 6], Sampling(max_new_tokens=3))

    def listener(chunk: Chunk | None) -> None:
        heard.append(chunk)

    ticket.listen(listener)
    while engine.step():
        pass
    references = weakref.ref(listener), weakref.ref(engine)
    del listener, engine
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert heard[-1] is None
    ticket.cancel()
    assert ticket.text() == ""


# ---- numbers and messages ----


def test_a_prompt_that_is_a_text_is_refused_with_what_to_do(lm: LanguageModel) -> None:
    for ids in ("Hello", b"Hello", [1.5], 7, ["a"]):
        with pytest.raises(TypeError, match=r"Engine.submit: ids is .*, expected integers \(.*encode_prompt"):
            Engine(lm).submit(ids)  # type: ignore[arg-type]


def test_waiting_for_a_turn_is_not_computing(lm: LanguageModel) -> None:
    class Slow:
        def __enter__(self) -> None:
            threading.Event().wait(0.2)

        def __exit__(self, *error: object) -> None:
            pass

    engine = Engine(lm, turn=Slow())
    engine.submit([5, 6], Sampling(max_new_tokens=2, logit_bias=ENDLESS)).text()
    assert engine.metrics().compute_seconds < 0.4


def test_a_request_for_no_tokens_is_counted(lm: LanguageModel) -> None:
    engine = Engine(lm)
    assert engine.submit([5, 6], Sampling(max_new_tokens=0)).finish_reason == "length"
    assert engine.metrics().finished == {"length": 1}
    assert engine.metrics().request_seconds.count == 1


def test_hashing_a_prompt_does_not_hold_the_lock(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from nplora.serving import engine as module

    engine, free = Engine(lm), list[bool]()
    usual = module.Request

    def request(*arguments: Any, **options: Any) -> Any:
        free.append(ends(engine.metrics, 2))
        return usual(*arguments, **options)

    monkeypatch.setattr(module, "Request", request)
    engine.submit([5, 6])
    assert free == [True]
