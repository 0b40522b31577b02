"""Preference objectives: data, derivatives, the reference, and runs. test_trl.py compares them with TRL."""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import cli
from nplora.finetuning import FinetuneOptions, finetune, plan
from nplora.finetuning.data.batches import TokenBatches
from nplora.finetuning.data.comparisons import PairDataset
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.objective_options import LOSS_TYPES
from nplora.finetuning.objectives import objective_of, reference
from nplora.finetuning.objectives.pairs import PairLoss
from nplora.finetuning.objectives.preference_losses import Dpo, Kto, odds_ratio
from nplora.formats import files, gguf, safetensors
from nplora.formats.errors import CorruptError, DataError, UnsafeError
from nplora.formats.run_files import REFERENCE
from nplora.lm import LanguageModel, load_model
from nplora.models.packing import IGNORED, pack
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer import Callback
from nplora.trainer.evaluation import evaluate
from nplora.trainer.fingerprint import is_same_base
from nplora.trainer.history import History, StepRecord
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]
OBJECTIVES = ["dpo", "orpo", "kto"]
WITH_REFERENCE = ["dpo", "kto"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def lm(model: Path) -> LanguageModel:
    return load_model(model)


PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)} for n in range(14)]
HELD_OUT = [{"prompt": f"{n}-{n}=", "chosen": "0", "rejected": str(n)} for n in range(1, 5)]
QUICK: dict[str, Any] = {"rank": 2, "lr": 1e-2, "batch_examples": 4, "epochs": 2, "save_every": 2}


def read(lm: LanguageModel, rows: Any, objective: str = "dpo", length: int = 64, **options: Any) -> Any:
    chosen = FinetuneOptions(objective=objective, **options)
    return objective_of(chosen).read(
        "finetune", sources_of("finetune", rows), lm.tokenizer, chosen.reading(length)
    )


def text_of(lm: LanguageModel, labelled: tuple[Array, Array]) -> tuple[str, str]:
    """The text of a sequence, and the part that is trained."""
    ids, labels = labelled
    return lm.tokenizer.decode(ids), lm.tokenizer.decode(labels[labels != IGNORED])


# ---- data ----


def test_a_pair_is_the_prompt_with_both_answers_the_chosen_first(lm: LanguageModel) -> None:
    dataset = read(lm, [{"prompt": "1+1=", "chosen": "2", "rejected": "33"}, *PAIRS])
    assert [text_of(lm, side) for side in dataset[0]] == [
        ("1+1=2<|end|>", "2<|end|>"),
        ("1+1=33<|end|>", "33<|end|>"),
    ]
    batch, answers = dataset.batch(np.array([0, 2]))
    assert len(batch.starts) == 5
    np.testing.assert_array_equal(answers.is_answer, batch.targets != IGNORED)
    report = dataset.report
    assert report.examples == len(dataset) == 15
    assert report.tokens == dataset.lengths.sum() == sum(len(ids) for pair in dataset for ids, _ in pair)
    assert report.learned == dataset.targets.sum()
    assert "(preference): 15 pairs, " in str(report)
    assert dataset.targets.tolist() == [dataset.batch(np.array([i]))[0].num_targets for i in range(15)]


def test_orpo_also_learns_the_chosen_text_with_its_prompt(lm: LanguageModel) -> None:
    pairs, learned = read(lm, PAIRS), read(lm, PAIRS, "orpo")
    (batch, answers), (plain, _) = learned.batch(np.arange(3)), pairs.batch(np.arange(3))
    np.testing.assert_array_equal(batch.ids, plain.ids)
    np.testing.assert_array_equal(answers.is_answer, plain.targets != IGNORED)
    lengths, counts = np.diff(batch.starts), np.add.reduceat(batch.targets != IGNORED, batch.starts[:-1])
    assert counts[::2].tolist() == (lengths[::2] - 1).tolist()
    assert (
        counts[1::2].tolist() == np.add.reduceat(plain.targets != IGNORED, plain.starts[:-1])[1::2].tolist()
    )
    assert learned.targets.tolist() == [learned.batch(np.array([i]))[0].num_targets for i in range(14)]


def test_answers_are_cut_and_pairs_without_a_difference_are_left_out(lm: LanguageModel) -> None:
    rows = [
        {"prompt": "abc", "chosen": "defghij", "rejected": "x"},  # cut
        {"prompt": "abcdefghijkl", "chosen": "m", "rejected": "x"},  # the prompt fills the length
        {"prompt": "abc", "chosen": "defgh1", "rejected": "defgh2"},  # the same after the cut
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    dataset = read(lm, rows, length=8)
    assert (dataset.report.examples, dataset.report.truncated, dataset.report.emptied) == (2, 1, 2)
    assert text_of(lm, dataset[0][0]) == ("abcdefgh", "defgh")
    with pytest.raises(DataError, match=r"data, row 1: 11 tokens, expected at most 8"):
        read(lm, rows, length=8, strict=True)


def test_judged_answers_come_from_their_own_rows_or_from_pairs(lm: LanguageModel) -> None:
    judged = [
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "a", "completion": "b", "label": False},
    ]
    dataset = read(lm, judged, "kto")
    assert [(text_of(lm, dataset[i][:2]), dataset[i][2]) for i in range(2)] == [
        (("1+1=2<|end|>", "2<|end|>"), True), (("ab<|end|>", "b<|end|>"), False),
    ]  # fmt: skip
    unpaired = read(lm, PAIRS[:2], "kto")
    assert [unpaired[i][2] for i in range(4)] == [True, False, True, False]
    assert "(kto): 2 answers, " in str(dataset.report)
    assert dataset.fingerprint() != read(lm, [judged[0], judged[1] | {"label": True}], "kto").fingerprint()


