"""Training of embeddings against PEFT and torch in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.finetuning.embedding import EmbeddingLoss, TextBatch, train
from small_encoder import WORDS, save_small_encoder

pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT asks transformers for an attribute that it will remove.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

TEXTS = ["where is my parcel", "delivery is late", "a cat and a dog", "return an order ."]


def embedded(model: Any, texts: Any) -> Any:
    """The normalised means of the hidden states, as a torch tensor."""
    means = [model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].mean(dim=0) for ids in texts]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def test_a_trained_adapter_gives_equal_embeddings_in_peft(tmp_path: Path, figure: Figure) -> None:
    base = save_small_encoder(tmp_path / "model")
    rows = [{"anchor": TEXTS[0], "positive": TEXTS[1]}, {"anchor": TEXTS[2], "positive": TEXTS[3]}]
    encoder = train(base, rows, tmp_path / "adapter", lr=1e-2, epochs=10).encoder
    theirs = transformers.AutoModel.from_pretrained(base).double().eval()
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        wanted = embedded(model, encoder.encode(TEXTS)).numpy()
    error = np.abs(encoder.embed(TEXTS) - wanted).max()
    assert error <= 1e-5
    assert np.abs(encoder.embed(TEXTS) - nplora.load_encoder(base).embed(TEXTS)).max() > 0.01
    figure("error of an embedding after training", float(error))


@pytest.mark.parametrize("micro_tokens", [4096, 40])
def test_gradients_of_a_ranking_are_those_of_torch(
    micro_tokens: int, tmp_path: Path, rng: np.random.Generator, figure: Figure
) -> None:
    base = save_small_encoder(tmp_path / "model")
    encoder = nplora.load_encoder(base)
    encoder.add_lora(rank=2, init="gaussian")
    for layer in encoder.adapter_layers().values():
        layer.A[...] *= np.float32(0.1)  # type: ignore[attr-defined]  # large factors magnify rounding
    nplora.save_adapter(encoder, tmp_path / "adapter")
    theirs = transformers.AutoModel.from_pretrained(base).double().eval()
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).double().eval()
    columns = [[rng.integers(5, len(WORDS), rng.integers(2, 9)) for _ in range(n)] for n in (6, 6, 3)]
    batch = TextBatch(columns)
    anchors, *candidates = (embedded(model, column) for column in columns)
    scores = 20 * anchors @ torch.cat(candidates).T
    wanted = torch.nn.functional.cross_entropy(scores, torch.arange(6))
    wanted.backward()
    loss = EmbeddingLoss(micro_tokens=micro_tokens, leave_out_known=False)
    assert loss.forward_backward(encoder, batch, None, 1 / 6) / 6 == pytest.approx(wanted.item(), rel=1e-4)
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    worst = 0.0
    for parameter in encoder.parameters():
        layer, _, factor = parameter.name.rpartition(".")
        exact = gradients[f"{layer}.lora_{'B' if factor == 'A' else 'A'}"]  # PEFT swaps the letters
        error = np.linalg.norm(parameter.grad - exact) / np.linalg.norm(exact)
        worst = max(worst, float(error))
    assert worst <= 1e-4
    figure(f"error of a gradient in micro-batches of {micro_tokens} tokens, relative", worst)
