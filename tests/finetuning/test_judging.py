"""Evaluation: losses, accuracies, generated answers, multiple choice, and comparisons of adapters."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import nplora
from nplora import cli
from nplora.finetuning import compare, evaluate, evaluate_batches
from nplora.finetuning.data import TokenBatches, read_dataset
from nplora.finetuning.judging import metrics
from nplora.finetuning.judging.tables import evaluation_text, markdown_table
from nplora.formats import gguf
from nplora.formats.errors import DataError, FormatError
from nplora.lm import LanguageModel, load_model
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(12)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [
    {"prompt": f"{n}+{n}=", "choices": [str(2 * n), "öööööö", "no idea"], "answer": n % 3} for n in range(9)
]


CALLS_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def lm(path: Path) -> LanguageModel:
    return load_model(path)


@pytest.fixture(scope="module")
def adapters(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters: "trained" on ROWS, and "random"."""
    directory, made = tmp_path_factory.mktemp("adapters"), load_model(path)
    made.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(made, directory / "random")
    options: dict[str, Any] = {"rank": 4, "lr": 1e-2, "epochs": 5, "batch_examples": 4}
    nplora.finetune(path, ROWS, directory / "trained", progress=False, **options)
    return directory


def log_probs(lm: LanguageModel, ids: list[int]) -> npt.NDArray[np.float64]:
    """log p of each next token, from the logits of the whole sequence, in float64."""
    logits = lm.logits(ids).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("rows", [ROWS, QUESTIONS], ids=["texts", "questions"])
def test_rows_are_read_once_for_the_loss_and_the_answers(lm: LanguageModel, rows: list[Any]) -> None:
    begun = list[int]()

    class Rows:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            begun.append(1)
            return iter(rows)

    found = evaluate(lm, Rows(), metric="f1", max_new_tokens=1)
    assert found["metrics"]["f1"]["examples"] == len(rows)
    assert len(begun) == 1


# ---- tokens ----


@pytest.mark.slow
def test_loss_and_token_accuracy_are_those_of_the_logits(lm: LanguageModel, adapters: Path) -> None:
    adapted = lm.with_adapter(nplora.read_adapter(adapters / "trained"))
    found = evaluate(lm, ROWS, adapter=adapters / "trained")
    dataset = read_dataset(ROWS, lm.tokenizer)
    losses, hits = list[float](), list[bool]()
    for ids, labels in dataset:
        likely = log_probs(adapted, ids.tolist())
        for place in np.flatnonzero(labels[1:] != -100):
            losses.append(-likely[place, ids[place + 1]])
            hits.append(bool(likely[place].argmax() == ids[place + 1]))
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found["token_accuracy"] == pytest.approx(np.mean(hits))
    assert 0 < found["token_accuracy"] < 1
    assert found["tokens"] == len(losses)
    assert found["metrics"]["loss"]["low"] < found["loss"] < found["metrics"]["loss"]["high"]


def test_the_loss_is_that_of_the_batches(lm: LanguageModel) -> None:
    """Also to the bit, as the validation loss of a run is."""
    rows = ROWS * 40
    batches = TokenBatches(read_dataset(rows, lm.tokenizer), batch_tokens=1024, shuffle=False)
    found = evaluate(lm, rows)
    assert len(batches) > 3
    assert evaluate_batches(lm, batches) == {name: found[name] for name in ("loss", "tokens")}


def test_int8_has_a_token_accuracy(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf", "q8_0")
    assert evaluate(path, ROWS, compute="int8")["loss"] == pytest.approx(
        evaluate(path, ROWS)["loss"], abs=0.02
    )


# ---- metrics of answers ----


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("an   apple, a day", "Apple day.", 1, 1),
        ("theatre", "atre", 0, 0),  # "the" is an article only as a word
        ("U.S.", "us", 1, 1),
        ("the cat sat", "the cat slept here", 0, 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("no no yes", "no yes yes", 0, 2 / 3),  # each word counts as often as in both
        ("", "", 1, 1), ("", "x", 0, 0), ("a", "b", 0, 0),
        ("1 2 3", "3 2 1", 0, 1), ("1,000 (about)", "about 1000.", 0, 1), ("$5", "5", 1, 1),
    ],
)  # fmt: skip
def test_exact_match_and_f1_are_those_of_squad(answer: str, reference: str, exact: float, f1: float) -> None:
    assert metrics.exact_match(answer, reference) == exact
    assert metrics.f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("-5", "5", 0), ("\N{MINUS SIGN}5.", "-5", 1), ("(-5)", "-5", 1), ("1.5", "15", 0),
        ("1.5.", "1.5", 1), ("3:1", "31", 0), ("1/2", "12", 0), ("5-3", "53", 0), ("1,5", "15", 0),
        ("well-known", "wellknown", 1), ("", "A", 0), ("A", "the", 0), ("a.", "A", 1), ("+", "-", 0),
        ("+", " + ", 1), ("?", "", 0),
    ],
)  # fmt: skip
def test_signs_numbers_and_answers_without_words_are_not_ignored(
    answer: str, reference: str, exact: float
) -> None:
    assert metrics.exact_match(answer, reference) == metrics.f1(answer, reference) == exact
    assert metrics.exact_match(reference, answer) == exact


