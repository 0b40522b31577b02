"""Small models, prompts and engines for the tests of this folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE
from nplora.serving import Engine, memory
from vocabularies import byte_level

VOCAB = len(byte_level()["tokenizer.ggml.tokens"])
CONTEXT = 8 * PAGE


def small(directory: Path, context: int = CONTEXT, seed: int = 0) -> LanguageModel:
    """A small model with a byte-level vocabulary. Its texts depend on tokens far back."""
    entries = {**small_models.metadata(llama__context_length=context), **byte_level()}
    weights = small_models.tensors(seed)
    rng = np.random.default_rng(seed + 1)
    for name in ("token_embd.weight", "output.weight"):
        weights[name] = rng.standard_normal((VOCAB, small_models.WIDTH), np.float32)
    return nplora.load_model(small_models.write(directory / "small.gguf", entries, weights))


def prompt(rng: np.random.Generator, length: int, vocab: int = VOCAB) -> list[int]:
    return [int(one) for one in rng.integers(1, vocab, length)]


def engine_with(lm: LanguageModel, pages: int, **options: Any) -> Engine:
    """An engine with exactly this number of pages."""
    requests, waiting = options.get("max_requests", 8), options.get("max_waiting", 1024)
    fixed = memory.plan_memory(lm, "4G", requests, max_waiting=waiting)
    room = pages * fixed.page_bytes + fixed.page_bytes // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_memory", lambda lm: (0, 0))
        return Engine(lm, memory=fixed.work + room, **options)
