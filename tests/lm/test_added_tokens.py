"""New tokens of language models: their ids and rows, files, runs, and errors."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.finetuning import FinetuneOptions, compare, held_out_loss, load_with_adapter
from nplora.formats import FormatError, UnsupportedError, safetensors
from nplora.formats.tokenizer_json import AddedToken
from nplora.lm import LanguageModel
from small_llama import HIDDEN, save_small_llama
from vocabularies import byte_level

pytest.importorskip("tokenizers")

VOCAB = len(byte_level()["tokenizer.ggml.tokens"])
NEW = ["<a>", "</a>"]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    without = "output.weight" if request.param == "tied" else ""
    return save_small_llama(tmp_path / f"{request.param}.gguf", without=without)


def some_rows(count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"{n}=", "completion": f"<a>{n % 4}</a>"} for n in range(count)]


def trained(lm: LanguageModel, steps: int = 3) -> LanguageModel:
    optimizer, ids = nplora.AdamW(3e-2), [lm.tokenizer.encode("1<a>2</a>3<a>4")]
    for _ in range(steps):
        lm.train_step(ids, ids, optimizer)
    return lm


# ---- tokens and rows ----


def test_new_tokens_follow_the_last_token_and_are_found_in_text(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens="<a>, </a>", trainable_tokens=[5])
    assert lm.added_tokens == (AddedToken(VOCAB, "<a>"), AddedToken(VOCAB + 1, "</a>"))
    assert (lm.vocab_size, lm.config.vocab_size) == (VOCAB + 2, VOCAB)
    assert f"vocabulary {VOCAB + 2}," in repr(lm)
    ids = lm.tokenizer.encode("x<a>y</a> <|end|>")
    assert [id_ for id_ in ids if id_ >= VOCAB] == [VOCAB, VOCAB + 1]
    assert 0 not in ids  # the special token of the model stays letters
    assert lm.tokenizer.decode(ids) == "x<a>y</a> <|end|>"
    assert lm.tokenizer.decode(ids, skip_special_tokens=True) == "x<a>y</a> <|end|>"
    assert lm.tokenizer.encode_chat([{"role": "user", "content": "<a>"}]) == [VOCAB]
    for layer in (lm.model.embed_tokens, lm.lm_head):
        assert layer.rows.ids.tolist() == [5, VOCAB, VOCAB + 1]
    plain = nplora.load_model(model)
    assert plain.tokenizer.encode("x<a>") != lm.tokenizer.encode("x<a>")
    assert plain.vocab_size == VOCAB
    with pytest.raises(ValueError, match="token_ids"):
        plain.logits([VOCAB])


def test_old_tokens_keep_their_logits_until_the_new_rows_are_trained(model: Path) -> None:
    lm = nplora.load_model(model)
    ids = np.array([[5, 0, 7, 1]])
    before = lm.logits(ids)
    table, head = lm.model.embed_tokens.weight.to_numpy(), lm.lm_head.weight.to_numpy()
    lm.add_lora(rank=2, add_tokens=NEW)
    np.testing.assert_array_equal(lm.logits(ids)[..., :VOCAB], before)
    np.testing.assert_allclose(lm.model.embed_tokens([VOCAB])[0], table.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(lm.lm_head.rows.value, [head.mean(axis=0)] * 2, atol=1e-6)
    new = np.array([[5, VOCAB, 7, VOCAB + 1]])
    start = lm.logits(new)
    trained(lm)
    assert np.abs(lm.logits(new) - start).max() > 0.1
    with lm.disable_adapter():
        np.testing.assert_array_equal(lm.logits(new), start)
    np.testing.assert_array_equal(nplora.load_model(model).with_tokens(lm.added_tokens).logits(new), start)


def test_a_token_of_the_model_is_trained_only(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=["<tool>", "<a>", "hello"])
    known = byte_level()["tokenizer.ggml.tokens"].index("hello")
    assert lm.model.embed_tokens.rows.ids.tolist() == [VOCAB - 1, known, VOCAB]
    assert [token.text for token in lm.added_tokens] == ["<a>"]
    np.testing.assert_array_equal(
        lm.model.embed_tokens.rows.value[0], lm.model.embed_tokens.weight.take([VOCAB - 1])[0]
    )
    rows = [{"prompt": "<tool>", "completion": "hello"}] * 4
    with pytest.warns(UserWarning, match=rf"the model already has '<tool>' \(token {VOCAB - 1}\)"):
        nplora.finetune(model, rows, tmp_path / "out", steps=1, add_tokens="<tool>")
    adapter = Adapter.read(tmp_path / "out")
    assert not adapter.added_tokens
    assert adapter.token_rows[EMBEDDING].ids.tolist() == [VOCAB - 1]
    assert sorted(os.listdir(tmp_path / "out")).count("tokenizer.json") == 0


@pytest.mark.parametrize("more", [1, 4])
def test_new_tokens_take_rows_that_pad_the_embedding(more: int, tmp_path: Path) -> None:
    """The tokenizer ends before the embedding; with too few such rows, others follow the last one."""
    path = save_small_llama(tmp_path / "m.gguf", vocab=VOCAB + more)
    lm = nplora.load_model(path)
    lm.add_lora(rank=2, add_tokens=NEW)
    assert lm.model.embed_tokens.rows.ids.tolist() == [VOCAB, VOCAB + 1]
    assert lm.vocab_size == VOCAB + max(more, 2)
    table = lm.model.embed_tokens.weight.to_numpy()
    np.testing.assert_allclose(lm.model.embed_tokens.rows.value, [table.mean(axis=0)] * 2, atol=1e-6)
    logits = trained(lm).logits([VOCAB, 1, VOCAB + 1])
    nplora.save_adapter(lm, tmp_path / "a")
    again = load_with_adapter(path, tmp_path / "a")
    np.testing.assert_array_equal(again.logits([VOCAB, 1, VOCAB + 1]), logits)
    assert again.tokenizer.encode("<a></a>") == [VOCAB, VOCAB + 1]


def test_a_token_without_a_row_gets_one_too(tmp_path: Path) -> None:
    """The tokenizer of Gemma 3 has a token more than its embedding has rows."""
    path = save_small_llama(tmp_path / "m.gguf", vocab=VOCAB - 1)
    lm = nplora.load_model(path)
    lm.add_lora(rank=2, add_tokens="<a>")
    assert lm.model.embed_tokens.rows.ids.tolist() == [VOCAB, VOCAB - 1]
    logits = trained(lm).logits([VOCAB, 1])
    nplora.save_adapter(lm, tmp_path / "a")
    np.testing.assert_array_equal(load_with_adapter(path, tmp_path / "a").logits([VOCAB, 1]), logits)
    other = nplora.load_model(path)
    other.add_lora(rank=2, add_tokens="<tool>")
    assert other.added_tokens == (AddedToken(VOCAB - 1, "<tool>"),)
    assert other.logits(other.tokenizer.encode("<tool>")).shape == (1, VOCAB)


def test_a_tokenizer_whose_ids_have_gaps_takes_no_tokens(tmp_path: Path) -> None:
    import tokenizers

    words = {"a": 0, "b": 1, "c": 5}
    model = tokenizers.models.WordLevel(words, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = nplora.tokenizer.from_directory(tmp_path)
    with pytest.raises(
        UnsupportedError, match=r"the tokenizer's ids have gaps, so '<a>' gets the id 3, expected 6"
    ):
        tokenizer.with_tokens([AddedToken(6, "<a>")])
    with pytest.raises(UnsupportedError, match="cannot become token 3, because this id is a gap"):
        tokenizer.with_tokens([AddedToken(3, "<a>")])


def test_modules_to_save_train_the_new_rows_too(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW, modules_to_save="lm_head")
    shapes = {p.name: p.value.shape for p in lm.parameters() if "layers" not in p.name}
    whole = (VOCAB + 2, HIDDEN)
    assert shapes == (
        {f"{EMBEDDING}.weight": whole}
        if lm.ties_head
        else {f"{EMBEDDING}.rows": (2, HIDDEN), f"{HEAD}.weight": whole}
    )
    logits = trained(lm).logits([VOCAB, 1])
    nplora.save_adapter(lm, tmp_path / "a")
    np.testing.assert_array_equal(load_with_adapter(model, tmp_path / "a").logits([VOCAB, 1]), logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"add_tokens": "<a>,,<b>"}, "add_tokens: a token is empty"),
        ({"add_tokens": ["  "]}, "add_tokens: a token is empty"),
        ({"add_tokens": "<a>,<b>,<a>,"}, "add_tokens: '<a>' is given twice; a token is empty"),
        ({"add_tokens": ["x" * 5000]}, "has 5,000 characters, expected at most 4,096"),
        ({"add_tokens": ["\ud800"]}, "holds half a surrogate pair"),
        ({"add_tokens": ["<tool>"], "trainable_tokens": ["<tool>"]},
         f"token {VOCAB - 1} is in trainable_tokens and in add_tokens; name it once"),
        ({"add_tokens": "<a>", "targets": "q_proj,embed_tokens"},
         "model.embed_tokens has LoRA factors or trained rows already"),
        ({"add_tokens": "<a>", "invocation": [5]}, r"\(invocation\) cannot be combined with add_tokens"),
    ],
)  # fmt: skip
def test_bad_tokens_are_refused(model: Path, options: Any, words: str) -> None:
    lm = nplora.load_model(model)
    with pytest.raises(ValueError, match=f"add_lora: .*{words}"):
        lm.add_lora(rank=2, **options)
    assert not lm.adapter_layers()
    assert lm.vocab_size == VOCAB


def test_other_kinds_of_values_are_refused(model: Path) -> None:
    with pytest.raises(TypeError, match=r"add_tokens is \[5\], expected a list of texts"):
        nplora.load_model(model).add_lora(rank=2, add_tokens=[5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="finetune: add_tokens: '<a>' is given twice"):
        FinetuneOptions(add_tokens=["<a>", "<a>"])
    with pytest.raises(ValueError, match="add_tokens is decided by the adapter to continue from"):
        FinetuneOptions(add_tokens="<a>", adapter="x")


# ---- merging in memory, and named adapters ----


def test_an_unloaded_model_keeps_the_tokens(model: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    ids = [VOCAB, 3, VOCAB + 1]
    before = trained(lm).logits(ids)
    lm.merge_and_unload()
    np.testing.assert_allclose(lm.logits(ids), before, atol=1e-4)
    assert not lm.adapter_layers()
    assert (lm.vocab_size, lm.tokenizer.encode("<a>")) == (VOCAB + 2, [VOCAB])


@pytest.mark.slow
def test_a_named_adapter_brings_its_tokens(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    ids = [VOCAB, 3, VOCAB + 1]
    expected = trained(lm, 30).logits(ids)
    text = lm.generate("1<a>", max_new_tokens=4)
    assert "<" in text
    nplora.save_adapter(lm, tmp_path / "a")
    plain = nplora.load_model(model)
    plain.load_adapter(tmp_path / "a", "tools")
    assert plain.tokenizer.encode("<a>") != [VOCAB]
    plain.set_adapter("tools")
    np.testing.assert_array_equal(plain.logits(ids), expected)
    assert plain.generate("1<a>", max_new_tokens=4) == text
    assert plain.tokenizer.encode("<a>") == [VOCAB]
    assert plain.loss([ids], [ids]) == lm.loss([ids], [ids])
    plain.set_adapter(None)
    assert plain.vocab_size == VOCAB
    assert plain.tokenizer.encode("<a>") != [VOCAB]


# ---- files ----


def test_the_saved_files_hold_the_tokens(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    nplora.save_adapter(lm, tmp_path / "a")
    names = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    added = json.loads((tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [(t["id"], t["content"], t["special"]) for t in added[-2:]] == [
        (VOCAB, "<a>", False), (VOCAB + 1, "</a>", False),
    ]  # fmt: skip
    Adapter.read(tmp_path / "a").save(tmp_path / "b")  # without the tokenizer, but with the tokens
    assert load_with_adapter(model, tmp_path / "b").tokenizer.encode("</a>") == [VOCAB + 1]
    twin = nplora.load_model(model)
    twin.add_lora(rank=2, add_tokens=NEW)
    nplora.load_adapter(twin, tmp_path / "a")
    other = nplora.load_model(model)
    other.add_lora(rank=2, add_tokens=["<b>", "</a>"])
    with pytest.raises(FormatError, match=r"new tokens .*'<a>'.* but the model has .*'<b>'"):
        nplora.load_adapter(other, tmp_path / "a")
    plain = nplora.load_model(model)
    plain.add_lora(rank=2)
    nplora.save_adapter(plain, tmp_path / "a")  # the old tokenizer does not stay beside the new adapter
    assert sorted(os.listdir(tmp_path / "a")) == names[:2]


def rewritten(source: Path, target: Path, tokens: Any) -> Path:
    """A copy of an adapter with other tokens in its metadata."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    file = safetensors.open(source / "adapter_model.safetensors")
    metadata = {**file.metadata, "added_tokens": tokens if isinstance(tokens, str) else json.dumps(tokens)}
    tensors = {name: file[name].array for name in file}
    safetensors.save(target / "adapter_model.safetensors", tensors, metadata)
    return target


