"""Classifiers of words: training, predictions, entities, and wrong rows."""

import itertools
import json
import math
import os
import random
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import (
    ClassificationReport,
    TokenBatches,
    evaluate_classifier,
    predict_rows,
    train_classifier,
)
from nplora.finetuning.classification.class_weights import balanced_weights
from nplora.finetuning.classification.entities import count_entities, entities, kinds_of, scheme_of
from nplora.finetuning.classification.labelled import Columns, RowReader, task_of
from nplora.finetuning.classification.tagged import words_of
from nplora.finetuning.data.sources import sources_of
from nplora.formats import peft_adapter
from nplora.formats.errors import DataError
from nplora.trainer import Callback
from small_encoder import save_small_encoder
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

LABELS = ("B-PET", "I-PET", "O")
FAST: dict[str, Any] = {"rank": 2, "lr": 1e-2, "batch_examples": 8}


def some_rows(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences of random words. A pet is "cat" or "dog"; "sitting" after it belongs to it."""
    rng, rows = random.Random(seed), list[dict[str, Any]]()
    for _ in range(count):
        words, tags = list[str](), list[str]()
        for _ in range(rng.randint(2, 5)):
            if rng.random() < 0.4:
                pet, more = rng.choice(["cat", "dog"]), rng.random() < 0.5
                words += [pet, "sitting"] if more else [pet]
                tags += ["B-PET", "I-PET"] if more else ["B-PET"]
            else:
                words.append(rng.choice(["the", "mat", "order", "parcel", "refund"]))
                tags.append("O")
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.mark.parametrize("null", ["words", "text"])
def test_a_null_column_is_no_column(null: str) -> None:
    """In a table, each row has each column."""
    rows = [{**row, null: None} for row in some_rows(4)]
    sources = sources_of("test", rows)
    assert task_of(None, {}, sources) == "tokens"
    [name, words] = words_of(next(iter(sources[0].read())), None)
    assert (name, words) == ("tokens", rows[0]["tokens"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("model"))


def untrained(model: Path, labels: Any = LABELS) -> nplora.TextClassifier:
    return nplora.new_classifier(nplora.load_encoder(model), labels, tokens=True)


# ---- training ----


@pytest.mark.slow
def test_tags_are_learned_and_the_adapter_is_read_again(model: Path, tmp_path: Path) -> None:
    rows, held_out = some_rows(), some_rows(30, 1)
    run = train_classifier(model, rows, tmp_path, valid=held_out, epochs=12, **FAST)
    assert run.classifier.labels == LABELS
    assert run.valid is not None
    assert run.valid.values["accuracy"] >= 0.95
    assert run.valid.values["entity_f1"] >= 0.9
    assert run.valid.examples == sum(len(row["tags"]) for row in held_out)
    config = json.loads((tmp_path / peft_adapter.CONFIG).read_text())
    assert config["task_type"] == "TOKEN_CLS"
    again = nplora.load_classifier(model, tmp_path)
    assert again.classifies_tokens
    assert evaluate_classifier(again, held_out).as_json() == run.valid.as_json()
    found = list(predict_rows(again, held_out))
    assert [row["prediction"] for row in found] == again.predict_words([row["tokens"] for row in held_out])
    hits = [a == b for row in found for a, b in zip(row["tags"], row["prediction"], strict=True)]
    assert math.isclose(np.mean(hits), run.valid.values["accuracy"])
    assert re.search(r"\d words/s", str(run))
    assert "entity" in str(run)


def test_only_the_first_token_of_a_word_is_trained(model: Path) -> None:
    """With the tokens [CLS] a dog sat ##s [SEP], "sats" carries its tag on "sat"."""
    tagger = untrained(model)
    words = tagger.encoder.word_ids([["a", "dog", "sats"], ["cat"]], 8)
    targets = words.token_targets([np.array([2, 0, 1]), np.array([0])])
    assert [own.tolist() for own in targets] == [[-100, 2, 0, 1, -100, -100], [-100, 0, -100]]
    (batch,) = TokenBatches(words.ids, targets, batch_size=2)
    tagger.add_lora(rank=2)
    logits, saved = tagger.forward(batch[0])
    loss, gradient = nplora.losses.cross_entropy(logits, batch[1])
    tagger.backward(gradient, saved)
    wide = logits.astype(np.float64)
    chances = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    rows, labels = [1, 2, 3, 7], [2, 0, 1, 0]
    assert math.isclose(loss, -np.log(chances[rows, labels]).mean(), rel_tol=1e-6)
    assert np.flatnonzero(gradient.any(axis=1)).tolist() == rows


def test_the_loss_of_a_run_is_the_mean_over_all_words(model: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "cat"], "tags": ["O", "B-PET"]}, {"tokens": ["dog"], "tags": ["B-PET"]}]
    run = train_classifier(model, rows, tmp_path, steps=1, lr=1e-12)
    report = evaluate_classifier(run.classifier, rows)
    assert run.history.steps[0].count == 3
    assert math.isclose(run.history.loss[0], report.values["loss"], rel_tol=1e-5)


