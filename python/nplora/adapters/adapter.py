"""An adapter in memory, read from a PEFT directory, a llama.cpp file or a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nplora.adapters import combination, gguf_files, layers, merge_files, peft_files, sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.gguf_files import AdapterConversion
from nplora.adapters.sources import Source
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.formats.output_directory import require_no_other
from nplora.lora.model_merge import ModelMerge
from nplora.nn.module import Module


class Adapter(AdapterContent):
    """An adapter in memory: a mapping of layer name to `LoraDelta`.

    The attributes of an adapter are described in `AdapterContent`.

    >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2, rng=0))
    >>> nplora.save_adapter(model, "adapter")
    >>> adapter = nplora.adapters.Adapter.read("adapter")
    >>> adapter
    Adapter('adapter', 1 layer)
    >>> adapter["0"].A.shape, adapter["0"].B.shape, adapter["0"].scale
    ((4, 2), (2, 4), 8.0)
    >>> plain = nplora.Sequential(nplora.Linear(np.eye(4, dtype=np.float32)))
    >>> adapter.attach(plain)
    """

    @staticmethod
    def of(content: AdapterContent) -> Adapter:
        """Return the content of an adapter as an `Adapter`.

        >>> content = nplora.read_adapter("adapter")
        >>> Adapter.of(content) is content
        True
        """
        return content if isinstance(content, Adapter) else Adapter(**vars(content))

    @staticmethod
    def from_model(model: Module) -> Adapter:
        """Return a model's LoRA layers as an adapter. The factors are the layers' own arrays, not copies.

        Raises:
            ValueError: the model has no LoRA layer.

        >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2, rng=0))
        >>> adapter = Adapter.from_model(model)
        >>> adapter["0"].A is model[0].A
        True
        """
        return Adapter.of(layers.from_model(model, "read_adapter"))

    @staticmethod
    def read(
        source: StrPath, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
    ) -> Adapter:
        """Read a PEFT directory or a llama.cpp file.

        Unlike `read_adapter`, this method accepts an adapter with layers that were trained without LoRA.

        >>> adapter = Adapter.read("adapter")
        >>> adapter
        Adapter('adapter', 14 layers)
        >>> adapter["model.layers.0.self_attn.q_proj"].rank
        2
        """
        return Adapter.of(sources.read(source, base, edited_config, any_base))

    def save(
        self, path: StrPath, overwrite: bool = False, base: StrPath | None = None, any_base: bool = False
    ) -> AdapterConversion | None:
        """Write a PEFT adapter directory. If `base` is given, write a llama.cpp file instead.

        A llama.cpp file is written as `adapter_to_gguf` writes it.

        Returns:
            a report of the conversion to a llama.cpp file; None for a directory.
        Raises:
            The errors of `save_adapter`, and these:
            FileExistsError: the directory holds a training run; or it holds an adapter, and `overwrite` is
                not set.
            ValueError: the adapter has no layers, or the path ends in .gguf and `base` is missing.

        >>> adapter = Adapter.read("adapter")
        >>> adapter.save("copy")
        >>> report = adapter.save("adapter.gguf", base="model.gguf")
        >>> sorted(os.listdir("copy")), report.target
        (['adapter_config.json', 'adapter_model.safetensors'], 'adapter.gguf')
        """
        if base is not None:
            return gguf_files.save(self, path, base, any_base, overwrite)
        if files.suffix(path) == ".gguf":
            raise ValueError(f"Adapter.save: {files.name(path)}: a GGUF adapter needs its base model (base)")
        require_no_other(path, overwrite)
        peft_files.save(self, path)
        return None

    def attach(
        self, model: Module, any_base: bool = False, replace: bool = False, freeze_B: bool = False
    ) -> None:
        """Attach the adapter to a model, as new LoRA layers over the model's frozen weights.

        The new layers have no dropout. If an error is raised, the model is unchanged.

        Args:
            replace: first remove the model's present adapter from all layers. After this call, create a new
                optimiser, because the old optimiser holds the arrays of the removed layers. (`load_adapter`,
                in contrast, keeps the layers and loads the adapter's values into them.)
            freeze_B: train A only, as in `LoRALinear`.
        Raises:
            ValueError: the model has an adapter, and `replace` is not set. Or `replace` is set, and a LoRA
                layer of the model was made with init="pissa" or "olora", which changed the layer's frozen
                weight.
            RuntimeError: `replace` is set, and a LoRA layer's update is merged into the layer's weight.
            FormatError: the adapter does not fit the model, the adapter belongs to another model, or the
                adapter has fully trained layers.

        >>> lm = nplora.load_model("model.gguf")
        >>> adapter = Adapter.read("adapter")
        >>> adapter.attach(lm)
        >>> len(lm.adapter_layers())
        14
        >>> adapter.attach(lm)
        Traceback (most recent call last):
        ValueError: attach_adapter: the model already has an adapter, on 14 layers; replace=True removes it
        >>> adapter.attach(lm, replace=True)
        """
        if not replace:
            layers.require_no_adapter(model)
        plain = dict[int, Module]()
        for layer in model.adapter_layers().values():
            layer.require_unmerged("attach")
            plain[id(layer)] = layer.frozen()
        modules = dict(model.named_modules())
        made = layers.new_layers(self, model, any_base, freeze_B)
        with layers.rollback_on_error(model):
            model.exchange({**plain, **{id(modules[name]): layer for name, layer in made.items()}})

    @staticmethod
    def combine(
        adapters: Iterable[tuple[Source, float]],
        rank: int | None = None,
        base: StrPath | None = None,
        any_base: bool = False,
    ) -> CombinedAdapter:
        """Add up adapters: the new ΔW is the sum of weight · ΔW over all pairs (adapter, weight).

        The adapters may differ in rank, alpha, the use of rsLoRA, and the layers that they adapt. The sum is
        computed in float64. Each layer gets the smallest rank that represents its sum exactly. See
        `nplora.adapters` for `base`.

        Args:
            adapters: pairs (adapter, weight). The adapter is a PEFT directory, a llama.cpp file, a model, or
                an `Adapter`. The weight is any finite number.
            rank: the largest rank that a layer may get. A sum of higher rank is truncated to its largest
                singular values, and the result's `errors` gives the relative error of each layer.
            any_base: also add up adapters of different base models. Base models count as different if the
                adapters store different digests of the models' norm weights. If an adapter has no digest,
                base models also count as different if their names differ after the last "/". An adapter with
                neither a digest nor the name of its base model is always accepted.
        Returns:
            an adapter whose layers all have scale 1.
        Raises:
            The errors of `read_adapter`, and these:
            UnsupportedError: an adapter uses DoRA, which rescales the rows of W + ΔW, so the adapter's update
                cannot be added to other updates.
            ValueError: there are no adapters, a weight is not finite, `rank` is below 1, or a sum exceeds the
                range of float32. Or the adapters belong to different models, or do not fit each other.
            TypeError: `adapters` is not a list of pairs.

        >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(8, dtype=np.float32), rank=2, rng=0))
        >>> model[0].A[...] = 1
        >>> half = nplora.combine([(model, 0.75), (model, -0.25)])
        >>> half["0"].rank, half["0"].scale
        (1, 1.0)
        >>> bool(np.allclose(half["0"].A @ half["0"].B, model[0].delta_weight() / 2))
        True
        """
        return CombinedAdapter(**vars(combination.combine(adapters, rank, base, any_base)))

    def merge(self, base: StrPath, output: StrPath, **options: Any) -> ModelMerge:
        """Write a model with this adapter merged into it. `options` are the options of `merge_adapter`.

        >>> report = Adapter.read("adapter").merge("model.gguf", "merged.gguf")
        >>> len(report.reports), report.kept  # matrices with an update, and other tensors
        (14, 7)
        >>> nplora.load_model("merged.gguf").config.hidden_size
        32
        """
        return merge_files.merge_adapter(base, self, output, **options)


class CombinedAdapter(combination.Combination, Adapter):
    """A weighted sum of adapters, as `combine` returns it.

    >>> twice = nplora.combine([("adapter", 2.0)])
    >>> type(twice).__name__, len(twice)
    ('CombinedAdapter', 14)
    >>> max(twice.errors.values(), default=0.0)  # no rank was cut
    0.0
    >>> twice.save("twice")
    """


combine = Adapter.combine


def read_adapter(
    source: Source, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
) -> Adapter:
    """Read an adapter that has only low-rank factors.

    See `nplora.adapters` for the other arguments and errors.

    Args:
        source: a PEFT adapter directory, a llama.cpp adapter file, a model with LoRA layers (the result then
            holds the model's own arrays, not copies), or an `Adapter`, which is returned unchanged.
    Raises:
        UnsupportedError: the adapter holds fully trained layers or trained tokens.
        ValueError: the model has no LoRA layer.
        TypeError: `source` has a type other than these.
    Warns:
        UserWarning: the directory has copies of the base model's weights, which are ignored.

    >>> adapter = nplora.read_adapter("adapter")
    >>> len(adapter), adapter["model.layers.0.self_attn.q_proj"].rank
    (14, 2)
    """
    adapter = sources.read_any(source, base, edited_config, any_base)
    adapter.require_low_rank("Adapter.read reads it")
    return Adapter.of(adapter)


def read_for(model: Module, path: StrPath, base: StrPath, any_base: bool = False) -> Adapter:
    """Read an adapter file for a model. Shapes are checked before any values are read.

    >>> lm = nplora.load_model("model.gguf")
    >>> adapter = nplora.adapters.read_for(lm, "adapter", base="model.gguf")
    >>> adapter.attach(lm)
    >>> len(lm.adapter_layers())
    14
    """
    return Adapter.of(sources.read(path, base, any_base=any_base, target=layers.plain_target(model)))
