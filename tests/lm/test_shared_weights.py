"""A second model with another arithmetic that shares the weights of a model in memory."""

from pathlib import Path

import numpy as np
import pytest

import nplora
import small_models
from nplora.weights import FrozenWeight
from small_llama import save_small_llama


def frozen_weights(lm: nplora.LanguageModel) -> dict[str, FrozenWeight]:
    held = {name: getattr(module, "weight", None) for name, module in lm.named_modules()}
    return {name: weight for name, weight in held.items() if isinstance(weight, FrozenWeight)}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "q8_0"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("before", ["int8", "bfloat16"])
def test_a_twin_computes_the_bits_of_a_model_that_was_loaded_so(
    tmp_path: Path, storage: str, compute: str, before: str
) -> None:
    path = save_small_llama(tmp_path / "model.gguf", storage)
    twin = nplora.load_model(path, compute=before).with_compute(compute)
    loaded = nplora.load_model(path, compute=compute)
    ids = np.arange(20) % 50
    assert np.array_equal(twin.logits(ids), loaded.logits(ids))
    for lm in (twin, loaded):
        lm.add_lora(rank=2)
    optimizers = [nplora.AdamW(), nplora.AdamW()]
    for _ in range(3):
        one, other = (lm.train_step(ids, ids, o) for lm, o in zip((twin, loaded), optimizers, strict=True))
        assert one == other


@pytest.mark.parametrize("storage", ["float32", "q8_0", "bfloat16"])
def test_a_twin_shares_the_memory_of_every_matrix(tmp_path: Path, storage: str) -> None:
    lm = nplora.load_model(save_small_llama(tmp_path / "model.gguf", storage), compute="bfloat16")
    ours, theirs = frozen_weights(lm), frozen_weights(lm.with_compute("float32"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        [mine], [other] = list(weight.contents()), list(theirs[name].contents())
        assert np.shares_memory(mine, other), name


def test_a_twin_has_no_adapter_and_training_it_changes_nothing_else(tmp_path: Path) -> None:
    lm = small_models.load(tmp_path)
    lm.add_lora(rank=2, init="gaussian")
    before = lm.logits([1, 2, 3])
    twin = lm.with_compute(lm.compute)
    assert not twin.adapter_layers()
    with lm.disable_adapter():
        assert np.array_equal(twin.logits([1, 2, 3]), lm.logits([1, 2, 3]))
    twin.add_lora(rank=1)
    twin.train_step([1, 2, 3], [1, 2, 3], nplora.AdamW())
    assert np.array_equal(lm.logits([1, 2, 3]), before)


def test_a_twin_of_a_tied_model_has_one_matrix_for_embedding_and_head(tmp_path: Path) -> None:
    weights = {name: w for name, w in small_models.tensors().items() if name != "output.weight"}
    lm = nplora.load_model(small_models.write(tmp_path / "tied.gguf", weights=weights))
    twin = lm.with_compute("bfloat16")
    assert twin.config.tie_word_embeddings
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
