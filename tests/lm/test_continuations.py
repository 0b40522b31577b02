"""Scores of continuations, which share the computation of their prompt."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nplora.lm import LanguageModel, load_model
from nplora.models import continuations
from nplora.models.packing import pack
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

# Prompts of several lengths; continuations of one token, of several, and of both.
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [3, 4]]
CONTINUATIONS = [[[8], [9, 10]], [[4]], [[1, 2, 3, 4, 5], [6], [7, 8]], [[5], [6], [7]]]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf"))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def whole_sequence(lm: LanguageModel, prompt: list[int], tokens: list[int]) -> tuple[object, object]:
    """The same from the logits of the whole sequence."""
    logits = lm.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    rows = np.arange(len(tokens))
    return log_softmax(logits)[rows, tokens], logits.argmax(axis=-1) == tokens


@pytest.mark.parametrize("most_rows", [512, 3])
@pytest.mark.parametrize("most_cells", [2048, 12, 1])
def test_each_continuation_scores_as_in_the_whole_sequence(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, most_rows: int, most_cells: int
) -> None:
    monkeypatch.setattr("nplora.lm.language_model.MOST_ROWS", most_rows)
    monkeypatch.setattr(continuations, "_MOST_CELLS", most_cells)
    found = lm.continuation_scores(PROMPTS, CONTINUATIONS)
    for prompt, several, scores in zip(PROMPTS, CONTINUATIONS, found, strict=True):
        assert len(several) == len(scores)
        for tokens, score in zip(several, scores, strict=True):
            log_probs, is_top = whole_sequence(lm, prompt, tokens)
            np.testing.assert_allclose(score.log_probs, log_probs, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(score.is_top, is_top)


def test_the_most_likely_continuation_is_marked(lm: LanguageModel) -> None:
    prompt = [5, 6, 7]
    first = int(lm.logits(prompt)[-1].argmax())
    second = int(lm.logits([*prompt, first])[-1].argmax())
    [[likely, other]] = lm.continuation_scores([prompt], [[[first, second], [first, second + 1]]])
    assert likely.is_top.tolist() == [True, True]
    assert other.is_top.tolist() == [True, False]


def test_a_named_adapter_changes_the_scores(lm: LanguageModel) -> None:
    from nplora.adapters import Adapter

    other = load_model(lm.source)
    other.add_lora(rank=2, init="gaussian")
    lm.load_adapter(Adapter.from_model(other), "one")
    lm.set_adapter("one")
    try:
        [[found]] = lm.continuation_scores([[5, 6, 7]], [[[8, 9]]])
    finally:
        lm.set_adapter(None)
        lm.delete_adapter("one")
    expected, _ = whole_sequence(other, [5, 6, 7], [8, 9])
    np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=1e-5)
    assert abs(found.log_probs - lm.continuation_scores([[5, 6, 7]], [[[8, 9]]])[0][0].log_probs).max() > 1e-3


def test_int8_scores_a_few_tokens_at_a_time(tmp_path: Path) -> None:
    """With int8, products of more rows than a small batch would be computed in bfloat16."""
    lm = load_model(save_small_llama(tmp_path / "model.gguf", "q8_0"), compute="int8")
    found = lm.continuation_scores(PROMPTS, CONTINUATIONS)
    for prompt, several, scores in zip(PROMPTS, CONTINUATIONS, found, strict=True):
        for tokens, score in zip(several, scores, strict=True):
            ids = [*prompt, *tokens]
            labels = [-100] * len(prompt) + tokens
            expected = lm.token_scores(pack([(ids, labels)]))
            np.testing.assert_allclose(score.log_probs, expected.log_probs, rtol=0, atol=2e-2)


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_token_scores_agree_with_the_loss(tmp_path: Path, compute: str) -> None:
    lm = load_model(save_small_llama(tmp_path / "model.gguf", "q8_0"), compute=compute)
    batch = pack([([1, 2, 3, 4, 5, 6], [-100, 2, 3, 4, -100, 6]), ([7, 8], [7, 8])])
    scores = lm.token_scores(batch)
    assert len(scores.log_probs) == len(scores.is_top) == batch.num_targets == 5
    assert -scores.log_probs.mean() == pytest.approx(lm.loss_packed(batch), abs=1e-6)


def test_the_top_tokens_are_those_of_the_logits(lm: LanguageModel) -> None:
    ids = [5, 6, 7]
    tops = lm.logits(ids).argmax(axis=-1)
    batch = pack([(ids, [-100, tops[0], tops[1]]), (ids, [-100, tops[0] + 1, -100])])
    assert lm.token_scores(batch).is_top.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("prompts", "several", "message"),
    [
        ([[]], [[[1]]], r"a sequence has shape \(0,\), expected \(time,\) with at least 1 token"),
        ([[1]], [[[]]], r"a sequence has shape \(0,\), expected \(time,\) with at least 1 token"),
        ([[1]], [[]], "a prompt has no continuation, expected at least one"),
        ([[1]], [[[1_000_000]]], "token_ids"),
        (
            [[1], [2]],
            [[[3]]],
            "continuation_scores: continuations has 1 list, expected 2, one for each prompt",
        ),
        ([[1]], [], "continuation_scores: continuations has 0 lists, expected 1, one for each prompt"),
    ],
)
def test_a_bad_sequence_is_refused(
    lm: LanguageModel, prompts: list[list[int]], several: list[list[list[int]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lm.continuation_scores(prompts, several)


def test_questions_are_grouped_by_the_size_of_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        continuations.Question(np.array(prompt), [np.array(tokens) for tokens in several])
        for prompt, several in zip(PROMPTS, CONTINUATIONS, strict=True)
    ]
    # Slots: only continuations of more than one token need one. Lengths: without the last token.
    assert [(each.slots, each.computed) for each in questions] == [(1, 4), (1, 1), (2, 11), (1, 2)]
    parts = continuations._parts(questions, math.inf)
    monkeypatch.setattr(continuations, "_MOST_CELLS", 8)
    assert [len(group) for group in continuations._groups(parts)] == [2, 1, 1]
    monkeypatch.setattr(continuations, "_MOST_CELLS", 44)
    assert [len(group) for group in continuations._groups(parts)] == [3, 1]
