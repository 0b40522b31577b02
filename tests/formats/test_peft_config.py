"""adapter_config.json: the text that is written, and the exact error for each hostile value."""

import json
import math
from typing import Any

import pytest

from hostile import accepted, refused
from nplora.formats import peft_config
from nplora.formats.errors import FormatError, LimitError, UnsafeError, UnsupportedError
from nplora.formats.peft_config import Patterns, PeftConfig

# Written by peft 0.21.2 for a plain torch module.
WRITTEN_BY_PEFT = """{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
  "auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"},
  "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
  "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
  "init_lora_weights": false, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
  "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
  "modules_to_save": ["head"], "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2",
  "qalora_group_size": 16, "r": 4, "rank_pattern": {"^fc1": 2}, "revision": null,
  "target_modules": ["emb", "fc1"], "target_parameters": null, "task_type": null,
  "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
  "use_rslora": false, "velora_config": null
}"""


def read(**fields: Any) -> PeftConfig:
    return peft_config.loads(json.dumps({"peft_type": "LORA"} | fields).encode(), "adapter_config.json")


def test_the_text_has_peft_s_keys_sorted_and_indented_by_two() -> None:
    config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=("fc1", "block.0"),
        modules_to_save=("head",),
        rank_pattern=Patterns.exact({"block.0": 2}),
        base_model_name_or_path="digits",
    )
    assert peft_config.dumps(config).decode() == (
        '{\n  "alpha_pattern": {},\n  "base_model_name_or_path": "digits",\n  "bias": "none",\n'
        '  "fan_in_fan_out": false,\n  "inference_mode": true,\n  "lora_alpha": 8,\n  "lora_dropout": 0.0,\n'
        '  "modules_to_save": [\n    "head"\n  ],\n  "peft_type": "LORA",\n  "r": 4,\n'
        '  "rank_pattern": {\n    "^block\\\\.0": 2\n  },\n'
        '  "target_modules": [\n    "fc1",\n    "block.0"\n  ],\n'
        '  "task_type": null,\n  "use_dora": false,\n  "use_rslora": false\n}'
    )


def test_a_written_configuration_is_read_back() -> None:
    config = PeftConfig(
        r=3, lora_alpha=2.5, modules_to_save=("head",), use_rslora=True, use_dora=True, lora_dropout=0.1
    )
    assert peft_config.loads(peft_config.dumps(config), "x") == config


def test_a_file_of_peft_s_is_read() -> None:
    config = peft_config.loads(WRITTEN_BY_PEFT.encode(), "x")
    assert (config.r, config.lora_alpha, config.modules_to_save, config.unknown) == (4, 8, ("head",), ())
    assert (config.rank("fc1"), config.rank("emb"), config.rank("block.fc1")) == (2, 4, 4)


def test_absent_keys_have_peft_s_defaults() -> None:
    config = read()
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (8, 8, False, False)


def test_the_first_pattern_that_matches_decides() -> None:
    config = read(r=1, rank_pattern={"layers.0.q": 2, "q": 3}, alpha_pattern={r"layers\.\d\.k": 2.5})
    assert [config.rank(name) for name in ("m.layers.0.q", "m.layers.1.q", "m.layers.0.k")] == [2, 3, 1]
    assert [config.alpha(name) for name in ("m.layers.0.k", "m.layers.0.q")] == [2.5, 8]


def test_exact_patterns_match_no_other_name() -> None:
    patterns = Patterns.exact({"0": 2, "a-b.c": 3})
    assert [patterns.value(name, 1) for name in ("0", "1.0", "a-b.c", "a-bxc")] == [2, 1, 3, 1]


def test_an_exact_pattern_decides_in_its_turn() -> None:
    config = read(r=1, rank_pattern={r"^a\.q": 2, ".*q": 3, r"^b\.q": 4, "^a.q": 5, r"^c\.k": 6, "k": 7})
    assert [config.rank(name) for name in ("a.q", "b.q", "c.k", "d.k", "e")] == [2, 3, 6, 7, 1]


@pytest.mark.slow
def test_as_many_exact_patterns_are_read_as_a_large_model_has_layers() -> None:
    ranks = {f"model.layers.{i}.self_attention.q_proj": 1 + i for i in range(2_000)}
    config = PeftConfig(r=5, rank_pattern=Patterns.exact(ranks))
    again = peft_config.loads(peft_config.dumps(config), "x")
    assert {name: again.rank(name) for name in ranks} == ranks


def test_unknown_keys_are_listed() -> None:
    assert read(r=2, colour="red", shape=[1]).unknown == ("colour", "shape")