def token(id_: Any, text: Any) -> dict[str, Any]:
    return {"id": id_, "text": text, "special": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("[", "added_tokens"),
        ({}, "expected a list of tokens"),
        ([token(VOCAB, "")], "expected an id, a text of 1 to 4,096 characters"),
        ([token(-1, "<a>")], "expected an id"),
        ([token("5", "<a>")], "expected an id"),
        ([token(True, "<a>")], "expected an id"),
        ([5], "expected an id"),
        ([token(VOCAB, "<a>"), token(VOCAB, "<b>")], f"two added tokens have the id {VOCAB}"),
        ([token(VOCAB, "<a>"), token(VOCAB + 1, "<a>")], "two added tokens have the text '<a>'"),
        ([token(1 << 30, "<a>")], f"is token {1 << 30}, but neither the adapter nor the model"),
        ([token(VOCAB, "<tool>")], f"was added as token {VOCAB}, but in this model '<tool>' is token"),
        ([token(5, "<a>"), token(VOCAB, "<b>")], "was added as token 5, but in this model token 5 is"),
        ([], "the adapter trains token .*save its tokenizer in the directory of the adapter"),
    ],
)  # fmt: skip
def test_damaged_tokens_are_refused(model: Path, tokens: Any, words: str, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    nplora.save_adapter(lm, tmp_path / "a")
    bad = rewritten(tmp_path / "a", tmp_path / "bad", tokens)
    plain = nplora.load_model(model)
    with pytest.raises(FormatError, match=words):
        nplora.finetuning.attach_adapter(plain, bad)
    assert not plain.adapter_layers()


def test_a_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    small, large = (save_small_llama(tmp_path / f"{n}.gguf", vocab=VOCAB + n) for n in (0, 3))
    lm = nplora.load_model(large)
    lm.add_lora(rank=2, add_tokens=["<a>", "<b>", "<c>", "<d>"])  # the last one is beyond the end
    nplora.save_adapter(lm, tmp_path / "a")
    load_with_adapter(small, tmp_path / "a")  # all four rows follow the last one
    words = byte_level()["tokenizer.ggml.tokens"]
    longer = save_small_llama(
        tmp_path / "l.gguf", vocab=VOCAB + 1, changes={
            "tokenizer.ggml.tokens": [*words, "<other>"],
            "tokenizer.ggml.token_type": nplora.formats.gguf.Typed([3] + [1] * len(words), "INT32"),
        },
    )  # fmt: skip
    words = f"'<a>' was added as token {VOCAB}, but in this model token {VOCAB} is"
    with pytest.raises(FormatError, match=words):
        load_with_adapter(longer, tmp_path / "a")
    shorter = save_small_llama(
        tmp_path / "s.gguf", vocab=VOCAB - 1, changes={
            "tokenizer.ggml.tokens": words[:-1],
            "tokenizer.ggml.token_type": nplora.formats.gguf.Typed([3] + [1] * (len(words) - 2), "INT32"),
        },
    )  # fmt: skip
    with pytest.raises(FormatError, match=f"vocabulary of the model ends with token {VOCAB - 2}"):
        load_with_adapter(shorter, tmp_path / "a")


def test_what_holds_only_factors_refuses_added_tokens(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    nplora.save_adapter(lm, tmp_path / "a")
    for refusing in (
        lambda: nplora.adapter_to_gguf(tmp_path / "a", tmp_path / "a.gguf", model),
        lambda: nplora.combine([(tmp_path / "a", 1.0)]),
    ):
        with pytest.raises(UnsupportedError, match="holds trained tokens"):
            refusing()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "q8_0"])
