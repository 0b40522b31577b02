"""The handshake: before the first step, the ranks of a run check that they have the same model and data."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.distributed.communicator import Communicator
from nplora.trainer.fingerprint import base_fingerprint, factors
from nplora.trainer.fit_config import FitConfig
from nplora.trainer.resuming import first_few, settings_of
from nplora.trainer.training_setup import TrainingSetup

Array = npt.NDArray[Any]

_LONG = 40  # characters; a longer value is not shown


def require_agreement(communicator: Communicator, setup: TrainingSetup, config: FitConfig) -> None:
    """Check that all ranks start the same run.

    A signal does not end the handshake, because the run's state is not loaded yet and cannot be saved.

    Raises:
        ValueError: a rank differs from rank 0; the message names the rank and the differences.
    """
    if communicator.size > 1:
        problems = differences(communicator.gather(_described(setup, config), "the handshake"))
        if problems:
            raise ValueError(f"Trainer.fit: the ranks do not agree: {first_few(problems, '; ')}")


def differences(ranks: list[dict[str, Any]]) -> list[str]:
    """Compare the run that each rank describes with rank 0's run; return a sentence for each difference."""
    first, problems = ranks[0], []
    for rank, own in enumerate(ranks):
        for name in {**first, **own}:
            here, there = (_text(each.get(name, "missing")) for each in (own, first))
            if here != there:
                is_long = max(len(here), len(there)) > _LONG
                values = "" if is_long else f": {here}, but {there} on rank 0"
                problems.append(f"rank {rank} differs in {name}{values}")
    return problems


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True, allow_nan=False)
    return str(value)


def program() -> dict[str, str]:
    """The versions of nplora and NumPy, and the instruction set. Rounding depends on all three."""
    core = _core.config()
    return {
        "version of nplora": str(core["version"]),
        "instruction set": str(core["isa"]),
        "version of NumPy": np.__version__,
    }


def _described(setup: TrainingSetup, config: FitConfig) -> dict[str, Any]:
    """A dict from names to values: everything that the results of a run depend on."""
    settings = settings_of(setup, config)
    fixed = settings["fixed"]
    layers = fixed.pop("layers")
    names = ("epochs", "steps", "eval_every", "patience", "keep")
    return {
        **program(),
        "base model": base_fingerprint(setup.model, whole=True),
        **settings["free"],
        **fixed,  # "loss" here (the settings of a `FusedLoss`) replaces "loss" in "free" (the loss's name)
        "validation data": settings["validation"],
        "adapter (layers, ranks, alphas)": layers,
        "initial factors": _digest(factors(setup.model)),
        "initial dropout streams": setup.model.random_state(),
        "state of the optimiser": _digest(setup.optimizer.state_dict(copy=False)),
        **{name: getattr(config, name) for name in names},
    }


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
