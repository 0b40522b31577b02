"""An adapter in memory, wherever it comes from: PEFT's directory, llama.cpp's file, a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nplora.adapters import combination, gguf_files, layers, merge_files, peft_files, sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.gguf_files import AdapterConversion
from nplora.adapters.merge_report import ModelMerge
from nplora.adapters.sources import Source
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.formats.output_directory import require_no_other
from nplora.nn.module import Module


class Adapter(AdapterContent):
    """An adapter in memory: layer's name -> `LoraDelta`, with the attributes of `AdapterContent`."""

    @staticmethod
    def of(content: AdapterContent) -> Adapter:
        """An adapter of this content."""
        return content if isinstance(content, Adapter) else Adapter(**vars(content))

    @staticmethod
    def from_model(model: Module) -> Adapter:
        """The adapter of a model, whose live arrays it holds. Raises ValueError if there is no LoRA layer."""
        return Adapter.of(layers.from_model(model, "read_adapter"))

    @staticmethod
    def read(
        source: StrPath, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
    ) -> Adapter:
        """Read a PEFT directory or llama.cpp's file, as `read_adapter`. Layers may be trained whole."""
        return Adapter.of(sources.read(source, base, edited_config, any_base))

    def save(
        self, path: StrPath, overwrite: bool = False, base: StrPath | None = None, any_base: bool = False
    ) -> AdapterConversion | None:
        """Write a PEFT adapter directory, or with a base llama.cpp's file. Then `adapter_to_gguf` says more.

        Raises:
            as `save_adapter`. FileExistsError: the directory holds a run; or an adapter, without `overwrite`.
            ValueError: there is no layer, or the path ends in .gguf and there is no base.
        """
        if base is not None:
            return gguf_files.save(self, path, base, any_base, overwrite)
        if files.suffix(path) == ".gguf":
            raise ValueError(f"Adapter.save: {files.name(path)}: base, the model of the adapter, is needed")
        require_no_other(path, overwrite)
        peft_files.save(self, path)
        return None

    def attach(self, model: Module, any_base: bool = False, replace: bool = False) -> None:
        """Put the adapter on a model, over its frozen weights. After an error the model is as it was.

        The new layers have no dropout.

        Args:
            replace: take the place of the adapter that the model has, on whatever layers that is. Its LoRA
                layers are dropped, and optimisers that hold their arrays must be made anew. (`load_adapter`
                writes into the layers that are there instead.)
        Raises:
            ValueError: the model has an adapter, and `replace` is not set; or a layer that is replaced began
                as "pissa" or "olora", which took a part of its weight.
            RuntimeError: a layer that is replaced is merged.
            FormatError: the adapter does not fit the model, has layers trained whole, or is of another model.
        """
        layers.attach(self, model, any_base, replace)

    @staticmethod
    def combine(
        adapters: Iterable[tuple[Source, float]],
        rank: int | None = None,
        base: StrPath | None = None,
        any_base: bool = False,
    ) -> CombinedAdapter:
        """The adapter whose ΔW is Σ weight · ΔW of those given, in every layer that any of them adapts.

        Their ranks, alphas, rules of scaling and targets may differ. The sum is computed in float64 and has,
        in each layer, the lowest rank that holds it exactly. For base see `nplora.adapters`.

        Args:
            adapters: pairs of an adapter and its weight, any finite number. An adapter is what `read_adapter`
                takes: a PEFT directory, llama.cpp's file, a model, or what an earlier call returned.
            rank: cut the ranks to at most this, by the largest singular values; see `errors` of the result.
            any_base: add up adapters of different models too. Models differ if the digests of their norms do,
                which adapters of language models keep here, or without these the last parts of the names that
                adapters have for them; what is not known differs from nothing.
        Returns:
            an adapter whose scales are 1.
        Raises:
            as `read_adapter`. UnsupportedError: an adapter has DoRA, whose rescaled rows do not add up.
            ValueError: there are no adapters, a weight is not finite, rank is below 1, a sum is beyond
                float32, or adapters are of different models or do not fit each other.
            TypeError: adapters are no pairs.
        """
        return CombinedAdapter(**vars(combination.combine(adapters, rank, base, any_base)))

    def merge(self, base: StrPath, output: StrPath, **options: Any) -> ModelMerge:
        """Write a model with this adapter merged into it, as `merge_adapter`, with its options."""
        return merge_files.merge_adapter(base, self, output, **options)


class CombinedAdapter(combination.Combination, Adapter):
    """What `combine` gives."""


combine = Adapter.combine


def read_adapter(
    source: Source, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
) -> Adapter:
    """The updates of an adapter from any source. Other arguments and errors: see `nplora.adapters`.

    Args:
        source: a PEFT adapter directory, llama.cpp's adapter file, a model with LoRA layers (whose live
            arrays the updates then are), or an `Adapter`, which is returned.
    Raises:
        UnsupportedError: it holds layers trained whole. ValueError: the model has no LoRA layer.
        TypeError: source is of another kind.
    """
    return Adapter.of(sources.low_rank(source, base, edited_config, any_base))


def read_for(model: Module, path: StrPath, base: StrPath, any_base: bool = False) -> Adapter:
    """A file's adapter for a model's layers, as `Adapter.read`; shapes are checked before values are read."""
    return Adapter.of(sources.read(path, base, any_base=any_base, target=layers.plain_target(model)))
