"""`nplora classify`: train, eval and predict."""

import csv
import errno
import json
import re
import stat
from pathlib import Path

import numpy as np
import pytest

import systems
from nplora import cli
from small_encoder import save_small_encoder

pytest.importorskip("tokenizers")

LINES = ["a cat and a dog,pet", "return an order,shop", "the cat sat,pet", '"where, is my parcel",shop']
FAST = ["--rank", "2", "--lr", "0.01", "--epochs", "20"]


def status_of(words: list[str]) -> object:
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_small_encoder(tmp_path / "model")
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *LINES]) + "\n")
    return tmp_path


def test_weights_are_kept_in_int8(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["classify", "train", "model", "--data", "train.csv", "--output", "out", "--steps", "1"]
    assert cli.main([*train, "--keep-int8"]) == 2
    assert "--keep-int8 needs --compute int8, but compute is 'float32'" in capsys.readouterr().err
    assert cli.main([*train, "--keep-int8", "--compute", "int8"]) == 0


def test_the_command_trains_evaluates_and_predicts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]
    assert cli.main(train) == 0
    out, err = capsys.readouterr()
    assert "2 labels: pet, shop" in out
    assert "texts/s" in err
    assert "left" in err
    shared = ["model", "--adapter", "out", "--data", "train.csv"]
    assert cli.main(["classify", "eval", *shared]) == 0
    assert "accuracy 1.0000" in capsys.readouterr().out
    assert cli.main(["classify", "eval", *shared, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion"] == [[2, 0], [0, 2]]
    assert cli.main(["classify", "predict", *shared]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in rows] == ["pet", "shop", "pet", "shop"]
    assert cli.main(["classify", "predict", *shared, "--output", "found.csv"]) == 0
    table = list(csv.DictReader((here / "found.csv").read_text().splitlines()))
    assert [row["text"] for row in table] == [row["text"] for row in rows]
    assert [float(row["probability pet"]) for row in table] == [row["probabilities"]["pet"] for row in rows]
    assert cli.main(["classify", "predict", *shared, "--output", "found.jsonl"]) == 0
    assert [json.loads(line) for line in (here / "found.jsonl").read_text().splitlines()] == rows
    assert cli.main(["classify", "predict", *shared, "--output", "found.npy"]) == 0
    np.testing.assert_array_equal(
        np.load(here / "found.npy"), [list(row["probabilities"].values()) for row in rows]
    )
    (here / "texts.txt").write_text("".join(f"{row['text']}\n" for row in rows))
    capsys.readouterr()
    assert cli.main(["classify", "predict", "model", "--adapter", "out", "--data", "texts.txt"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{key: value for key, value in row.items() if key != "label"} for row in rows]
    capsys.readouterr()
    assert cli.main(["classify", "predict", *shared, "--output", "found.csv"]) == 2
    assert "the file already exists; name another one, or replace it with --overwrite" in (
        capsys.readouterr().err
    )


def test_predictions_and_plots_replace_a_file_only_with_overwrite(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    shared = ["model", "--adapter", "out", "--data", "train.csv"]
    predict, plot = ["predict", *shared, "--output", "found.jsonl"], ["eval", *shared, "--plot", "found.png"]
    for command, name in ((predict, "found.jsonl"), (plot, "found.png")):
        (here / name).write_text("earlier")
        assert cli.main(["classify", *command]) == 2
        assert "already exists; name another one, or replace it with --overwrite" in capsys.readouterr().err
        assert (here / name).read_text() == "earlier"
        assert cli.main(["classify", *command, "--overwrite"]) == 0
        assert (here / name).read_bytes() != b"earlier"
    assert len((here / "found.jsonl").read_text().splitlines()) == len(LINES)

    (here / "found.jsonl").chmod(0o600)
    assert cli.main(["classify", *predict, "--overwrite"]) == 0
    if not systems.IS_WINDOWS:
        assert stat.S_IMODE((here / "found.jsonl").stat().st_mode) == 0o600
    assert cli.main(["classify", "predict", *shared, "--overwrite"]) == 2
    assert "classify predict: --overwrite needs --output" in capsys.readouterr().err

    names = sorted(path.name for path in here.iterdir())
    (here / "bad.jsonl").write_text('{"text": "a cat"}\n{"txt": "a dog"}\n')
    bad = ["predict", "model", "--adapter", "out", "--data", "bad.jsonl", "--output", "found.jsonl"]
    before = (here / "found.jsonl").read_text()
    assert cli.main(["classify", *bad, "--overwrite"]) == 2
    assert (here / "found.jsonl").read_text() == before
    assert sorted(path.name for path in here.iterdir()) == sorted([*names, "bad.jsonl"])

    def failing(source: str, target: str) -> None:
        raise PermissionError(errno.EACCES, "the file is in use", target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", failing)
        assert cli.main(["classify", *predict, "--overwrite"]) == 2
    assert (here / "found.jsonl").read_text() == before
    assert sorted(path.name for path in here.iterdir()) == sorted([*names, "bad.jsonl"])

    table = (here / "train.csv").read_text()
    capsys.readouterr()
    itself = ["classify", "predict", *shared, "--output", "train.csv", "--overwrite"]
    assert cli.main(itself) == 2
    assert "train.csv is the data itself, which is never overwritten" in capsys.readouterr().err
    assert (here / "train.csv").read_text() == table


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    capsys.readouterr()
    shared = ["model", "--adapter", "out", "--data", "train.csv"]
    missing = "none: the directory of the new file does not exist"
    for command, words in (
        (["classify", "eval", *shared, "--plot", "none/a.png"], missing),
        (
            ["classify", "eval", *shared, "--plot", "a.pdf"],
            "--plot is 'a.pdf', expected a name that ends in .png",
        ),
        (["classify", "predict", *shared, "--output", "none/a.csv"], missing),
        (["embed", "model", "train.csv", "--output", "none/a.npy"], missing),
        (["export", "out", "--ollama", "new"], "out: the directory holds no config.json, but an adapter"),
    ):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert not out
        assert words in err
        assert "left" not in err  # no progress was printed


def test_options_that_exclude_each_other_are_named_as_they_are_typed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["classify", "train", "model", "--data", "train.csv", "--output", "out"]
    assert cli.main([*train, "--epochs", "1", "--steps", "2"]) == 2
    assert "--epochs and --steps are both given" in capsys.readouterr().err
    assert cli.main([*train, "--calibrate"]) == 2
    assert "--calibrate needs validation data" in capsys.readouterr().err
    embed = ["embed", "model", "train.csv", "--output", "a.npy", "--prompt", "a", "--prompt-name", "b"]
    assert cli.main(embed) == 2
    assert "--prompt and --prompt-name are both given" in capsys.readouterr().err


def test_the_adapter_of_a_classifier_does_not_fit_other_commands(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["classify", "train", "model", "--data", "train.csv", "--output", "out", "--steps", "1"]
    assert cli.main(train) == 0
    capsys.readouterr()
    for command in (
        ["merge", "model", "out", "--output", "merged"],
        ["embed", "model", "train.csv", "--adapter", "out", "--output", "vectors.npy"],
    ):
        assert cli.main(command) == 2
        assert "this is the adapter of a classifier (task_type SEQ_CLS)" in capsys.readouterr().err


def test_an_adapter_that_is_given_as_the_model_is_recognised(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["classify", "train", "model", "--data", "train.csv", "--output", "out", "--steps", "1"]
    assert cli.main(train) == 0
    swapped = [
        ["merge", "out", "model", "--output", "merged"],
        ["embed", "out", "train.csv", "--output", "v.npy"],
    ]
    for command in swapped:
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert re.search(r"out: the directory holds (no|neither) ", err)
        assert ", but an adapter: give the base model, and this directory as the adapter" in err


TAGGED = "the O\ncat B-PET\nsat I-PET\n\na O\ndog B-PET\n\nreturn O\nmy O\norder O\n"


def test_the_command_labels_words(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "train.conll").write_text(TAGGED)
    train = ["classify", "train", "model", "--data", "train.conll", "--output", "out", *FAST]
    assert cli.main([*train, "--valid", "train.conll"]) == 0
    out, err = capsys.readouterr()
    assert "3 labels: B-PET, I-PET, O" in out
    assert "entity_f1" in out
    assert "3 sentences to train on, 3 labels" in err
    assert "words/s" in err
    shared = ["model", "--adapter", "out", "--data", "train.conll"]
    assert cli.main(["classify", "eval", *shared]) == 0
    assert "8 words: loss" in capsys.readouterr().out
    assert cli.main(["classify", "eval", *shared, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == report["entity_f1"] == 1
    assert report["entities"]["PET"]["support"] == 2
    assert cli.main(["classify", "predict", *shared]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"] for row in rows][1:] == [["a", "dog"], ["return", "my", "order"]]
    assert [row["prediction"] for row in rows] == [row["tags"] for row in rows]
    words = ["classify", "predict", *shared, "--probabilities", "--output", "found.jsonl"]
    assert cli.main(words) == 0
    found = [json.loads(line) for line in (here / "found.jsonl").read_text().splitlines()]
    for row in found:
        chances = np.array(list(row.pop("probabilities").values()))
        np.testing.assert_allclose(chances.sum(axis=0), 1)
        np.testing.assert_allclose(chances.max(axis=0), row["probability"])
    assert found == rows
    capsys.readouterr()
    for end in ("csv", "npy"):
        assert cli.main(["classify", "predict", *shared, "--output", f"found.{end}"]) == 2
        text = "expected a name that ends in .jsonl or .conll, because the classifier labels words"
        assert text in capsys.readouterr().err
        assert not (here / f"found.{end}").exists()
    words = ["classify", "predict", *shared, "--output", "found.conll"]
    assert cli.main([*words, "--probabilities"]) == 2
    assert "a .conll file has no probabilities; write .jsonl" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert (here / "found.conll").read_text() == TAGGED.replace(" ", "\t") + "\n"


@pytest.mark.filterwarnings("ignore:predict_rows")
@pytest.mark.parametrize(
    ("row", "lines", "columns"),
    [
        ('{"words": ["New York", "\u200b"]}', ["New York", "\u200b\t_"], []),
        ('{"w": ["a"], "tokens": "x"}\n{"w": []}', ["a", ""], ["--columns", "tokens=w"]),
        ('{"tokens": ["a\\tb"]}', "row 1: 'a\\tb' has a tab or a line break, which would end the field", []),
        ('{"tokens": ["a"]}\n{"tokens": ["a\\nb"]}', "row 2: 'a\\nb' has a tab or a line break", []),
        ('{"tokens": ["-DOCSTART-"]}', "row 1: '-DOCSTART-' begins a document in a .conll file; write", []),
        ('{"tokens": ["a", "-DOCSTART-x"]}', "row 1: '-DOCSTART-x' begins a document in a .conll", []),
    ],
)
def test_predictions_in_a_conll_file(
    row: str, lines: list[str] | str, columns: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "train.conll").write_text(TAGGED)
    train = ["classify", "train", "model", "--data", "train.conll", "--output", "out", "--steps", "1"]
    assert cli.main(train) == 0
    (here / "rows.jsonl").write_text(row + "\n", encoding="utf-8")
    words = ["classify", "predict", "model", "--adapter", "out", "--data", "rows.jsonl", *columns]
    status = cli.main([*words, "--output", "found.conll"])
    if isinstance(lines, str):
        assert status == 2
        assert lines in capsys.readouterr().err
        assert not (here / "found.conll").exists()
        return
    assert status == 0
    found = (here / "found.conll").read_text(encoding="utf-8").split("\n")
    assert [re.sub("\t([BI]-PET|O)$", "", line) for line in found] == [*lines, "", ""]


def test_a_classifier_of_texts_writes_no_conll_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    words = ["classify", "predict", "model", "--adapter", "out", "--data", "train.csv", "--output", "a.conll"]
    assert cli.main(words) == 2
    text = "expected a name that ends in .csv or .jsonl or .npy, because the classifier labels texts"
    assert text in capsys.readouterr().err
    assert not (here / "a.conll").exists()


@pytest.mark.slow
def test_eval_draws_the_confusion_matrix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    words = ["classify", "eval", "model", "--adapter", "out", "--data", "train.csv", "--plot", "found.png"]
    assert cli.main(words) == 0
    assert (here / "found.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "found.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train model --data train.csv", "--output DIR is missing"),
        ("train model --data train.csv --output out --adapter x", "--adapter is for eval and predict"),
        ("train model --data train.csv --output out --json", "--json is for eval"),
        ("eval model --data train.csv --rank 3", "--rank is an option of classify train"),
        ("eval model --data train.csv --resume", "--resume is an option of classify train"),
        ("predict model --data train.csv --valid v", "--valid is an option of classify train"),
        (
            "predict model --data train.csv --output a.txt",
            "expected a name that ends in .csv or .jsonl or .npy (texts), or in .jsonl or .conll (words)",
        ),
        ("predict model --data train.csv --plot a.png", "--plot is for eval"),
        ("train model --data train.csv --output out --plot a.png", "--plot is for eval"),
        ("train model --data train.csv --output out --probabilities", "--probabilities is for predict"),
        ("eval model --data train.csv --probabilities", "--probabilities is for predict"),
        ("train model --data train.csv --output out --task tokens", "line 2: no field 'tokens' or 'words'"),
        ("train model --data train.csv --output out --compute int4", "invalid choice: 'int4'"),
        ("eval model --data train.csv", "the model has no layer 'classifier', expected the files of a"),
        ("train model --data train.csv --output out --task many", "invalid choice: 'many'"),
        ("train model --data no.csv --output out", "no such file: no.csv"),
        ("train model --data train.csv --output out --lr 0", "lr is 0.0, expected above 0"),
    ],
)
def test_wrong_use_is_one_line(
    words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(["classify", *words.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (here / "out").exists()


def test_a_file_of_predictions_is_not_left_behind_after_an_error(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    (here / "rows.jsonl").write_text('{"text": "a cat"}\n{"review": "a cat"}\n')
    words = ["classify", "predict", "model", "--adapter", "out", "--data", "rows.jsonl", "--output", "p.csv"]
    assert cli.main(words) == 2
    assert "rows.jsonl, line 2: no field 'text'" in capsys.readouterr().err
    assert not (here / "p.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '{"text": "a cat", "id": 1}\n{"text": "a dog", "note": 2}\n',
            "row 2 has a field 'note', but the first",
        ),
        (
            '{"text": "a cat", "probability pet": 1}\n',
            "row 1 has a field 'probability pet', but predict writes a column",
        ),
        (
            '{"text": "a cat", "prediction": 1}\n',
            "line 1: the row already has a field 'prediction'",
        ),
    ],
)
def test_no_field_of_a_row_is_lost_in_a_table(
    rows: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", "train", "model", "--data", "train.csv", "--output", "out", *FAST]) == 0
    (here / "rows.jsonl").write_text(rows)
    words = ["classify", "predict", "model", "--adapter", "out", "--data", "rows.jsonl", "--output", "p.csv"]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (here / "p.csv").exists()
