"""Models converted from Hugging Face's files to GGUF, read back by PyPI's gguf and nplora."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf.quants import dequantize

import nplora
import small_models
from block_formats import EXPECTED
from nplora import cli
from nplora.formats import gguf, safetensors
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.models import families
from nplora.models import gguf_export as model_conversion
from nplora.tokenizer import gguf_vocabulary
from nplora.weights import storages
from taken import assert_nothing_is_lost

Array = np.ndarray[Any, Any]

HEADS, KV_HEADS, WIDTH, FFN, VOCAB, LAYERS = 4, 2, 64, 96, 300, 2
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
}


@pytest.fixture
def ids(rng: np.random.Generator) -> Array:
    return rng.integers(0, VOCAB, (2, 40))


def hf_directory(directory: Path, rng: np.random.Generator, family: str = "llama", **changes: Any) -> Path:
    """A model with random weights, with the names and shapes that nplora expects."""
    directory.mkdir()
    dtype = changes.pop("dtype", np.float32)
    fields = SIZES | {"model_type": family, "rms_norm_eps": 1e-5, "rope_theta": 5e5} | changes
    (directory / "config.json").write_text(json.dumps(fields))
    config = model_conversion.hf_config.read(directory / "config.json")
    specs = families.of(config).tensors(config)
    tensors = {spec.name: rng.standard_normal(spec.shape).astype(dtype) for spec in specs}
    safetensors.save(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def read(path: Path) -> dict[str, tuple[str, Array]]:
    """The type and values of every tensor, read by PyPI's gguf."""
    return {
        t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()))
        for t in oracle.GGUFReader(path).tensors
    }


def rows_in_order(values: Array, heads: int) -> Array:
    """Row 2 i of a head is the head's row i. Row 2 i + 1 is the row half a head later."""
    half = len(values) // heads // 2
    moved = np.full_like(values, np.nan)
    for head in range(heads):
        for i in range(half):
            moved[head * 2 * half + 2 * i] = values[head * 2 * half + i]
            moved[head * 2 * half + 2 * i + 1] = values[head * 2 * half + half + i]
    return moved


