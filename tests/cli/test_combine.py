"""`nplora combine`: its arguments."""

from pathlib import Path

import pytest

from nplora import cli


def test_a_word_that_is_neither_a_path_nor_a_path_with_a_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, weight in (("full:x", "x"), ("full:0,5", "0,5"), ("full:", "")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["combine", word, "--output", "o"])
        assert exit_.value.code == 2
        message = f"'{word}' does not exist, and in ADAPTER:WEIGHT '{weight}' is not a number"
        assert message in capsys.readouterr().err
    (tmp_path / "full:x").mkdir()
    assert cli.main(["combine", "full:x", "--output", "o"]) == 2
    assert "no such file: full:x/adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.gguf", "c.GGUF", "c.safetensors"])
def test_an_output_that_is_a_file_name_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["combine", "a", "b", "--output", name]) == 2
    message = f"--output names a directory, got '{name}'; nplora convert makes a .gguf of it"
    assert message in capsys.readouterr().err
