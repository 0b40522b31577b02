"""Adapters in PEFT's format: a directory with adapter_config.json and adapter_model.safetensors.

A fully trained layer (`trainable=True`) is stored under PEFT's `modules_to_save`, with all its arrays.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import letters
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import ANYTHING, Target, collecting
from nplora.adapters.trained_rows import EMBEDDING as ROWS_EMBEDDING
from nplora.adapters.trained_rows import HEAD as ROWS_HEAD
from nplora.adapters.trained_rows import TokenRows
from nplora.formats import files, peft_adapter
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import EMBEDDING, LINEAR, MAGNITUDE, PREFIX, TOKENS, PeftAdapter
from nplora.formats.peft_config import Patterns, PeftConfig, short_number
from nplora.formats.tokenizer_json import AddedToken
from nplora.lora.delta import LoraDelta
from nplora.nn.trained_rows import repeated
from nplora.runtime.user_warning import warn_user

Array = NDArray[Any]
T = TypeVar("T", bound=Hashable)

_MOST_NAMED = 3  # layers in a warning


# ---- reading ----


def read(
    directory: StrPath, target: Target = ANYTHING, edited_config: bool = False, any_base: bool = False
) -> AdapterContent:
    """Read an adapter directory and check that it fits `target`. Shapes are checked before values are read.

    Raises:
        FormatError: a file is malformed, or the adapter belongs to another model or does not fit `target`.
            The message lists up to ten mismatches.
        CorruptError: adapter_config.json was edited.
        OSError: a file cannot be read.
    """
    with peft_adapter.reading(directory) as opened:
        return _read(opened, target, edited_config, any_base)


def _read(opened: PeftAdapter, target: Target, edited_config: bool, any_base: bool) -> AdapterContent:
    config, problems = opened.config, list[str]()
    has_dora = config.use_dora or any(name.endswith(MAGNITUDE) for name in opened.tensors)
    tensors, tokens = opened.whole(), opened.tokens(problems)
    target.require_kind(opened.directory, config.task_type, has_dora, config.modules_to_save, tokens)
    if target.ties_head and _is_same(opened, tokens):
        del tokens[ROWS_HEAD]
    copied = _copied_rows(opened, tensors, tokens, target)
    added = opened.added_tokens(_ids_with_rows(opened, tensors, tokens, copied))
    deltas, whole = dict[str, LoraDelta](), dict[str, dict[str, Array]]()
    factors = opened.factors(problems, tensors)
    for name, halves in factors.items():
        with collecting(problems):
            deltas[name] = _delta(opened, name, halves, target)
    for layer, parameters in tensors.items():
        for parameter, tensor in parameters.items():
            with collecting(problems):
                shape = opened.tensors.entries[tensor].shape
                dtype = target.check_whole(layer, parameter, shape, tensor, added)
                whole.setdefault(layer, {})[parameter] = opened.array(tensor, dtype)
    if not added:
        copied = {}
    rows = dict[str, TokenRows]()
    for layer in {**tokens, **copied}:
        with collecting(problems):
            rows[layer] = _token_rows(opened, layer, tokens.get(layer), copied.get(layer), target, added)
    found = {*factors, *tensors, *rows, *tokens}
    missing = [name for name in target.required if name not in found]
    problems += [f"{brief(name)}: the adapter has no such layer" for name in missing]
    adapter = AdapterContent(
        opened.directory,
        deltas,
        config.base_model_name_or_path,
        config.task_type,
        opened.base_digest,
        whole,
        rows,
        _is_tied(opened, whole, problems),
        config.lora_dropout,
        config.unknown,
        invocation_tokens=config.alora_invocation_tokens,
        uses_expression=isinstance(config.target_modules, str),
        chat_template=opened.chat_template,
        added_tokens=added,
        labels=opened.labels(),
    )
    target.require(adapter, problems, any_base)
    if not edited_config:
        opened.require_pair()
    _warn_of_copies(opened)
    if not whole:
        adapter.modules_to_save = {name: {} for name in config.modules_to_save}  # names for messages
    return adapter


def _warn_of_copies(opened: PeftAdapter) -> None:
    """Warn that copies of frozen weights are ignored. The copies may differ from the model's weights."""
    if layers := opened.base_copies():
        shown = [*map(brief, layers[:_MOST_NAMED]), *(["…"] if len(layers) > _MOST_NAMED else [])]
        warn_user(
            f"{opened.directory}: the adapter has copies of the base model's weights for "
            f"{counted(len(layers), 'layer')} ({', '.join(shown)}); they are ignored, because nplora uses "
            "the base model's own weights"
        )