def test_answers_are_generated_from_the_prompts_and_compared(lm: LanguageModel) -> None:
    entries = list[dict[str, Any]]()
    found = evaluate(
        lm, ROWS, metric=["exact_match,f1", lambda answer, reference, row: len(answer) + len(row["prompt"])],
        max_new_tokens=4, record=entries.append,
    )  # fmt: skip
    expected = lm.generate([row["prompt"] for row in ROWS], max_new_tokens=4)
    assert [entry["answer"] for entry in entries] == [text.strip() for text in expected]
    assert [entry["reference"] for entry in entries] == [row["completion"] for row in ROWS]
    lengths = [len(e["answer"]) + len(r["prompt"]) for e, r in zip(entries, ROWS, strict=True)]
    assert found["metrics"]["<lambda>"]["value"] == pytest.approx(np.mean(lengths))
    assert found["metrics"]["exact_match"]["value"] == 0
    assert found["loss"] == evaluate(lm, ROWS)["loss"]


def test_a_model_that_answers_as_the_references_matches_all(lm: LanguageModel) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": lm.generate(row["prompt"], max_new_tokens=3)} for row in ROWS
    ]
    rows = [row for row in rows if row["completion"].strip()]
    found = evaluate(lm, rows, metric="exact_match,f1", max_new_tokens=3)
    assert found["metrics"]["exact_match"]["value"] == 1 == found["metrics"]["f1"]["value"]


CHATS: list[dict[str, Any]] = [
    {"messages": [
        {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"},
        {"role": "user", "content": "thanks"},
    ]},
    {"conversations": [
        {"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"},
        {"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"},
    ]},
    {"instruction": "2+2=", "output": "4", "history": [["1+1=", "2"]]},
    {"prompt": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"},
                {"role": "user", "content": "2+2="}], "completion": "4"},
]  # fmt: skip


@pytest.mark.parametrize("row", CHATS, ids=["messages", "sharegpt", "alpaca", "completion"])
def test_a_chat_is_answered_up_to_its_last_assistant_turn(lm: LanguageModel, row: dict[str, Any]) -> None:
    entries = list[dict[str, Any]]()
    evaluate(lm, [row], metric="f1", max_new_tokens=5, record=entries.append)
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "1+1="), ("assistant", "2"), ("user", "2+2="))
    ]
    assert entries[0]["reference"] == "4"
    assert entries[0]["answer"] == lm.generate(messages, max_new_tokens=5).strip()


def test_chat_puts_prompts_into_the_chat_template(path: Path, tmp_path: Path) -> None:
    lm = load_model(save_small_llama(tmp_path / "m.gguf", changes={"tokenizer.chat_template": TEMPLATE}))
    entries = list[dict[str, Any]]()
    for chat in (False, True):
        evaluate(lm, ROWS[:1], metric="f1", max_new_tokens=5, record=entries.append, chat=chat)
    assert entries[0]["answer"] == lm.generate("0+0=", max_new_tokens=5).strip()
    assert entries[1]["answer"] == lm.generate("<user>0+0=<assistant>", max_new_tokens=5).strip()
    assert entries[0]["answer"] != entries[1]["answer"]


