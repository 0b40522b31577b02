"""Generation: the choice of tokens against plain oracles and transformers, and how answers end."""

import dataclasses
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_models
from nplora.lm import LanguageModel
from nplora.lm.generation import (
    Sampling,
    StopText,
    choose,
    generate,
    keep_top_k,
    keep_top_p,
    penalise,
    penalise_repetition,
    softmax,
    stream,
    stream_all,
)
from nplora.tokenizer import Tokenizer, from_gguf
from vocabularies import byte_level, opened, sentencepiece

pytest.importorskip("tokenizers")

CHATML = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"


class Echo:
    """A model whose next token follows from its last two, as a table of random numbers has it."""

    def __init__(self, tokenizer: Tokenizer, context: int = 10_000, never: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.config = types.SimpleNamespace(
            max_position_embeddings=context,
            vocab_size=tokenizer.vocab_size,
            rope=types.SimpleNamespace(longest_short=math.inf),
        )
        self.never = list(never)
        self.calls: list[tuple[int, int]] = []

    def scores(self, ids: Sequence[int]) -> Any:
        found = np.random.default_rng([7, *ids[-2:]]).standard_normal(self.tokenizer.vocab_size) * 3
        found[self.never] = -np.inf
        return found.astype(np.float32)

    def new_cache(self, slots: int, capacity: int) -> Any:
        limits = np.full(slots, capacity)
        self.cache = types.SimpleNamespace(ids=[[] for _ in range(slots)], capacity=capacity, limits=limits)
        return self.cache

    def decode(self, token_ids: Any, slots: Any, cache: Any) -> Any:
        ids = np.asarray(token_ids)
        ids = ids[:, None] if ids.ndim == 1 else ids
        self.calls.append(ids.shape)
        for row, slot in zip(ids.tolist(), slots, strict=True):
            cache.ids[slot] += row
            assert len(cache.ids[slot]) <= cache.capacity
        return np.stack([self.scores(cache.ids[slot]) for slot in slots])


@pytest.fixture
def tokenizer() -> Tokenizer:
    return from_gguf(opened(byte_level() | {"tokenizer.chat_template": CHATML}))


@pytest.fixture
def lm(tokenizer: Tokenizer) -> Echo:
    return Echo(tokenizer)


def by_hand(lm: Echo, prompt: str, count: int) -> str:
    ids = lm.tokenizer.encode_prompt(prompt)
    start = len(ids)
    while len(ids) < start + count:
        token = int(lm.scores(ids).argmax())
        if token in lm.tokenizer.eos_ids:
            break
        ids.append(token)
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True)


# ---- answers ----


def test_the_most_likely_tokens_follow_until_the_end(lm: Echo) -> None:
    prompts = ["hello", "x", "12 12", "zz"]
    for count in (1, 7, 300):
        expected = [by_hand(lm, prompt, count) for prompt in prompts]
        assert generate(lm, prompts, Sampling(max_new_tokens=count)) == expected
        assert [generate(lm, [prompt], Sampling(max_new_tokens=count))[0] for prompt in prompts] == expected


def test_answers_end_at_every_end_token(tokenizer: Tokenizer) -> None:
    lm = Echo(tokenizer)
    lm.scores = lambda ids: np.eye(tokenizer.vocab_size)[0 if len(ids) > 4 else 40]  # type: ignore[method-assign]
    assert generate(lm, ["ab"]) == [tokenizer.decode([40] * 3)]
    assert tokenizer.eos_ids == {0}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3, "seed": 2}])
def test_rows_that_fill_up_an_embedding_are_never_chosen(
    options: dict[str, Any], tokenizer: Tokenizer
) -> None:
    whole, padded = Echo(tokenizer), Echo(tokenizer)
    padded.scores = lambda ids: np.append(whole.scores(ids), [50.0, np.nan])  # type: ignore[method-assign]
    sampling = Sampling(max_new_tokens=30, **options)
    assert generate(padded, ["hello", "x"], sampling) == generate(whole, ["hello", "x"], sampling)