def _delta(opened: PeftAdapter, name: str, halves: tuple[str, str], target: Target) -> LoraDelta:
    config, entries = opened.config, opened.tensors.entries
    opened.require_rank(name, halves)
    embedding = halves[0].endswith(EMBEDDING[0])
    if embedding and config.use_dora:  # PEFT rescales columns here, not rows
        raise UnsupportedError(f"{brief(name)}: DoRA on an embedding is not supported")
    shape_a, shape_b = (entries[half].shape for half in halves)
    kernel = peft_adapter.kernel(shape_a)
    if kernel is not None:
        shape_a, shape_b = (shape_a[0], math.prod(kernel)), shape_b[:2]
    shape = letters.weight_shape(shape_a, shape_b, embedding)
    dtype = target.place_of(name, shape, embedding, config.use_dora, kernel).dtype
    m, magnitude = None, PREFIX + name + MAGNITUDE
    if config.use_dora:
        if magnitude not in entries:
            raise FormatError(f"DoRA needs the tensor {brief(magnitude, 200)}, which is missing")
        found, wanted = entries[magnitude].shape, _magnitudes_shape(shape[0], kernel)
        if found != wanted:
            raise FormatError(f"{brief(name)}: magnitudes of shape {found}, expected {wanted}")
        m = opened.array(magnitude, dtype).reshape(shape[:1])
    lora_a, lora_b = (
        opened.array(halves[0], dtype).reshape(shape_a),
        opened.array(halves[1], dtype).reshape(shape_b),
    )
    a, b = letters.from_peft(lora_a, lora_b, embedding)
    return LoraDelta.of_alpha(a, b, config.alpha(name), config.use_rslora, m, embedding, kernel)


