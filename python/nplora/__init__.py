"""nplora: LoRA fine-tuning on CPUs, from NumPy.

Fine-tune a language model, and generate text with the adapter:

    >>> report = nplora.finetune("model.gguf", "train.jsonl", "out", lr=1e-2, epochs=2)
    >>> lm = nplora.finetuning.load_with_adapter("model.gguf", "out")
    >>> text = lm.generate("1+1=", max_new_tokens=4)

Train a layer on NumPy arrays:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.standard_normal((64, 8)), rng.standard_normal((64, 4))
    >>> model = nplora.Sequential(nplora.LoRALinear(rng.standard_normal((4, 8)), rank=2, rng=0))
    >>> trainer = nplora.Trainer(model, "mse", nplora.AdamW(lr=1e-2))
    >>> history = trainer.fit(x, y, epochs=20, batch_size=16)
    >>> history.loss[-1] < history.loss[0]
    True
"""

import os
import sys

try:
    # The core is imported first: it needs static thread-local storage, which other imports may use up.
    from nplora import _core
except ImportError as error:
    # An NPLORA_ environment variable has a wrong value. The command `nplora` (or `python -m nplora`) prints
    # this error in one line, like any other error.
    if str(error).startswith("NPLORA_") and os.path.basename(sys.argv[0]) in ("nplora", "-m"):
        print(f"nplora: error: {error}", file=sys.stderr)
        sys.exit(2)
    raise

import importlib
from typing import TYPE_CHECKING, Any

from nplora.lora import lora_backward, lora_forward, merge_lora, unmerge_lora
from nplora.nn import (
    GELU,
    Conv2d,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    MaxPool2d,
    ReLU,
    RMSNorm,
    Sequential,
    SiLU,
    Tanh,
    losses,
    optim,
    stack_backward,
    stack_forward,
)
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module, Parameter, saved_nbytes
from nplora.nn.optim import SGD, AdamW
from nplora.runtime import get_num_threads, release_memory, set_num_threads, show_config
from nplora.weights import FrozenWeight

if TYPE_CHECKING:
    from nplora import adapters, distributed, finetuning, formats, models, serving, tokenizer, trainer
    from nplora import sklearn as sklearn  # not in __all__, because it needs scikit-learn
    from nplora.adapters import (
        adapter_from_gguf,
        adapter_to_gguf,
        combine,
        load_adapter,
        merge_adapter,
        read_adapter,
        save_adapter,
    )
    from nplora.finetuning import data, embedding, evaluate, finetune, plan
    from nplora.lm import (
        Encoder,
        LanguageModel,
        TextClassifier,
        load_classifier,
        load_encoder,
        load_model,
        new_classifier,
    )
    from nplora.lm import generation as generate
    from nplora.models.gguf_export import model_to_gguf
    from nplora.trainer import Trainer, plot

__version__: str = _core.config()["version"]

# Names that are imported when they are first used: {name: (module, name in the module)}. None stands for the
# module itself.
_LATE: dict[str, tuple[str, str | None]] = {
    **{name: (f"nplora.{name}", None) for name in ("adapters", "distributed", "finetuning", "formats")},
    **{name: (f"nplora.{name}", None) for name in ("models", "serving", "sklearn", "tokenizer", "trainer")},
    "data": ("nplora.finetuning.data", None),
    "embedding": ("nplora.finetuning.embedding", None),
    "generate": ("nplora.lm.generation", None),
    "plot": ("nplora.trainer.plot", None),
    "Encoder": ("nplora.lm", "Encoder"),
    "LanguageModel": ("nplora.lm", "LanguageModel"),
    "TextClassifier": ("nplora.lm", "TextClassifier"),
    "Trainer": ("nplora.trainer", "Trainer"),
    "evaluate": ("nplora.finetuning", "evaluate"),
    "finetune": ("nplora.finetuning", "finetune"),
    "load_classifier": ("nplora.lm", "load_classifier"),
    "load_encoder": ("nplora.lm", "load_encoder"),
    "new_classifier": ("nplora.lm", "new_classifier"),
    "load_model": ("nplora.lm", "load_model"),
    "model_to_gguf": ("nplora.models.gguf_export", "model_to_gguf"),
    "plan": ("nplora.finetuning", "plan"),
    **{
        name: ("nplora.adapters", name)
        for name in (
            "adapter_from_gguf",
            "adapter_to_gguf",
            "combine",
            "load_adapter",
            "merge_adapter",
            "read_adapter",
            "save_adapter",
        )
    },
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'nplora' has no attribute {name!r}")
    path, attribute = _LATE[name]
    module = importlib.import_module(path)
    value = globals()[name] = module if attribute is None else getattr(module, attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "GELU",
    "SGD",
    "AdamW",
    "Conv2d",
    "Embedding",
    "Encoder",
    "Flatten",
    "FrozenWeight",
    "LanguageModel",
    "LayerNorm",
    "Linear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "MaxPool2d",
    "Module",
    "NonFiniteLossError",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Tanh",
    "TextClassifier",
    "Trainer",
    "adapter_from_gguf",
    "adapter_to_gguf",
    "adapters",
    "combine",
    "data",
    "distributed",
    "embedding",
    "evaluate",
    "finetune",
    "finetuning",
    "formats",
    "generate",
    "get_num_threads",
    "load_adapter",
    "load_classifier",
    "load_encoder",
    "load_model",
    "lora_backward",
    "lora_forward",
    "losses",
    "merge_adapter",
    "merge_lora",
    "model_to_gguf",
    "models",
    "new_classifier",
    "optim",
    "plan",
    "plot",
    "read_adapter",
    "release_memory",
    "save_adapter",
    "saved_nbytes",
    "serving",
    "set_num_threads",
    "show_config",
    "stack_backward",
    "stack_forward",
    "tokenizer",
    "trainer",
    "unmerge_lora",
]
