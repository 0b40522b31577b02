"""LoRA adapters: in memory, in PEFT's directories, in llama.cpp's files, and in models.

Arguments and errors that several functions here share:

    base: the base model of the adapter: a GGUF file, a config.json, or the directory that holds one. If
        tensors are there, the adapter's names and shapes are checked against them. A llama.cpp file for the
        Llama family cannot be read without the base model, because the order of its rows depends on the
        heads.
    any_base: accept an adapter that was trained on another language model with the same shapes. An adapter
        keeps a digest of its base model's norms; without this option, a different digest is an error. An
        adapter without a digest is always accepted.
    edited_config: accept an adapter_config.json that was edited after `save_adapter` wrote it. Saving the
        adapter again records the edited file as the right one.
    overwrite: replace another adapter.

    FormatError: a file breaks its format, or the adapter belongs to another model or does not fit. The
        message lists everything that does not fit. UnsupportedError: nplora does not know this kind of
        adapter, or cannot use its fully trained layers or its DoRA magnitudes here. UnsafeError: the weights
        are a pickle, or the configuration could run code or hang. CorruptError: adapter_config.json was
        edited.
    ValueError: a path is empty, or `base` is missing.
    FileExistsError: the output exists and is never replaced, or is replaced only with `overwrite`.
    OSError: a file cannot be read or written. On a full disk the message says how many bytes were needed.
"""

from nplora.adapters.adapter import Adapter, CombinedAdapter, combine, read_adapter, read_for
from nplora.adapters.gguf_files import AdapterConversion, adapter_from_gguf, adapter_to_gguf, convert_adapter
from nplora.adapters.layers import AdapterReport, load_adapter, new_layers, rollback_on_error, save_adapter
from nplora.adapters.merge_files import merge_adapter
from nplora.lora.delta import LoraDelta
from nplora.lora.model_merge import ModelMerge

__all__ = [
    "Adapter",
    "AdapterConversion",
    "AdapterReport",
    "CombinedAdapter",
    "LoraDelta",
    "ModelMerge",
    "adapter_from_gguf",
    "adapter_to_gguf",
    "combine",
    "convert_adapter",
    "load_adapter",
    "merge_adapter",
    "new_layers",
    "read_adapter",
    "read_for",
    "rollback_on_error",
    "save_adapter",
]
