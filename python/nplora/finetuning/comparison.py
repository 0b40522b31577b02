"""Compare a model with and without adapters on the same examples."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nplora import _check
from nplora.adapters import Adapter
from nplora.finetuning.attach import Adapters, warn_of_form, with_adapters
from nplora.finetuning.data import Data
from nplora.finetuning.evaluation import TEXT_AND_REMEDY, read_all
from nplora.finetuning.judging.judge import Record
from nplora.finetuning.judging.metrics import MetricFunction
from nplora.finetuning.judging.results import (
    BASE,
    Difference,
    Evaluation,
    difference_of,
    evaluation_of,
    shown,
)
from nplora.finetuning.judging.statistics import Measured, adjusted, paired_p
from nplora.finetuning.judging.tables import markdown_table, text_table
from nplora.finetuning.load import require_plain
from nplora.finetuning.options import EvaluateOptions, from_arguments
from nplora.finetuning.token_progress import speaker
from nplora.formats.errors import brief
from nplora.formats.files import StrPath
from nplora.formats.strict_json import json_values
from nplora.formats.tokenizer_json import AddedToken
from nplora.lm import LanguageModel

# Metrics for which `sentences` has no sentence. The loss says nearly the same as token_accuracy. A larger
# margin is not always better.
_LEFT_OUT = ("token_accuracy", "reward_margin")


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`; `print` shows a table, and a sentence for each difference.

    Attributes:
        evaluations: a dict from the name of each system to its results. A system is the model, alone or with
            an adapter. The first system is "base", the model alone.
        differences: for each metric, a `Difference` between each adapter and the base. If there are several
            adapters, there is also a `Difference` between the adapter with the lowest loss and each other
            adapter.

    >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", ["adapter"])
    >>> list(comparison.evaluations)
    ['base', 'adapter']
    >>> print(comparison)
             loss ...
    base     ...
    adapter  ...
    <BLANKLINE>
    4 examples are too few to tell 'adapter' from the base: loss ... (95 % interval ... to ..., p = ...)
    """

    evaluations: dict[str, Evaluation]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        return f"{text_table(self.evaluations)}\n\n" + "\n".join(self.sentences())

    def markdown(self) -> str:
        """The table and the sentences in Markdown.

        >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", ["adapter"])
        >>> print(comparison.markdown())
        |  | loss ...
        | --- ...
        | base | ...
        | adapter | ...
        <BLANKLINE>
        - 4 examples are too few ...
        """
        return f"{markdown_table(self.evaluations)}\n\n" + "\n".join(f"- {s}" for s in self.sentences())

    def sentences(self) -> list[str]:
        """A sentence for each difference, except for the three metrics below.

        There is no sentence for `token_accuracy`, because the loss measures nearly the same. There is none
        for `reward_margin`, because a larger margin is not always better. For multiple-choice rows, there is
        none for `acc_token`, because `acc_norm` measures nearly the same.

        >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", ["adapter"])
        >>> comparison.sentences()[0]
        "4 examples are too few ..."
        """
        has_norm = any(one.metric == "acc_norm" for one in self.differences)
        left_out = (*_LEFT_OUT, "acc_token") if has_norm else _LEFT_OUT
        return [str(one) for one in self.differences if one.metric not in left_out]

    def as_json(self) -> dict[str, Any]:
        """The results as JSON values. Numbers that are not finite become None.

        >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", ["adapter"])
        >>> list(comparison.as_json())
        ['evaluations', 'differences', 'summary']
        """
        differences = [{**vars(one), "values": list(one.values)} for one in self.differences]
        found: dict[str, Any] = json_values({
            "evaluations": self.evaluations, "differences": differences, "summary": self.sentences()
        })  # fmt: skip
        return found


@_check.keywords
def compare(
    model: StrPath | LanguageModel,
    data: Data,
    adapters: Sequence[Adapters] | Mapping[str, Adapters],
    *,
    any_base: bool = False,
    progress: bool | None = None,
    record: Record | None = None,
    metric: str | MetricFunction | Sequence[str | MetricFunction] = (),
    max_new_tokens: int = 128,
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
    compute: str | None = None,
) -> Comparison:
    """Evaluate a model alone and with each of several adapters, on the same examples.

    Each difference has a 95 % confidence interval and a p-value, which are computed from the results for each
    example. The model is loaded once.

    Args:
        adapters: a list of adapters, each in a form that `evaluate` accepts; or a dictionary from names to
            such adapters.
        model, data, any_base, progress, and all options: see `evaluate`.
        record: as in `evaluate`. Each dictionary that is passed to `record` has one more entry, "system": the
            name of the system.
    Raises:
        ValueError: there are no adapters, or two adapters have the same name.
        Other errors: see `evaluate`.

    >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", {"mine": "adapter"})
    >>> difference = comparison.differences[0]
    >>> difference.metric, round(difference.values[0] - difference.values[1] - difference.difference, 6)
    ('loss', 0.0)
    """
    chosen = from_arguments("compare", EvaluateOptions, locals())
    named = _named(adapters)
    say, measured = speaker(progress), dict[str, list[Measured]]()
    made = dict[str, LanguageModel]()

    def prepare(lm: LanguageModel) -> LanguageModel:
        """Attach all adapters.

        Return the model without adapters, but with the tokens that the adapters add to the vocabulary.
        """
        require_plain("compare", lm)
        made.update((name, with_adapters("compare", lm, one, any_base)) for name, one in named.items())
        return lm.with_tokens(_same_tokens(made))

    lm, judge = read_all("compare", model, data, chosen, prepare)
    judge.refer_to(lm)
    for adapter in named.values():
        warn_of_form("compare", adapter, judge.report.chat, *TEXT_AND_REMEDY)
    say(str(judge.report))
    for name, system in {BASE: lm, **made}.items():
        measured[name] = judge.measure(system, _recorder(name, record))
        say(f"{name}: loss {shown('loss', measured[name][0].value)}")
    evaluations = {name: evaluation_of(judge.report, found) for name, found in measured.items()}
    return Comparison(evaluations, tuple(_differences(measured)))


