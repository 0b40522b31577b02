"""`nplora convert`: its arguments."""

from pathlib import Path

import pytest

from nplora import adapters, cli


def test_the_arguments_reach_convert_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "convert_adapter", lambda *arguments: f"converted {arguments}")
    base = "convert a b --base m"
    for line in ("convert a b", base, f"{base} --any-base", "convert a b --overwrite"):
        assert cli.main(line.split()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "converted ('a', 'b', None, False, False)",
        "converted ('a', 'b', 'm', False, False)",
        "converted ('a', 'b', 'm', True, False)",
        "converted ('a', 'b', None, False, True)",
    ]


def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for line, message in (
        ("convert MODEL x.gguf --base m", "--base is for adapters, but SOURCE is a model"),
        ("convert MODEL x.gguf --any-base", "--any-base is for adapters, but SOURCE is a model"),
        ("convert . x.gguf --dtype q8_0", "--dtype is for models, but SOURCE is not one"),
        ("convert nowhere x.gguf --dtype q8_0", "no such file: nowhere"),
    ):
        assert cli.main([str(tmp_path) if word == "MODEL" else word for word in line.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["convert a b --dtype bogus", "merge a b --output c --dtype foo"])
def test_an_unknown_storage_type_is_refused(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "model.gguf", "other.gguf"],
        ["convert", "model.gguf", "other.gguf", "--dtype", "q8_0"],
        ["merge", "model.gguf", "adapter", "--output", "merged.gguf"],
        ["generate", "model.gguf", "Hello"],
        ["info", "model.gguf"],
        ["export", "model.gguf", "--ollama", "made"],
    ],
    ids=["convert", "dtype", "merge", "generate", "info", "export"],
)
def test_an_empty_file_is_called_empty(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "nplora: error: model.gguf: the file is empty\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
