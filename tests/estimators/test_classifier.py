"""LoRAClassifier: trained and shared values, searches, pickles, learning in parts, weights, errors."""

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import nplora
from nplora.formats.errors import FormatError
from nplora.sklearn import LoRAClassifier, read_network
from pretrained_net import D_IN, blobs, frozen, network, parameters, saved, weights


def classifier(**options: Any) -> LoRAClassifier:
    options = {"network": network(), "rank": 3, "epochs": 8, "random_state": 0} | options
    return LoRAClassifier(**options)


# ---- the model ----


@pytest.mark.parametrize("head", ["replace", "append", "keep"])
def test_the_network_is_adapted_and_stays_as_it_is(head: str, rng: np.random.Generator) -> None:
    X, y = blobs(rng, classes=10 if head == "keep" else 3)
    base = network()
    before = [layer.weight.to_numpy() for layer in (base[0], base[2], base[4])]
    model = classifier(network=base, head=head, epochs=15).fit(X, y)
    assert model.score(X, y) > 0.9
    for layer, weight in zip((base[0], base[2], base[4]), before, strict=True):
        np.testing.assert_array_equal(layer.weight.to_numpy(), weight)
    assert not base.parameters()
    adapted = ["0", "2", *([] if head == "replace" else ["4"])]
    assert list(model.model_.adapter_layers()) == adapted
    assert model.model_.adapter_layers()["0"].weight is base[0].weight  # shared, not copied
    trained = {name.rpartition(".")[0] for name in parameters(model)} - set(adapted)
    assert trained == {"replace": {"4"}, "append": {"5"}, "keep": set()}[head]


def test_predictions_are_the_softmax_of_the_network(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    names = np.array(["cat", "dog", "eel"])[y]
    model = classifier().fit(X, names)
    logits = model.model_(X).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-10)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), expected, rtol=1e-10)
    np.testing.assert_array_equal(model.decision_function(X), logits)
    np.testing.assert_array_equal(model.predict(X), model.classes_[logits.argmax(axis=1)])
    assert model.classes_.tolist() == ["cat", "dog", "eel"]


