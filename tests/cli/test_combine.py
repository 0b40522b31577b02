"""`nplora combine`: its arguments."""

from pathlib import Path

import pytest

import systems
from nplora import cli


def test_a_word_that_is_neither_a_path_nor_a_path_with_a_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, weight in (("full:x", "x"), ("full:0,5", "0,5"), ("full:", "")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["combine", word, "--output", "o"])
        assert exit_.value.code == 2
        message = f"no such file: '{word}'; if this is PATH:WEIGHT, the weight '{weight}' is not a number"
        assert message in capsys.readouterr().err
    if systems.IS_WINDOWS:  # a name there holds no colon
        return
    (tmp_path / "full:x").mkdir()
    assert cli.main(["combine", "full:x", "--output", "o"]) == 2
    assert "no such file: full:x/adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        ["combine", f"a:{weight}", "--output", "o"],
        ["eval", "m", "--data", "d", "--adapter", f"a:{weight}"],
    ):
        with pytest.raises(SystemExit):
            cli.main(line)
        message = f"the weight of 'a' is {weight}, expected a finite number"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "merge m out:0.5 --output n",
        "finetune m --data d --output o --adapter out:0.5",
        "plan m --data d --adapter out:0.5",
    ],
)
def test_a_weight_is_refused_where_one_adapter_is_taken_as_it_is(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as exit_:
        cli.main(line.split())
    assert exit_.value.code == 2
    message = (
        "'out:0.5' has a weight, but this command takes no weights: "
        "nplora combine out:0.5 --output DIR writes an adapter with that weight"
    )
    assert message in capsys.readouterr().err
    (tmp_path / "out:0.5").mkdir()
    assert cli.main(line.split()) == 2
    assert "has a weight" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.gguf", "c.GGUF", "c.safetensors"])
def test_an_output_that_is_a_file_name_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["combine", "a", "b", "--output", name]) == 2
    message = f"--output is '{name}', expected a directory; nplora convert turns a directory into .gguf"
    assert message in capsys.readouterr().err