@pytest.mark.parametrize("without", ["", "output.weight"])
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": "lm_head"}, {"modules_to_save": "embed_tokens,lm_head"}]
)
def test_a_merged_file_has_the_tokens(storage: str, without: str, options: Any, tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "m.gguf", storage, without)
    rows = some_rows()
    nplora.finetune(path, rows, tmp_path / "a", add_tokens=NEW, lr=2e-2, steps=10, **options)
    done = nplora.merge_adapter(path, tmp_path / "a", tmp_path / "merged.gguf", check=held_out_loss(rows))
    assert done.delta_kept > 0.9
    lm, merged = load_with_adapter(path, tmp_path / "a"), nplora.load_model(tmp_path / "merged.gguf")
    assert merged.config.vocab_size == merged.vocab_size == VOCAB + 2
    text = "12<a>3</a><|end|>"
    assert merged.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert merged.tokenizer.eos_id == lm.tokenizer.eos_id
    ids = lm.tokenizer.encode(text)
    tolerance = 1e-4 if storage == "float32" else 0.2
    np.testing.assert_allclose(merged.logits(ids), lm.logits(ids), atol=tolerance)
    files = nplora.formats.gguf.open(path), nplora.formats.gguf.open(tmp_path / "merged.gguf")
    raw = [np.frombuffer(file["token_embd.weight"].data, np.uint8).reshape(n, -1)
           for file, n in zip(files, (VOCAB, VOCAB + 2), strict=True)]  # fmt: skip
    if not options:
        np.testing.assert_array_equal(raw[0], raw[1][:VOCAB])
    words = files[1].metadata.strings("tokenizer.ggml.tokens")
    assert words[VOCAB - 1 :] == ["<tool>", *NEW]
    assert files[1].metadata.array("tokenizer.ggml.token_type", "INT32", VOCAB + 2)[-2:].tolist() == [4, 4]


