"""Chats of several turns: answers equal those of `lm.generate`, and earlier turns are not computed again."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import adapters
from nplora.formats.gguf import Typed
from nplora.lm import LanguageModel
from nplora.serving import Chunk, Conversation, Engine, Ticket
from small_llama import save_small_llama

SAMPLING = nplora.generate.Sampling(max_new_tokens=5)
LONG = "hello hello 123 " * 40  # more than a page of tokens


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    model = nplora.load_model(save_small_llama(path, changes={"llama.context_length": Typed(512, "UINT32")}))
    other = nplora.load_model(path)
    other.add_lora(rank=2, targets="all-linear")
    rng = np.random.default_rng(3)
    for layer in other.adapter_layers().values():
        layer.A[...] = rng.standard_normal(layer.A.shape)
    model.load_adapter(adapters.Adapter.from_model(other), "loud")
    return model


def test_each_answer_is_that_of_generate_for_the_whole_chat(lm: LanguageModel) -> None:
    with Engine(lm) as engine:
        chat = Conversation(engine, SAMPLING, system="hello")
        for text in ("one", "two", "three"):
            expected = lm.generate([*chat.messages, {"role": "user", "content": text}], max_new_tokens=5)
            assert "".join(chat.ask(text)) == expected
            assert chat.messages[-2:] == [
                {"role": "user", "content": text},
                {"role": "assistant", "content": expected},
            ]
        assert chat.messages[0] == {"role": "system", "content": "hello"}


def test_earlier_turns_are_not_computed_again(lm: LanguageModel) -> None:
    with Engine(lm) as engine:
        chat = Conversation(engine, SAMPLING)
        list(chat.ask(LONG))
        assert chat.usage is not None
        before = chat.usage.prompt
        list(chat.ask("and?"))
        assert chat.usage.cached >= before // 64 * 64 > 0
        chat.system = "hello"
        list(chat.ask("and?"))
        assert chat.usage.cached == 0


def test_an_adapter_answers_from_the_next_turn_on(lm: LanguageModel) -> None:
    with Engine(lm) as engine:
        chat = Conversation(engine, SAMPLING)
        plain = "".join(chat.ask(LONG))
        chat.adapter = "loud"
        chat.reset()
        loud = "".join(chat.ask(LONG))
        assert chat.usage is not None
        assert chat.usage.cached == 0
    assert loud != plain
    lm.set_adapter("loud")
    try:
        assert loud == lm.generate([{"role": "user", "content": LONG}], max_new_tokens=5)
    finally:
        lm.set_adapter(None)


def test_a_chat_is_encoded_with_the_tokens_of_its_own_adapter(lm: LanguageModel) -> None:
    """Whatever adapter the calling thread has selected."""
    other, question = nplora.load_model(lm.source), [{"role": "user", "content": "one <step>"}]
    other.add_lora(rank=2, targets="q_proj", add_tokens="<step>")
    lm.load_adapter(adapters.Adapter.from_model(other), "steps")
    lengths: dict[str | None, int] = {None: len(lm.tokenizer.encode_chat(question, True))}
    try:
        lm.set_adapter("steps")
        lengths["steps"] = len(lm.tokenizer.encode_chat(question, True))
        assert lengths["steps"] < lengths[None]
        for selected in (None, "steps"):
            lm.set_adapter(selected)
            with Engine(lm) as engine:
                for adapter, length in lengths.items():
                    chat = Conversation(engine, SAMPLING, adapter=adapter)
                    list(chat.ask("one <step>"))
                    assert chat.usage is not None
                    assert chat.usage.prompt == length
    finally:
        lm.set_adapter(None)
        lm.delete_adapter("steps")


def test_a_turn_keeps_the_adapter_whose_tokens_encoded_it(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another adapter takes the name before the request is submitted."""
    other, submit = nplora.load_model(lm.source), Engine.submit
    other.add_lora(rank=2, init="gaussian", add_tokens="<step>")
    lm.load_adapter(adapters.Adapter.from_model(other), "steps")

    def replaced(*arguments: Any, **options: Any) -> Any:
        lm.load_adapter(lm.adapters["loud"], "steps", replace=True)
        return submit(*arguments, **options)

    monkeypatch.setattr(Engine, "submit", replaced)
    with Engine(lm) as engine:
        answer = "".join(Conversation(engine, SAMPLING, adapter="steps").ask("one <step>"))
    lm.delete_adapter("steps")
    assert answer == other.generate([{"role": "user", "content": "one <step>"}], max_new_tokens=5)


def test_a_stopped_answer_stays_in_the_chat_as_far_as_it_came(lm: LanguageModel) -> None:
    with Engine(lm) as engine:
        chat = Conversation(engine, nplora.generate.Sampling(max_new_tokens=400))
        pieces = chat.ask("one")
        begun = next(pieces)
        pieces.close()
        assert chat.finish_reason == "cancelled"
        assert chat.turns[1]["content"].startswith(begun)
        assert len(chat.turns[1]["content"]) < 400
        assert "".join(chat.ask("two"))
        assert len(chat.turns) == 4


def test_an_answer_that_was_generated_but_not_read_to_its_end_is_cancelled(lm: LanguageModel) -> None:
    expected = lm.generate([{"role": "user", "content": "one"}], max_new_tokens=20)
    with Engine(lm) as engine:
        chat = Conversation(engine, nplora.generate.Sampling(max_new_tokens=20))
        pieces = chat.ask("one")
        begun = next(pieces)
        while engine.busy:
            time.sleep(0.001)
        pieces.close()
    assert begun != expected
    assert chat.turns[1]["content"] == begun
    assert chat.finish_reason == "cancelled"


def test_an_answer_without_text_that_is_cancelled_leaves_the_chat_as_it_was(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(ticket: Ticket) -> Iterator[Chunk]:
        yield Chunk("")  # the text is held back: it may be the beginning of a stop text
        raise kind

    monkeypatch.setattr(Ticket, "__iter__", chunks)
    for kind, reason in ((KeyboardInterrupt, "cancelled"), (MemoryError, "error")):
        with Engine(lm) as engine:
            chat = Conversation(engine, SAMPLING)
            with pytest.raises(kind):
                list(chat.ask("one"))
        assert (chat.turns, chat.finish_reason) == ([], reason)


def test_a_question_with_an_empty_answer_stays_in_the_chat(lm: LanguageModel) -> None:
    end = next(iter(lm.tokenizer.eos_ids))
    with Engine(lm) as engine:
        chat = Conversation(engine, nplora.generate.Sampling(max_new_tokens=5, logit_bias={end: 1e6}))
        assert list(chat.ask("one")) == []
        assert chat.finish_reason == "stop"
        assert chat.turns == [{"role": "user", "content": "one"}, {"role": "assistant", "content": ""}]


def test_a_message_that_fails_leaves_the_chat_as_it_was(lm: LanguageModel) -> None:
    with Engine(lm) as engine:
        chat = Conversation(engine, SAMPLING)
        list(chat.ask("one"))
        before = list(chat.turns)
        with pytest.raises(ValueError, match="the prompt has"):
            list(chat.ask("x" * 700))
        chat.adapter = "gone"
        with pytest.raises(KeyError, match="gone"):
            list(chat.ask("two"))
        assert chat.turns == before


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    lm = nplora.load_model(save_small_llama(tmp_path / "m.gguf"))
    lm.tokenizer.chat_template = None
    with Engine(lm) as engine, pytest.raises(ValueError, match="no chat template"):
        next(Conversation(engine).ask("hello"))
