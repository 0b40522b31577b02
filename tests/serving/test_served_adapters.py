"""Adapters of a server, chosen, loaded and unloaded by requests."""

import errno
import gc
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import live_server
import numpy as np
import pytest

import nplora
from nplora.serving import run
from nplora.serving.adapter_memory import AdapterMemory
from nplora.serving.api import text_routes
from nplora.serving.api.answers import ChatObjects
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models
from nplora.serving.api.text_request import Reader
from nplora.serving.fields import Fields
from nplora.serving.options import ServeOptions
from nplora.serving.request_error import RequestError

openai = pytest.importorskip("openai")

ENGINE = "real"
CHAT = [{"role": "user", "content": "hello 12"}]


def ask(client: Any, **changes: Any) -> Any:
    options = {"model": "base", "messages": CHAT, "max_tokens": 8, "temperature": 0} | changes
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("name", ["adapter0", "adapter1"])
def test_an_adapter_answers_by_its_name(client: Any, lm: nplora.LanguageModel, name: str) -> None:
    answer = ask(client, model=name)
    assert answer.choices[0].message.content == lm.with_adapter(lm.adapters[name]).generate(CHAT, 8)
    assert answer.model == name


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(
    client: Any, app: Application, lm: nplora.LanguageModel
) -> None:
    path = str(app.service.adapter_dir / "adapter1")

    def load(**fields: Any) -> Any:
        return client.post("/load_lora_adapter", body=fields, cast_to=str)

    assert load(lora_name="org/new", lora_path="adapter1").startswith("Success")
    answer = ask(client, model="org/new").choices[0].message.content
    assert answer == ask(client, model="adapter1").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="is taken"):
        load(lora_name="org/new", lora_path=path)
    assert load(lora_name="org/new", lora_path="adapter0", load_inplace=True).startswith("Success")
    assert ask(client, model="org/new").choices[0].message.content != answer
    client.post("/unload_lora_adapter", body={"lora_name": "org/new"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        ask(client, model="org/new")
    assert load(lora_name="again", lora_path=path).startswith("Success")
    assert client.models.delete("again").deleted
    for name in ("../x", "/x", "a//b", "", "a b", "x" * 300, "a/../b", "base"):
        with pytest.raises(openai.BadRequestError):
            load(lora_name=name, lora_path="adapter1")


def test_an_adapter_is_replaced_in_one_step(
    client: Any, app: Application, lm: nplora.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, directory = app.service.models, app.service.adapter_dir

    def listed() -> list[tuple[str, int, float]]:
        return [(one["name"], one["id"], one["scale"]) for one in models.scales()]

    before = listed()
    models.set_scales([{"id": 0, "scale": 0.5}])
    seen: list[Any] = []
    read = models._read

    def reading(*arguments: Any) -> Any:
        seen.append(ask(client, model="adapter0").choices[0].message.content)
        seen.append(ask(client, extra_body={"lora": [{"id": 0, "scale": 2}]}).choices[0].message.content)
        return read(*arguments)

    expected = [lm.with_adapter(lm.adapters["adapter0"]).generate(CHAT, 8)]
    expected.append(ask(client, extra_body={"lora": [{"id": 0, "scale": 2}]}).choices[0].message.content)
    monkeypatch.setattr(models, "_read", reading)
    try:
        models.load("adapter0", directory / "adapter1", replace=True)
        assert seen == expected
        assert listed() == [("adapter0", 0, 0.5), *before[1:]]
        new = ask(client, model="adapter0").choices[0].message.content
        assert new == ask(client, model="adapter1").choices[0].message.content != expected[0]
        scaled = ask(client, extra_body={"lora": [{"id": 0, "scale": 2}]}).choices[0].message.content
        assert scaled == ask(client, extra_body={"lora": [{"id": 1, "scale": 2}]}).choices[0].message.content
        with pytest.raises(OSError, match="nowhere"):
            models.load("adapter0", directory / "nowhere", replace=True)
        assert ask(client, model="adapter0").choices[0].message.content == new
    finally:
        models.set_scales([])
        models.load("adapter0", directory / "adapter0", replace=True)


def test_an_adapter_that_does_not_fit_into_memory_is_refused(client: Any, app: Application) -> None:
    """An adapter takes 2.5 times its size, and 3.5 times its size while it is loaded."""
    models = app.service.models
    models.memory = AdapterMemory(5 * models.lm.adapters["adapter1"].nbytes)

    def load(name: str) -> Any:
        return client.post(
            "/load_lora_adapter", body={"lora_name": name, "lora_path": "adapter1"}, cast_to=str
        )

    try:
        load("first")
        for _ in range(2):
            with pytest.raises(
                openai.APIStatusError, match=r"too little memory for the adapter 'second'.* MB"
            ) as caught:
                load("second")
            assert (caught.value.status_code, caught.value.code) == (507, "insufficient_memory")
            assert caught.value.response.headers["x-should-retry"] == "false"
        assert "second" not in {model.id for model in client.models.list()}
        for scale in (2, 3, 4):  # each sum takes the place of the one before
            ask(client, extra_body={"lora": [{"id": 0, "scale": scale}]})
        assert ask(client, model="first").choices[0].message.content
        message = r"memory for the sum of adapters 'adapter0\*2\.0\+adapter1\*3\.0'"
        with pytest.raises(openai.APIStatusError, match=message) as caught:
            ask(client, extra_body={"lora": [{"id": 0, "scale": 2}, {"id": 1, "scale": 3}]})
        assert (caught.value.status_code, caught.value.code) == (507, "insufficient_memory")
        client.models.delete("first")
        load("second")
        client.models.delete("second")
    finally:
        models.memory = None


def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = app.service.models
    with open(tmp_path / "adapter_model.safetensors", "wb") as file:
        file.truncate(8 << 20)  # bytes
    monkeypatch.setattr(models, "memory", AdapterMemory(16 << 20))
    with pytest.raises(RequestError, match="too little memory for the adapter 'large'"):
        models.load("large", tmp_path)


def test_adapters_are_swapped_while_a_request_runs(client: Any, app: Application) -> None:
    """There is room for the new adapter only when the old one has left the memory."""
    models = app.service.models
    ids = models.lm.tokenizer.encode("hello")
    long = nplora.generate.Sampling(max_new_tokens=400, logit_bias={models.lm.tokenizer.eos_id or 0: -np.inf})
    models.memory = AdapterMemory(4 * models.lm.adapters["adapter1"].nbytes)
    try:
        running = app.service.engine.submit(ids, long)
        for number in range(4):
            models.load(f"swapped{number}", app.service.adapter_dir / "adapter1")
            assert ask(client, model=f"swapped{number}", max_tokens=2).choices[0].message.content is not None
            models.unload(f"swapped{number}")
        assert running.finish_reason is None
        running.cancel()
        running.text()
    finally:
        models.memory = None


def test_two_adapters_that_are_loaded_at_the_same_time_do_not_exceed_the_memory(
    lm: nplora.LanguageModel,
) -> None:
    size = lm.adapters["adapter1"].nbytes
    memory = AdapterMemory(4 * size)
    with memory.room(lm, "adapter0", size):
        assert memory.used == int(3.5 * size)
        with pytest.raises(RequestError, match="too little memory for the adapter 'adapter1'"):
            memory.room(lm, "adapter1", size).__enter__()
    assert memory.used == int(2.5 * size)
    with pytest.raises(OSError, match="no file"), AdapterMemory(4 * size).room(lm, "adapter1", size):
        raise OSError("no file")


def test_a_request_keeps_the_adapter_whose_tokens_encoded_it(
    client: Any, app: Application, lm: nplora.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another adapter takes the name after the request was read."""
    models, directory = app.service.models, app.service.adapter_dir
    other, read = nplora.load_model(lm.source), Reader.chat
    messages = [{"role": "user", "content": "a <step>"}]
    other.add_lora(rank=2, init="gaussian", add_tokens="<step>")
    nplora.save_adapter(other, directory / "steps")

    def replaced(*arguments: Any) -> Any:
        request = read(*arguments)
        models.load("steps", directory / "adapter1", replace=True)
        return request

    models.load("steps", directory / "steps")
    monkeypatch.setattr(Reader, "chat", replaced)
    try:
        answer = ask(client, model="steps", messages=messages)
    finally:
        models.unload("steps")
    assert answer.choices[0].message.content == other.generate(messages, 8)
    assert answer.usage.prompt_tokens == len(other.tokenizer.encode_chat(messages, True))


def test_an_answer_does_not_keep_the_memory_of_an_unloaded_adapter(app: Application) -> None:
    """A slow client may read a stream long after the engine has completed the answer."""
    service, body = app.service, {"model": "slow", "messages": CHAT, "max_tokens": 2, "stream": True}
    service.models.load("slow", service.adapter_dir / "adapter1")
    model = weakref.ref(service.models.lm.named_model("slow"))
    request, tickets = text_routes._submit(service, body, "", Reader.chat)
    answer = ChatObjects(request, tickets)
    service.models.unload("slow")
    tickets[0].text()
    end = time.monotonic() + 10
    while gc.collect() >= 0 and model() is not None:
        assert time.monotonic() < end, "the adapter is still in memory"
        time.sleep(0.01)
    assert answer.usage()["completion_tokens"] == 2


def test_memory_is_planned_only_for_adapters_that_can_be_added(tmp_path: Path) -> None:
    """Without a directory and without jobs, these are sums of the adapters that the server begins with."""
    model = live_server.save_model(tmp_path)
    paths = live_server.save_adapters(model, tmp_path)
    for count, source, text in (
        (0, {}, ""),
        (2, {}, "sums of adapters (requests with `lora`)"),
        (2, {"adapter_dir": str(tmp_path)}, "adapters that requests load"),
        (0, {"jobs": str(tmp_path / "jobs")}, "adapters of jobs"),
    ):
        lm = nplora.load_model(model)
        options = ServeOptions(memory="8G", max_requests=2, max_queue=10, **source)
        models = Models(lm, "base")
        for number in range(count):
            models.load(f"adapter{number}", paths[number])
        with run.running(lm, models, options) as (engine, _):
            assert [
                line.split("MB  ")[1]
                for line in run.description(engine, models, options).splitlines()
                if "adapters" in line and "MB  " in line
            ][1:] == [text] * bool(text)
            if source:
                assert engine.plan.adapters > 200e6
                continue
            size, used = sum(adapter.nbytes for adapter in lm.adapters.values()), []
            for scale in range(40):
                scales = [{"id": number, "scale": 2 + scale} for number in range(count)]
                _, name = models.chosen(Fields({"lora": scales}))
                if name is not None and scale < 10 + 2 * 2:  # as requests and the engine's cache hold them
                    used.append(lm.named_model(name))
            if count:
                assert len(lm.adapters) == 2 + 16
                assert 2.5 * 30 * size == models.memory.used <= engine.plan.adapters == int(76 * size)


def test_an_adapter_that_disappears_again_and_again_is_a_temporary_error(
    client: Any, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: object) -> None:
        raise KeyError("no adapter '=adapter0*2'")

    monkeypatch.setattr(app.service.models.lm, "named_model", missing)
    with pytest.raises(openai.InternalServerError, match="try again in a moment") as caught:
        ask(client, extra_body={"lora": [{"id": 0, "scale": 2}]})
    assert (caught.value.status_code, caught.value.code) == (503, "adapter_unloaded")


@pytest.mark.parametrize("path", ["..", "/etc", "../../etc/passwd", "nowhere", "link", "a\0b", "x" * 5000])
def test_adapters_outside_the_directory_are_refused(client: Any, app: Application, path: str) -> None:
    link: Path = app.service.adapter_dir / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": path}, cast_to=str)


def test_links_inside_an_adapter_do_not_lead_out_of_the_directory(
    client: Any, app: Application, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"root:x:0:0")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        place: Path = app.service.adapter_dir / f"linked-{name}"
        shutil.copytree(app.service.adapter_dir / "adapter1", place)
        (place / name).unlink()
        (place / name).symlink_to(secret)
        with pytest.raises(openai.NotFoundError) as caught:
            client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": place.name}, cast_to=str)
        assert "root" not in str(caught.value)
    inner: Path = app.service.adapter_dir / "linked"
    inner.mkdir()
    for file in (app.service.adapter_dir / "adapter1").iterdir():
        (inner / file.name).symlink_to(file)
    client.post("/load_lora_adapter", body={"lora_name": "linked", "lora_path": "linked"}, cast_to=str)
    client.models.delete("linked")


@pytest.mark.parametrize("damage", ["truncated", "unreadable"])
def test_an_adapter_that_cannot_be_read_is_a_bad_request(
    client: Any, app: Application, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    place: Path = app.service.adapter_dir / damage
    shutil.copytree(app.service.adapter_dir / "adapter1", place)
    if damage == "truncated":
        (place / "adapter_model.safetensors").write_bytes(b"12345")
    else:

        def refuse(*arguments: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(place / "adapter_model.safetensors"))

        monkeypatch.setattr(app.service.models, "load", refuse)
    with pytest.raises(openai.BadRequestError, match="cannot be loaded") as caught:
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": damage}, cast_to=str)
    assert str(app.service.adapter_dir) not in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_adapters_may_be_rounded_to_bfloat16(tmp_path: Path) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    model = live_server.save_model(tmp_path)
    [path] = live_server.save_adapters(model, tmp_path, 1)
    exact = nplora.read_adapter(path)
    for dtype in (None, "bfloat16"):
        lm, options = nplora.load_model(model), ServeOptions(memory="4G", adapter_dtype=dtype)
        with run._text_service(lm, options, [("mine", str(path))], False, print) as (service, _, _):
            service.models.load("later", path)
            for name in ("mine", "later"):
                for layer, delta in lm.adapters[name].items():
                    for got, stored in ((delta.A, exact[layer].A), (delta.B, exact[layer].B)):
                        rounded = stored.astype(bfloat16).astype(np.float32)
                        assert (rounded != stored).any()
                        np.testing.assert_array_equal(got, stored if dtype is None else rounded)
            service.models.set_scales([{"id": 0, "scale": 0.3}])
            _, name = service.models.chosen(Fields({}))
            assert name is not None
            exact_sum = nplora.combine([(lm.adapters["mine"], 0.3)])
            for layer, delta in lm.adapters[name].items():  # a sum is not rounded a second time
                np.testing.assert_array_equal(delta.A, exact_sum[layer].A)
                np.testing.assert_array_equal(delta.B, exact_sum[layer].B)


def test_a_file_that_is_no_adapter_is_refused(client: Any, app: Application) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be loaded"):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "small.gguf"}, cast_to=str)


def test_scales_of_adapters_are_those_of_llama_cpp(client: Any, lm: nplora.LanguageModel) -> None:
    def answer(**more: Any) -> str:
        return str(ask(client, extra_body=more).choices[0].message.content)

    assert answer(lora=[{"id": 1, "scale": 1.0}]) == ask(client, model="adapter1").choices[0].message.content
    assert answer(lora=[{"id": 1, "scale": 0.0}]) == answer() == answer(lora=[])
    mixed = nplora.combine([(lm.adapters["adapter0"], 0.5), (lm.adapters["adapter1"], 2.0)])
    expected = lm.with_adapter(mixed).generate(CHAT, 8)
    assert answer(lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 2}]) == expected
    assert [model.id for model in client.models.list()] == ["base", "adapter0", "adapter1"]
    root = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    root.post("/lora-adapters", body=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 2}], cast_to=object)
    listed = root.get("/lora-adapters", cast_to=object)
    assert [(one["id"], one["scale"]) for one in listed] == [(0, 0.5), (1, 2.0)]
    assert answer() == expected
    root.post("/lora-adapters", body=[], cast_to=object)
    assert answer() != expected
    with pytest.raises(openai.BadRequestError, match=r"lora\[1\].id is 0, which is given twice"):
        answer(lora=[{"id": 0, "scale": 0.5}, {"id": 0, "scale": 2}])
    with pytest.raises(openai.BadRequestError, match=r"lora\[2\] is 'x', expected an object"):
        answer(lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 2}, "x"])


def test_more_prompts_than_can_ever_wait_are_a_bad_request(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_routes, "WAITING", 64 * 30)
    body = {"prompt": [7] * 11, "max_tokens": 2}
    client.post("/completions", body={**body, "n": 2}, cast_to=object)
    message = "the prompts of the 3 answers have 33 tokens, but this server accepts at most 30 at a time"
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/completions", body={**body, "n": 3}, cast_to=object)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_the_limit_of_an_answer_is_listed_and_the_error_names_the_field(
    client: Any, app: Application, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    assert {model.model_extra.get("max_tokens") for model in client.models.list()} == {None}
    monkeypatch.setattr(app.service, "most_tokens", 4)
    monkeypatch.setattr(app.service, "reader", Reader(app.service.models, app.service.engine.context, 4))
    assert {model.model_extra["max_tokens"] for model in client.models.list()} == {4}
    with pytest.raises(
        openai.BadRequestError, match=f"{field} is 5, but this server generates at most 4"
    ) as caught:
        client.post("/completions", body={"prompt": "hello", field: 5}, cast_to=object)
    assert caught.value.param == field
