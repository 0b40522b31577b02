"""The directory in which the blocks of a page run. `python tests/docs/starting_directory.py DIR` makes one.

It holds `train.jsonl` and `valid.jsonl` (chats), `hf-model/` (a tiny Llama of random numbers in Hugging
Face's files, with a byte-level BPE tokenizer and a chat template), `model.gguf` (the same model), and
`encoder-model/` (a tiny BERT of random numbers in the files of sentence-transformers).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.formats import safetensors

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # for the import below, if this file runs as a program
from small_encoder import save_small_encoder  # noqa: E402

DATA = ("train.jsonl", "valid.jsonl")
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 512, 256, 512, 4, 4, 2, 512
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(directory: Path) -> None:
    """Write the five entries into a directory, which must exist."""
    for name in DATA:
        shutil.copy(HERE / name, directory)
    model = directory / "hf-model"
    model.mkdir()
    write_tokenizer(model, (HERE / "train.jsonl").read_text())
    (model / "config.json").write_text(json.dumps(config(), indent=2))
    safetensors.save(model / "model.safetensors", tensors())
    save_small_encoder(directory / "encoder-model")
    report = nplora.model_to_gguf(model, directory / "model.gguf")
    assert report.tokenizer, report


def config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Random matrices whose products keep the size of their inputs, and norms of ones."""
    keys = KV_HEADS * (HIDDEN // HEADS)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    norms = ["model.norm"]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qo"}
        shapes |= {f"{layer}.self_attn.{part}_proj": (keys, HIDDEN) for part in "kv"}
        shapes |= {f"{layer}.mlp.{part}_proj": (FFN, HIDDEN) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, FFN)
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    rng = np.random.default_rng(0)
    made = {
        f"{name}.weight": rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
        for name, shape in shapes.items()
    }
    return made | {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}


def write_tokenizer(directory: Path, text: str) -> None:
    """Write a byte-level BPE tokenizer that was trained on this text, and its chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": STOP, "pad_token": END, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="new directory to write to")
    given = parser.parse_args()
    if given.directory.exists():
        parser.error(f"{given.directory} is there already; delete it, or name another one")
    given.directory.mkdir(parents=True)
    make(given.directory)