@pytest.mark.slow
def test_a_merge_that_loses_too_much_names_a_type_that_keeps_the_tokens(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "m.gguf", "q4_0", "output.weight")
    rows = some_rows()
    nplora.finetune(path, rows, tmp_path / "a", add_tokens=NEW, lr=1e-4, steps=2)
    with pytest.raises(ValueError, match=r"--dtype \w+ keeps about"):
        nplora.merge_adapter(
            path, tmp_path / "a", tmp_path / "merged.gguf", check=held_out_loss(rows), tolerance=0
        )
    assert not (tmp_path / "merged.gguf").exists()


def test_a_merge_refuses_tokens_that_the_model_names_otherwise(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, add_tokens=NEW)
    nplora.save_adapter(lm, tmp_path / "a")
    bad = rewritten(tmp_path / "a", tmp_path / "bad", [token(VOCAB, "<tool>"), token(VOCAB + 1, "<b>")])
    with pytest.raises(FormatError, match="but in this model '<tool>' is token"):
        nplora.merge_adapter(model, bad, tmp_path / "merged.gguf")


# ---- runs ----


@pytest.mark.slow
def test_a_run_learns_its_new_tokens_and_evaluates_and_continues(model: Path, tmp_path: Path) -> None:
    rows = some_rows()
    report = nplora.finetune(
        model, rows, tmp_path / "out", valid=rows, add_tokens=NEW, lr=2e-2, steps=30, sample=["1="]
    )
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before - 2
    assert report.samples[0].after.startswith("<a>")
    found = nplora.evaluate(model, rows, adapter=tmp_path / "out")
    assert found["loss"] == report.loss_after
    nplora.finetune(model, rows, tmp_path / "two", adapter=tmp_path / "out", steps=2, lr=1e-3)
    assert load_with_adapter(model, tmp_path / "two").tokenizer.encode("<a></a>") == [VOCAB, VOCAB + 1]
    comparison = compare(model, rows, {"one": tmp_path / "out", "two": tmp_path / "two"})
    assert comparison.evaluations["one"]["loss"] == report.loss_after
    nplora.finetune(model, rows, tmp_path / "other", add_tokens="<a>", steps=1)
    with pytest.raises(ValueError, match=r"one adds the tokens \['<a>', '</a>'\], but other adds \['<a>'\]"):
        compare(model, rows, {"one": tmp_path / "out", "other": tmp_path / "other"})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"modules_to_save": "embed_tokens,lm_head"}])
