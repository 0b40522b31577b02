"""The server as OpenAI's own Python client sees it."""

import json
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.lm.generation import Sampling
from nplora.serving import Chunk, Ticket, Usage
from nplora.serving.api.answers import ChatObjects
from nplora.serving.api.text_request import TextRequest

openai = pytest.importorskip("openai")

ENGINE = "real"
CHAT = [{"role": "user", "content": "hello 12"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "maximum": 5}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


def ask(client: Any, **changes: Any) -> Any:
    options = {"model": "base", "messages": CHAT, "max_tokens": 8, "temperature": 0} | changes
    return client.chat.completions.create(**options)


def test_the_models_are_the_base_and_its_adapters(client: Any) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["base", "adapter0", "adapter1"]
    assert client.models.retrieve("adapter1").parent == "base"
    with pytest.raises(openai.NotFoundError, match="the nearest names: 'adapter1'"):
        client.models.retrieve("adaptor1")


def test_a_chat_is_answered_as_generate_answers_it(client: Any, lm: nplora.LanguageModel) -> None:
    answer = ask(
        client,
    )
    assert answer.choices[0].message.content == lm.generate(CHAT, 8)
    assert answer.model == "base"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(lm.tokenizer.encode_chat(CHAT, True))


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client: Any) -> None:
    whole = ask(client)
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 2) + [
        "length"
    ]
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])


def test_completions_answer_texts_and_tokens(client: Any, lm: nplora.LanguageModel) -> None:
    options = {"model": "base", "max_tokens": 6, "temperature": 0}
    texts = client.completions.create(prompt=["hello", "12"], **options)
    ids = [lm.tokenizer.encode_prompt(text) for text in ("hello", "12")]
    tokens = client.completions.create(prompt=ids, **options)
    expected = lm.generate(["hello", "12"], 6)
    assert [choice.text for choice in texts.choices] == expected
    assert [choice.text for choice in tokens.choices] == expected
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == expected[1]
    echoed = client.completions.create(prompt="hello", echo=True, stream=True, **options)
    assert "".join(piece.choices[0].text for piece in echoed) == "hello" + expected[0]


def test_sampled_answers_are_those_of_generate(client: Any, lm: nplora.LanguageModel) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    answer = ask(client, n=2, extra_body={"top_k": 20}, **options)
    expected = lm.generate([CHAT, CHAT], 8, top_k=20, **options)
    assert [choice.message.content for choice in answer.choices] == expected
    other = ask(client, temperature=1.5), ask(client, temperature=1.5)
    assert other[0].choices[0].message.content != other[1].choices[0].message.content


def test_several_streams_of_one_request_are_told_apart(client: Any) -> None:
    options = {"n": 3, "temperature": 1, "seed": 3}
    texts = ["", "", ""]
    for piece in ask(client, stream=True, **options):
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in ask(client, **options).choices]