def _same_tokens(systems: Mapping[str, LanguageModel]) -> tuple[AddedToken, ...]:
    """The tokens that the adapters add, which must be the same for all adapters.

    Raises:
        ValueError: the adapters add different tokens, so the models would divide the same text into different
            tokens.
    """
    first, *others = ((name, lm.added_tokens) for name, lm in systems.items())
    for name, tokens in others:
        if set(tokens) != set(first[1]):
            texts = [[token.text for token in found] for found in (first[1], tokens)]
            raise ValueError(
                f"compare: {first[0]} adds the tokens {texts[0]}, but {name} adds {texts[1]}; their losses "
                "cannot be compared"
            )
    return first[1]


def _recorder(name: str, record: Record | None) -> Record:
    if record is None:
        return lambda entry: None
    return lambda entry: record({"system": name, **entry})


def _differences(measured: dict[str, list[Measured]]) -> list[Difference]:
    """Compare each adapter with the base, and the best adapter (lowest loss) with each other adapter."""
    names = [name for name in measured if name != BASE]
    pairs = [(name, BASE) for name in names]
    losses = {name: measured[name][0].value for name in names}
    best = min(names, key=lambda name: (math.isnan(losses[name]), losses[name]))
    pairs += [(best, name) for name in names if name != best]
    p_values = [
        _p_values(dict(zip(measured, of_metric, strict=True)))
        for of_metric in zip(*measured.values(), strict=True)
    ]
    return [
        difference_of(one, metric, other, other_metric, p[frozenset((one, other))], len(p))
        for one, other in pairs
        for metric, other_metric, p in zip(measured[one], measured[other], p_values, strict=True)
    ]


def _p_values(systems: dict[str, Measured]) -> dict[frozenset[str], float | None]:
    """The adjusted p-value of each pair of systems.

    `compare` does not show all pairs. The adjustment counts them all nevertheless, because the choice of the
    best adapter depends on all adapters.
    """
    pairs = list(itertools.combinations(systems, 2))
    found = paired_p([(systems[one], systems[other]) for one, other in pairs])
    return dict(zip(map(frozenset, pairs), adjusted(found), strict=True))


def _named(adapters: object) -> dict[str, Adapters]:
    """Return a dict from names to adapters. If `adapters` is a list, `name_of` chooses the names."""
    if isinstance(adapters, Mapping):
        found = {str(name): adapter for name, adapter in adapters.items()}
    elif isinstance(adapters, Sequence) and not isinstance(adapters, str | tuple):
        names = list(map(name_of, adapters))
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"compare: adapter {twice[0]} is given twice, expected each adapter once")
        found = dict(zip(names, adapters, strict=True))
    else:
        raise TypeError(f"compare: adapters is {brief(adapters)}, expected a list or a dictionary")
    if not found:
        raise ValueError("compare: adapters is empty, expected at least one adapter")
    if BASE in found:
        raise ValueError(
            f"compare: an adapter has the name {BASE!r}, which is reserved for the model without an adapter"
        )
    return found


def name_of(adapter: Any) -> str:
    """The name of an adapter: its path, and its weight if the weight is not 1.

    If `adapter` is a sum of adapters, the names of these adapters are joined by " + ".
    """
    if isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[1], int | float):
        return name_of(adapter[0]) if adapter[1] == 1 else f"{name_of(adapter[0])}:{adapter[1]:g}"
    if isinstance(adapter, list | tuple):
        return " + ".join(map(name_of, adapter))
    if isinstance(adapter, Adapter):
        return adapter.source
    if isinstance(adapter, str | os.PathLike):
        return os.path.normpath(adapter)
    raise TypeError(
        f"compare: an adapter is {brief(adapter)}, expected a path, an Adapter, a pair (one of these, "
        "weight), or a list of these"
    )
