"""Classifiers without torch: new heads, wrong arguments, and adapters that do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import label_record, safetensors
from nplora.formats.errors import FormatError, LimitError
from nplora.formats.label_record import LabelRecord
from nplora.lm.pooling import Pooling
from nplora.nn.module import Module
from small_encoder import save_small_encoder, tensors
from small_llama import save_small_llama

IDS = [[2, 5, 3], [2, 5, 6, 7, 3], [2, 9, 10, 11, 12, 3]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_encoder(tmp_path / "model")


def new(model: Path, labels: tuple[str, ...] = ("a", "b"), **options: Any) -> nplora.TextClassifier:
    return nplora.new_classifier(nplora.load_encoder(model), labels, **options)


def saved(model: Path, directory: Path, **options: Any) -> Path:
    classifier = new(model, **options)
    classifier.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(classifier, directory)
    return directory


def rewritten(directory: Path, change: Any) -> Path:
    """Replace the adapter's tensors and metadata by what `change` returns for them."""
    path = directory / "adapter_model.safetensors"
    opened = safetensors.open(path, mmap=False)
    arrays, metadata = change({name: opened[name].array.copy() for name in opened}, dict(opened.metadata))
    safetensors.save(path, arrays, metadata)
    return directory


@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_are_those_of_finite_differences(model: Path, adapted: bool) -> None:
    """Without an adapter, only the head is trained."""
    classifier = new(model, ("a", "b", "c"))
    if adapted:
        classifier.add_lora(rank=2, init="gaussian", targets="query,output.dense")
    labels = np.array([0, 2, 1])
    logits, kept = classifier.forward(IDS)
    gradient = nplora.losses.cross_entropy(logits, labels)[1]
    classifier.backward(gradient, kept)
    rng = np.random.default_rng(0)
    for parameter in classifier.parameters():
        if not parameter.name.startswith(("bert.pooler", "classifier")):
            continue
        direction = rng.choice([-1, 1], parameter.value.shape).astype(np.float32)
        before, losses = parameter.value.copy(), []
        for sign in (1, -1):
            parameter.value[...] = before + np.float32(sign * 1e-2) * direction
            losses.append(nplora.losses.cross_entropy(classifier(IDS).astype(np.float64), labels)[0])
        parameter.value[...] = before
        slope, wanted = (losses[0] - losses[1]) / 2e-2, float((parameter.grad * direction).sum())
        assert abs(slope - wanted) <= 2e-2 * max(1e-2, abs(wanted)), parameter.name
    gradients = [parameter.grad.copy() for parameter in classifier.parameters()]
    with pytest.raises(RuntimeError, match="an earlier backward pass used and freed the saved values"):
        classifier.backward(gradient, kept)
    for parameter, before in zip(classifier.parameters(), gradients, strict=True):
        np.testing.assert_array_equal(parameter.grad, before)


def test_a_new_head_begins_with_the_pooler_of_the_file(model: Path) -> None:
    path = model / "model.safetensors"
    weight = np.random.default_rng(1).standard_normal((32, 32), np.float32)
    safetensors.save(
        path, {**tensors(), "pooler.dense.weight": weight, "pooler.dense.bias": weight[0].copy()}
    )
    found = {parameter.name: parameter.value for parameter in new(model).parameters()}
    np.testing.assert_array_equal(found["bert.pooler.dense.weight"], weight)
    assert 0.01 < found["classifier.weight"].std() < 0.03
    assert not found["classifier.bias"].any()


