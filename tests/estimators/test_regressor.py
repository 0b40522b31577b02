"""LoRARegressor: targets of any scale and shape, kept heads, learning in parts."""

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV

import nplora
from nplora.sklearn import LoRARegressor
from pretrained_net import D_IN, frozen, network


def task(rng: np.random.Generator, rows: int = 300) -> Any:
    X = rng.normal(size=(rows, D_IN))
    return X, 5000 + 300 * (np.sin(X[:, 0]) + X[:, 1] * 0.5)


def regressor(**options: Any) -> LoRARegressor:
    return LoRARegressor(**({"network": network(), "rank": 4, "epochs": 25, "random_state": 0} | options))


def test_targets_of_any_scale_are_learned(rng: np.random.Generator) -> None:
    X, y = task(rng)
    model = regressor().fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) > 0.9
    assert model.predict(X).shape == y.shape
    plain = regressor().fit(X[:200], (y[:200] - 5000) / 300)
    np.testing.assert_allclose((model.predict(X) - 5000) / 300, plain.predict(X), atol=1e-3)


def test_several_targets_keep_their_axes(rng: np.random.Generator) -> None:
    X, y = task(rng)
    both = np.stack([y, -2 * y + 7], axis=1)
    model = regressor().fit(X, both)
    assert model.predict(X).shape == both.shape
    assert model.score(X, both) > 0.9
    assert regressor().fit(X, y[:, None]).predict(X).shape == (len(y), 1)


def test_a_kept_head_predicts_in_its_own_units(rng: np.random.Generator) -> None:
    X = rng.normal(size=(300, D_IN))
    W = rng.normal(size=(16, D_IN))
    base = nplora.Sequential(nplora.Linear(W), nplora.ReLU(), nplora.Linear(rng.normal(size=(1, 16))))
    y = base(X)[:, 0] * 1.5 + 1
    model = LoRARegressor(base, head="keep", epochs=60, random_state=0, lr=2e-2).fit(X, y)
    assert model.score(X, y) > 0.95
    np.testing.assert_array_equal(model.predict(X), model.model_(X)[:, 0].astype(np.float64))


def test_huber_is_less_disturbed_by_outliers(rng: np.random.Generator) -> None:
    X, y = task(rng)
    spoilt = y.copy()
    spoilt[::15] += 1e5
    scores = {
        loss: regressor(loss=loss, random_state=1).fit(X, spoilt).predict(X) for loss in ("mse", "huber")
    }
    errors = {loss: np.median(np.abs(found - y)) for loss, found in scores.items()}
    assert errors["huber"] < errors["mse"] / 2


def test_partial_fit_learns_from_a_stream(rng: np.random.Generator) -> None:
    X, y = task(rng, 2000)
    model = regressor(lr=1e-2)
    for start in range(0, 2000, 50):
        model.partial_fit(X[start : start + 50], y[start : start + 50])
    assert model.score(X, y) > 0.9
    loaded = pickle.loads(pickle.dumps(model))
    for estimator in (model, loaded):
        estimator.partial_fit(X[:100], y[:100])
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_a_grid_search_shares_the_frozen_weights(rng: np.random.Generator) -> None:
    X, y = task(rng)
    base = network()
    search = GridSearchCV(regressor(network=base, epochs=5), {"rank": [1, 4], "loss": ["mse", "huber"]}, cv=2)
    search.fit(X, y)
    assert frozen(search.best_estimator_)["0"] is base[0].weight


def test_bad_targets_are_refused_with_plain_words(rng: np.random.Generator) -> None:
    X, y = task(rng)
    with pytest.raises(ValueError, match="Input y contains NaN"):
        regressor().fit(X, np.where(y > 5000, np.nan, y))
    with pytest.raises(ValueError, match="could not convert string to float"):
        regressor().fit(X, np.array(["a"] * len(X), dtype=object))
    model = regressor(epochs=1).fit(X, y)
    with pytest.raises(ValueError, match="y has 2 targets per row, but earlier rows had 1"):
        model.partial_fit(X, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="loss='l1' is not available"):
        regressor(loss="l1").fit(X, y)


def test_very_large_targets_are_learned_or_refused(rng: np.random.Generator) -> None:
    X, y = task(rng)
    plain, large = regressor(epochs=3).fit(X, y).predict(X), regressor(epochs=3).fit(X, y * 2.0**1000)
    np.testing.assert_allclose(large.predict(X) / 2.0**1000, plain, rtol=1e-6)
    one = nplora.Sequential(nplora.Linear(np.eye(D_IN)), nplora.Linear(np.ones((1, D_IN))))
    with pytest.raises(ValueError, match="y has a target that is too large for float32"):
        regressor(network=one, head="keep").fit(X.astype(np.float32), y * 1e39)


def test_a_failed_fit_leaves_the_shape_of_predictions(rng: np.random.Generator) -> None:
    X, y = task(rng)
    model = regressor(epochs=1, warm_start=True).fit(X, y)
    with pytest.raises(ValueError, match="y has 2 targets per row, but earlier rows had 1"):
        model.fit(X, np.stack([y, y], axis=1))
    assert model.predict(X).shape == y.shape
