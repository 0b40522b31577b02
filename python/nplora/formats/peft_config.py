"""`adapter_config.json` of a PEFT LoRA adapter: converts bytes to a validated, immutable record and back.

nplora never runs, imports or opens anything that the file names. PEFT's keys that do not change the output of
a trained adapter are ignored. `loads` refuses a file in which a key switches on a computation that nplora
does not support. Unknown keys are dropped and listed in `unknown`.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from nplora._check import MAX_RANK
from nplora.formats import strict_json
from nplora.formats.errors import FormatError, LimitError, UnsafeError, UnsupportedError, brief
from nplora.formats.name_pattern import Name, NamePattern

MAX_BYTES = 16 << 20
MAX_PATTERN_TEXT = 1 << 14  # each layer's name is compared with all of this text
MAX_EXACT_TEXT = 1 << 18  # characters of all patterns; a pattern with only one possible match is cheap

# PEFT writes these keys. The keys say how the factors were initialised or trained, not what the adapter
# computes.
_PASSED_OVER = frozenset(
    [
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    ]
)
# These keys, if switched on, change what the adapter computes.
_MUST_BE_OFF = frozenset(
    [
        "arrow_config",
        "corda_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    ]
)
# Initialisations that leave the base model's weights unchanged. All other initialisations ("pissa", "olora",
# "loftq", ...) change these weights.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_CHECKED = frozenset(
    ["peft_type", "auto_mapping", "megatron_core", "trust_remote_code", "bias", "init_lora_weights"]
)
_MEGATRON = "megatron.core"
_REPEATED_GROUP = re.compile(r"\)[*+{]")

Number: TypeAlias = int | float
Tokens: TypeAlias = tuple[int, ...] | Mapping[str, tuple[int, ...]]  # ids for the embedding, or layer -> ids


@dataclass(frozen=True)
class Patterns:
    """Ranks or alphas for individual modules. The first pattern that matches a module applies."""

    pairs: tuple[tuple[NamePattern, Number], ...] = ()

    @cached_property
    def _exact(self) -> dict[str, int]:
        """A dict: name -> position in `pairs` of the first pattern that matches only this name."""
        names = [(pattern.only_name, position) for position, (pattern, _) in enumerate(self.pairs)]
        return {name: position for name, position in reversed(names) if name is not None}

    @cached_property
    def inexact(self) -> tuple[tuple[int, NamePattern], ...]:
        """The patterns that can match several names, each with its position in `pairs`."""
        return tuple(
            (position, pattern)
            for position, (pattern, _) in enumerate(self.pairs)
            if pattern.only_name is None
        )

    def value(self, name: str, default: Number) -> Number:
        """The rank or alpha of the module `name`, or `default` if no pattern matches.

        This method is slow, because it may try every pattern in `inexact`.
        """
        places, exact = Name(name), self._exact.get(name, len(self.pairs))
        position = next((at for at, pattern in self.inexact if at < exact and pattern.matches(places)), exact)
        return self.pairs[position][1] if position < len(self.pairs) else default

    @staticmethod
    def exact(values: dict[str, Number]) -> "Patterns":
        """Make patterns that match only the given names. (A plain pattern "0" would also match "1.0".)"""
        return Patterns(
            tuple((NamePattern("^" + re.escape(name), name), value) for name, value in values.items())
        )


@dataclass(frozen=True)
class PeftConfig:
    """The settings that nplora uses from an `adapter_config.json`. `unknown` lists the dropped keys."""

    r: int = 8
    lora_alpha: Number = 8
    target_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Tokens | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: tuple[int, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Patterns = field(default_factory=Patterns)
    alpha_pattern: Patterns = field(default_factory=Patterns)
    lora_dropout: float = 0.0
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    unknown: tuple[str, ...] = ()

    def rank(self, name: str) -> int:
        return int(self.rank_pattern.value(name, self.r))

    def alpha(self, name: str) -> Number:
        return self.alpha_pattern.value(name, self.lora_alpha)

    def scale(self, name: str) -> float:
        """The factor that multiplies the product of a layer's A and B."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)