def test_a_batch_is_one_call_for_each_token(lm: Echo) -> None:
    lm.never = [0]
    generate(lm, ["a", "bc", "def"], Sampling(max_new_tokens=5))
    assert lm.calls == [(1, 1), (1, 2), (1, 3)] + [(3, 1)] * 4


def test_a_long_prompt_is_read_in_pieces(lm: Echo) -> None:
    prompt = "abcdefg" * 200
    assert generate(lm, [prompt], Sampling(max_new_tokens=3)) == [by_hand(lm, prompt, 3)]
    assert lm.calls[:4] == [(1, 512), (1, 512), (1, 320), (1, 56)]  # the rest behind the last page is apart


def test_the_context_ends_an_answer(tokenizer: Tokenizer) -> None:
    lm = Echo(tokenizer, context=10, never=[0])
    with pytest.warns(
        UserWarning, match="generate: the text ends after 4 tokens because .* context of 10 is full"
    ):
        assert generate(lm, ["abcdef"]) == [by_hand(lm, "abcdef", 4)]
    assert lm.calls == [(1, 6)] + [(1, 1)] * 3
    generate(lm, ["abcdef"], Sampling(max_new_tokens=4))  # as many as were asked for: nothing is to be told
    with pytest.raises(
        ValueError, match=r"the prompt has 10 tokens, expected fewer than 10 \(the model's context"
    ):
        generate(lm, ["abcdefghij"])
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(lm, ["abc", ""])
    lm.config.vocab_size = 265
    with pytest.raises(
        ValueError, match=r"^generate: the prompt has token 265 of .* vocabulary ends with 264$"
    ):
        generate(lm, ["abc", "<tool>"])


@pytest.mark.parametrize(
    "prompt", [3, None, b"bytes", bytearray(b"bytes"), np.array("1+1="), {"role": "user"}, [3]]
)
def test_what_is_no_prompt_is_named(prompt: Any, lm: Echo, tmp_path: Path) -> None:
    def words(named: Any) -> str:
        return f"^generate: prompt is {re.escape(repr(named))}, expected a text or a chat"

    with pytest.raises(TypeError, match=words(prompt)):
        generate(lm, [prompt])
    model = small_models.load(tmp_path)
    model._tokenizer = lm.tokenizer
    with pytest.raises(TypeError, match=words(prompt[0] if isinstance(prompt, list) else prompt)):
        model.generate(prompt)


def test_an_unknown_option_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"generate: unexpected keyword 'max_tokens'; did you mean max_new"):
        small_models.load(tmp_path).generate("a", max_tokens=3)


def test_the_keywords_of_generate_are_the_fields_of_sampling() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Sampling)}
    overloads = typing.get_overloads(LanguageModel.generate)
    for function in (LanguageModel.generate, *overloads):
        parameters = list(inspect.signature(function).parameters.values())[2:]
        assert {p.name: p.default for p in parameters if p.name not in ("unknown", "adapters")} == fields
    assert [inspect.signature(function).return_annotation for function in overloads] == ["str", "list[str]"]


def test_nothing_is_asked_of_the_model_where_nothing_is_wanted(lm: Echo) -> None:
    assert generate(lm, []) == []
    assert generate(lm, ["a", "b"], Sampling(max_new_tokens=0)) == ["", ""]
    assert not lm.calls


def test_a_chat_goes_through_the_template(lm: Echo) -> None:
    chat = [{"role": "user", "content": "hello"}]
    assert generate(lm, [chat], Sampling(max_new_tokens=5)) == [by_hand(lm, "user:hello>", 5)]


def test_pieces_make_up_the_answer_and_come_while_it_is_made(lm: Echo) -> None:
    lm.never = [0]
    sampling = Sampling(max_new_tokens=200)
    pieces = list(stream(lm, "hello", sampling))
    assert "".join(pieces) == generate(lm, ["hello"], sampling)[0]
    assert len(pieces) > 50
    first = stream(lm, "hello", sampling)
    lm.calls.clear()
    next(first)
    assert len(lm.calls) < 10
    texts = ["", ""]
    for index, piece in stream_all(lm, ["hello", "x"], sampling):
        texts[index] += piece
    assert texts == generate(lm, ["hello", "x"], sampling)


