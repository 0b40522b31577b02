"""sample_gradient and Int8Check: the check of gradients in int8 in an ordinary Trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import Int8Check, finetune, sample_gradient
from nplora.nn.losses import NonFiniteLossError
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def network(W: Array | None = None) -> nplora.Sequential:
    first = nplora.LoRALinear(normal(64, 64) if W is None else W, rank=2, compute="int8", rng=0)
    return nplora.Sequential(
        first, nplora.ReLU(), nplora.LoRALinear(normal(8, 64, seed=1), 2, compute="int8", rng=1)
    )


def with_outlier() -> Array:
    """A matrix whose large column rounds all other columns to zero in int8."""
    W = normal(64, 64)
    W[:, 7] = 1e4
    return W


X, Y = normal(96, 64, seed=2), normal(96, 8, seed=3)
X[:, 7] *= 1e-6  # so the large column of `with_outlier` changes y little


def trained(model: nplora.Module, check: Int8Check, directory: Path, steps: int = 4) -> list[dict[str, Any]]:
    trainer = nplora.Trainer(model, "mse", nplora.AdamW(lr=0.0), callbacks=[check], progress=False)
    trainer.fit(X, Y, steps=steps, checkpoint_dir=directory)
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "int8"]


def test_the_log_of_a_trainer_has_the_cosines_and_the_worst_product(tmp_path: Path) -> None:
    model = network()
    check = Int8Check(model, sample_gradient(model, "mse", X[:32], Y[:32]), every=3)
    events = trained(model, check, tmp_path / "run")
    assert [event["step"] for event in events] == [1, 3]
    first, last = model[0], model[2]
    assert isinstance(first, nplora.LoRALinear)
    assert isinstance(last, nplora.LoRALinear)
    inside = np.maximum(first.forward(X[:32])[0], 0)
    errors = {"0": first.int8_error(X[:32]), "2": last.int8_error(inside)}
    worst = max(errors, key=lambda name: errors[name].measured)
    for event in events:
        assert 0.99 < event["cosine"] < 1
        assert event["in_bfloat16"] == []
        assert event["worst_product"] == worst
        assert event["product_error"] == errors[worst].measured
        assert event["product_bound"] == errors[worst].bound


def test_a_layer_with_an_outlier_returns_to_bfloat16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(with_outlier())
    sample = sample_gradient(model, "mse", X[:32], Y[:32])
    before, after = trained(model, Int8Check(model, sample, every=3, least_cosine=0.9), tmp_path / "run")
    assert before["worst_product"] == "0"
    assert before["product_error"] > 0.5
    assert before["product_error"] <= before["product_bound"]
    assert "0" in before["in_bfloat16"]
    assert after["worst_product"] != "0"
    assert "bfloat16" in capsys.readouterr().out
    lenient = Int8Check(network(with_outlier()), sample, least_cosine=-1)
    assert trained(model, lenient, tmp_path / "lenient")[0]["in_bfloat16"] == []


def test_a_frozen_layer_below_the_first_trained_layer_is_found(tmp_path: Path) -> None:
    last = nplora.LoRALinear(normal(8, 64, seed=1), 2, compute="int8", rng=1)
    model = nplora.Sequential(nplora.Linear(with_outlier(), compute="int8"), last)
    before, after = trained(
        model, Int8Check(model, sample_gradient(model, "mse", X[:32], Y[:32]), every=3), tmp_path / "run"
    )
    assert before["cosine"] < 0.9
    assert before["worst_product"] == "0"
    assert before["in_bfloat16"] == after["in_bfloat16"] == ["0"]
    assert after["cosine"] > 0.99


def test_a_frozen_convolution_can_return_to_bfloat16(tmp_path: Path) -> None:
    """Its products are not measured."""
    W, images = normal(4, 64, 1, 1), normal(16, 64, 4, 4)
    W[:, 7], images[:, 7] = 1e4, 1e-6
    model = nplora.Sequential(
        nplora.Conv2d(W, compute="int8"), nplora.LoRAConv2d(normal(4, 4, 1, 1), rank=2, compute="int8", rng=0)
    )
    y = normal(16, 4, 4, 4)
    check = Int8Check(model, sample_gradient(model, "mse", images, y), print)
    trainer = nplora.Trainer(model, "mse", nplora.AdamW(lr=0.0), callbacks=[check], progress=False)
    trainer.fit(images, y, steps=1, checkpoint_dir=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert next(row["in_bfloat16"] for row in rows if row["event"] == "int8") == ["0"]


def test_a_check_that_is_used_again_names_each_part_once(tmp_path: Path) -> None:
    model = network(with_outlier())
    check = Int8Check(model, sample_gradient(model, "mse", X[:32], Y[:32]), every=3, least_cosine=0.9)
    trainer = nplora.Trainer(model, "mse", nplora.AdamW(lr=0.0), callbacks=[check], progress=False)
    trainer.fit(X, Y, steps=3, checkpoint_dir=tmp_path / "run")
    with pytest.warns(UserWarning, match="total_steps"):
        trainer.fit(X, Y, steps=6, checkpoint_dir=tmp_path / "run", resume=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = [row["in_bfloat16"] for row in rows if row["event"] == "int8"]
    assert len(parts) == 3
    assert parts[0]
    assert all(each == parts[0] for each in parts)


def test_without_a_product_in_int8_the_fields_are_null(tmp_path: Path) -> None:
    model = nplora.Sequential(nplora.LoRALinear(normal(8, 64), rank=2, compute="bfloat16"))
    (event,) = trained(model, Int8Check(model, sample_gradient(model, "mse", X, Y)), tmp_path / "run")
    assert event["worst_product"] is event["product_error"] is event["product_bound"] is None


def test_the_gradient_of_a_sample_is_that_of_its_loss() -> None:
    model, other = network(), network()
    loss = sample_gradient(model, "mse", X[:20], Y[:20])()
    prediction, saved = other.forward(X[:20])
    wanted, dy = nplora.losses.mse(prediction, Y[:20])
    other.backward(dy, saved)
    assert loss == wanted
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert np.array_equal(p.grad, q.grad)


def test_samples_that_cannot_be_compared_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="sample_gradient: x has 8 rows, expected at least 9"):
        sample_gradient(model, "mse", X[:8], Y[:8])
    with pytest.raises(ValueError, match="loss"):
        sample_gradient(model, "mean", X, Y)
    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        sample_gradient(model, "mse", X * np.nan, Y)()


def test_the_log_of_a_fine_tuning_has_the_worst_product(tmp_path: Path) -> None:
    model, data = save_small_llama(tmp_path / "model.gguf", "q8_0"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} abcabcabcabc"}) + "\n" for i in range(6)))
    finetune(model, data, tmp_path / "out", compute="int8", rank=4, steps=1, progress=False)
    rows = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    (event,) = (row for row in rows if row["event"] == "int8")
    names = dict(nplora.load_model(model).named_modules())
    assert event["worst_product"] in names
    assert 0.001 < event["product_error"] < event["product_bound"] < 5