def test_a_resumed_run_has_the_same_bits(model: Path, options: Any, tmp_path: Path) -> None:
    rows = some_rows()
    settings: dict[str, Any] = {"rank": 2, "lr": 1e-2, "schedule": "constant", "add_tokens": NEW, **options}
    nplora.finetune(model, rows, tmp_path / "whole", steps=6, **settings)
    nplora.finetune(model, rows, tmp_path / "parts", steps=3, **settings)
    with pytest.warns(UserWarning, match="total_steps was 3, is 6"):
        nplora.finetune(model, rows, tmp_path / "parts", steps=6, resume=True, **settings)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts")]
    one, other = map(safetensors.open, files)
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name].array, other[name].array)
    with pytest.raises(ValueError, match=r"the run cannot continue with other data or settings"):
        nplora.finetune(
            model, rows, tmp_path / "parts", steps=8, resume=True, **settings | {"add_tokens": NEW[::-1]}
        )


def test_preferences_begin_with_the_reference(model: Path, tmp_path: Path) -> None:
    """The reference has the new tokens too, with the rows that the adapter starts with."""
    pairs = [{"prompt": f"{n}=", "chosen": "<a>yes", "rejected": "no"} for n in range(8)]
    options: dict[str, Any] = {"objective": "dpo", "lr": 1e-2, "steps": 4, "batch_examples": 4}
    report = nplora.finetune(model, pairs, tmp_path / "a", valid=pairs, add_tokens="<a>", **options)
    assert report.loss_before == pytest.approx(np.log(2))
    assert report.loss_after is not None
    assert report.loss_after < report.loss_before - 0.01


