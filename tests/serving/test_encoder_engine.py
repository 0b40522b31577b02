"""EncoderEngine: failed and cancelled requests do not affect the others, and memory limits hold."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import signal
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.lm import Encoder
from nplora.platform.memory import current_memory
from nplora.serving import EncoderEngine, QueueFullError, encoder_engine
from nplora.serving.run import last_words
from small_encoder import WORDS, save_small_encoder
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

GOOD = [[2, 5, 6, 3]]
BAD = WORDS.index("late")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return nplora.load_encoder(save_small_encoder(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """An encoder with a token whose embedding is NaN."""
    directory = save_small_encoder(tmp_path_factory.mktemp("broken") / "model")
    tensors = nplora.formats.safetensors.open(directory / "model.safetensors")
    held = {name: tensors[name].numpy().copy() for name in tensors}
    held["embeddings.word_embeddings.weight"][BAD] = np.nan
    nplora.formats.safetensors.save(directory / "model.safetensors", held)
    return nplora.load_encoder(directory, check=False)


def finish(engine: EncoderEngine) -> None:
    while engine.step():
        pass


# ---- requests that fail ----


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[2, 31, 3]], "ids holds 31, expected integers from 0 to 30"),
        ([[2, -1, 3]], "ids holds -1, expected integers from 0 to 30"),
        ([[2, 3], [5] * 65], r"ids\[1\] has 65 tokens, expected at most 64"),
        ([[2, 3], [[5, 6]]], r"ids\[1\] has shape \(1, 2\)"),
    ],
)
def test_wrong_ids_are_refused_before_they_join_a_round(encoder: Encoder, ids: Any, message: str) -> None:
    engine = EncoderEngine(encoder)
    beside = engine.submit(GOOD)
    with pytest.raises(ValueError, match=message):
        engine.submit(ids)
    with pytest.raises(TypeError, match="expected integers"):
        engine.submit([[2.5, 3.0]])
    finish(engine)
    np.testing.assert_allclose(beside.result(0), encoder.embed_ids(GOOD), atol=1e-6)


def test_a_text_whose_values_are_nan_fails_alone(broken: Encoder) -> None:
    engine = EncoderEngine(broken)
    before, failed, after = (engine.submit(ids) for ids in (GOOD, [[2, 5, 3], [2, BAD, 3]], GOOD))
    finish(engine)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        failed.result(0)
    for future in (before, after):
        np.testing.assert_allclose(future.result(0), broken.embed_ids(GOOD), atol=1e-6)
    assert engine.metrics().finished == {"stop": 2, "error": 1}


def test_an_error_of_a_round_ends_only_the_request_that_causes_it(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Encoder.embed_ids

    def failing(self: Encoder, ids: Any, *args: Any, **named: Any) -> Any:
        if any(len(one) == 2 for one in ids):
            raise MemoryError("too little for this text")
        return compute(self, ids, *args, **named)

    engine = EncoderEngine(encoder)
    futures = [engine.submit(ids) for ids in (GOOD, [[2, 3]], GOOD, [[2, 3]])]
    monkeypatch.setattr(Encoder, "embed_ids", failing)
    finish(engine)
    errors = [future.exception(0) for future in futures]
    assert [type(error) for error in errors] == [type(None), MemoryError, type(None), MemoryError]
    assert errors[1] is not errors[3]
    np.testing.assert_allclose(futures[2].result(0), compute(encoder, GOOD), atol=1e-6)


# ---- requests that are cancelled, and requests that wait ----


def test_a_cancelled_request_leaves_the_queue_and_its_memory(encoder: Encoder) -> None:
    engine = EncoderEngine(encoder)
    ids = np.array([2, 5, 3])
    seen = weakref.ref(ids)
    first = engine.submit(GOOD)
    future = engine.submit([ids], client="b")
    many = engine.submit([[5] * 60] * 100, client="b")
    del ids
    assert len(engine._queue) == 3
    future.cancel()
    many.cancel()
    assert len(engine._queue) == 1
    gc.collect()
    assert seen() is None
    assert engine.metrics().waiting == 1
    first.cancel()
    assert not len(engine._queue)
    assert not engine.step()


def test_a_request_that_is_cancelled_after_its_first_part_is_not_computed_further(encoder: Encoder) -> None:
    engine = EncoderEngine(encoder)
    future = engine.submit([[5] * 60] * 100)
    assert engine.step()
    assert len(engine._queue) == 1
    future.cancel()
    assert not len(engine._queue)
    assert not engine.step()


def test_clients_take_turns_and_a_cancelled_request_does_not_use_a_turn(encoder: Encoder) -> None:
    engine, order = EncoderEngine(encoder), list[str]()
    futures = {}
    for name in ("a1", "a2", "a3", "b1", "b2"):
        futures[name] = engine.submit([[5] * 60] * 25, client=name[0])  # two parts
        futures[name].add_done_callback(lambda future, name=name: order.append(name))  # type: ignore[misc]
    futures["a1"].cancel()
    finish(engine)
    assert order == ["a1", "a2", "b1", "a3", "b2"]


def test_waiting_requests_have_a_limit_in_bytes(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_engine, "WAITING", 10_000)
    engine = EncoderEngine(encoder)
    large = engine.submit([[5] * 60] * 100)  # above the limit, but nothing else waits
    with pytest.raises(QueueFullError, match="10,000 bytes"):
        engine.submit(GOOD)
    large.cancel()
    assert engine.submit(GOOD) is not None
    finish(engine)


# ---- the end of an engine ----


def ends(function: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether a function returns within this time."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_an_engine_without_a_thread_closes_after_its_requests_or_its_timeout(encoder: Encoder) -> None:
    for timeout, cancelled in ((None, False), (60.0, False), (0.0, True)):
        engine = EncoderEngine(encoder)
        futures = [engine.submit(GOOD), engine.submit([[5] * 60] * 100), engine.submit([])]
        engine.close(timeout=timeout)
        assert [future.cancelled() for future in futures] == [cancelled, cancelled, False]
    engine = EncoderEngine(encoder)
    future = engine.submit(GOOD)
    engine.close(drain=False)
    assert future.cancelled()


@pytest.mark.parametrize("kind", [SystemExit, RuntimeError])
def test_an_error_in_a_round_ends_the_requests_and_the_engine_keeps_running(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    engine = EncoderEngine(encoder)
    usual, failures = engine._next_parts, [kind("a mistake")]

    def once() -> Any:
        if failures:
            raise failures.pop()
        return usual()

    monkeypatch.setattr(engine, "_next_parts", once)
    first = [engine.submit(GOOD), engine.submit([[5] * 60] * 100)]
    engine.start()
    for future in first:
        assert isinstance(future.exception(10), kind)
    np.testing.assert_allclose(engine.submit(GOOD).result(10), encoder.embed_ids(GOOD), atol=1e-6)
    assert ends(engine.close)
    assert engine.metrics().finished == {"error": 2, "stop": 1}


def test_a_request_without_texts_may_be_cancelled_while_it_is_submitted(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, admit = EncoderEngine(encoder), EncoderEngine._admit

    def cancelled(self: EncoderEngine, request: Any) -> None:
        admit(self, request)
        request.future.cancel()  # as `close(drain=False)` in another thread does

    monkeypatch.setattr(EncoderEngine, "_admit", cancelled)
    assert engine.submit([]).cancelled()


def test_the_memory_decides_how_long_a_text_may_be(tmp_path: Path) -> None:
    changes = {"llama.context_length": nplora.formats.gguf.Typed(1 << 20, "UINT32")}
    small = EncoderEngine(nplora.load_encoder(save_small_encoder(tmp_path / "small")))
    assert (small.context, small.longest) == (
        32,
        64,
    )  # of the files of sentence-transformers, of the positions
    lm = nplora.load_encoder(save_small_llama(tmp_path / "small.gguf", changes=changes), pooling="last")
    assert lm.max_length == 1 << 20
    short = EncoderEngine(lm, memory=current_memory() + (160 << 20))
    assert encoder_engine.ROUND < short.context < 1 << 20
    assert short.plan.total <= short.plan.process + (161 << 20)
    with pytest.raises(ValueError, match=f"expected at most {short.context:,}"):
        short.submit([np.full(short.context + 1, 5)])
    assert EncoderEngine(lm, memory="64G").context == 1 << 20


# ---- the server ----


def test_the_last_words_say_what_a_second_signal_waits_for(encoder: Encoder) -> None:
    engine = EncoderEngine(encoder)
    end = "Ctrl-C again ends the server when the current texts are done"
    assert last_words(engine, 30, signal.SIGINT) == f"stopping; {end}"
    engine.submit(GOOD)
    assert last_words(engine, 30, signal.SIGINT) == f"stopping: waiting at most 30 s for 1 answer; {end}"
    assert "answer; a second signal ends the server when" in last_words(engine, 30, signal.SIGTERM)


@pytest.mark.parametrize(("longest", "reason"), [(8, "the server has memory for"), (64, "the model reads")])
def test_a_text_that_is_too_long_is_refused_or_cut(encoder: Encoder, longest: int, reason: str) -> None:
    most = min(longest, encoder.max_length)
    with served(encoder, longest) as ask:
        for text in ("a " * 40, [5] * 40):
            status, answer = ask(input=text)
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert f"more than {most} tokens, the most that {reason}" in answer["error"]["message"]
            status, answer = ask(input=text, truncate_prompt_tokens=-1)
            assert (status, answer["usage"]["prompt_tokens"]) == (200, most)
            status, answer = ask(input=text, truncate_prompt_tokens=5)
            assert (status, answer["usage"]["prompt_tokens"]) == (200, 5)
        for wrong in (0, -2, most + 1):
            status, answer = ask(input=text, truncate_prompt_tokens=wrong)
            assert (status, answer["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_a_token_that_the_model_lacks_is_an_error_of_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = save_small_encoder(tmp_path / "model")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = len(WORDS)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with served(nplora.load_encoder(directory)) as ask:
        status, answer = ask(input=["a cat", "beyond"])
        assert (status, answer["error"]["code"]) == (500, "model_error")
        assert "the tokenizer has a token with id 31" in answer["error"]["message"]
        assert ask(input=["a cat"])[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def served(encoder: Encoder, longest: int | None = None) -> Iterator[Callable[..., tuple[int, Any]]]:
    """A server. Yields a function that asks /v1/embeddings: fields to the status and the answer."""
    pytest.importorskip("uvicorn")
    import live_server

    from nplora.serving.api.app import Application
    from nplora.serving.api.models import Models
    from nplora.serving.api.service import EncoderService
    from nplora.serving.served_encoder import ServedEncoder, read_adapter

    model = ServedEncoder(encoder)
    with EncoderEngine(model) as engine:
        if longest is not None:
            engine.plan = dataclasses.replace(engine.plan, longest=longest)
        app = Application(EncoderService(engine, Models(model, "base", read=read_adapter)))
        with live_server.running(app) as url:

            def ask(**fields: Any) -> tuple[int, Any]:
                try:
                    with urllib.request.urlopen(
                        f"{url}/v1/embeddings", json.dumps(fields).encode()
                    ) as answer:
                        return answer.status, json.load(answer)
                except urllib.error.HTTPError as error:
                    with error:
                        return error.code, json.load(error)

            yield ask
