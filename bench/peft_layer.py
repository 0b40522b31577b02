"""PEFT's own linear layer, as a contestant."""

from importlib.util import find_spec
from typing import Any


def has_torch() -> bool:
    return find_spec("torch") is not None


def has_peft() -> bool:
    return has_torch() and find_spec("peft") is not None


def peft_linear(W: Any, A: Any, B: Any, alpha: int) -> Any:
    """PEFT's LoRA on a torch Linear, from W, A and B (torch tensors of one dtype; letters as in nplora)."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    d_out, d_in, rank = *W.shape, len(B)
    base = torch.nn.Linear(d_in, d_out, bias=False, dtype=W.dtype)
    base.weight.data = W
    base.weight.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=alpha)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = B, A
    return layer