def test_an_adapter_without_the_pooler_takes_that_of_the_file(model: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((32, 32), np.float32)

    def without_pooler(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
        return {name: array for name, array in arrays.items() if "pooler" not in name}, metadata

    adapter = rewritten(saved(model, tmp_path / "adapter"), without_pooler)
    with pytest.raises(FormatError, match=r"neither the adapter nor the model has .*'bert.pooler.dense'"):
        nplora.load_classifier(model, adapter)
    safetensors.save(
        model / "model.safetensors",
        {**tensors(), "pooler.dense.weight": weight, "pooler.dense.bias": weight[0].copy()},
    )
    found = {p.name: p.value for p in nplora.load_classifier(model, adapter).parameters()}
    np.testing.assert_array_equal(found["bert.pooler.dense.weight"], weight)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (["a"], {}, ValueError, "1 labels, expected 2 to 65,536 for the task 'single'"),
        ([], {"task": "multi"}, ValueError, "0 labels, expected 1 to"),
        (["a", "a"], {}, ValueError, "two labels are named 'a'"),
        (["a", 1], {}, TypeError, "labels is"),
        ("ab", {}, TypeError, "labels is 'ab', expected a list of texts"),
        (["a", "b"], {"task": "both"}, ValueError, "task='both' is not available"),
        (["a", "b"], {"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_wrong_arguments_are_refused(
    labels: Any, options: dict[str, Any], error: type[Exception], message: str, model: Path
) -> None:
    with pytest.raises(error, match=message):
        nplora.new_classifier(nplora.load_encoder(model), labels, **options)


def test_adapters_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(model)
    encoder.add_lora(rank=2)
    nplora.save_adapter(encoder, tmp_path / "plain")
    with pytest.raises(FormatError, match="no layer 'classifier', expected an adapter of a classifier"):
        nplora.load_classifier(model, tmp_path / "plain")

    def narrow(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
        name = "base_model.model.classifier.weight"
        return {**arrays, name: arrays[name][:, :-1].copy()}, metadata

    with pytest.raises(FormatError, match=r"classifier.weight has shape \(2, 31\), expected \(2, 32\)"):
        nplora.load_classifier(model, rewritten(saved(model, tmp_path / "narrow"), narrow))

    def third(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
        return arrays, {**metadata, "labels": json.dumps({"task": "single", "labels": ["a", "b", "c"]})}

    with pytest.raises(FormatError, match="3 labels, but the head has 2 outputs"):
        nplora.load_classifier(model, rewritten(saved(model, tmp_path / "third"), third))

    def flat(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
        name = "base_model.model.classifier.weight"
        return {**arrays, name: np.float32(3).reshape(())}, metadata

    with pytest.raises(FormatError, match=r"classifier.weight has shape \(\)"):
        nplora.load_classifier(model, rewritten(saved(model, tmp_path / "flat"), flat))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[]", FormatError, "expected an object"),
        ("{", FormatError, "place"),
        ('{"task": "x", "labels": ["a"]}', FormatError, "task is 'x', expected one of single, multi"),
        ('{"task": [], "labels": ["a"]}', FormatError, "task is"),
        ('{"task": "multi", "labels": []}', FormatError, "labels is"),
        ('{"task": "multi", "labels": [1]}', FormatError, "labels is"),
        ('{"task": "multi", "labels": [""]}', FormatError, "a label has 0 characters, expected 1 to 1,000"),
        (json.dumps({"task": "multi", "labels": ["x" * 2000]}), FormatError, "a label has 2,000 characters"),
        ('{"task": "multi", "labels": ["a", "a"]}', FormatError, "two labels have the same name"),
        ('{"task": "multi", "labels": ["a"], "max_length": 0}', FormatError, "max_length is 0"),
        ('{"task": "multi", "labels": ["a"], "max_length": true}', FormatError, "max_length is True"),
        ('{"task": "multi", "labels": ["a"], "tokens": 1}', FormatError, "tokens is 1"),
        (json.dumps({"task": "multi", "labels": [str(i) for i in range(70_000)]}), LimitError, "70,000"),
    ],
)  # fmt: skip
def test_damaged_records_of_labels_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        label_record.loads(text, "place")


def test_a_record_of_labels_is_read_as_it_was_written() -> None:
    record = LabelRecord("multi", ("ä", "b"), 7, True)
    assert label_record.loads(label_record.dumps(record), "place") == record


def test_tokens_have_logits_of_their_own(model: Path, tmp_path: Path) -> None:
    classifier = new(model, ("O", "B", "I"), tokens=True)
    assert classifier(IDS).shape == (14, 3)
    assert [name for name, _ in classifier.named_modules() if "pooler" in name] == []
    again = nplora.load_classifier(model, saved(model, tmp_path / "adapter", tokens=True))
    assert again.classifies_tokens
    assert again.task_type == "TOKEN_CLS"
    with pytest.raises(ValueError, match="row 1: no field 'tokens' or 'words'"):
        nplora.finetuning.evaluate_classifier(again, [{"text": "a", "label": "a"}])


def test_a_classifier_lists_what_does_not_fit_in_the_adapter_of_another_classifier(
    model: Path, tmp_path: Path
) -> None:
    classifier = new(model, ("O", "B"), tokens=True)
    classifier.add_lora(rank=2)
    with pytest.raises(FormatError, match=r"does not fit the model in \d+ places?:\n") as caught:
        nplora.load_adapter(classifier, saved(model, tmp_path / "adapter"))
    assert "this is the adapter of a classifier" not in str(caught.value)


def test_a_regression_has_no_probabilities(model: Path) -> None:
    pytest.importorskip("tokenizers")
    classifier = new(model, ("score",), task="regression")
    assert isinstance(classifier.predict(["a cat"])[0], float)
    with pytest.raises(ValueError, match="a regression, which has no probabilities"):
        classifier.predict_proba(["a cat"])


def test_saved_values_of_another_classifier_are_refused(model: Path) -> None:
    one, other = new(model), new(model)
    logits, kept = one.forward(IDS)
    with pytest.raises(ValueError, match="another TextClassifier"):
        other.backward(logits, kept)
    with pytest.raises(TypeError, match="expected ClassifierSaved"):
        one.backward(logits, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dy has shape"):
        one.backward(logits[:1], kept)


def gradients_of(encoder: nplora.Encoder, states: Any, saved: Any, dy: Any) -> list[Any]:
    encoder.zero_grad()
    encoder.backward(dy.astype(np.float32), saved)
    return [parameter.grad.copy() for parameter in encoder.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [None, "first:1", "last:1"])
@pytest.mark.parametrize("mode", ["cls", "last"])
def test_the_last_block_computes_only_the_tokens_that_are_read(
    mode: str, layers: str | None, recompute: bool, tmp_path: Path
) -> None:
    """States and gradients are those of all tokens, of which the head then reads one in each text."""
    encoder = nplora.load_encoder(save_small_encoder(tmp_path / "model"), pooling="mean")
    encoder.add_lora(rank=2, init="gaussian", layers=layers)
    for parameter in encoder.parameters():
        parameter.value[...] *= np.float32(
            0.3
        )  # large factors make attention so sharp that rounding is magnified
    encoder.model.recompute = recompute
    ids = [[2, 5, 3], [2, 3], [2, 7, 8, 9, 3]]
    read = np.array([0, 3, 5] if mode == "cls" else [2, 4, 9])
    states, saved = encoder.forward_for(Pooling(mode), ids)
    dy = np.random.default_rng(0).standard_normal(states.shape)
    found = gradients_of(encoder, states, saved, dy)
    every, saved = encoder.forward(ids)
    np.testing.assert_allclose(states, every[read], rtol=0, atol=2e-5)
    whole = np.zeros(every.shape)
    whole[read] = dy
    for mine, wanted in zip(found, gradients_of(encoder, every, saved, whole), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    inferred = [rows for rows, _ in encoder.packed_states("test", ids, 2, Pooling(mode))]
    np.testing.assert_allclose(np.concatenate(inferred), every[read], rtol=0, atol=2e-5)


def test_without_an_adapter_only_the_tokens_that_are_read_come_back(tmp_path: Path) -> None:
    encoder = nplora.load_encoder(save_small_encoder(tmp_path / "model"), pooling="cls")
    ids = [[2, 5, 3], [2, 7, 8, 9, 3]]
    every = encoder.forward(ids)[0]
    np.testing.assert_allclose(encoder.forward_for(encoder.pooling, ids)[0], every[[0, 3]], atol=1e-5)
    np.testing.assert_allclose(encoder.embed_ids(ids, normalize=False), every[[0, 3]], atol=1e-5)


def test_an_adapter_on_rows_that_gguf_reorders_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf")
    classifier = nplora.new_classifier(nplora.load_encoder(path, pooling="last"), ["a", "b", "c"])
    classifier.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(classifier, tmp_path / "adapter")
    again = nplora.load_classifier(path, tmp_path / "adapter")
    ids = [[1, 5, 3], [1, 5, 6, 7]]
    np.testing.assert_array_equal(again(ids), classifier(ids))


def test_a_classifier_has_the_hooks_of_its_encoder() -> None:
    """What `Encoder` changes of `Module`, such as the order of rows, must hold for the classifier too."""
    hooks = {name for name in vars(nplora.Encoder) if not name.startswith("__") and hasattr(Module, name)}
    assert "stored_row_order" in hooks
    assert hooks <= vars(nplora.TextClassifier).keys()


def test_heads_of_no_outputs_or_too_many_are_refused(model: Path, tmp_path: Path) -> None:
    def with_outputs(count: int) -> Any:
        def change(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
            name = "base_model.model.classifier"
            new_arrays = {
                f"{name}.weight": np.zeros((count, 32), np.float32),
                f"{name}.bias": np.zeros(count, np.float32),
            }
            return {**arrays, **new_arrays}, {}

        return change

    for count, error, message in (
        (0, FormatError, "the head has no outputs"),
        (70_000, LimitError, "the head has 70,000 outputs, expected at most 65,536"),
    ):
        adapter = rewritten(saved(model, tmp_path / str(count)), with_outputs(count))
        with pytest.raises(error, match=message):
            nplora.load_classifier(model, adapter)


def test_labels_of_tokens_need_an_adapter_for_tokens(model: Path, tmp_path: Path) -> None:
    def for_tokens(arrays: dict[str, Any], metadata: dict[str, str]) -> Any:
        record = {"task": "single", "labels": ["a", "b"], "tokens": True}
        return arrays, {**metadata, "labels": json.dumps(record)}

    adapter = rewritten(saved(model, tmp_path / "adapter"), for_tokens)
    with pytest.raises(FormatError, match="the labels are for tokens, but task_type SEQ_CLS is for whole"):
        nplora.load_classifier(model, adapter)


def test_predictions_of_tokens_are_refused(model: Path) -> None:
    classifier = new(model, ("O", "B"), tokens=True)
    for use in (classifier.predict, classifier.predict_proba):
        with pytest.raises(
            ValueError, match="the classifier classifies tokens, not texts; use `predict_words`"
        ):
            use(["a cat"])
