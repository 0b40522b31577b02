"""`nplora eval`"""

import json
from pathlib import Path

import pytest

from commands import command
from nplora.finetuning import evaluate


@pytest.mark.slow
def test_eval_reports_the_examples_that_it_does_not_count(model: Path, data: Path) -> None:
    texts = [("x", "x" * 8), ("y" * 9, "z"), ("y", ""), ("z", "z")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["eval", model, "--data", data, "--max-length", 5]
    done = command(*line, "--skip-bad", "--json")
    result = json.loads(done.stdout)
    assert result.items() >= {"examples": 2, "truncated": 1, "emptied": 1, "skipped": 1}.items()
    assert result["source"] == str(data / "valid.jsonl")
    assert (
        "1 cut to the maximum length; 1 left out, with nothing to train on within the maximum length; "
        "1 bad row skipped"
    ) in done.stderr
    done = command(*line, "--skip-bad", "--strict")
    assert (done.returncode, done.stdout) == (2, "")
    assert "valid.jsonl, line 1: 10 tokens, expected at most 5" in done.stderr


def test_an_unknown_option_of_evaluate_is_an_error_that_names_the_nearest(model: Path, data: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^evaluate: unexpected keyword 'max_lenth'; did you mean max_length\?$"
    ):
        evaluate(model, data, max_lenth=3)
