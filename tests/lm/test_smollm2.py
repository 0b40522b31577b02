"""SmolLM2-135M from its package, a Q4_1 file, against transformers with the dequantised weights."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.cli.demo import dictionary
from nplora.models import stepwise
from nplora.models.packing import pack
from nplora.nn.module import inference

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]
SENTENCE = (
    "The quick brown fox jumps over the lazy dog. "
    "It is a well known English sentence that contains every letter of the alphabet."
)


@pytest.fixture(scope="module")
def ids(smollm2: Path) -> Array:
    pytest.importorskip("tokenizers")
    return np.array(nplora.load_model(smollm2).tokenizer.encode(SENTENCE))


@pytest.fixture(scope="module")
def theirs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pytest.importorskip("torch_models").read_gguf(smollm2, tmp_path_factory.mktemp("theirs"))


def test_the_loss_of_a_sentence(smollm2: Path, ids: Array, figure: Figure) -> None:
    assert len(ids) == 25
    loss = nplora.load_model(smollm2).loss(ids, ids)
    assert loss == pytest.approx(3.32180, abs=2e-4)
    figure("loss of the sentence", loss)
    # bfloat16 keeps 8 bits of x and W
    assert nplora.load_model(smollm2, compute="bfloat16").loss(ids, ids) == pytest.approx(3.32180, abs=5e-2)


def test_int8_changes_the_loss_by_noise_that_its_rounding_explains(smollm2: Path, figure: Figure) -> None:
    """The noise differs by instruction set, so its size and its mean are compared with what theory says.

    Size: the changes of a token's loss are about linear in the relative errors of the products. bfloat16
    shows how large these changes are for a known error. It rounds x and W to 8 bits, with errors of about
    2⁻⁹ / √3 or 0.11 % each. int8 rounds x in blocks of 32 to steps of the largest |x| / 127. The largest |x|
    is at most √32 times the root mean square, so the error is at most √32 / 127 / √12 = 1.3 %, twelve times
    0.11 %.

    Mean: the first-order change of a loss -log p(y) is -(δ(y) - Σ p δ), where δ is the error of the logits.
    Its mean is 0 but for chance, which the standard error over the texts measures. The second-order change is
    half the variance of δ under p. If y is drawn from p, its mean is half the mean square of the first-order
    changes.
    """
    pytest.importorskip("tokenizers")
    lines = (dictionary.DATA / "valid.jsonl").read_text().splitlines()[::2]
    rows = [json.loads(line) for line in lines]
    tokenizer = nplora.load_model(smollm2).tokenizer
    texts = [np.array(tokenizer.encode(row["prompt"] + row["completion"])) for row in rows]
    batch = pack([(text, text) for text in texts])
    exact, bfloat16, int8 = (
        -nplora.load_model(smollm2, compute=compute).token_scores(batch).log_probs.astype(np.float64)
        for compute in ("float32", "bfloat16", "int8")
    )
    figure("change of the loss by int8", abs(int8.mean() / exact.mean() - 1))
    change = int8 - exact
    assert 1 < change.std() / (bfloat16 - exact).std() < 12
    by_text = [part.mean() for part in np.split(change, np.cumsum([len(text) - 1 for text in texts])[:-1])]
    standard_error = np.std(by_text, ddof=1) / math.sqrt(len(texts))
    assert -4 * standard_error < np.mean(by_text) < np.square(change).mean() / 2 + 4 * standard_error


def test_the_loss_that_decoding_computes_is_that_of_the_whole_sequences(smollm2: Path, ids: Array) -> None:
    lm = nplora.load_model(smollm2)
    batch = pack([(ids, ids), (ids[:7], ids[:7])])
    with inference():
        total = stepwise.loss(lm.config, lm.model, lm.lm_head, batch)
    assert total / batch.num_targets == pytest.approx(lm.loss_packed(batch), rel=1e-5)


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_the_greedy_answer_to_a_question(smollm2: Path, ids: Array, compute: str) -> None:
    lm = nplora.load_model(smollm2, compute=compute)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = lm.tokenizer.encode_chat(messages, add_generation_prompt=True)
    cache = lm.new_cache(1, len(prompt) + 20)
    logits, answer = lm.decode([prompt], [0], cache), []
    while (token := int(logits[0].argmax())) != lm.tokenizer.eos_id:
        answer.append(token)
        logits = lm.decode([token], [0], cache)
    assert lm.tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_logits_gradients_and_training_are_those_of_torch(
    smollm2: Path, ids: Array, theirs: Any, figure: Figure
) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    lm, tokens = nplora.load_model(smollm2), torch.from_numpy(ids)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits[0].numpy()
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=1e-3)
    figure("error of a logit", np.abs(lm.logits(ids) - expected).max())

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(theirs, config)
    lm.add_lora(rank=8, alpha=16)
    rng = np.random.default_rng(0)
    layers = lm.adapter_layers()
    pairs = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            layer: Any = layers[module]
            order = layer.row_order if ".lora_B" in name else None
            ours = "A" if ".lora_B" in name else "B"
            value = 0.01 * rng.standard_normal(parameter.shape, np.float32)
            getattr(layer, ours)[...] = value if order is None else value[order]
            parameter.data.copy_(torch.from_numpy(value))
            pairs.append((f"{module}.{ours}", parameter, order))
    assert len(pairs) == len(lm.parameters()) == 2 * 210

    optimizer = nplora.AdamW(lr=1e-3, weight_decay=0.01)
    their_optimizer = torch.optim.AdamW([p for _, p, _ in pairs], lr=1e-3, weight_decay=0.01)
    for step in range(10):
        # Torch's loss in float32 errs by 1e-5, more than nplora's: 49,152 terms, summed by eight AVX2 lanes.
        logits = model(tokens).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        their_optimizer.zero_grad()
        loss.backward()
        batch = pack([(ids, ids)])
        lm.zero_grad()
        total = lm.forward_backward(batch, 1 / batch.num_targets)
        assert total / batch.num_targets == pytest.approx(loss.item(), abs=1e-4)
        figure("difference of a loss in ten steps", abs(total / batch.num_targets - loss.item()))
        if step == 0:
            found = {p.name: p.grad for p in lm.parameters()}
            for name, parameter, order in pairs:
                gradient = parameter.grad.numpy() if order is None else parameter.grad.numpy()[order]
                error = np.abs(found[name] - gradient).max() / np.abs(gradient).max()
                assert error <= 1e-3, name
                figure("error of a gradient, relative", error)
        optimizer.step(lm.parameters())
        their_optimizer.step()
    assert loss.item() < 1
