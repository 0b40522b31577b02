"""Resuming a run: checks that a checkpoint fits the run, and restores the run's history."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nplora.formats.errors import CorruptError, FormatError
from nplora.formats.run_files import LOG
from nplora.nn.losses import CustomLoss, Loss
from nplora.runtime.error_text import message_of
from nplora.runtime.user_warning import warn_user
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.fingerprint import differences, factors, is_same_base
from nplora.trainer.fit_config import FitConfig
from nplora.trainer.fused import FusedLoss
from nplora.trainer.history import EVALUATION, History, Record, last_logged
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState
from nplora.trainer.training_setup import TrainingSetup

NONFINITE = "nonfinite"  # the event of a log line about a loss that was not finite

_USUAL: dict[str, Any] = {"communication_dtype": "float32", "local_steps": None}
# Runs in int8 have this setting, except runs of early versions. The setting is compared only if both runs
# have it.
_OPTIONAL = ("int8_head",)
# A message cannot advise the old values of these settings: no argument has the name of the setting, or the
# value is too long for a message.
_NOT_ARGUMENTS = (
    "x", "y", "batches", "loss", "optimizer", "teacher", "micro_tokens", "trained_rows", "is_tied", "size",
    "added_tokens", "invocation_tokens",
)  # fmt: skip
_MOST = 5  # the most differences that a message lists
_MOST_ADVISED = 3  # the most settings that a message advises to set as before
_LONGEST_ERROR = 500  # the most characters of an error message in the log


# ---- the settings that a checkpoint stores ----


def settings_of(setup: TrainingSetup, config: FitConfig) -> dict[str, Any]:
    """The settings of a run, as values that JSON writes and reads without a change.

    The settings under "fixed" must be the same when the run is resumed, because a checkpoint's arrays, and
    its position in the data, depend on these settings. If a setting under "free" has changed, there is only
    a warning. If the validation data have changed, a resumed run drops the best evaluation and its factors.
    """
    model, loss, optimizer = setup.model, setup.loss, setup.optimizer
    public = {k: v for k, v in vars(optimizer).items() if not k.startswith("_") and k != "steps"}
    settings = {
        "fixed": {
            **config.batches.identity(),
            **(loss.settings() if isinstance(loss, FusedLoss) else {}),
            "accumulate": setup.accumulate,
            "optimizer": type(optimizer).__name__,
            **_of_ranks(setup),
            "layers": {name: layer.settings() for name, layer in model.adapter_layers().items()},
        },
        "free": {
            "loss": _loss_name(loss),
            **public,
            "schedule": setup.schedule,
            "warmup_steps": setup.warmup_steps,
            "clip_norm": setup.clip_norm,
            "total_steps": config.total_steps,
            **_of_outer_steps(setup),
        },
        "validation": None if config.validation is None else config.validation.identity(),
    }
    result: dict[str, Any] = json.loads(
        json.dumps(settings, default=repr),
        parse_constant=str,  # NaN and infinities, which JSON does not have, become text
    )
    return result


def _of_ranks(setup: TrainingSetup) -> dict[str, Any]:
    """The settings `communication_dtype` and `local_steps`, each only if it differs from its default."""
    chosen = {name: getattr(setup, name) for name in _USUAL}
    return {name: value for name, value in chosen.items() if value != _USUAL[name]}


def _of_outer_steps(setup: TrainingSetup) -> dict[str, Any]:
    """The settings that influence outer steps; empty if there are no outer steps.

    The number of ranks is one of these settings. Without outer steps, the results do not depend on the number
    of ranks.
    """
    if setup.local_steps is None:
        return {}
    ranks = setup.communicator.size
    return {"outer_lr": setup.outer_lr, "outer_momentum": setup.outer_momentum, "ranks": ranks}


def _loss_name(loss: Loss | FusedLoss) -> str:
    if isinstance(loss, CustomLoss):
        return getattr(loss.function, "__qualname__", type(loss.function).__name__)
    return repr(loss) if type(loss).__module__ == "nplora.nn.losses" else type(loss).__qualname__


# ---- where a run resumes ----


def failure_record(step: int, error: Exception, settings: dict[str, Any]) -> dict[str, Any]:
    """The log record of a step after which a loss was not finite."""
    return {"after": step, "error": str(error)[:_LONGEST_ERROR], "settings": _choices(settings)}


def _choices(settings: dict[str, Any]) -> str:
    """The settings that influence the losses of a run, as one text.

    The text does not contain `total_steps`, because with the schedule "constant" the losses do not depend on
    `total_steps`.
    """
    free = {name: value for name, value in settings["free"].items() if name != "total_steps"}
    return json.dumps(free, sort_keys=True)


def starting_point(directory: RunDirectory, newest: Checkpoint, settings: dict[str, Any]) -> Checkpoint:
    """The checkpoint to resume from: the newest, or an earlier one if the newest led to NaN or infinity.

    The first loss after a checkpoint depends only on the parameters and the data. If this loss was not
    finite, a change of the learning rate cannot help, so the run must resume from an earlier checkpoint.

    Raises:
        ValueError: no setting has changed since the run diverged, or no earlier checkpoint is left.
    """
    try:
        log = directory.read_log(directory.log_bytes)
    except (FormatError, OSError):  # `restored_history` warns that the log cannot be read
        return newest
    failure = last_logged(log[newest.log_bytes :], NONFINITE)
    if not failure:
        return newest
    is_bad = failure.get("after") == newest.step
    start = directory.before(newest.step) if is_bad else newest
    reason = f"{directory.path}: the run ended with {str(failure.get('error'))[:_LONGEST_ERROR]}"
    if start is None:
        raise ValueError(f"{reason}; no earlier checkpoint is left")
    if failure.get("settings") == _choices(settings):
        raise ValueError(
            f"{reason}; the same settings would lead to the same error. With a lower --lr (the optimizer's "
            f"lr), the run continues from step {start.step}"
        )
    return start


# ---- the arithmetic ----


def compute_changes(checkpoint: Checkpoint, settings: dict[str, Any]) -> str:
    """A text about the changed arithmetic, such as "compute was int8, is float32 in 14 layers", or ""."""
    then, now = (_computes(each.get("fixed")) for each in (checkpoint.settings, settings))
    changes = [_changes(then, now)]
    if then["layers"].keys() == now["layers"].keys():
        changes.append(_layer_changes(then["layers"], now["layers"]))
    return ", ".join(filter(None, changes))


def with_compute_of(checkpoint: Checkpoint, settings: dict[str, Any]) -> Checkpoint:
    """Return a copy of the checkpoint, with the arithmetic of `settings` in its own settings."""
    fixed, now = checkpoint.settings.get("fixed"), _computes(settings["fixed"])
    if not isinstance(fixed, dict):
        return checkpoint
    then = _computes(fixed)["layers"]
    layers = {name: {**fixed["layers"][name], **now["layers"].get(name, {})} for name in then}
    changed = {name: now[name] for name in _OPTIONAL if name in fixed and name in now}
    fixed = {**fixed, **changed, **({"layers": {**fixed["layers"], **layers}} if layers else {})}
    return dataclasses.replace(checkpoint, settings={**checkpoint.settings, "fixed": fixed})


def _computes(fixed: Any) -> dict[str, Any]:
    """Return those settings of a run that name an arithmetic: the head's, and in "layers" each layer's."""
    fixed = fixed if isinstance(fixed, dict) else {}
    layers = fixed.get("layers")
    rows = layers.items() if isinstance(layers, dict) else ()
    computes = {
        name: {"compute": row["compute"]} for name, row in rows if isinstance(row, dict) and "compute" in row
    }
    return {**{name: fixed[name] for name in _OPTIONAL if name in fixed}, "layers": computes}


# ---- checks of the checkpoint ----


def checked_history(
    path: Path,
    checkpoint: Checkpoint,
    state: RunState,
    settings: dict[str, Any],
    base: str,
    batches: int | None,
) -> History:
    """Check that a checkpoint fits the run; return the part of the history that the checkpoint contains.

    Args:
        base: the fingerprint of the run's base model.
        batches: the number of batches in an epoch; None if unknown.
    Raises:
        CorruptError: the checkpoint belongs to another model or another data file; its batch number is beyond
            the end of an epoch; or its arrays do not fit the model (the message lists the first few
            differences).
        ValueError: the run's data or settings differ from those in the checkpoint, or the run ends before the
            checkpoint's step.
    """
    if not is_same_base(checkpoint.base, base):
        differ = "the frozen weights or the configuration differ"
        raise CorruptError(f"{path}: the checkpoint is of another base model: {differ}")
    _check_settings(path, checkpoint, settings, state.total_steps)
    _check_position(path, checkpoint, state.total_steps, batches)
    _check_arrays(path, checkpoint, state)
    history = History()
    try:
        history.restore(checkpoint.history, checkpoint.epochs, checkpoint.evaluations)
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{path}: the checkpoint's history is not valid: {error}") from error
    return history


def restored_history(
    directory: RunDirectory,
    checkpoint: Checkpoint,
    state: RunState,
    settings: dict[str, Any],
    base: str,
    batches: int | None,
) -> tuple[History, list[tuple[str, Record]]]:
    """Check that a checkpoint fits the run; return the history up to the checkpoint.

    Returns:
        the history, and a list of the records that are missing at the end of the log, for example because the
        disk was full. Each item of the list is a pair (event, record).
    Raises:
        CorruptError, ValueError: the checkpoint does not fit the run; see `checked_history`.
    Warns:
        UserWarning: a setting under "free" has changed; the instruction set or nplora's version differs; or
            the log has lost records, so that the history is incomplete.
    """
    path = directory.path
    history = checked_history(path, checkpoint, state, settings, base, batches)
    unlogged = _add_log(history, checkpoint, directory)
    changed = _changes(checkpoint.settings.get("free"), settings["free"])
    if changed:
        warn_user(f"{path}: the settings of the resumed run differ from the checkpoint's: {changed}")
    checkpoint.warn_if_moved()
    return history, unlogged


def has_other_validation(checkpoint: Checkpoint, settings: dict[str, Any]) -> bool:
    """Whether the validation data have changed, so that earlier validation losses are not comparable."""
    then, now = checkpoint.settings.get("validation"), settings["validation"]
    return then is not None and now is not None and then != now


def _refusal(path: object) -> str:
    return f"{path}: the run cannot continue with other data or settings"


def _check_settings(
    path: object, checkpoint: Checkpoint, settings: dict[str, Any], total_steps: int | None
) -> None:
    """Raise an error if a setting under "fixed", such as the data, differs from the checkpoint's setting."""
    then, now = checkpoint.settings.get("fixed"), settings["fixed"]
    if not isinstance(then, dict):
        raise ValueError(f"{_refusal(path)}: {_changes(then, now)}")
    if then.get("data") != now.get("data"):
        raise CorruptError(f"{_refusal(path)}: the data file or the way it is read has changed")
    changes = [_changes(then, now), _layer_changes(then.get("layers"), now["layers"])]
    if any(changes):
        is_over = total_steps is not None and checkpoint.step > total_steps
        advice = "" if is_over else _advice(then, now)
        raise ValueError(f"{_refusal(path)}: {', '.join(filter(None, changes))}{advice}")


