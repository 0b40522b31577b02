"""The layers that nplora brings along."""

from nplora.layers.activations import GELU, ReLU, SiLU, Tanh
from nplora.layers.embedding import Embedding, LoRAEmbedding
from nplora.layers.linear import Linear
from nplora.layers.lora_linear import LoRALinear
from nplora.layers.low_rank import LoRALayer
from nplora.layers.norms import LayerNorm, RMSNorm
from nplora.layers.sequential import Sequential
from nplora.layers.stack import stack_backward, stack_forward

__all__ = [
    "GELU",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Tanh",
    "stack_backward",
    "stack_forward",
]