@pytest.mark.slow
@pytest.mark.parametrize("dtype", model_conversion.DTYPES)
def test_matrices_get_the_type_and_vectors_stay_float32(
    dtype: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    directory = hf_directory(tmp_path / "hf", rng, hidden_size=256, intermediate_size=96, attention_bias=True)
    report = nplora.model_to_gguf(directory, tmp_path / "model.gguf", dtype)
    given = {name: t.numpy() for name, t in safetensors.open(directory / "model.safetensors").items()}
    found = read(tmp_path / "model.gguf")
    assert len(found) == len(given) == sum(report.types.values())
    wanted = "float32" if dtype == "same" else dtype
    words = f"{LAYERS} of {7 * LAYERS + 2} matrices are {{}} instead of {dtype}: their rows cannot be"
    of = EXPECTED.get(wanted)
    short_rows = of.short_rows if of and of.short_rows else wanted
    assert (words.format(found["blk.0.ffn_down.weight"][0]) in str(report)) == (short_rows != wanted)
    layer, stored = "model.layers.1", "blk.1"
    for name, gguf_name, storage, heads in (
        ("model.embed_tokens.weight", "token_embd.weight", wanted, 0),
        ("lm_head.weight", "output.weight", wanted, 0),
        ("model.norm.weight", "output_norm.weight", "float32", 0),
        (f"{layer}.self_attn.q_proj.weight", f"{stored}.attn_q.weight", wanted, HEADS),
        (f"{layer}.self_attn.k_proj.weight", f"{stored}.attn_k.weight", wanted, KV_HEADS),
        (f"{layer}.self_attn.k_proj.bias", f"{stored}.attn_k.bias", "float32", KV_HEADS),
        (f"{layer}.self_attn.v_proj.weight", f"{stored}.attn_v.weight", wanted, 0),
        (f"{layer}.self_attn.o_proj.bias", f"{stored}.attn_output.bias", "float32", 0),
        (f"{layer}.mlp.gate_proj.weight", f"{stored}.ffn_gate.weight", wanted, 0),
        (f"{layer}.mlp.down_proj.weight", f"{stored}.ffn_down.weight", short_rows, 0),
        (f"{layer}.input_layernorm.weight", f"{stored}.attn_norm.weight", "float32", 0),
        (f"{layer}.post_attention_layernorm.weight", f"{stored}.ffn_norm.weight", "float32", 0),
    ):
        kind, values = found[gguf_name]
        assert kind == storages.GGML_NAMES[storage], name
        expected = rows_in_order(given[name], heads) if heads else given[name]
        if storage == "float32":
            np.testing.assert_array_equal(values, expected)
        else:
            rows = storages.decode(storages.encode(expected, storage), storage, expected.shape[1])
            np.testing.assert_array_equal(values, rows)
    fields = oracle.GGUFReader(tmp_path / "model.gguf").fields
    kinds = [kind for kind, values in found.values() if values.ndim == 2]
    name = max(set(kinds), key=kinds.count)
    file_type = oracle.LlamaFileType(fields["general.file_type"].contents()).name
    assert file_type in (f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"ALL_{name}")
    assert ("general.quantization_version" in fields) == ("Q" in name)


def test_the_hyperparameters_have_llama_cpps_keys(rng: np.random.Generator, tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf", rng, "mistral", sliding_window=40)
    nplora.model_to_gguf(directory / "model.safetensors", tmp_path / "model.gguf")
    fields = oracle.GGUFReader(tmp_path / "model.gguf").fields
    found = {k: (f.types[0].name, f.contents()) for k, f in fields.items() if not k.startswith("GGUF.")}
    sizes = {
        "context_length": 128, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": 16,
        "attention.value_length": 16, "rope.dimension_count": 16, "vocab_size": VOCAB,
        "attention.sliding_window": 40,
    }  # fmt: skip
    assert found == {
        "general.architecture": ("STRING", "llama"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "hf"),
        "general.file_type": ("UINT32", 0),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(1e-5))),
        "llama.rope.freq_base": ("FLOAT32", 5e5),
    } | {f"llama.{key}": ("UINT32", value) for key, value in sizes.items()}


