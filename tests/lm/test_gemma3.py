"""Gemma 3 270M from its packages, in Q4_K_M, against transformers and PEFT with the dequantised weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.bench_plan import Setting

import nplora
import systems
from figures import Figure

Array = np.ndarray[Any, Any]
SENTENCE = (
    "The quick brown fox jumps over the lazy dog. "
    "It is a well known English sentence that contains every letter of the alphabet."
)
LOSS = 3.0371  # of transformers in float32
# The token ids of transformers 5.24: AutoTokenizer.from_pretrained(directory, gguf_file=name)(text).input_ids
# The test does not call it, because transformers converts the vocabulary of 262,144 words for a minute.
# fmt: off
TOKENS = {
    SENTENCE:
        [2, 818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236761, 1030, 563, 496, 1388,
         3224, 5422, 13315, 600, 6097, 1418, 6064, 529, 506, 30796, 236761],
    "Grüße, 世界! 12,345.67  \n\n\tdef f(x):\n    return x**2  # <b>&amp;</b>":
        [2, 9322, 236959, 16756, 236764, 84679, 236888, 236743, 236770, 236778, 236764, 236800,
         236812, 236810, 236761, 236825, 236832, 138, 108, 255968, 2063, 517, 236769, 236781, 1473,
         107, 140, 2060, 1123, 1018, 236778, 138, 236865, 236743, 200, 236880, 1414, 236793, 209],
    " a": [2, 496],
    "": [2],
    "👩‍🔬 ﬁ Å": [2, 243767, 237243, 249689, 97940, 44667],
}
# fmt: on
START = "The capital of France is"
CONTINUATION = (
    " the capital of the country of France. It is the largest city in France and the second largest city"
)


@pytest.fixture(scope="module")
def lm(gemma3: Path) -> nplora.LanguageModel:
    pytest.importorskip("tokenizers")
    return nplora.load_model(gemma3)


@pytest.fixture(scope="module")
def ids(lm: nplora.LanguageModel) -> Array:
    return np.array(lm.tokenizer.encode(SENTENCE, add_special_tokens=True))


@pytest.fixture(scope="module")
def theirs(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch, torch_models = pytest.importorskip("torch"), pytest.importorskip("torch_models")
    return torch_models.read_gguf(gemma3, tmp_path_factory.mktemp("theirs"), dtype=torch.float32)


def test_the_loss_of_a_sentence_and_a_continuation(
    lm: nplora.LanguageModel, ids: Array, figure: Figure
) -> None:
    assert len(ids) == 26
    loss = lm.loss(ids, ids)
    figure("loss of the sentence", loss)
    assert loss == pytest.approx(LOSS, abs=1e-3)
    assert lm.generate(START, max_new_tokens=20) == CONTINUATION


def test_tokens_are_those_of_transformers(lm: nplora.LanguageModel) -> None:
    for text, expected in TOKENS.items():
        assert lm.tokenizer.encode(text, add_special_tokens=True) == expected, text


def test_an_adapter_is_carried_to_llama_cpp_s_file_and_back(gemma3: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(gemma3)
    lm.add_lora(rank=4, init="gaussian", layers="last:4")
    nplora.save_adapter(lm, tmp_path / "peft")
    nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", gemma3)
    nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "back", gemma3)
    there, back = (nplora.read_adapter(tmp_path / name) for name in ("peft", "back"))
    assert there.keys() == back.keys()
    for name, delta in there.items():
        np.testing.assert_array_equal(back[name].A, delta.A)
        np.testing.assert_array_equal(back[name].B, delta.B)
        assert back[name].scale == delta.scale


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_logits_and_ten_steps_are_those_of_peft(
    gemma3: Path, ids: Array, theirs: Any, tmp_path: Path, figure: Figure
) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    lm, tokens = nplora.load_model(gemma3), torch.from_numpy(ids)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits[0].numpy()
    error = np.abs(lm.logits(ids) - expected).max() / np.abs(expected).max()
    figure("error of a logit, of the largest", error)
    assert error <= 1e-3

    lm.add_lora(rank=8, alpha=16, seed=1)
    nplora.save_adapter(lm, tmp_path / "start")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)
    settings = {"lr": 1e-3, "weight_decay": 0.01}
    optimizer = nplora.AdamW(**settings)
    their_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        ours = lm.train_step(ids, ids, optimizer)
        figure("error of a step's loss", abs(ours - loss.item()))
        assert ours == pytest.approx(loss.item(), abs=1e-3)
    assert loss.item() < 1
    nplora.save_adapter(lm, tmp_path / "end")
    model.load_adapter(tmp_path / "end", "ours")
    model.set_adapter("ours")
    with torch.no_grad():
        expected = model(tokens).logits[0].numpy()
    assert np.abs(lm.logits(ids) - expected).max() <= 1e-3 * np.abs(expected).max()


@systems.needs_counted_pages
def test_the_peak_of_a_run_is_the_predicted_one(gemma3: Path, figure: Figure) -> None:
    few = {"compute": "bfloat16", "layers": "last:6"}
    for batch, length, options in ((1, 64, {}), (1, 128, few)):
        found = Setting(batch, length, options={"model": str(gemma3), **options}).measure(2, steps=2)
        figure("error of a predicted peak", abs(found["predicted"] / found["measured"] - 1))
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.1)
