"""Writes the seed corpus of a fuzz target: python tests/fuzz/seeds.py gguf DIRECTORY."""

import sys
from pathlib import Path

import numpy as np

from nplora.formats import gguf, safetensors
from nplora.formats.gguf import Tensor, Typed
from nplora.formats.gguf.ggml_types import GGML_TYPES, VALUE_LETTERS


def gguf_seeds() -> dict[str, bytes]:
    """Small files that hold each type of value and of tensor, and the shapes of models and adapters."""
    numbers = {kind.lower(): Typed(1, kind) for kind in VALUE_LETTERS if kind != "BOOL"}
    arrays = {kind.lower(): Typed([1, 0], kind) for kind in VALUE_LETTERS if kind != "BOOL"}
    words = {"words": ["a", "naïve", ""], "truths": [True, False], "none": Typed([], "STRING"), "yes": True}
    tensors = {
        name: Tensor(name, name, (2, kind.block), np.zeros(2 * kind.block_nbytes, np.uint8))
        for name, kind in GGML_TYPES.items()
    }
    model = {
        "general.architecture": "llama",
        "llama.block_count": Typed(1, "UINT32"),
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a"],
        "tokenizer.ggml.scores": Typed([0.0, 0.0, -1.0], "FLOAT32"),
    }
    adapter = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": np.float32(16)}
    pair = {
        "blk.0.attn_q.weight.lora_a": np.ones((2, 4), "f4"),
        "blk.0.attn_q.weight.lora_b": np.ones((4, 2), "f4"),
    }
    floats = {name: tensors[name] for name in ("F32", "F16", "BF16", "F64")}
    return {
        "nothing": gguf.dumps({}),
        "numbers": gguf.dumps({}, numbers),
        "arrays": gguf.dumps({}, arrays),
        "words": gguf.dumps({}, words),
        "tensors": gguf.dumps(tensors),
        "floats": gguf.dumps(floats | {"scalar": np.int8(1), "empty": np.zeros((0, 2, 1, 3))}),
        "aligned": gguf.dumps(
            {"a": np.int8([1]), "b": np.int16([2])}, {"general.alignment": Typed(8, "UINT32")}
        ),
        "model": gguf.dumps(
            {"token_embd.weight": tensors["Q8_0"], "output_norm.weight": np.ones(4, "f4")}, model
        ),
        "adapter": gguf.dumps(pair, adapter),
    }


def safetensors_seeds() -> dict[str, bytes]:
    names = ["float64", "float32", "float16", "int8", "int64", "uint8", "uint32", "bool"]
    arrays = {name: np.ones((2, 3), name) for name in names}
    bits = safetensors.Tensor("b", "bfloat16", np.ones(2, np.uint16))
    return {
        "nothing": safetensors.dumps({}),
        "metadata": safetensors.dumps({}, {"format": "pt", "naïve": 'é"\\\n'}),
        "every type": safetensors.dumps(arrays | {"bfloat16": bits}),
        "shapes": safetensors.dumps(
            {"scalar": np.array(1.0), "empty": np.zeros((0, 2)), "four": np.ones((1, 2, 1, 2))}
        ),
    }


SEEDS = {"gguf": gguf_seeds, "safetensors": safetensors_seeds}

if __name__ == "__main__":
    _, target, directory = sys.argv
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS[target]().items():
        Path(directory, name.replace(" ", "_")).write_bytes(data)
