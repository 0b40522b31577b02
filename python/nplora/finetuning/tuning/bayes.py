"""OptunaSampler: proposes the first trials of a search with Optuna's TPE sampler (Bergstra et al. 2011)."""

from __future__ import annotations

import math
from typing import Any

from nplora.finetuning.tuning.space import Settings, Space, rounded

_RANDOM = 4  # trials at the start that are drawn at random


class OptunaSampler:
    """Proposes settings one by one. A proposal depends on the losses of the earlier proposals.

    The same seed and the same losses give the same proposals. A resumed search asks for the earlier proposals
    again, so that the sampler has the same state as before.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """

    def __init__(self, space: Space, seed: int) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM)
        self._study = optuna.create_study(sampler=sampler)
        self._asked: Any = None

    def propose(self) -> Settings:
        """The settings of the next trial. Call `tell` with the trial's loss before the next proposal."""
        self._asked = self._study.ask()
        rates, changes = self._space.rates, dict[str, Any]()
        lr = rates[0]
        if len(rates) > 1:
            lr = rounded(self._asked.suggest_float("lr", rates[0], rates[-1], log=True))
        for name, values in self._space.others.items():
            index = self._asked.suggest_categorical(name, list(range(len(values))))
            changes[name] = values[index]
        return self._space.settings(lr, **changes)

    def tell(self, loss: float) -> None:
        """Report the loss of the last proposal. An infinite loss counts as a failed trial."""
        if math.isfinite(loss):
            self._study.tell(self._asked, loss)
        else:
            self._study.tell(self._asked, state=_optuna().trial.TrialState.FAIL)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tune: sampler='optuna' needs the package optuna: pip install 'nplora[tune]'", name="optuna"
        ) from error
    return optuna
