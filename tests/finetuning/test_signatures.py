"""The signatures and docstrings of finetune, plan and evaluate agree with the fields of their options."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nplora.finetuning import (
    ClassifyOptions,
    EvaluateOptions,
    FinetuneOptions,
    TeachOptions,
    compare,
    evaluate,
    finetune,
    plan,
    teach,
    train_classifier,
)
from nplora.finetuning.judging.metrics import MetricFunction

# The arguments of each function that are not options.
OWN = {
    finetune: ["model", "data", "output", "valid", "progress", "callbacks"],
    plan: ["model", "data", "valid"],
    evaluate: ["model", "data", "adapter", "any_base", "progress", "record"],
    compare: ["model", "data", "adapters", "any_base", "progress", "record"],
    teach: ["model", "data", "output", "valid", "adapter", "any_base", "progress"],
    train_classifier: ["model", "data", "output", "valid", "progress", "callbacks", "communicator"],
}
DESCRIBED = [
    (finetune, FinetuneOptions),
    (evaluate, EvaluateOptions),
    (teach, TeachOptions),
    (train_classifier, ClassifyOptions),
]
FUNCTIONS = [*DESCRIBED, (plan, FinetuneOptions), (compare, EvaluateOptions)]
# A function takes more kinds of values than the checked options hold.
TAKEN = {
    "targets": str | Sequence[str],
    "report_to": str | Sequence[str],
    "sample": Sequence[str],
    "metric": str | MetricFunction | Sequence[str | MetricFunction],
}


@pytest.mark.parametrize(("function", "options"), FUNCTIONS)
def test_a_function_has_every_option_as_a_keyword_with_its_type_and_default(
    function: Callable[..., Any], options: Any
) -> None:
    found = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in OWN[function]
    }
    fields = {name: field for name, field in inspect.signature(options).parameters.items() if name != "op"}
    assert list(found) == list(fields)
    kinds = typing.get_type_hints(options)
    for name, parameter in found.items():
        kind = kinds[name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, name
        assert parameter.default == fields[name].default, name
        assert parameter.annotation == TAKEN.get(name, getattr(kind, "type", kind)), name


@pytest.mark.parametrize(("function", "options"), DESCRIBED)
def test_a_docstring_describes_the_options_as_the_help_does(
    function: Callable[..., Any], options: Any
) -> None:
    text = " ".join((inspect.getdoc(function) or "").split())
    places = [text.find(f" {f.name}: {f.metadata['help']}. ") for f in dataclasses.fields(options)]
    assert -1 not in places, [f.name for f, place in zip(dataclasses.fields(options), places, strict=True)]
    assert places == sorted(places)


@pytest.mark.parametrize("options", [FinetuneOptions, EvaluateOptions, TeachOptions, ClassifyOptions])
def test_the_help_of_an_option_names_its_choices_and_other_options_that_exist(options: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(options)}
    for field in fields.values():
        words = set(re.findall(r"\w+", field.metadata["help"]))
        assert words >= set(field.metadata.get("choices") or ()), field.name
        assert set(re.findall(r"`(\w+)`", field.metadata["help"])) <= fields.keys(), field.name


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [
        ("learning_rate", "lr"), ("r", "rank"), ("lora_alpha", "alpha"), ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "batch_examples"), ("batch_size", "batch_examples"),
        ("max_seq_length", "max_length"), ("warmup_ratio", "warmup, a number of steps"),
        ("target_modules", "targets"), ("gradient_accumulation_steps", "accumulate"),
        ("gradient_checkpointing", "recompute"), ("output_dir", "output"), ("train_file", "data"),
        ("warmupp", "warmup"),
    ],
)  # fmt: skip
def test_a_keyword_of_another_library_is_refused_with_ours(keyword: str, ours: str) -> None:
    with pytest.raises(TypeError) as caught:
        finetune("m", "d", "o", **{keyword: 1})  # type: ignore[arg-type]
    assert str(caught.value) == f"finetune: unexpected keyword {keyword!r}; did you mean {ours}?"


def test_the_errors_of_plan_begin_with_its_name() -> None:
    for options in ({"rank": 0}, {"epochs": 1, "steps": 1}, {"memory": "600"}, {"layers": "middle"}):
        with pytest.raises(ValueError, match=r"^plan: "):
            plan("m", "d", **options)  # type: ignore[arg-type]
