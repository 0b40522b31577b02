"""JobRequest: checks a request for a fine-tuning job, and converts its fields to options of `finetune`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nplora.finetuning import FinetuneOptions
from nplora.formats.errors import brief
from nplora.serving.fields import Fields, checked_text, wrong
from nplora.serving.jobs.shapes import Shape
from nplora.serving.request_error import RequestError

OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "orpo": "orpo", "kto": "kto"}
AUTO_EPOCHS = 3
_MOST_OPTIONS = 64 << 10  # the most bytes of a job's options as JSON: each list of jobs contains them
_MOST_SEED = 2**31 - 1
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPENAI = (
    "model", "training_file", "validation_file", "suffix", "seed", "metadata", "method", "hyperparameters",
    "integrations", "user",
)  # fmt: skip
_HYPERPARAMETERS = {"n_epochs": "epochs", "batch_size": "batch_examples", "learning_rate_multiplier": "lr"}
# Options of `finetune` that a request may not set, because they name files or are for the server to decide.
_NOT_OF_REQUESTS = {
    "adapter", "any_base", "objective", "teacher", "kl", "temperature", "kd_ratio", "seed", "compute",
    "memory", "keep_prefix", "save_every", "save_minutes", "report_to", "resume", "overwrite", "sample",
    "distributed", "communication_dtype", "local_steps", "outer_lr", "outer_momentum", "strict",
    "change_compute", "keep_int8",
}  # fmt: skip
OPTIONS = tuple(
    field.name for field in dataclasses.fields(FinetuneOptions) if field.name not in _NOT_OF_REQUESTS
)


@dataclass(frozen=True)
class JobRequest:
    """A checked request for a job.

    Attributes:
        model: the model to train: the base model, or an adapter whose training continues.
        training_file, validation_file: the ids of files.
        suffix: a text that the name of the new adapter contains.
        seed: the random seed.
        metadata: a dict from names to texts, which the client stores with the job; or None.
        method: "supervised", "dpo", "orpo" or "kto".
        hyperparameters: a dict from OpenAI's names of hyperparameters to the values in the request.
        options: a dict of options of `finetune`. The option `lr` is missing if the request contains a
            learning-rate multiplier (see `multiplier`).
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
        """The factor for the default learning rate; None if the request does not set this factor."""
        given = self.hyperparameters.get("learning_rate_multiplier")
        return None if given is None else float(given)


def checked(request: Mapping[str, Any], base: str) -> JobRequest:
    """Check the body of a request.

    Args:
        base: the name of the base model. A request with another name asks to continue the adapter of that
            name.
    Raises:
        RequestError: a field is missing, unknown or wrong.
    """
    body = Fields(request)
    require_text(list(request))
    for name, value in request.items():
        require_text(value, str(name))
    for name in _HYPERPARAMETERS:
        if name in request:
            raise RequestError(
                f"unrecognized field {name!r}: put it into the object hyperparameters",
                param=name,
                code="unknown_parameter",
            )
    body.require_known({*_OPENAI, *OPTIONS}, {"integrations": ([],)})
    method, given = _method(body)
    fields = {name: value for name, value in body.values.items() if value is not None}
    theirs = {name: value for name, value in given.items() if name in _HYPERPARAMETERS}
    ours = {name: value for name, value in (fields | given).items() if name in OPTIONS}
    options = ours | _translated(theirs, ours)
    _check_size(options)
    seed = body.integer("seed", 0, _MOST_SEED) or 0
    model = checked_text("model", body.required("model"), empty=False)
    start = {} if model == base else {"adapter": model}
    _check_options({**options, **start, "objective": OBJECTIVES[method], "seed": seed}, theirs)
    return JobRequest(
        model=model,
        training_file=checked_text("training_file", body.required("training_file"), empty=False),
        validation_file=body.text("validation_file", empty=False),
        suffix=_suffix(body),
        seed=seed,
        metadata=_metadata(body),
        method=method,
        hyperparameters=theirs,
        options=options,
    )


def require_text(value: object, param: str | None = None) -> None:
    """Raise a RequestError if a value is not JSON, or if a text in it contains half of a surrogate pair."""
    try:
        _encoded(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(
            f"the value is not JSON in UTF-8: {error}", param=param, code="invalid_value"
        ) from error


def _encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=dict).encode()


def _check_size(options: Mapping[str, Any]) -> None:
    sizes = {name: len(_encoded(value)) for name, value in options.items()}
    if sum(sizes.values()) > _MOST_OPTIONS:
        longest = max(sizes, key=sizes.__getitem__)
        message = (
            f"the options of the job have {sum(sizes.values()):,} bytes as JSON, expected at most "
            f"{_MOST_OPTIONS:,}: {longest} is too long"
        )
        raise _error(message, longest)


def _method(body: Fields) -> tuple[str, Shape]:
    """Return a pair: the method, and a dict of the hyperparameters in the request.

    The request may contain the hyperparameters in the field `hyperparameters`, or in the field `method`.
    """
    kind, inner = "supervised", Fields({})
    if (method := body.object("method")) is not None:
        method.required("type")
        kind = method.choice("type", OBJECTIVES) or kind
        method.require_known({"type", kind}, {})
        inner = method.object(kind) or inner
        inner.require_known({"hyperparameters"}, {})
    found = Shape()
    for given in (body.object("hyperparameters"), inner.object("hyperparameters")):
        if given is not None:
            given.require_known({*_HYPERPARAMETERS, *OPTIONS}, {})
            found |= {name: value for name, value in given.values.items() if value not in (None, "auto")}
    return kind, found


def _translated(given: Mapping[str, Any], own: Mapping[str, Any]) -> Shape:
    """Translate OpenAI's hyperparameters, except for the learning rate, into options of `finetune`."""
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


def _suffix(body: Fields) -> str | None:
    value = body.get("suffix")
    if value is None:
        return None
    if not isinstance(value, str) or not _SUFFIX.fullmatch(value) or ".." in value:
        raise wrong("suffix", value, "1 to 64 letters, digits, hyphens, underscores and single dots")
    return value


def _metadata(body: Fields) -> dict[str, str] | None:
    """Check metadata: at most 16 names of at most 64 characters, with texts of at most 512 characters."""
    metadata = body.object("metadata")
    if metadata is None:
        return None
    if len(metadata.values) > 16:
        raise wrong("metadata", metadata.values, "an object of at most 16 texts")
    for name, text in metadata.values.items():
        if len(name) > 64:
            raise wrong("a name in metadata", name, "at most 64 characters", "metadata")
        if not isinstance(text, str) or len(text) > 512:
            raise wrong(metadata.name(name), text, "a text of at most 512 characters", "metadata")
    return dict(metadata.values)


def _error(message: str, param: str | None, code: str = "invalid_value") -> RequestError:
    return RequestError(message, param=param, code=code)
