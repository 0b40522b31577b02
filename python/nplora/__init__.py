"""nplora: LoRA fine-tuning on CPUs, from NumPy."""

import os
import sys

try:
    from nplora import _core  # first: its thread-local storage needs room that later imports take
except ImportError as error:
    # A mistake in the environment: the command (or -m, still looking for it) tells it as any other.
    if str(error).startswith("NPLORA_") and os.path.basename(sys.argv[0]) in ("nplora", "-m"):
        print(f"nplora: error: {error}", file=sys.stderr)
        sys.exit(2)
    raise

import importlib
from typing import TYPE_CHECKING, Any

from nplora import losses, optim
from nplora.layers import (
    GELU,
    Embedding,
    LayerNorm,
    Linear,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    ReLU,
    RMSNorm,
    Sequential,
    SiLU,
    Tanh,
    stack_backward,
    stack_forward,
)
from nplora.lora import lora_backward, lora_forward, merge_lora, unmerge_lora
from nplora.losses import NonFiniteLossError
from nplora.module import Module, Parameter, saved_nbytes
from nplora.optim import SGD, AdamW
from nplora.runtime import get_num_threads, release_memory, set_num_threads, show_config
from nplora.weights import FrozenWeight

if TYPE_CHECKING:
    from nplora import (
        adapters,
        data,
        finetuning,
        formats,
        generate,
        models,
        plot,
        tokenizer,
        trainer,
    )
    from nplora.adapters import (
        adapter_from_gguf,
        adapter_to_gguf,
        combine,
        load_adapter,
        merge_adapter,
        read_adapter,
        save_adapter,
    )
    from nplora.finetuning import finetune, plan
    from nplora.model_conversion import model_to_gguf
    from nplora.models import LanguageModel, load_model
    from nplora.trainer import Trainer

__version__: str = _core.config()["version"]

# What `import nplora` leaves alone until it is asked for: the module that holds each name, which may be it
# itself.
_LATE = {
    "LanguageModel": "nplora.models",
    "Trainer": "nplora.trainer",
    "adapter_from_gguf": "nplora.adapters",
    "adapter_to_gguf": "nplora.adapters",
    "adapters": "nplora.adapters",
    "combine": "nplora.adapters",
    "data": "nplora.data",
    "finetune": "nplora.finetuning",
    "finetuning": "nplora.finetuning",
    "formats": "nplora.formats",
    "generate": "nplora.generate",
    "load_adapter": "nplora.adapters",
    "load_model": "nplora.models",
    "merge_adapter": "nplora.adapters",
    "model_to_gguf": "nplora.model_conversion",
    "models": "nplora.models",
    "plan": "nplora.finetuning",
    "plot": "nplora.plot",
    "read_adapter": "nplora.adapters",
    "save_adapter": "nplora.adapters",
    "tokenizer": "nplora.tokenizer",
    "trainer": "nplora.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'nplora' has no attribute {name!r}")
    module = importlib.import_module(_LATE[name])
    value = globals()[name] = module if module.__name__ == f"nplora.{name}" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "GELU",
    "SGD",
    "AdamW",
    "Embedding",
    "FrozenWeight",
    "LanguageModel",
    "LayerNorm",
    "Linear",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "Module",
    "NonFiniteLossError",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Tanh",
    "Trainer",
    "adapter_from_gguf",
    "adapter_to_gguf",
    "adapters",
    "combine",
    "data",
    "finetune",
    "finetuning",
    "formats",
    "generate",
    "get_num_threads",
    "load_adapter",
    "load_model",
    "lora_backward",
    "lora_forward",
    "losses",
    "merge_adapter",
    "merge_lora",
    "model_to_gguf",
    "models",
    "optim",
    "plan",
    "plot",
    "read_adapter",
    "release_memory",
    "save_adapter",
    "saved_nbytes",
    "set_num_threads",
    "show_config",
    "stack_backward",
    "stack_forward",
    "tokenizer",
    "trainer",
    "unmerge_lora",
]
