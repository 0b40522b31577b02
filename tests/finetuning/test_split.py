"""Rows that are held out: which they are, and that a file is read only once."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nplora.finetuning import load
from nplora.finetuning.data import preview, read_dataset, rows
from nplora.finetuning.data.kinds import recognise
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.split import is_held_out, text_of
from nplora.finetuning.options import FinetuneOptions
from nplora.formats.errors import DataError
from nplora.tokenizer import from_gguf
from small_llama import save_small_llama
from vocabularies import byte_level, opened

pytest.importorskip("tokenizers")

TOKENIZER = from_gguf(opened(byte_level()))
ROWS = [{"prompt": f"{n}+1=", "completion": "x" * (n + 1)} for n in range(30)]


def write(path: Path, written: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows are read from each file."""
    counts, before = Counter[str](), rows._READERS[".jsonl"]

    def counting(path: Any) -> Iterator[rows.Row]:
        for row in before(path):
            counts[Path(path).name] += 1
            yield row

    monkeypatch.setitem(rows._READERS, ".jsonl", counting)
    return counts


def contents(examples: Any) -> Counter[str]:
    return Counter(TOKENIZER.decode(ids) for ids, _ in examples)


def inputs(model: Path, data: Any, share: float) -> load.RunInputs:
    return load.read_inputs("finetune", model, data, None, FinetuneOptions(valid_split=share))


def test_a_first_row_that_the_objective_cannot_use_does_not_decide_the_format(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, *ROWS]
    options = FinetuneOptions(valid_split=0.3, skip_bad=True)
    model = save_small_llama(tmp_path / "m.gguf")
    found = load.read_inputs("finetune", model, rows, None, options)
    assert found.held_out is not None
    assert len(found.train) + len(found.held_out) == 30
    assert found.train.report.skipped == 1
    assert "expected one answer to learn" in found.train.report.problems[0]
    options = dataclasses.replace(options, objective="dpo")
    pairs = [{"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(30)]
    found = load.read_inputs("finetune", model, [ROWS[0], *pairs], None, options)
    assert found.held_out is not None
    assert len(found.train) + len(found.held_out) == 30


@pytest.mark.filterwarnings("ignore:.*without any field that --columns .* renames")
def test_the_names_of_columns_are_looked_for_on_both_sides(tmp_path: Path) -> None:
    model, others = save_small_llama(tmp_path / "m.gguf"), [{"text": f"{n}"} for n in range(40)]
    options = FinetuneOptions(valid_split=0.5, columns={"text": "t"})
    sides = {is_held_out(text, 0.5) for text in "abcdefgh"}
    assert sides == {False, True}
    for text in "abcdefgh":
        found = load.read_inputs("finetune", model, [{"t": text}, *others], None, options)
        assert found.held_out is not None
        assert len(found.train) + len(found.held_out) == 41
    with pytest.raises(DataError, match="no row has a field that --columns"):
        load.read_inputs("finetune", model, others, None, options)


def test_each_row_is_read_once_and_is_on_one_side(tmp_path: Path, reads: Counter[str]) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS[:12]), write(tmp_path / "b.jsonl", ROWS[12:])]
    found = inputs(save_small_llama(tmp_path / "m.gguf"), files, 0.3)
    assert reads == {"a.jsonl": 12, "b.jsonl": 18}
    assert found.held_out is not None
    assert 3 < len(found.held_out) < 18  # type: ignore[arg-type]
    whole = contents(read_dataset(ROWS, TOKENIZER))
    assert contents(found.train) + contents(found.held_out) == whole
    reads.clear()
    shown = preview(files, TOKENIZER, valid_split=0.3)
    assert reads == {"a.jsonl": 12, "b.jsonl": 18}
    assert shown.valid is not None
    assert len(shown.valid.lengths) == len(found.held_out)  # type: ignore[arg-type]


def test_a_row_stays_on_its_side_when_others_are_added(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    few, many = (inputs(model, list(reversed(ROWS[:count])), 0.3) for count in (20, 30))
    for side in ("train", "held_out"):
        assert contents(getattr(few, side)) <= contents(getattr(many, side))


def test_rows_that_mean_the_same_are_on_the_same_side(tmp_path: Path) -> None:
    """Other fields, the order of fields, and the form of tools do not matter."""
    model, tool = save_small_llama(tmp_path / "m.gguf"), {"name": "f"}
    same = [{"id": n, "tags": {f"t{n}"}, **row} for n in range(5) for row in ROWS]
    same += [{"completion": row["completion"], "prompt": row["prompt"]} for row in ROWS]
    found = inputs(model, same, 0.3)
    assert contents(found.train).keys().isdisjoint(contents(found.held_out))
    assert set(contents(found.held_out).values()) == {6}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for forms in (
        [{"messages": chat, "tools": tools} for tools in ([tool], json.dumps([tool]))],
        [
            {"messages": chat},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        ],
    ):
        examples = [recognise(row, "w").parse(Fields(row, "w")) for row in forms]
        assert examples[0] == examples[1]
        for share in (0.25, 0.5, 0.75):
            assert len({is_held_out(text_of(example, "w"), share) for example in examples}) == 1


def _called(text: str, id_: str) -> list[dict[str, Any]]:
    call = {"id": id_, "type": "function", "function": {"name": "f", "arguments": {"of": text}}}
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": id_, "content": "1"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    "forms",
    [
        lambda text: [{"messages": _called(text, id_)} for id_ in ("x", "y")],
        lambda text: [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b", **more}]}
            for more in ({}, {"weight": 1}, {"id": 3})
        ],
        lambda text: [
            {"instruction": f"{text}\nz", "output": "b"},
            {"instruction": text, "input": "z", "output": "b"},
            {"prompt": f"{text} z", "completion": "b"},
            {"messages": [{"role": "user", "content": f"{text} z"}, {"role": "assistant", "content": "b"}]},
        ],
        lambda text: [{"prompt": text, "completion": "b", "label": label} for label in (True, False)],
    ],
    ids=["calls", "weights", "kinds", "labels"],
)
def test_rows_of_one_text_are_on_one_side(forms: Callable[[str], list[dict[str, Any]]]) -> None:
    sides = set[bool]()
    for number in range(40):
        rows = forms(f"q{number}")
        examples = [recognise(row, "w").parse(Fields(row, "w")) for row in rows]
        [side] = {is_held_out(text_of(example, "w"), 0.5) for example in examples}
        sides.add(side)
    assert sides == {True, False}