def test_a_small_layer_gets_a_smaller_rank_and_the_same_scale(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    layers = classifier(rank=16, alpha=24).fit(X, y).model_.adapter_layers()
    assert (layers["0"].rank, layers["2"].rank) == (D_IN, 16)
    assert layers["0"].scale == layers["2"].scale == 1.5


def test_only_the_named_layers_are_adapted(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    assert list(classifier(targets=["2"]).fit(X, y).model_.adapter_layers()) == ["2"]
    with pytest.raises(ValueError, match="targets has '7', but no layer that can be adapted has this name"):
        classifier(targets=["7"]).fit(X, y)


def test_images_go_through_convolutions(rng: np.random.Generator) -> None:
    X = rng.normal(size=(60, 1, 6, 6))
    y = X[:, 0, :3].mean(axis=(1, 2)) > X[:, 0, 3:].mean(axis=(1, 2))
    base = nplora.Sequential(
        nplora.Conv2d(rng.normal(size=(8, 1, 3, 3)) / 3), nplora.ReLU(), nplora.Flatten(),
        nplora.Linear(rng.normal(size=(4, 128)) / 11),
    )  # fmt: skip
    model = classifier(network=base, epochs=30).fit(X, y)
    assert isinstance(model.model_[0], nplora.LoRAConv2d)
    assert model.score(X, y) > 0.9


# ---- sharing, searching, copying ----


def test_a_grid_search_of_six_settings_shares_the_frozen_weights(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    base, seen = network(), []

    class Spy(LoRAClassifier):
        def fit(self, X: Any, y: Any) -> Any:
            super().fit(X, y)
            seen.append({name: id(weight) for name, weight in frozen(self).items()})
            return self

    grid = {"rank": [1, 2, 4], "lr": [1e-3, 1e-2]}
    search = GridSearchCV(Spy(base, epochs=4, random_state=0), grid, cv=2).fit(X, y)
    assert len(seen) == 6 * 2 + 1
    assert seen == [{"0": id(base[0].weight), "2": id(base[2].weight)}] * len(seen)
    assert search.best_params_["lr"] == 1e-2
    assert search.best_score_ > 0.8


def test_clones_share_weights_and_fit_the_same(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    model = classifier().fit(X, y)
    other = clone(model).fit(X, y)
    assert frozen(model) == frozen(other)
    np.testing.assert_array_equal(model.predict_proba(X), other.predict_proba(X))


def test_it_works_in_a_pipeline_and_in_other_estimators(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    scores = cross_val_score(make_pipeline(StandardScaler(), classifier()), 100 + 50 * X, y, cv=3)
    assert scores.mean() > 0.85
    assert CalibratedClassifierCV(classifier(), cv=2).fit(X, y).score(X, y) > 0.85


def test_equal_seeds_give_equal_bits(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    one, same, other = (classifier(random_state=seed, dropout=0.2).fit(X, y) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.predict_proba(X), same.predict_proba(X))
    assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


# ---- files and pickles ----


def test_a_network_is_read_from_its_file(tmp_path: Path, rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    from_file, from_memory = classifier(network=str(saved(tmp_path))).fit(X, y), classifier().fit(X, y)
    np.testing.assert_array_equal(from_file.predict_proba(X), from_memory.predict_proba(X))
    mapped = [weight._arrays[0] for weight in frozen(from_file).values()]
    assert all(not array.flags.owndata and not array.flags.writeable for array in mapped)


def test_a_pickle_holds_the_path_and_not_the_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    path = saved(tmp_path)
    model = classifier(network=path, dropout=0.1).fit(X, y)
    raw = pickle.dumps(model)
    weight = frozen(model)["2"].to_numpy()
    assert weight.tobytes() not in raw
    assert weight.tobytes() in pickle.dumps(classifier().fit(X, y))
    loaded = pickle.loads(raw)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    loaded.partial_fit(X, y)
    model.partial_fit(X, y)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    path.rename(path.with_name("moved"))  # Windows does not remove files that are mapped
    with pytest.raises(FileNotFoundError):
        pickle.loads(raw)


def test_a_pickle_refuses_another_network(tmp_path: Path, rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    path = saved(tmp_path)
    raw = pickle.dumps(classifier(network=path).fit(X, y))
    other = weights()
    other["2.weight"][-1, -1] += 1e-6
    nplora.formats.safetensors.save(path, other)
    with pytest.raises(FormatError, match="does not hold the network that the estimator was fitted with"):
        pickle.loads(raw)


def test_an_unfitted_estimator_is_pickled(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(classifier(network=str(saved(tmp_path))))).rank == 3


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a.weight": (4, 3), "norm": (4,)}, "the tensor 'norm' belongs to no linear layer"),
        (
            {"a.weight": (4, 3), "b.weight": (2, 5)},
            r"'b.weight' has shape \(2, 5\), expected shape \(d_out, 4\)",
        ),
        ({"a.weight": (4, 3, 1)}, "expected two axes"),
        ({"a.weight": (4, 3), "a.bias": (3,)}, r"'a.bias' has shape \(3,\), expected \(4,\)"),
        ({}, "no tensor is named NAME.weight"),
    ],
)
def test_a_file_that_is_no_network_is_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    nplora.formats.safetensors.save(path, {n: np.zeros(shape, np.float32) for n, shape in arrays.items()})
    with pytest.raises(FormatError, match=words):
        read_network(path)


def test_layers_stand_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    widths = [3, 5, *range(10, 21)]
    arrays = {f"fc{i}.weight": np.zeros((widths[i + 1], widths[i]), np.float32) for i in range(12)}
    nplora.formats.safetensors.save(path, arrays)
    model = read_network(path, "tanh")
    assert [layer.shape[0] for layer in model if isinstance(layer, nplora.Linear)] == widths[1:]
    assert isinstance(model[1], nplora.Tanh)


def test_hostile_names_and_biases_are_sorted_or_refused(tmp_path: Path) -> None:
    path, save = tmp_path / "odd.safetensors", nplora.formats.safetensors.save
    first, last = np.ones((4, 3), np.float32), np.ones((2, 4), np.float32)
    save(path, {"1" * 5000 + ".weight": last, "9²3.weight": first})
    assert [layer.shape for layer in read_network(path) if isinstance(layer, nplora.Linear)] == [
        (4, 3),
        (2, 4),
    ]
    for changes, words in (
        ({"0.weight": first * np.float32(np.nan)}, r"0\.weight"),
        ({"0.bias": np.float32([1, np.inf, 1, 1])}, r"0\.bias"),
        ({"0.bias": np.arange(4)}, r"'0\.bias' is int64, expected one of"),
    ):
        save(path, {"0.weight": first} | changes)
        with pytest.raises(FormatError, match=words):
            read_network(path)


# ---- learning in parts ----


def test_partial_fit_continues_and_learns_a_class_that_comes_later(rng: np.random.Generator) -> None:
    X, y = blobs(rng, rows=600)
    order = np.argsort(y > 1, kind="stable")  # the first batches have two classes only
    X, y = X[order], y[order]
    model = classifier(lr=1e-2)
    for start in [*range(0, 600, 60), *range(0, 600, 60)]:
        model.partial_fit(X[start : start + 60], y[start : start + 60], classes=[0, 1, 2])
    shuffled = rng.permutation(600)
    for start in range(0, 600, 60):
        rows = shuffled[start : start + 60]
        model.partial_fit(X[rows], y[rows])
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.score(X, y) > 0.9


def test_partial_fit_after_a_pickle_gives_the_same_bits(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    model = classifier().partial_fit(X, y, classes=np.unique(y))
    loaded = pickle.loads(pickle.dumps(model))
    for estimator in (model, loaded):
        estimator.partial_fit(X[:50], y[:50])
    np.testing.assert_array_equal(model.predict_proba(X), loaded.predict_proba(X))


def test_partial_fit_names_unknown_labels_and_missing_classes(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        classifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="y has the unknown label 2, expected one of 0, 1"):
        classifier().partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="class_weight='balanced' needs all rows at once"):
        classifier(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])


def test_warm_start_continues(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    model = classifier(warm_start=True, epochs=3).fit(X, y)
    before, first = model.loss_curve_[-1], parameters(model)
    model.fit(X, y)
    assert model.loss_curve_[0] < before
    assert not np.array_equal(parameters(model)["0.A"], first["0.A"])
    with pytest.raises(ValueError, match="warm_start=True, but the data has the classes 1, 2, 3"):
        model.fit(X, y + 1)


# ---- weights, held-out rows, calibration ----


def test_class_weights_move_the_boundary(rng: np.random.Generator) -> None:
    X, y = make_classification(400, 6, weights=[0.9], flip_y=0.2, random_state=0)
    recalls = {}
    for weight in (None, "balanced", {0: 1, 1: 50}):
        model = classifier(class_weight=weight).fit(X, y)
        recalls[str(weight)] = np.mean(model.predict(X)[y == 1] == 1)
    assert recalls["None"] < recalls["balanced"] < recalls["{0: 1, 1: 50}"] == 1


def test_early_stopping_keeps_the_best_epoch(rng: np.random.Generator) -> None:
    X, y = blobs(rng, spread=3)  # overlapping classes, which can only be learned by heart
    model = classifier(early_stopping=True, validation_fraction=0.3, patience=2, epochs=60, lr=3e-2).fit(X, y)
    assert model.n_iter_ < 60
    best = int(np.argmin(model.validation_curve_))
    assert model.n_iter_ == best + 1 + 2
    assert len(model.loss_curve_) == len(model.validation_curve_) == model.n_iter_


def test_calibration_lowers_the_loss_on_new_rows_and_changes_no_label(rng: np.random.Generator) -> None:
    X, y = blobs(rng, rows=400, spread=3)
    options: dict[str, Any] = {"epochs": 60, "lr": 2e-2, "validation_fraction": 0.4}
    model = classifier(calibrate=True, **options).fit(X, y)
    assert model.temperature_ > 1.5  # it is too sure
    new, labels = blobs(rng, rows=1000, spread=3)
    calibrated = model.predict_proba(new)
    before = calibrated**model.temperature_  # the probabilities of temperature 1, but for a factor
    before /= before.sum(axis=1, keepdims=True)
    assert log_loss(labels, calibrated) < log_loss(labels, before) - 0.1
    np.testing.assert_array_equal(model.predict(new), model.classes_[before.argmax(axis=1)])


# ---- interrupted runs ----


class StopError(Exception):
    """Ends a run in the middle, like a crash."""


def stopping_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], None]:
    """Make every run end in the step after so many steps, until the returned function is called."""
    real, made = nplora.Sequential.backward, [0]

    def backward(self: Any, *args: Any, **options: Any) -> Any:
        if made[0] == steps:
            raise StopError
        made[0] += 1
        return real(self, *args, **options)

    monkeypatch.setattr(nplora.Sequential, "backward", backward)
    return lambda: monkeypatch.setattr(nplora.Sequential, "backward", real)


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_interrupted_fit_continues_with_the_same_bits(
    early_stopping: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs(rng)
    options: dict[str, Any] = {"early_stopping": early_stopping, "patience": 3, "epochs": 12, "dropout": 0.1}
    whole = classifier(**options).fit(X, y)
    go_on = stopping_at(monkeypatch, 30)
    with pytest.raises(StopError):
        classifier(checkpoint_dir=tmp_path, **options).fit(X, y)
    go_on()
    resumed = classifier(checkpoint_dir=tmp_path, **options).fit(X, y)
    assert len(list(tmp_path.iterdir())) == 1
    assert parameters(resumed).keys() == parameters(whole).keys()
    for name, value in parameters(whole).items():
        np.testing.assert_array_equal(parameters(resumed)[name], value)
    assert resumed.loss_curve_ == whole.loss_curve_
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))


@pytest.mark.slow
def test_a_grid_search_that_was_interrupted_loads_its_finished_fits(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs(rng)
    grid = {"rank": [1, 2, 4], "lr": [1e-3, 1e-2]}

    def search(directory: Path | None) -> GridSearchCV:
        return GridSearchCV(
            classifier(epochs=3, checkpoint_dir=directory), grid, cv=2, refit=False, error_score="raise"
        )

    whole = search(None).fit(X, y)
    go_on = stopping_at(monkeypatch, 50)  # a fit has 12 steps
    with pytest.raises(StopError):
        search(tmp_path).fit(X, y)
    go_on()
    steps = [0]
    real = nplora.AdamW.step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        steps[0] += 1
        return real(self, *args, **options)

    monkeypatch.setattr(nplora.AdamW, "step", counted)
    resumed = search(tmp_path).fit(X, y)
    assert steps[0] == 12 * 12 - 50
    np.testing.assert_array_equal(
        resumed.cv_results_["mean_test_score"], whole.cv_results_["mean_test_score"]
    )


# ---- bad input ----


def test_bad_data_is_refused_with_plain_words(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    with pytest.raises(ValueError, match="the data has only one class, 1, expected at least two"):
        classifier().fit(X, np.ones(len(X), int))
    with pytest.raises(ValueError, match="Input y contains NaN"):
        classifier().fit(X, np.where(y == 2, np.nan, y))
    with pytest.raises((ValueError, TypeError), match=r"(?i)label|mix|str|type"):
        classifier().fit(X, np.array(["a", 1, "b"] * 80, dtype=object))
    with pytest.raises(ValueError, match="Unknown label type"):
        classifier().fit(X, X[:, 0])
    with pytest.raises(ValueError, match="Input X contains infinity"):
        classifier().fit(np.where(X > 1, np.inf, X), y)
    with pytest.raises(ValueError, match=f"X has 5 features, but LoRAClassifier is expecting {D_IN}"):
        classifier().fit(X, y).predict(X[:, :5])
    with pytest.raises(ValueError, match=f"last axis 5, expected d_in={D_IN}"):
        classifier().fit(X[:, :5], y)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"head": "keep"}, ValueError, "has 10 outputs and the data need 3; use head='replace'"),
        ({"head": "new"}, ValueError, "head='new' is not available; possible: 'replace', 'append', 'keep'"),
        ({"network": 3}, TypeError, "network is a int, expected a Module, a path"),
        ({"network": "absent.safetensors"}, FileNotFoundError, "absent.safetensors"),
        (
            {"network": nplora.Sequential(nplora.Linear(np.eye(6)))},
            ValueError,
            "no frozen linear layer or convol",
        ),
        ({"network": nplora.ReLU()}, ValueError, "the network has no linear layer; use head='append'"),
        ({"rank": 0}, ValueError, "rank is 0, expected at least 1"),
        ({"epochs": 0}, ValueError, "epochs is 0, expected at least 1"),
        ({"targets": "2"}, TypeError, "targets is '2', expected a list of texts"),
        ({"class_weight": {7: 2.0}}, ValueError, "class_weight"),
        ({"schedule": "step"}, ValueError, "schedule='step' is not available"),
    ],
)
def test_bad_settings_are_refused_with_plain_words(
    options: dict[str, Any], error: type[Exception], words: str, rng: np.random.Generator
) -> None:
    X, y = blobs(rng)
    with pytest.raises(error, match=words):
        classifier(**options).fit(X, y)


@pytest.mark.slow
def test_fits_leave_no_network_behind(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    model = classifier(epochs=1)

    def count() -> int:
        model.fit(X, y)
        gc.collect()
        return sum(type(held) is nplora.LoRALinear for held in gc.get_objects())  # isinstance asks the object

    before = count()
    assert count() <= before  # fewer if objects of other tests were still there


def test_a_last_layer_with_an_adapter_is_the_one_that_is_replaced(rng: np.random.Generator) -> None:
    X = rng.normal(size=(40, 4))
    base = nplora.Sequential(
        nplora.Linear(rng.normal(size=(5, 4))),
        nplora.ReLU(),
        nplora.LoRALinear(rng.normal(size=(5, 5)), rank=2),
    )
    for classes in (2, 5):
        model = LoRAClassifier(base, epochs=1, random_state=0).fit(X, np.arange(40) % classes).model_
        assert model[0].weight is base[0].weight
        assert isinstance(model[2], nplora.Linear)
        assert model[2].shape == (classes, 5)


def test_layers_of_a_fixed_width_after_the_new_head_are_named(rng: np.random.Generator) -> None:
    X = rng.normal(size=(40, 4))
    norm = nplora.LayerNorm(np.ones(6), np.zeros(6))
    base = nplora.Sequential(nplora.Linear(rng.normal(size=(6, 4))), nplora.Linear(np.eye(6)), norm)
    with pytest.raises(ValueError, match=r"head='replace' gives .* 2 outputs, but the next layers refuse"):
        LoRAClassifier(base, epochs=1).fit(X, np.arange(40) % 2)


@pytest.mark.parametrize("fails", ["features", "lr", "interrupt"])
def test_a_failed_fit_leaves_the_fitted_estimator(
    fails: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs(rng)
    model = classifier(calibrate=True, warm_start=fails == "features", epochs=2).fit(X, y)
    before = model.predict_proba(X)
    if fails == "features":
        with pytest.raises(ValueError, match=f"X has 3 features, but LoRAClassifier is expecting {D_IN}"):
            model.fit(X[:, :3], y)
    elif fails == "lr":
        model.lr = -1
        with pytest.raises(ValueError, match="lr"):
            model.fit(X, y % 2)
    else:
        stopping_at(monkeypatch, 1)
        with pytest.raises(StopError):
            model.fit(X, y % 2)
    np.testing.assert_array_equal(model.predict_proba(X), before)


def test_partial_fit_drops_an_old_temperature(rng: np.random.Generator) -> None:
    X, y = blobs(rng)
    model = classifier(calibrate=True).fit(X, y)
    assert model.temperature_ != 1
    assert model.partial_fit(X, y).temperature_ == 1
