"""LoRA adapters: in memory, in PEFT's directories, in llama.cpp's files, and in models."""

from nplora.adapters.adapter import Adapter, read_adapter
from nplora.adapters.combination import CombinedAdapter, combine
from nplora.adapters.gguf_files import AdapterConversion, adapter_from_gguf, adapter_to_gguf, convert_adapter
from nplora.adapters.layers import (
    AdapterReport,
    load_adapter,
    new_layers,
    read_for,
    rollback_on_error,
    save_adapter,
)
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