def test_a_space_between_prompt_and_answer_is_kept() -> None:
    tokenizer = from_gguf(opened(sentencepiece()))
    answer = tokenizer.encode("a ab")  # "▁a", "▁ab"
    lm = Echo(tokenizer)

    def scores(ids: Sequence[int]) -> Any:
        step = len(ids) - len(tokenizer.encode_prompt("nb"))
        return np.eye(tokenizer.vocab_size)[[*answer, tokenizer.eos_id][step]]

    lm.scores = scores  # type: ignore[method-assign]
    assert generate(lm, ["nb"]) == [" a ab"]


def test_nan_scores_are_an_error(lm: Echo) -> None:
    lm.scores = lambda ids: np.full(266, np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the scores for the token at position 1 are NaN"):
        generate(lm, ["a"])


# ---- stop texts ----


def fed(stop: Sequence[str], pieces: Sequence[str]) -> Iterator[str]:
    finder = StopText(stop)
    for piece in pieces:
        yield finder.push(piece)
    yield finder.flush()


@pytest.mark.parametrize("stop", [["\n\n"], ["END", "EN"], ["aab"], ["é"], [], ["x", "yx"]])
def test_an_answer_ends_before_the_first_stop_text_however_it_is_cut(stop: list[str]) -> None:
    for text in ("one\n\ntwo", "the END", "the E N D EN", "aaaab", "aaa", "café", "", "axyx", "ayxb", "E"):
        places = [place for word in stop if (place := text.find(word)) >= 0]
        expected = text[: min(places, default=len(text))]
        for cut in range(len(text) + 1):
            assert "".join(fed(stop, [text[:cut], text[cut:]])) == expected
        assert "".join(fed(stop, list(text))) == expected


def test_text_is_held_back_no_longer_than_it_must(lm: Echo) -> None:
    assert list(fed(["END"], ["aE", "N", "Ex", "EN"])) == ["a", "", "ENEx", "", "EN"]
    whole = by_hand(lm, "hello", 60)
    stop = whole[20:23]
    answer = generate(lm, ["hello"], Sampling(max_new_tokens=60, stop=(stop,)))[0]
    assert answer == whole[: whole.index(stop)]
    begun = (whole[-2:] + "!",)  # an answer that ends while a stop text may be coming
    assert generate(lm, ["hello"], Sampling(max_new_tokens=60, stop=begun))[0] == whole
    lm.calls.clear()
    generate(lm, ["hello"], Sampling(max_new_tokens=60, stop=(stop,)))
    calls = len(lm.calls)
    lm.calls.clear()
    generate(lm, ["hello"], Sampling(max_new_tokens=60))
    assert calls < len(lm.calls)


# ---- the choice of a token ----


def test_the_same_seed_gives_the_same_text_in_any_batch(lm: Echo) -> None:
    lm.never = [0]
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=5)
    both = generate(lm, ["hello", "hello"], sampling)
    assert both == generate(lm, ["hello", "hello"], sampling)
    assert both[0] != both[1]  # each prompt has a stream of its own
    assert generate(lm, ["hello"], sampling)[0] == both[0]
    assert generate(lm, ["hello"], Sampling(max_new_tokens=20, temperature=1.0, seed=6))[0] != both[0]


