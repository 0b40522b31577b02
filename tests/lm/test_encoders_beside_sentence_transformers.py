"""Encoders in the files that sentence-transformers writes: its embeddings, for every family and pooling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_encoder

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

import torch_encoders  # noqa: E402

pytestmark = pytest.mark.slow

# Texts of very different lengths; the last one is cut. None has an unknown word.
TEXTS = ["a cat", "a", "the dog sat on the mat .", "where is my parcel", "how do i return an order " * 9]
LONGEST = 32


def saved(kind: str, directory: Path, pooling: str | list[str], *more: Any, **options: Any) -> Any:
    """A model of sentence-transformers with random weights, which it has written to `directory`."""
    base = torch_encoders.save(torch_encoders.make(kind), directory / "base")
    (base / "tokenizer.json").write_text(json.dumps(small_encoder.tokenizer()))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (base / "tokenizer_config.json").write_text(json.dumps(names))
    first = modules.Transformer(str(base), max_seq_length=LONGEST)
    model = SentenceTransformer(
        modules=[first, modules.Pooling(48, pooling_mode=pooling), *more], device="cpu", **options
    )
    model.save_pretrained(str(directory / "model"))
    return model.eval()


def assert_embeddings_agree(model: Any, directory: Path, **options: Any) -> nplora.Encoder:
    ours = nplora.load_encoder(directory / "model")
    with pytest.warns(UserWarning, match=f"1 of 5 texts are longer than {LONGEST} tokens"):
        found = ours.embed(TEXTS, **options)
    wanted = model.encode(TEXTS, convert_to_numpy=True, show_progress_bar=False, **options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    return ours


@pytest.mark.parametrize("kind", torch_encoders.KINDS)
def test_embeddings_of_every_family(kind: str, tmp_path: Path) -> None:
    assert_embeddings_agree(saved(kind, tmp_path, "mean", modules.Normalize()), tmp_path)


@pytest.mark.parametrize(
    "pooling",
    ["cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["mean", "cls", "max"]],
    ids=str,
)
def test_embeddings_of_every_pooling(pooling: str | list[str], tmp_path: Path) -> None:
    assert_embeddings_agree(saved("bert", tmp_path, pooling), tmp_path)


def test_embeddings_after_dense_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        modules.Dense(48, 20, activation_function=torch.nn.Identity()),
        modules.Dense(20, 12, bias=False, activation_function=torch.nn.Tanh()),
        modules.Normalize(),
    ]
    assert_embeddings_agree(saved("modernbert", tmp_path, "mean", *layers), tmp_path)


def test_prompts_of_the_files(tmp_path: Path) -> None:
    prompts = {"query": "query : ", "document": "the dog ."}
    model = saved("bert", tmp_path, "mean", prompts=prompts, default_prompt_name="document")
    ours = assert_embeddings_agree(model, tmp_path)
    assert ours.prompts == prompts
    assert_embeddings_agree(model, tmp_path, prompt_name="query")
    assert_embeddings_agree(model, tmp_path, prompt="a cat ")
