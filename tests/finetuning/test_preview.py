"""The preview of training data."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import cli
from nplora.finetuning import FinetuneOptions, load
from nplora.finetuning.data import preview, read_dataset
from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.sources import splits_of
from nplora.formats.errors import DataError
from nplora.models.packing import IGNORED
from nplora.tokenizer import from_gguf
from small_llama import save_small_llama
from vocabularies import byte_level, opened

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TOKENIZER = from_gguf(opened(byte_level() | {"tokenizer.chat_template": CHATML}))
ROWS = [{"prompt": f"{n}+1=", "completion": "x" * (n + 1)} for n in range(30)]


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_a_preview_shows_what_read_dataset_trains() -> None:
    for rows in (ROWS, [chat("a", "b", "c", "d")], [{"text": "hello"}]):
        found = preview(rows, TOKENIZER, examples=100)
        dataset = read_dataset(rows, TOKENIZER)
        assert found.train.lengths == tuple(dataset.lengths)
        assert found.train.trained == dataset.report.learned
        for shown, (ids, labels) in zip(found.examples, dataset, strict=True):
            assert "".join(text for text, _ in shown.pieces) == TOKENIZER.decode(ids)
            is_trained = np.r_[False, labels[1:] != IGNORED]
            trained = "".join(text for text, is_in in shown.pieces if is_in)
            assert trained == TOKENIZER.decode(ids[is_trained])
            assert shown.trained == is_trained.sum()


def test_a_preview_counts_what_a_run_cuts_and_leaves_out() -> None:
    rows = [*ROWS, {"prompt": "y" * 50, "completion": "z"}]
    for most in (10, 20, 60):
        found, report = preview(rows, TOKENIZER, max_length=most).train, read_dataset(
            rows, TOKENIZER, max_length=most
        ).report  # fmt: skip
        assert found.cut == report.truncated + report.emptied
        assert found.emptied == report.emptied
        kept = sum(min(length, most) for length in found.lengths) - report.emptied * most
        assert kept == report.tokens
        assert sum(found.lengths) - found.lost == kept + report.emptied * most
    text = str(preview(rows, TOKENIZER, max_length=20))
    assert "17 examples longer than 20 tokens: cut, which removes " in text
    assert "1 example left out: nothing to train on after the cut" in text


def test_duplicates_are_counted_inside_the_data_and_between_its_parts(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    found = preview([*ROWS, *ROWS[:2], ROWS[0]], TOKENIZER, valid=[*ROWS[:3], {**ROWS[0], "prompt": "new"}])
    assert found.train.repeated == 3
    assert found.shared == 3
    text = str(found)
    assert "3 examples equal to an earlier one" in text
    assert "the training data contain 3 of 4 validation examples, so the validation loss is too" in text
    ending = [{"prompt": "a", "completion": "b" * 30 + end} for end in "abcde"]  # equal after the cut
    for most in (20, 40):
        options = FinetuneOptions(max_length=most)
        read = load.read_inputs("test", model, ending[:3], ending[3:], options)
        found = preview(ending[:3], read.lm, valid=ending[3:], max_length=most)
        assert found.shared == read.count_shared() == (2 if most == 20 else 0)
    split = preview([*ROWS, *ROWS], TOKENIZER, valid_split=0.3)  # equal rows are on the same side
    assert split.valid is not None
    assert (split.train.repeated + split.valid.repeated, split.shared) == (30, 0)


def test_bad_rows_are_counted_and_the_first_are_shown() -> None:
    rows = [ROWS[0], {"prompt": "a"}, {"text": "b"}, "c", {"prompt": "", "completion": "x"}, ROWS[1]]
    found = preview(rows, TOKENIZER)
    assert (found.train.bad, len(found.train.lengths), len(found.train.problems)) == (4, 2, 3)
    text = str(found)
    assert "4 bad rows, which finetune refuses, or skips with --skip-bad (skip_bad=True):" in text
    assert "data, row 2: completion is missing" in text
    only_bad = str(preview([{"a": 1}], TOKENIZER))
    assert "data (no format): 0 examples, 0 tokens (0 in the loss)" in only_bad
    with pytest.raises(DataError, match="data is empty, expected rows"):
        preview({"train": iter([]), "valid": ROWS}, TOKENIZER)


def test_pairs_are_shown_with_both_answers() -> None:
    found = preview([{"prompt": "a", "chosen": "b", "rejected": "c"}], TOKENIZER)
    assert "data, row 1, chosen: 3 tokens, 2 trained\na[[b<|end|>]]" in str(found)
    assert "data, row 1, rejected: 3 tokens, 2 trained\na[[c<|end|>]]" in str(found)
    assert found.train.kinds == ("preference",)


def test_a_pair_is_one_example_which_a_run_leaves_out_if_the_cut_makes_its_answers_equal() -> None:
    rows = [{"prompt": "a", "chosen": "xxxxxxxxy", "rejected": "xxxxxxxxz"}] + [
        {"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(3)
    ]
    sources = splits_of("test", rows).train
    options = ReadOptions(max_length=5)
    report = read_pairs("test", sources, TOKENIZER, options, "dpo", PairDataset).report
    found = preview(rows, TOKENIZER, max_length=5, examples=2)
    assert (report.examples, report.emptied) == (found.train.epoch, found.train.emptied) == (3, 1)
    assert (found.train.examples, found.train.cut, len(found.examples)) == (4, 1, 4)
    assert "data (preference): 4 pairs, " in str(found)
    assert "pairs of answers are for --objective dpo, orpo or kto" in str(found)


def test_judgements_are_shown_and_opposite_ones_are_no_duplicates() -> None:
    row = {"prompt": "a", "completion": "x"}
    found = preview([{**row, "label": True}, {**row, "label": False}], TOKENIZER)
    assert found.train.repeated == 0
    assert "data, row 1, good: " in str(found)
    assert "data, row 2, bad: " in str(found)
    assert preview([{**row, "label": True}] * 2, TOKENIZER).train.repeated == 1


def test_questions_are_said_to_be_for_eval() -> None:
    question = {"prompt": "a", "choices": ["x", "y"], "answer": 0}
    assert "questions with choices are for `nplora eval`; finetune refuses them" in str(
        preview([question], TOKENIZER)
    )
    assert "eval" not in str(preview(ROWS, TOKENIZER))
    assert "a[[ x]]" in str(preview([question], TOKENIZER))  # what eval computes the log-probability of


@pytest.mark.parametrize("weight", [0.1, 1, 2.5, 1e9])
def test_the_examples_of_an_epoch_are_those_of_a_run(tmp_path: Path, weight: float) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = preview([(path, weight)], TOKENIZER, max_length=20)
    if weight == 1e9:
        assert "an epoch has 30,000,000,000 examples, but at most 33,554,432 are possible" in str(found)
        return
    assert found.train.epoch == len(read_dataset([(path, weight)], TOKENIZER, max_length=20))
    assert ("with the weights of the files" in str(found)) == (weight != 1)
    assert found.train.examples == 30


def test_text_cannot_change_the_terminal() -> None:
    found = preview([{"prompt": "a\x1b[2J\u202e", "completion": "b\x9b1m"}], TOKENIZER)
    assert "a\\x1b[2J\\x202e[[b\\x9b1m<|end|>]]" in found.text()
    assert found.text(colour=True).count("\x1b") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_split": 1.5}, "preview: valid_split is 1.5, expected between 0 and 1"),
        ({"valid_split": 0.5, "valid": ROWS}, "valid and valid_split are both given"),
        (
            {"valid_split": 1e-9},
            "data: valid_split=1e-09 holds out 0 of 30 rows, which leaves none to ",
        ),
        (
            {"valid_split": 1 - 1e-9},
            "holds out 30 of 30 rows, which leaves none to train on; ",
        ),
        ({"examples": -1}, "examples is -1"),
        ({"format": "chatml"}, "format='chatml' is not available; possible: 'messages', "),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preview(ROWS, TOKENIZER, **options)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_text_is_shown_in_the_windows_that_are_trained(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "".join(f"{n} and {n + 1}\n" for n in range(40))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = preview(path, TOKENIZER, examples=100, max_length=16)
    dataset = read_dataset(path, TOKENIZER, max_length=16)
    assert found.train.lengths == tuple(dataset.lengths)
    assert found.train.trained == dataset.report.learned
    assert (found.train.cut, found.train.emptied, found.train.bad) == (0, 0, 0)
    for shown, (ids, _) in zip(found.examples, dataset, strict=True):
        assert "".join(piece for piece, _ in shown.pieces) == TOKENIZER.decode(ids)
        assert shown.trained == len(ids) - 1
    assert f"{name} (plain text): {len(dataset)} examples" in str(found)
    assert f"{name}, window 1: 16 tokens, 15 trained" in str(found)
    assert preview(path, TOKENIZER, valid=path, max_length=16).shared == len(dataset)
    with pytest.raises(
        ValueError, match=r"preview: .*a\.txt.* is a plain text, which has no rows to hold out"
    ):
        preview(path, TOKENIZER, valid_split=0.5)


def test_the_command_shows_marks_or_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_small_llama(tmp_path / "model.gguf")
    rows = [{"question": "1+1=", "answer": "2"}, {"question": "x" * 90, "answer": "2"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["data", str(file), "--model", str(model), "--columns", "prompt=question,completion=answer"]
    assert cli.main([*line, "--examples", "1", "--valid", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"{file} (completion): 2 examples, " in printed
    assert "1 example longer than 64 tokens: cut" in printed  # the context of the model
    assert "1+1=[[2<|end|>]]" in printed
    assert "xxx" not in printed
    assert "the training data contain 1 of 1 validation example," in printed
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(line) == 0
    assert "1+1=\x1b[1;32m2<|end|>\x1b[0m" in capsys.readouterr().out
    assert cli.main([*line, "--valid-split", "2"]) == 2
    assert "--valid-split is 2.0, expected between 0 and 1" in capsys.readouterr().err


def test_a_model_stands_for_its_tokenizer(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf")
    lm = nplora.load_model(path)
    assert preview(ROWS, lm) == preview(ROWS, lm.tokenizer)
    assert len(read_dataset(ROWS, lm)) == len(ROWS)
    message = "tokenizer is .*, expected a model or its tokenizer, such as nplora.load_model.path..tokenizer$"
    for read in (preview, read_dataset):
        for wrong in (str(path), path, None):
            with pytest.raises(TypeError, match=f"^{read.__name__}: {message}"):
                read(ROWS, wrong)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}] * 2, "no row can be used: 2 bad rows"),
        ([{"prompt": "x" * 90, "completion": "b"}], "no row can be used: 1 left out because of the cut"),
    ],
)
def test_the_command_fails_if_no_row_can_be_used(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small_llama(tmp_path / "model.gguf")
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good.write_text(json.dumps(ROWS[0]) + "\n")
    for line in ([str(bad)], [str(good), "--valid", str(bad)]):
        assert cli.main(["data", *line, "--model", str(model)]) == 2
        printed = capsys.readouterr()
        assert f"{bad} (" in printed.out
        assert printed.err == f"nplora: error: {bad}: {message}\n"
    assert cli.main(["data", str(bad), str(good), "--model", str(model)]) == 0


@pytest.mark.parametrize(
    ("row", "weight", "message"),
    [
        (ROWS[0], ":0.000001", "the weights are so small that an epoch has no examples"),
        (
            {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0},
            "",
            "no row can be used: questions with choices are for `nplora eval`; finetune refuses them",
        ),
    ],
)
def test_the_command_fails_if_nothing_is_left_to_train_on(
    row: dict[str, Any], weight: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = save_small_llama(tmp_path / "model.gguf"), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert cli.main(["data", f"{file}{weight}", "--model", str(model)]) == 2
    assert capsys.readouterr().err == f"nplora: error: {file}: {message}\n"


# ---- fields that are not used ----


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "a", "completion": "b", "id": 7, "source": "", "notes": None, "tags": []}, ["id"]),
        ({"prompt": "a", "completion": "b", "system": "s"}, ["system"]),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "s", "question": "q"},
            ["system", "question"],
        ),
        ({"instruction": "a", "output": "b", "input": "i", "system": "s", "history": []}, []),
        ({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}, []),  # counted with `unused`
        ({"prompt": "q", "question": "a", "choices": ["b", "c"], "answer": 0}, ["question"]),
        ({"question": "a", "choices": ["b", "c"], "answer": 0}, []),
        (chat("a", "b") | {"category": "x"}, ["category"]),
        ({"prompt": "a", "completion": "b", "label": True, "score": 0}, ["score"]),
    ],
    ids=str,
)
def test_fields_that_are_not_used_are_listed(row: dict[str, Any], unused: list[str]) -> None:
    found = preview([row, row], TOKENIZER, examples=0)
    assert found.train.unread == dict.fromkeys(unused, 2)
    if unused:
        shown = ", ".join(f"{name!r} in 2 rows" for name in unused)
        assert f"\n  fields that are not used: {shown}\n" in str(found)
    else:
        assert "not used" not in str(found)


def test_training_reports_the_fields_that_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,\nc,y\n")
    report = read_dataset(tmp_path / "train.csv", TOKENIZER).report
    assert report.unread == {"label": 2}
    assert str(report).endswith("; fields that are not used: 'label' in 2 rows")
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}] * 2
    sources = splits_of("test", pairs).train
    dataset = read_pairs("test", sources, TOKENIZER, ReadOptions(), "dpo", PairDataset)
    assert dataset.report.unread == {"score": 2}


def test_fields_that_are_not_used_have_the_names_of_the_data() -> None:
    row = {"prompt": "not this", "question": "a", "completion": "b", "preamble": "s"}
    columns = {"prompt": "question", "system": "preamble"}
    found = preview([row], TOKENIZER, columns=columns)
    assert found.train.unread == {"preamble": 1, "prompt": 1}
    many = {"text": "a"} | {f"field {n}": n for n in range(30)}
    assert "'field 9' in 1 row, and 20 more\n" in str(preview([many], TOKENIZER))


FORGOTTEN = {"chosen": "It is 4.", "rejected": "It is 5."}
# As in Anthropic's data about helpful and harmless answers: both texts begin with the prompt.
DIALOGUE = {name: f"Human: 2+2=?\n\nAssistant: {text}" for name, text in FORGOTTEN.items()}


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ({"question": "2+2=?"}, "question"),
        ({"id": "a7", "ask": "What is 2+2?", "note": "a b"}, "ask"),
        ({"question": "q", "context": "a long text"}, "question"),
        ({"id": "a7", "source": "web"}, None),
        ({"prompt": "2+2=", "question": "2+2=?"}, None),
        ({"created": "2024-01-01 10:00:00"}, None),
        ({"question": "It is"}, None),
        (DIALOGUE | {"created": "in January 2024"}, None),
        (DIALOGUE | {"question": "2+2=?"}, None),
    ],
)
def test_a_pair_whose_prompt_has_another_name_is_warned_of(others: dict[str, Any], name: str | None) -> None:
    rows = [FORGOTTEN | others] * 3
    words = (
        f"found no prompt in 3 rows with chosen and rejected; --columns prompt={name} "
        f"(columns={{'prompt': '{name}'}}) reads the field '{name}' as prompt"
    )
    assert (words in str(preview(rows, TOKENIZER))) == (name is not None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_pairs("test", splits_of("test", rows).train, TOKENIZER, ReadOptions(), "dpo", PairDataset)
        if name is not None:
            options = ReadOptions(columns={"prompt": name})
            read_pairs("test", splits_of("test", rows).train, TOKENIZER, options, "dpo", PairDataset)
    assert [str(warning.message) for warning in caught] == ([f"data: {words}"] if name else [])


def test_several_names_of_a_prompt_make_one_warning() -> None:
    rows = [FORGOTTEN | {"ask": "What is 2+2?", "note": "of 2024"}] * 2 + [
        FORGOTTEN | {"ask": "What is 2+2?", "note": "a remark that is longer"}
    ]
    with pytest.warns(UserWarning, match="found no prompt") as caught:
        read_pairs("test", splits_of("test", rows).train, TOKENIZER, ReadOptions(), "dpo", PairDataset)
    [warning] = [str(one.message) for one in caught]
    assert warning.startswith(
        "data: found no prompt in 3 rows with chosen and rejected; --columns prompt=ask "
    )
    assert str(preview(rows, TOKENIZER)).count("found no prompt") == 1


def test_answers_that_begin_differently_name_the_field_that_may_be_the_prompt() -> None:
    [problem] = preview([{"question": "2+2=?", "chosen": "4", "rejected": "5"}], TOKENIZER).train.problems
    assert problem == (
        "data, row 1: chosen and rejected begin differently, expected the same prompt in both; --columns "
        "prompt=question (columns={'prompt': 'question'}) reads the field 'question' as prompt"
    )