@pytest.mark.slow
def test_tokens_come_as_often_as_their_share(rng: np.random.Generator) -> None:
    scores = np.array([0.0, 1.0, 2.0, -np.inf, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        sampling = Sampling(temperature=temperature)
        drawn = [choose(scores, [], sampling, rng) for _ in range(20_000)]
        found = np.bincount(drawn, minlength=5) / len(drawn)
        deviation = np.sqrt(expected * (1 - expected) / len(drawn))
        assert np.all(np.abs(found - expected) <= 5 * deviation)


def test_narrow_choices_are_the_most_likely_token(rng: np.random.Generator) -> None:
    scores = rng.standard_normal(100)
    for sampling in (
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1e-6),
    ):
        assert {choose(scores, [], sampling, rng) for _ in range(20)} == {int(scores.argmax())}


def test_a_token_without_any_share_never_comes() -> None:
    lowest = types.SimpleNamespace(random=lambda: 0.0)
    assert choose(np.array([-np.inf, 0.0, 1.0]), [], Sampling(temperature=1.0), lowest) == 1  # type: ignore[arg-type]


HIGHEST = types.SimpleNamespace(random=lambda: 1 - 2**-53)  # the largest number that a generator draws
EXTREMES = [5e-324, 1e-308, 1e-300, 1e-30, 1.0, 1e30, 1e308]


@pytest.mark.parametrize("narrowed", [{}, {"top_k": 3}, {"top_p": 1e-300}, {"top_p": 1.0}])
@pytest.mark.parametrize(
    "scores", [[1.0, 3.0, -np.inf, 2.0, -4.0], [-1e38, -3e38, -np.inf], [1e308, -1e308, -np.inf, 0.0]]
)
def test_extreme_options_choose_a_token_that_has_a_share(
    narrowed: dict[str, Any], scores: list[float]
) -> None:
    lowest = types.SimpleNamespace(random=lambda: 0.0)
    for temperature, penalty in itertools.product(EXTREMES, EXTREMES):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty, **narrowed)
        for before, draw in itertools.product(([], [0, 2], range(len(scores))), (lowest, HIGHEST)):
            token = choose(np.array(scores), before, sampling, draw)  # type: ignore[arg-type]
            assert 0 <= token < len(scores)
            assert scores[token] > -np.inf


def test_a_temperature_near_zero_takes_the_most_likely_token_as_zero_does() -> None:
    scores = np.array([1.0, 3.0, 2.0])
    for temperature in (5e-324, 1e-308, 1e-3):
        assert choose(scores, [], Sampling(temperature=temperature), HIGHEST) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [[0.0, np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_without_a_finite_largest_one_are_an_error(scores: list[float], temperature: float) -> None:
    with pytest.raises(FloatingPointError, match=r"the largest score for the token at position 2 is -?inf"):
        choose(np.array(scores), [0, 1], Sampling(temperature=temperature), HIGHEST)  # type: ignore[arg-type]


def test_penalties_and_biases_change_the_scores_as_openai_documents_them(rng: np.random.Generator) -> None:
    """score - count · frequency_penalty - (count > 0) · presence_penalty, only of generated tokens."""
    scores = rng.standard_normal(20)
    prompt, generated = [1, 2, 2, 3], [4, 5, 4, 4, 6]
    sampling = Sampling(presence_penalty=0.7, frequency_penalty=-0.3, logit_bias={4: 1.5, 7: -2.0, 99: 5.0})
    expected = scores.copy()
    expected[4] += 1.5 + 3 * 0.3 - 0.7
    expected[[5, 6]] += 0.3 - 0.7
    expected[7] -= 2
    found = scores.copy()
    penalise(found, prompt + generated, sampling, len(prompt))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert choose(scores, prompt + generated, sampling, rng, len(prompt)) == expected.argmax()


def test_a_bias_of_minus_infinity_rules_a_token_out(rng: np.random.Generator) -> None:
    scores = np.array([1.0, 3.0, 2.0])
    for temperature in (0.0, 1.0, 1e308):
        sampling = Sampling(temperature=temperature, logit_bias={1: -np.inf})
        assert 1 not in {choose(scores, [], sampling, rng) for _ in range(50)}
    with pytest.raises(ValueError, match="logit_bias rules out every token"):
        choose(scores, [], Sampling(logit_bias=dict.fromkeys(range(3), -np.inf)), rng)


def test_the_likeliest_token_with_biases_is_that_of_the_biased_scores() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scores = rng.integers(-3, 4, 12).astype(np.float32)  # many are equal
        tokens = rng.permutation(14)[: rng.integers(1, 6)].tolist()
        biases = {token: float(rng.choice([-np.inf, -2, -1, 0, 0.5, 1, 2])) for token in tokens}
        wanted = scores.astype(np.float64)
        for token, bias in biases.items():
            if token < len(wanted):
                wanted[token] += bias
        assert choose(scores, [], Sampling(logit_bias=biases), rng) == int(wanted.argmax())


@pytest.mark.parametrize("penalty", [1e308, -1e308])
def test_extreme_penalties_still_choose_a_token(penalty: float) -> None:
    sampling = Sampling(temperature=1.0, presence_penalty=penalty, frequency_penalty=penalty)
    for before in ([], [0, 2, 2], [0, 1, 2, 3]):
        token = choose(np.array([1.0, 3.0, -np.inf, 2.0]), before, sampling, HIGHEST)  # type: ignore[arg-type]
        assert token in (0, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presence_penalty": np.nan}, "presence_penalty is nan, expected a finite number"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1', expected a number"),
        ({"logit_bias": {1: np.inf}}, "logit_bias of token 1 is inf"),
        ({"logit_bias": {-1: 0.0}}, "a token of logit_bias is -1"),
        ({"logit_bias": {"a": 0.0}}, "a token of logit_bias is 'a'"),
        ({"logit_bias": 3}, "logit_bias is 3, expected a mapping"),
    ],
)
def test_bad_penalties_and_biases_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(**options)


