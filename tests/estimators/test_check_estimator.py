"""scikit-learn's own checks of estimators: `check_estimator`."""

import os
from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from nplora.sklearn import LoRAClassifier, LoRARegressor

ESTIMATORS = [LoRAClassifier(epochs=25), LoRARegressor(epochs=25)]


@pytest.mark.slow
@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_s_checks_pass(estimator: Any, check: Any) -> None:
    name = getattr(check, "func", check).__name__
    if name == "check_array_api_input" and not os.environ.get("SCIPY_ARRAY_API"):
        pytest.skip("needs SCIPY_ARRAY_API, and the estimators take NumPy arrays only")
    check(estimator)