def _magnitudes_shape(d_out: int, kernel: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape in which PEFT stores the magnitudes of DoRA."""
    return (d_out,) if kernel is None else (1, d_out, 1, 1)


def _is_same(opened: PeftAdapter, tokens: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether the embedding and the head have the same trained tokens, and equal rows for these tokens.

    If the embedding and the head were resized before training, PEFT stores the trained rows of both, even if
    they share one weight.
    """
    found = [tokens.get(layer) for layer in (ROWS_EMBEDDING, ROWS_HEAD)]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return False
    return np.array_equal(opened.array(found[0][0]), opened.array(found[1][0]))


def _copied_rows(
    opened: PeftAdapter, whole: Collection[str], tokens: Collection[str], target: Target
) -> dict[str, tuple[str, Array]]:
    """Find the rows that are in PEFT's copies of the embedding and the head, but not in the target.

    PEFT copies both weights into the adapter if training changed their number of rows, for example to a
    multiple of 64.

    Returns:
        a dict from a layer to a pair: the tensor with the copy, and the ids of the rows that the target
        lacks.
    """
    found = dict[str, tuple[str, Array]]()
    for layer in (ROWS_EMBEDDING, ROWS_HEAD):
        shape, copy = target.rows(layer), opened.copy_of(layer)
        is_shared = target.ties_head and layer == ROWS_HEAD and layer not in tokens
        if is_shared or layer in whole or copy is None or not isinstance(shape, tuple):
            continue
        stored = opened.tensors.entries[copy].shape
        if stored[1:] == shape[1:] and stored > shape:
            found[layer] = copy, np.arange(shape[0], stored[0])
    return found


def _ids_with_rows(
    opened: PeftAdapter,
    whole: Mapping[str, Mapping[str, str]],
    tokens: Mapping[str, tuple[str, Sequence[int]]],
    copied: Mapping[str, tuple[str, Array]],
) -> Collection[int]:
    """The ids of the tokens that have a row in the adapter.

    A row that PEFT only copied is ignored if the target has this row.

    Args:
        whole: the tensor names of fully trained layers, by layer and parameter.
        tokens: the tensor name and the token ids of each layer with trained tokens.
        copied: the result of `_copied_rows`.
    """
    shapes = [
        opened.tensors.entries[parameters["weight"]].shape
        for layer, parameters in whole.items()
        if layer in (ROWS_EMBEDDING, ROWS_HEAD) and "weight" in parameters
    ]
    if shapes:
        return range(max((shape[0] for shape in shapes if shape), default=0))
    found = {id_ for _, ids in tokens.values() for id_ in ids}
    if found and ROWS_EMBEDDING in copied:
        found.update(copied[ROWS_EMBEDDING][1].tolist())
    return found


def _token_rows(
    opened: PeftAdapter,
    layer: str,
    trained: tuple[str, tuple[int, ...]] | None,
    copied: tuple[str, Array] | None,
    target: Target,
    tokens: Sequence[AddedToken],
) -> TokenRows:
    """Read the trained rows of a layer, and the untrained rows of PEFT's copy that the target lacks."""
    tensor, ids = trained or ("", ())
    own = np.array(ids, np.int64)
    if (twice := repeated(own)) is not None:
        raise FormatError(f"{brief(layer)}: token {twice} occurs twice in the trained tokens")
    copy, beyond = copied or ("", own[:0])
    others = np.setdiff1d(beyond, own)
    width = opened.tensors.entries[tensor or copy].shape[1]
    target.check_rows(layer, [*ids, *others.tolist()], width, tokens)
    parts = [opened.array(tensor)] if trained else []
    if others.size:
        parts.append(opened.array(copy)[others])
    return TokenRows(np.concatenate([own, others]), np.concatenate(parts))


def _is_tied(opened: PeftAdapter, whole: Mapping[str, Mapping[str, Array]], problems: list[str]) -> bool:
    """Whether the embedding and the head in `modules_to_save` share one weight."""
    both = [whole.get(name, {}).get("weight") for name in (ROWS_EMBEDDING, ROWS_HEAD)]
    if not opened.config.ensure_weight_tying or both[0] is None or both[1] is None:
        return False
    if not np.array_equal(both[0], both[1]):
        problems.append(f"{ROWS_EMBEDDING} and {ROWS_HEAD} differ, but ensure_weight_tying is set")
    return True


# ---- writing ----


def save(adapter: AdapterContent, directory: StrPath | files.Directory) -> None:
    """Write an adapter directory. Raises the errors of `save_adapter`."""
    if not adapter:
        raise ValueError(f"save_adapter: {adapter.source} has no layers")
    tensors = dict[str, Array]()
    for name, delta in adapter.items():
        _require_finite(name, {"A": delta.A, "B": delta.B} | ({} if delta.m is None else {"m": delta.m}))
        halves = letters.to_peft(delta.A, delta.B, delta.embedding)
        suffixes = EMBEDDING if delta.embedding else LINEAR
        if delta.kernel is not None:
            halves = halves[0].reshape(-1, *delta.kernel), halves[1].reshape(*halves[1].shape, 1, 1)
        tensors |= {PREFIX + name + suffix: half for suffix, half in zip(suffixes, halves, strict=True)}
        if delta.m is not None:
            tensors[PREFIX + name + MAGNITUDE] = delta.m.reshape(
                _magnitudes_shape(len(delta.m), delta.kernel)
            )
    for layer, parameters in adapter.modules_to_save.items():
        _require_finite(layer, parameters)
        tensors |= {f"{PREFIX}{layer}.{parameter}": array for parameter, array in parameters.items()}
    for layer, rows in adapter.token_rows.items():
        _require_finite(layer, {"rows": rows.values})
        tensors[PREFIX + layer + TOKENS] = rows.values
    peft_adapter.save(
        directory, config_of(adapter), tensors, adapter.base_digest, adapter.chat_template,
        adapter.added_tokens, adapter.tokenizer_files, adapter.labels,
    )  # fmt: skip


def _require_finite(layer: str, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"save_adapter: {layer}.{name} holds NaN or an infinity")


def config_of(adapter: AdapterContent) -> PeftConfig:
    """Build PEFT's configuration of an adapter.

    Raises:
        ValueError: PEFT's format cannot express the adapter.
    """
    whole = tuple(name for name, ids in adapter.trained_rows.items() if ids is None)
    for name in () if adapter.saved_names else adapter.modules_to_save:
        _require_unmistakable(name, [*adapter, *(other for other in adapter.neighbours if other != name)])
    ranks = {name: delta.rank for name, delta in adapter.items()}
    alphas = {name: short_number(delta.stated_alpha) for name, delta in adapter.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(adapter),
        modules_to_save=adapter.saved_names or whole,
        trainable_token_indices=_tokens(adapter),
        ensure_weight_tying=adapter.is_tied,
        alora_invocation_tokens=adapter.invocation_tokens,
        use_rslora=_common("use_rslora", adapter),
        use_dora=_common("use_dora", adapter),
        rank_pattern=Patterns.exact({name: value for name, value in ranks.items() if value != rank}),
        alpha_pattern=Patterns.exact({name: value for name, value in alphas.items() if value != alpha}),
        lora_dropout=adapter.dropout,
        base_model_name_or_path=adapter.base_model_name_or_path,
        task_type=adapter.task_type,
    )


def _tokens(adapter: AdapterContent) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """The ids of the trained tokens: a tuple if only the embedding has trained rows, else a dict by layer."""
    tokens = {layer: tuple(rows.ids.tolist()) for layer, rows in adapter.token_rows.items()}
    if not tokens:
        return None
    return tokens[ROWS_EMBEDDING] if tokens.keys() == {ROWS_EMBEDDING} else tokens


def _targets(adapter: AdapterContent) -> tuple[str, ...] | str:
    """The layer names as a list, or as one regular expression if the list would also match other layers.

    PEFT compares a listed name with the end of each module's name, so "0" also matches "1.0".
    """
    if adapter.uses_expression or any(
        other.endswith(f".{name}") for name in adapter for other in adapter.neighbours
    ):
        return "|".join(map(re.escape, adapter))
    return tuple(adapter)


def _require_unmistakable(name: str, others: Iterable[str]) -> None:
    """Raise ValueError if a name in `modules_to_save` would also make PEFT save another module.

    PEFT saves every module whose name ends in `name`, and every module inside a module that is called `name`.
    """
    for other in others:
        if other.endswith(name) or f".{name}." in f".{other}.":
            raise ValueError(
                f"save_adapter: in PEFT's modules_to_save, the name of the trained layer {name!r} would also "
                f"match {other!r}; rename one of the two layers"
            )


def _common(setting: str, adapter: AdapterContent) -> bool:
    """The value of a setting that PEFT stores once for all layers.

    Raises:
        ValueError: the layers differ in this setting.
    """
    values = {name: bool(getattr(delta, setting)) for name, delta in adapter.items()}
    if len(set(values.values())) > 1:
        one, other = (
            next(name for name, value in values.items() if value == is_set) for is_set in (True, False)
        )
        raise ValueError(
            f"save_adapter: PEFT's format has one {setting} for all layers, but in {adapter.source}, layer "
            f"{one!r} has {setting}=True, and layer {other!r} has {setting}=False"
        )
    return next(iter(values.values()))


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