def answer_to_another(rows: list[tuple[str, str]], members: list[int], place: int) -> str:
    """The nearest answer to another prompt before a member of a batch: in the batch, or else in the data."""
    prompt, n = rows[members[place]][0], len(rows)
    in_batch = [members[place - step] for step in range(1, len(members))]
    in_data = [(members[place] - step) % n for step in range(1, n)]
    return next(answer for other, answer in map(rows.__getitem__, in_batch + in_data) if other != prompt)


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("batches", [{"batch_examples": 5}, {"batch_tokens": 12}, {"batch_tokens": 1024}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_prompt_also_gets_an_answer_to_another_prompt(
    batches: dict[str, int], shuffle: bool, weight: float, lm: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    dataset = read(lm, [(path, weight)], "kto")
    sides = ((row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected"))
    texts = {f"{prompt}{answer}<|end|>": (prompt, answer) for prompt, answer in sides}
    rows = [texts[lm.tokenizer.decode(dataset[index][0])] for index in range(len(dataset))]
    assert len(rows) == 2 * weight * len(PAIRS)
    made = TokenBatches(dataset, shuffle=shuffle, **batches)
    sizes = set()
    for members, (_, judged) in zip(made.members(0), made.epoch(0), strict=True):
        found, sizes = judged.mismatched, sizes | {len(members)}
        texts_found = [
            lm.tokenizer.decode(found.ids[begin:end]) for begin, end in itertools.pairwise(found.starts)
        ]
        members = members.tolist()
        assert texts_found == [
            f"{rows[member][0]}{answer_to_another(rows, members, place)}<|end|>"
            for place, member in enumerate(members)
        ]
    assert batches != {"batch_tokens": 12} or 1 in sizes, "batches of one answer"


def test_mismatched_pairs_are_cut_to_the_maximum_length(lm: LanguageModel) -> None:
    rows = [{"prompt": "x" * n, "completion": "y" * n, "label": True} for n in (1, 2, 3)]
    _, judgements = read(lm, rows, "kto", length=6).batch(np.array([2, 0, 1]))
    found = judgements.mismatched
    spans = itertools.pairwise(found.starts)
    assert [lm.tokenizer.decode(found.ids[begin:end]) for begin, end in spans] == [
        "xxxyy<|end|>", "xyyy", "xxy<|end|>",
    ]  # fmt: skip


def test_answers_to_one_prompt_are_enough_without_a_kl(lm: LanguageModel) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    dataset = read(lm, rows, "kto", loss_type="apo_zero_unpaired")
    assert len(dataset.batch(np.arange(2))[1].mismatched.ids) == 0


def test_judged_answers_have_the_same_batches_in_every_epoch(lm: LanguageModel) -> None:
    batches = TokenBatches(read(lm, PAIRS, "kto"), batch_examples=5)
    assert len(batches) == 6
    epochs = [sorted(tuple(members.tolist()) for members in batches.members(epoch)) for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    orders = [[members[0] for members in batches.members(epoch)] for epoch in range(3)]
    assert orders[0] != orders[1]
    assert [len(members) for members in batches.members(1, skip=4)] == [
        len(members) for members in batches.members(1)
    ][4:]


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (PAIRS, "sft", r"has chosen and rejected; expected one answer to learn\. "
         r"To train on rows of this kind, use finetune --objective dpo \(objective='dpo'\)$"),
        ([{"prompt": "a", "completion": "b", "label": True}], "sft", r"finetune --objective kto"),
        ([{"text": "a"}], "dpo", r"the row has text; objective 'dpo' needs rows with chosen and rejected$"),
        ([{"prompt": "a", "completion": "b"}], "orpo", "objective 'orpo' needs rows with chosen and rej"),
        ([{"prompt": "a", "completion": "b"}], "kto",
         "objective 'kto' needs rows with an answer and a label, or chosen and rejected; an empty label"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "dpo", "chosen and rejected are the same answer"),
        ([{"prompt": "a", "chosen": "b"}], "dpo", r"row 1: rejected is missing"),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], "dpo", r"row 1: rejected is 3, expected a string"),
        ([{"prompt": "a", "completion": "b", "label": 2}], "kto", "label is 2, expected true or false"),
        ([{"prompt": "a", "completion": "b", "label": True}], "kto",
         "data: 1 answer to one prompt, expected at least two different prompts: loss_type 'kto' compares"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": "e"}],
         "kto", "data: 4 answers to one prompt, expected at least two different prompts"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_the_objective_are_one_clear_error(
    lm: LanguageModel, rows: list[dict[str, Any]], objective: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(lm, rows, objective)


def test_a_plain_text_has_no_comparisons(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(
        DataError, match=r"a\.txt is a plain text; objective 'dpo' needs rows with chosen and rej"
    ):
        read(lm, tmp_path / "a.txt")


def test_weights_skipped_rows_and_a_held_out_share_are_as_for_other_data(model: Path, tmp_path: Path) -> None:
    bad = {"prompt": "a", "chosen": "b", "rejected": "b"}
    for name, rows in (("a", [*PAIRS, bad]), ("b", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weighted = [(tmp_path / "a.jsonl", 2.0), (tmp_path / "b.jsonl", 1.0)]
    lm = load_model(model)
    dataset = read(lm, weighted, skip_bad=True)
    assert (len(dataset), dataset.report.skipped) == (2 * 14 + 4, 1)
    report = finetune(model, PAIRS, tmp_path / "out", objective="dpo", valid_split=0.4, steps=1)
    assert report.valid is not None
    assert (report.train.unit, report.train.examples + report.valid.examples) == ("pair", 14)


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo' is not available"),
        ({"beta": 0.2}, "beta is for objective 'dpo' or 'orpo' or 'kto', but the objective is 'sft'"),
        ({"objective": "orpo", "loss_type": "ipo"}, "loss_type is for objective 'dpo' or 'kto', but the obj"),
        ({"objective": "kto", "loss_type": "ipo"}, "loss_type"),
        ({"objective": "kto", "label_smoothing": 0.1}, "label_smoothing is for objective 'dpo'"),
        ({"objective": "dpo", "desirable_weight": 2.0}, "desirable_weight is for objective 'kto'"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing is 0.5, expected at least 0 and bel"),
        ({"objective": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing is for loss_ty"),
        ({"objective": "dpo", "beta": 0.0}, "beta is 0.0, expected above 0"),
        ({"objective": "dpo", "learn": "all"}, "learn='all' is for objective 'sft' or 'distill', but the"),
        ({"objective": "kto", "batch_examples": 1}, "batch_examples is 1, but objective 'kto' compares"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^finetune: {message}"):
        FinetuneOptions(**options)


# ---- formulas ----


def slopes(value: Callable[[Array], Array], at: Array) -> Array:
    """The derivative of the sum of a function by central differences."""
    found = np.empty_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-6
        found[index] = (value(at + step).sum() - value(at - step).sum()) / 2e-6
    return found


@pytest.mark.parametrize("loss_type", LOSS_TYPES["dpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_derivatives_of_dpo_match_finite_differences(
    loss_type: str, smoothing: float, rng: np.random.Generator
) -> None:
    formula, counts = Dpo(loss_type, 0.3, smoothing), rng.integers(1, 9, (6, 2))
    ratios = 3 * rng.standard_normal((6, 2))
    expected = slopes(lambda r: formula(r, counts)[0], ratios)
    np.testing.assert_allclose(formula(ratios, counts)[1], expected, atol=1e-8)
    assert np.isfinite(formula(1e4 * ratios, counts)[0]).all()


def test_the_derivatives_of_orpo_match_finite_differences(rng: np.random.Generator) -> None:
    means = -rng.uniform(0.05, 6, (6, 2))
    expected = slopes(lambda m: odds_ratio(m, 0.7)[0], means)
    np.testing.assert_allclose(odds_ratio(means, 0.7)[1], expected, rtol=1e-6)
    for certain in ([[0.0, -1.0]], [[-1.0, 0.0]], [[0.0, 0.0]], [[-800.0, -1e-12]]):
        value, gradient = odds_ratio(np.array(certain), 0.1)
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("mean", [-1e-7, -1e-9, 0.0])
def test_orpo_penalises_a_rejected_answer_that_is_certain(mean: float) -> None:
    """Its odds are p / (1 - p) with 1 - p = 1e-7, the least that the loss tells from 0."""
    chosen = math.exp(-1)
    ratio = chosen / (1 - chosen) / 1e7
    value, slope = odds_ratio(np.array([[-1.0, mean]]), 0.1)
    assert value[0] == pytest.approx(0.1 * math.log(1 + 1 / ratio), rel=1e-6)
    assert slope[0, 1] == pytest.approx(0.1 / (1 + ratio) * 1e7, rel=1e-6)
    assert slope[0, 0] == pytest.approx(-0.1 / (1 + ratio) / (1 - chosen), rel=1e-6)
    assert odds_ratio(np.array([[mean, -1.0]]), 0.1)[1][0, 0] == 0, "it cannot become likelier"


@pytest.mark.parametrize("kl", [0.0, 1.3])
def test_the_derivatives_of_kto_match_finite_differences(kl: float, rng: np.random.Generator) -> None:
    formula, good = Kto("kto", 0.4, 1.5, 0.7), rng.random(8) < 0.5
    ratios = 3 * rng.standard_normal(8)
    expected = slopes(lambda r: formula(r, good, kl)[0], ratios)
    np.testing.assert_allclose(formula(ratios, good, kl)[1], expected, atol=1e-8)


# ---- batches and micro-batches ----


def one_batch(lm: LanguageModel, objective: str, directory: Path, micro: int | None) -> Any:
    """The loss and the gradients of one batch of all pairs."""
    chosen = objective_of(FinetuneOptions(objective=objective))
    dataset = chosen.read(
        "finetune", sources_of("finetune", PAIRS), lm.tokenizer, FinetuneOptions().reading(64)
    )
    batches = TokenBatches(dataset, batch_examples=len(dataset), shuffle=False)
    with lm.disable_adapter(), files.Directory(directory) as held:
        chosen.prepare(lm, [batches], held, lambda text: None)
    [(x, y)] = batches.epoch(0)
    loss: Any = chosen.loss(micro)
    lm.zero_grad()
    value = loss.forward_backward(lm, x, y, 1 / loss.count(x, y))
    mean = loss.evaluate(lm, x, y)  # of a batch of all data
    assert value / loss.count(x, y) == pytest.approx(mean, rel=1e-6)
    return value, [p.grad.copy() for p in lm.parameters()], loss.take_metrics()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_give_the_loss_the_gradient_and_the_metrics_of_the_batch(
    objective: str, lm: LanguageModel, tmp_path: Path, rng: np.random.Generator
) -> None:
    lm.add_lora(rank=2)
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.1 * rng.standard_normal(layer.A.shape)
    whole, cut = one_batch(lm, objective, tmp_path, None), one_batch(lm, objective, tmp_path, 40)
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    assert cut[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-5)
    for a, b in zip(cut[1], whole[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * abs(b).max())


def test_the_loss_of_orpo_in_an_evaluation_does_not_depend_on_its_batches(lm: LanguageModel) -> None:
    """Against the mean over all tokens of the chosen texts, and over all pairs, in float64."""
    objective = objective_of(FinetuneOptions(objective="orpo", beta=0.5))
    rows = [row | {"chosen": row["chosen"] + "y" * (3 * number)} for number, row in enumerate(PAIRS)]
    dataset = read(lm, rows, "orpo")
    tokens, penalties = list[float](), list[float]()
    for chosen, rejected in dataset:
        odds = []
        for ids, labels in (chosen, rejected):
            logits = lm.logits(ids).astype(np.float64)[:-1]
            logs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[
                np.arange(len(ids) - 1), ids[1:]
            ]
            p = np.exp(logs[labels[1:] != IGNORED].mean())
            odds.append(p / (1 - p))
            tokens += (-logs).tolist() if ids is chosen[0] else []
        penalties.append(-np.log(1 / (1 + odds[1] / odds[0])))
    expected = np.mean(tokens) + 0.5 * np.mean(penalties)
    for batches in (
        {"batch_examples": 1},
        {"batch_examples": 5},
        {"batch_tokens": 60},
        {"batch_tokens": 999},
    ):
        found = evaluate(lm, objective.loss(None), TokenBatches(dataset, shuffle=False, **batches))
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_never_divides_a_pair(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.add_lora(rank=2)
    sizes: list[int] = []
    computed = LanguageModel.forward_backward_of

    def watched(self: LanguageModel, batch: Any, loss: Any) -> float:
        sizes.append(len(batch.starts) - 1)
        return computed(self, batch, loss)

    monkeypatch.setattr(LanguageModel, "forward_backward_of", watched)
    for micro in (1, 20, 33, None):
        sizes.clear()
        one_batch(lm, "dpo", tmp_path, micro)
        assert sum(sizes) == 2 * len(PAIRS)
        assert not any(size % 2 for size in sizes)


# ---- the reference ----


def reference_of(lm: LanguageModel, directory: Path, rows: Any = None, said: list[str] | None = None) -> Any:
    """The reference of the batch of all pairs, and the data set."""
    dataset = read(lm, rows or PAIRS)
    batches = TokenBatches(dataset, batch_examples=len(dataset), shuffle=False)
    directory.mkdir(exist_ok=True)
    with files.Directory(directory) as held:
        say = (said if said is not None else []).append
        objective = objective_of(FinetuneOptions(objective="dpo"))
        objective.prepare(lm, [batches], held, say)
    return objective._reference.log_probs_of(next(batches.epoch(0))[0]), dataset


def test_the_reference_is_the_sum_of_the_log_probabilities_of_the_answers(
    lm: LanguageModel, tmp_path: Path
) -> None:
    """Against a softmax in float64 of the logits of each sequence by itself."""
    found, dataset = reference_of(lm, tmp_path)
    expected = []
    for ids, labels in (side for pair in dataset for side in pair):
        logits = lm.logits(ids).astype(np.float64)
        rows = np.flatnonzero(labels[1:] != IGNORED)
        logs = logits[rows] - np.log(np.exp(logits[rows]).sum(axis=1, keepdims=True))
        expected.append(logs[np.arange(len(rows)), ids[1:][rows]].sum())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_reference_in_the_directory_is_used_without_computing(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = reference_of(lm, tmp_path)
    before = (tmp_path / REFERENCE).read_bytes()

    def fail(*arguments: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(LanguageModel, "log_probs", fail)
    said: list[str] = []
    again, _ = reference_of(lm, tmp_path, said=said)
    np.testing.assert_array_equal(again, first)
    assert (tmp_path / REFERENCE).read_bytes() == before
    assert said == []
    with pytest.raises(AssertionError, match="computed again"):
        reference_of(lm, tmp_path, rows=HELD_OUT)


def spoil(path: Path, how: str, lm: LanguageModel) -> None:
    content = path.read_bytes()
    with safetensors.reading(path) as opened:
        metadata = dict(opened.metadata)
        keys, values = opened["keys"].numpy().copy(), opened["values"].numpy().copy()
    if how == "cut":
        path.write_bytes(content[:-9])
    elif how == "a changed bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another model":
        safetensors.save(path, {"keys": keys, "values": values}, metadata | {"model": "0" * 64})
    elif how == "a later schema":
        safetensors.save(path, {"keys": keys, "values": values}, metadata | {"reference": "2"})
    elif how == "no values":
        safetensors.save(path, {"keys": keys}, metadata)
    elif how == "nan":
        values[0] = np.nan
        digest = reference._digest(keys, values)
        safetensors.save(path, {"keys": keys, "values": values}, metadata | {"sha256": digest})
    elif how == "other kinds":
        floats, names = keys.astype(np.float64), np.array([["a"]]).view(np.uint32)
        digest = reference._digest(floats, names)
        safetensors.save(path, {"keys": floats, "values": names}, metadata | {"sha256": digest})


@pytest.mark.parametrize(
    "how",
    ["cut", "a changed bit", "empty", "another model", "a later schema", "no values", "nan", "other kinds"],
)
def test_a_damaged_or_foreign_reference_is_computed_again(
    how: str, lm: LanguageModel, tmp_path: Path
) -> None:
    first, _ = reference_of(lm, tmp_path)
    whole = (tmp_path / REFERENCE).read_bytes()
    (tmp_path / "checkpoint-0.safetensors").touch()  # without a run, a file that is cut may be anybody's
    spoil(tmp_path / REFERENCE, how, lm)
    said: list[str] = []
    again, _ = reference_of(lm, tmp_path, said=said)
    np.testing.assert_array_equal(again, first)
    assert f"{REFERENCE}: it is " in said[0]
    assert said[0].endswith("; the reference is computed again")
    assert (tmp_path / REFERENCE).read_bytes() == whole


def test_another_arithmetic_has_another_reference(model: Path, tmp_path: Path) -> None:
    first, _ = reference_of(load_model(model), tmp_path)
    said: list[str] = []
    again, _ = reference_of(load_model(model, "bfloat16"), tmp_path, said=said)
    assert "from another model, arithmetic" in said[0]
    assert not np.array_equal(again, first)


def edited(path: Path, rows: list[int]) -> Path:
    """A copy of a model with other values in some rows of the embedding."""
    table, content = gguf.open(path)["token_embd.weight"].numpy(), path.read_bytes()
    for row in table[rows]:
        content = content.replace(row.tobytes(), (row + 1).tobytes())
    copy = path.parent / "edited.gguf"
    copy.write_bytes(content)
    return copy


def test_a_reference_is_not_used_for_a_model_with_a_few_other_rows(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "m.gguf", vocab=4000)
    row = PAIRS[0]["prompt"]
    rows = load_model(path).tokenizer.encode(row)[1:10]
    first, _ = reference_of(load_model(path), tmp_path)
    said: list[str] = []
    again, _ = reference_of(load_model(edited(path, rows)), tmp_path, said=said)
    assert "from another model, arithmetic" in said[0]
    assert not np.array_equal(again, first)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_model_with_another_configuration_is_another_model(objective: str, tmp_path: Path) -> None:
    path, output = save_small_llama(tmp_path / "m.gguf"), tmp_path / "out"
    rows = PAIRS if objective == "dpo" else [{"text": "abcdefgh"}]
    finetune(path, rows, output, objective=objective, **QUICK)
    before = (output / REFERENCE).read_bytes() if objective == "dpo" else b""
    save_small_llama(path, changes={"llama.rope.freq_base": gguf.Typed(5e5, "FLOAT32")})
    with pytest.raises(CorruptError, match="of another base model: the frozen weights or the configuration"):
        finetune(path, rows, output, objective=objective, **QUICK, resume=True)
    if objective == "dpo":
        finetune(path, rows, output, objective=objective, **QUICK, overwrite=True)
        assert (output / REFERENCE).read_bytes() != before


def test_checkpoints_that_name_no_configuration_are_accepted() -> None:
    base = "a" * 64 + " " + "b" * 64
    assert is_same_base(base, base)
    assert is_same_base("a" * 64, base)
    assert not is_same_base("a" * 64 + " " + "c" * 64, base)
    assert not is_same_base("b" * 64, base)


def test_ctrl_c_in_the_reference_keeps_what_is_computed(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "EVALUATION_TOKENS", 64)
    whole, _ = reference_of(lm, tmp_path / "whole")
    calls: list[int] = []
    computed = LanguageModel.log_probs

    def stopping(self: LanguageModel, batch: Any) -> Array:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return computed(self, batch)

    monkeypatch.setattr(LanguageModel, "log_probs", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        reference_of(lm, tmp_path / "cut")
    [note] = caught.value.__notes__
    assert note.startswith("the log-probabilities computed so far are saved: --resume ")
    calls[:] = [1, 1]  # the next call is the third: nothing is computed when it stops
    with pytest.raises(KeyboardInterrupt) as caught:
        reference_of(lm, tmp_path / "empty")
    assert not getattr(caught.value, "__notes__", ())
    assert len(safetensors.open(tmp_path / "cut" / REFERENCE)["keys"].numpy()) < len(whole)
    again, _ = reference_of(lm, tmp_path / "cut")
    np.testing.assert_array_equal(again, whole)
    assert (tmp_path / "cut" / REFERENCE).read_bytes() == (tmp_path / "whole" / REFERENCE).read_bytes()
    calls.clear()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(KeyboardInterrupt) as caught:
        reference_of(lm, tmp_path / "full")
    assert not getattr(caught.value, "__notes__", ())


def test_a_reference_that_is_not_finite_ends_the_run_before_it_begins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "log_probs", lambda self, batch: np.full(batch.num_targets, np.nan))
    with pytest.raises(
        NonFiniteLossError, match="without an adapter, the log-probability of an answer is nan"
    ):
        finetune(model, PAIRS, tmp_path / "out", objective="dpo", **QUICK)
    assert not (tmp_path / "out" / "checkpoint-0.safetensors").exists()
    assert not (tmp_path / "out" / REFERENCE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"init": "gaussian"}, {"init": "pissa"}, {"adapter": "first"}], ids=str)
def test_the_reference_is_the_model_without_any_adapter(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Also if the adapter changes the model from the start, or takes a part of the frozen weights."""
    plain = reference_of(load_model(model), tmp_path / "plain")[0]
    if "adapter" in options:
        finetune(model, PAIRS, tmp_path / "first", objective="dpo", **QUICK)
        options = {"adapter": tmp_path / "first"}
    quick = {name: value for name, value in QUICK.items() if name != "rank"}
    finetune(model, PAIRS, tmp_path / "out", objective="dpo", **quick, **options)
    found = reference_of(load_model(model), tmp_path / "out")[0]
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    record = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[3])
    is_changed = options.get("init") != "pissa"
    assert (abs(record["metrics"]["rewards/margins"]) > 1e-4) == is_changed


# ---- runs ----


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        name: (directory / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_prefers_the_chosen_answers_and_reports_it(
    objective: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(
        model, PAIRS, tmp_path / "out", valid=PAIRS[:6], objective=objective, progress=True,
        **{**QUICK, "epochs": 10},
    )  # fmt: skip
    after = report.metrics_after
    assert report.loss_after is not None
    assert report.loss_after < (report.loss_before or 0)
    assert after["rewards/margins"] > report.metrics_before["rewards/margins"] + 0.1
    assert after["rewards/accuracies"] > 0.8
    printed, summary = capsys.readouterr().err, str(report)
    assert (
        f", margin {report.metrics_before['rewards/margins']:.3f} -> {after['rewards/margins']:.3f}"
        in summary
    )
    assert ("answers/s)" if objective == "kto" else "pairs/s)") in summary
    assert f"margin {after['rewards/margins']:.3f}, accuracy" in printed
    steps = [
        r
        for r in map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
        if r["event"] == "step"
    ]
    assert steps[-1]["metrics"]["rewards/chosen"] == report.history.steps[-1].metrics["rewards/chosen"]
    history = report.history
    best = min(history.evaluations, key=lambda record: record.val_loss)
    assert (best.step, best.val_loss, best.val_metrics) == (history.best_step, report.loss_after, after)
    assert f" (step {best.step}, the lowest of 10 evaluations), " in summary
    assert nplora.evaluate(model, [{"text": "a"}], adapter=tmp_path / "out")["loss"] > 0


@pytest.mark.slow
def test_the_reported_rewards_are_those_of_the_saved_adapter(model: Path, tmp_path: Path) -> None:
    """The validation data have chosen and rejected exchanged, so that the first evaluation is the best."""
    exchanged = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS[:6]]
    options = {**QUICK, "objective": "dpo", "valid": exchanged, "eval_every": 1, "epochs": 2}
    found = {keep: finetune(model, PAIRS, tmp_path / keep, keep=keep, **options) for keep in ("best", "last")}
    first, *_, last = found["best"].history.evaluations
    assert first.val_metrics["rewards/margins"] > last.val_metrics["rewards/margins"] + 0.01
    assert (found["best"].loss_after, found["best"].metrics_after) == (first.val_loss, first.val_metrics)
    assert (found["last"].loss_after, found["last"].metrics_after) == (last.val_loss, last.val_metrics)


class Stop(Callback):
    """Presses Ctrl-C in a hook, when the run has made `step` updates."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        setattr(self, hook, self._stop)

    def _stop(self, run: Any, _: Any) -> None:
        if run.step == self._step:
            raise KeyboardInterrupt


# After the first step; between the batches of a step and its update; within the second epoch of pairs.
STOPS = [("on_step_end", 1), ("on_before_optimizer_step", 2), ("on_step_end", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_of_any_objective_resumes_to_the_bit(objective: str, model: Path, tmp_path: Path) -> None:
    options = {**QUICK, "objective": objective, "valid": HELD_OUT, "accumulate": 2, "dropout": 0.2}
    options |= {"layers": "last:1", "keep_prefix": "memory"}
    whole = finetune(model, PAIRS, tmp_path / "whole", **options)
    assert len(whole.history.steps) > 3
    for hook, step in STOPS:
        output = tmp_path / f"{hook}-{step}"
        stopped = finetune(model, PAIRS, output, **options, callbacks=[Stop(hook, step)])
        assert (stopped.history.interrupted, len(stopped.history.steps)) == (True, step)
        if objective in WITH_REFERENCE and step == 3:
            (output / REFERENCE).unlink()  # it is computed again, with the same bits
        resumed = finetune(model, PAIRS, output, **options, resume=True)
        assert files_of(output) == files_of(tmp_path / "whole")
        assert resumed.history.loss == whole.history.loss
        assert [r.metrics for r in resumed.history.steps] == [r.metrics for r in whole.history.steps]
        assert (resumed.metrics_before, resumed.metrics_after) == (whole.metrics_before, whole.metrics_after)
        assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recomputed_activations_and_cached_prefixes_give_the_same_adapter(
    objective: str, model: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "objective": objective, "layers": "last:1", "dropout": 0.1}
    for name, more in (("plain", {}), ("re", {"recompute": True}), ("kept", {"keep_prefix": "disk"})):
        finetune(model, PAIRS, tmp_path / name, **options, **more)
    assert files_of(tmp_path / "re") == files_of(tmp_path / "plain") == files_of(tmp_path / "kept")


@pytest.mark.slow
def test_steps_of_accumulated_batches_are_the_steps_of_the_whole_batch(model: Path, tmp_path: Path) -> None:
    rows, found = PAIRS[:12], []
    for size, accumulate in ((12, 1), (3, 4)):
        report = finetune(
            model, rows, tmp_path / str(size), objective="dpo", rank=2, lr=1e-3, steps=3, batch_examples=size,
            accumulate=accumulate,
        )  # fmt: skip
        found.append(report.history.steps)
    for one, other in zip(*found, strict=True):
        assert one.count == other.count == 12
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-2, abs=1e-5)
    assert found[0][-1].metrics["rewards/margins"] > 1e-3


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_objective_or_strength(model: Path, tmp_path: Path) -> None:
    finetune(model, PAIRS, tmp_path / "out", objective="dpo", **QUICK)
    with pytest.raises(ValueError, match=r"beta was 0\.1, is 0\.2"):
        finetune(model, PAIRS, tmp_path / "out", objective="dpo", beta=0.2, **QUICK, resume=True)
    with pytest.raises(ValueError, match="objective was dpo, is orpo"):
        finetune(model, PAIRS, tmp_path / "out", objective="orpo", **QUICK, resume=True)


REFUSED: list[dict[str, Any]] = [
    {"data": HELD_OUT},
    {"objective": "orpo"},
    {"objective": "sft", "data": [{"text": "a"}]},
    {"beta": 0.2},
    {"seed": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_a_run_that_may_not_resume_computes_and_changes_no_reference(
    options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    finetune(model, PAIRS, output, objective="dpo", **QUICK)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*arguments: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(LanguageModel, "log_probs", fail)
    with pytest.raises((ValueError, CorruptError), match="cannot continue with other data or settings"):
        finetune(
            model, output=output, **({"data": PAIRS, "objective": "dpo", **QUICK} | options), resume=True
        )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("error", [NonFiniteLossError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["log_probs", "forward_backward_of"])
def test_a_failed_run_over_another_one_changes_its_reference_only_after_the_first_checkpoint(
    where: str, error: type[BaseException], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    finetune(model, PAIRS, output, objective="dpo", **QUICK)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    computed, calls = getattr(LanguageModel, where), list[int]()

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return computed(*arguments)

    monkeypatch.setattr(LanguageModel, where, fail)
    monkeypatch.setattr(reference, "EVALUATION_TOKENS", 32)
    with contextlib.suppress(error):
        finetune(model, HELD_OUT, output, objective="dpo", **QUICK, overwrite=True)
    after = {path.name: path.read_bytes() for path in output.iterdir()}
    if where == "log_probs":
        assert after == before
    else:
        assert len(safetensors.open(output / REFERENCE)["keys"].numpy()) == 2 * len(HELD_OUT)
        assert after["log.jsonl"] != before["log.jsonl"]


@pytest.mark.slow
def test_a_resumed_run_computes_a_lost_reference_while_it_holds_the_lock(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    finetune(model, PAIRS, output, objective="dpo", **QUICK)
    before = (output / REFERENCE).read_bytes()
    (output / REFERENCE).unlink()
    computed, locked = LanguageModel.log_probs, list[bool]()

    def watched(self: LanguageModel, batch: Any) -> Array:
        locked.append((output / "lock").exists())
        return computed(self, batch)

    monkeypatch.setattr(LanguageModel, "log_probs", watched)
    finetune(model, PAIRS, output, objective="dpo", **QUICK, resume=True)
    assert locked
    assert all(locked)
    assert (output / REFERENCE).read_bytes() == before


@pytest.mark.slow
def test_another_run_over_the_directory_drops_the_reference(model: Path, tmp_path: Path) -> None:
    finetune(model, PAIRS, tmp_path / "out", objective="dpo", **QUICK)
    assert (tmp_path / "out" / REFERENCE).exists()
    finetune(model, PAIRS, tmp_path / "out", objective="orpo", **QUICK, overwrite=True)
    assert not (tmp_path / "out" / REFERENCE).exists()


@pytest.mark.slow
def test_a_file_of_the_reference_s_name_that_no_run_made_is_kept(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    safetensors.save(output / REFERENCE, {"mine": np.ones(3)})
    before = (output / REFERENCE).read_bytes()
    for objective in ("dpo", "orpo"):
        with pytest.raises(FileExistsError, match=f"the file {REFERENCE} was not made by a run"):
            finetune(model, PAIRS, output, objective=objective, **QUICK)
    assert (output / REFERENCE).read_bytes() == before
    (output / REFERENCE).write_text("notes")
    with pytest.raises(FileExistsError, match="no run made the file"):
        finetune(model, PAIRS, output, objective="dpo", **QUICK)
    finetune(model, PAIRS, output, objective="orpo", **QUICK)
    assert (output / REFERENCE).read_text() == "notes"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / REFERENCE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match="symbolic link"):
        finetune(model, PAIRS, tmp_path / "linked", objective="dpo", **QUICK)


@pytest.mark.slow
def test_a_disk_without_room_for_the_reference_warns_and_the_run_says_what_it_needs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = files.replace

    def full(new: Any, *more: Any) -> None:
        if any(Path(file.path).name == REFERENCE for file in new):
            raise OSError(28, os.strerror(28))
        replace(new, *more)

    monkeypatch.setattr(files, "replace", full)
    with pytest.warns(UserWarning, match=r"of the reference could not be saved \(no space left on device\)"):
        report = finetune(model, PAIRS, tmp_path / "out", objective="dpo", **QUICK)
    monkeypatch.undo()
    assert report.history.ended == "complete"
    finetune(model, PAIRS, tmp_path / "whole", objective="dpo", **QUICK)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, calls = PairLoss.forward_backward, [0]

    def failing(self: PairLoss, *arguments: Any) -> float:
        calls[0] += 1
        return math.nan if calls[0] == 4 else computed(self, *arguments)

    monkeypatch.setattr(PairLoss, "forward_backward", failing)
    options = {**QUICK, "epochs": None, "steps": 6, "schedule": "constant"}
    with pytest.raises(NonFiniteLossError, match=r"step 4 \(epoch 1\): the loss of batch 4 is nan") as caught:
        finetune(model, PAIRS, tmp_path / "out", objective="dpo", **options)
    assert any("lower --lr" in note for note in caught.value.__notes__)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="lr was"):
        finetune(model, PAIRS, tmp_path / "out", objective="dpo", **{**options, "lr": 1e-3}, resume=True)


def test_a_loss_of_kto_whose_mismatched_pairs_are_not_finite_says_so(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.add_lora(rank=2)
    objective = objective_of(FinetuneOptions(objective="kto"))
    batches = TokenBatches(read(lm, PAIRS, "kto"), batch_examples=4, shuffle=False)
    with files.Directory(tmp_path) as directory, lm.disable_adapter():
        objective.prepare(lm, [batches], directory, print)
    loss, (x, y) = objective.loss(None), next(batches.epoch(0))
    loss.forward_backward(lm, x, y, 1.0)
    assert loss.blame(lm, x) == "the output of every layer is finite, but the loss is not"
    computed = LanguageModel.residual_stream

    def failing(self: LanguageModel, batch: Any) -> Array:
        hidden = computed(self, batch)
        return hidden * np.float32(np.nan) if np.array_equal(batch.ids, y.mismatched.ids) else hidden

    monkeypatch.setattr(LanguageModel, "residual_stream", failing)
    words = "in mismatched pairs, the first layer whose output is not finite is 'model.norm'"
    assert loss.blame(lm, x) == words


def test_the_command_line_trains_on_pairs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    line = ["finetune", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    line += ["--steps", "2", "--rank", "2"]
    assert cli.main(line) == 2
    assert "--objective dpo" in capsys.readouterr().err
    assert cli.main([*line, "--objective", "dpo", "--loss-type", "ipo", "--beta", "0.2"]) == 0
    settings = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[1])["settings"]["fixed"]
    assert (settings["objective"], settings["loss_type"], settings["beta"]) == ("dpo", "ipo", 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_plan_counts_whole_pairs_and_the_reference(objective: str, model: Path) -> None:
    found = plan(model, PAIRS, objective=objective, batch_examples=4)
    assert (found.before > 0) == (objective in WITH_REFERENCE)
    assert ("for the reference" in str(found)) == (objective in WITH_REFERENCE)
    assert found.steps == (7 if objective == "kto" else 4)


# ---- records ----


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_metrics_of_an_epoch_are_means_over_all_values(
    objective: str, model: Path, tmp_path: Path
) -> None:
    """The factors hardly change, so an evaluation of all data measures the same, in other batches."""
    rows: Any = PAIRS
    if objective == "kto":  # batches with few good answers, with many, and with none
        rows = [{"prompt": f"{n}=", "completion": "x" * (1 + n % 7), "label": n > 9} for n in range(14)]
    finetune(model, PAIRS, tmp_path / "first", objective="dpo", **QUICK)
    report = finetune(
        model, rows, tmp_path / "out", valid=rows, objective=objective, adapter=tmp_path / "first", lr=1e-9,
        batch_examples=3, steps=5,
    )  # fmt: skip
    epoch, whole = report.history.epochs[0].metrics, report.metrics_before
    assert {name for name in epoch if name != "kl"} == whole.keys() - {"kl"}
    for name in epoch.keys() - {"kl", "rewards/accuracies"}:
        assert epoch[name] == pytest.approx(whole[name], rel=1e-4), name


def test_records_without_metrics_from_before_are_still_read() -> None:
    history = History()
    plain = {"epoch": 1, "loss": 2.0, "count": 3, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5}
    lines = [
        {"event": "step", "step": 1, **plain},
        {"event": "step", "step": 2, **plain, "metrics": {"kl": 0.5, "x": None}},
        {"event": "step", "step": 3, **plain, "metrics": [1]},
        {"event": "step", "step": 4, **plain, "metrics": {"kl": "high"}},
    ]
    history.add_log("".join(json.dumps(line) + "\n" for line in lines).encode(), 4, 0)
    assert [record.step for record in history.steps] == [1, 2]
    assert history.steps[0].metrics == {}
    assert history.steps[1].metrics["kl"] == 0.5
    assert math.isnan(history.steps[1].metrics["x"])


def test_the_columns_of_a_checkpoint_keep_metrics_and_need_none() -> None:
    history = History(
        [StepRecord(1, 1, 2.0, 3, 0.1, 1.0, 0.5), StepRecord(2, 1, 2.0, 3, 0.1, 1.0, 0.5, {"kl": 0.25})]
    )
    restored = History()
    restored.restore(history.step_columns(), [], [])
    assert restored.steps == history.steps
    plain = History(history.steps[:1])
    assert set(plain.step_columns()) == {"step", "epoch", "loss", "count", "lr", "grad_norm", "seconds"}
    row = {"epoch": 1, "step": 2, "loss": 1.0, "val_loss": None, "val_accuracy": None, "seconds": 1.0}
    restored.restore(plain.step_columns(), [row], [])
    assert restored.epochs[0].val_metrics == {}
    with pytest.raises(TypeError, match="the metrics of an epoch are not a dictionary of numbers"):
        restored.restore(plain.step_columns(), [row | {"val_metrics": {"kl": "x"}}], [])


def test_pairs_keep_together_when_a_packed_batch_is_cut() -> None:
    lengths = (3, 5, 2, 2, 9, 1)
    batch = pack([(np.arange(n), np.arange(n)) for n in lengths])
    assert [np.diff(part.starts).tolist() for part in batch.pieces(12, together=2)] == [[3, 5, 2, 2], [9, 1]]
    assert [np.diff(part.starts).tolist() for part in batch.pieces(1, together=2)] == [[3, 5], [2, 2], [9, 1]]
    assert PairDataset.sequences == 2
