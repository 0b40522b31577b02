"""The text of the demo: the content of its files, and that the script makes them."""

import importlib.util
import json
from pathlib import Path

import pytest

import nplora

ROOT = Path(__file__).parents[2]
FILES = Path(nplora.__file__).parent / "cli/demo" / "devils_dictionary"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]


def test_the_entries_are_short_and_none_is_in_both_files() -> None:
    train, valid = rows("train"), rows("valid")
    assert (len(train), len(valid)) == (540, 60)
    assert len({row["prompt"] for row in train + valid}) == 600
    for row in train + valid:
        assert row.keys() == {"prompt", "completion"}
        assert row["prompt"].startswith("Q: Define ")
        assert row["prompt"].endswith(".\nA:")
        assert row["completion"].startswith(" ")
        assert "  " not in row["completion"]
        assert 3 <= len(row["completion"].split()) <= 25


def test_the_script_makes_these_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts/make_devils_dictionary.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if not script.SOURCE.is_dir():
        pytest.skip("needs Debian's package dict-devil")
    monkeypatch.setattr(script, "TARGET", tmp_path)
    (tmp_path / "devils_dictionary").mkdir()
    script.main()
    for name in ("train.jsonl", "valid.jsonl"):
        made = (tmp_path / "devils_dictionary" / name).read_bytes()
        assert made == (FILES / name).read_bytes()