def test_balanced_weights_count_words(model: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["cat", "the", "mat", "order"], "tags": ["PET", "O", "O", "O"]}]
    run = train_classifier(model, rows, tmp_path, class_weights="balanced", steps=1, lr=1e-12)
    logits = run.classifier.word_logits(run.classifier.encoder.word_ids([rows[0]["tokens"]], 32))
    wide, labels = logits.astype(np.float64), np.array([1, 0, 0, 0])
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(4), labels]
    assert run.classifier.labels == ("O", "PET")
    assert math.isclose(
        run.history.loss[0], (np.array([2, 2 / 3, 2 / 3, 2 / 3]) * losses).mean(), rel_tol=1e-5
    )


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    numbers = np.array([0, 3, 3, 1, 0, 0])
    wanted = compute("balanced", classes=np.array([0, 1, 3]), y=numbers) * 3 / 4  # of four labels
    assert balanced_weights(np.append(numbers, -100), 4) == (*wanted[:2], 0.0, wanted[2])


class _Fail(Callback):
    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == 4:
            raise OSError("the power is gone")


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_run_without_a_stop(model: Path, tmp_path: Path) -> None:
    options = {**FAST, "epochs": 2, "dropout": 0.1, "save_every": 3, "valid_split": 0.2, "calibrate": True}
    whole = train_classifier(model, some_rows(), tmp_path / "whole", **options)
    with pytest.raises(OSError, match="the power is gone"):
        train_classifier(model, some_rows(), tmp_path / "cut", callbacks=[_Fail()], **options)
    again = train_classifier(model, some_rows(), tmp_path / "cut", resume=True, **options)
    files = [Path(tmp_path, name, "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert whole.temperature == again.temperature != 1
    other = [{**row, "tags": [*row["tags"][:-1], "O"]} for row in some_rows()]
    with pytest.raises(ValueError, match=r"\by\b"):
        train_classifier(model, other, tmp_path / "cut", resume=True, **options)


def test_the_best_adapter_is_kept(model: Path, tmp_path: Path) -> None:
    """The validation data contradict the training data, so their loss rises after the first epoch."""
    other = {"O": "B-PET", "B-PET": "I-PET", "I-PET": "O"}
    rows = some_rows(30, 1)
    wrong = [{**row, "tags": [other[tag] for tag in row["tags"]]} for row in rows]
    run = train_classifier(model, some_rows(), tmp_path, valid=wrong, epochs=6, **FAST)
    losses = [record.val_loss for record in run.history.evaluations]
    assert run.valid is not None
    assert losses[0] < losses[-1]
    assert math.isclose(run.valid.values["loss"], min(losses), rel_tol=1e-4)


def test_a_language_model_tags_words(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf")
    rows = [{"words": ["a", "b"], "ner_tags": [0, 1]}, {"words": ["c"], "ner_tags": [0]}]
    run = train_classifier(path, rows, tmp_path / "out", steps=2)
    again = nplora.load_classifier(path, tmp_path / "out")
    sentences = [row["words"] for row in rows]
    assert again.predict_words(sentences) == run.classifier.predict_words(sentences)
    words, spelling = again.encoder.word_ids([["1", "+", "1"]], 32), again.encoder.tokenizer.tokens()
    assert [spelling[words.ids[0][place]] for place in words.first[0]] == ["1", "+", "1"]  # not the spaces


# ---- what rows may look like ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"tokens": ["a", "cat"], "ner_tags": ["O", "B-PET"]}, {}),
        ({"words": ["a", "cat"], "labels": ["O", "B-PET"]}, {}),
        ({"tokens": "a cat", "tags": "O B-PET"}, {}),
        ({"tokens": ["a", "cat"], "pos": ["O", "B-PET"], "tags": [1, 2]}, {"columns": "tags=pos"}),
        (
            {"text": "a cat", "x": ["a", "cat"], "y": ["O", "B-PET"]},
            {"columns": {"tokens": "x", "tags": "y"}},
        ),
        ({"text": "a cat", "tokens": ["a", "cat"], "tags": ["O", "B-PET"]}, {"task": "tokens"}),
    ],
)
def test_words_and_tags_are_found(
    row: dict[str, Any], options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    run = train_classifier(model, [row], tmp_path, steps=1, **options)
    assert run.classifier.classifies_tokens
    assert run.classifier.labels == ("B-PET", "O")
    assert run.history.steps[0].count == 2


def test_rows_with_a_text_are_not_taken_for_words(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "label": i, "tokens": ["a", "cat"], "tags": ["x", "y"]} for i in range(2)]
    assert not train_classifier(model, rows, tmp_path, steps=1).classifier.classifies_tokens


CONLL = """-DOCSTART- -X- -X- O

the DT B-NP O
cat NN I-NP B-PET
sats VB I-NP I-PET

a\tDT\tB-NP\tO
order\tNN\tI-NP\tO


"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".conll", ".jsonl", ".json", ".csv", ".parquet", ".conll.gz"])
def test_every_kind_of_file_has_the_same_sentences(suffix: str, model: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["the", "cat", "sats"], "tags": ["O", "B-PET", "I-PET"]},
        {"tokens": ["a", "order"], "tags": ["O", "O"]},
    ]
    file = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".conll.gz":
        gzip = pytest.importorskip("gzip")
        file.write_bytes(gzip.compress(CONLL.replace("\n", "\r\n").encode()))
    else:
        lines = [f"{' '.join(row['tokens'])},{' '.join(row['tags'])}" for row in rows]
        file.write_text(
            {
                ".conll": CONLL,
                ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
                ".json": json.dumps(rows),
                ".csv": "\n".join(["tokens,tags", *lines]),
            }[suffix]
        )
    run = train_classifier(model, file, tmp_path / "out", steps=1)
    assert run.classifier.labels == LABELS
    found = list(predict_rows(run.classifier, file))
    assert [row["tokens"] for row in found] == [row["tokens"] for row in rows]
    assert (
        evaluate_classifier(run.classifier, file).as_json()
        == evaluate_classifier(run.classifier, rows).as_json()
    )


def test_a_conll_file_of_words_alone_is_predicted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("the\ncat\n\na\n")
    (tmp_path / "a.txt").write_text("the cat\na\n")
    found = [list(predict_rows(untrained(model), tmp_path / f"a.{end}")) for end in ("conll", "txt")]
    assert [row["tokens"] for row in found[0]] == [["the", "cat"], ["a"]]
    assert found[0] == found[1]


ROW = {"tokens": ["a", "cat"], "tags": ["O", "B-PET"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "row 2: 'tags' has 2 tags, expected 1, one for"),
        ({"tokens": ["a", "b"], "tags": []}, "data, row 2: 'tags' has 0 tags, expected 2"),
        ({"tokens": [], "tags": []}, "data, row 2: the sentence has no words"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"row 2, tokens\[1\]: the word is '', expected a text"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"row 2, tokens\[1\]: the word is 3, expected a text"),
        ({"tokens": 3, "tags": ["O"]}, "row 2: 'tokens' is 3, expected a list"),
        ({"tokens": ["a"], "tags": None}, "row 2: 'tags' is None, expected a list"),
        ({"tokens": ["a"], "tags": [0.5]}, r"row 2, tags\[0\]: the label is 0.5, expected .* an integer$"),
        ({"tokens": ["a"], "tags": [None]}, r"row 2, tags\[0\]: the label is None, expected"),
        ({"tokens": ["a"], "tags": [" "]}, r"row 2, tags\[0\]: the label is empty"),
        ({"tokens": ["a"], "tags": [1]}, r"the label 1 is a number, but the label 'O' \(data, row 1"),
        ({"tokens": ["a"]}, r"no field 'tags' or 'ner_tags' or 'labels', only \['tokens'\]; --columns tags="),
        ({"tags": ["O"]}, r"row 2: no field 'tokens' or 'words', only \['tags'\]; --columns tokens=NAME"),
        ({**ROW, "ner_tags": [1, 2]}, "the fields 'tags' and 'ner_tags'; --columns tags=NAME chooses one"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_with_their_place(
    row: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        train_classifier(model, [ROW, row], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = train_classifier(model, [ROW, row], tmp_path / "out", skip_bad=True, steps=1)
    assert run.examples == 1
    assert "1 bad row skipped (data, row 2" in str(run)


@pytest.mark.parametrize("row", [{"tokens": ["a"]}, {"words": []}])
def test_a_bad_first_row_does_not_decide_the_task(row: dict[str, Any], model: Path, tmp_path: Path) -> None:
    run = train_classifier(model, [row, ROW], tmp_path, skip_bad=True, steps=1)
    assert run.classifier.labels == ("B-PET", "O")
    assert "1 bad row skipped (data, row 1" in str(run)


def test_a_bad_first_sentence_of_a_file_is_skipped(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_bytes(b"a O\ncat\n\nb\xff O\n\na O\ncat B-PET\n")
    run = train_classifier(model, tmp_path / "a.conll", tmp_path / "out", skip_bad=True, steps=1)
    assert run.examples == 1
    assert "2 bad rows skipped (a.conll, line 2: 1 column" in str(run).replace(f"{tmp_path}{os.sep}", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\ncat\n\n", "wrong.conll, line 2: 1 column, expected 2 as in line 1"),
        ("a O\n\ncat NN O\ndog O\n", "wrong.conll, line 4: 2 columns, expected 3 as in line 3"),
        ("a\tO\ncat\t\n", "wrong.conll, line 2: the label is empty"),
        ("a O\n\nb O\n\tO\n", "wrong.conll, line 4: the word is '', expected a text"),
        ("a\ncat\n", "wrong.conll, line 1: no field 'tags'"),
        ("a O\ncat O\n", "all rows have the label 'O', expected at least 2 labels"),
        ("\n\n", "wrong.conll: no rows to read"),
    ],
)
def test_wrong_lines_are_refused_with_their_place(
    text: str, message: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "wrong.conll").write_text(text)
    for task in ("tokens", None) if text.strip() else ("tokens",):
        with pytest.raises(DataError, match=message):
            train_classifier(model, tmp_path / "wrong.conll", tmp_path / "out", task=task)


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        ("text=a", "tokens", "columns has the key 'text', expected tokens or tags, as in tags=pos"),
        ("tokens=a", "single", "columns has the key 'tokens', expected text or label"),
        ("tokens=a,label=b", None, "columns has the key 'tokens', expected text or label"),
    ],
)
def test_columns_of_another_task_are_refused(
    columns: str, task: str | None, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_classifier(model, [ROW], tmp_path / "out", columns=columns, task=task)


def test_training_cuts_long_sentences_and_counts_them(model: Path, tmp_path: Path) -> None:
    """With 5 tokens, [CLS] the cat sat [SEP], "sats" is trained and "mat" is not."""
    rows = [{"tokens": ["the", "cat", "sats", "mat"], "tags": ["O", "B-PET", "I-PET", "O"]}, ROW]
    run = train_classifier(model, rows, tmp_path, valid=rows, steps=1, max_length=5, batch_examples=1)
    assert (run.cut, run.lost) == (1, 1)
    text = "cut to 5 tokens: 1 sentence; 1 word has no token and is ignored"
    assert text in str(run)
    assert run.valid is not None
    assert run.valid.examples == 6
    again = nplora.load_classifier(model, tmp_path)
    assert again.max_length == 5
    assert evaluate_classifier(again, rows).as_json() == run.valid.as_json()


def test_data_without_a_token_are_refused(model: Path, tmp_path: Path) -> None:
    nothing = [{"tokens": ["\u200b", "\u200b"], "tags": ["O", "B-PET"]}]
    for data, options in (
        (nothing, {"class_weights": "balanced"}),
        ([ROW], {"valid": nothing, "calibrate": True}),
    ):
        with pytest.raises(DataError, match="data: no word has a token, expected words"):
            train_classifier(model, data, tmp_path / "out", steps=1, **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="data: no word has a token"):
        evaluate_classifier(untrained(model), nothing)


def test_a_run_is_not_resumed_with_other_words(model: Path) -> None:
    """Both rows have the text "a b c" and the tags O, O."""
    files = [
        RowReader(Columns(), "tokens", "|").read(
            sources_of("test", [{"tokens": words, "tags": ["O", "O"]}]), skip_bad=False
        )
        for words in (["a b", "c"], ["a", "b c"])
    ]
    assert files[0].texts == files[1].texts
    assert files[0].fingerprint() != files[1].fingerprint()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            [[-100, 0], [1, -100, 0]],
            r"targets\[0\] has shape \(2,\), expected \(3,\), one for each token of ids",
        ),
        ([[0, 1, 0], 1], r"targets\[1\] has shape \(\), expected \(2,\)"),
        ([[0, 1, 0]], "^TokenBatches: "),
    ],
)
def test_batches_of_tokens_have_a_target_for_each_token(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatches([[2, 5, 3], [2, 6]], targets, batch_size=2)


@pytest.mark.parametrize(
    ("tags", "error", "message"),
    [
        ([[0, 1]], ValueError, "tags are given for 1 sentence, expected 2"),
        ([[0, 1], [0], [0]], ValueError, "tags are given for 3 sentences, expected 2"),
        ([[0, 1], [0, 1]], ValueError, r"tags\[1\] has shape \(2,\), expected \(1,\), one for each word"),
        ([[0, 1], [0.5]], TypeError, r"tags\[1\] has dtype float64, expected integers"),
    ],
)  # fmt: skip
def test_tags_that_do_not_fit_the_words_are_refused(
    tags: Any, error: type[Exception], message: str, model: Path
) -> None:
    words = nplora.load_encoder(model).word_ids([["a", "cat"], ["dog"]], 8)
    for op, method in (("token_targets", words.token_targets), ("kept", words.kept)):
        with pytest.raises(error, match=f"{op}: {message}"):
            method(tags)


@pytest.mark.parametrize("word", ["", " ", "\u3000"])
def test_an_empty_word_is_refused(word: str, model: Path) -> None:
    tagger, sentences = untrained(model), [["a"], ["cat", word]]
    for method in (
        tagger.predict_words,
        lambda given: tagger.encoder.word_ids(given, 8),
        lambda given: tagger.encoder.tokenizer.encode_words(given, 8),
    ):
        with pytest.raises(ValueError, match=r"sentences\[1\]\[1\] is '.*', expected a word"):
            method(sentences)
    with pytest.raises(TypeError, match=r"sentences\[0\]\[0\] is 3, expected a word"):
        tagger.predict_words([[3]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"sentences\[0\] is 'aaaa.{70,80}…, expected a list of texts"):
        tagger.predict_words(["a" * 1_000_000])


def test_a_classifier_of_texts_has_no_logits_of_words(model: Path) -> None:
    encoder = nplora.load_encoder(model)
    with pytest.raises(ValueError, match="word_logits: the classifier is for texts"):
        nplora.new_classifier(encoder, LABELS).word_logits(encoder.word_ids([["a"]], 8))


def test_a_word_that_the_tokenizer_drops_has_no_label(model: Path) -> None:
    tagger = untrained(model)
    words = tagger.encoder.word_ids([["\u0301", "cat", "\u200b"], []], 8)
    assert [own.tolist() for own in words.first] == [[-1, 1, -1], []]
    found = tagger.predict_words([["\u0301", "cat"], []])
    assert [[tag is None for tag in tags] for tags in found] == [[True, False], []]


# ---- long sentences ----


def test_the_words_of_a_long_sentence_are_read_in_windows(model: Path) -> None:
    """With room for 8 tokens, windows begin after 0, 6, 12 … tokens, and the last ends with the sentence."""
    tagger, rng = untrained(model), random.Random(0)
    tagger.max_length, room = 10, 8
    tokens = {"the": [9], "cat": [6], "sats": [10, 11], "mat": [14], "dogs": [7, 11]}
    for count in (1, 3, 8, 9, 20, 41):
        sentence = rng.choices(list(tokens), k=count)
        body = list(itertools.chain.from_iterable(tokens[word] for word in sentence))
        first = list(itertools.accumulate((len(tokens[word]) for word in sentence), initial=0))[:-1]
        last = max(0, len(body) - room)
        windows = [(begin, begin + room) for begin in sorted({*range(0, last, 6), last})]
        found = tagger.word_logits(tagger.encoder.word_ids([["the"], sentence, ["cat", "mat"]]))
        assert len(found) == count + 3
        for place, ours in zip(first, found[1:], strict=False):
            depths = {
                (begin, end): min(
                    math.inf if begin == 0 else place - begin,
                    math.inf if end >= len(body) else end - 1 - place,
                )
                for begin, end in windows
                if begin <= place < end
            }
            deepest = [window for window, depth in depths.items() if depth == max(depths.values())]
            logits = [
                tagger.logits_of_ids([[2, *body[begin:end], 3]])[1 + place - begin] for begin, end in deepest
            ]
            assert any(np.allclose(ours, own, rtol=0, atol=1e-5) for own in logits)


def test_every_word_of_a_long_sentence_has_a_label(model: Path) -> None:
    tagger, words = untrained(model), ["the", "cat", "sats", "on", "the", "\u200b", "mat"] * 30
    rows = [{"tokens": words, "tags": ["O"] * len(words)}, ROW]
    tagger.max_length = 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tags, short) = tagger.predict_words([row["tokens"] for row in rows])
    assert [tag is None for tag in tags] == [word == "\u200b" for word in words]
    assert short == tagger.predict_words([ROW["tokens"]])[0]
    with pytest.warns(UserWarning, match="predict_rows: 30 words have no token and are ignored$"):
        found = list(predict_rows(tagger, rows, probabilities=True))
    assert [row["prediction"] for row in found] == [tags, short]
    assert found[0]["probabilities"]["O"][5] is None
    with pytest.warns(UserWarning, match="evaluate_classifier: 30 words have no token and are ignored$"):
        assert evaluate_classifier(tagger, rows).examples == 6 * 30 + 2
    tagger.max_length = 2
    with pytest.raises(ValueError, match="windows: longest is 2, expected more than the 2 special tokens"):
        tagger.predict_words([["the"]])


def test_a_language_model_reads_windows_too(tmp_path: Path) -> None:
    encoder = nplora.load_encoder(save_small_llama(tmp_path / "model.gguf"), pooling="mean")
    tagger, sentence = nplora.new_classifier(encoder, LABELS, tokens=True), ["1", "+", "1", "="] * 6
    whole = tagger.encoder.word_ids([sentence])
    tagger.max_length = 8
    around = tagger.encoder.token_ids([""], 8)[0][0]
    ids, rows = tagger.windows(whole)
    assert all(len(window) == 8 and window[: len(around)] == around for window in ids)
    joined = list(itertools.chain.from_iterable(ids))
    assert [joined[row] for row in rows] == [whole.ids[0][place] for place in whole.first[0]]
    assert None not in tagger.predict_words([sentence])[0]


# ---- predictions ----


def test_probabilities_are_written_on_request(model: Path) -> None:
    tagger, row = untrained(model), {"id": 7, "tokens": ["a", "cat"]}
    (plain,) = predict_rows(tagger, [row])
    assert list(plain) == ["id", "tokens", "prediction", "probability"]
    (found,) = predict_rows(tagger, [row], probabilities=True)
    logits = tagger.word_logits(tagger.encoder.word_ids([row["tokens"]], 8)).astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(list(found["probabilities"].values()), chances.T, rtol=1e-12)
    assert list(found["probabilities"]) == list(LABELS)
    assert found["prediction"] == [LABELS[i] for i in chances.argmax(axis=1)]
    np.testing.assert_allclose(found["probability"], chances.max(axis=1), rtol=1e-12)


def test_what_a_classifier_of_words_cannot_do_is_said(model: Path) -> None:
    tagger = untrained(model)
    with pytest.raises(DataError, match="row 1: the row already has a field 'prediction'"):
        list(predict_rows(tagger, [{**ROW, "prediction": 1}]))
    with pytest.raises(ValueError, match="use `predict_words` to label words"):
        tagger.predict(["a cat"])
    with pytest.raises(
        TypeError, match=r"predict_words: sentences\[0\] is 'a cat', expected a list of texts"
    ):
        tagger.predict_words(["a cat"])
    with pytest.raises(TypeError, match="sentences is 'a cat', expected a list of lists"):
        tagger.predict_words("a cat")
    texts = nplora.new_classifier(nplora.load_encoder(model), LABELS)
    with pytest.raises(ValueError, match="predict_words: the classifier is for texts"):
        texts.predict_words([["a"]])
    with pytest.raises(
        DataError, match="the label 'B-ZOO' is unknown, expected one of 'B-PET', 'I-PET', 'O'"
    ):
        evaluate_classifier(tagger, [{"tokens": ["a"], "tags": ["B-ZOO"]}])


def test_tags_may_be_given_by_number(model: Path) -> None:
    tagger = untrained(model)
    numbered = [{"tokens": ROW["tokens"], "ner_tags": [2, 0]}]
    assert evaluate_classifier(tagger, numbered).as_json() == evaluate_classifier(tagger, [ROW]).as_json()


# ---- entities ----


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-A", [("A", 0, 1)]),
        ("B-A I-A O", [("A", 0, 2)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("O I-A I-A", [("A", 1, 3)]),
        ("I-A B-A I-A O I-B", [("A", 0, 1), ("A", 1, 3), ("B", 4, 5)]),
        ("B-A O I-A", [("A", 0, 1), ("A", 2, 3)]),
        ("B-A I-A E-A S-A", [("A", 0, 3), ("A", 3, 4)]),
        ("B-A E-A E-A I-A", [("A", 0, 2), ("A", 2, 3), ("A", 3, 4)]),
        ("S-A I-A B-A S-A", [("A", 0, 1), ("A", 1, 2), ("A", 2, 3), ("A", 3, 4)]),
        ("B-A E-B O E-A", [("A", 0, 1), ("B", 1, 2), ("A", 3, 4)]),
        ("B-A I-A L-A U-A U-A", [("A", 0, 3), ("A", 3, 4), ("A", 4, 5)]),
    ],
)
def test_entities_are_those_of_conll(tags: str, expected: list[Any]) -> None:
    assert [tuple(entity) for entity in entities(tags.split())] == expected


def test_only_tags_of_a_scheme_have_entities() -> None:
    assert kinds_of(["O", "B-PER", "I-LOC", "B-A-B"]) == ("A-B", "LOC", "PER")
    assert kinds_of(["O", "S-PER", "E-LOC"]) == kinds_of(["L-LOC", "U-PER"]) == ("LOC", "PER")
    for tags in (["NOUN"], ["O"], ["O", "B-"], ["B-PER", "S-PER", "U-PER"], ["0", "1"], ["B-PER", "NOUN"]):
        assert kinds_of(tags) == ()


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ("O B-A I-A B-A|B-B", "IOB2"),
        ("O I-A I-A B-A|I-B", "IOB1"),
        ("I-A B-A I-A|I-A I-B", "IOB1"),
        ("I-A|O B-A", "IOB2"),  # the I- is a mistake
        ("I-A B-B", "IOB2"),
        ("O O", "IOB2"),
        ("I-A E-A O", "IOE"),
        ("B-A E-A O|S-B", "IOBES"),
        ("B-A L-A O|U-B", "BILOU"),
    ],
)
def test_the_scheme_is_found(sentences: str, scheme: str) -> None:
    tags = [own.split() for own in sentences.split("|")]
    labels = {"O", "I-A", *itertools.chain(*tags)}
    assert scheme_of(labels, tags) == scheme
    names = sorted(labels)
    numbers = [np.array([names.index(tag) for tag in own]) for own in tags]
    report = ClassificationReport.of("tokens", names, np.eye(len(names))[np.concatenate(numbers)], numbers)
    assert report.scheme == report.as_json()["scheme"] == scheme
    assert f"\nscheme of the tags: {scheme}\nentity  " in str(report)


def report_of(true: list[str], predicted: list[str]) -> ClassificationReport:
    labels = sorted({tag for line in true + predicted for tag in line.split()})
    numbers = [
        [np.array([labels.index(tag) for tag in line.split()]) for line in each] for each in (true, predicted)
    ]
    logits = np.eye(len(labels))[np.concatenate(numbers[1])]
    return ClassificationReport.of("tokens", labels, logits, numbers[0])


def test_the_scores_of_entities_are_those_of_seqeval() -> None:
    """The numbers are the output of seqeval 1.2.2, `classification_report(true, predicted)`."""
    true = ["B-PER I-PER O B-LOC", "O B-ORG I-ORG O B-PER", "B-LOC I-LOC I-LOC", "B-LOC O"]
    predicted = ["B-PER I-PER O B-ORG", "O B-ORG I-PER O I-PER", "B-LOC I-LOC O", "B-LOC O"]
    report = report_of(true, predicted)
    found = {kind: (s.precision, s.recall, s.f1, s.support) for kind, s in report.entities.items()}
    assert found == {
        "LOC": (1 / 2, 1 / 3, 2 / 5, 3),
        "ORG": (0, 0, 0, 1),
        "PER": (2 / 3, 1, 4 / 5, 2),
    }
    values = [report.values[f"entity_{name}"] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(values, [3 / 7, 1 / 2, 6 / 13])
    assert math.isclose(report.values["accuracy"], 10 / 14)
    assert json.loads(json.dumps(report.as_json()))["entities"]["PER"]["support"] == 2
    assert re.search(r"entity  precision  recall     f1  entities\nLOC  ", str(report))


@pytest.mark.parametrize("letters", ["BIES", "BILU"])
def test_the_scores_of_other_schemes_are_those_of_seqeval(letters: str) -> None:
    """The numbers are the output of seqeval 1.2.2, `classification_report(true, predicted)`, for IOBES."""
    other = str.maketrans("ES", letters[2:])
    true = ["b-PER e-PER O s-LOC", "O b-ORG i-ORG e-ORG s-PER", "b-LOC e-LOC s-LOC"]
    predicted = ["b-PER e-PER O s-ORG", "O b-ORG e-ORG i-ORG s-PER", "b-LOC e-LOC e-LOC"]
    both = [
        [re.sub(r"\b[a-z]", lambda found: found[0].upper().translate(other), line) for line in each]
        for each in (true, predicted)
    ]
    report = report_of(*both)
    found = {kind: (s.precision, s.recall, s.f1, s.support) for kind, s in report.entities.items()}
    assert found == {"LOC": (1, 2 / 3, 4 / 5, 3), "ORG": (0, 0, 0, 1), "PER": (1, 1, 1, 2)}
    values = [report.values[f"entity_{name}"] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(values, [4 / 7, 2 / 3, 8 / 13])


@pytest.mark.parametrize(
    ("letters", "pattern"), [("BI", "[BI]I*"), ("BIES", "S|[BI]I*E?|E"), ("BILU", "U|[BI]I*L?|L")]
)
def test_counts_of_random_tags_are_those_of_a_pattern(letters: str, pattern: str) -> None:
    """In a text of a letter for each word, an entity of IOB is a B or an I, and every I that follows."""
    rng = random.Random(0)
    tags = ["O", *(f"{letter}-A" for letter in letters)]
    for _ in range(200):
        both = [rng.choices(tags, k=12) for _ in range(2)]
        spans = [
            {found.span() for found in re.finditer(pattern, "".join(tag[0] for tag in tags))} for tags in both
        ]
        counts = count_entities([both[0]], [both[1]])
        assert [each["A"] for each in counts] == [len(spans[0] & spans[1]), len(spans[0]), len(spans[1])]
        assert isinstance(counts.hits, Counter)


def test_tags_that_are_no_entities_have_scores_for_each_tag(model: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "cat"], "tags": ["DET", "NOUN"]}]
    run = train_classifier(model, rows, tmp_path, steps=1)
    report = evaluate_classifier(run.classifier, rows)
    assert not report.entities
    assert "entity_f1" not in report.values
    assert {name: score.support for name, score in report.scores.items()} == {"DET": 1, "NOUN": 1}
    assert re.search(r"2 words: .*\nlabel  precision  recall     f1  words\nDET", str(report))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tags", "wrong"),
    [
        ("O B-PET|b-PET O", "data, row 2, tags[0]: the tag 'b-PET' of 'w0'"),
        ("O B_PET|B_PET O", "data, row 1, tags[1]: the tag 'B_PET' of 'w1'"),
        ("O B-PET|PET I-PET", "data, row 2, tags[0]: the tag 'PET' of 'w0'"),
        ("O B-PET|0 I-PET", "data, row 2, tags[0]: the tag '0' of 'w0'"),
        ("O B|O I", "data, row 1, tags[1]: the tag 'B' of 'w1'"),
        ("B-PET E-PET|O U-PET", "data, row 2, tags[1]: the tag 'U-PET' of 'w1'"),
    ],
)
def test_a_tag_that_nearly_fits_a_scheme_is_named_once(
    tags: str, wrong: str, model: Path, tmp_path: Path
) -> None:
    rows = [
        {"tokens": [f"w{i}" for i in range(len(own.split()))], "tags": own.split()} for own in tags.split("|")
    ]
    found_at = re.escape(wrong)
    text = f"{found_at} fits no scheme of entity tags, so reports have no scores of entities; expected O, or"
    for op, work in (
        ("train_classifier", lambda: train_classifier(model, rows, tmp_path, valid=rows, steps=1).classifier),
        ("evaluate_classifier", lambda: evaluate_classifier(nplora.load_classifier(model, tmp_path), rows)),
    ):
        with pytest.warns(UserWarning, match=f"^{op}: {text}") as found:
            work()
        assert len(found) == 1
    with pytest.warns(UserWarning, match="evaluate_classifier: the label '.*' fits no scheme of entity tags"):
        evaluate_classifier(untrained(model, ["O", "b-X"]), [{"tokens": ["a"], "tags": ["O"]}])


def test_a_tag_that_nearly_fits_a_scheme_is_named_with_its_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("bad b-PET O\nrow\n\nthe O\ncat b-PET\n\na b-PET\n")
    classifier = untrained(model, ["O", "b-PET"])
    with pytest.warns(UserWarning, match=r"evaluate_classifier: .*a\.conll, line") as found:
        evaluate_classifier(classifier, tmp_path / "a.conll", skip_bad=True)
    assert "a.conll, line 5: the tag 'b-PET' of 'cat' fits no scheme of" in str(found[-1].message)


@pytest.mark.parametrize("tags", ["NOUN VERB", "I N V", "S-NOM NP", "O X", "1 2", "O B-PET", "O S-PET U"])
def test_other_tags_are_no_reason_for_a_warning(tags: str, model: Path) -> None:
    rows = [{"tokens": [f"w{i}" for i in range(len(tags.split()))], "tags": tags.split()}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_classifier(untrained(model, tags.split()), rows)


def test_messages_speak_of_sentences(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagger = untrained(model)
    evaluate_classifier(tagger, [ROW, ROW], progress=True)
    assert re.match(r"2 of 2 sentences, [\d.]+ sentences/s, ", capsys.readouterr().err)
    with pytest.warns(UserWarning, match="1 empty sentence; the prediction for an empty sentence means"):
        list(predict_rows(tagger, [ROW, {"tokens": []}], progress=True))
    assert re.match(r"2 sentences, [\d.]+ sentences/s", capsys.readouterr().err)


def test_an_unknown_tag_of_a_file_is_named_by_its_own_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("the O\n\na O\ncat B-ZOO\n")
    with pytest.raises(DataError, match=r"a\.conll, line 4: the label 'B-ZOO' is unknown"):
        evaluate_classifier(untrained(model), tmp_path / "a.conll")
