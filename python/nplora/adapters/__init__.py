"""LoRA adapters: in memory, in PEFT's directories, in llama.cpp's files, and in models.

What several functions here have in common:

    base: the model that the adapter is for: its GGUF file, its config.json, or the directory with that. If it
        has tensors, names and shapes are checked against them. llama.cpp's files of the Llama family, whose
        rows are permuted, cannot be read without it.
    any_base: take an adapter that was saved from another language model of these shapes, as its digest of the
        model's norms shows. Adapters without a digest are taken in any case.
    edited_config: take an adapter_config.json that is not the one that `save_adapter` wrote with the tensors,
        because it was edited on purpose. Saving the adapter again makes the two a pair.
    overwrite: replace another adapter.

    FormatError: a file breaks its format, or the adapter is of another model or does not fit; then all that
        does not fit is listed. UnsupportedError: the kind of adapter is not known here, or its layers that
        are trained whole, or DoRA, cannot be used so. UnsafeError: the weights are a pickle, or the
        configuration could run or hang. CorruptError: adapter_config.json was edited.
    ValueError: a path is empty, or base is needed.
    FileExistsError: there is something that is not replaced, or not without `overwrite`.
    OSError: a file cannot be read, or the disk refuses; how many bytes were needed is in the message.
"""

from nplora.adapters.adapter import Adapter, CombinedAdapter, combine, read_adapter, read_for
from nplora.adapters.gguf_files import AdapterConversion, adapter_from_gguf, adapter_to_gguf, convert_adapter
from nplora.adapters.layers import AdapterReport, load_adapter, new_layers, rollback_on_error, save_adapter
from nplora.adapters.merge_files import merge_adapter
from nplora.adapters.merge_report import ModelMerge
from nplora.lora.delta import LoraDelta

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
