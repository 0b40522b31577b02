"""The lines that the command line prints for errors and warnings."""

import json
from pathlib import Path

import pytest

from nplora import cli
from nplora.cli.errors import Spelling
from small_llama import save_small_llama

OPTIONS = {
    "resume": "--resume",
    "overwrite": "--overwrite",
    "lr": "--lr",
    "rank": "--rank",
    "valid_split": "--valid-split",
    "columns": "--columns",
    "chat": "--chat",
    "dtype": "--dtype",
    "layers": "--layers",
    "data": "--data",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: valid_split=0.5 holds out 0", "a: --valid-split 0.5 holds out 0"),
        ("finetune: valid_split is 2.0, expected", "finetune: --valid-split is 2.0, expected"),
        ("without valid_split.", "without --valid-split."),
        ("use dtype='q8_0', or layers='last:4'.", "use --dtype q8_0, or --layers last:4."),
        ("with lr=1e-3.", "with --lr 1e-3."),
        ("resume=True continues the run", "--resume continues the run"),
        ("--resume (resume=True) continues, --overwrite (overwrite=True) deletes",
         "--resume continues, --overwrite deletes"),
        ("--resume with a lower --lr (resume=True, a lower lr) continues",
         "--resume with a lower --lr continues"),
        ("--columns prompt=a (columns={'prompt': 'a'}) reads", "--columns prompt=a reads"),
        ("chat=True (--chat) does that", "--chat does that"),
        ("out: valid_split was 0.1, is not set", "out: --valid-split was 0.1, is not set"),
        ("out: with lr=1e-3 and no valid_split, as", "out: with --lr 1e-3 and no --valid-split, as"),
        # what stays
        ("d/a_config.json: valid_split is 1, expected", "d/a_config.json: valid_split is 1, expected"),
        ("d.jsonl, line 1: text is 'with lr=1e-3'", "d.jsonl, line 1: text is 'with lr=1e-3'"),
        ("d/t.jsonl: valid_split=0.5 holds out 0", "d/t.jsonl: --valid-split 0.5 holds out 0"),
        ("chat=False", "chat=False"),
        ("the rank is 8, the data are bad, lr is -1", "the rank is 8, the data are bad, lr is -1"),
        ("fields ['valid_split', \"valid_split\"]", "fields ['valid_split', \"valid_split\"]"),
        ("no such file: out/valid_split/a", "no such file: out/valid_split/a"),
        ("no such file: valid_split/a", "no such file: valid_split/a"),
        ("no such file: valid_split.jsonl", "no such file: valid_split.jsonl"),
        ("no such file: runs/lr=1e-3", "no such file: runs/lr=1e-3"),
        ("no such file: lr=1e-3/adapter", "no such file: lr=1e-3/adapter"),
        ("my_rank=8 and rank=many", "my_rank=8 and rank=many"),
        ("a (resume=True)", "a (--resume)"),
    ],
)  # fmt: skip
def test_keywords_become_options(text: str, expected: str) -> None:
    assert Spelling(OPTIONS, ["finetune"])(text) == expected


def test_what_the_user_typed_stays() -> None:
    spelled = Spelling(
        OPTIONS, ["finetune", "m", "--output", "lr=1", "--data", "valid_split", "--adapter", "lr"]
    )
    assert spelled("no such file: lr=1") == "no such file: lr=1"
    assert spelled("no such file: valid_split") == "no such file: valid_split"
    assert spelled("lr: valid_split is 2") == "lr: valid_split is 2", "a file of this name"
    spelled = Spelling(OPTIONS, ["finetune", "m", "--data", "data_valid_split.jsonl"])
    assert spelled("finetune: valid_split is 2.0, expected") == "finetune: --valid-split is 2.0, expected"
    assert Spelling({}, [])("valid_split=2 (a=1)") == "valid_split=2 (a=1)"


@pytest.mark.parametrize(
    ("typed", "files", "meant"),
    [
        ("modle.gguf", ["model.gguf", "train.jsonl"], "model.gguf"),
        ("trian.jsonl", ["train.jsonl", "valid.jsonl"], "train.jsonl"),
        ("train3.jsonl", ["train1.jsonl", "train2.jsonl"], None),
        ("other.gguf", ["model.gguf"], None),
        ("none/model.gguf", ["model.gguf"], None),
    ],
)
def test_a_missing_file_is_refused_with_the_one_that_has_a_similar_name(
    typed: str, files: list[str], meant: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    assert cli.main(["info", str(tmp_path / typed)]) == 2
    near = "" if meant is None else f"; did you mean {tmp_path / meant}?"
    assert capsys.readouterr().err == f"nplora: error: no such file: {tmp_path / typed}{near}\n"


def test_a_missing_part_of_a_model_is_refused_without_the_name_of_another_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / shards[1]).write_bytes(b"")
    assert cli.main(["info", str(tmp_path / "model.safetensors.index.json")]) == 2
    assert capsys.readouterr().err == f"nplora: error: no such file: {tmp_path / shards[0]}\n"


def test_the_commands_name_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    model, data = str(save_small_llama(tmp_path / "model.gguf")), tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    line = ["finetune", model, "--data", str(data), "--output", str(tmp_path / "out"), "--steps", "1"]
    assert cli.main([*line, "--valid-split", "0.5"]) == 2
    found = capsys.readouterr().err
    assert "--valid-split 0.5 holds out" in found
    assert "valid_split" not in found
    data.write_text(json.dumps({"question": "1+1=", "completion": "2"}) + "\n")
    assert cli.main(line) == 2
    assert capsys.readouterr().err.endswith("; --columns prompt=NAME reads the field 'NAME' as prompt\n")
