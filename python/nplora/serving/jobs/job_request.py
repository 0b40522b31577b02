"""JobRequest: the body of a request for a fine-tuning job, checked, and translated into our options."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nplora.finetuning import FinetuneOptions
from nplora.formats.errors import brief, nearest_names
from nplora.serving.request_error import RequestError

Shape = dict[str, Any]

OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "orpo": "orpo", "kto": "kto"}
AUTO_EPOCHS = 3
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPENAI = (
    "model", "training_file", "validation_file", "suffix", "seed", "metadata", "method", "hyperparameters",
    "integrations", "user",
)  # fmt: skip
_HYPERPARAMETERS = {"n_epochs": "epochs", "batch_size": "batch_examples", "learning_rate_multiplier": "lr"}
# Options that a request may not set: they name files, or belong to the server.
_NOT_OF_REQUESTS = {
    "adapter", "any_base", "objective", "teacher", "kl", "temperature", "kd_ratio", "seed", "compute",
    "memory", "keep_prefix", "save_every", "save_minutes", "report_to", "resume", "overwrite", "sample",
    "distributed", "communication_dtype", "local_steps", "outer_lr", "outer_momentum", "strict",
}  # fmt: skip
OPTIONS = tuple(
    field.name for field in dataclasses.fields(FinetuneOptions) if field.name not in _NOT_OF_REQUESTS
)


@dataclass(frozen=True)
class JobRequest:
    """A checked request for a job.

    Attributes:
        model: the model to train: the base model, or an adapter to continue from.
        training_file, validation_file: the ids of files.
        suffix: a part of the name of the new adapter.
        seed: the random seed.
        metadata: the client's own texts.
        method: "supervised", "dpo", "orpo" or "kto".
        hyperparameters: those that the request gives, by OpenAI's names.
        options: options of `finetune`, without the learning rate that a multiplier gives.
    """

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    metadata: dict[str, str] | None
    method: str
    hyperparameters: Shape
    options: Shape

    @property
    def multiplier(self) -> float | None:
        """The factor of the default learning rate, if the request gives one."""
        given = self.hyperparameters.get("learning_rate_multiplier")
        return None if given is None else float(given)


def checked(request: Mapping[str, Any], base: str) -> JobRequest:
    """Check the body of a request.

    Args:
        base: the name of the base model. A job of another model continues an adapter.
    Raises:
        RequestError: a field is missing, unknown or wrong.
    """
    if not isinstance(request, Mapping):
        raise RequestError(f"the body is {brief(request)}, expected an object", code="invalid_type")
    require_text(list(request))
    for name, value in request.items():
        require_text(value, str(name))
    fields = {name: value for name, value in request.items() if value is not None}
    _refuse_unknown(fields)
    method, given = _method(fields)
    theirs = {name: value for name, value in given.items() if name in _HYPERPARAMETERS}
    ours = {name: value for name, value in (fields | given).items() if name in OPTIONS}
    options = ours | _translated(theirs, ours)
    seed = _integer(fields, "seed", 0)
    model = _text(fields, "model")
    start = {} if model == base else {"adapter": model}
    _check_options({**options, **start, "objective": OBJECTIVES[method], "seed": seed}, theirs)
    return JobRequest(
        model=model,
        training_file=_text(fields, "training_file"),
        validation_file=_text(fields, "validation_file") if "validation_file" in fields else None,
        suffix=_suffix(fields),
        seed=seed,
        metadata=_metadata(fields),
        method=method,
        hyperparameters=theirs,
        options=options,
    )


def require_text(value: object, param: str | None = None) -> None:
    """Raise a RequestError if a value is not JSON, or a text in it has half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=dict).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(
            f"the value is not JSON in UTF-8: {error}", param=param, code="invalid_value"
        ) from error


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    for name in fields:
        if name not in _OPENAI and name not in OPTIONS:
            near = nearest_names(str(name), [*_OPENAI, *OPTIONS], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _error(f"{brief(name)} is not a field of a job{hint}", str(name), "unknown_parameter")
    if fields.get("integrations"):
        raise _error("integrations are not supported", "integrations", "unsupported_parameter")


def _method(fields: Mapping[str, Any]) -> tuple[str, Shape]:
    """The method, and the hyperparameters of the request, which may be in `method` or beside it."""
    method = fields.get("method", {"type": "supervised"})
    kind = method.get("type") if isinstance(method, Mapping) else None
    if not isinstance(kind, str) or kind not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise _error(f"the type of the method is {brief(kind)}, expected one of {known}", "method")
    inner = method.get(kind) or {}
    if not isinstance(inner, Mapping):
        raise _error(f"method.{kind} is {brief(inner)}, expected an object", "method", "invalid_type")
    found = Shape()
    for given in (fields.get("hyperparameters"), inner.get("hyperparameters")):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            message = f"hyperparameters are {brief(given)}, expected an object"
            raise _error(message, "hyperparameters", "invalid_type")
        found |= {name: value for name, value in given.items() if value not in (None, "auto")}
    for name in found:
        if name not in _HYPERPARAMETERS and name not in OPTIONS:
            raise _error(f"{brief(name)} is not a hyperparameter", "hyperparameters", "unknown_parameter")
    return kind, found


def _translated(given: Mapping[str, Any], own: Mapping[str, Any]) -> Shape:
    """OpenAI's hyperparameters as our options, without the learning rate."""
    options = Shape()
    for name, ours in _HYPERPARAMETERS.items():
        if name not in given:
            continue
        value = given[name]
        if ours in own:
            raise _error(f"{name} and {ours} are both given, expected only one of them", "hyperparameters")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < 1e9 or (ours != "lr" and value != int(value)):
            what = "a number above 0" if ours == "lr" else "an integer above 0"
            raise _error(f"{name} is {brief(value)}, expected {what}, or 'auto'", "hyperparameters")
        if ours != "lr":
            options[ours] = int(value)
    if "epochs" not in options and "epochs" not in own and "steps" not in own:
        options["epochs"] = AUTO_EPOCHS
    return options


def _check_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    try:
        FinetuneOptions(**options, op="fine_tuning")
    except (ValueError, TypeError) as error:
        message = str(error).removeprefix("fine_tuning: ")
        words = re.split(r"[^A-Za-z0-9_]+", message)
        param = next((word for word in words if word in options), None)
        theirs = {ours: name for name, ours in _HYPERPARAMETERS.items() if name in given}
        raise _error(message, theirs.get(param or "", param)) from error


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise _error(f"{name} is missing", name, "missing_required_parameter")
    if not isinstance(value, str) or not value:
        raise _error(f"{name} is {brief(value)}, expected a text", name, "invalid_type")
    return value


def _integer(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise _error(f"{name} is {brief(value)}, expected an integer from 0 to 2147483647", name)
    return value


def _suffix(fields: Mapping[str, Any]) -> str | None:
    if "suffix" not in fields:
        return None
    value = fields["suffix"]
    if not isinstance(value, str) or not _SUFFIX.fullmatch(value) or ".." in value:
        wanted = "expected 1 to 64 letters, digits, hyphens, underscores and single dots"
        raise _error(f"suffix is {brief(value)}, {wanted}", "suffix")
    return value


def _metadata(fields: Mapping[str, Any]) -> dict[str, str] | None:
    """At most 16 texts of at most 512 characters, with names of at most 64, as in OpenAI's API."""
    value = fields.get("metadata")
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > 16:
        raise _error(f"metadata is {brief(value)}, expected an object of at most 16 texts", "metadata")
    for name, text in value.items():
        if not (isinstance(name, str) and len(name) <= 64 and isinstance(text, str) and len(text) <= 512):
            wanted = "expected names of at most 64 characters and texts of at most 512"
            raise _error(f"metadata has {brief(name)}: {brief(text)}, {wanted}", "metadata")
    return dict(value)


def _error(message: str, param: str | None, code: str = "invalid_value") -> RequestError:
    return RequestError(message, param=param, code=code)
