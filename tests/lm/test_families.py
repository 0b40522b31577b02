"""Each family against transformers and PEFT, as tiny random models of several shapes and seeds."""

import contextlib
import copy
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from figures import Figure
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate
from nplora.models import families
from nplora.models.footprint import Adapted
from nplora.models.packing import IGNORED, pack
from nplora.models.positions import packed_positions
from nplora.nn.module import saved_nbytes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
torch_models = pytest.importorskip("torch_models")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

Array = np.ndarray[Any, Any]
FAMILIES = list(torch_models.FAMILIES)
SHAPES = list(torch_models.SHAPES)
EPS = float(np.finfo(np.float32).eps)
CASES = [(family, shape) for family in torch_models.KINDS for shape in SHAPES]


def model_of(family: str, shape: str, seed: int, directory: Path, form: str = "safetensors") -> Any:
    theirs = torch_models.make(family, shape, seed)
    return theirs, nplora.load_model(torch_models.save(theirs, directory, form, family))


def ids_for(theirs: Any, rows: int = 2, length: int = 19) -> Array:
    return np.random.default_rng(11).integers(0, theirs.config.vocab_size, (rows, length))


def relative(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_every_family_is_compared_with_transformers() -> None:
    compared = {
        getattr(transformers, torch_models.config_class(kind)).model_type
        for kind in torch_models.FAMILIES.values()
    }
    known = {family.model_type for family in families.FAMILIES} - {*small_models.UNKNOWN_TO_TRANSFORMERS}
    assert compared == known


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_logits_and_loss_are_those_of_a_model_in_float64(
    family: str, shape: str, seed: int, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = model_of(family, shape, seed, tmp_path)
    ids = ids_for(theirs)
    labels = ids.copy()
    labels[0, :7] = IGNORED
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        wanted = exact(torch.from_numpy(ids), labels=torch.from_numpy(labels))
        float32 = theirs(torch.from_numpy(ids)).logits.numpy()
    logits = wanted.logits.numpy()
    error, theirs_error = relative(ours.logits(ids), logits), relative(float32, logits)
    figure("error of a logit, of the largest", error)
    figure("error of a logit of torch in float32, of the largest", theirs_error)
    # 2e-5 of the largest, where float32 torch itself comes so near.
    assert error <= max(2e-5, 2 * theirs_error)
    loss, wanted_loss = ours.loss(ids, labels), wanted.loss.item()
    figure("error of a loss, relative", abs(loss / wanted_loss - 1))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)


class InDouble(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
    """Computes in float64 what transformers always computes in float32: norms, softmax, rotation angles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_gradients_are_as_near_to_float64_as_those_of_torch(
    family: str, shape: str, tmp_path: Path, figure: Figure
) -> None:
    """Together the gradients are at most twice as far off as torch's in float32.

    Both round equally often, so the error of one factor may be a fraction of that of torch, or a multiple.
    """
    errors, allowed = [], []
    for seed in (3, 4):
        theirs, ours = model_of(family, shape, seed, tmp_path)
        ids = ids_for(theirs)
        ours.add_lora(rank=3, alpha=5)
        random = np.random.default_rng(seed)
        for parameter in ours.parameters():
            parameter.value[...] = 0.1 * random.standard_normal(parameter.value.shape)
        adapter = tmp_path / f"adapter-{seed}"
        nplora.save_adapter(ours, adapter)
        exact, float32 = (
            torch_gradients(theirs, adapter, ids, dtype) for dtype in (torch.float64, torch.float32)
        )
        batch = pack(zip(ids, ids, strict=True))
        ours.forward_backward(batch, 1 / batch.num_targets)
        assert {p.name for p in ours.parameters()} == exact.keys()
        for parameter in ours.parameters():
            wanted = exact[parameter.name]
            errors.append(relative(parameter.grad, wanted))
            allowed.append(max(EPS, relative(float32[parameter.name], wanted)))
    ratios = np.array(errors) / allowed
    figure(
        "errors of all gradients, over those of torch in float32",
        np.linalg.norm(errors) / np.linalg.norm(allowed),
    )
    assert np.linalg.norm(errors) <= 2 * np.linalg.norm(allowed)
    assert np.median(ratios) <= 1.5
    assert max(ratios) <= 8


def torch_gradients(theirs: Any, adapter: Path, ids: Array, dtype: Any) -> dict[str, Array]:
    """PEFT's gradients by our parameters' names."""
    base = copy.deepcopy(theirs).to(dtype)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).to(dtype)
    tokens = torch.from_numpy(ids)
    with InDouble() if dtype is torch.float64 else contextlib.nullcontext():
        model(tokens, labels=tokens).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{layer}.{'B' if factor.startswith('A') else 'A'}"] = parameter.grad.numpy()
    return found


def greedy(theirs: Any, prompt: Array, count: int) -> list[int]:
    """The likeliest tokens, without a cache."""
    ids = list(map(int, prompt))
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_greedy_tokens_are_those_of_transformers(family: str, shape: str, tmp_path: Path) -> None:
    """With a cache, past a window's length; and its logits are those of a pass without one."""
    theirs, ours = model_of(family, shape, 5, tmp_path)
    prompt = ids_for(theirs, 1, 17 if "longrope" in family else 9)[0]  # which a cache rotates as a long text
    cache, found, ids = ours.new_cache(1, 40), list[int](), prompt
    for _ in range(20):
        logits = ours.decode(ids[None], [0], cache)[0]
        plain = ours.logits(np.concatenate([prompt, np.array(found, int)]))[-1]
        assert relative(logits, plain) <= 2e-5
        found.append(int(logits.argmax()))
        ids = np.array(found[-1:])
    assert found == greedy(theirs, prompt, 20)


def test_each_packed_text_rotates_by_its_own_length(tmp_path: Path) -> None:
    """With LongRoPE: a text within the original context by other factors than a longer one beside it."""
    theirs, ours = model_of("phi3 with longrope", "as usual", 7, tmp_path)
    texts = [ids_for(theirs, 1, length)[0] for length in (12, 30, 16, 17)]
    expected = []
    for text in texts:
        tokens = torch.from_numpy(text)[None]
        with torch.no_grad():
            wanted = theirs(tokens, labels=tokens)
        assert relative(ours.logits(text), wanted.logits[0].numpy()) <= 2e-5
        expected.append(wanted.loss.item() * (len(text) - 1))
    batch = pack([(text, text) for text in texts])
    assert ours.loss_packed(batch) * batch.num_targets == pytest.approx(sum(expected), rel=1e-5)
    cache = ours.new_cache(1, 16)
    assert relative(ours.decode(texts[0][None], [0], cache)[0], ours.logits(texts[0])[-1]) <= 2e-5


class Spelled:
    """A tokenizer of numbers: the text "3 1" has the tokens 3 and 1."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_ids = vocab_size, frozenset[int]()

    def encode_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def stream(self, context: Any) -> Any:
        return types.SimpleNamespace(push=lambda token: f"{token} ", flush=lambda: "")


def test_a_text_that_outgrows_the_original_context_is_generated_as_by_transformers(tmp_path: Path) -> None:
    """With LongRoPE: the factors follow the text's length, not how much longer it might become."""
    theirs, ours = model_of("phi3 with longrope", "as usual", 9, tmp_path)
    calls = list[tuple[int, ...]]()

    def decode(ids: Any, slots: Any, cache: Any) -> Any:
        calls.append(np.shape(ids))
        return ours.decode(ids, slots, cache)

    lm = types.SimpleNamespace(
        tokenizer=Spelled(ours.config.vocab_size), config=ours.config, new_cache=ours.new_cache, decode=decode
    )
    prompts = [ids_for(theirs, 1, length)[0] for length in (9, 14, 16, 17, 30)]
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    for count in (3, 12):
        expected = [greedy(theirs, prompt, count) for prompt in prompts]
        found = generate(lm, texts, Sampling(max_new_tokens=count))
        assert [[int(word) for word in text.split()] for text in found] == expected
    assert calls.count((1, 17)) == 2 + 1 + 3, "the prompt of 17 tokens, and texts that are read again"


def test_each_continuation_rotates_by_its_own_length(tmp_path: Path) -> None:
    """With LongRoPE: the score of a short continuation does not depend on a long one beside it."""
    theirs, ours = model_of("phi3 with longrope", "as usual", 10, tmp_path)
    prompts = [ids_for(theirs, 1, length)[0] for length in (13, 15, 16)]  # the original context has 16 tokens
    answers = [[ids_for(theirs, 1, length)[0] for length in (9, 1, 3, 4, 2)]] * len(prompts)
    found = ours.continuation_scores(prompts, answers)
    for prompt, several, scores in zip(prompts, answers, found, strict=True):
        for tokens, score in zip(several, scores, strict=True):
            with torch.no_grad():
                logits = theirs(torch.from_numpy(np.append(prompt, tokens))[None]).logits[0].double()
            wanted = logits.log_softmax(-1)[len(prompt) - 1 : -1][range(len(tokens)), tokens]
            np.testing.assert_allclose(score.log_probs, wanted.numpy(), rtol=0, atol=2e-5)


def test_a_text_in_a_batch_rotates_as_it_does_alone(tmp_path: Path) -> None:
    """With LongRoPE: a short prompt beside one beyond the original context keeps the short factors."""
    theirs, ours = model_of("phi3 with longrope", "as usual", 8, tmp_path)
    short, long = (ids_for(theirs, 1, length)[0] for length in (5, 30))
    cache = ours.new_cache(2, 40)
    cache.limits[0] = 16
    found = [ours.decode(ids[None], [slot], cache)[0] for slot, ids in enumerate((short, long))]
    for ids, logits in zip((short, long), found, strict=True):
        assert relative(logits, ours.logits(ids)[-1]) <= 2e-5
    tokens = np.array([int(logits.argmax()) for logits in found])
    for ids, token, logits in zip((short, long), tokens, ours.decode(tokens, [0, 1], cache), strict=True):
        assert relative(logits, ours.logits(np.append(ids, token))[-1]) <= 2e-5
    with pytest.raises(ValueError, match="a slot would hold 17 tokens, but has room for 16"):
        ours.decode(np.zeros((1, 11), int), [0], cache)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_is_the_same_model(family: str, shape: str, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it, and as ours does."""
    theirs, ours = model_of(family, shape, 6, tmp_path)
    ids = ids_for(theirs)
    (tmp_path / "theirs").mkdir()
    stored = nplora.load_model(torch_models.save(theirs, tmp_path / "theirs", "gguf", family))
    nplora.model_to_gguf(tmp_path, tmp_path / "ours.gguf")
    converted = nplora.load_model(tmp_path / "ours.gguf")
    wanted = ours.logits(ids)
    for other in (stored, converted):
        assert relative(other.logits(ids), wanted) <= 2e-5
        assert other.base_digest() == ours.base_digest()


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_with_another_arithmetic_is_the_same_model(family: str, form: str, tmp_path: Path) -> None:
    theirs = torch_models.make(family)
    path = torch_models.save(theirs, tmp_path, form, family)
    ids = ids_for(theirs)
    for one, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        twin = nplora.load_model(path, compute=one).with_compute(other)
        assert np.array_equal(twin.logits(ids), nplora.load_model(path, compute=other).logits(ids))


@pytest.mark.parametrize("family", list(torch_models.KINDS))
def test_a_block_says_what_it_keeps(family: str, tmp_path: Path) -> None:
    """Byte for byte what a pass keeps, with adapters and without, in each arithmetic."""
    theirs = torch_models.make(family)
    path = torch_models.save(theirs, tmp_path, "safetensors", family)
    for compute in ("float32", "bfloat16", "int8"):
        ours = nplora.load_model(path, compute=compute)
        check_footprint(ours, compute != "float32", {})
        ours.add_lora(rank=3, targets="all-linear")
        widths = {
            name.rpartition(".")[2]: ours.adapter_layers()[name].weight.shape[0]
            for name in ours.adapter_layers()
        }
        check_footprint(ours, compute != "float32", widths)


def check_footprint(ours: LanguageModel, narrow: bool, outputs: dict[str, int]) -> None:
    n = 8
    for block in ours.model.layers:
        x = np.zeros((n, ours.config.hidden_size), np.float32)
        _, saved = block.run(x, packed_positions(np.array([0, n])))
        assert saved_nbytes(saved) == n * block.footprint(Adapted(3, False, outputs), narrow).saved
