"""Activated LoRA (aLoRA): the tokens on which it acts, its errors, files and runs."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.finetuning import load_with_adapter
from nplora.formats import FormatError, UnsupportedError, gguf
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate
from nplora.models.invocation import NEVER, active_in, start_of, starts_in
from nplora.models.packing import pack
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

CALL = (5, 9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf", without="output.weight")


def activated(model: Path, **options: Any) -> LanguageModel:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, invocation=CALL, **options)
    for parameter in lm.parameters():
        parameter.value[...] += 0.3 * np.random.default_rng(1).standard_normal(parameter.value.shape)
    return lm


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([5, 9], 0),
        ([1, 5, 9, 2], 1),
        ([5, 9, 5, 9, 1], 2),
        ([5, 5, 9], 1),
        ([5], NEVER),
        ([9, 5], NEVER),
        ([], NEVER),
    ],
)
def test_it_acts_from_the_last_occurrence_on(ids: list[int], start: int) -> None:
    assert start_of(np.array(ids, np.int32), CALL) == start


def test_sequences_of_a_batch_are_searched_each_for_itself() -> None:
    ids = np.array([1, 5, 9, 2, 5, 9, 7, 5])
    assert active_in(ids, np.array([0, 4, 5, 8]), CALL).tolist() == [1, 2, 3]
    assert active_in(ids, np.array([0, 4, 4, 8]), CALL).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_tokens_before_the_call_are_those_of_the_base_model_to_the_bit(model: Path) -> None:
    lm, plain = activated(model), nplora.load_model(model)
    ids = np.random.default_rng(0).integers(10, 99, 40)
    ids[20:22] = CALL
    logits, base = lm.logits(ids), plain.logits(ids)
    np.testing.assert_array_equal(logits[:20], base[:20])
    assert (np.abs(logits[20:] - base[20:]).max(axis=1) > 1e-3).all()
    ids[21] = 0
    np.testing.assert_array_equal(lm.logits(ids), plain.logits(ids))


def test_decoding_in_pieces_finds_the_call_in_a_piece_or_is_told_where_it_is(model: Path) -> None:
    lm = activated(model)
    ids = np.random.default_rng(0).integers(10, 99, (2, 30))
    ids[0, 12:14] = ids[0, 20:22] = CALL
    expected = lm.logits(ids)
    for told in (False, True):
        cache = lm.new_cache(2, 30)
        for row in range(2) if told else ():
            cache.activate(row, ids[row])
        for first, stop in ((0, 15), (15, 25), (25, 26), (26, 30)):
            logits = lm.decode(ids[:, first:stop], [0, 1], cache)
        np.testing.assert_allclose(logits[1], expected[1, -1], atol=1e-4)
        assert np.allclose(logits[0], expected[0, -1], atol=1e-4) == told  # the first call of the two acted
    cache = lm.new_cache(1, 30)
    lm.decode(ids[:1, 13:], [0], cache)
    assert cache.activation.tolist() == [7]
    cache.reset()
    lm.decode(ids[:1, 14:20], [0], cache)
    assert cache.activation.tolist() == [-1]


def test_continuations_are_scored_with_the_adapter_from_the_call_in_their_prompt_on(model: Path) -> None:
    lm = activated(model)
    prompts = [[11, *CALL, 12, *CALL, 13], [14, 15], [*CALL]]
    continuations = [[[8], [9, 10, 3]], [[4, 2], [6, 7]], [[1, 2], [3]]]
    found = lm.continuation_scores(prompts, continuations)
    plain = nplora.load_model(model).continuation_scores(prompts, continuations)
    for prompt, several, scores, base in zip(prompts, continuations, found, plain, strict=True):
        for tokens, score, without in zip(several, scores, base, strict=True):
            logits = lm.logits([*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(score.log_probs, logs[np.arange(len(tokens)), tokens], atol=1e-5)
            acts = np.abs(score.log_probs - without.log_probs).max() > 1e-3
            assert acts == (prompt != [14, 15])


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_a_text_is_generated_as_without_a_cache(compute: str, tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf", "q8_0", without="output.weight")
    nplora.save_adapter(activated(model), tmp_path / "a")
    lm = load_with_adapter(model, tmp_path / "a", compute=compute)
    call = lm.tokenizer.decode(CALL)
    prompt = f"ab{call}cd{call}x"
    text = generate(lm, [prompt], Sampling(max_new_tokens=6))[0]
    ids = lm.tokenizer.encode_prompt(prompt)
    assert start_of(np.array(ids), CALL) != NEVER
    expected: list[int] = []
    for _ in range(6):
        cache = lm.new_cache(1, 64)
        expected.append(int(lm.decode([ids + expected], [0], cache)[0].argmax()))
    assert text == lm.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "q_proj,embed_tokens"}, "cannot be combined with the target model.embed_tokens"),
        ({"use_dora": True}, "cannot be combined with use_dora"),
        ({"dropout": 0.1}, "cannot be combined with dropout"),
        ({"init": "pissa"}, "cannot be combined with init='pissa'"),
        ({"trainable_tokens": [1]}, "cannot be combined with trainable_tokens"),
        ({"invocation": ""}, "invocation is '', expected at least one token"),
        ({"invocation": [9999]}, "invocation"),
    ],
)
def test_what_does_not_go_with_it_is_refused(model: Path, options: Any, words: str) -> None:
    lm = nplora.load_model(model)
    with pytest.raises(ValueError, match=f"add_lora: .*{words}"):
        lm.add_lora(**{"invocation": CALL, **options})
    assert not lm.adapter_layers()


def test_files_keep_the_invocation_tokens(model: Path, tmp_path: Path) -> None:
    lm = activated(model)
    ids = np.array([1, 2, *CALL, 3, 4])
    nplora.save_adapter(lm, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == list(CALL)
    nplora.adapter_to_gguf(tmp_path / "a", tmp_path / "a.gguf", model)
    stored = gguf.open(tmp_path / "a.gguf").metadata["adapter.alora.invocation_tokens"]
    assert (stored.dtype, stored.tolist()) == (np.uint32, list(CALL))
    nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "b", model)
    for name in ("a", "a.gguf", "b"):
        np.testing.assert_allclose(
            load_with_adapter(model, tmp_path / name).logits(ids), lm.logits(ids), atol=1e-5
        )
    plain = nplora.load_model(model)
    plain.load_adapter(tmp_path / "a", "called")
    plain.set_adapter("called")
    np.testing.assert_allclose(plain.logits(ids), lm.logits(ids), atol=1e-5)


def test_its_update_is_not_added_to_weights(model: Path, tmp_path: Path) -> None:
    lm = activated(model)
    nplora.save_adapter(lm, tmp_path / "a")
    for merging in (lm.merge, lm.merge_and_unload):
        with pytest.raises(ValueError, match=r"activated LoRA .* cannot be merged into the weight"):
            merging()
    assert lm.adapter_layers()
    words = r"is an activated LoRA .* so its update cannot be added to the weights"
    with pytest.raises(UnsupportedError, match=rf"merge: .* {words}"):
        nplora.merge_adapter(model, tmp_path / "a", tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match=rf"combine: .* {words}"):
        nplora.combine([(tmp_path / "a", 1.0)])


def test_a_file_that_adapts_the_head_too_is_refused(model: Path, tmp_path: Path) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, targets="q_proj,lm_head")
    adapter = Adapter.from_model(lm)
    adapter.invocation_tokens = CALL
    with pytest.raises(UnsupportedError, match="can only adapt linear layers of a language model's blocks"):
        adapter.attach(nplora.load_model(model))


def write_rows(path: Path, prompt: str) -> Path:
    rows = [{"prompt": f"{n}{prompt}", "completion": str(n % 4)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_frozen_b_leaves_the_other_gradients_as_they_are(model: Path) -> None:
    ids = np.array([[1, 5, 9, 2, 7, 3], [4, 4, 5, 9, 1, 1]])
    found = []
    for freeze_B in (False, True):
        lm = nplora.load_model(model)
        lm.add_lora(rank=2, invocation=CALL, freeze_B=freeze_B)
        for name, layer in lm.adapter_layers().items():
            layer.A[...] = 0.3 * np.random.default_rng(len(name)).standard_normal(layer.A.shape)
        batch = pack(zip(ids, ids, strict=True))
        lm.forward_backward(batch, 1 / batch.num_targets)
        found.append({parameter.name: parameter.grad for parameter in lm.parameters()})
    whole, frozen = found
    assert frozen.keys() == {name for name in whole if name.endswith(".A")}
    for name, gradient in frozen.items():
        np.testing.assert_array_equal(gradient, whole[name])
        assert gradient.any()


@pytest.mark.slow
def test_a_run_learns_and_resumes_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", "=>")
    settings: dict[str, Any] = {"rank": 2, "lr": 1e-2, "schedule": "constant", "invocation": "=>"}
    report = nplora.finetune(model, data, tmp_path / "whole", valid=data, steps=8, **settings)
    assert report.loss_after < report.loss_before - 0.1
    nplora.finetune(model, data, tmp_path / "parts", valid=data, steps=4, **settings)
    with pytest.warns(UserWarning, match="total_steps was 4, is 8"):
        nplora.finetune(model, data, tmp_path / "parts", valid=data, steps=8, resume=True, **settings)
    one, other = (Adapter.read(tmp_path / name) for name in ("whole", "parts"))
    assert (
        one.invocation_tokens
        == other.invocation_tokens
        == tuple(nplora.load_model(model).tokenizer.encode("=>"))
    )
    for name, delta in one.items():
        np.testing.assert_array_equal(delta.A, other[name].A)
    assert nplora.evaluate(model, data, adapter=tmp_path / "whole")["loss"] == pytest.approx(
        report.loss_after
    )
    with pytest.raises((ValueError, FormatError), match="layers"):
        nplora.finetune(
            model, data, tmp_path / "parts", steps=9, resume=True, **settings | {"invocation": ">"}
        )


def test_data_without_the_call_are_refused_or_warned_of(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", "=>")
    with pytest.raises(ValueError, match="24 of 24 examples do not have the invocation tokens"):
        nplora.finetune(model, data, tmp_path / "out", invocation="@@")
    tokens = nplora.load_model(model).tokenizer.encode("@@")
    message = (
        f"finetune: {data}: 24 of 24 examples do not have the invocation tokens {tokens} (the text '@@'), so "
        "the adapter has no effect on these examples; set --invocation (invocation=) to a text that stands "
        "just before the answers and has the same tokens in each example"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        nplora.finetune(model, data, tmp_path / "out", invocation="@@")
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "1", "completion": "2"}) + "\n")
    with pytest.warns(
        UserWarning, match=r"plan: .*train.jsonl: 1 of 25 examples do not have the invocation tokens"
    ):
        nplora.plan(model, data, invocation="=>")


def write_lines(directory: Path, *files: list[Any]) -> None:
    for number, rows in enumerate(files):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{number}.jsonl").write_text(text)


def test_trained_tokens_before_the_last_call_are_warned_of(tmp_path: Path) -> None:
    """The adapter cannot change them. In a chat, these are all turns of the assistant but the last."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    model = save_small_llama(tmp_path / "m.gguf", changes={"tokenizer.chat_template": template})
    turns = [("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fg")]
    messages = [{"role": role, "content": content} for role, content in turns]
    options: dict[str, Any] = {"invocation": "<assistant>", "steps": 1, "rank": 1}
    words = "of {} trained tokens come before the last invocation of their example, so the adapter has no"
    lm = nplora.load_model(model)
    first, second = (lm.tokenizer.encode_conversation(messages[:count]).is_reply for count in (2, 4))
    early, total = sum(first), sum(second)
    with pytest.warns(UserWarning, match=f"{early} {words.format(total)}"):
        nplora.plan(model, [{"messages": messages}], **options)
    messages[3]["weight"] = 0  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"{early} {words.format(early)}"):
        nplora.plan(model, [{"messages": messages}], **options)
    # Another example has no invocation, so no trained token at all follows one.
    write_lines(tmp_path, [{"messages": messages}], [{"prompt": "a", "completion": "b"}])
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    words = f"{early} of .* trained tokens come before"
    with (
        pytest.warns(UserWarning, match="1 of 2 examples do not have the invocation tokens"),
        pytest.raises(ValueError, match=words),
    ):
        nplora.plan(model, files, **options)
    messages[1]["weight"], messages[3]["weight"] = 0, 1  # type: ignore[assignment]
    nplora.plan(model, [{"messages": messages}], **options)


