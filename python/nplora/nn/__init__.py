"""The layers, losses and optimisers of nplora."""

from nplora.nn.activations import GELU, ReLU, SiLU, Tanh
from nplora.nn.conv import Conv2d, LoRAConv2d
from nplora.nn.embedding import Embedding, LoRAEmbedding
from nplora.nn.flatten import Flatten
from nplora.nn.linear import Linear
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.low_rank import LoRALayer
from nplora.nn.norms import LayerNorm, RMSNorm
from nplora.nn.pooling import MaxPool2d
from nplora.nn.sequential import Sequential
from nplora.nn.stack import stack_backward, stack_forward
from nplora.nn.trained_rows import TrainedEmbedding, TrainedHead, TrainedRows, TrainedRowsLayer

__all__ = [
    "GELU",
    "Conv2d",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Linear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "MaxPool2d",
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