def test_settings_that_gguf_cannot_express_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    mixed = hf_directory(
        tmp_path / "mixed", rng, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    with pytest.raises(UnsupportedError, match=r"the layers have sliding windows of \[0, 8\] tokens"):
        nplora.model_to_gguf(mixed, tmp_path / "model.gguf")
    gelu = hf_directory(tmp_path / "gelu", rng, hidden_act="gelu_pytorch_tanh")
    with pytest.raises(
        UnsupportedError,
        match=r"hidden_act is gelu_pytorch_tanh, which GGUF cannot express: architecture llama implies silu",
    ):
        nplora.model_to_gguf(gelu, tmp_path / "model.gguf")
    plain = hf_directory(tmp_path / "plain", rng)
    with pytest.raises(ValueError, match=r"path is .*, expected a \.gguf file"):
        nplora.model_to_gguf(plain, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"dtype='nf4' is not available; possible: 'same', 'float32'"):
        nplora.model_to_gguf(plain, tmp_path / "model.gguf", "nf4")
    tensors = {
        name: t.numpy() for name, t in safetensors.open(plain / "model.safetensors", mmap=False).items()
    }
    huge = dict(tensors)
    huge["lm_head.weight"] = huge["lm_head.weight"] * np.float32(1e6)
    safetensors.save(plain / "model.safetensors", huge)
    with pytest.raises(
        ValueError, match=r"tensor lm_head\.weight: [0-9]+ finite values become infinite in float16"
    ):
        nplora.model_to_gguf(plain, tmp_path / "model.gguf", "float16")
    del tensors["model.norm.weight"]
    safetensors.save(plain / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"tensor 'model.norm\.weight' is missing"):
        nplora.model_to_gguf(plain, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*"))


def test_an_existing_file_with_the_name_of_the_new_model_is_not_lost(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    directory = hf_directory(tmp_path / "hf", rng, dtype=np.float16)
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    assert_nothing_is_lost(
        target, lambda overwrite: nplora.model_to_gguf(directory, target, overwrite=overwrite)
    )
    source = directory / "model.safetensors"
    before = source.read_bytes()
    os.link(source, target)
    with pytest.raises(ValueError, match=r"model\.gguf is the model itself, which is never overwritten"):
        nplora.model_to_gguf(directory, target, overwrite=True)
    assert source.read_bytes() == before


def test_the_command_distinguishes_models_from_adapters(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = hf_directory(tmp_path / "hf", rng, dtype=np.float16)
    target = str(tmp_path / "model.gguf")
    for source, more in ((directory, []), (directory / "model.safetensors", ["--overwrite"])):
        assert cli.main(["convert", str(source), target, "--dtype", "q8_0", *more]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{target}: llama, 21 tensors: 16 Q8_0, 5 F32\nwithout a tokenizer")
    assert cli.main(["convert", str(directory), target]) == 2
    assert f"{target}: the file already exists; name another one" in capsys.readouterr().err
    assert not model_conversion.is_model(tmp_path / "a.gguf")
    (directory / "adapter_config.json").write_text("{}")
    assert not model_conversion.is_model(directory)


# ---- the tokenizer ----


def byte_level_tokenizer(pre: str) -> Any:
    """A tokenizer that splits text as `pre` says, trained on a short text."""
    tokenizers = pytest.importorskip("tokenizers")
    cut = tokenizers.pre_tokenizers
    split = gguf_vocabulary.SPLITS[pre]
    steps = [cut.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if pre == "smollm":
        steps.insert(0, cut.Digits(individual_digits=True))
    if split is not None:
        steps.insert(0, cut.Split(tokenizers.Regex(split), "isolated"))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else cut.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=cut.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello hello 123 1234, the théâtre's don't\n\n  hello"] * 9, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return backend


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o"])
def test_a_byte_level_tokenizer_is_included(pre: str, rng: np.random.Generator, tmp_path: Path) -> None:
    backend = byte_level_tokenizer(pre)
    directory = hf_directory(tmp_path / "hf", rng)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<|start|>",
        "eos_token": {"content": "<|end|>"},
        "add_bos_token": False,
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    report = nplora.model_to_gguf(directory, tmp_path / "model.gguf")
    assert report.tokenizer
    assert "without" not in str(report)
    file = gguf.open(tmp_path / "model.gguf")
    assert file.metadata.string("tokenizer.ggml.pre") == pre
    assert len(file.metadata.strings("tokenizer.ggml.tokens")) == VOCAB
    tokenizer = gguf_vocabulary.from_gguf(file)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, 1)
    for text in ("hello 12345 théâtre's", "  a\n\n\tdon't<tool>x", "日本 ☃", "e\u0301<|end|>"):
        assert tokenizer.encode(text, True, parse_special=True) == backend.encode(text).ids
    assert file.metadata.string("tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.slow
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize("single", ["$A", "<|start|> $A", "$A <|end|>", "<|start|> $A <|end|>"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_a_text_begins_and_ends_as_in_tokenizer_json(
    pre: str, single: str, config: dict[str, bool], rng: np.random.Generator, tmp_path: Path
) -> None:
    """It does not depend on llama.cpp's default for `pre`, nor on the tokenizer class of another library."""
    processors = pytest.importorskip("tokenizers").processors
    backend = byte_level_tokenizer(pre)
    template = processors.TemplateProcessing(single=single, special_tokens=[("<|end|>", 0), ("<|start|>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    directory = hf_directory(tmp_path / "hf", rng)
    backend.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | config))
    assert nplora.model_to_gguf(directory, tmp_path / "model.gguf").tokenizer
    fields = oracle.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == single.startswith("<")
    assert fields["tokenizer.ggml.add_eos_token"].contents() == single.endswith(">")
    tokenizer = gguf_vocabulary.from_gguf(gguf.open(tmp_path / "model.gguf"))
    assert tokenizer.encode("hello 12", True) == backend.encode("hello 12").ids


def bert_like(tokenizers: Any, backend: Any) -> None:
    backend.post_processor = tokenizers.processors.BertProcessing(("<|end|>", 0), ("<|start|>", 1))


def template_of(single: str) -> Any:
    def change(tokenizers: Any, backend: Any) -> None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<|end|>", 0), ("<|start|>", 1)]
        )

    return change


def added_token(**switches: bool) -> Any:
    def change(tokenizers: Any, backend: Any) -> None:
        backend.add_tokens([tokenizers.AddedToken("<wide>", **switches)])

    return change


def attribute(part: str, name: str, make: Any) -> Any:
    """Sets a part of the tokenizer, or a setting of its model, to the result of `make`."""

    def change(tokenizers: Any, backend: Any) -> None:
        setattr(backend if part == "" else getattr(backend, part), name, make(tokenizers))

    return change


OTHERS: dict[str, tuple[str, Any, str]] = {
    "whitespace": (
        "gpt-2", attribute("", "pre_tokenizer", lambda t: t.pre_tokenizers.Whitespace()), "pre_tokenizer is"),
    "a prefix space": (
        "gpt-2", attribute("", "pre_tokenizer", lambda t: t.pre_tokenizers.ByteLevel()), "pre_tokenizer is"),
    "WordPiece": (
        "gpt-2", attribute("", "model", lambda t: t.models.WordPiece({"[UNK]": 7})), "model is 'WordPiece'"),
    "lower case": (
        "gpt-2", attribute("", "normalizer", lambda t: t.normalizers.Lowercase()), "normalizer is"),
    "NFC for GPT-2": ("gpt-2", attribute("", "normalizer", lambda t: t.normalizers.NFC()), "normalizer is"),
    "no NFC for Qwen2": ("qwen2", attribute("", "normalizer", lambda t: None), "normalizer is None"),
    "no merges for GPT-2": (
        "gpt-2", attribute("model", "ignore_merges", lambda t: True), "ignore_merges is True"),
    "dropout": ("gpt-2", attribute("model", "dropout", lambda t: 0.5), "dropout is 0.5"),
    "an affix": ("gpt-2", attribute("model", "end_of_word_suffix", lambda t: "</w>"), "end_of_word_suf"),
    "bytes": ("gpt-2", attribute("model", "byte_fallback", lambda t: True), "byte_fallback is True"),
    "unknown": ("gpt-2", attribute("model", "unk_token", lambda t: "<|end|>"), "unk_token is"),
    "a decoder": ("gpt-2", attribute("", "decoder", lambda t: t.decoders.Fuse()), "decoder is"),
    "spaces": ("gpt-2", added_token(lstrip=True), "lstrip of token '<wide>' is True"),
    "a word": ("gpt-2", added_token(single_word=True), "single_word of token '<wide>' is True"),
    "before NFC": ("qwen2", added_token(normalized=True), "normalized of token '<wide>' is True"),
    "Bert's ends": ("gpt-2", bert_like, "post_processor is"),
    "another beginning": ("gpt-2", template_of("<|end|> $A"), "adds the tokens \\[0\\], expected only bos"),
    "two": ("gpt-2", template_of("$A <|end|> <|end|>"), "adds the tokens \\[0, 0\\], expected only eos"),
    "the text twice": ("gpt-2", template_of("$A $A"), "post_processor is"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_an_unsupported_tokenizer_is_left_out_and_reported(
    other: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    pre, change, message = OTHERS[other]
    backend = byte_level_tokenizer(pre)
    change(pytest.importorskip("tokenizers"), backend)
    directory = hf_directory(tmp_path / "hf", rng)
    backend.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    report = nplora.model_to_gguf(directory, tmp_path / "model.gguf")
    assert not report.tokenizer
    assert re.search(rf"without a tokenizer: .*tokenizer\.json: .*{message}", str(report))
    assert not any(key.startswith("tokenizer") for key in gguf.open(tmp_path / "model.gguf").metadata)


def test_a_tokenizer_that_fails_the_trial_is_left_out_too(rng: np.random.Generator, tmp_path: Path) -> None:
    """GGUF keeps added tokens in the vocabulary. Llama 3's rule then finds one that is a whole word."""
    backend = byte_level_tokenizer("llama-bpe")
    backend.add_special_tokens(["zebra"])
    directory = hf_directory(tmp_path / "hf", rng)
    backend.save(str(directory / "tokenizer.json"))
    report = nplora.model_to_gguf(directory, tmp_path / "model.gguf")
    assert "'zebra' would become different tokens in GGUF" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_tokens": [{"id": 300, "content": "x"}]}, "token 'x' has id 300, expected below 300"),
        ({"added_tokens": [{"id": True, "content": "x"}]}, "token 'x' has id True"),
        ({"added_tokens": [{"id": 5, "content": "x"}]}, "tokens .* and 'x' both have id 5"),
        ({"added_tokens": ["x"]}, "an added token is 'x'"),
        ({"added_tokens": {}}, "added_tokens is {}, expected a list"),
        ([], r"\[\], expected an object"),
        ({"vocab": []}, r"vocab is \[\], expected an object of tokens"),
    ],
)
def test_a_damaged_tokenizer_is_refused(
    change: Any, message: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    directory = hf_directory(tmp_path / "hf", rng)
    fields = json.loads(byte_level_tokenizer("gpt-2").to_str())
    if isinstance(change, dict):
        fields |= {key: value for key, value in change.items() if key != "vocab"}
        fields["model"] |= {key: value for key, value in change.items() if key == "vocab"}
    (directory / "tokenizer.json").write_text(json.dumps(fields if isinstance(change, dict) else change))
    with pytest.raises(FormatError, match=message):
        nplora.model_to_gguf(directory, tmp_path / "model.gguf")


# ---- merging, in memory and in files ----


@pytest.mark.parametrize("dtype", ["q8_0", "float32"])
def test_a_merged_file_is_the_merged_model(
    dtype: str, rng: np.random.Generator, ids: Array, tmp_path: Path
) -> None:
    nplora.model_to_gguf(hf_directory(tmp_path / "hf", rng), tmp_path / "model.gguf", "q8_0")
    lm = nplora.load_model(tmp_path / "model.gguf")
    lm.add_lora(rank=2, targets="all-linear")
    for layer in lm.adapter_layers().values():
        layer.A[...] = rng.standard_normal(layer.A.shape) / 50
    nplora.save_adapter(lm, tmp_path / "adapter")
    live, saved = nplora.read_adapter(lm), nplora.read_adapter(tmp_path / "adapter")
    for name, update in saved.items():  # rows of q and k have Hugging Face's order in both
        np.testing.assert_array_equal(live[name].A, update.A)
    before = lm.logits(ids)
    reports = lm.merge(dtype)
    assert {report.name for report in reports} == set(lm.adapter_layers())
    merged = lm.logits(ids)
    done = nplora.merge_adapter(
        tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "merged.gguf", dtype
    )
    np.testing.assert_allclose(
        sorted(report.error for report in done.reports), sorted(report.error for report in reports), rtol=1e-5
    )
    np.testing.assert_allclose(nplora.load_model(tmp_path / "merged.gguf").logits(ids), merged, atol=1e-3)
    if dtype == "float32":
        np.testing.assert_allclose(merged, before, atol=1e-3)
    lm.unmerge()
    np.testing.assert_array_equal(lm.logits(ids), before)


def test_a_partly_rotated_head_has_a_divisor_for_each_rotated_pair(tmp_path: Path) -> None:
    """Llama 3's formula, with the frequencies θ^(-2i / rotary_dim) of the rotated pairs."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    small_models.write_tensors(tmp_path / "model.safetensors", small_models.hf_tensors())
    (tmp_path / "config.json").write_text(json.dumps(small_models.config(rope_scaling=scaling)))
    whole = nplora.load_model(tmp_path).config
    for dim in (None, 4):
        config = dataclasses.replace(whole, rotary_dim=dim)
        width = dim or config.head_dim
        wavelength = 2 * np.pi * config.rope.theta ** (np.arange(0, width, 2) / width)
        smooth = np.clip((32 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
        (made,) = families.of(config).rope_factors(config).values()
        np.testing.assert_allclose(made, 1 / ((1 - smooth) / 8.0 + smooth), rtol=1e-12)