def test_prompts_are_answered_in_groups_of_limited_size(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nplora.finetuning.judging import answers

    prompts = [[1] * length for length in (3, 3, 9, 1, 1, 1)]
    assert [len(group) for group in answers.groups(prompts, 4)] == [6]
    monkeypatch.setattr(answers, "_MOST_TOKENS", 26)
    assert [len(group) for group in answers.groups(prompts, 4)] == [2, 2, 2]
    monkeypatch.setattr(answers, "_MOST_PROMPTS", 1)
    assert [len(group) for group in answers.groups(prompts, 4)] == [1] * 6


METRICS = """
def half(answer, reference, row):
    return 0.5 if row["prompt"] else 0

def breaks(answer, reference, row):
    if reference in ("2", "6"):
        raise KeyError("no such word")
    if reference == "4":
        return "many"
    if reference == "8":
        return float("nan")
    if reference == "10":
        raise SystemExit(3)
    if reference == "12":
        return float("inf")
    return 1

def never(answer, reference, row):
    return row["no such field"]

def loss(answer, reference, row):
    return 1.0

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not on Python's path."""
    (tmp_path / "my_metrics.py").write_text(METRICS)
    (tmp_path / "broken_metrics.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_metrics", "broken_metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_metrics"


def test_a_function_of_the_user_is_found_in_the_working_directory(lm: LanguageModel, module: str) -> None:
    before = list(sys.path)
    found = evaluate(lm, ROWS, metric=f"{module}:half", max_new_tokens=1)
    assert found["metrics"]["my_metrics:half"]["value"] == 0.5
    assert sys.path == before


def test_the_interval_of_a_metric_does_not_depend_on_the_model_before(
    lm: LanguageModel, adapters: Path
) -> None:
    calls = list[str]()

    def mine(answer: str, reference: str, row: dict[str, Any]) -> float:
        calls.append(answer)
        return 0.5 if len(calls) == len(ROWS) + 1 else True  # once, for the first adapter

    given = {"one": adapters / "trained", "other": adapters / "trained"}
    found = compare(lm, ROWS, given, metric=mine, max_new_tokens=1)
    scores = [one["metrics"]["mine"] for one in found.evaluations.values()]
    assert [score["value"] for score in scores] == [1, pytest.approx(1 - 0.5 / len(ROWS)), 1]
    assert scores[0]["low"] == scores[2]["low"] == pytest.approx(12 / (12 + 1.959964**2))  # Wilson's


def test_a_function_that_fails_shows_its_traceback_and_the_run_goes_on(
    lm: LanguageModel, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(
        UserWarning,
        match=r"^the metric my_metrics:breaks failed in 6 of 12 examples; a failed example counts",
    ):
        found = evaluate(lm, ROWS, metric=f"{module}:breaks", max_new_tokens=1)
    score = found["metrics"]["my_metrics:breaks"]
    assert (score["value"], score["failed"], score["examples"]) == (pytest.approx(6 / 12), 6, 12)
    shown = capsys.readouterr().err
    assert shown.count("KeyError: 'no such word'") == 1  # the second one is the same
    assert "metric my_metrics:breaks failed in data, row 2:\nTraceback" in shown
    assert 'line 7, in breaks\n    raise KeyError("no such word")' in shown
    assert "the metric returned 'many', expected a finite number" in shown


@pytest.mark.filterwarnings("ignore:the metric")
def test_a_failed_score_is_null_in_the_file_of_answers(lm: LanguageModel, module: str) -> None:
    entries = list[dict[str, Any]]()
    evaluate(lm, ROWS, metric="my_metrics:breaks", max_new_tokens=1, record=entries.append)
    scores = [entry["my_metrics:breaks"] for entry in entries]
    assert (scores.count(None), scores.count(1.0)) == (6, 6)


@pytest.mark.slow
def test_a_function_that_always_fails_has_no_value_but_a_reason(
    lm: LanguageModel, module: str, adapters: Path
) -> None:
    name, reason = "my_metrics:never", "KeyError: 'no such field'"
    options: dict[str, Any] = {"metric": f"f1,{name}", "max_new_tokens": 1}
    warning = f"the metric {name} failed in all of 12 examples, so it has no value: {reason}"
    with pytest.warns(UserWarning, match=f"^{re.escape(warning)}$"):
        found = evaluate(lm, ROWS, **options)
    score = found["metrics"][name]
    assert np.isnan(score["value"])
    assert (score["low"], score["high"], score["failed"], score["error"]) == (None, None, 12, reason)
    assert found["metrics"]["f1"]["error"] == ""
    shown = f"n/a, failed in all of 12 examples ({reason})"
    assert f"\n{name} {shown}" in evaluation_text(found)
    assert f"| {shown} |" in markdown_table({"m": found})
    with pytest.warns(UserWarning, match=f"^{re.escape(warning)}$"):
        compared = compare(lm, ROWS, {"mine": adapters / "trained"}, **options)
    assert f"'mine' and the base cannot be compared by {name}: n/a and n/a" in str(compared)
    assert json.loads(json.dumps(compared.as_json(), allow_nan=False))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("exactmatch", "evaluate: no metric 'exactmatch'; did you mean exact_match?"),
        ("rouge", "evaluate: no metric 'rouge', expected exact_match, f1 or module:function"),
        ("", "evaluate: no metric '', expected exact_match, f1 or module:function"),
        ("f1,,", "evaluate: no metric '', expected exact_match, f1 or module:function"),
        ("f1,f1", "evaluate: metric f1 is given twice"),
        ("my_metrics:haf", "evaluate: metric 'my_metrics:haf': my_metrics has no 'haf'; did you mean half?"),
        ("my_metrics:", "evaluate: metric 'my_metrics:': my_metrics has no ''"),
        ("my_metrics:number", "evaluate: metric 'my_metrics:number' is 3, expected a function"),
        (":half", "evaluate: metric ':half':  has no 'half'"),
    ],
)
def test_a_metric_that_is_not_found_is_an_error(
    lm: LanguageModel, module: str, metric: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        evaluate(lm, ROWS, metric=metric)


def test_a_metric_does_not_take_the_name_of_a_result(lm: LanguageModel) -> None:
    def loss(answer: str, reference: str, row: dict[str, Any]) -> float:
        return 1.0

    with pytest.raises(ValueError, match=r"^evaluate: the results already have an entry loss; give"):
        evaluate(lm, ROWS, metric=loss)


def test_functions_of_the_same_name_are_numbered(lm: LanguageModel) -> None:
    found = evaluate(lm, ROWS[:1], metric=[lambda *_: 1, lambda *_: 2, lambda *_: 3], max_new_tokens=1)
    values = {name: score["value"] for name, score in found["metrics"].items() if "lambda" in name}
    assert values == {"<lambda>": 1, "<lambda>_2": 2, "<lambda>_3": 3}


def test_rows_that_are_not_answered_are_told(tmp_path: Path) -> None:
    lm = load_model(
        save_small_llama(tmp_path / "m.gguf", changes={"tokenizer.chat_template": CALLS_TEMPLATE})
    )
    call = {"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {}}]},
    ]}  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.warns(
        UserWarning, match=r"^evaluate: no answer for 1 row of data: data, row 2: the last assistant"
    ):
        found = evaluate(lm, [chat, call], metric="f1", max_new_tokens=1, skip_bad=True)
    assert (found["examples"], found["metrics"]["f1"]["examples"]) == (2, 1)
    with pytest.raises(
        DataError, match=r"^data: no row has a prompt that can be used: data, row 1: the last assistant"
    ):
        evaluate(lm, [call], metric="f1", skip_bad=True)


def test_a_module_that_is_not_found_or_fails_is_an_error(lm: LanguageModel, module: str) -> None:
    with pytest.raises(ValueError, match=r"the module 'my_metric' is neither in .* nor installed$"):
        evaluate(lm, ROWS, metric="my_metric:half")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        evaluate(lm, ROWS, metric="broken_metrics:half")
    with pytest.raises(TypeError, match="metric is 3, expected a name or a function"):
        evaluate(lm, ROWS, metric=[3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "abc"}, "data, row 1: the row has no prompt"),
        (
            {"messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {}}]},
            ]},
            "data, row 1: the last assistant turn of weight 1 calls a tool",
        ),
        (
            {"prompt": "x" * 80, "completion": "y"},
            "data, row 1: the prompt has 80 tokens, expected fewer than 64 (the model's context)",
        ),
    ],
)  # fmt: skip
def test_a_row_without_a_prompt_has_no_answer(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    lm = load_model(
        save_small_llama(tmp_path / "m.gguf", changes={"tokenizer.chat_template": CALLS_TEMPLATE})
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        evaluate(lm, [row], metric="f1", max_length=200)


def test_a_plain_text_has_no_answers(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text\n")
    with pytest.raises(DataError, match=r"t\.txt: a plain text has no prompts"):
        evaluate(lm, tmp_path / "t.txt", metric="f1")


# ---- multiple choice ----


def test_choices_are_chosen_by_their_log_probability(lm: LanguageModel) -> None:
    entries = list[dict[str, Any]]()
    found = evaluate(lm, QUESTIONS, record=entries.append)
    sums, counts = np.zeros((9, 3)), np.zeros((9, 3))
    for i, row in enumerate(QUESTIONS):
        for j, text in enumerate(row["choices"]):  # type: ignore[arg-type]
            prompt = lm.tokenizer.encode_prompt(row["prompt"])  # type: ignore[arg-type]
            ids = lm.tokenizer.encode_prompt(f"{row['prompt']} {text}")
            likely = log_probs(lm, ids)[np.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]
            sums[i, j], counts[i, j] = likely.sum(), len(likely)
    np.testing.assert_allclose([entry["log_probs"] for entry in entries], sums, atol=1e-4)
    right = np.array([row["answer"] for row in QUESTIONS])
    characters = np.array([[len(text) for text in row["choices"]] for row in QUESTIONS])  # type: ignore[attr-defined]
    for name, scores in (("acc", sums), ("acc_norm", sums / characters), ("acc_token", sums / counts)):
        assert found["metrics"][name]["value"] == pytest.approx(np.mean(scores.argmax(axis=1) == right)), name
    rows = np.arange(9)
    assert found["loss"] == pytest.approx(-sums[rows, right].sum() / counts[rows, right].sum(), abs=1e-5)
    assert found["tokens"] == counts[rows, right].sum()
    assert len({found["metrics"][name]["value"] for name in ("acc", "acc_norm", "acc_token")}) == 3


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, 1),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "y"}, 1),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "B"}, 1),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "1"}, 1),
        ({"prompt": "q", "choices": ["1", "0"], "answer": "0"}, 1),  # a choice before an index
        ({"prompt": "q", "choices": ["B", "C"], "answer": "B"}, 0),  # a choice before a letter
        ({"prompt": "q", "choices": {"text": ["x", "y"], "label": ["3", "4"]}, "answer": "4"}, 1),
        ({"prompt": [{"role": "user", "content": "q"}], "choices": ["x", "y"], "answer": 1}, 1),
    ],
)
def test_the_answer_is_a_choice_a_letter_or_an_index(
    lm: LanguageModel, row: dict[str, Any], right: int
) -> None:
    entries = list[dict[str, Any]]()
    evaluate(lm, [row], record=entries.append)
    assert entries[0]["answer"] == right


