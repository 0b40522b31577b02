"""The low-rank updates of an adapter, wherever it is kept: PEFT's directory, llama.cpp's file, a model.

Layers have Hugging Face's dotted names, as in PEFT: "model.layers.0.self_attn.q_proj".
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import conversion
from nplora.adapters.peft_files import EMBEDDING_KEYS, LINEAR_KEYS
from nplora.checkpoint import require_no_other
from nplora.formats import files, peft_adapter
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import EMBEDDING, MAGNITUDE, PREFIX, PeftAdapter
from nplora.formats.peft_config import Patterns, PeftConfig, short_number
from nplora.layers import LoRAEmbedding, LoRALayer
from nplora.merging import LoraDelta
from nplora.module import Module

Array = NDArray[Any]


class Adapter(Mapping[str, LoraDelta]):
    """An adapter in memory: layer's name -> `LoraDelta`.

    Attributes:
        source: where it comes from, as messages name it.
        base_model_name_or_path: what it says about its base model, or None.
        task_type: PEFT's word for what the model is for, or None.
        base_digest: `formats.model_digest.of` its base model, or None.
    """

    def __init__(
        self,
        source: str,
        updates: Mapping[str, LoraDelta],
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
        base_digest: str | None = None,
    ) -> None:
        self.source, self._updates = source, dict(updates)
        self.base_model_name_or_path, self.task_type = base_model_name_or_path, task_type
        self.base_digest = base_digest

    def __getitem__(self, name: str) -> LoraDelta:
        return self._updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    def __repr__(self) -> str:
        return f"Adapter({self.source!r}, {len(self)} layers)"

    @property
    def use_dora(self) -> bool:
        return any(update.m is not None for update in self.values())

    def save(self, directory: StrPath, overwrite: bool = False) -> None:
        """Write a PEFT adapter directory, as `save_adapter` does.

        Args:
            overwrite: also in the place of another adapter.
        Raises:
            FileExistsError: the directory holds a model or a run; or an adapter, and `overwrite` is not set.
            ValueError: there is no layer, some layers alone have DoRA's magnitudes, or a value is not finite.
            OSError: the disk refuses; how many bytes were needed is in the message.
        """
        require_no_other(directory, overwrite)
        if not self or len({update.m is None for update in self.values()}) > 1:
            raise ValueError(f"{self.source}: expected layers, all with DoRA's magnitudes or none")
        tensors = {}
        for name, update in self.items():
            for key in EMBEDDING_KEYS if update.embedding else LINEAR_KEYS:
                array = getattr(update, key.ours)
                if array is not None:
                    if not np.isfinite(array).all():
                        raise ValueError(f"{self.source}: {name}.{key.ours} holds NaN or an infinity")
                    tensors[PREFIX + name + key.suffix] = array.T if key.transposed else array
        peft_adapter.save(directory, self._config(), tensors, self.base_digest)

    def _config(self) -> PeftConfig:
        ranks = {name: update.rank for name, update in self.items()}
        alphas = {name: short_number(update.scale * update.rank) for name, update in self.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return PeftConfig(
            r=int(rank),
            lora_alpha=alpha,
            target_modules=tuple(self),
            use_dora=self.use_dora,
            rank_pattern=Patterns.exact({name: value for name, value in ranks.items() if value != rank}),
            alpha_pattern=Patterns.exact({name: value for name, value in alphas.items() if value != alpha}),
            base_model_name_or_path=self.base_model_name_or_path,
            task_type=self.task_type,
        )


# A PEFT directory, a GGUF adapter file, a model with LoRA layers, or an adapter that is in memory already.
Source: TypeAlias = "StrPath | Module | Adapter"


def read_adapter(
    source: Source, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
) -> Adapter:
    """The updates of an adapter, whatever keeps it.

    Args:
        source: a PEFT adapter directory, llama.cpp's adapter file, a model with LoRA layers (whose live
            arrays the updates then are), or an `Adapter`, which is returned.
        base: the base model, which llama.cpp's file needs where its rows are permuted (see
            `adapter_from_gguf`).
        edited_config: as in `load_adapter`.
        any_base: as in `adapter_from_gguf`.
    Raises:
        FormatError: a file breaks its format, or llama.cpp's is of another model than base.
        UnsupportedError: it holds layers trained whole.
        CorruptError: the directory's adapter_config.json was edited.
        ValueError: the model has no LoRA layer, or base is needed. OSError: a file cannot be read.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, Module):
        return _from_model(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"read_adapter: got {source!r}, expected a PEFT directory, llama.cpp's file, a model, an Adapter"
        )
    files.require_named("read_adapter", source=source)
    if Path(source).is_dir():
        return _from_directory(source, edited_config)
    return _from_gguf(source, base, any_base)


