"""Trained tokens, embedding and head of language models: the rows that are trained, files, runs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.finetuning import load_with_adapter
from nplora.finetuning.planning import Adapters
from nplora.formats import FormatError, UnsupportedError, gguf
from nplora.lm import LanguageModel
from small_llama import HIDDEN, save_small_llama
from vocabularies import byte_level

pytest.importorskip("tokenizers")

VOCAB = len(byte_level()["tokenizer.ggml.tokens"])
END = "<|end|>"  # token 0
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "untied.gguf")


@pytest.fixture(params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    without = "output.weight" if request.param == "tied" else ""
    return save_small_llama(tmp_path / f"{request.param}.gguf", without=without)


def write_rows(path: Path) -> Path:
    rows = [{"prompt": f"{n}=", "completion": f"{n % 4}{n % 4}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(lm: LanguageModel) -> LanguageModel:
    """A few steps on random tokens."""
    optimizer, ids = nplora.AdamW(3e-2), np.random.default_rng(3).integers(0, 9, (2, 12))
    for _ in range(3):
        lm.train_step(ids, ids, optimizer)
    return lm


IDS = np.array([[5, 0, 7, 1, 0, 2]])


# ---- what is trained ----


def test_tokens_are_given_as_ids_or_texts(model: Path) -> None:
    is_tied = model.name == "tied.gguf"
    for tokens in ([0, 5], [END, 5], f"{END},5", f" 0, {END[0]}|end|> ,5".replace(" 0,", "")):
        lm = nplora.load_model(model)
        lm.add_lora(rank=2, trainable_tokens=tokens)
        rows = {
            name: layer.rows.ids.tolist()
            for name, layer in lm.adapter_layers().items()
            if "layers" not in name
        }
        assert rows == {EMBEDDING: [0, 5], HEAD: [0, 5]}
        names = [p.name for p in lm.parameters() if "layers" not in p.name]
        assert names == [f"{EMBEDDING}.rows"] + ([] if is_tied else [f"{HEAD}.rows"])
        assert "2 trained tokens" in repr(lm)


def test_only_the_rows_of_the_tokens_change(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, trainable_tokens=[0, 5])
    base = lm.model.embed_tokens.weight.to_numpy()
    trained(lm)
    found = lm.model.embed_tokens(np.arange(VOCAB))
    changed = np.flatnonzero((found != base).any(axis=1))
    assert changed.tolist() == [0, 5]
    with lm.disable_adapter():
        np.testing.assert_array_equal(lm.model.embed_tokens(np.arange(VOCAB)), base)
        np.testing.assert_array_equal(lm.logits(IDS), nplora.load_model(model).logits(IDS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_tokens": ["<|endd|>"]},
         r"'<\|endd\|>' is not a token of the model \(the nearest: '<\|end\|>'"),
        ({"trainable_tokens": [VOCAB]}, f"is token {VOCAB}, but the vocabulary ends with {VOCAB - 1}"),
        ({"trainable_tokens": [0, END]}, r"'<\|end\|>' is given twice, as 0 and by its text"),
        ({"trainable_tokens": [VOCAB, "<|endd|>"]}, r"the vocabulary ends with .*; '<\|endd\|>' is not a"),
        ({"trainable_tokens": [""]}, "expected non-empty texts or ids"),
        ({"trainable_tokens": [""] * 10_000}, "trainable_tokens is .{80}, expected non-empty texts or ids"),
        ({"trainable_tokens": [-1]}, "a trainable token is -1, expected at least 0"),
        ({"modules_to_save": "q_proj"}, "modules_to_save='q_proj' is not available; possible: 'embed_to"),
        ({"modules_to_save": "lm_head", "trainable_tokens": [1]},
         "modules_to_save trains all rows of lm_head; leave trainable_tokens out"),
        ({"targets": "q_proj,embed_tokens", "trainable_tokens": [1]},
         "model.embed_tokens has LoRA factors or trained rows already"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(untied: Path, options: Any, words: str) -> None:
    lm = nplora.load_model(untied)
    with pytest.raises(ValueError, match=f"add_lora: .*{words}"):
        lm.add_lora(rank=2, **options)
    assert not lm.adapter_layers()


def test_a_head_that_shares_the_trained_embedding_gets_no_factors(tmp_path: Path) -> None:
    lm = nplora.load_model(save_small_llama(tmp_path / "m.gguf", without="output.weight"))
    with pytest.raises(ValueError, match="add_lora: lm_head has LoRA factors or trained rows already"):
        lm.add_lora(rank=2, targets="q_proj,lm_head", trainable_tokens=[1])
    lm.add_lora(rank=2, modules_to_save="lm_head")
    assert lm.parameters()[0].name == f"{EMBEDDING}.weight"
    with pytest.raises(
        ValueError, match="add_lora: all layers with the name 'lm_head' have an adapter already"
    ):
        lm.add_lora(rank=2, targets=HEAD, modules_to_save="embed_tokens")


# ---- learning to stop ----


@pytest.mark.slow
def test_a_base_model_learns_to_stop_only_with_its_end_token_trained(untied: Path, tmp_path: Path) -> None:
    """The row of the end token is 0, so that its logit stays 0 whatever the LoRA factors are."""
    file = gguf.open(untied)
    tensors: dict[str, Any] = {name: file[name] for name in file}
    for name in ("output.weight", "token_embd.weight"):
        tensors[name] = file[name].numpy().copy()
        tensors[name][0] = 0
    gguf.save(tmp_path / "base.gguf", tensors, file.metadata.typed())
    data = write_rows(tmp_path / "train.jsonl")
    losses, lengths = [], []
    for number, tokens in enumerate([None, [END]]):
        output = tmp_path / f"out{number}"
        report = nplora.finetune(
            tmp_path / "base.gguf", data, output, valid=data, lr=2e-2, steps=40, trainable_tokens=tokens
        )
        lm = load_with_adapter(tmp_path / "base.gguf", output)
        losses.append(report.loss_after)
        lengths.append([len(text) for text in lm.generate([f"{n}=" for n in range(6)], max_new_tokens=12)])
    assert min(lengths[0]) == 12
    assert max(lengths[1]) <= 2
    assert losses[1] < losses[0] - 1


# ---- files ----


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"trainable_tokens": [0, 5]}, {"modules_to_save": "embed_tokens"}])
def test_a_saved_adapter_comes_back_to_the_bit(model: Path, options: Any, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, **options)
    logits = trained(lm).logits(IDS)
    nplora.save_adapter(lm, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if "trainable_tokens" in options:
        both = {EMBEDDING: [0, 5], HEAD: [0, 5]}
        assert config["trainable_token_indices"] == ([0, 5] if lm.ties_head else both)
    else:
        assert config["modules_to_save"] == [EMBEDDING]
        assert config.get("ensure_weight_tying", False) is lm.ties_head
    np.testing.assert_array_equal(load_with_adapter(model, tmp_path / "a").logits(IDS), logits)
    twin = nplora.load_model(model)
    twin.add_lora(rank=2, **options)
    assert "model.embed_tokens" in nplora.load_adapter(twin, tmp_path / "a").layers
    np.testing.assert_array_equal(twin.logits(IDS), logits)
    Adapter.read(tmp_path / "a").save(tmp_path / "b")
    np.testing.assert_array_equal(load_with_adapter(model, tmp_path / "b").logits(IDS), logits)


def test_named_adapters_and_copies_share_the_frozen_weights(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, trainable_tokens=[0, 5])
    first = Adapter.from_model(trained(lm))
    expected = lm.logits(IDS)
    plain = nplora.load_model(model)
    other = plain.with_adapter(first)
    assert other.lm_head.weight is plain.lm_head.weight
    plain.load_adapter(first, "first")
    np.testing.assert_array_equal(other.logits(IDS), expected)
    before = plain.logits(IDS)
    plain.set_adapter("first")
    np.testing.assert_array_equal(plain.logits(IDS), expected)
    plain.set_adapter(None)
    np.testing.assert_array_equal(plain.logits(IDS), before)
    plain.load_adapter(first, "second")
    with pytest.raises(UnsupportedError, match=r"holds trained tokens .*merge this adapter"):
        plain.set_adapter(["first", "second"])


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "q8_0"])
@pytest.mark.parametrize(
    "options", [{"trainable_tokens": [0, 5]}, {"modules_to_save": "embed_tokens,lm_head"}]
)
@pytest.mark.parametrize("without", ["", "output.weight"])
def test_a_merged_file_has_the_trained_rows(storage: str, options: Any, without: str, tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf", storage, without)
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, **options)
    for parameter in lm.parameters():
        parameter.value[...] += 0.3 * np.random.default_rng(1).standard_normal(parameter.value.shape)
    nplora.save_adapter(lm, tmp_path / "a")
    done = nplora.merge_adapter(model, tmp_path / "a", tmp_path / "merged.gguf")
    merged, base = gguf.open(tmp_path / "merged.gguf"), gguf.open(model)
    for name, layer in (("token_embd.weight", lm.model.embed_tokens), ("output.weight", lm.lm_head)):
        if name in base:
            ids = layer.rows.ids if layer.rows.ids is not None else np.arange(VOCAB)
            wanted = nplora.FrozenWeight(layer.rows.value, storage).to_numpy()
            weight = nplora.FrozenWeight.from_gguf(merged, name)
            np.testing.assert_array_equal(weight.take(ids), wanted)
            others = np.setdiff1d(np.arange(VOCAB), ids)
            raw = [np.frombuffer(file[name].data, np.uint8).reshape(VOCAB, -1) for file in (merged, base)]
            np.testing.assert_array_equal(raw[0][others], raw[1][others])
            assert name in [report.name for report in done.reports]
    lm.merge("same")
    np.testing.assert_allclose(
        nplora.load_model(tmp_path / "merged.gguf").logits(IDS), lm.logits(IDS), atol=1e-4
    )


@pytest.mark.parametrize(
    "options", [{"trainable_tokens": [0, 5]}, {"modules_to_save": "embed_tokens,lm_head"}]
)
def test_rows_that_rounding_loses_are_refused_and_the_named_storage_keeps_them(
    options: Any, tmp_path: Path
) -> None:
    """The change is a fiftieth of a step of the 4-bit blocks, which decode to the old values again."""
    model = save_small_llama(tmp_path / "m.gguf", "q4_0", without="output.weight")
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, layers="last:1", **options)
    rows = lm.model.embed_tokens.rows.value
    step = np.abs(rows.reshape(len(rows), -1, 32)).max(axis=2, keepdims=True).repeat(32, axis=2) / 8
    signs = np.random.default_rng(1).choice([-0.02, 0.02], rows.shape)
    rows += (step.reshape(rows.shape) * signs).astype(np.float32)
    nplora.save_adapter(lm, tmp_path / "a")
    with pytest.raises(ValueError, match=r"rounding to q4_0 would keep .* --dtype \w+ keeps about") as error:
        nplora.merge_adapter(model, tmp_path / "a", tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()
    found = re.search(r"--dtype (\w+) keeps about (\d+)%", str(error.value))
    assert found is not None
    done = nplora.merge_adapter(model, tmp_path / "a", tmp_path / "merged.gguf", found[1])
    assert done.delta_kept == pytest.approx(float(found[2]) / 100, abs=0.02)


def test_preferences_train_the_rows_and_are_told_from_the_model_without_them(
    model: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"{n}=", "chosen": "yes", "rejected": "no"} for n in range(8)]
    options: dict[str, Any] = {"objective": "dpo", "lr": 1e-2, "steps": 4, "batch_examples": 4}
    report = nplora.finetune(model, pairs, tmp_path / "a", valid=pairs, trainable_tokens="=", **options)
    assert report.loss_before == pytest.approx(np.log(2))  # the adapter is still the reference
    assert report.loss_after < report.loss_before - 0.01
    rows = Adapter.read(tmp_path / "a").token_rows[EMBEDDING]
    assert np.abs(rows.values - nplora.load_model(model).model.embed_tokens(rows.ids)).max() > 1e-3


def test_an_adapter_with_trained_rows_is_refused_where_only_factors_fit(untied: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(untied)
    lm.add_lora(rank=2, trainable_tokens=[0, 5])
    nplora.save_adapter(lm, tmp_path / "a")
    words = r"holds trained tokens \('lm_head', 'model.embed_tokens'\)"
    for refusing, remedy in (
        (lambda: nplora.adapter_to_gguf(tmp_path / "a", tmp_path / "a.gguf", untied), "nplora merge"),
        (lambda: nplora.combine([(tmp_path / "a", 1.0)]), "merge this adapter into the model"),
        (lambda: nplora.read_adapter(tmp_path / "a"), "Adapter.read reads it"),
    ):
        with pytest.raises(UnsupportedError, match=words + ".*" + remedy):
            refusing()
    twin = nplora.load_model(untied)
    twin.add_lora(rank=2, trainable_tokens=[0, 6])
    with pytest.raises(FormatError, match=r"trains the tokens \[0, 5\], but the model trains \[0, 6\]"):
        nplora.load_adapter(twin, tmp_path / "a")


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    large, small = (save_small_llama(tmp_path / f"{n}.gguf", vocab=VOCAB + n) for n in (4, 0))
    lm = nplora.load_model(large)
    lm.add_lora(rank=2, trainable_tokens=[VOCAB + 2])
    nplora.save_adapter(lm, tmp_path / "a")
    words = rf"the adapter trains token {VOCAB + 2}, but the vocabulary of .* ends with token {VOCAB - 1}"
    with pytest.raises(FormatError, match=words):
        load_with_adapter(small, tmp_path / "a")
    with pytest.raises(FormatError, match=words):
        nplora.load_model(small).with_adapter(Adapter.read(tmp_path / "a"))
    with pytest.raises(FormatError, match=words):
        nplora.merge_adapter(small, tmp_path / "a", tmp_path / "m.gguf")


def broken(tmp_path: Path, source: Path, **changes: Any) -> Path:
    from nplora.formats import safetensors

    target = tmp_path / "broken"
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | changes
    (target / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.open(source / "adapter_model.safetensors")
    safetensors.save(target / "adapter_model.safetensors", {name: tensors[name].array for name in tensors})
    return target


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([0], r"has shape \(2, 32\), but trainable_token_indices names 1 token for this layer"),
        (None, "has shape .* names 0 tokens"),
        ([5, 5], "token 5 occurs twice in the trained tokens"),
        ({"other": [0, 5]}, "names 0 tokens"),
    ],
)
def test_a_damaged_list_of_tokens_is_refused(untied: Path, indices: Any, words: str, tmp_path: Path) -> None:
    lm = nplora.load_model(untied)
    lm.add_lora(rank=2, trainable_tokens=[0, 5])
    nplora.save_adapter(lm, tmp_path / "a")
    bad = broken(tmp_path, tmp_path / "a", trainable_token_indices=indices)
    with pytest.raises(FormatError, match=words):
        load_with_adapter(untied, bad)


# ---- runs ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"trainable_tokens": [END]}, {"modules_to_save": "embed_tokens,lm_head"}]
)
def test_a_resumed_run_has_the_same_bits(model: Path, options: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    settings: dict[str, Any] = {"rank": 2, "lr": 1e-2, "schedule": "constant", **options}
    nplora.finetune(model, data, tmp_path / "whole", steps=6, **settings)
    nplora.finetune(model, data, tmp_path / "parts", steps=3, **settings)
    with pytest.warns(UserWarning, match="total_steps was 3, is 6"):
        nplora.finetune(model, data, tmp_path / "parts", steps=6, resume=True, **settings)
    one, other = (Adapter.read(tmp_path / name) for name in ("whole", "parts"))
    assert one.token_rows.keys() == other.token_rows.keys()
    for name, rows in one.token_rows.items():
        np.testing.assert_array_equal(rows.values, other.token_rows[name].values)
    for name, parameters in one.modules_to_save.items():
        np.testing.assert_array_equal(parameters["weight"], other.modules_to_save[name]["weight"])
    assert one.token_rows or one.modules_to_save
    changed = (
        {"trainable_tokens": [0, 1]} if "trainable_tokens" in options else {"modules_to_save": "lm_head"}
    )
    if model.name == "untied.gguf" or "trainable_tokens" in options:
        with pytest.raises(ValueError, match="layers"):
            nplora.finetune(model, data, tmp_path / "parts", steps=8, resume=True, **settings | changed)


@pytest.mark.slow
def test_a_run_continues_from_an_adapter_with_its_tokens(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    nplora.finetune(model, data, tmp_path / "one", steps=2, trainable_tokens=[0, 5])
    nplora.finetune(model, data, tmp_path / "two", steps=1, adapter=tmp_path / "one", lr=1e-3)
    rows = [Adapter.read(tmp_path / name).token_rows[EMBEDDING] for name in ("one", "two")]
    assert [row.ids.tolist() for row in rows] == [[0, 5]] * 2
    assert 0 < np.abs(rows[0].values - rows[1].values).max() < 0.01
    with pytest.raises(ValueError, match="trainable_tokens is decided by the adapter to continue from"):
        nplora.finetune(model, data, tmp_path / "x", adapter=tmp_path / "one", trainable_tokens=[1])


@pytest.mark.slow
def test_a_plan_counts_the_values_of_the_trained_rows(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    lm = nplora.load_model(model)
    layers = 1 if lm.ties_head else 2
    plain = nplora.plan(model, data).memory.factors
    tokens = nplora.plan(model, data, trainable_tokens=[0, 5]).memory.factors
    whole = nplora.plan(model, data, modules_to_save="embed_tokens,lm_head").memory.factors
    assert tokens - plain == 16 * 2 * HIDDEN * layers
    assert whole - plain == 16 * VOCAB * HIDDEN * layers
    adapters = Adapters.of(lm, 2, "all-linear", "last:1").with_rows(lm, {HEAD: None})
    assert adapters.first_block(2) == 1
    assert adapters.with_rows(lm, {EMBEDDING: [1]}).first_block(2) == 0
    with pytest.raises(ValueError, match="keep_prefix='memory', but there is no frozen block"):
        nplora.plan(model, data, layers="last:1", keep_prefix="memory", trainable_tokens=[0])
    with pytest.raises(ValueError, match="plan: trainable_tokens: 'x!' is not a token of the model"):
        nplora.plan(model, data, trainable_tokens="x!")