def test_a_name_of_columns_that_no_question_has_is_an_error(lm: LanguageModel) -> None:
    row = {"prompt": "1+1=", "choices": ["1", "2"], "answer": 1}
    with pytest.raises(DataError, match=r"no row has a field that --columns .* renames"):
        evaluate(lm, [row], columns={"answer": "lable"})


def test_columns_rename_the_fields_of_choices(lm: LanguageModel) -> None:
    rows = [{"ctx": "1+1=", "endings": ["2", "3"], "label": "0"}]
    found = evaluate(lm, rows, columns="prompt=ctx,choices=endings,answer=label")
    assert found == evaluate(lm, [{"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}])


def test_tools_of_questions_that_the_model_does_not_see_are_counted(lm: LanguageModel) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{**row, "tools": tools if n < 2 else None} for n, row in enumerate(QUESTIONS)]
    with pytest.warns(
        UserWarning,
        match=r"^data: in 2 examples, the chat template or the format of the row leaves out tools, so the",
    ):
        evaluate(lm, rows)


@pytest.mark.parametrize(
    ("prompt", "choice", "joined"),
    [
        ("q:", "x", "q: x"),
        ("q: ", "x", "q: x"),
        ("q:\n", "x", "q:\nx"),
        ("q:", " x", "q: x"),
        ("q:", "\nx", "q:\nx"),
    ],
)
def test_a_choice_follows_white_space(lm: LanguageModel, prompt: str, choice: str, joined: str) -> None:
    from nplora.finetuning.data.choices import encode_choices
    from nplora.finetuning.data.examples import MultipleChoice

    found = encode_choices(lm.tokenizer, MultipleChoice(prompt, (choice, "other"), 0), "here", chat=False)
    assert lm.tokenizer.decode([*found.prompt, *found.continuations[0]]) == joined
    assert lm.tokenizer.decode(found.prompt) == "q:"


def test_choices_in_a_chat_follow_the_template(tmp_path: Path) -> None:
    lm = load_model(save_small_llama(tmp_path / "m.gguf", changes={"tokenizer.chat_template": TEMPLATE}))
    entries = list[dict[str, Any]]()
    evaluate(lm, [{"prompt": "q", "choices": ["xy", "z"], "answer": 0}], chat=True, record=entries.append)
    ids = lm.tokenizer.encode("<user>q<assistant>xy")
    expected = log_probs(lm, ids)[np.arange(len(ids) - 1), ids[1:]][-2:].sum()
    assert entries[0]["log_probs"][0] == pytest.approx(expected, abs=1e-4)


def test_the_right_choice_is_the_reference_of_a_generated_answer(lm: LanguageModel) -> None:
    entries = list[dict[str, Any]]()
    found = evaluate(lm, QUESTIONS, metric="f1", max_new_tokens=2, record=entries.append)
    assert {"acc", "f1"} <= found["metrics"].keys()
    assert entries[-1]["reference"] == "no idea"


GOOD: dict[str, Any] = {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt is None, expected a string"),
        ({"prompt": 3}, "prompt is 3, expected a string"),
        ({"prompt": " "}, "prompt is empty, expected a text"),
        ({"prompt": []}, r"prompt is \[\], expected a string"),
        ({"prompt": [{"role": "user"}]}, r"a message has the fields \['role'\], expected the field"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "prompt ends with a message of the assistant",
        ),
        ({"choices": "2"}, "choices is '2', expected a list of two or more different texts"),
        ({"choices": []}, r"choices is \[\], expected a list of two or more different texts"),
        ({"choices": ["2"]}, r"choices is \['2'\], expected a list of two or more different texts"),
        ({"choices": ["2", "2"]}, ".* expected a list of two or more different texts"),
        ({"choices": ["2", 3]}, ".* expected a list of two or more different texts"),
        ({"choices": ["2", " "]}, ".* expected a list of two or more different texts"),
        (
            {"choices": {"text": ["2", "3"], "label": ["A"]}},
            "the labels of choices are .*, expected a different label for each",
        ),
        ({"choices": {"label": ["A"]}}, ".* expected a list of two or more different texts"),
        ({"answer": None}, "answer is None, expected one of the choices, or 0 to 1"),
        ({"answer": 2}, "answer is 2, expected one of the choices, or 0 to 1"),
        ({"answer": -1}, "answer is -1, expected one of the choices, or 0 to 1"),
        ({"answer": True}, "answer is True, expected one of the choices, or 0 to 1"),
        ({"answer": 0.0}, "answer is 0.0, expected one of the choices, or 0 to 1"),
        ({"answer": "C"}, "answer is 'C', expected one of the choices, or 0 to 1"),
        ({"answer": "9" * 5000}, "answer is '999"),
        ({"answer": ["2"]}, r"answer is \['2'\], expected one of the choices, or 0 to 1"),
        ({"completion": "x"}, "the row has both completion and choices, expected only one of them"),
        ({"prompt": "x" * 80}, "the prompt with its longest choice has 8[0-9] tokens, expected at most 64"),
    ],
)
def test_a_malformed_question_is_an_error_with_file_and_line(
    lm: LanguageModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | change)}\n")
    with pytest.raises(DataError, match=rf"q\.jsonl, line 2(, message 1 of prompt)?: {message}"):
        evaluate(lm, tmp_path / "q.jsonl")
    found = evaluate(lm, tmp_path / "q.jsonl", skip_bad=True, metric="f1", max_new_tokens=1)
    assert (found["examples"], found["skipped"]) == (1, 1)
    assert found["metrics"]["f1"]["examples"] == 1


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_a_question_without_a_field_names_it(lm: LanguageModel, field: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(DataError, match=rf"data, row 1: {field} is missing; the row has \["):
        evaluate(lm, [row])


def test_questions_and_other_rows_do_not_mix(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="row 2: the row has prompt and completion, but the earlier rows have prompt, choices"
    ):
        evaluate(lm, [GOOD, ROWS[0]])
    with pytest.raises(DataError, match="row 2: the row has prompt, choices and answer"):
        evaluate(lm, [ROWS[0], GOOD])
    with pytest.raises(
        DataError, match="row 1: the row has prompt, choices and answer, so it is for `nplora eval`"
    ):
        nplora.finetune(lm, [GOOD], tmp_path / "out")
    with pytest.raises(
        DataError, match="row 1: the row has prompt, choices and answer, so it is for `nplora eval`"
    ):
        read_dataset([GOOD], lm.tokenizer, format="choice")


@pytest.mark.parametrize("metric", [(), "f1"])
def test_empty_data_are_an_error(lm: LanguageModel, tmp_path: Path, metric: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no examples"):
        evaluate(lm, tmp_path / "empty.jsonl", metric=metric)
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD | {"answer": 5}) + "\n")
    with pytest.raises(
        DataError, match=r"bad\.jsonl: no examples: 1 bad row skipped \(.*bad\.jsonl, line 1: answer is 5"
    ):
        evaluate(lm, tmp_path / "bad.jsonl", skip_bad=True, metric=metric)


