"""The estimators over texts, with a small encoder of random numbers."""

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import nplora
from nplora.finetuning import train_classifier
from nplora.formats import safetensors
from nplora.formats.errors import FormatError
from nplora.sklearn import LoRATextClassifier, LoRATextRegressor, LoRATokenClassifier, TextEmbedder
from nplora.trainer import Trainer
from small_encoder import save_small_encoder, tensors
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

X = ["where is my parcel", "my delivery is late", "return an order", "a refund"] * 5
Y = ["delivery", "delivery", "return", "return"] * 5
FAST: dict[str, Any] = {"rank": 2, "epochs": 3, "lr": 1e-2, "batch_size": 8, "random_state": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoder"))


def test_the_classifier_is_that_of_train_classifier(model: Path, tmp_path: Path) -> None:
    """With the seed that `random_state` gives, both train the same values."""
    fitted = LoRATextClassifier(model, **FAST).fit(np.array(X, object), Y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    rows = [{"text": text, "label": label} for text, label in zip(X, Y, strict=True)]
    options = {"rank": 2, "epochs": 3, "lr": 1e-2, "batch_examples": 8, "seed": seed, "max_grad_norm": 1e9}
    wanted = train_classifier(model, rows, tmp_path / "out", **options).classifier
    np.testing.assert_array_equal(fitted.decision_function(X), np.diff(wanted.logits(X).astype(float))[:, 0])
    nplora.save_adapter(fitted.model_, tmp_path / "adapter")
    again = nplora.load_classifier(model, tmp_path / "adapter")
    assert again.predict(X) == fitted.predict(X).tolist() == Y
    np.testing.assert_allclose(again.predict_proba(X), fitted.predict_proba(X), rtol=1e-12)


def test_a_grid_search_loads_a_model_that_turns_texts_into_vectors_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = save_small_encoder(tmp_path / "model"), list[Any]()
    load = nplora.load_encoder
    monkeypatch.setattr(
        "nplora.sklearn.text_embedder.load_encoder", lambda *a, **k: read.append(a) or load(*a, **k)
    )
    pipeline = make_pipeline(TextEmbedder(model), LogisticRegression())
    search = GridSearchCV(pipeline, {"logisticregression__C": [1, 100]}, cv=2).fit(X, Y)
    assert len(read) == 1
    embedder = search.best_estimator_[0]
    assert clone(embedder).set_params(pooling="cls").fit(X).transform(X).shape == (20, 32)
    assert len(read) == 2
    safetensors.save(model / "model.safetensors", tensors(seed=1))
    vectors = clone(embedder).fit(X).transform(X)
    np.testing.assert_array_equal(vectors, nplora.load_encoder(model).embed(X))
    assert len(read) == 3
    other = pickle.loads(pickle.dumps(embedder)).transform(X)
    np.testing.assert_array_equal(other, vectors)


def test_the_default_learning_rate_depends_on_the_width_of_the_encoder(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nplora.sklearn.texts.default_lr", {32: 3e-3}.__getitem__)
    outputs = [
        LoRATextClassifier(model, **{**FAST, "lr": lr}).fit(X, Y).decision_function(X) for lr in (None, 3e-3)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("lr", ["0.1", True, [1e-3]])
def test_a_learning_rate_must_be_a_number(model: Path, lr: Any) -> None:
    with pytest.raises(TypeError, match=r"AdamW: lr is .*, expected a number"):
        LoRATextClassifier(model, **{**FAST, "lr": lr}).fit(X, Y)


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_an_estimator_computes_in_the_given_arithmetic(model: Path, compute: str) -> None:
    options = {**FAST, "epochs": 8, "compute": compute}
    fitted = LoRATextClassifier(model, **options).fit(X, Y)
    assert fitted.model_.encoder.compute == compute
    assert fitted.score(X, Y) == 1
    exact = LoRATextClassifier(model, **{**options, "compute": "float32"}).fit(X, Y)
    assert exact.model_.encoder.compute == "float32"
    logits = [estimator.decision_function(X) for estimator in (fitted, exact)]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.2 * np.abs(logits[1]).max()
    again = pickle.loads(pickle.dumps(fitted))
    assert again.model_.encoder.compute == compute
    np.testing.assert_array_equal(again.decision_function(X), logits[0])


def test_an_estimator_in_int8_compares_its_gradients_with_bfloat16(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nplora.finetuning.int8_check.LEAST_COSINE", 1.0)
    options = {**FAST, "epochs": 1, "verbose": True}
    LoRATextClassifier(model, compute="float32", **options).fit(X, Y)
    assert "int8" not in capsys.readouterr().err
    LoRATextClassifier(model, compute="int8", **options).fit(X, Y)
    assert "int8 is too inexact" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="int8 is too inexact"):
        LoRATextClassifier(model, compute="int8", **{**options, "verbose": False}).fit(X, Y)


def test_a_model_is_trained_further_in_its_own_arithmetic(model: Path) -> None:
    fitted = LoRATextClassifier(model, compute="int8", warm_start=True, **FAST)
    fitted.partial_fit(X, Y, classes=["delivery", "return"]).partial_fit(X, Y).fit(X, Y)
    assert fitted.model_.encoder.compute == "int8"
    fitted.set_params(compute="float32")
    words = "compute is 'float32', but the fitted model computes in 'int8'"
    for train in (fitted.fit, fitted.partial_fit):
        with pytest.raises(ValueError, match=words):
            train(X, Y)
    assert fitted.set_params(warm_start=False).fit(X, Y).model_.encoder.compute == "float32"


def test_an_unknown_arithmetic_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="LoRATextClassifier: compute='int4' is not available; possible: "):
        LoRATextClassifier(model, compute="int4").fit(X, Y)


def test_checkpoints_without_a_seed_are_announced_as_useless(model: Path, tmp_path: Path) -> None:
    options = {**FAST, "epochs": 1, "random_state": None}
    with pytest.warns(UserWarning, match="without an integer random_state, a repeated fit does not continue"):
        LoRATextClassifier(model, checkpoint_dir=tmp_path, **options).fit(X, Y)


def test_copies_and_pickles_predict_the_same(model: Path) -> None:
    for estimator, y in (
        (LoRATextClassifier(model, **FAST), Y),
        (LoRATextRegressor(model, **FAST), range(20)),
    ):
        fitted = estimator.fit(X, y)
        stored = pickle.dumps(fitted)
        assert len(stored) < 4 * sum(p.value.nbytes for p in fitted.model_.parameters())
        for other in (copy.deepcopy(fitted), pickle.loads(stored)):
            np.testing.assert_array_equal(other.predict(X), fitted.predict(X))
        with pytest.raises(NotFittedError):
            clone(fitted).predict(X)


def test_a_pickle_refuses_another_encoder(tmp_path: Path) -> None:
    path = save_small_encoder(tmp_path / "encoder")
    stored = pickle.dumps(LoRATextClassifier(path, **FAST).fit(X, Y))
    safetensors.save(path / "model.safetensors", tensors(seed=1))
    os.utime(path, (0, 0))  # the directory has changed, as after a new download
    with pytest.raises(FormatError, match="not the encoder that the estimator was fitted with"):
        pickle.loads(stored)


@pytest.mark.slow
def test_a_grid_search_shares_the_frozen_weights(model: Path) -> None:
    search = GridSearchCV(LoRATextClassifier(model, **FAST), {"rank": [1, 2, 4], "lr": [1e-4, 1e-2]}, cv=2)
    search.fit(X, Y)
    assert search.best_params_["lr"] == 1e-2
    assert search.best_score_ == 1
    other = LoRATextClassifier(model, **FAST).fit(X, Y)
    name = "bert.encoder.layer.0.attention.self.query"
    both = [each.model_.adapter_layers()[name].weight for each in (search.best_estimator_, other)]
    assert both[0] is both[1]


def test_partial_fits_and_interrupted_fits_continue(model: Path, tmp_path: Path) -> None:
    learner = LoRATextClassifier(model, **FAST)
    for _ in range(5):
        learner.partial_fit(X, Y, classes=["delivery", "return", "other"])
    assert learner.score(X, Y) == 1
    assert learner.predict_proba(X).shape == (20, 3)
    kept = LoRATextClassifier(model, checkpoint_dir=tmp_path, **FAST).fit(X, Y)
    again = LoRATextClassifier(model, checkpoint_dir=tmp_path, **FAST).fit(X, Y)
    np.testing.assert_array_equal(kept.decision_function(X), again.decision_function(X))
    assert len(list(tmp_path.iterdir())) == 1


def test_several_numbers_are_predicted(model: Path) -> None:
    y = np.c_[np.tile([1.0, 1.0, 5.0, 5.0], 5), np.ones(20)]
    fitted = LoRATextRegressor(model, **FAST | {"epochs": 20}).fit(X, y)
    assert fitted.predict(X).shape == (20, 2)
    np.testing.assert_allclose(fitted.predict(X), y, atol=1)


def test_an_embedder_stands_in_a_pipeline(model: Path) -> None:
    embedder = TextEmbedder(model, max_length=8)
    np.testing.assert_array_equal(embedder.transform(X), nplora.load_encoder(model).embed(X, max_length=8))
    pipeline = make_pipeline(embedder, LogisticRegression(C=100))
    assert cross_val_score(pipeline, X, Y, cv=2).mean() == 1
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.transform(X), embedder.transform(X))
    assert list(embedder.get_feature_names_out()[:2]) == ["textembedder0", "textembedder1"]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("a text", ["a"], "X is 'a text', expected a list or a column of texts"),
        ([1, 2], ["a", "b"], r"X\[0\] is a int, expected a text"),
        (["a", None], ["a", "b"], r"X\[1\] is a NoneType"),
        ([], [], "X has no texts"),
        (np.array([["a"], ["b"]]), ["a", "b"], "expected a list or a column of texts"),
        (["a", "b"], ["a", "a"], "only one class"),
        (["a", "b"], ["a"], "inconsistent numbers of samples"),
    ],
)
def test_wrong_texts_are_refused(texts: Any, labels: list[str], message: str, model: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LoRATextClassifier(model, **FAST).fit(texts, labels)


def test_a_missing_model_is_said(model: Path) -> None:
    with pytest.raises(TypeError, match="model is a NoneType, expected the path of an encoder"):
        LoRATextClassifier().fit(X, Y)
    with pytest.raises(TypeError, match="model is a NoneType, expected the path of an encoder"):
        TextEmbedder().transform(X)


def test_long_texts_are_cut_with_a_warning(model: Path) -> None:
    with pytest.warns(UserWarning, match="cut to 6 tokens: 1 text"):
        LoRATextClassifier(model, max_length=6, **FAST).fit(["a", "b", "a cat and the dog sat"], [0, 1, 1])


@pytest.mark.parametrize("kind", [LoRATextClassifier, LoRATextRegressor, LoRATokenClassifier, TextEmbedder])
@pytest.mark.parametrize(
    "name",
    [
        "estimator_cloneable", "estimator_repr", "estimator_tags_renamed", "valid_tag_types",
        "no_attributes_set_in_init", "get_params_invariance", "set_params",
        "parameters_default_constructible",
    ],
)  # fmt: skip
def test_scikit_learn_s_checks_without_data_pass(kind: Any, name: str) -> None:
    """`check_estimator` itself stops after the first of these, because its data are numbers."""
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    getattr(checks, f"check_{name}")(kind.__name__, kind("model"))


def test_a_second_fit_starts_anew_and_predictions_change_nothing(model: Path) -> None:
    """The checks of `check_estimator`, with texts."""
    estimator = LoRATextClassifier(model, **FAST)
    given = estimator.get_params()
    first = estimator.fit(X, Y).decision_function(X)
    before = {name: value for name, value in vars(estimator).items() if name not in ("model_", "_encoder")}
    estimator.predict_proba(X)
    now = vars(estimator)
    assert all(now[name] is value for name, value in before.items())
    np.testing.assert_array_equal(estimator.fit(X, Y).decision_function(X), first)
    assert estimator.get_params() == given
    np.testing.assert_array_equal(
        np.concatenate([estimator.predict(X[i : i + 1]) for i in range(4)]), estimator.predict(X[:4])
    )


def test_a_saved_adapter_predicts_the_numbers_of_the_regressor(model: Path, tmp_path: Path) -> None:
    y = np.linspace(100, 120, 20)
    fitted = LoRATextRegressor(model, warm_start=True, **FAST).fit(X, y)
    for name in ("first", "again", "more"):
        nplora.save_adapter(fitted.model_, tmp_path / name)
        found = nplora.load_classifier(model, tmp_path / name).predict(X)
        assert abs(np.mean(found) - 110) < 10
        np.testing.assert_allclose(found, fitted.predict(X), rtol=1e-6)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(X), fitted.predict(X))
        fitted = fitted.fit(X, y) if name == "first" else fitted.partial_fit(X, y)