def short_number(value: float) -> Number:
    """Return a whole number as an integer (16 for 16.0), and any other number as a float."""
    return int(value) if float(value).is_integer() else float(value)


def dumps(config: PeftConfig) -> bytes:
    """Format an `adapter_config.json` as PEFT does, with sorted keys and an indent of 2."""
    targets, tokens = config.target_modules, config.trainable_token_indices
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(config.modules_to_save) or None,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {pattern.text: value for pattern, value in config.rank_pattern.pairs},
        "alpha_pattern": {pattern.text: value for pattern, value in config.alpha_pattern.pairs},
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    if tokens is not None:
        fields["trainable_token_indices"] = (
            list(tokens) if isinstance(tokens, tuple) else {name: list(ids) for name, ids in tokens.items()}
        )
    if config.alora_invocation_tokens is not None:
        fields["alora_invocation_tokens"] = list(config.alora_invocation_tokens)
    if config.ensure_weight_tying:
        fields["ensure_weight_tying"] = True
    return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False).encode("ascii")


def loads(raw: bytes, source: str) -> PeftConfig:
    """Parse the text of an `adapter_config.json`. `source` is the file's name in error messages.

    Raises:
        FormatError: a value has the wrong type.
        LimitError: a rank is above 65,536, or the patterns have too many characters.
        UnsupportedError: the file describes an adapter that nplora does not support.
        UnsafeError: the file names code that a program might run, or has a pattern on which a program could
            hang.
    """
    fields = strict_json.loads(raw, source)
    if not isinstance(fields, dict):
        raise FormatError(f"{source}: {brief(fields)}, expected an object")
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise FormatError(f"{source}: peft_type is {brief(kind)}, expected 'LORA'")
    if kind != "LORA":
        raise UnsupportedError(f"{source}: peft_type is {brief(kind)}, expected 'LORA'")
    _refuse_unsafe(fields, source)
    _refuse_unsupported(fields, source)

    def take(key: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        value = fields.get(key, default)
        if not valid(value):
            raise FormatError(f"{source}: {key} is {brief(value)}, expected {expected}")
        return value

    config = PeftConfig(
        r=_rank(fields.get("r", 8), f"{source}: r"),
        lora_alpha=_number(fields.get("lora_alpha", 8), f"{source}: lora_alpha"),
        target_modules=_targets(fields.get("target_modules")),
        modules_to_save=tuple(take("modules_to_save", None, _is_names, "a list of names") or ()),
        trainable_token_indices=_tokens(fields.get("trainable_token_indices"), source),
        ensure_weight_tying=take("ensure_weight_tying", False, _is_bool, "true or false"),
        alora_invocation_tokens=tuple(
            take("alora_invocation_tokens", None, _is_ids_or_null, "a list of token ids") or ()
        )
        or None,
        use_rslora=take("use_rslora", False, _is_bool, "true or false"),
        use_dora=take("use_dora", False, _is_bool, "true or false"),
        rank_pattern=_patterns(fields.get("rank_pattern"), _rank, f"{source}: rank_pattern"),
        alpha_pattern=_patterns(fields.get("alpha_pattern"), _number, f"{source}: alpha_pattern"),
        lora_dropout=_number(fields.get("lora_dropout", 0.0), f"{source}: lora_dropout"),
        base_model_name_or_path=take("base_model_name_or_path", None, _is_text_or_null, "text"),
        task_type=take("task_type", None, _is_text_or_null, "text"),
    )
    known = _PASSED_OVER | _MUST_BE_OFF | _CHECKED | PeftConfig.__dataclass_fields__.keys()
    return replace(config, unknown=tuple(key for key in fields if key not in known))


def _targets(value: object) -> tuple[str, ...] | str:
    """Read `target_modules`. Values of a wrong type are ignored, because nplora does not use this key."""
    if isinstance(value, str):
        return value
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _tokens(value: object, source: str) -> Tokens | None:
    """Read `trainable_token_indices`: a list of token ids, or a dictionary from layers to such lists."""
    if value is None or _is_ids(value):
        return None if not value else tuple(value)  # type: ignore[arg-type]
    if isinstance(value, dict) and all(map(_is_ids, value.values())):
        return {name: tuple(ids) for name, ids in value.items()} or None
    raise FormatError(
        f"{source}: trainable_token_indices is {brief(value)}, expected a list of token ids, or an object "
        "that maps layers to lists of token ids"
    )


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)


