"""LoRA adapters: in memory, in PEFT's directories, in llama.cpp's files, and in models."""

from nplora.adapters.adapter import Adapter, read_adapter
from nplora.adapters.combination import CombinedAdapter, combine
from nplora.adapters.conversion import (
    AdapterConversion,
    adapter_from_gguf,
    adapter_to_gguf,
    convert_adapter,
)
from nplora.adapters.merge_files import ModelMerge, merge_adapter
from nplora.adapters.peft_files import AdapterReport, load_adapter, load_opened, save_adapter

__all__ = [
    "Adapter",
    "AdapterConversion",
    "AdapterReport",
    "CombinedAdapter",
    "ModelMerge",
    "adapter_from_gguf",
    "adapter_to_gguf",
    "combine",
    "convert_adapter",
    "load_adapter",
    "load_opened",
    "merge_adapter",
    "read_adapter",
    "save_adapter",
]
