"""Language models against transformers and PEFT: logits, losses, gradients, training, adapters both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.lm import LanguageModel
from nplora.models.packing import IGNORED, pack

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
torch_models = pytest.importorskip("torch_models")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

Array = np.ndarray[Any, Any]
FAMILIES = list(torch_models.FAMILIES)
FORMS = ["safetensors", "gguf"]

# Sums of at most 72 float32 products, three blocks one after the other, logits of the order of 10: the two
# orders of summation differ by about 72 eps relative to the norms, a tenth of this.
TOLERANCE = 1e-3


def some_ids(rows: int = 3, length: int = 21) -> Array:
    return np.random.default_rng(7).integers(0, torch_models.SIZES["vocab_size"], (rows, length))


def some_labels(ids: Array) -> Array:
    labels = ids.copy()
    labels[0, :9] = IGNORED
    labels[1, -4:] = IGNORED
    return labels


def loaded(family: str, form: str, directory: Path, **options: Any) -> tuple[Any, LanguageModel]:
    theirs = torch_models.make(family)
    return theirs, nplora.load_model(torch_models.save(theirs, directory, form, family), **options)


def adapted(theirs: Any, ours: LanguageModel, directory: Path, freeze_B: bool = False, **options: Any) -> Any:
    """PEFT's model with random factors, which ours has loaded."""
    linears = {
        name.rpartition(".")[2] for name, _ in theirs.named_modules() if "layers" in name and "_proj" in name
    }
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": sorted(linears), **options}
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "theirs", save_embedding_layers=False)
    ours.add_lora(
        rank=4, alpha=6, targets=settings["target_modules"], use_dora=settings.get("use_dora", False),
        freeze_B=freeze_B,
    )  # fmt: skip
    nplora.load_adapter(ours, directory / "theirs")
    return model


def logits_of(model: Any, ids: Array) -> Array:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()  # type: ignore[no-any-return]


