"""The sample of training data that `Int8Check` compares."""

from pathlib import Path
from typing import Any

import pytest

import nplora
from nplora.finetuning import TokenLoss, finetune, int8_check, int8_sample
from nplora.models.packing import PackedBatch
from nplora.models.word_filter import WordFilter
from small_llama import save_small_llama

SUMS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(12)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in SUMS]
JUDGED = [{**row, "label": number % 2 == 0} for number, row in enumerate(SUMS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf", "q8_0")


def adapted(path: Path) -> nplora.LanguageModel:
    lm = nplora.load_model(path, compute="int8")
    lm.add_lora(rank=2)
    return lm


def batches_of(lm: nplora.LanguageModel, rows: list[dict[str, str]], examples: int) -> Any:
    dataset = nplora.data.read_dataset(rows, lm.tokenizer)
    return nplora.data.TokenBatches(dataset, batch_examples=examples)


class Seen(TokenLoss):
    """Records the batches instead of computing them."""

    batches: list[PackedBatch]

    def forward_backward(self, model: Any, x: PackedBatch, y: Any, factor: float) -> float:
        self.batches.append(x)
        return 0.0


def sample(
    lm: nplora.LanguageModel, rows: list[dict[str, str]], examples: int, micro: int | None = None
) -> PackedBatch:
    seen = Seen()
    seen.batches = []
    int8_sample.of_tokens(lm, seen, batches_of(lm, rows, examples), micro)()
    return seen.batches[0]


@pytest.mark.parametrize(
    ("examples", "micro", "targets"), [(16, None, (9, 20)), (2, None, (4, 4)), (16, 50, (2, 2))]
)
def test_a_sample_of_long_prompts_has_enough_targets(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    examples: int,
    micro: int | None,
    targets: tuple[int, int],
) -> None:
    """Each example has 2 targets and over 40 tokens. A sample may have as many tokens as a micro-batch."""
    monkeypatch.setattr(int8_sample, "SAMPLE_TOKENS", 40)
    rows = [{"prompt": f"{i:02} " * 14, "completion": "y"} for i in range(16)]
    found = sample(adapted(path), rows, examples, micro)
    assert targets[0] <= found.num_targets <= targets[1]


def test_a_sample_is_taken_from_a_batch_with_enough_targets(path: Path) -> None:
    """The first batches have few targets, if any."""
    lm = adapted(path)
    rows = [{"prompt": "a", "completion": "b" if i else "b" * 20} for i in range(4)]
    assert sample(lm, rows, 1).num_targets > 20
    assert len(sample(lm, rows, 4).ids) < 40


def test_a_sample_has_about_512_tokens_if_they_have_enough_targets(path: Path) -> None:
    rows = [{"prompt": "a" * 20, "completion": "b" * 20} for _ in range(40)]
    assert 440 < len(sample(adapted(path), rows, 40).ids) <= 512


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (SUMS, {}),
        (PAIRS, {"objective": "dpo"}),
        (PAIRS, {"objective": "orpo"}),
        (JUDGED, {"objective": "kto"}),
        (SUMS, {"objective": "distill"}),
    ],
)
def test_the_compared_loss_is_that_of_the_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, options: dict[str, Any]
) -> None:
    """The sample is the whole first batch of this run, whose first step changes nothing."""
    losses, compared = list[float](), int8_check.Comparison.measure

    def measured(comparison: Any) -> Any:
        losses.append(comparison._add_gradient())
        return compared(comparison)

    monkeypatch.setattr(int8_check.Comparison, "measure", measured)
    if options.get("objective") == "distill":
        options = {**options, "teacher": save_small_llama(tmp_path / "teacher.gguf")}
    report = finetune(
        path, rows, tmp_path / "out", compute="int8", steps=1, lr=1e-12, rank=2, batch_examples=8,
        progress=False, **options,
    )  # fmt: skip
    assert losses[0] == pytest.approx(report.history.loss[0], rel=1e-6)


def test_a_sample_that_fails_leaves_no_words_in_the_filter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = adapted(path)
    lm.model.word_filter = WordFilter(1e-3)
    monkeypatch.setattr(lm.model, "read_out_backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        int8_sample.of_tokens(lm, TokenLoss(), batches_of(lm, SUMS, 4))()
    assert not lm.model.word_filter.take_skipped().rows
