"""Reads, saves, converts, attaches and merges LoRA adapters (PEFT directories and llama.cpp files).

Arguments and errors that several functions of this package share:

    base: the base model of the adapter: a GGUF file, a config.json, or a directory that holds a config.json.
        If `base` has weights, each layer of the adapter must belong to a weight of the same name and shape. A
        llama.cpp adapter for the Llama family cannot be read without the base model, because the order of the
        adapter's rows depends on the model's number of heads.
    any_base: accept an adapter that was trained on another language model with the same shapes. An adapter
        stores a digest (SHA-256) of its base model's norm weights. Without `any_base`, a digest that differs
        from the model's digest is an error. An adapter without a digest is always accepted.
    edited_config: accept an adapter_config.json that was edited after `save_adapter` wrote it. After nplora
        has loaded and saved the adapter, `edited_config` is no longer needed.
    overwrite: replace an existing adapter at the output path.

    FormatError: a file is malformed. Or the adapter does not fit the given model, or belongs to another
        model. The message lists up to ten mismatches.
    UnsupportedError: nplora does not know this kind of adapter. Or the adapter has DoRA magnitudes, or layers
        that are trained without LoRA, and the function does not support them.
    UnsafeError: the weights are a pickle, or the configuration could run code or make the program hang.
    CorruptError: adapter_config.json was edited.
    ValueError: a path is empty, or `base` is required but missing.
    FileExistsError: the output exists. With `overwrite`, an existing adapter is replaced. A model or a
        training run is never replaced.
    OSError: a file cannot be read or written. On a full disk the message says how many bytes were needed.
"""

from nplora.adapters.adapter import Adapter, CombinedAdapter, combine, read_adapter, read_for
from nplora.adapters.gguf_files import AdapterConversion, adapter_from_gguf, adapter_to_gguf, convert_adapter
from nplora.adapters.layers import AdapterReport, load_adapter, new_layers, rollback_on_error, save_adapter
from nplora.adapters.merge_files import merge_adapter
from nplora.adapters.ollama import OllamaExport, export_ollama
from nplora.adapters.trained_rows import TokenRows
from nplora.lora.delta import LoraDelta
from nplora.lora.model_merge import HeldOutLoss, ModelMerge

__all__ = [
    "Adapter",
    "AdapterConversion",
    "AdapterReport",
    "CombinedAdapter",
    "HeldOutLoss",
    "LoraDelta",
    "ModelMerge",
    "OllamaExport",
    "TokenRows",
    "adapter_from_gguf",
    "adapter_to_gguf",
    "combine",
    "convert_adapter",
    "export_ollama",
    "load_adapter",
    "merge_adapter",
    "new_layers",
    "read_adapter",
    "read_for",
    "rollback_on_error",
    "save_adapter",
]
