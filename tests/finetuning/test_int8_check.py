"""Int8Check: the sampled cosine of gradients in int8, and the return of blocks to bfloat16."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import TokenLoss, finetune, int8_check
from nplora.finetuning.int8_check import Int8Check, cosines, layers_of
from nplora.models.packing import pack
from nplora.models.word_filter import WordFilter
from nplora.trainer import Callback
from small_llama import save_small_llama

BATCH = pack([(ids, ids) for ids in np.random.default_rng(0).integers(1, 250, (4, 40))])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf", "q8_0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = ({"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(12))
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def with_adapter(path: Path, compute: str, dropout: float = 0.0) -> nplora.LanguageModel:
    lm = nplora.load_model(path, compute=compute)
    lm.add_lora(rank=4, dropout=dropout, seed=1)
    rng = np.random.default_rng(2)
    for layer in lm.adapter_layers().values():  # as after some steps, so that dB is not zero
        layer.A[...] = 0.02 * rng.standard_normal(layer.A.shape, np.float32)
    return lm


def add_gradient(lm: nplora.LanguageModel) -> None:
    lm.forward_backward(BATCH, 1 / BATCH.num_targets)


def gradients(lm: nplora.LanguageModel) -> dict[str, Any]:
    lm.zero_grad()
    add_gradient(lm)
    return {p.name: p.grad.copy() for p in lm.parameters()}


def test_cosines_are_those_of_models_that_compute_in_int8_and_in_bfloat16(path: Path) -> None:
    lm = with_adapter(path, "int8")
    whole, parts = cosines(lm, lambda: add_gradient(lm))
    int8, exact = (gradients(with_adapter(path, compute)) for compute in ("int8", "bfloat16"))
    for part, found in [("", whole), *parts.items()]:
        a, b = (
            np.concatenate([g[name].ravel() for name in g if name.startswith(part)]).astype(np.float64)
            for g in (int8, exact)
        )
        assert found == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        assert found < 0.99999
    assert len(parts) > 1


def test_many_values_are_compared_by_a_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = with_adapter(path, "int8")
    exact, parts = cosines(lm, lambda: add_gradient(lm))
    monkeypatch.setattr(int8_check, "COMPARED", lm.num_trainable // 3)
    whole, sampled = cosines(lm, lambda: add_gradient(lm))
    assert whole != exact
    assert whole == pytest.approx(exact, abs=0.01)
    assert sampled.keys() == parts.keys()


def test_a_sample_has_values_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nplora.LoRALinear(np.ones((16, 576)), rank=16)
    monkeypatch.setattr(int8_check, "COMPARED", layer.num_trainable // 3 + 1)  # every third value, or fewer
    signs = np.where(np.arange(576) % 3, -1, 1)
    calls = iter((signs, 1))

    def wrong_in_most_columns() -> None:
        layer.dB[...] = next(calls)

    assert cosines(layer, wrong_in_most_columns)[0] < 0


def test_a_sample_that_fails_leaves_no_words_in_the_filter(
    path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = with_adapter(path, "int8")
    lm.model.word_filter = WordFilter(1e-3)
    batches = nplora.data.TokenBatches(nplora.data.read_dataset(data, lm.tokenizer), batch_examples=4)
    monkeypatch.setattr(lm.model, "read_out_backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        int8_check.of_tokens(lm, batches)()
    assert not lm.model.word_filter.take_skipped().rows


def test_a_comparison_leaves_gradients_and_dropout_alone(path: Path) -> None:
    plain, compared = (with_adapter(path, "int8", dropout=0.5) for _ in range(2))
    for lm in (plain, compared):
        lm.forward_backward(BATCH, 1.0)
    cosines(compared, lambda: add_gradient(compared))
    for lm in (plain, compared):
        lm.forward_backward(BATCH, 1.0)
    for p, q in zip(plain.parameters(), compared.parameters(), strict=True):
        assert np.array_equal(p.grad, q.grad)


class Flags(Callback):
    def __init__(self, lm: nplora.LanguageModel) -> None:
        self.lm, self.seen = lm, list[list[bool]]()

    def on_step_end(self, run: Any, record: Any) -> None:
        self.seen.append([layer.int8 for layer in layers_of(self.lm, int8_check.part_names(self.lm))])


def test_parts_below_the_threshold_return_to_bfloat16(path: Path, data: Path) -> None:
    lm, said = with_adapter(path, "int8"), list[str]()
    batches = nplora.data.TokenBatches(nplora.data.read_dataset(data, lm.tokenizer), batch_examples=4)
    sample = int8_check.of_tokens(lm, batches)
    _, parts = cosines(lm, sample)
    best = max(parts, key=lambda part: parts[part])
    flags = Flags(lm)
    check = Int8Check(lm, sample, said.append, every=2, least_cosine=parts[best] - 1e-7)
    trainer = nplora.Trainer(lm, TokenLoss(), nplora.AdamW(lr=0.0), callbacks=[check, flags], progress=False)
    trainer.fit(batches, steps=2)
    lower = {part for part in parts if part != best}
    assert {name.strip() for name in said[0].split(": ")[-1].split(",")} == lower
    assert not all(flags.seen[0])
    assert all(layer.int8 for layer in layers_of(lm, parts))  # after the run, as before it


def test_the_worst_part_that_still_computes_in_int8_returns_next(
    path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, said = with_adapter(path, "int8"), list[str]()
    names = int8_check.part_names(lm)
    found = {name: 0.96 + i / 1000 for i, name in enumerate(names)}
    monkeypatch.setattr(int8_check, "cosines", lambda *_: (0.9, found))
    batches = nplora.data.TokenBatches(nplora.data.read_dataset(data, lm.tokenizer), batch_examples=4)
    check = Int8Check(lm, int8_check.of_tokens(lm, batches), said.append, every=1)
    trainer = nplora.Trainer(lm, TokenLoss(), nplora.AdamW(lr=0.0), callbacks=[check], progress=False)
    trainer.fit(batches, steps=len(names) + 1)
    assert [line.split(": ")[-1] for line in said] == names  # one after another, then nothing is left


def test_a_comparison_that_a_signal_prevented_is_made_when_the_run_is_resumed(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"compute": "int8", "progress": False, "rank": 4, "steps": 2}

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(int8_check, "cosines", interrupted)
        assert finetune(path, data, tmp_path / "out", **options).history.interrupted
    finetune(path, data, tmp_path / "out", resume=True, **options)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["event"] == "int8"] == [1]


@pytest.mark.slow
def test_a_run_logs_its_cosines_and_resumes_with_its_parts(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_check, "LEAST_COSINE", 2.0)  # all parts return
    options: dict[str, Any] = {"compute": "int8", "progress": False, "rank": 4, "lr": 1e-2, "seed": 3}
    options |= {"batch_examples": 4, "save_every": 2, "schedule": "constant"}

    def rows(name: str, **more: Any) -> list[dict[str, Any]]:
        finetune(path, data, tmp_path / name, **options, **more)
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [row for row in log if row["event"] == "int8"]

    (first,) = rows("whole", steps=6)
    assert first["step"] == 1
    assert 0.5 < first["cosine"] < 1
    assert first["worst"] in first["in_bfloat16"]
    rows("stopped", steps=4)
    with pytest.warns(UserWarning, match="total_steps was 4, is 6"):
        rows("stopped", steps=6, resume=True)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
