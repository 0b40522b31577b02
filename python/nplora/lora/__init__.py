"""LoRA on plain arrays: forward, backward, and merging into a weight."""

from nplora.lora.delta import LoraDelta
from nplora.lora.functions import lora_backward, lora_forward, merge_lora, unmerge_lora

__all__ = ["LoraDelta", "lora_backward", "lora_forward", "merge_lora", "unmerge_lora"]