# ---- preference pairs ----

PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no idea"} for n in range(8)]


def answer_log_probs(lm: LanguageModel, answer: str) -> npt.NDArray[np.float64]:
    """For each prompt of PAIRS, log p of the tokens of an answer, which is a field of the row."""
    found = []
    for row in PAIRS:
        prompt = lm.tokenizer.encode_prompt(row["prompt"])
        ids = [*prompt, *lm.tokenizer.encode(row[answer]), lm.tokenizer.eos_id]
        likely = log_probs(lm, ids)
        found.append([likely[place - 1, ids[place]] for place in range(len(prompt), len(ids))])
    return np.array([sum(values) for values in found] + [np.mean(np.concatenate(found))])


def test_pairs_are_judged_by_the_log_probabilities_of_both_answers(lm: LanguageModel, adapters: Path) -> None:
    adapted = lm.with_adapter(nplora.read_adapter(adapters / "trained"))
    of_chosen, of_rejected = (answer_log_probs(adapted, name) for name in ("chosen", "rejected"))
    base_chosen, base_rejected = (answer_log_probs(lm, name) for name in ("chosen", "rejected"))
    found = evaluate(lm, PAIRS, adapter=adapters / "trained")
    assert found["loss"] == pytest.approx(-of_chosen[-1], abs=1e-5)
    metrics = {name: score["value"] for name, score in found["metrics"].items()}
    assert metrics["acc"] == np.mean(of_chosen[:-1] > of_rejected[:-1])
    rewards = (of_chosen - base_chosen)[:-1], (of_rejected - base_rejected)[:-1]
    assert metrics["reward_acc"] == np.mean(rewards[0] > rewards[1])
    assert metrics["reward_margin"] == pytest.approx(np.mean(rewards[0] - rewards[1]), abs=1e-4)
    assert (found["examples"], found["metrics"]["reward_acc"]["examples"]) == (8, 8)