def _from_model(model: Module) -> Adapter:
    kind = type(model).__name__
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not layers:
        raise ValueError(f"read_adapter: the {kind} has no LoRA layer")
    updates = {}
    for name, layer in layers.items():
        a, b, alpha = layer.plain_update()
        scale = alpha / (math.sqrt(len(b)) if layer.use_rslora else len(b))
        m, order = layer.m, layer.row_order
        if order is not None:
            there = np.argsort(order)  # row order[i] there is row i here
            a, m = a[there], None if m is None else m[there]
        updates[name] = LoraDelta(a, b, scale, m, isinstance(layer, LoRAEmbedding))
    return Adapter(kind, updates, task_type=model.task_type, base_digest=model.base_digest())


def _from_directory(directory: StrPath, edited_config: bool) -> Adapter:
    with peft_adapter.reading(directory) as adapter:
        if not edited_config:
            adapter.require_pair()
        config = adapter.config
        if config.modules_to_save:
            names = ", ".join(map(brief, config.modules_to_save))
            raise UnsupportedError(
                f"{adapter.directory}: trained whole: {names}; these are no low-rank updates"
            )
        problems: list[str] = []
        updates = {}
        for name, halves in adapter.factors(problems).items():
            try:
                updates[name] = _from_halves(adapter, name, halves)
            except FormatError as error:
                problems.append(str(error))
        _require_readable(adapter.directory, problems, updates)
        about = config.base_model_name_or_path, config.task_type, adapter.base_digest
        return Adapter(adapter.directory, updates, *about)


def _from_halves(adapter: PeftAdapter, name: str, halves: tuple[str, str]) -> LoraDelta:
    adapter.require_rank(name, halves)
    stem = PREFIX + name
    factors = {half.removeprefix(stem): adapter.factor(half) for half in halves}
    m = None
    if adapter.config.use_dora:
        if stem + MAGNITUDE not in adapter.tensors:
            raise FormatError(f"tensor {brief(stem + MAGNITUDE, 200)} is missing, which DoRA needs")
        m = adapter.factor(stem + MAGNITUDE)
    return _update(name, factors, adapter.config.scale(name), m)


def _from_gguf(path: StrPath, base: StrPath | None, any_base: bool) -> Adapter:
    adapter, layers = conversion.read_gguf_adapter(path, base, any_base)
    updates = {
        layer.name: _update(layer.name, layer.factors, adapter.scale(stored))
        for stored, layer in layers.items()
    }
    return Adapter(files.name(path), updates, task_type="CAUSAL_LM", base_digest=adapter.base_digest)


def _update(name: str, factors: Mapping[str, Array], scale: float, m: Array | None = None) -> LoraDelta:
    """The update of a layer's tensors by PEFT's suffixes, in this project's letters."""
    embedding = EMBEDDING[0] in factors
    ours = {}
    for key in EMBEDDING_KEYS if embedding else LINEAR_KEYS[:2]:
        array = factors[key.suffix]
        ours[key.ours] = array.T if key.transposed else array
    update = LoraDelta(ours["A"], ours["B"], scale, m, embedding)
    if m is not None and m.shape != (len(update.A),):
        raise FormatError(f"{brief(name)}: magnitudes of shape {m.shape}, expected {(len(update.A),)}")
    return update


def _require_readable(source: str, problems: list[str], updates: Mapping[str, LoraDelta]) -> None:
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        reasons = counted(len(problems), "reason")
        raise FormatError(f"{source}: the adapter cannot be used, for {reasons}:{lines}")
    if not updates:
        raise FormatError(f"{source}: the adapter holds no factors")
