"""The real PEFT as oracle: llama.cpp's file has the same ΔW, and PEFT loads the file that is converted
back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.formats import gguf_adapter
from nplora.models import families

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own

Array = np.ndarray[Any, Any]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rsLoRA and patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"[01]\.mlp\.down_proj": 1},
    },
}


def base_model(family: str) -> Any:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def adapted(family: str, case: str) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=targets, **CASES[case])
    model = peft.get_peft_model(base_model(family), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def deltas(model: Any) -> dict[str, Array]:
    """PEFT's own ΔW of each layer, by the layer's name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def in_peft_s_order(delta: Array, stored: str) -> Array:
    """By transformers' own reader of GGUF."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaTensorProcessor(heads).process(delta, stored).weights  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_the_update_of_peft_reaches_llama_cpp_and_comes_back(
    case: str, family: str, tmp_path: Path, figure: Figure
) -> None:
    model = adapted(family, case)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model.config.save_pretrained(tmp_path / "base")
    expected = deltas(model)
    nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", tmp_path / "base")
    file = gguf_adapter.load(tmp_path / "a.gguf")
    assert len(file.pairs) == len(expected) == 15
    for name, delta in expected.items():
        stored = f"{families.by_model_type('', family).gguf_layer(name)}.weight"
        pair, scale = file.pairs[stored], file.alpha / file.pairs[stored].rank
        if name == "model.embed_tokens":
            got = scale * (pair.lora_b @ pair.lora_a).T
        else:
            got = scale * pair.lora_b @ pair.lora_a
        got = in_peft_s_order(got, stored) if family == "llama" else got
        np.testing.assert_allclose(got, delta, rtol=0, atol=1e-6 * np.abs(delta).max())  # float32 sums of 3
        figure("error of ΔW by llama.cpp's rule, relative", np.abs(got - delta).max() / np.abs(delta).max())

    nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "back", tmp_path / "base")
    back = deltas(peft.PeftModel.from_pretrained(base_model(family), tmp_path / "back"))
    assert back.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(back[name], delta, rtol=0, atol=1e-6 * np.abs(delta).max())
