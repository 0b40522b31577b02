"""The estimator that labels words, with a small encoder of random numbers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score

import nplora
from nplora.finetuning import train_classifier
from nplora.sklearn import LoRATokenClassifier
from small_encoder import save_small_encoder

pytest.importorskip("tokenizers")

X = [["where", "is", "my", "parcel"], ["return", "an", "order"], ["the", "dog", "sitting"], ["a", "cat"]] * 4
Y = [["O", "O", "O", "B-THING"], ["O", "O", "B-THING"], ["O", "B-PET", "I-PET"], ["O", "B-PET"]] * 4
FAST: dict[str, Any] = {"rank": 2, "epochs": 20, "lr": 1e-2, "batch_size": 8, "random_state": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.slow
def test_the_estimator_is_that_of_train_classifier(model: Path, tmp_path: Path) -> None:
    """With the seed that `random_state` gives, both train the same values."""
    fitted = LoRATokenClassifier(model, **FAST).fit(X, Y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    rows = [{"tokens": words, "tags": tags} for words, tags in zip(X, Y, strict=True)]
    options = {"rank": 2, "epochs": 20, "lr": 1e-2, "batch_examples": 8, "seed": seed, "max_grad_norm": 1e9}
    wanted = train_classifier(model, rows, tmp_path / "out", **options).classifier
    words = wanted.encoder.word_ids(X, 32)
    np.testing.assert_array_equal(fitted.model_.word_logits(words), wanted.word_logits(words))
    assert fitted.classes_.tolist() == list(wanted.labels)
    assert fitted.predict(X) == wanted.predict_words(X) == Y
    assert fitted.score(X, Y) == 1
    nplora.save_adapter(fitted.model_, tmp_path / "adapter")
    assert nplora.load_classifier(model, tmp_path / "adapter").predict_words(X) == Y


def test_probabilities_are_those_of_the_logits(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, Y)
    found = fitted.predict_proba(X[:2])
    logits = fitted.model_.word_logits(fitted.model_.encoder.word_ids(X[:2], 32)).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [rows.shape for rows in found] == [(4, 4), (3, 4)]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-12)


@pytest.mark.slow
def test_searches_and_scores_work(model: Path) -> None:
    search = GridSearchCV(LoRATokenClassifier(model, **FAST), {"lr": [1e-5, 1e-2]}, cv=2).fit(X, Y)
    assert search.best_params_ == {"lr": 1e-2}
    assert search.best_score_ == 1
    assert cross_val_score(LoRATokenClassifier(model, **FAST), X, Y, cv=2).tolist() == [1, 1]


def test_copies_and_pickles_predict_the_same(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, Y)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        for ours, theirs in zip(other.predict_proba(X), fitted.predict_proba(X), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_an_interrupted_fit_continues_and_other_labels_start_anew(model: Path, tmp_path: Path) -> None:
    options = FAST | {"epochs": 1}
    kept = LoRATokenClassifier(model, checkpoint_dir=tmp_path, **options).fit(X, Y)
    again = LoRATokenClassifier(model, checkpoint_dir=tmp_path, **options).fit(X, Y)
    for ours, theirs in zip(again.predict_proba(X), kept.predict_proba(X), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(list(tmp_path.iterdir())) == 1
    other = [*Y[:-1], ["B-PET", "O"]]
    LoRATokenClassifier(model, checkpoint_dir=tmp_path, **options).fit(X, other)
    assert len(list(tmp_path.iterdir())) == 2


# ---- learning in parts ----

TAGS = ["B-PET", "B-THING", "I-PET", "O"]


def test_partial_fits_are_the_steps_of_a_loop(model: Path) -> None:
    """Each call goes on with the moments of the optimiser, and weighs the labels."""
    weights = {"O": 0.5, "B-PET": 2.0}
    learner = LoRATokenClassifier(model, class_weight=weights, **FAST)
    tagger = nplora.new_classifier(nplora.load_encoder(model), TAGS, tokens=True, seed=(seed := first_seed()))
    tagger.add_lora(rank=2, seed=seed)
    optimizer = nplora.AdamW(lr=1e-2, weight_decay=0.01)
    loss = nplora.losses.CrossEntropy(class_weights=(2.0, 1.0, 1.0, 0.5))
    for i in range(6):
        rows = slice(2 * i % 4, 2 * i % 4 + 2)  # neither half has all labels
        learner.partial_fit(X[rows], Y[rows], classes=TAGS)
        words = tagger.encoder.word_ids(X[rows], 32)
        numbers = [np.array([TAGS.index(tag) for tag in tags]) for tags in Y[rows]]
        tagger.zero_grad()
        logits, saved = tagger.forward(words.ids)
        _, gradient = loss(logits, np.concatenate(words.token_targets(numbers)))
        tagger.backward(gradient, saved)
        optimizer.step(tagger.parameters())
    words = tagger.encoder.word_ids(X)
    np.testing.assert_allclose(
        learner.model_.word_logits(words), tagger.word_logits(words), rtol=1e-4, atol=1e-4
    )
    assert learner.predict(X) == tagger.predict_words(X)
    assert learner.classes_.tolist() == TAGS


def first_seed() -> int:
    """The seed that `random_state=0` gives."""
    return int(np.random.RandomState(0).randint(2**31 - 1))


def test_partial_fits_after_a_pickle_or_a_fit_continue(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, Y)
    loaded = pickle.loads(pickle.dumps(fitted))
    before = fitted.predict_proba(X)
    for learner in (fitted, loaded):
        learner.partial_fit(X[:2], Y[:2])
    for ours, theirs, earlier in zip(fitted.predict_proba(X), loaded.predict_proba(X), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert not np.array_equal(ours, earlier)


def test_partial_fit_refuses_bool_for_integers_as_fit_does_for_a_mixture(model: Path) -> None:
    integers = [[int(tag == "O") for tag in tags] for tags in Y]
    learner = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, integers)
    for other in ([[bool(number) for number in numbers] for numbers in integers], Y):
        with pytest.raises(
            ValueError, match=r"partial_fit: y has the unknown label .*, expected one of 0, 1"
        ):
            learner.partial_fit(X, other)
    with pytest.raises(ValueError, match="y has labels of type bool, int"):
        LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(
            X, [[True, *numbers[1:]] for numbers in integers]
        )


def test_wrong_rows_of_partial_fits_change_nothing(model: Path) -> None:
    learner = LoRATokenClassifier(model, **FAST)
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        learner.partial_fit(X, Y)
    with pytest.raises(
        ValueError, match=r"partial_fit: y has the unknown label 'B-PET', expected one of 'A', 'B'"
    ):
        learner.partial_fit(X, Y, classes=["A", "B"])
    assert not hasattr(learner, "classes_")
    learner.partial_fit(X, Y, classes=TAGS)
    before = learner.predict_proba(X[:1])[0]
    for x, y, message in (
        (X[:1], [["O", "O", "O", "B-NEW"]], "y has the unknown label 'B-NEW', expected one of 'B-PET'"),
        (X[:1], [[0, 1, 2, 3]], "y has the unknown label 0, expected one of 'B-PET'"),
        (X[:1], Y[1:2], r"y\[0\] has 3 labels, expected 4, one for each word"),
        ([["\u200b"]], [["O"]], "LoRATokenClassifier: no word of X has a token"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.partial_fit(x, y)
    with pytest.raises(ValueError, match="is not the same as on last call to partial_fit"):
        learner.partial_fit(X, Y, classes=TAGS[1:])
    learner.class_weight = "balanced"
    with pytest.raises(ValueError, match="class_weight='balanced' needs all rows at once"):
        learner.partial_fit(X, Y)
    np.testing.assert_array_equal(learner.predict_proba(X[:1])[0], before)


def test_early_stopping_and_class_weights(model: Path) -> None:
    options = FAST | {"early_stopping": True, "validation_fraction": 0.25, "class_weight": "balanced"}
    fitted = LoRATokenClassifier(model, **options).fit(X, Y)
    assert len(fitted.validation_curve_) == fitted.n_iter_
    assert fitted.score(X, Y) > 0.9


def test_integers_are_labels_too(model: Path) -> None:
    numbers = [[("O", "B-PET", "I-PET", "B-THING").index(tag) for tag in tags] for tags in Y]
    fitted = LoRATokenClassifier(model, **FAST).fit([np.array(words) for words in X], numbers)
    assert fitted.predict(X) == numbers
    assert fitted.model_.labels == ("0", "1", "2", "3")


def test_balanced_weights_allow_a_label_that_is_only_held_out(model: Path) -> None:
    """Whichever sentence has the rare label, one of these fits holds it out."""
    options = FAST | {"epochs": 1, "early_stopping": True, "validation_fraction": 0.25}
    for i in range(4):
        labels = [*Y[:i], ["RARE"] * len(Y[i]), *Y[i + 1 : 4]]
        LoRATokenClassifier(model, class_weight="balanced", **options).fit(X[:4], labels)


def test_balanced_weights_count_the_words_that_are_trained(model: Path, tmp_path: Path) -> None:
    """The cut words have most of the labels "B-THING"."""
    options = FAST | {"epochs": 2, "max_length": 4}
    with pytest.warns(UserWarning, match="cut to 4 tokens"):
        fitted = LoRATokenClassifier(model, class_weight="balanced", **options).fit(X, Y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    rows = [{"tokens": words, "tags": tags} for words, tags in zip(X, Y, strict=True)]
    wanted = train_classifier(
        model, rows, tmp_path, class_weights="balanced", rank=2, epochs=2, lr=1e-2, batch_examples=8,
        seed=seed, max_grad_norm=1e9, max_length=4,
    ).classifier  # fmt: skip
    words = wanted.encoder.word_ids(X, 4)
    np.testing.assert_array_equal(fitted.model_.word_logits(words), wanted.word_logits(words))


def test_true_and_false_are_labels(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST).fit(X, [[tag == "O" for tag in tags] for tags in Y])
    assert fitted.predict(X[:1]) == [[True, True, True, False]]


def test_scores_of_labels_that_do_not_fit_are_refused(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, Y)
    with pytest.raises(ValueError, match="y has labels for 1 sentence, but X has 2"):
        fitted.score(X[:2], Y[:1])
    with pytest.raises(ValueError, match=r"y\[0\] has 3 labels, expected 4, one for each word"):
        fitted.score(X[:1], Y[1:2])


def test_words_without_a_token_cannot_be_fitted(model: Path) -> None:
    with pytest.raises(ValueError, match="LoRATokenClassifier: no word of X has a token"):
        LoRATokenClassifier(model, **FAST).fit([["\u200b", "\u200b"]], [["O", "B"]])


def test_long_sentences_are_cut_in_fits_and_predicted_whole(model: Path) -> None:
    with pytest.warns(UserWarning, match="cut to 5 tokens: 4 sentences"):
        fitted = LoRATokenClassifier(model, max_length=5, **FAST).fit(X, Y)
    assert fitted.model_.max_length == 5
    long = [[word for words in X[:4] for word in words]]
    labels = fitted.predict(long)
    assert labels == fitted.model_.predict_words(long)
    assert fitted.score(long, labels) == 1
    (chances,) = fitted.predict_proba(long)
    assert fitted.classes_[chances.argmax(axis=1)].tolist() == labels[0]


def test_a_word_that_the_tokenizer_drops_has_no_label(model: Path) -> None:
    fitted = LoRATokenClassifier(model, **FAST | {"epochs": 1}).fit(X, Y)
    sentence = ["where", "is", "my", "\u200b"]
    assert [label is None for label in fitted.predict([sentence])[0]] == [False, False, False, True]
    assert np.isnan(fitted.predict_proba([sentence])[0]).all(axis=1).tolist() == [False, False, False, True]
    true = [*fitted.predict([sentence[:3]])[0], "O"]
    assert fitted.score([sentence], [true]) == 0.75


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (["a cat"], [["O"]], TypeError, r"X\[0\] is 'a cat', expected a list of texts"),
        ("a cat", [["O"]], TypeError, "X is 'a cat', expected a list of lists of texts"),
        ([], [], ValueError, "X is empty"),
        ([["a"], []], [["O"], []], ValueError, "a sentence is empty, expected sentences of"),
        ([["a"]], [["O"], ["O"]], ValueError, "y has labels for 2 sentences, but X has 1"),
        ([["a"], ["b", "c"]], [["O"], ["O"]], ValueError, r"y\[1\] has 1 label, expected 2, one for"),
        ([["a", "b"]], [["O", 1]], ValueError, "y has labels of type int, str, expected only"),
        ([["a", "b"]], [[True, 2]], ValueError, "y has labels of type bool, int, expected only"),
        ([["a", "b"]], [[0.5, 1.5]], ValueError, "y has labels of type float, expected only"),
        ([["a", "cat"]], ["OP"], TypeError, r"y\[0\] is 'OP', expected a list of labels, one for each word"),
        ([["a"]], [3], TypeError, r"y\[0\] is 3, expected a list of labels"),
        ([["a"]], 3, TypeError, "y is 3, expected a list of lists of labels"),
        ([["a", ""]], [["O", "O"]], ValueError, r"X\[0\]\[1\] is '', expected a word"),
        ([["a", "b"]], [["O", "O"]], ValueError, "only one class, 'O', expected at least two"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused(x: Any, y: Any, error: type[Exception], message: str, model: Path) -> None:
    with pytest.raises(error, match=message):
        LoRATokenClassifier(model, **FAST).fit(x, y)