def _refuse_unsafe(fields: dict[str, Any], source: str) -> None:
    """Raise UnsafeError if the file names code to run, or has a pattern on which PEFT could hang."""
    mapping = fields.get("auto_mapping")
    if mapping is not None and not _is_plain_module_mapping(mapping):
        raise UnsafeError(
            f"{source}: auto_mapping is {brief(mapping)}; nplora loads no class or library that a file names"
        )
    if fields.get("megatron_core") not in (None, _MEGATRON):  # PEFT writes this default into every file
        raise UnsafeError(
            f"{source}: megatron_core is {brief(fields['megatron_core'])}; nplora loads no library that "
            "a file names"
        )
    if fields.get("trust_remote_code") not in (None, False):
        raise UnsafeError(
            f"{source}: trust_remote_code is {brief(fields['trust_remote_code'])}; nplora runs no code that "
            "a file names"
        )
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        for text in fields[key] if isinstance(fields.get(key), list) else [fields.get(key)]:
            if isinstance(text, str) and _REPEATED_GROUP.search(text):
                raise UnsafeError(
                    f"{source}: {key} holds the pattern {brief(text)}, which has a repeated group: matching "
                    "such a pattern can take for ever"
                )


def _is_plain_module_mapping(mapping: object) -> bool:
    """Whether `auto_mapping` is the entry that PEFT writes for a plain torch module.

    nplora never imports the named class. If the class is in Python's standard library, the result is False,
    because that library has no models.
    """
    if not isinstance(mapping, dict) or mapping.keys() != {"base_model_class", "parent_library"}:
        return False
    words = [mapping["base_model_class"], mapping["parent_library"]]
    if not all(isinstance(word, str) and all(map(str.isidentifier, word.split("."))) for word in words):
        return False
    return words[1].split(".")[0] not in sys.stdlib_module_names | {"builtins"}


def _refuse_unsupported(fields: dict[str, Any], source: str) -> None:
    for key in sorted(_MUST_BE_OFF & fields.keys()):
        if fields[key] not in (None, False, [], {}):
            raise UnsupportedError(
                f"{source}: {key} is {brief(fields[key])}, but nplora supports only plain LoRA, rsLoRA and "
                "DoRA"
            )
    if fields.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{source}: bias is {brief(fields['bias'])}, expected 'none': nplora trains no biases of "
            "frozen layers"
        )
    start = fields.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in _PLAIN_STARTS):
        raise UnsupportedError(
            f"{source}: init_lora_weights is {brief(start)}, which also changed the base model's weights; "
            "save the adapter again with PEFT's path_initial_model_for_weight_conversion"
        )


def _rank(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise FormatError(f"{where} is {brief(value)}, expected an integer of at least 1")
    if value > MAX_RANK:
        raise LimitError(f"{where} is {value:,}, expected at most {MAX_RANK:,}")
    return value


def _number(value: object, where: str) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{where} is {brief(value)}, expected a finite number")
    return value


def _patterns(value: object, check: Callable[[object, str], Number], where: str) -> Patterns:
    if value is None:
        return Patterns()
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {brief(value)}, expected an object")
    _limit(sum(map(len, value)), MAX_EXACT_TEXT, where)
    pairs, inexact = list[tuple[NamePattern, Number]](), 0
    for key, item in value.items():
        pattern = NamePattern(key, where)
        inexact += len(key) * (pattern.only_name is None)
        _limit(inexact, MAX_PATTERN_TEXT, where)
        pairs.append((pattern, check(item, f"{where}: {brief(key)}")))
    return Patterns(tuple(pairs))


def _limit(length: int, limit: int, where: str) -> None:
    if length > limit:
        raise LimitError(f"{where}: {length:,} characters of patterns, expected at most {limit:,}")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_ids_or_null(value: object) -> bool:
    return value is None or _is_ids(value)


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
