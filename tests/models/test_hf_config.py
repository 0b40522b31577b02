"""The meaning of a config.json and of its missing fields, with transformers' own reader as the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest

import small_models
from nplora.formats.errors import FormatError
from nplora.models import base_model, families, hf_config
from nplora.models.config import ModelConfig

FAMILIES = [
    family.model_type
    for family in families.FAMILIES
    if family.model_type not in small_models.UNKNOWN_TO_TRANSFORMERS
]
WITHOUT_WINDOWS = ("llama", "granite", "olmo2")  # they ignore `sliding_window`
NOTHING = object()  # as the value of a field: the field is missing


def write(directory: Path, family: str, **changes: Any) -> Path:
    """A config.json with 32 heads and 30 layers, for which the families' defaults are possible."""
    fields = small_models.config(
        model_type=family, num_attention_heads=32, hidden_size=256, num_hidden_layers=30
    )
    fields |= {"num_key_value_heads": NOTHING} | changes
    path = directory / "config.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not NOTHING}))
    return path


def read(directory: Path, family: str, **changes: Any) -> ModelConfig:
    return hf_config.read(write(directory, family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [NOTHING, None, 4], ids=["absent", "null", "given"])
def test_both_readers_find_the_heads_that_transformers_finds(
    family: str, kv_heads: object, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if family in ("mistral", "gemma3_text") and kv_heads is None:
        expected = 32  # before transformers 5; since then, it is an error
        path = write(tmp_path, family, num_key_value_heads=None)
    else:
        path = write(tmp_path, family, num_key_value_heads=kv_heads)
        expected = transformers.AutoConfig.from_pretrained(tmp_path).num_key_value_heads
    base = base_model.read(path)
    assert (base.heads, base.kv_heads) == (32, expected)
    assert hf_config.read(path).num_key_value_heads == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [NOTHING, None, 7], ids=["absent", "null", "given"])
@pytest.mark.parametrize("use", [NOTHING, False, True], ids=["absent", "off", "on"])
def test_the_windows_are_those_of_transformers(
    family: str, window: object, use: object, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, family, sliding_window=window, use_sliding_window=use)
    if family == "gemma3_text" and window is None:  # its layers with a window rotate with another base
        with pytest.raises(FormatError, match="a layer has type 'sliding_attention'"):
            hf_config.read(path)
        return
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    size = None if family in WITHOUT_WINDOWS else getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    expected = tuple((size or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    assert hf_config.read(path).sliding_windows == expected


def test_missing_fields_of_mistral_are_those_of_mistral_7b(tmp_path: Path) -> None:
    config = read(tmp_path, "mistral")
    assert (config.num_key_value_heads, set(config.sliding_windows)) == (8, {4096})
    assert set(read(tmp_path, "mistral", sliding_window=None).sliding_windows) == {0}


def test_a_qwen_with_windows_has_them_of_4096_tokens_from_layer_28(tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3"):
        windows = read(tmp_path, family, use_sliding_window=True).sliding_windows
        assert windows == (0,) * 28 + (4096,) * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    absent = dict.fromkeys(("rms_norm_eps", "tie_word_embeddings", "rope_theta", "head_dim"), NOTHING)
    path = write(tmp_path, family, **absent)
    ours, theirs = hf_config.read(path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 256 // 32)
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.rope.theta == rope["rope_theta"]
    for name, default in (("attention_multiplier", None), ("embedding_multiplier", 1), ("logits_scaling", 1)):
        if family != "gemma3_text":
            assert getattr(ours, name) == getattr(theirs, name, default)
    rotates = getattr(theirs, "no_rope_layers", [1] * 30)
    assert ours.unrotated == {i for i in range(30) if not rotates[i]}


OLD_GEMMA3 = {  # as in files from before transformers 5
    "rope_theta": 2e6,
    "rope_local_base_freq": 5e3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 3,
    "sliding_window": 7,
}


def test_an_old_file_of_gemma_3_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = read(tmp_path, "gemma3_text", **OLD_GEMMA3)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    full, sliding = (theirs.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    assert (ours.rope.theta, ours.rope.linear_factor) == (full["rope_theta"], full["factor"]) == (2e6, 8)
    assert ours.local_rope is not None
    assert (ours.local_rope.theta, ours.local_rope.linear_factor) == (sliding["rope_theta"], 1)
    kinds = ["sliding_attention" if window else "full_attention" for window in ours.sliding_windows]
    assert kinds == theirs.layer_types


LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"original_max_position_embeddings": 16, "rope_scaling": LONG_ROPE},
        {"original_max_position_embeddings": 16, "rope_scaling": LONG_ROPE | {"factor": 3.0}},
        {
            "original_max_position_embeddings": 16,
            "rope_scaling": LONG_ROPE | {"original_max_position_embeddings": 64},
        },
        {"original_max_position_embeddings": 16, "rope_scaling": LONG_ROPE | {"attention_factor": 1.5}},
        {"rope_scaling": LONG_ROPE},
    ],
    ids=["plain", "with a factor", "two lengths", "with an attention factor", "no length"],
)
def test_longrope_is_read_as_transformers_reads_it(changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    ours = read(tmp_path, "phi3", **changes).rope.long
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    _, factor = rope_utils.ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu")
    assert ours is not None
    assert ours.attention_factor == pytest.approx(factor)
    assert ours.original_length == theirs.rope_parameters["original_max_position_embeddings"]


def test_a_smollm3_has_the_windows_that_layer_types_name(tmp_path: Path) -> None:
    """Also without use_sliding_window, because transformers masks only by layer_types."""
    kinds = ["sliding_attention", "full_attention"] * 15
    config = read(tmp_path, "smollm3", layer_types=kinds, sliding_window=7)
    assert config.sliding_windows == (7, 0) * 15
    with pytest.raises(FormatError, match="'sliding_attention', but there is no sliding_window"):
        read(tmp_path, "smollm3", layer_types=kinds)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor is not 1",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor is not 1",
        ),
        *(
            (
                family,
                {
                    "rope_parameters": {"rope_theta": 1e4, "full_attention": {}},
                    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                },
                "rope_parameters and rope_scaling are both set",
            )
            for family in ("llama", "gemma3_text", "phi3")
        ),
        ("phi3", {"rope_scaling": {"type": "x" * 10_000}}, "x…, expected 'default' or 'longrope'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "the model is not causal"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "expected at least 1"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "yarn"}},
            "'yarn', expected 'default', 'linear' or 'llama3'",
        ),
        ("smollm3", {"no_rope_layer_interval": 0}, "expected at least 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "expected a list of 30 integers"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0, expected above 0"),
        ("granite", {"logits_scaling": 1e9}, "is 1000000000.0, expected above 0 and below 1,000,000"),
        ("granite", {"logits_scaling": 1e30}, "logits_scaling is 1e+30, expected above 0 and below 1e30"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1e30}}, "expected above 0 and below 1e30"),
        (
            "phi3",
            {"original_max_position_embeddings": 1 << 40, "rope_scaling": {"type": "su"}},
            "is 1,099,511,627,776, expected 2 to 1,073,741,824",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1e30] * 4, "long_factor": [1] * 4}},
            "a factor of the rotation is 1e+30, expected above 0 and below 1e30",
        ),
        ("phi3", {"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0, expected in (0, 1]"),
        ("phi3", {"rope_scaling": {"type": "yarn"}}, "'yarn', expected 'default' or 'longrope'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope"}},
            "short_factor is missing, expected a list of 4 numbers",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1, 1, 1, 0]}},
            "a factor of the rotation is 0, expected above 0",
        ),
        (
            "phi3",
            {"original_max_position_embeddings": 1, "rope_scaling": {"type": "su"}},
            "is 1, expected 2 to 1,073,741,824",
        ),
    ],
)
def test_unsupported_settings_of_a_family_are_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, family, **changes)
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)