def test_scores_stay_as_they_are(rng: np.random.Generator) -> None:
    scores = rng.standard_normal(10).astype(np.float32)
    before = scores.copy()
    choose(scores, [1, 2], Sampling(temperature=1.0, top_k=2, repetition_penalty=2.0), rng)
    assert np.array_equal(scores, before)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_ruled_out_is_what_transformers_rules_out(seed: int) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(500) * 4
    before = rng.integers(0, 500, 40).tolist()
    ids, rows = torch.tensor([before]), torch.tensor(scores[None])
    for k in (1, 3, 50, 500, 900):
        ours = scores.copy()
        keep_top_k(ours, k)
        assert np.array_equal(ours, process.TopKLogitsWarper(k)(ids, rows)[0].numpy())
    for p in (0.01, 0.3, 0.9, 0.999, 1.0):
        ours = scores.copy()
        keep_top_p(ours, p)
        theirs = process.TopPLogitsWarper(p)(ids, rows)[0].numpy()
        assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    for penalty in (0.5, 1.2, 3.0):
        ours = scores.copy()
        penalise_repetition(ours, before, penalty)
        theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, rows)[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-15)


def test_ties_and_zeros_are_kept_and_one_token_always_is() -> None:
    scores = np.array([1.0, 3.0, 3.0, 2.0])
    keep_top_k(scores, 1)
    assert np.isfinite(scores).tolist() == [False, True, True, False]
    scores = np.array([5.0, 5.0])
    keep_top_p(scores, 1e-17)
    assert np.isfinite(scores).sum() == 1
    assert softmax(np.array([1000.0, -np.inf])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0},
        {"stop": "END"},
        {"stop": ("",)},
        {"stop": None},
        {"stop": iter(["END"])},
        {"seed": -1},
        {"seed": True},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="generate: "):
        Sampling(**options)


def test_narrowing_greedy_choices_warns_that_it_has_no_effect() -> None:
    for options, names in (
        ({"top_p": 0.95}, "top_p has"),
        ({"top_k": 5, "top_p": 0.5}, "top_k and top_p have"),
    ):
        with pytest.warns(UserWarning, match=f"^generate: {names} no effect at temperature 0, "):
            Sampling(**options)
    for options in ({"top_k": 1, "top_p": 1.0}, {"top_p": 0.9, "temperature": 0.1}):  # no warning
        Sampling(**options)


def test_each_sequence_of_a_batch_may_become_as_long_as_alone(lm: Echo) -> None:
    """LongRoPE rotates by that length, so a long prompt must not change the answer to a short one."""
    prompts = ["ab", "abc " * 10]
    counts = [len(lm.tokenizer.encode_prompt(prompt)) for prompt in prompts]
    generate(lm, prompts, Sampling(max_new_tokens=4))
    assert lm.cache.limits.tolist() == [count + 4 for count in counts]
    lm.config.max_position_embeddings = counts[1] + 2
    with pytest.warns(UserWarning, match="context"):
        generate(lm, prompts, Sampling(max_new_tokens=4))
    assert lm.cache.limits.tolist() == [counts[0] + 4, counts[1] + 2]