def test_a_run_refuses_and_warns_before_it_writes(model: Path, tmp_path: Path) -> None:
    rows = some_rows(4)
    with pytest.warns(UserWarning, match="no example has any of these new tokens: '<b>', '<c>'"):
        nplora.plan(model, rows, add_tokens="<a>,<b>,<c>")
    with pytest.raises(ValueError, match=r"'distill' cannot train added tokens \('<a>'\), because the"):
        nplora.finetune(
            model,
            rows,
            tmp_path / "x",
            add_tokens="<a>",
            objective="distill",
            teacher=nplora.load_model(model),
        )
    assert not (tmp_path / "x").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="does not belong to a LoRA adapter"):
        nplora.finetune(model, rows, tmp_path / "own", add_tokens="<a>", steps=1)
    assert (tmp_path / "own" / "tokenizer.json").read_text() == "{}"


@pytest.mark.slow
def test_a_plan_counts_the_new_rows(model: Path) -> None:
    rows = some_rows()
    layers = 1 if nplora.load_model(model).ties_head else 2
    plain = nplora.plan(model, rows).memory.factors
    added = nplora.plan(model, rows, add_tokens=NEW).memory.factors
    whole = nplora.plan(model, rows, add_tokens=NEW, modules_to_save="embed_tokens,lm_head").memory.factors
    assert added - plain == 16 * 2 * HIDDEN * layers
    assert whole - plain == 16 * (VOCAB + 2) * HIDDEN * layers
