"""An adapter in memory, wherever it comes from: PEFT's directory, llama.cpp's file, a model.

Layers have Hugging Face's dotted names, as in PEFT: "model.layers.0.self_attn.q_proj".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from nplora.formats import files
from nplora.formats.errors import UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.output_directory import require_no_other
from nplora.lora.delta import LoraDelta
from nplora.nn.module import Module

if TYPE_CHECKING:
    from nplora.adapters.combination import CombinedAdapter
    from nplora.adapters.gguf_files import AdapterConversion
    from nplora.adapters.merge_report import ModelMerge

Array = NDArray[Any]

# A PEFT directory, a GGUF adapter file, a model with LoRA layers, or an adapter that is in memory already.
Source: TypeAlias = "StrPath | Module | Adapter"


class Adapter(Mapping[str, LoraDelta]):
    """An adapter in memory: layer's name -> `LoraDelta`.

    Attributes:
        source: where it comes from, as messages name it.
        base_model_name_or_path: what it says about its base model, or None.
        task_type: PEFT's word for what the model is for, or None.
        base_digest: `formats.model_digest.of` its base model, or None.
        modules_to_save: the arrays of the layers that are trained whole: layer -> parameter -> array.
        dropout: that of most layers, of a model.
        unknown: keys of adapter_config.json that nobody knows.
        neighbours: the names of the model's other modules, of a model.
    """

    def __init__(
        self,
        source: str,
        deltas: Mapping[str, LoraDelta],
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
        base_digest: str | None = None,
        modules_to_save: Mapping[str, Mapping[str, Array]] | None = None,
        dropout: float = 0.0,
        unknown: tuple[str, ...] = (),
        neighbours: tuple[str, ...] = (),
    ) -> None:
        self.source, self._deltas = source, dict(deltas)
        self.base_model_name_or_path, self.task_type = base_model_name_or_path, task_type
        self.base_digest, self.modules_to_save = base_digest, dict(modules_to_save or {})
        self.dropout, self.unknown, self.neighbours = dropout, unknown, neighbours

    def __getitem__(self, name: str) -> LoraDelta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __repr__(self) -> str:
        return f"Adapter({self.source!r}, {len(self)} layers)"

    @property
    def use_dora(self) -> bool:
        return any(delta.use_dora for delta in self.values())

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The name and the digest of the base model, as far as they are known."""
        return self.base_model_name_or_path, self.base_digest

    def require_low_rank(self) -> None:
        """Raise UnsupportedError if there are layers that are trained whole."""
        if self.modules_to_save:
            names = ", ".join(map(brief, self.modules_to_save))
            raise UnsupportedError(f"{self.source}: trained whole: {names}; these are no low-rank updates")

    @staticmethod
    def from_model(model: Module) -> Adapter:
        """The adapter of a model, whose live arrays it holds. Raises ValueError if there is no LoRA layer."""
        from nplora.adapters.layers import from_model

        return from_model(model, "read_adapter")

    @staticmethod
    def read(
        source: StrPath, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
    ) -> Adapter:
        """Read a PEFT directory or llama.cpp's file. Arguments and errors are those of `read_adapter`."""
        from nplora.adapters import gguf_files, peft_files

        files.require_named("read_adapter", source=source)
        if Path(source).is_dir():
            return peft_files.read(source, edited_config=edited_config)
        return gguf_files.read(source, base, any_base)[0]

    def save(
        self, path: StrPath, overwrite: bool = False, base: StrPath | None = None, any_base: bool = False
    ) -> AdapterConversion | None:
        """Write a PEFT adapter directory, as `save_adapter` does; or, with a base, llama.cpp's file.

        Args:
            overwrite: also in the place of another adapter.
            base: the model that the adapter is for, for llama.cpp's file. Errors and result are then those of
                `adapter_to_gguf`.
        Raises:
            FileExistsError: the directory holds a model or a run; or an adapter, and `overwrite` is not set.
            ValueError: there is no layer, only some layers have DoRA's magnitudes, a value is not finite, or
                the path ends in .gguf and there is no base.
            OSError: the disk refuses; how many bytes were needed is in the message.
        """
        from nplora.adapters import gguf_files, peft_files

        if base is not None:
            return gguf_files.save(self, path, base, any_base, overwrite)
        if files.suffix(path) == ".gguf":
            raise ValueError(f"Adapter.save: {files.name(path)}: base, the model of the adapter, is needed")
        require_no_other(path, overwrite)
        peft_files.save(self, path)
        return None

    def attach(self, model: Module, any_base: bool = False) -> None:
        """Put the adapter on the plain layers of a model that has none.

        Raises:
            ValueError: the model has an adapter.
            FormatError: the adapter does not fit the model, which stays as it was, or is of another one.
        """
        from nplora.adapters.layers import attach

        attach(self, model, any_base)

    @staticmethod
    def combine(
        adapters: Iterable[tuple[Source, float]],
        rank: int | None = None,
        base: StrPath | None = None,
        any_base: bool = False,
    ) -> CombinedAdapter:
        """The weighted sum of several adapters, as `combine`."""
        from nplora.adapters.combination import combine

        return combine(adapters, rank, base, any_base)

    def merge(self, base: StrPath, output: StrPath, **options: Any) -> ModelMerge:
        """Write a model with this adapter merged into it, as `merge_adapter`, with its options."""
        from nplora.adapters.merge_files import merge_adapter

        return merge_adapter(base, self, output, **options)


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
    if isinstance(source, Module):
        source = Adapter.from_model(source)
    elif isinstance(source, str | os.PathLike):
        source = Adapter.read(source, base, edited_config, any_base)
    elif not isinstance(source, Adapter):
        raise TypeError(
            f"read_adapter: got {source!r}, expected a PEFT directory, llama.cpp's file, a model, an Adapter"
        )
    source.require_low_rank()
    return source
