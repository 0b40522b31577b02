"""NAME=PATH on the command line, the same for `nplora chat` and `nplora serve`."""

from pathlib import Path

import pytest

from nplora.cli.adapter_names import named_adapters
from nplora.cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("tone=out/tone", "tone", "out/tone"),
        ("out/tone", "tone", "out/tone"),
        ("out/tone.gguf", "tone", "out/tone.gguf"),
        ("out/my tone/", "my-tone", "out/my tone/"),
        ("team/tone=out", "team/tone", "out"),
        ("a=b=c", "a", "b=c"),
        ("./a=b", "a-b", "./a=b"),  # "./a" cannot be a name
        ("a..b=c", "a.b-c", "a..b=c"),
    ],
)
def test_name_and_path_are_split(text: str, name: str, path: str) -> None:
    assert named_adapters([text]) == {name: path}


def test_a_file_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rank=8").mkdir()
    assert named_adapters(["rank=8"]) == {"rank-8": "rank=8"}


def test_the_working_directory_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tone").mkdir()
    monkeypatch.chdir(tmp_path / "tone")
    assert named_adapters(["."]) == {"tone": "."}


@pytest.mark.parametrize("given", [["tone="], [""], ["a/tone", "b/tone"], ["tone=a", "tone=b"]])
def test_no_path_and_the_same_name_twice_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match="NAME=PATH"):
        named_adapters(given)