def _check_position(
    path: object, checkpoint: Checkpoint, total_steps: int | None, batches: int | None
) -> None:
    """Raise an error if the checkpoint's position is beyond the end of the run or of an epoch."""
    if total_steps is not None and checkpoint.step > total_steps:
        raise ValueError(
            f"{path}: the checkpoint is of step {checkpoint.step}, but this run ends at step {total_steps}; "
            "give a larger --epochs or --steps (epochs, steps)"
        )
    if batches is not None and checkpoint.batch > batches:
        raise CorruptError(
            f"{path}: the checkpoint is of batch {checkpoint.batch}, but an epoch has only {batches} batches"
        )


def _advice(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The end of a refusal: the settings with which the run would continue, as keyword arguments.

    Args:
        then, now: the settings under "fixed" in the checkpoint, and those of the resumed run.
    Returns:
        a text such as "; to continue, use the run's earlier settings: compute='int8' and no
        filter_vocabulary". The text is "" if it is not certain that the run continues with these arguments.
    """
    before = _before(then, now)
    if not before or any(name in _NOT_ARGUMENTS or not _is_short(was) for name, was in before.items()):
        return ""
    *most, last = (
        f"no {name}" if was is None or was is False else f"{name}={was!r}" for name, was in before.items()
    )
    listed = f"{', '.join(most)} and {last}" if most else last
    advice = "; to continue, use the run's earlier settings"
    return f"{advice}: {listed}" if len(most) < _MOST_ADVISED else advice


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _before(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return all changed settings, of the run and of its layers, with their values in the checkpoint.

    The only setting of layers that can be in the result is `compute`. If another one has changed, such as
    `rank`, the result is empty, because it may come from a pattern or from an adapter. The result is also
    empty if the adapters are now in other layers, or if the layers do not all have the same change.
    """
    before = {name: then.get(name, _USUAL.get(name)) for name in _changed_names(then, now)}
    layers = then.get("layers")
    if layers is None:  # a checkpoint of an early version
        return before
    if not isinstance(layers, dict) or layers.keys() != now["layers"].keys():
        return {}
    rows = [(layers[layer], now["layers"][layer]) for layer in layers]
    if any(not isinstance(was, dict) or _without_compute(was) != _without_compute(new) for was, new in rows):
        return {}
    computes = {(was.get("compute"), new.get("compute")) for was, new in rows if "compute" in {**was, **new}}
    if any(was != new for was, new in computes):
        if len(computes) > 1:
            return {}
        before["compute"] = computes.pop()[0]
        if "int8_head" in now:
            before.setdefault("int8_head", then.get("int8_head"))  # only compute="int8" allows it
    return before


def _without_compute(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if name != "compute"}


def _check_arrays(path: object, checkpoint: Checkpoint, state: RunState) -> None:
    """Raise an error if the checkpoint's factors, dropout streams or moments do not fit the model."""
    model = state.model
    problems = differences(checkpoint.parameters, factors(model))
    if checkpoint.random_state.keys() != model.random_state().keys():
        problems.append("the dropout streams belong to other layers")
    verdict = "is of another model" if problems else "does not fit the model"
    if checkpoint.best_parameters:
        problems += [f"best {p}" for p in differences(checkpoint.best_parameters, factors(model))]
    problems += state.optimizer.differences(checkpoint.optimizer, state.parameters)
    if state.outer is not None and state.continues_momentum(checkpoint):
        problems += state.outer.differences(checkpoint.outer, state.parameters)
    if problems:
        raise CorruptError(f"{path}: the checkpoint {verdict}: {first_few(problems, '; ')}")


def first_few(sentences: list[str], separator: str) -> str:
    """Join the first few sentences for a message, and add the number of sentences left out."""
    more = f"{separator}and {len(sentences) - _MOST} more" if len(sentences) > _MOST else ""
    return separator.join(sentences[:_MOST]) + more


def _changes(then: Any, now: dict[str, Any]) -> str:
    """A text about all changed settings except those of layers, such as "batch_size was 8, is 16"."""
    if not isinstance(then, dict):
        return "the checkpoint does not state its settings"
    return ", ".join(
        f"{name} has changed"
        if name in ("x", "y") and then.get(name) and now.get(name)
        else _change(name, then.get(name, _USUAL.get(name)), now.get(name, _USUAL.get(name)))
        for name in _changed_names(then, now)
    )


def _changed_names(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of all changed settings except those of layers."""
    skipped = {"layers", *(name for name in _OPTIONAL if name not in then or name not in now)}
    return [name for name in {**then, **now} if name not in skipped and then.get(name) != now.get(name)]


def _change(name: str, was: Any, is_now: Any) -> str:
    """A text about a changed setting, such as "batch_size was 8, is 16"."""
    before, after = ("not set" if value is None else value for value in (was, is_now))
    return f"{name} was {before}, is {after}"


def _layer_changes(then: Any, now: dict[str, dict[str, Any]]) -> str:
    """A text about the changed settings of layers, such as "0.alpha was 16.0, is 64.0".

    A change that several layers share is listed once, as in "rank was 8, is 4 in 205 layers". If a checkpoint
    of an early version has no settings of layers, nothing is compared.
    """
    if then is None:
        return ""
    if not isinstance(then, dict) or not all(isinstance(settings, dict) for settings in then.values()):
        return "the checkpoint does not state the settings of its layers"
    if then.keys() != now.keys():
        lost, new = (
            first_few(sorted(a.keys() - b.keys()), ", ") or "none" for a, b in ((then, now), (now, then))
        )
        return f"{len(then)} layers had adapters, now {len(now)} have them (removed: {lost}; new: {new})"
    changed: dict[str, list[str]] = {}
    for layer, settings in now.items():
        for name in {**then[layer], **settings}:
            was, is_now = then[layer].get(name), settings.get(name)
            if was != is_now:
                changed.setdefault(_change(name, was, is_now), []).append(layer)
    return first_few([_in_layers(change, layers) for change, layers in changed.items()], ", ")


def _in_layers(change: str, layers: list[str]) -> str:
    """A text about a changed setting, with the layer's name or the number of layers that share the change."""
    return f"{change} in {len(layers)} layers" if len(layers) > 1 else f"{layers[0]}.{change}".lstrip(".")


# ---- the history ----


def _add_log(history: History, checkpoint: Checkpoint, directory: RunDirectory) -> list[tuple[str, Record]]:
    """Complete the history from the log; return the records that are missing in the log.

    Warn if the log is incomplete, or if steps or epochs are missing in the completed history.
    """
    log, reason = b"", "missing, cut or damaged"
    try:
        log = directory.read_log(checkpoint.log_bytes)
    except (FormatError, OSError) as error:
        reason = f"not readable ({message_of(error)})"
    history.add_log(log, checkpoint.step, checkpoint.epoch)
    found, wanted = len(history.steps) + len(history.epochs), checkpoint.step + checkpoint.epoch
    if len(log) != checkpoint.log_bytes or found != wanted:
        warn_user(
            f"{directory.path / LOG}: the log is {reason}: the run continues, "
            f"and its history has {len(history.steps)} of {checkpoint.step} steps "
            f"and {len(history.epochs)} of {checkpoint.epoch} epochs"
        )
    last_step, last_epoch = (_number(last_logged(log, event).get(event)) for event in ("step", "epoch"))
    last_evaluated = _number(last_logged(log, EVALUATION).get("step"))
    lost = {row["step"] for row in checkpoint.evaluations if row["step"] > last_evaluated}
    return [
        *(("step", record) for record in history.steps if record.step > last_step),
        *((EVALUATION, record) for record in history.evaluations if record.step in lost),
        *(("epoch", record) for record in history.epochs if record.epoch > last_epoch),
    ]


def log_before(directory: RunDirectory, checkpoint: Checkpoint) -> bytes:
    """The log up to a checkpoint; empty if it cannot be read, which `restored_history` warns about."""
    try:
        return directory.read_log(checkpoint.log_bytes)
    except (FormatError, OSError):
        return b""


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
