"""Separate ranks and alphas for some layers (PEFT's rank_pattern and alpha_pattern)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.lm import adapting
from small_llama import save_small_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


def strengths(lm: nplora.LanguageModel) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer, by the name within "model.layers"."""
    return {
        name.removeprefix("model.layers."): (layer.rank, layer.alpha)
        for name, layer in lm.adapter_layers().items()
    }


def test_a_name_gives_its_layers_a_rank_and_an_alpha(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(
        rank=2, alpha=4, targets="q_proj,up_proj,down_proj",
        rank_pattern={"q_proj": 5, "layers.1.mlp": 3}, alpha_pattern="layers.0=6,mlp.down_proj=7",
    )  # fmt: skip
    assert strengths(lm) == {
        "0.self_attn.q_proj": (5, 6), "0.mlp.up_proj": (2, 6), "0.mlp.down_proj": (2, 6),
        "1.self_attn.q_proj": (5, 4), "1.mlp.up_proj": (3, 4), "1.mlp.down_proj": (3, 7),
    }  # fmt: skip
    layers = lm.adapter_layers()
    assert all(layer.A.shape[1] == layer.B.shape[0] == layer.rank for layer in layers.values())
    assert layers["model.layers.1.mlp.down_proj"].scale == 7 / 3


def test_the_first_name_that_matches_decides_and_parts_of_words_do_not(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, targets="q_proj", rank_pattern="1.self_attn=7,q_proj=3")
    assert [rank for rank, _ in strengths(lm).values()] == [3, 7]
    names = ["model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"]
    assert adapting.by_layer("op", "rank_pattern", {"layers.1": 4}, names) == {names[0]: 4}
    with pytest.raises(ValueError, match=r"^op: rank_pattern has 'proj', which matches no adapted layer"):
        adapting.by_layer("op", "rank_pattern", {"proj": 4}, names)


def test_layers_of_other_ranks_keep_their_initial_factors(model: Path) -> None:
    """Each layer draws its factors from its own stream: another layer's rank does not change them."""
    plain, patterned = (nplora.load_model(model) for _ in range(2))
    plain.add_lora(rank=4, targets="q_proj,up_proj")
    patterned.add_lora(rank=4, targets="q_proj,up_proj", rank_pattern={"q_proj": 2})
    for name, layer in plain.adapter_layers().items():
        if name.endswith("up_proj"):
            assert np.array_equal(layer.B, patterned.adapter_layers()[name].B)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("rank_pattern", {"q_prj": 4}, ValueError, "rank_pattern has 'q_prj'.*; the nearest names: q_proj"),
        (
            "rank_pattern",
            {"k_proj": 4},
            ValueError,
            "rank_pattern has 'k_proj', which matches no adapted layer",
        ),
        ("rank_pattern", {"q_proj": 0}, ValueError, r"rank_pattern\['q_proj'\] is 0, expected at least 1"),
        (
            "rank_pattern",
            {"q_proj": 1 << 20},
            ValueError,
            r"rank_pattern\['q_proj'\] is 1048576, expected at most",
        ),
        ("rank_pattern", {"q_proj": 2.5}, TypeError, r"rank_pattern\['q_proj'\] is 2.5, expected an integer"),
        ("rank_pattern", "q_proj=2.5", TypeError, r"rank_pattern\['q_proj'\] is 2.5, expected an integer"),
        ("rank_pattern", "q_proj", ValueError, "rank_pattern is 'q_proj', expected pairs of a layer name"),
        ("rank_pattern", "=4", ValueError, "rank_pattern is '=4', expected pairs"),
        ("rank_pattern", "q_proj=4,q_proj=5", ValueError, "expected pairs of a layer name"),
        ("rank_pattern", ["q_proj"], TypeError, "rank_pattern is a list, expected a dictionary"),
        (
            "alpha_pattern",
            {"q_proj": float("nan")},
            ValueError,
            r"alpha_pattern\['q_proj'\] is nan, expected a fin",
        ),
        ("alpha_pattern", "q_proj=inf", ValueError, r"alpha_pattern\['q_proj'\] is inf, expected a finite"),
        ("alpha_pattern", {"q_proj": -1}, ValueError, r"alpha_pattern\['q_proj'\] is -1, expected above 0"),
    ],
)
def test_wrong_patterns_are_refused_and_nothing_is_changed(
    option: str, value: Any, error: type[Exception], message: str, model: Path
) -> None:
    lm = nplora.load_model(model)
    with pytest.raises(error, match=f"^add_lora: .*{message}"):
        lm.add_lora(rank=2, targets="q_proj", **{option: value})
    assert not lm.adapter_layers()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_peft_makes_the_same_layers_and_reads_ours_back(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    pytest.importorskip("gguf")
    torch_models = pytest.importorskip("torch_models")
    theirs = torch_models.make("llama")
    lm = nplora.load_model(torch_models.save(theirs, tmp_path / "model", "safetensors", "llama"))
    ranks, alphas = {"layers.1.mlp.up_proj": 7, "q_proj": 5}, {"up_proj": 3, "layers.0.self_attn.q_proj": 9.5}
    given = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", rank_pattern=ranks, alpha_pattern=alphas, **given)
    made = peft.get_peft_model(theirs, config)
    lm.add_lora(2, 4, "q_proj,up_proj", rank_pattern=ranks, alpha_pattern=alphas, init="gaussian", seed=3)
    assert scales_of(made) == {name: (layer.rank, layer.scale) for name, layer in lm.adapter_layers().items()}

    nplora.save_adapter(lm, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert len(saved["rank_pattern"]) >= 1
    assert len(saved["alpha_pattern"]) >= 1
    read = peft.PeftModel.from_pretrained(torch_models.make("llama"), tmp_path / "adapter")
    assert scales_of(read) == scales_of(made)
    ids = np.random.default_rng(7).integers(0, torch_models.SIZES["vocab_size"], (2, 11))
    with torch.no_grad():
        expected = read(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(lm.logits(ids), expected, atol=1e-3)


def scales_of(model: Any) -> dict[str, tuple[int, float]]:
    """Rank and scale of each layer of a PEFT model."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