def test_held_out_rows_have_no_weight(tmp_path: Path) -> None:
    model, path = save_small_llama(tmp_path / "m.gguf"), write(tmp_path / "a.jsonl", ROWS)
    once = inputs(model, path, 0.3)
    for weight in (3, 0.2):
        found = inputs(model, [(path, weight)], 0.3)
        assert contents(found.held_out) == contents(once.held_out)
        assert contents(found.train) != contents(once.train)


def test_a_directory_with_validation_data_is_not_divided(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"valid_split is 0\.3, but there are validation data already"):
        preview(tmp_path, TOKENIZER, valid_split=0.3)


def test_columns_and_a_format_decide_what_a_row_means(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    named = [{"q": row["prompt"], "a": row["completion"], "n": n} for n, row in enumerate(ROWS)]
    options = FinetuneOptions(valid_split=0.3, columns={"prompt": "q", "completion": "a"})
    found = load.read_inputs("finetune", model, named, None, options)
    assert contents(found.held_out) == contents(inputs(model, ROWS, 0.3).held_out)


def test_a_value_without_json_is_an_error_of_its_row(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    for value in ({1, 2}, float("nan"), object()):
        call = {"name": "f", "arguments": {"x": value}}
        bad = {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [call]},
            ]
        }
        with pytest.raises(DataError, match="data, row 1: a tool call has an argument that JSON cannot"):
            inputs(model, [bad], 0.5)


def test_a_file_may_be_on_one_side_only(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    sides = inputs(model, ROWS, 0.3)
    held = contents(sides.held_out)
    kept_out = [row for row in ROWS if f"{row['prompt']}{row['completion']}<|end|>" in held]
    others = [row for row in ROWS if row not in kept_out]
    files = [write(tmp_path / "a.jsonl", kept_out), write(tmp_path / "b.jsonl", others)]
    for order in (files, files[::-1]):
        found = inputs(model, order, 0.3)
        assert found.held_out is not None
        assert contents(found.train) == contents(sides.train)
        assert contents(found.held_out) == held
        assert found.train.report.source.endswith("b.jsonl")
        assert found.held_out.report.source.endswith("a.jsonl, held out")
        assert "," not in found.train.report.source


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (
            1e-9,
            r"data: valid_split=1e-09 holds out 0 of 30 rows, which leaves none to evaluate on; .* larger",
        ),
        (1 - 1e-9, r"holds out 30 of 30 rows, which leaves none to train on; expected a smaller share"),
    ],
)
def test_a_side_without_rows_is_refused(share: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        inputs(save_small_llama(tmp_path / "m.gguf"), ROWS, share)


def test_an_empty_file_has_nothing_to_divide(tmp_path: Path) -> None:
    model, empty = save_small_llama(tmp_path / "m.gguf"), write(tmp_path / "e.jsonl", [])
    with pytest.raises(DataError, match=r"e\.jsonl: no examples"):
        inputs(model, empty, 0.5)
    with pytest.raises(DataError, match=r"e\.jsonl: no examples"):
        inputs(model, [write(tmp_path / "a.jsonl", ROWS), empty], 0.5)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        inputs(model, tmp_path / "bad.jsonl", 0.5)


def test_examples_that_are_trained_and_evaluated_are_counted(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    for valid, shared in ((ROWS[:3], 3), ([*ROWS[2:4], {**ROWS[0], "prompt": "new"}], 2)):
        options = FinetuneOptions()
        assert load.read_inputs("finetune", model, ROWS, valid, options).count_shared() == shared
    assert inputs(model, ROWS, 0.3).count_shared() == 0
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    dpo = FinetuneOptions(objective="dpo")
    assert load.read_inputs("finetune", model, rows, [*rows[:2], rows[3]], dpo).count_shared() == 3
    swapped = [{"prompt": "0", "chosen": "b", "rejected": "a"}]
    assert load.read_inputs("finetune", model, rows, swapped, dpo).count_shared() == 0
    judged = [{"prompt": f"{n}", "completion": "a", "label": n % 2 == 0} for n in range(4)]
    kto = FinetuneOptions(objective="kto")
    for label, shared in ((True, 1), (False, 0)):
        valid = [{**judged[0], "label": label}, {"prompt": "x", "completion": "y", "label": True}]
        assert load.read_inputs("finetune", model, judged, valid, kto).count_shared() == shared


@pytest.mark.parametrize("weight", [0.25, 1, 2])
def test_shared_examples_are_those_of_an_epoch(tmp_path: Path, weight: float) -> None:
    model, path = save_small_llama(tmp_path / "m.gguf"), write(tmp_path / "a.jsonl", ROWS[:8])
    options = FinetuneOptions()
    found = load.read_inputs("finetune", model, [(path, weight)], ROWS[:8], options).count_shared()
    assert found == (2 if weight == 0.25 else 8)
    valid = load.read_inputs("finetune", model, ROWS, [(path, weight)], options)
    assert valid.count_shared() == len(valid.held_out or ()) == 8 * weight  # type: ignore[arg-type]