@pytest.mark.slow
def test_pairs_are_compared_with_the_model_alone(lm: LanguageModel, adapters: Path) -> None:
    found = compare(lm, PAIRS, {"mine": adapters / "trained"})
    base = found.evaluations["base"]["metrics"]
    assert (base["reward_acc"]["value"], base["reward_margin"]["value"]) == (0.5, 0)
    assert "reward_acc" not in evaluate(lm, PAIRS)["metrics"]
    mine = evaluate(lm, PAIRS, adapter=adapters / "trained")
    assert found.evaluations["mine"] == mine
    metrics = [re.search(r"(loss|\w*acc\w*|reward_margin)", sentence) for sentence in found.sentences()]
    assert [one and one[1] for one in metrics] == ["loss", "acc", "acc_token", "reward_acc"]
    [margin] = [one for one in found.differences if one.metric == "reward_margin"]
    assert margin.is_better is None  # a larger margin does not mean a better model
    margin = dataclasses.replace(margin, p=0.01, difference=0.5, values=(0.5, 0.0), low=0.4, high=0.6)
    assert str(margin).startswith("'mine' differs from the base: reward_margin 0.500 against 0.000")


def test_the_accuracy_of_pairs_is_that_of_dpo(path: Path, lm: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"objective": "dpo", "beta": 0.5, "rank": 2, "lr": 1e-2, "steps": 4}
    report = nplora.finetune(path, PAIRS, out, valid=PAIRS, progress=False, keep="last", **options)
    last = report.history.evaluations[-1].val_metrics
    found = evaluate(lm, PAIRS, adapter=out)["metrics"]
    assert found["reward_acc"]["value"] == last["rewards/accuracies"]
    assert 0.5 * found["reward_margin"]["value"] == pytest.approx(last["rewards/margins"], rel=1e-4)


