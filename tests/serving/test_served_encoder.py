"""A server with an encoder, as OpenAI's own Python client sees it: embeddings and classes of texts."""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import nplora
from nplora.lm.encoder_loading import is_encoder
from nplora.serving import EncoderEngine, QueueFullError
from nplora.serving.served_encoder import ServedEncoder, read_adapter
from small_encoder import WIDTH, save_small_encoder
from small_llama import save_small_llama

openai = pytest.importorskip("openai")
pytest.importorskip("tokenizers")
pytest.importorskip("starlette")

if TYPE_CHECKING:
    from nplora.serving.api.app import Application

TEXTS = ["a cat", "where is my parcel", "the dog sat on the mat"]
LABELS = ["order", "refund", "other"]


def random_adapter(model: Any, directory: Path) -> Path:
    """Save an adapter of random numbers."""
    model.add_lora(rank=2)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
    nplora.save_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an adapter for embeddings, and with two adapters of classifiers."""
    made = tmp_path_factory.mktemp("served")
    model = save_small_encoder(made / "model")
    random_adapter(nplora.load_encoder(model), made / "tuned")
    random_adapter(nplora.new_classifier(nplora.load_encoder(model), LABELS), made / "classes")
    several = nplora.new_classifier(nplora.load_encoder(model), LABELS, task="multi")
    random_adapter(several, made / "several")
    number = nplora.new_classifier(nplora.load_encoder(model), ["size"], task="regression")
    random_adapter(number, made / "number")
    return made


@pytest.fixture(scope="module")
def app(directory: Path) -> Iterator[Application]:
    from nplora.serving.api.app import Application
    from nplora.serving.api.models import Models
    from nplora.serving.api.service import EncoderService

    served = ServedEncoder(nplora.load_encoder(directory / "model"))
    models = Models(served, "base", read=read_adapter)
    for name in ("tuned", "classes", "several", "number"):
        models.load(name, directory / name)
    with EncoderEngine(served) as engine:
        yield Application(EncoderService(engine, models, adapter_dir=directory))


def embed(client: Any, **changes: Any) -> Any:
    return client.embeddings.create(**{"model": "base", "input": TEXTS} | changes)


def vectors(answer: Any) -> Any:
    return np.array([one.embedding for one in answer.data])


def wanted(directory: Path, adapter: str | None = None, texts: Any = TEXTS) -> Any:
    encoder = nplora.load_encoder(directory / "model")
    if adapter is not None:
        nplora.read_adapter(directory / adapter).attach(encoder)
    return encoder.embed(texts, normalize=True)


def test_adapters_of_an_encoder_are_not_rounded(directory: Path) -> None:
    served = ServedEncoder(nplora.load_encoder(directory / "model"))
    with pytest.raises(ValueError, match="dtype is 'bfloat16', expected None: an encoder's adapters are not"):
        served.load_adapter(nplora.read_adapter(directory / "tuned"), "tuned", dtype="bfloat16")
    assert not served.adapters


@pytest.mark.parametrize("format_", ["float", "base64", None])
def test_embeddings_are_those_of_embed(client: Any, directory: Path, format_: str | None) -> None:
    given = {} if format_ is None else {"encoding_format": format_}
    answer = embed(client, **given)
    if format_ == "base64":
        assert all(isinstance(one.embedding, str) for one in answer.data)
        found = np.array([np.frombuffer(base64.b64decode(one.embedding), "<f4") for one in answer.data])
    else:
        found = vectors(answer)
    np.testing.assert_allclose(found, wanted(directory), atol=1e-6)
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.model == "base"
    encoder = nplora.load_encoder(directory / "model")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, encoder.encode(TEXTS)))


def test_a_text_and_tokens_are_inputs_too(client: Any, directory: Path) -> None:
    np.testing.assert_allclose(vectors(embed(client, input=TEXTS[0]))[0], wanted(directory)[0], atol=1e-6)
    ids = nplora.load_encoder(directory / "model").encode(TEXTS)
    np.testing.assert_allclose(vectors(embed(client, input=ids)), wanted(directory), atol=1e-6)
    np.testing.assert_allclose(vectors(embed(client, input=ids[1]))[0], wanted(directory)[1], atol=1e-6)


def test_an_adapter_answers_by_its_name(client: Any, directory: Path) -> None:
    found = vectors(embed(client, model="tuned"))
    np.testing.assert_allclose(found, wanted(directory, "tuned"), atol=1e-5)
    assert np.abs(found - wanted(directory)).max() > 0.01
    models = {model.id: model.parent for model in client.models.list()}
    assert models["base"] is None
    assert models["classes"] == "base"


def test_short_embeddings_have_length_one(client: Any, directory: Path) -> None:
    found = vectors(embed(client, dimensions=8))
    cut = wanted(directory)[:, :8]
    np.testing.assert_allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)


def test_embeddings_of_another_length_are_those_before_the_normalisation(
    client: Any, directory: Path
) -> None:
    found = vectors(embed(client, extra_body={"normalize": False}))
    unscaled = nplora.load_encoder(directory / "model").embed(TEXTS, normalize=False)
    np.testing.assert_allclose(found, unscaled, atol=1e-5)


def read(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())


def classify(client: Any, path: str = "/classify", **fields: Any) -> Any:
    return client.post(path, body={"input": TEXTS} | fields, cast_to=object)


@pytest.mark.parametrize("name", ["classes", "several"])
def test_classes_are_those_of_predict_proba(client: Any, directory: Path, name: str) -> None:
    classifier = nplora.load_classifier(directory / "model", directory / name)
    answer = classify(client, model=name)
    probabilities = classifier.predict_proba(TEXTS)
    assert answer["labels"] == LABELS
    for index, (one, row) in enumerate(zip(answer["data"], probabilities, strict=True)):
        assert one["index"] == index
        assert one["num_classes"] == len(LABELS)
        assert one["label"] == LABELS[row.argmax()]
        np.testing.assert_allclose(one["probs"], row, atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0


def test_a_regression_has_values(client: Any, directory: Path) -> None:
    classifier = nplora.load_classifier(directory / "model", directory / "number")
    found = [one["values"] for one in classify(client, model="number")["data"]]
    np.testing.assert_allclose(found, classifier.logits(TEXTS), atol=1e-5)


def test_the_head_in_a_models_files_classifies(directory: Path, tmp_path: Path) -> None:
    model = save_small_encoder(tmp_path / "model")
    rng, tensors = np.random.default_rng(0), nplora.formats.safetensors.open(model / "model.safetensors")
    held = {name: tensors[name].numpy() for name in tensors}
    held |= {f"bert.pooler.dense.{n}": rng.normal(size=s).astype(np.float32)
             for n, s in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))}  # fmt: skip
    held |= {"classifier.weight": rng.normal(size=(2, WIDTH)).astype(np.float32),
             "classifier.bias": np.zeros(2, np.float32)}  # fmt: skip
    held = {n if n.startswith(("bert.", "classifier")) else f"bert.{n}": a for n, a in held.items()}
    nplora.formats.safetensors.save(model / "model.safetensors", held)
    served = ServedEncoder(nplora.load_encoder(model))
    assert served.classifier is not None
    classifier = nplora.load_classifier(model)
    with EncoderEngine(served) as engine:
        logits = engine.submit(classifier.encoder.encode(TEXTS), classes=True).result()
    np.testing.assert_allclose(logits, classifier.logits(TEXTS), atol=1e-6)
    held["classifier.weight"][1, 2] = np.nan
    nplora.formats.safetensors.save(model / "model.safetensors", held)
    with pytest.raises(
        nplora.formats.FormatError, match=r"classifier\.weight"
    ):  # it does not start without classes
        ServedEncoder(nplora.load_encoder(model))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input[0]", "not empty"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["a", ""]}, "input[1]", "not empty"),
        ({"input": [[5, 6], []]}, "input", "not empty"),
        ({"input": [1000]}, "input[0]", "0 to 30"),
        ({"input": [5, -1]}, "input[1]", "0 to 30"),
        ({"input": [5, "a"]}, "input[1]", "an integer"),
        ({"input": [[5], [5, 1000]]}, "input[1][1]", "0 to 30"),
        ({"input": ["a", 5]}, "input[1]", "a text"),
        ({"input": {"text": "a"}}, "input", "a list"),
        ({"input": "a \ud800"}, None, ""),
        ({"input": "a " * 40}, "input", "more than 32 tokens"),
        ({"input": [5] * 33}, "input", "more than 32 tokens"),
        ({"input": ["a"] * 2049}, "input", "at most 2,048"),
        ({"dimensions": 0}, "dimensions", "1 to 32"),
        ({"dimensions": 33}, "dimensions", "1 to 32"),
        ({"encoding_format": "int8"}, "encoding_format", "one of float, base64"),
        ({"model": "classes"}, "model", "use /v1/classify"),
        ({"dimension": 8}, "dimension", "unrecognized field"),
        ({"prompt_name": "query"}, "prompt_name", "one of"),
    ],
)
def test_wrong_requests_are_refused(url: str, fields: Any, param: str | None, message: str) -> None:
    body = json.dumps({"input": "a", **fields}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/v1/embeddings", body)
    with caught.value as answer:
        error = json.load(answer)["error"]
    assert answer.status == 400
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


def test_the_clients_errors_are_openais(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="the nearest names: 'tuned'"):
        embed(client, model="tumed")
    with pytest.raises(openai.BadRequestError, match="not a classifier: use /v1/embeddings"):
        classify(client, model="tuned")
    with pytest.raises(openai.NotFoundError, match="does not generate text") as caught:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "unsupported_task"


def test_long_texts_are_cut_if_the_client_wants_it(client: Any, directory: Path) -> None:
    long = "a cat " * 40
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, input=long)
    assert caught.value.code == "context_length_exceeded"
    answer = embed(client, input=long, extra_body={"truncate_prompt_tokens": -1})
    with pytest.warns(UserWarning, match="1 of 1 text are longer than 32"):
        np.testing.assert_allclose(vectors(answer), wanted(directory, texts=[long]), atol=1e-6)
    assert answer.usage.prompt_tokens == 32
    assert embed(client, input=long, extra_body={"truncate_prompt_tokens": 7}).usage.prompt_tokens == 7


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(client: Any, directory: Path) -> None:
    def load(**fields: Any) -> Any:
        return client.post("/load_lora_adapter", body=fields, cast_to=str)

    load(lora_name="new", lora_path="tuned")
    np.testing.assert_allclose(vectors(embed(client, model="new")), wanted(directory, "tuned"), atol=1e-5)
    load(lora_name="new", lora_path="classes", load_inplace=True)
    assert classify(client, model="new")["data"][0]["num_classes"] == len(LABELS)
    client.post("/unload_lora_adapter", body={"lora_name": "new"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        embed(client, model="new")


def test_scales_add_up_adapters(client: Any, directory: Path) -> None:
    whole = vectors(embed(client, extra_body={"lora": [{"id": 0, "scale": 1}]}))
    np.testing.assert_allclose(whole, wanted(directory, "tuned"), atol=1e-5)
    half = vectors(embed(client, extra_body={"lora": [{"id": 0, "scale": 0.5}]}))
    assert np.abs(half - whole).max() > 1e-3


def test_health_and_metrics(client: Any, url: str) -> None:
    embed(client)
    assert read(f"{url}/health") == '{"status":"ok"}'
    assert 'nplora_finished_total{reason="stop"}' in read(f"{url}/metrics")


# ---- the engine ----


def test_requests_that_share_a_round_get_their_own_rows(directory: Path) -> None:
    encoder = nplora.load_encoder(directory / "model")
    engine = EncoderEngine(encoder)
    ids = [encoder.encode([text]) for text in TEXTS]
    futures = [engine.submit(one, client=str(i)) for i, one in enumerate(ids)]
    futures.append(engine.submit([]))
    assert engine.step()
    assert not engine.step()
    assert engine.metrics().rounds == 1
    for future, row in zip(futures, encoder.embed(TEXTS), strict=False):
        np.testing.assert_allclose(future.result(0)[0], row, atol=1e-6)
    assert futures[-1].result(0).shape == (0, WIDTH)


def test_a_small_request_does_not_wait_for_the_end_of_a_large_one(directory: Path) -> None:
    encoder = nplora.load_encoder(directory / "model")
    engine = EncoderEngine(encoder)
    many = [TEXTS[2]] * 1000
    large = engine.submit(encoder.encode(many), client="a")
    small = engine.submit(encoder.encode(TEXTS[:1]), client="b")
    assert engine.step()
    assert small.done()
    assert not large.done()
    while engine.step():
        pass
    np.testing.assert_allclose(large.result(0), encoder.embed(many), atol=1e-6)


def test_a_request_that_is_cancelled_is_not_computed(directory: Path) -> None:
    encoder = nplora.load_encoder(directory / "model")
    engine = EncoderEngine(encoder, max_waiting=1)
    first = engine.submit([[2, 5, 3]])
    with pytest.raises(QueueFullError, match="1 request is waiting already"):
        engine.submit([[2, 5, 3]])
    first.cancel()
    assert not engine.step()
    assert engine.metrics().finished == {"cancelled": 1}
    assert engine.submit([[2, 5, 3]]) is not None


def test_an_error_ends_the_requests_of_its_round_only(directory: Path) -> None:
    encoder = nplora.load_encoder(directory / "model")
    with EncoderEngine(encoder) as engine:
        with pytest.raises(ValueError, match="expected integers from 0 to 30"):
            engine.submit([[2, 10**6, 3]]).result(10)
        assert engine.submit([[2, 5, 3]]).result(10).shape == (1, WIDTH)
        with pytest.raises(ValueError, match=r"ids\[1\] is empty"):
            engine.submit([[2, 5, 3], []])
        with pytest.raises(TypeError, match="not a classifier"):
            engine.submit([[2, 5, 3]], classes=True)


def test_closing_computes_or_cancels_what_is_left(directory: Path) -> None:
    encoder, before = nplora.load_encoder(directory / "model"), threading.active_count()
    with EncoderEngine(encoder) as engine:
        futures = [engine.submit(encoder.encode(TEXTS)) for _ in range(20)]
    assert all(future.result(0).shape == (3, WIDTH) for future in futures)
    with pytest.raises(RuntimeError, match="was closed"):
        engine.submit([[2, 5, 3]])
    idle = EncoderEngine(encoder)
    left = idle.submit([[2, 5, 3]])
    idle.close(drain=False)
    assert left.cancelled()
    assert threading.active_count() <= before


def test_too_little_memory_is_refused(directory: Path) -> None:
    encoder = nplora.load_encoder(directory / "model")
    with pytest.raises(ValueError, match="memory is 2 MB, expected at least"):
        EncoderEngine(encoder, memory="2M")
    assert EncoderEngine(encoder, memory="64G", adapter_memory=None).plan.adapters > 0


# ---- which files are served so ----


def test_encoders_and_models_with_a_pooling_are_served_with_embeddings(tmp_path: Path) -> None:
    assert is_encoder(save_small_encoder(tmp_path / "encoder", pooling=None))
    assert not is_encoder(save_small_llama(tmp_path / "small.gguf"))
    pooled = {"llama.pooling_type": nplora.formats.gguf.Typed(3, "UINT32")}
    assert is_encoder(save_small_llama(tmp_path / "pooled.gguf", changes=pooled))
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    (decoder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert not is_encoder(decoder)
    (decoder / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}'
    )
    assert is_encoder(decoder)


def test_a_language_model_has_embeddings(tmp_path: Path) -> None:
    encoder = nplora.load_encoder(save_small_llama(tmp_path / "small.gguf"), pooling="last")
    with EncoderEngine(encoder) as engine:
        found = engine.submit(encoder.encode(TEXTS), normalize=True).result(10)
    np.testing.assert_allclose(found, encoder.embed(TEXTS, normalize=True), atol=1e-5)