HOSTILE: list[tuple[dict[str, Any], type[FormatError], str]] = [
    ({"rank_pattern": {"(a+)+$": 4}}, UnsafeError, "rank_pattern: character 5 of the pattern '(a+)+$'"),
    ({"alpha_pattern": {"(a+)+$": 4}}, UnsafeError, "alpha_pattern"),
    ({"target_modules": "(a+)+$"}, UnsafeError, "target_modules holds the pattern '(a+)+$'"),
    ({"exclude_modules": ["x", "(a|a)*"]}, UnsafeError, "exclude_modules"),
    ({"rank_pattern": {"a" * 513: 4}}, LimitError, "513 characters"),
    ({"rank_pattern": {f"{i:0512}": 1 for i in range(513)}}, LimitError, "262,656 characters of patterns"),
    ({"rank_pattern": {f"{i:0512}": 1 for i in range(33)}}, LimitError, "16,896 characters of patterns"),
    ({"rank_pattern": ["fc1"]}, FormatError, "rank_pattern is ['fc1'], expected an object"),
    ({"rank_pattern": {"fc1": 0}}, FormatError, "rank_pattern: 'fc1' is 0"),
    ({"rank_pattern": {"fc1": 10**9}}, LimitError, "rank_pattern: 'fc1' is 1,000,000,000"),
    ({"alpha_pattern": {"fc1": "8"}}, FormatError, "alpha_pattern: 'fc1' is '8'"),
    ({"r": 0}, FormatError, "r is 0, expected an integer of at least 1"),
    ({"r": -1}, FormatError, "r is -1"),
    ({"r": 10**9}, LimitError, "r is 1,000,000,000, expected at most 65,536"),
    ({"r": True}, FormatError, "r is True"),
    ({"r": "8"}, FormatError, "r is '8'"),
    ({"r": 8.0}, FormatError, "r is 8.0"),
    ({"r": None}, FormatError, "r is None"),
    ({"lora_alpha": float("nan")}, FormatError, "NaN is not JSON"),
    ({"lora_alpha": "16"}, FormatError, "lora_alpha is '16', expected a finite number"),
    ({"lora_alpha": False}, FormatError, "lora_alpha is False"),
    ({"lora_dropout": float("inf")}, FormatError, "Infinity is not JSON"),
    ({"use_rslora": 1}, FormatError, "use_rslora is 1, expected true or false"),
    ({"use_dora": "yes"}, FormatError, "use_dora is 'yes'"),
    ({"modules_to_save": [1]}, FormatError, "modules_to_save is [1]"),
    ({"base_model_name_or_path": 7}, FormatError, "base_model_name_or_path is 7"),
    ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, UnsafeError, "auto_mapping"),
    ({"auto_mapping": {"base_model_class": "Net", "parent_library": "os.path"}}, UnsafeError, "auto_mapping"),
    ({"auto_mapping": {"base_model_class": "a()", "parent_library": "net"}}, UnsafeError, "auto_mapping"),
    ({"auto_mapping": "net.Net"}, UnsafeError, "auto_mapping is 'net.Net'"),
    (
        {"auto_mapping": {"base_model_class": "Net", "parent_library": "net", "x": 1}},
        UnsafeError,
        "auto_mapping",
    ),
    ({"megatron_core": "evil.core"}, UnsafeError, "megatron_core is 'evil.core'"),
    ({"trust_remote_code": True}, UnsafeError, "trust_remote_code is True"),
    ({"peft_type": "LOHA"}, UnsupportedError, "peft_type is 'LOHA', expected 'LORA'"),
    ({"peft_type": 3}, FormatError, "peft_type is 3"),
    ({"bias": "all"}, UnsupportedError, "bias is 'all', expected 'none'"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "init_lora_weights is 'pissa_niter_4'"),
    ({"megatron_config": {"a": 1}}, UnsupportedError, "megatron_config"),
    ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
    ({"use_qalora": True}, UnsupportedError, "use_qalora"),
    ({"trainable_token_indices": [-1]}, FormatError, "trainable_token_indices is [-1]"),
    ({"trainable_token_indices": {"embed_tokens": [1.5]}}, FormatError, "trainable_token_indices is {"),
    ({"trainable_token_indices": "all"}, FormatError, "trainable_token_indices is 'all'"),
    ({"alora_invocation_tokens": ["a"]}, FormatError, "alora_invocation_tokens is ['a']"),
    ({"ensure_weight_tying": 1}, FormatError, "ensure_weight_tying is 1"),
]


@pytest.mark.parametrize(("fields", "error", "words"), HOSTILE)
def test_a_hostile_value_gives_its_exact_error(
    fields: dict[str, Any], error: type[FormatError], words: str
) -> None:
    with refused(error, words, "adapter_config.json: "):
        read(**fields)


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', FormatError, "1e999 is beyond the range of float64"),
        (b'{"peft_type": "LORA", "r": 4, "r": 8}', FormatError, "'r' appears twice"),
        (b'{"peft_type": "LORA", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", LimitError, "100,001 deep"),
        (b'{"r": 4}', FormatError, "peft_type is None, expected 'LORA'"),
        (b"[]", FormatError, "[], expected an object"),
        (b"", FormatError, "not JSON"),
        (b'{"peft_type": "\xff"}', FormatError, "not UTF-8"),
    ],
)
def test_hostile_text_gives_its_exact_error(raw: bytes, error: type[FormatError], words: str) -> None:
    with refused(error, words, "adapter_config.json: "):
        peft_config.loads(raw, "adapter_config.json")


SMALL_FILES = {
    "ours": peft_config.dumps(PeftConfig(r=2, rank_pattern=Patterns.exact({"fc1": 1}), use_rslora=True)),
    "PEFT's": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e1, "alpha_pattern": {"(q|v)_proj": 2.5}, '
    b'"auto_mapping": {"base_model_class": "Net", "parent_library": "net"}, "target_modules": "q.*"}',
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_every_cut_and_every_damaged_byte_give_format_errors_or_a_configuration(name: str) -> None:
    """Accepted content is valid as a whole: it can be written and read again."""

    def loaded(data: bytes) -> PeftConfig:
        return peft_config.loads(data, "adapter_config.json")

    versions = list(accepted(SMALL_FILES[name], loaded))
    assert len(versions) > 20
    for _, config in versions:
        assert 1 <= config.rank("model.q_proj") <= 65_536
        assert math.isfinite(config.scale("model.fc1"))
        again = loaded(peft_config.dumps(config))
        for layer in ("fc1", "model.q_proj", "x"):
            assert (again.rank(layer), again.scale(layer)) == (config.rank(layer), config.scale(layer))
