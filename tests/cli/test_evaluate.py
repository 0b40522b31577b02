"""`nplora eval`"""

import json
import re
from pathlib import Path

import pytest

import nplora
from commands import command
from nplora import cli
from nplora.finetuning import compare, evaluate
from nplora.formats import safetensors


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


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(lm, tmp_path / "adapter")
    return tmp_path / "adapter"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The status of a command, and what it printed."""
    status = cli.main(["eval", *map(str, words)])
    return status, *capsys.readouterr()


def in_markdown(text: object) -> str:
    return str(text).replace("\\", "\\\\")


def test_eval_prints_each_metric_with_its_interval(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, model, "--data", data, "--metric", "exact_match,f1", "--max-new-tokens", 2)
    found, number = evaluate(model, data), r"-?[0-9.]+"
    interval = rf" \(95 % interval {number} to {number}\)"
    lines = [
        rf"loss {found['loss']:.4f} over 8 tokens{interval}", rf"perplexity {number}",
        *(rf"{name} {number}{interval}" for name in ("token_accuracy", "exact_match", "f1")),
    ]  # fmt: skip
    assert status == 0
    for line, pattern in zip(out.splitlines(), lines, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.slow
def test_the_json_of_eval_is_that_of_python(
    model: Path, data: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = model, "--data", data, "--adapter", adapter, "--json"
    assert json.loads(run(capsys, *words)[1]) == evaluate(model, data, adapter=adapter)
    expected = compare(model, data, [adapter]).as_json()
    assert json.loads(run(capsys, *words, "--compare")[1]) == expected


@pytest.mark.filterwarnings("ignore:evaluate.* is given 2 times")
def test_eval_says_that_adapters_are_added_up(
    model: Path, data: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notice = "the adapters are added up and evaluated together; --compare evaluates each adapter alone"
    for count in (1, 2):
        words = ["--adapter", adapter] * count
        _, out, err = run(capsys, model, "--data", data, "--json", *words)
        assert (notice in err) == (count == 2)
        assert "loss" in json.loads(out)


@pytest.mark.slow
def test_compare_prints_a_table_with_a_row_for_each_adapter(
    model: Path, data: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--data", data, "--compare", "--adapter", adapter, "--adapter", f"{adapter}:0.5"
    status, out, err = run(capsys, model, *words)
    assert status == 0
    names = [re.split("  ", line)[0] for line in out.splitlines()[1:4]]
    assert names == ["base", str(adapter), f"{adapter}:0.5"]
    assert "base: loss " in err
    status, out, _ = run(capsys, model, *words, "--markdown")
    assert out.splitlines()[2].startswith("| base | ")
    status, out, _ = run(capsys, model, "--data", data, "--markdown")
    assert out.splitlines()[2].startswith(f"| {in_markdown(model)} | ")


@pytest.mark.filterwarnings("ignore:evaluate.* is given 2 times")
def test_the_markdown_of_eval_names_the_adapters(
    model: Path, data: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--data", data, "--markdown", "--adapter", adapter
    for more, name in (((), ""), (("--adapter", f"{adapter}:0.5"), f" + {adapter}:0.5")):
        status, out, _ = run(capsys, model, *words, *more)
        assert status == 0
        assert out.splitlines()[2].startswith(f"| {in_markdown(f'{model} + {adapter}{name}')} | ")


def test_eval_writes_the_answers_to_a_file(
    model: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--metric", "f1", "--max-new-tokens", 2, "--answers", tmp_path / "a.jsonl", "--compare"
    assert run(capsys, model, "--data", data, "--adapter", adapter, *words)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["system"] for row in rows] == ["base"] * 4 + [str(adapter)] * 4
    assert rows[1].keys() == {"system", "row", "answer", "reference", "f1"}
    assert rows[1]["row"].endswith("valid.jsonl, line 2")
    before = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    status, _, err = run(capsys, model, "--data", data, *words[:-1])
    assert status == 2
    assert "the file exists already; choose another for --answers" in err
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == before
    status, _, err = run(capsys, model, "--data", data, "--answers", tmp_path / "b.jsonl")
    assert status == 0
    assert "--answers: nothing was written, because no answers were generated; add --metric" in err
    words = "--max-new-tokens has no effect, because no answers are generated; add --metric"
    assert words not in err
    assert words in run(capsys, model, "--data", data, "--max-new-tokens", 2)[2]


def test_a_loss_that_is_not_finite_fails_after_the_table(
    model: Path, data: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.numpy().copy() for name, tensor in safetensors.open(file).items()}
    next(iter(tensors.values()))[...] = 1e38
    safetensors.save(file, tensors)
    words = model, "--data", data, "--adapter", adapter, "--compare"
    status, out, err = run(capsys, *words, "--json")
    assert status != 0
    assert json.loads(out)["evaluations"][str(adapter)]["loss"] is None
    assert re.search(r"error: eval: the loss of .*adapter is (nan|inf), expected a finite number", err)
    status, out, _ = run(capsys, *words)
    assert f"4 examples are too few to tell {str(adapter)!r} from the base: loss" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare"], "--compare needs an adapter to compare the model with: add --adapter PATH"),
        (["--json", "--markdown"], "not allowed with argument"),
        (["--metric", "exactmatch"], "no metric 'exactmatch'; did you mean exact_match?"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--metric", "nowhere_to_be_found:f"], "the module 'nowhere_to_be_found' is neither in"),
    ],
)
def test_wrong_options_of_eval_are_errors(
    model: Path, data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status, _, err = run(capsys, model, "--data", data, *words)
    except SystemExit as error:
        status, err = error.code, capsys.readouterr().err  # type: ignore[assignment]
    assert status == 2
    assert message in err
