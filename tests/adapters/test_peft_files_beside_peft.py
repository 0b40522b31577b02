"""The real PEFT as oracle: an adapter saved on either side gives the same output on the other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.formats.errors import FormatError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

Array = np.ndarray[Any, Any]
VOCAB, WIDTH, HIDDEN, OUT = 13, 12, 10, 7
IDS = np.arange(VOCAB).reshape(1, -1)

# Both sides compute in float32: four products of at most 12 terms on the way, each within 12 eps = 7e-7 of
# its norms, which keeps well inside the promised 1e-5.
TOLERANCE = 1e-5


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "emb.weight": (VOCAB, WIDTH),
        "blocks.0.weight": (HIDDEN, WIDTH),
        "blocks.0.bias": (HIDDEN,),
        "blocks.1.weight": (WIDTH, HIDDEN),
        "blocks.1.bias": (WIDTH,),
        "head.weight": (OUT, WIDTH),
        "head.bias": (OUT,),
    }
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


class TorchNet(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(VOCAB, WIDTH)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)])
        self.head = torch.nn.Linear(WIDTH, OUT)
        self.load_state_dict({name: torch.from_numpy(w) for name, w in weights().items()})

    def forward(self, ids: Any) -> Any:
        h = self.emb(ids)
        return self.head(h + self.blocks[1](torch.tanh(self.blocks[0](h))))


class Net(nplora.Module):
    """The same model here: `lora` maps the names of the adapted layers to the options of each."""

    def __init__(self, lora: dict[str, dict[str, Any]], train_head: bool = False) -> None:
        w = weights()

        def linear(name: str) -> nplora.Module:
            weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
            if name in lora:
                return nplora.LoRALinear(weight, bias=bias, init="gaussian", rng=len(name), **lora[name])
            return nplora.Linear(weight, bias, trainable=train_head and name == "head")

        if "emb" in lora:
            self.emb: nplora.Module = nplora.LoRAEmbedding(
                w["emb.weight"], init="gaussian", rng=1, **lora["emb"]
            )
        else:
            self.emb = nplora.Embedding(w["emb.weight"])
        self.blocks = [linear("blocks.0"), linear("blocks.1")]
        self.act = nplora.Tanh()
        self.head = linear("head")

    def forward(self, ids: Any) -> tuple[Array, Any]:
        h = self.emb(ids)
        return self.head(h + self.blocks[1](self.act(self.blocks[0](h)))), None


def scattered(model: nplora.Module) -> nplora.Module:
    """Every trainable array moved, so that magnitudes and heads are not those of the base model."""
    rng = np.random.default_rng(5)
    for parameter in model.parameters():
        parameter.value[...] += rng.normal(0, 0.2, parameter.value.shape)
    return model


def difference(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def torch_output(model: Any) -> Array:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS)).numpy()  # type: ignore[no-any-return]


def alike(*names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {name: dict(options) for name in names}


CASES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    # our options by layer                                            PEFT's configuration
    "plain LoRA": (
        alike("blocks.0", "blocks.1", rank=4, alpha=6),
        {"r": 4, "lora_alpha": 6, "target_modules": ["blocks.0", "blocks.1"]},
    ),
    "rsLoRA": (
        alike("blocks.0", "blocks.1", rank=4, alpha=6, use_rslora=True),
        {"r": 4, "lora_alpha": 6, "target_modules": ["blocks.0", "blocks.1"], "use_rslora": True},
    ),
    "DoRA": (
        alike("blocks.0", "blocks.1", rank=4, alpha=6, use_dora=True),
        {"r": 4, "lora_alpha": 6, "target_modules": ["blocks.0", "blocks.1"], "use_dora": True},
    ),
    "patterns": (
        {
            "blocks.0": {"rank": 2, "alpha": 6},
            "blocks.1": {"rank": 4, "alpha": 3},
            "head": {"rank": 4, "alpha": 6},
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["blocks.0", "blocks.1", "head"],
            "rank_pattern": {r"blocks\.0": 2},
            "alpha_pattern": {"^blocks.[1-9]": 3},
        },
    ),
    "embedding": (
        alike("emb", "blocks.0", rank=3, alpha=5),
        {"r": 3, "lora_alpha": 5, "target_modules": ["emb", "blocks.0"]},
    ),
    "embedding with rsLoRA": (
        {"emb": {"rank": 3, "alpha": 5, "use_rslora": True}},
        {"r": 3, "lora_alpha": 5, "target_modules": ["emb"], "use_rslora": True},
    ),
    "one layer of a list": (
        {"blocks.1": {"rank": 3, "alpha": 5}},
        {"r": 3, "lora_alpha": 5, "target_modules": ["blocks.1"]},
    ),
    "a head trained whole": (
        {"blocks.0": {"rank": 3, "alpha": 5}},
        {"r": 3, "lora_alpha": 5, "target_modules": ["blocks.0"], "modules_to_save": ["head"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_saved_here_gives_the_same_output_in_peft(case: str, tmp_path: Path) -> None:
    lora, config = CASES[case]
    model = scattered(Net(lora, train_head="modules_to_save" in config))
    nplora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(TorchNet(), tmp_path)
    assert difference(torch_output(loaded), torch_output(TorchNet())) > 0.01
    assert difference(torch_output(loaded), model(IDS)) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_saved_by_peft_gives_the_same_output_here(case: str, tmp_path: Path) -> None:
    lora, config = CASES[case]
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(TorchNet(), peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    other_settings = {name: options | {"rank": 1, "alpha": 1} for name, options in lora.items()}
    model = Net(other_settings, train_head="modules_to_save" in config)
    nplora.load_adapter(model, tmp_path)
    assert difference(model(IDS), torch_output(TorchNet())) > 0.01
    assert difference(model(IDS), torch_output(wrapped)) < TOLERANCE
    model.merge()
    assert difference(model(IDS), torch_output(wrapped.merge_and_unload())) < TOLERANCE


def test_an_adapter_of_all_layers_replaces_one_of_fewer_as_peft_selects_it(tmp_path: Path) -> None:
    """PEFT keeps both and computes with the one that was selected last; here the model has one at a time."""
    configs = {
        "few": peft.LoraConfig(r=2, target_modules=["blocks.1"]),
        "all": peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(TorchNet(), config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        wrapped.save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(TorchNet(), tmp_path / "few")
    model = Net({})
    Adapter.read(tmp_path / "few").attach(model)
    outputs = [model(IDS)]
    assert difference(outputs[0], torch_output(theirs)) < TOLERANCE
    theirs.load_adapter(tmp_path / "all", "all")
    theirs.set_adapter("all")
    Adapter.read(tmp_path / "all").attach(model, replace=True)
    outputs.append(model(IDS))
    assert difference(outputs[1], torch_output(theirs)) < TOLERANCE
    Adapter.read(tmp_path / "few").attach(model, replace=True)
    np.testing.assert_array_equal(model(IDS), outputs[0])
    assert difference(outputs[0], outputs[1]) > 0.01


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT has a magnitude for each column of a table. Of a square one, they would pass for those of rows."""
    for vocab in (WIDTH, VOCAB):
        net = torch.nn.Sequential(torch.nn.Embedding(vocab, WIDTH))
        config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
        peft.get_peft_model(net, config).save_pretrained(tmp_path)
        with pytest.raises(FormatError, match="'0': DoRA on an embedding"):
            nplora.read_adapter(tmp_path)


