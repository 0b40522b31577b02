"""The layers of nplora."""

from nplora.nn.activations import GELU, ReLU, SiLU, Tanh
from nplora.nn.embedding import Embedding, LoRAEmbedding
from nplora.nn.linear import Linear
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.low_rank import LoRALayer
from nplora.nn.norms import LayerNorm, RMSNorm
from nplora.nn.sequential import Sequential
from nplora.nn.stack import stack_backward, stack_forward
from nplora.nn.trained_rows import TrainedEmbedding, TrainedHead, TrainedRows, TrainedRowsLayer

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
    "TrainedEmbedding",
    "TrainedHead",
    "TrainedRows",
    "TrainedRowsLayer",
    "stack_backward",
    "stack_forward",
]