def test_generation_ends_before_a_stop_text(client: Any) -> None:
    whole = ask(client, max_tokens=30).choices[0].message.content
    stop = whole[4:6]
    answer = ask(client, max_tokens=30, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(client: Any, lm: nplora.LanguageModel) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3).choices[0]
    ids = lm.tokenizer.encode_chat(CHAT, True)
    scores = lm.logits([ids])[0, -1, : lm.tokenizer.vocab_size].astype(np.float64)
    expected = scores - np.log(np.exp(scores).sum())
    best = np.argsort(-expected)[:3]
    first = answer.logprobs.content[0]
    assert first.logprob == pytest.approx(expected[best[0]], abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(expected[best], abs=1e-4)
    assert [top.token for top in first.top_logprobs] == [lm.tokenizer.decode([id_]) for id_ in best]
    streamed = ask(client, logprobs=True, top_logprobs=3, stream=True)
    content = [token for piece in streamed if (found := piece.choices[0].logprobs) for token in found.content]
    assert content == answer.logprobs.content
    completed = client.completions.create(
        model="base", prompt=ids, max_tokens=8, temperature=0, logprobs=3
    ).choices[0]
    assert completed.logprobs.token_logprobs == [token.logprob for token in content]
    assert completed.logprobs.tokens == [token.token for token in content]
    assert completed.logprobs.text_offset[:2] == [0, len(content[0].token)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_json_schema(client: Any, stream: bool) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
    answer = ask(client, max_tokens=60, response_format=form, stream=stream)
    text = (
        "".join(piece.choices[0].delta.content or "" for piece in answer)
        if stream
        else answer.choices[0].message.content
    )
    assert set(json.loads(text)) == {"a", "b"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_tool_call_has_the_arguments_of_the_tool(client: Any, choice: Any) -> None:
    pytest.importorskip("llguidance")
    options = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    answer = ask(client, **options).choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert list(arguments) == ["x"]
    assert type(arguments["x"]) is int
    pieces = [piece.choices[0] for piece in ask(client, stream=True, **options)]
    [streamed] = [delta.delta.tool_calls[0] for delta in pieces if delta.delta.tool_calls]
    assert streamed.function.arguments == call.function.arguments
    assert pieces[-1].finish_reason == "tool_calls"
    formed = ask(client, response_format={"type": "json_object"}, **options).choices[0]
    assert formed.message.tool_calls[0].function == call.function
    # The call and its result go back as messages.
    result = {"role": "tool", "content": "7", "tool_call_id": call.id}
    messages = [*CHAT, answer.message.model_dump(exclude_none=True), result]
    assert ask(client, messages=messages, tools=[TOOL]).choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1, expected 0 to 100"),
        ({"max_tokens": 0}, "max_tokens", "expected 1 to"),
        ({"max_tokens": "8"}, "max_tokens", "expected an integer"),
        ({"top_p": 2}, "top_p", "expected 0 to 1"),
        ({"n": 100}, "n", "expected 1 to 16"),
        ({"stop": [5]}, "stop", "expected a text"),
        ({"extra_body": {"web_search_options": {}}}, "web_search_options", "not supported"),
        ({"extra_body": {"best_of": 2}}, "best_of", "not supported"),
        ({"extra_body": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "repeat_last_n", "not supported"),
        ({"extra_body": {"xtc_probability": 0.5}}, "xtc_probability", "not supported"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "tokens as integers"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected 0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "expected a text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "expected one of system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "reads text only",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 3000}]},
            "messages",
            "maximum context length is 512",
        ),
        ({"extra_body": {"top_kk": 1}}, "top_kk", "did you mean top_k"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "not supported"),
        (
            {"tools": [{"type": "function"}]},
            "tools[0].type",
            "together with an object in the field 'function'",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "two functions of the same name"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format",
            "the schema cannot be used",
        ),
        ({"extra_body": {"lora": [{"id": 7, "scale": 1}]}}, "lora[0].id", "no adapter has this id"),
    ],
)
def test_a_wrong_field_is_named(client: Any, changes: dict[str, Any], param: str, message: str) -> None:
    if "json_schema" in str(changes):
        pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match=message.replace("[", r"\[")) as caught:
        ask(client, **changes)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ([{"role": "developer", "content": "be brief"}], [{"role": "system", "content": "be brief"}]),
        ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}]),
        ([{"role": "assistant"}], [{"role": "assistant", "content": ""}]),
    ],
)
def test_messages_of_other_forms_are_the_same_prompt(client: Any, given: Any, same: Any) -> None:
    options = {"max_tokens": 20, "logprobs": True}
    one, other = (ask(client, messages=[*found, *CHAT], **options).choices[0] for found in (given, same))
    assert one.logprobs == other.logprobs


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": [""]},
        {"prompt_cache_options": {}, "moderation": {"model": "x"}},
        {"timings_per_token": True, "return_progress": True, "id_slot": -1, "reasoning_format": "auto"},
        {
            "samplers": ["top_k", "temperature"],
            "repeat_last_n": 64,
            "dynatemp_range": 0,
            "dynatemp_exponent": 1,
        },
        {"xtc_probability": 0, "xtc_threshold": 0.1, "dry_multiplier": 0, "best_of": 1},
        {"chat_template_kwargs": {}, "add_generation_prompt": True, "skip_special_tokens": True},
        {"stop_token_ids": [], "parallel_tool_calls": True},
    ],
)
def test_fields_of_other_clients_that_change_nothing_are_accepted(
    client: Any, fields: dict[str, Any]
) -> None:
    plain, given = ask(client), ask(client, extra_body=fields)
    assert given.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_minus_one_is_no_limit(client: Any, app: Any, field: str) -> None:
    ids = [7] * 480
    answer = client.post("/completions", body={"prompt": ids, field: -1, "temperature": 0}, cast_to=object)
    longest = client.post(
        "/completions", body={"prompt": ids, "max_tokens": 32, "temperature": 0}, cast_to=object
    )
    assert answer["choices"] == longest["choices"]
    assert answer["usage"]["completion_tokens"] > 16


def test_only_one_call_is_made_if_the_client_wants_one_at_a_time() -> None:
    call = '{"name": "add", "arguments": {}}'
    chunks, ticket = [Chunk(f"[{call}, {call}]", ())], Ticket(1, lambda: False, lambda ticket: None)
    ticket.end("stop", Usage(1))
    for most, count in ((None, 2), (1, 1)):
        request = TextRequest(
            "base", [[1]], 1, Sampling(), None, True, False, tools=frozenset({"add"}), most_calls=most
        )
        whole = ChatObjects(request, [ticket]).choice(0, chunks)["message"]["tool_calls"]
        streamed = ChatObjects(request, [ticket])
        pieces = [*streamed.piece(0, chunks[0]), *streamed.end(0)]
        found = [piece["choices"][0]["delta"].get("tool_calls", []) for piece in pieces]
        assert len(whole) == sum(map(len, found)) == count


def test_reading_a_request_honours_parallel_tool_calls(app: Any) -> None:
    body = {"messages": CHAT, "tools": [TOOL]}
    assert app.service.reader.chat(body)[1].most_calls is None
    assert app.service.reader.chat({**body, "parallel_tool_calls": False})[1].most_calls == 1


def test_a_json_object_may_have_a_schema(client: Any) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_object", "schema": SCHEMA}
    text = ask(client, max_tokens=60, response_format=form).choices[0].message.content
    assert set(json.loads(text)) == {"a", "b"}


@pytest.mark.parametrize("arguments", [None, ""])
def test_a_call_without_arguments_goes_back(client: Any, arguments: Any) -> None:
    def asked(given: Any) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": given}}
        return ask(client, messages=[*CHAT, {"role": "assistant", "tool_calls": [call]}], logprobs=True)

    assert asked(arguments).choices[0].logprobs == asked("{}").choices[0].logprobs


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="../../etc/passwd")
    assert caught.value.code == "model_not_found"