def test_a_chat_without_the_call_is_refused_with_what_begins_an_answer(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    changes = {"tokenizer.chat_template": template}
    model = save_small_llama(tmp_path / "model.gguf", without="output.weight", changes=changes)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    advice = "each example; this chat template writes '<assistant>' before each answer$"
    with pytest.raises(ValueError, match=advice):
        nplora.plan(model, [{"messages": chat}], invocation="<|assistant|>")
    nplora.plan(model, [{"messages": chat}], invocation="<assistant>")


def test_validation_data_without_the_call_are_refused_too(model: Path, tmp_path: Path) -> None:
    data, other = write_rows(tmp_path / "train.jsonl", "=>"), write_rows(tmp_path / "valid.jsonl", ">")
    for call in (nplora.plan, functools.partial(nplora.finetune, output=tmp_path / "out")):
        with pytest.raises(ValueError, match=r"valid.jsonl: 24 of 24 examples do not have the invocation"):
            call(model, data, valid=other, invocation="=>")
    assert not (tmp_path / "out").exists()


def test_a_run_from_an_activated_adapter_refuses_dropout(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", "=>")
    nplora.finetune(model, data, tmp_path / "first", rank=2, steps=1, invocation="=>")
    for call in (nplora.plan, functools.partial(nplora.finetune, output=tmp_path / "out")):
        with pytest.raises(ValueError, match=r"activated LoRA .invocation. cannot be combined with dropout"):
            call(model, data, adapter=tmp_path / "first", dropout=0.1)
    assert not (tmp_path / "out").exists()
    nplora.finetune(model, data, tmp_path / "out", adapter=tmp_path / "first", steps=1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_sequences_with_the_call_are_found_in_packed_tokens(length: int, rng: np.random.Generator) -> None:
    """Against a search in each sequence by itself: a call never crosses two sequences."""
    for size in (0, 1, 2, 400):
        ids = rng.integers(0, 2, size)
        starts = np.unique([0, *rng.integers(0, size + 1, size // 3), size])
        call = tuple(rng.integers(0, 2, length).tolist())
        expected = [
            max((i for i in range(begin, end - length + 1) if tuple(ids[i : i + length].tolist()) == call),
                default=NEVER)
            for begin, end in itertools.pairwise(starts)
        ]  # fmt: skip
        assert starts_in(ids, starts, call).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preferences_are_learned_from_the_call_on(objective: str, model: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}=>", "chosen": "yes", "rejected": "no"} for n in range(8)]
    options: dict[str, Any] = {"objective": objective, "rank": 2, "lr": 1e-2, "steps": 4, "batch_examples": 4}
    report = nplora.finetune(model, pairs, tmp_path / "a", valid=pairs, invocation="=>", **options)
    assert report.loss_after < report.loss_before
    number = 16 if objective == "kto" else 8
    with pytest.raises(ValueError, match=f"{number} of {number} examples do not have the invocation tokens"):
        nplora.finetune(model, pairs, tmp_path / "b", invocation="@@", **options)