def test_pairs_are_not_answered_and_do_not_mix(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: metric scores generated answers, but no answers are"):
        evaluate(lm, PAIRS, metric="f1")
    with pytest.raises(DataError, match=r"^data, row 2: the row has prompt and completion"):
        evaluate(lm, [PAIRS[0], ROWS[0]])


@pytest.mark.parametrize("rows", [PAIRS, QUESTIONS], ids=["pairs", "questions"])
def test_all_tokens_of_pairs_and_questions_are_not_judged(lm: LanguageModel, rows: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: learn='all' counts prompts too, but (pref|mult)"):
        evaluate(lm, rows, learn="all")
    assert evaluate(lm, ROWS, learn="all")["tokens"] > evaluate(lm, ROWS)["tokens"]


# ---- comparisons ----


@pytest.mark.slow
def test_each_adapter_is_compared_with_the_base_and_the_best_with_the_others(
    lm: LanguageModel, adapters: Path
) -> None:
    found = compare(lm, ROWS, [adapters / "random", adapters / "trained"])
    names = [str(adapters / name) for name in ("random", "trained")]
    assert list(found.evaluations) == ["base", *names]
    assert found.evaluations["base"] == evaluate(lm, ROWS)
    for name in names:
        assert found.evaluations[name] == evaluate(lm, ROWS, adapter=name)
    pairs = [(one.one, one.other) for one in found.differences if one.metric == "loss"]
    assert pairs == [(names[0], "base"), (names[1], "base"), (names[1], names[0])]
    trained = found.differences[2]
    assert trained.is_better is True
    base, after = (found.evaluations[name]["loss"] for name in ("base", names[1]))
    assert trained.difference == pytest.approx(after - base)
    assert trained.low is not None
    assert trained.high is not None
    assert trained.p is not None
    assert trained.low < trained.difference < trained.high < 0
    assert trained.p < 0.01
    sentence = (
        f"{names[1]!r} is better than the base: loss {after:.4f} against {base:.4f}, "
        f"difference {after - base:.4f} (95 % interval {trained.low:.4f} to {trained.high:.4f}, "
        f"p = {trained.p:.3f})"
    )
    assert sentence in str(found).splitlines()


def test_a_comparison_warns_of_adapters_that_were_trained_in_another_form(
    lm: LanguageModel, adapters: Path
) -> None:
    one = dataclasses.replace(nplora.read_adapter(adapters / "trained"), chat_template=True)
    with pytest.warns(
        UserWarning, match=r"^compare: .* was trained with the chat template, but this text is not"
    ):
        compare(lm, ROWS, {"mine": one})


def test_an_adapter_whose_loss_is_not_a_number_is_not_the_best(lm: LanguageModel, adapters: Path) -> None:
    bad = nplora.read_adapter(adapters / "trained")
    next(iter(bad.values())).A[:] = np.nan
    found = compare(lm, ROWS, {"bad": bad, "good": adapters / "trained"})
    assert [(d.one, d.other) for d in found.differences if d.metric == "loss"][-1] == ("good", "bad")


def test_a_worse_adapter_and_an_equal_one_are_named_so(lm: LanguageModel, adapters: Path) -> None:
    trained = nplora.read_adapter(adapters / "trained")
    found = compare(lm, ROWS, {"none": (trained, 0.0), "harmful": (trained, -1.0)})
    lines = str(found).splitlines()
    loss = found.evaluations["base"]["loss"]
    assert f"'none' and the base have the same loss: {loss:.4f}" in lines
    assert any(line.startswith("'harmful' is worse than the base: loss ") for line in lines)
    assert not any("token_accuracy" in line for line in lines[1:])


def test_a_higher_metric_is_better(lm: LanguageModel, adapters: Path) -> None:
    lengths = compare(
        lm,
        ROWS,
        {"a": adapters / "trained"},
        metric=lambda answer, reference, row: len(answer),
        max_new_tokens=6,
    )
    difference = next(one for one in lengths.differences if one.metric == "<lambda>")
    assert difference.difference < 0
    assert difference.is_better is False


def test_few_examples_have_no_interval(lm: LanguageModel, adapters: Path) -> None:
    found = compare(lm, ROWS[:1], [adapters / "trained"])
    assert "(no interval: fewer than two examples, or values that are not finite)" in str(found)
    assert found.evaluations["base"]["metrics"]["loss"]["low"] is None


@pytest.mark.parametrize("count", [5, 6])
def test_fewer_than_six_examples_cannot_show_a_difference(
    lm: LanguageModel, adapters: Path, count: int
) -> None:
    found = compare(lm, ROWS[:count], {"mine": adapters / "trained"})
    p = found.differences[0].p
    assert p == pytest.approx(2 / 2**count)  # the adapter is better on each example
    few = "5 examples are too few to tell 'mine' from the base: loss"
    begin = few if count == 5 else "'mine' is better than"
    assert found.sentences()[0].startswith(begin)


def test_a_comparison_can_be_written_as_json_and_markdown(lm: LanguageModel, adapters: Path) -> None:
    found = compare(lm, QUESTIONS, {"a|b": adapters / "random"}, metric="f1", max_new_tokens=1)
    again = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert again["evaluations"]["a|b"]["metrics"].keys() == found.evaluations["base"]["metrics"].keys()
    assert again["differences"][0]["values"] == list(found.differences[0].values)
    assert again["summary"] == found.sentences()
    head, rule, *rows = found.markdown().splitlines()
    assert head == "|  | loss | perplexity | token_accuracy | acc | acc_norm | acc_token | f1 |"
    assert rule == "|" + " --- |" * 8
    assert rows[1].startswith("| a\\|b | ")
    assert rows[3].startswith("- ")


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ([], ValueError, "compare: adapters is empty, expected at least one adapter"),
        ({}, ValueError, "compare: adapters is empty, expected at least one adapter"),
        (["a", "b", "./a"], ValueError, "compare: adapter a is given twice, expected each"),
        ("a", TypeError, "compare: adapters is 'a', expected a list or a dictionary"),
        ([3], TypeError, "compare: an adapter is 3, expected a path, an Adapter, a pair (one of these"),
        ({"base": "a"}, ValueError, "compare: an adapter has the name 'base'"),
    ],
)
def test_wrong_adapters_are_an_error(
    lm: LanguageModel, adapters: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        compare(lm, ROWS, adapters)


def test_an_adapter_of_another_model_is_an_error(lm: LanguageModel, adapters: Path, tmp_path: Path) -> None:
    file = gguf.open(lm.source)
    tensors = {
        name: 1 + tensor.numpy() if name.endswith("_norm.weight") else tensor for name, tensor in file.items()
    }
    gguf.save(tmp_path / "other.gguf", tensors, file.metadata.typed())
    other = load_model(tmp_path / "other.gguf")
    other.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(other, tmp_path / "stranger")
    with pytest.raises(FormatError, match="stranger: the adapter belongs to another model"):
        compare(lm, ROWS, [adapters / "random", tmp_path / "stranger"])
    assert compare(lm, ROWS, [tmp_path / "stranger"], any_base=True).evaluations
    with pytest.raises(FileNotFoundError):
        compare(lm, ROWS, [tmp_path / "nowhere"])


def test_a_model_with_an_adapter_is_no_base(path: Path, adapters: Path) -> None:
    lm = load_model(path)
    lm.add_lora(rank=2)
    with pytest.raises(ValueError, match="compare: the model already has an adapter"):
        compare(lm, ROWS, [adapters / "random"])


def test_records_name_the_system(lm: LanguageModel, adapters: Path) -> None:
    entries = list[dict[str, Any]]()
    compare(lm, ROWS[:2], {"mine": adapters / "random"}, metric="f1", max_new_tokens=1, record=entries.append)
    assert [entry["system"] for entry in entries] == ["base", "base", "mine", "mine"]


# ---- what an evaluation does not take ----


def test_a_weight_of_a_file_is_refused(lm: LanguageModel, path: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    for function in (evaluate, lambda lm, data: compare(lm, data, ["no adapter"])):
        with pytest.raises(ValueError, match=r"rows\.jsonl has the weight 2, but an evaluation counts each"):
            function(lm, [(data, 2.0)])
    assert evaluate(lm, [(data, 1.0), data])["examples"] == 2
    assert cli.main(["eval", str(path), "--data", f"{data}:0.5"]) == 2
    assert "rows.jsonl has the weight 0.5, but an evaluation counts each" in capsys.readouterr().err


def test_formats_that_a_command_does_not_take_are_not_listed(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: format='kto' is not available; possible: 'messages'"):
        evaluate(lm, [{"prompt": "a", "completion": "b"}], format="kto")
    for command, refused in (("eval", ["kto"]), ("merge", ["kto"]), ("teach", ["kto", "preference"])):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        words = capsys.readouterr().out
        assert "{messages,sharegpt,alpaca,completion,text" in words.replace("\n", "").replace(" ", "")
        assert not [name for name in refused if name in words]
