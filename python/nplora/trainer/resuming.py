"""Whether a checkpoint and a run that is to go on from it belong together."""

import copy
import json
import warnings
from typing import Any

from nplora.checkpoint import Checkpoint, differences, factors
from nplora.formats.errors import CorruptError
from nplora.losses import CustomLoss, Loss
from nplora.module import Module
from nplora.optim import Optimizer
from nplora.trainer.history import History

_MOST = 8  # differences that a message lists


def settings_of(
    data: dict[str, Any], loss: Loss, optimizer: Optimizer, accumulate: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint remembers of how its run was started, as JSON gives it back.

    "fixed" must be the same when the run goes on: it decides what a position in the data means. "free" may
    change, with a warning.
    """
    public = {k: v for k, v in vars(optimizer).items() if not k.startswith("_") and k != "steps"}
    settings = {
        "fixed": {**data, "accumulate": accumulate, "optimizer": type(optimizer).__name__},
        "free": {"loss": _loss_name(loss), **public, **options},
    }
    result: dict[str, Any] = json.loads(json.dumps(settings, default=repr))
    return result


def _loss_name(loss: Loss) -> str:
    if isinstance(loss, CustomLoss):
        return getattr(loss.function, "__qualname__", type(loss.function).__name__)
    return repr(loss) if type(loss).__module__ == "nplora.losses" else type(loss).__qualname__


def restored_history(
    path: object,
    checkpoint: Checkpoint,
    model: Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    base: str,
    total_steps: int | None,
) -> History:
    """Check all that a checkpoint brings against the run, change nothing, and return the history in it.

    Raises:
        CorruptError: it is of another base model, or its arrays do not fit; all that does not is listed.
        ValueError: the run's data or settings are others, or it ends before the checkpoint's step.
    Warns:
        UserWarning: settings that may change did, or the machine's instruction set.
    """
    if checkpoint.base != base:
        raise CorruptError(f"{path}: the checkpoint is of another base model: the frozen weights differ")
    changed = _changes(checkpoint.settings.get("fixed"), settings["fixed"])
    if changed:
        raise ValueError(f"{path}: the checkpoint's run cannot go on with other data or settings: {changed}")
    if total_steps is not None and checkpoint.step > total_steps:
        raise ValueError(
            f"{path}: the checkpoint is of step {checkpoint.step}, this run ends at step {total_steps}"
        )
    problems = differences(checkpoint.parameters, factors(model))
    if checkpoint.best is not None:
        problems += [f"best {p}" for p in differences(checkpoint.best_parameters, factors(model))]
    if checkpoint.random_state.keys() != model.random_state().keys():
        problems.append("the dropout streams are of other layers")
    probe, history = copy.copy(optimizer), History()
    try:
        probe.init(model.parameters())
        probe.load_state_dict(checkpoint.optimizer)
        history.restore(checkpoint.history, checkpoint.epochs)
    except (ValueError, TypeError) as error:
        problems.append(str(error))
    if problems:
        more = f" and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise CorruptError(
            f"{path}: the checkpoint does not fit the model: {'; '.join(problems[:_MOST])}{more}"
        )

    changed = _changes(checkpoint.settings.get("free"), settings["free"])
    if changed:
        warnings.warn(f"{path}: the run goes on with other settings: {changed}", stacklevel=6)
    checkpoint.warn_if_moved()
    return history


def _changes(then: Any, now: dict[str, Any]) -> str:
    """The settings that differ: "batch_size was 8, is 16"."""
    if not isinstance(then, dict):
        return "the checkpoint does not know its own"
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(
        f"{name} is another array"
        if name in ("x", "y") and then.get(name) and now.get(name)
        else f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in names
    )