def test_a_language_model_predicts_numbers_without_a_bias(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf")
    y = np.tile([100.0, 107.0], 10)
    fitted = LoRATextRegressor(path, **FAST).fit(X, y)
    nplora.save_adapter(fitted.model_, tmp_path / "out")
    found = nplora.load_classifier(path, tmp_path / "out").predict(X)
    np.testing.assert_allclose(found, fitted.predict(X), rtol=1e-6)


def test_a_saved_adapter_has_the_temperature_of_the_classifier(model: Path, tmp_path: Path) -> None:
    options = FAST | {"calibrate": True, "validation_fraction": 0.3, "warm_start": True}
    rng = np.random.default_rng(0)
    fitted = LoRATextClassifier(model, **options).fit(X, rng.permutation(Y))
    assert fitted.temperature_ != 1
    for _ in range(2):
        nplora.save_adapter(fitted.model_, tmp_path / "out")
        found = nplora.load_classifier(model, tmp_path / "out").predict_proba(X)
        np.testing.assert_allclose(found, fitted.predict_proba(X), rtol=1e-6)
        raw = fitted.decision_function(X) * fitted.temperature_
        fitted.partial_fit(X[:1], Y[:1])  # the temperature no longer holds
        assert fitted.temperature_ == 1
        assert np.abs(fitted.decision_function(X) - raw).max() < 0.2 * np.abs(raw).max() + 0.2


def test_a_fit_that_is_stopped_leaves_the_predictions_in_units_of_the_targets(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = LoRATextRegressor(model, warm_start=True, **FAST).fit(X, np.linspace(100, 120, 20))
    before = fitted.predict(X)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X, np.linspace(100, 120, 20))
    np.testing.assert_allclose(fitted.predict(X), before, rtol=1e-5)


def test_a_fitted_estimator_needs_its_files_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small_encoder(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    fitted = LoRATextClassifier("encoder", **FAST).fit(X, Y)
    before = fitted.decision_function(X)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(fitted.decision_function(X), before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).decision_function(X), before)
    fitted.set_params(model="no such encoder")
    np.testing.assert_array_equal(fitted.decision_function(X), before)
    stored = pickle.dumps(fitted)
    np.testing.assert_array_equal(pickle.loads(stored).decision_function(X), before)
    (tmp_path / "encoder").rename(tmp_path / "moved")
    np.testing.assert_array_equal(fitted.decision_function(X), before)
    assert pickle.dumps(fitted)


def test_a_tokenizer_that_was_edited_in_place_is_read_again(tmp_path: Path) -> None:
    path = save_small_encoder(tmp_path / "encoder")
    first = LoRATextClassifier(path, **FAST).fit(X, Y)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    second = LoRATextClassifier(path, **FAST).fit(X, Y)
    ids = [each.model_.encoder.encode(["a cat"])[0][2] for each in (first, second)]
    assert ids == [6, 7]