def test_names_that_peft_would_confuse_reach_the_right_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (6, 6)
    w = [rng.normal(0, 0.5, shape).astype(np.float32) for _ in range(3)]
    torch_model = torch.nn.Sequential(
        torch.nn.Linear(6, 6, bias=False),
        torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(6, 6, bias=False)),
        torch.nn.Linear(6, 6, bias=False),
    )
    torch_model.load_state_dict(
        {name: torch.from_numpy(a) for name, a in zip(("0.weight", "1.1.weight", "2.weight"), w, strict=True)}
    )

    def lora(weight: Array, rank: int) -> nplora.Module:
        return nplora.LoRALinear(weight, rank=rank, init="gaussian", rng=rank)

    model = nplora.Sequential(
        lora(w[0], 2), nplora.Sequential(nplora.Tanh(), nplora.Linear(w[1])), lora(w[2], 3)
    )
    nplora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(torch_model, tmp_path)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    with torch.no_grad():
        assert difference(loaded(torch.from_numpy(x)).numpy(), model(x)) < TOLERANCE
    assert sum(p.numel() for p in loaded.parameters()) == model.num_parameters  # no layer more was adapted


def test_a_rewritten_configuration_keeps_peft_s_meaning(tmp_path: Path) -> None:
    """PEFT reads ours and writes its own: the values that we wrote are still there."""
    nplora.save_adapter(Net(CASES["patterns"][0]), tmp_path / "ours", base_model_name_or_path="digits")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    config.save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours["target_modules"], theirs["target_modules"] = map(
        sorted, (ours["target_modules"], theirs["target_modules"])
    )
    assert {key: theirs[key] for key in ours} == ours