def gradients_of(model: Any, ours: LanguageModel) -> dict[str, Array]:
    """PEFT's gradients by our parameters' names, rows in our order."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        gradient = parameter.grad.numpy().copy()
        if "embedding" in name:  # their factors are transposed
            key, gradient = "A" if "embedding_A" in name else "B", gradient.T
        else:
            key = "A" if ".lora_B" in name else "m" if "magnitude" in name else "B"
        order = ours.adapter_layers()[module].row_order  # type: ignore[attr-defined]
        if order is not None and key != "B":
            gradient = gradient[order]
        found[f"{module}.{key}"] = gradient
    return found


def assert_gradients_agree(ours: LanguageModel, expected: dict[str, Array], tolerance: float) -> float:
    """Returns the largest error of a factor's gradient, relative to its largest element."""
    found = {p.name: p.grad for p in ours.parameters()}
    assert found.keys() == expected.keys()
    errors = {name: np.abs(found[name] - want).max() / np.abs(want).max() for name, want in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors
    return float(max(errors.values()))


@pytest.mark.parametrize("form", [*FORMS, "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_those_of_transformers(
    family: str, form: str, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = loaded(family, form, tmp_path)
    ids, labels = some_ids(), some_labels(some_ids())
    np.testing.assert_allclose(ours.logits(ids), logits_of(theirs, ids), rtol=0, atol=TOLERANCE)
    figure("error of a logit", np.abs(ours.logits(ids) - logits_of(theirs, ids)).max())
    np.testing.assert_allclose(ours.logits(ids[0]), logits_of(theirs, ids)[0], rtol=0, atol=TOLERANCE)
    expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss.item()
    assert ours.loss(ids, labels) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    """In pieces of many tokens, of few and of one: past a window's length, and up to the last position."""
    theirs, ours = loaded(family, "gguf", tmp_path)
    length = torch_models.SIZES["max_position_embeddings"]
    ids = some_ids(2, length)
    expected, cache = logits_of(theirs, ids), ours.new_cache(2, length)
    end = 0
    for count in (17, 1, 1, 2, 9, 1, 33):
        end += count
        logits = ours.decode(ids[:, end - count : end], [0, 1], cache)
        np.testing.assert_allclose(logits, expected[:, end - 1], rtol=0, atol=TOLERANCE)
    assert end == length


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_torch(
    family: str, form: str, checkpoint_blocks: bool, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = loaded(family, form, tmp_path)
    model = adapted(theirs, ours, tmp_path)
    ours.model.checkpoint_blocks = checkpoint_blocks
    ids, labels = some_ids(), some_labels(some_ids())
    loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    batch = pack(zip(ids, labels, strict=True))
    total = ours.forward_backward(batch, 1 / batch.num_targets)
    assert total / batch.num_targets == pytest.approx(loss.item(), abs=1e-4)
    error = assert_gradients_agree(ours, gradients_of(model, ours), TOLERANCE)
    figure("error of a gradient, relative", error)


def test_a_gated_unit_of_gelu_is_that_of_torch(tmp_path: Path) -> None:
    """Logits, decoding with a cache, and gradients."""
    theirs, ours = loaded("llama with gelu", "safetensors", tmp_path)
    ids = some_ids()
    expected, cache = logits_of(theirs, ids), ours.new_cache(len(ids), ids.shape[1])
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=TOLERANCE)
    decoded = ours.decode(ids, range(len(ids)), cache)
    np.testing.assert_allclose(decoded, expected[:, -1], rtol=0, atol=TOLERANCE)
    model = adapted(theirs, ours, tmp_path)
    model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    batch = pack(zip(ids, ids, strict=True))
    ours.forward_backward(batch, 1 / batch.num_targets)
    assert_gradients_agree(ours, gradients_of(model, ours), TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_gradients_of_dora_embedding_and_head_are_those_of_torch(
    family: str, form: str, tmp_path: Path
) -> None:
    theirs, ours = loaded(family, form, tmp_path)
    model = adapted(theirs, ours, tmp_path, target_modules=["q_proj", "down_proj"], use_dora=True)
    ids = some_ids()
    model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    batch = pack(zip(ids, ids, strict=True))
    ours.forward_backward(batch, 1 / batch.num_targets)
    assert_gradients_agree(ours, gradients_of(model, ours), TOLERANCE)

    theirs, ours = loaded(family, form, tmp_path)
    model = adapted(theirs, ours, tmp_path, target_modules=["k_proj", "embed_tokens", "lm_head"])
    model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    ours.forward_backward(batch, 1 / batch.num_targets)
    expected = gradients_of(model, ours)
    assert_gradients_agree(ours, expected, TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_training_have_the_losses_of_torch(
    family: str, form: str, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = loaded(family, form, tmp_path)
    model = adapted(theirs, ours, tmp_path)
    ids, labels = some_ids(), some_labels(some_ids())
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs_optimizer, optimizer = torch.optim.AdamW(trained, **settings), nplora.AdamW(**settings)
    losses = []
    for _ in range(10):
        loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
        theirs_optimizer.zero_grad()
        loss.backward()
        theirs_optimizer.step()
        losses.append(loss.item())
        found = ours.train_step(ids, labels, optimizer)
        assert found == pytest.approx(loss.item(), abs=1e-3)
        figure("difference of a loss in ten steps", abs(found - loss.item()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}],
    ids=["all", "DoRA", "embedding"],
)
def test_ten_steps_with_a_frozen_b_are_those_of_peft(
    options: dict[str, Any], recompute: bool, tmp_path: Path
) -> None:
    """B is PEFT's lora_A. The losses and the trained factors are compared."""
    theirs, ours = loaded("llama", "safetensors", tmp_path)
    model = adapted(theirs, ours, tmp_path, freeze_B=True, **options)
    ours.model.recompute = recompute
    frozen = {name: p for name, p in model.named_parameters() if ".lora_A" in name or "embedding_B" in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: parameter.numpy().copy() for name, parameter in frozen.items()}
    ids, labels, settings = some_ids(), some_labels(some_ids()), {"lr": 1e-2, "weight_decay": 0.01}
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs_optimizer, optimizer = torch.optim.AdamW(trained, **settings), nplora.AdamW(**settings)
    for step in range(10):
        loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
        theirs_optimizer.zero_grad()
        loss.backward()
        if step == 0:
            expected = gradients_of(model, ours)
        theirs_optimizer.step()
        assert ours.train_step(ids, labels, optimizer) == pytest.approx(loss.item(), abs=1e-3)
    assert expected.keys() == {parameter.name for parameter in ours.parameters()}
    assert not any(name.endswith(".B") for name in expected)
    assert not any(key.endswith(".B") for key in optimizer.state_dict())

    nplora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(torch_models.make("llama"), tmp_path / "ours")
    for name, parameter in back.named_parameters():
        if name in before:
            np.testing.assert_array_equal(parameter.detach().numpy(), before[name])
    np.testing.assert_allclose(logits_of(back, ids), logits_of(model, ids), rtol=0, atol=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_an_adapter_trained_here_answers_alike_in_peft_and_comes_back(
    family: str, form: str, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = loaded(family, form, tmp_path)
    ours.add_lora(rank=3, alpha=5, seed=1)
    optimizer, ids = nplora.AdamW(3e-2), some_ids()
    for _ in range(4):
        ours.train_step(ids, ids, optimizer)
    plain = logits_of(theirs, ids)
    nplora.save_adapter(ours, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    answers = ours.logits(ids)
    assert np.abs(answers - plain).max() > 0.5
    np.testing.assert_allclose(logits_of(model, ids), answers, rtol=0, atol=TOLERANCE)
    figure("error of a logit of an adapter in PEFT", np.abs(logits_of(model, ids) - answers).max())

    twin = nplora.load_model(tmp_path / "model.gguf" if form == "gguf" else tmp_path)
    model.save_pretrained(tmp_path / "back")
    twin.add_lora(rank=3, alpha=5)
    nplora.load_adapter(twin, tmp_path / "back")
    np.testing.assert_array_equal(twin.logits(ids), answers)
    with twin.disable_adapter():
        np.testing.assert_allclose(twin.logits(ids), plain, rtol=0, atol=TOLERANCE)
    twin.merge()
    np.testing.assert_allclose(twin.logits(ids), answers, rtol=0, atol=TOLERANCE)


def test_a_model_of_16_bit_shards_computes_in_bfloat16(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: products of three blocks agree with float32 to a few per cent of the logits."""
    torch_models.make("qwen2").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    theirs, ids = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), some_ids()
    plain, fast = nplora.load_model(tmp_path), nplora.load_model(tmp_path, compute="bfloat16")
    expected = logits_of(theirs, ids)
    np.testing.assert_allclose(plain.logits(ids), expected, rtol=0, atol=TOLERANCE)
    assert 0 < np.abs(fast.logits(ids) - expected).max() < 0.1 * np.abs(expected).max()

    model = adapted(theirs, fast, tmp_path)
    model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    batch = pack(zip(ids, ids, strict=True))
    fast.forward_backward(batch, 1 / batch.num_targets)
    assert_gradients_agree(fast, gradients_of(model, fast), 0.2)


# ---- trained tokens, embedding and head ----

BOTH = {"embed_tokens": [7, 3], "lm_head": [7, 3]}
# family, PEFT's options, our options
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tokens, untied": ("llama", {"trainable_token_indices": BOTH}, {"trainable_tokens": [7, 3]}),
    "tokens, tied": ("qwen2", {"trainable_token_indices": [7, 3]}, {"trainable_tokens": [7, 3]}),
    "tokens, tied, scaled": ("gemma3", {"trainable_token_indices": [7, 3]}, {"trainable_tokens": [7, 3]}),
    "tokens, multipliers": ("granite", {"trainable_token_indices": BOTH}, {"trainable_tokens": [7, 3]}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}, {"modules_to_save": "lm_head"}),
    "both, untied": ("llama", {"modules_to_save": list(BOTH)}, {"modules_to_save": list(BOTH)}),
    "both, tied": ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
                   {"modules_to_save": "lm_head"}),
}  # fmt: skip


def gradients_with_rows(model: Any, ours: LanguageModel) -> dict[str, Array]:
    """PEFT's gradients by our parameters' names, in float32, with those of trained rows."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = name.removeprefix("base_model.model.")
        for part, ending in ((".token_adapter.", "rows"), (".modules_to_save.", "weight")):
            if part in layer:
                found[f"{layer.partition(part)[0]}.{ending}"] = parameter.grad.numpy()
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is f for f in factors)]
    for parameter in others:
        parameter.requires_grad_(False)
    found |= gradients_of(model, ours)
    for parameter in others:
        parameter.requires_grad_(True)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ROWS)
def test_trained_rows_are_those_of_peft_in_float64(
    case: str, form: str, tmp_path: Path, figure: Figure
) -> None:
    """Logits, loss and gradients; the files of both, read by the other."""
    family, theirs_options, ours_options = ROWS[case]
    theirs, ours = loaded(family, form, tmp_path)
    linears = sorted({n.rpartition(".")[2] for n, _ in theirs.named_modules() if n.endswith("_proj")})
    settings = {"r": 4, "lora_alpha": 6, "target_modules": linears}
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings, **theirs_options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours.add_lora(rank=4, alpha=6, targets=linears, **ours_options)
    nplora.load_adapter(ours, tmp_path / "theirs")
    model.double()

    ids = some_ids()
    ids[:, 2::3] = 7
    expected = logits_of(model, ids)
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=TOLERANCE)
    labels = some_labels(ids)
    loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    batch = pack(zip(ids, labels, strict=True))
    total = ours.forward_backward(batch, 1 / batch.num_targets)
    assert total / batch.num_targets == pytest.approx(loss.item(), abs=1e-5)
    error = assert_gradients_agree(ours, gradients_with_rows(model, ours), 5e-5)
    figure("error of a gradient with trained rows, relative to float64", error)

    logits, saved = ours.forward(ids)
    assert saved is not None
    ours.zero_grad()
    dlogits = torch.randn(*logits.shape, dtype=torch.float64)
    model.zero_grad()
    model(torch.from_numpy(ids)).logits.backward(dlogits)
    ours.backward(dlogits.numpy(), saved)
    assert_gradients_agree(ours, gradients_with_rows(model, ours), 5e-5)

    nplora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(torch_models.make(family), tmp_path / "ours")
    np.testing.assert_allclose(logits_of(again, ids), expected, rtol=0, atol=TOLERANCE)
    twin = nplora.load_model(tmp_path / "model.gguf" if form == "gguf" else tmp_path)
    nplora.finetuning.attach_adapter(twin, tmp_path / "theirs")
    np.testing.assert_array_equal(twin.logits(ids), ours.logits(ids))
    cache = twin.new_cache(len(ids), ids.shape[1])
    np.testing.assert_allclose(
        twin.decode(ids, range(len(ids)), cache), expected[:, -1], rtol=0, atol=TOLERANCE
    )


def test_ten_steps_with_trained_tokens_have_the_losses_of_torch(tmp_path: Path) -> None:
    """With weight decay, which PEFT's rows get as all other parameters do."""
    theirs, ours = loaded("qwen2", "safetensors", tmp_path)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=[7, 3]
    )
    model = peft.get_peft_model(theirs, config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours.add_lora(rank=4, alpha=6, targets="q_proj", trainable_tokens=[7, 3])
    nplora.load_adapter(ours, tmp_path / "theirs")
    ids = some_ids()
    ids[:, 2::3] = 7
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs_optimizer, optimizer = torch.optim.AdamW(trained, **settings), nplora.AdamW(**settings)
    for _ in range(10):
        loss = model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
        theirs_optimizer.zero_grad()
        loss.backward()
        theirs_optimizer.step()
        assert ours.train_step(ids, ids, optimizer) == pytest.approx(loss.item(), abs=1e-3)


# ---- activated LoRA ----

INVOCATION = [11, 4]


def ids_with_invocations() -> Array:
    """Once, twice, at the very end, at the start, and never."""
    ids = np.where(some_ids(5) == 11, 12, some_ids(5))
    for row, place in ((0, 7), (1, 3), (1, 12), (2, 19), (3, 0)):
        ids[row, place : place + 2] = INVOCATION
    return ids


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_activated_lora_is_that_of_peft_in_float64(
    family: str, checkpoint_blocks: bool, tmp_path: Path, figure: Figure
) -> None:
    theirs, ours = loaded(family, "gguf", tmp_path)
    linears = sorted({n.rpartition(".")[2] for n, _ in theirs.named_modules() if n.endswith("_proj")})
    settings = {"r": 4, "lora_alpha": 6, "target_modules": linears, "alora_invocation_tokens": INVOCATION}
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    ours.add_lora(rank=4, alpha=6, targets=linears, invocation=INVOCATION)
    nplora.load_adapter(ours, tmp_path / "theirs")
    ours.model.recompute = checkpoint_blocks
    model.double()
    ids = ids_with_invocations()
    expected = logits_of(model, ids)
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=TOLERANCE)
    with ours.disable_adapter():
        base = ours.logits(ids)
    np.testing.assert_allclose(ours.logits(ids)[0, :7], base[0, :7], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.logits(ids)[4], base[4], rtol=0, atol=1e-4)
    assert np.abs(ours.logits(ids)[0, 7:] - base[0, 7:]).max() > 0.1

    labels = some_labels(ids)
    loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    batch = pack(zip(ids, labels, strict=True))
    total = ours.forward_backward(batch, 1 / batch.num_targets)
    assert total / batch.num_targets == pytest.approx(loss.item(), abs=1e-5)
    error = assert_gradients_agree(ours, gradients_of(model, ours), 5e-5)
    figure("error of a gradient of activated LoRA, relative to float64", error)
    assert ours.loss_packed(batch) == pytest.approx(loss.item(), abs=1e-5)

    cache = ours.new_cache(len(ids), ids.shape[1])
    for row in range(len(ids)):
        cache.activate(row, ids[row])
    for first, stop in ((0, 8), (8, 9), (9, 21)):
        logits = ours.decode(ids[:, first:stop], range(len(ids)), cache)
        np.testing.assert_allclose(logits, expected[:, stop - 1], rtol=0, atol=TOLERANCE)

    nplora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(torch_models.make(family), tmp_path / "ours")
    assert again.peft_config["default"].alora_invocation_tokens == INVOCATION
    np.testing.assert_allclose(logits_of(again, ids), expected, rtol=0, atol=TOLERANCE)
    nplora.adapter_to_gguf(tmp_path / "ours", tmp_path / "a.gguf", tmp_path / "model.gguf")
    twin = nplora.load_model(tmp_path / "model.gguf")
    nplora.finetuning.attach_adapter(twin, tmp_path / "a.gguf")
    np.testing.assert_allclose(twin.logits(ids), expected, rtol=0, atol=TOLERANCE)
