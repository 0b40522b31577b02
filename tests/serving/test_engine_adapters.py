"""The engine with adapters: each text is that of the model with its adapter alone."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engines import engine_with, prompt, small

from nplora.adapters import Adapter
from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE, Sampling, generate_ids
from nplora.serving import Engine

pytest.importorskip("tokenizers")

SAMPLING = Sampling(max_new_tokens=15)
CALL = (5, 9)
SETTINGS: dict[str, dict[str, Any]] = {
    "few": {"targets": "q_proj", "rank": 2, "layers": "last:1"},
    "all": {"targets": "all-linear", "rank": 3},
    "more": {"targets": "all-linear", "rank": 8, "use_rslora": True},
    "activated": {"targets": "q_proj,k_proj,v_proj", "rank": 4, "invocation": CALL},
}


def adapter_of(directory: Path, name: str, seed: int = 0) -> Adapter:
    lm, rng = small(directory), np.random.default_rng(seed)
    lm.add_lora(**SETTINGS[name])
    for parameter in lm.parameters():
        parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
    return Adapter.from_model(lm)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("adapters")
    lm = small(directory)
    for name in SETTINGS:
        lm.load_adapter(adapter_of(directory, name), name)
    return lm


def alone(lm: LanguageModel, ids: list[int], name: str | None, sampling: Sampling = SAMPLING) -> str:
    """The text of the model with one adapter, without other requests."""
    lm.set_adapter(name)
    try:
        return generate_ids(lm, [ids], sampling)[0]
    finally:
        lm.set_adapter(None)


@pytest.mark.slow
def test_requests_with_different_adapters_are_computed_together(lm: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    names = [None, *SETTINGS, None, "all", "activated"]
    prompts = [prompt(rng, length) for length in (5, 70, 130, 20, 64, 9, 200, 3)]
    prompts[4][10:12], prompts[4][40:42], prompts[7] = CALL, CALL, [4, *CALL]
    expected = [alone(lm, ids, name) for ids, name in zip(prompts, names, strict=True)]
    assert len(set(expected)) == len(expected)
    for slots in (1, 3, 8):
        engine = Engine(lm, max_requests=slots)
        tickets = [
            engine.submit(ids, SAMPLING, adapter=name) for ids, name in zip(prompts, names, strict=True)
        ]
        assert [ticket.text() for ticket in tickets] == expected


def test_a_beginning_is_shared_only_with_the_same_adapter(lm: LanguageModel) -> None:
    rng, engine = np.random.default_rng(1), Engine(lm)
    system = prompt(rng, 2 * PAGE)
    for name in (None, "all", "more"):
        for cached in (0, 2 * PAGE):
            ids = system + prompt(rng, 9)
            ticket = engine.submit(ids, SAMPLING, adapter=name)
            assert ticket.text() == alone(lm, ids, name)
            assert ticket.usage.cached == cached


def test_pages_of_an_activated_adapter_are_shared_if_it_acts_alike(lm: LanguageModel) -> None:
    """The invocation tokens behind a page decide whether the adapter acts inside the page."""
    rng, engine = np.random.default_rng(2), Engine(lm)
    system = [one if one not in CALL else 6 for one in prompt(rng, 3 * PAGE)]
    system[PAGE + 5 : PAGE + 7] = CALL
    inside, behind = system + prompt(rng, 5), [*system, *CALL, 7]
    for ids, cached in ((inside, 0), (behind, PAGE), (inside, 3 * PAGE), (behind, 3 * PAGE)):
        ticket = engine.submit(ids, SAMPLING, adapter="activated")
        assert ticket.text() == alone(lm, ids, "activated")
        assert ticket.usage.cached == cached


def test_an_adapter_that_takes_the_name_of_another_shares_nothing_with_it(tmp_path: Path) -> None:
    lm, rng = small(tmp_path), np.random.default_rng(3)
    lm.load_adapter(adapter_of(tmp_path, "all", 1), "name")
    engine, ids = Engine(lm), prompt(rng, 2 * PAGE + 5)
    before = alone(lm, ids, "name")
    assert engine.submit(ids, SAMPLING, adapter="name").text() == before
    waiting = engine.submit(ids, SAMPLING, adapter="name")
    running = engine.submit(ids, SAMPLING, adapter="name")
    engine.step()
    lm.delete_adapter("name")
    with pytest.raises(KeyError, match="no adapter 'name'"):
        engine.submit(ids, adapter="name")
    lm.load_adapter(adapter_of(tmp_path, "all", 2), "name")
    other = engine.submit(ids, SAMPLING, adapter="name")
    assert (waiting.text(), running.text()) == (before, before)
    assert other.text() == alone(lm, ids, "name") != before
    assert other.usage.cached == 0


def test_what_is_neither_a_name_nor_a_copy_of_the_model_is_refused(tmp_path: Path) -> None:
    """Requests are computed together, so another model would compute requests of other clients."""
    adapter, lm, other, ids = adapter_of(tmp_path, "all", 1), small(tmp_path), small(tmp_path), [5, 6, 7]
    for one in (lm, other):
        one.load_adapter(adapter, "name")
    engine = Engine(lm)
    words = r"^Engine\.submit: adapter is an? \w+, expected a name, or a model that lm\.named_model returned$"
    for wrong in (3, lm.adapters["name"]):
        with pytest.raises(TypeError, match=words):
            engine.submit(ids, adapter=wrong)  # type: ignore[arg-type]
    for model in (other, other.named_model("name")):
        with pytest.raises(ValueError, match=r"adapter is a copy of another model"):
            engine.submit(ids, adapter=model)
    for same, name in ((lm, None), (lm.named_model("name"), "name")):
        assert engine.submit(ids, SAMPLING, adapter=same).text() == alone(lm, ids, name)


@pytest.mark.slow
def test_deleted_adapters_leave_the_memory(tmp_path: Path) -> None:
    lm, rng = small(tmp_path), np.random.default_rng(5)
    engine, ids, held = Engine(lm, max_requests=1), prompt(rng, 5), []
    for number in range(6):
        name = f"adapter {number}"
        lm.load_adapter(adapter_of(tmp_path, "few", number), name)
        held.append(weakref.ref(lm.adapters[name]))
        engine.submit(ids, Sampling(max_new_tokens=2), adapter=name).text()
        lm.delete_adapter(name)
    gc.collect()
    assert [ref() for ref in held] == [None] * 6


@pytest.mark.slow
def test_a_deleted_adapter_leaves_the_memory_while_another_request_runs(tmp_path: Path) -> None:
    lm, rng = small(tmp_path), np.random.default_rng(6)
    engine, held = Engine(lm, max_requests=4), []
    long = Sampling(max_new_tokens=100, logit_bias={0: -np.inf})
    ids, short = prompt(rng, 5), Sampling(max_new_tokens=2)
    running, expected = engine.submit(ids, long), alone(lm, ids, None, long)
    lm.load_adapter(adapter_of(tmp_path, "all", 0), "stays")
    for number in range(6):
        name = f"adapter {number}"
        lm.load_adapter(adapter_of(tmp_path, "few", number), name)
        held.append(weakref.ref(lm.named_model(name)))
        tickets = [engine.submit(ids, short, adapter=one) for one in (name, "stays")]
        assert [one.text() for one in tickets] == [alone(lm, ids, one, short) for one in (name, "stays")]
        lm.delete_adapter(name)
        engine.step()
        gc.collect()
        assert held[-1]() is None
        assert engine._scheduler._cache.joint is not None  # the other models stay joined
    assert running.finish_reason is None
    assert running.text() == expected


@pytest.mark.slow
def test_random_adapters_joins_and_cancellations_lose_nothing(lm: LanguageModel) -> None:
    rng = np.random.default_rng(4)
    systems = [prompt(rng, n) for n in (0, PAGE, 2 * PAGE + 30)]
    engine = engine_with(lm, pages=14, max_requests=5)
    requests = []
    for _ in range(40):
        ids = systems[rng.integers(3)] + prompt(rng, int(rng.integers(1, 60)))
        name = [None, *SETTINGS][rng.integers(5)]
        sampling = Sampling(max_new_tokens=int(rng.integers(1, 40)))
        ticket = engine.submit(ids, sampling, adapter=name, client=str(rng.integers(3)))
        requests.append((ticket, ids, sampling, name))
        for _ in range(rng.integers(4)):
            engine.step()
        if rng.random() < 0.2:
            requests[rng.integers(len(requests))][0].cancel()
    while engine.step():
        pass
    for ticket, ids, sampling, name in requests:
        text, whole = "".join(chunk.text for chunk in ticket), alone(lm, ids, name, sampling)
        assert whole.startswith(text) if ticket.finish_reason == "cancelled" else text == whole
    assert engine.metrics().pages_used == 0
