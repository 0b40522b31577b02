"""The chat templates of well-known models: the text equals that of transformers, and the turns are found."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nplora.finetuning.data import read_dataset
from nplora.formats.errors import DataError
from nplora.formats.gguf import Typed
from nplora.tokenizer import Tokenizer, from_gguf
from vocabularies import BYTES, byte_level, opened

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IM = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
# Special tokens of each template, the token that ends a text, and a pattern of what the assistant writes.
MODELS = {
    "qwen2_5": (CHATML, "<|im_end|>", IM),
    "qwen3": (CHATML, "<|im_end|>", IM),
    "llama3_2": (LLAMA, "<|eot_id|>",
                 r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"),
    "gemma3": (["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
               r"<start_of_turn>model\n(.*?<end_of_turn>)"),
    "phi_4": ([*CHATML, "<|im_sep|>"], "<|im_end|>", r"<\|im_start\|>assistant<\|im_sep\|>(.*?<\|im_end\|>)"),
    "phi_4_mini": (["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
                   "<|endoftext|>", r"<\|assistant\|>(.*?<\|end\|>)"),
    "granite_3": (["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"],
                  "<|end_of_text|>", r"<\|start_of_role\|>assistant<\|end_of_role\|>(.*?<\|end_of_text\|>)"),
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The <weather> of a "city", in °C',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "Now", "parameters": {}}}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi.\n\nYou?"},
    {"role": "user", "content": "  Well\n"},
    {"role": "assistant", "content": "Bye"},
]
ASKED = [
    {"role": "user", "content": "Hot in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [call("Rome")]},
    {"role": "tool", "content": "31"},
    {"role": "assistant", "content": "Yes."},
]
CHATS: dict[str, dict[str, Any]] = {
    "talk": {"messages": TALK},
    "one answer": {"messages": TALK[:2]},
    "ends with a question": {"messages": TALK[:3]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *TALK]},
    "tools": {"messages": ASKED, "tools": [WEATHER]},
    "offered, but not called": {"messages": TALK, "tools": [WEATHER, TIME]},
    "tools, then a talk": {"messages": [*ASKED, *TALK], "tools": [WEATHER]},
    "reasoning": {"messages": [{**m, "reasoning_content": "Let me see."} for m in TALK]},
    "reasoning in the text": {
        "messages": [
            {**m, "content": f"<think>\nHm.\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
            for m in TALK
        ]
    },
    "reasoning and tools": {
        "messages": [{**m, "reasoning_content": "Let me see."} for m in [*TALK, *ASKED]],
        "tools": [WEATHER],
    },
    "an answer that looks like a head": {
        "messages": [*TALK[:1], {"role": "assistant", "content": "assistant\nmodel\n 1"}, *TALK]
    },
}
SYSTEM = {"role": "system", "content": "Be kind."}
ORDERS: dict[str, dict[str, Any]] = {
    "a late system message": {"messages": [*TALK[:2], SYSTEM, *TALK[2:]]},
    "begins with the assistant": {"messages": TALK[1:]},
    "a single answer": {"messages": TALK[1:2]},
    "a system message, then the assistant": {"messages": [SYSTEM, *TALK[1:]]},
    "two questions in a row": {"messages": [TALK[0], *TALK[2:]]},
    "two answers in a row": {"messages": [*TALK[:2], TALK[3]]},
}
CHATS |= ORDERS
# Templates that have no way to write calls. That of Granite lists the tools.
NO_TOOLS = ("gemma3", "phi_4", "phi_4_mini", "granite_3")
CASES = [
    (model, chat)
    for model in MODELS
    for chat in CHATS
    if not ("tools" in chat and model in NO_TOOLS) and not (model == "gemma3" and chat in ORDERS)
]


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def model_with(name: str, text: str | None = None) -> Tokenizer:
    """A tokenizer of bytes with the special tokens of this model, and its template (or `text`)."""
    special, end, _ = MODELS[name]
    others = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens, but not special ones
    return from_gguf(
        opened(
            byte_level(
                tokens=[*special, *BYTES.values(), *others],
                token_type=Typed([3] * len(special) + [1] * len(BYTES) + [4] * len(others), "INT32"),
                merges=Typed([], "STRING"),
                eos_token_id=special.index(end),
                bos_token_id=0,
            )
            | {"tokenizer.chat_template": text or template(name)}
        )
    )


def transformers_tokenizer(name: str, text: str) -> Any:
    transformers = pytest.importorskip("transformers")
    ours = model_with(name)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours._backend, eos_token=MODELS[name][1], bos_token=MODELS[name][0][0]
    )
    theirs.chat_template = text
    return theirs


@pytest.mark.parametrize(("model", "chat"), CASES)
def test_the_turns_of_the_assistant_are_what_it_writes_in_the_text(model: str, chat: str) -> None:
    tokenizer, given = model_with(model), CHATS[chat]
    found = tokenizer.encode_conversation(**given)
    text = tokenizer.decode(found.ids)
    expected = re.findall(MODELS[model][2], text, re.DOTALL)
    assistants = [i for i, message in enumerate(given["messages"]) if message["role"] == "assistant"]
    assert len(expected) == len(assistants)
    turns = {
        index: tokenizer.decode(found.ids[turn.start : turn.stop]) for index, turn in found.turns.items()
    }
    assert turns == dict(zip(assistants, expected, strict=True))
    assert not re.search(r"Hello there|Well|Hot in Rome|31|Be kind", "".join(turns.values()))
    drops_system = model == "phi_4" and chat == "a late system message"
    assert ("messages" in found.unused) == drops_system
    assert ("Be kind." in text) == (SYSTEM in given["messages"] and not drops_system)
    has_reasoning = any("reasoning_content" in message for message in given["messages"])
    assert ("reasoning" in found.unused) == (has_reasoning and "Let me see." not in text)
    for most in (20, len(found.ids) // 2):  # the beginning has the same tokens and turns
        cut = tokenizer.encode_conversation(**given, most=most)
        size = len(cut.ids)
        assert cut.ids == found.ids[:size]
        assert cut.is_reply == found.is_reply[:size]


@pytest.mark.parametrize("chat", ORDERS)
def test_an_order_of_roles_that_the_template_refuses_is_an_error_of_the_row(chat: str) -> None:
    """transformers refuses the same chats, with the words of the template."""
    found = {
        "a late system message": "message 3 of the chat has the role 'system' after 'assistant', expected 'u",
        "two questions in a row": "message 2 of the chat has the role 'user' after 'user', expected 'assist",
        "two answers in a row": "message 3 of the chat has the role 'assistant' after 'assistant', expected",
        "a system message, then the assistant": "message 2 of the chat has the role 'assistant' after 'syste",
    }.get(chat, "message 1 of the chat has the role 'assistant' at the beginning, expected 'user'")
    with pytest.raises(DataError, match=rf"^data, row 2: {found}.*; .*: Conversation roles must alternate"):
        read_dataset([{"messages": TALK}, ORDERS[chat]], model_with("gemma3"))


@pytest.mark.slow
@pytest.mark.parametrize("chat", ORDERS)
def test_transformers_refuses_the_orders_of_roles_that_we_refuse(chat: str) -> None:
    theirs = transformers_tokenizer("gemma3", template("gemma3"))
    with pytest.raises(Exception, match="Conversation roles must alternate"):
        theirs.apply_chat_template(ORDERS[chat]["messages"], tokenize=False)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "chat"), CASES)
def test_the_text_is_that_of_transformers(model: str, chat: str) -> None:
    given = json.loads(json.dumps(CHATS[chat]))
    theirs = transformers_tokenizer(model, template(model))
    expected = theirs.apply_chat_template(
        given["messages"], tools=given.get("tools"), tokenize=False,
        date_string=None if model != "llama3_2" else "26 Jul 2024",
    )  # fmt: skip
    tokenizer = model_with(model)
    found = tokenizer.encode_conversation(**given)
    assert tokenizer.decode(found.ids) == expected
    if model != "llama3_2":  # which writes the day
        assert tokenizer.apply_chat_template(**given) == expected
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                given["messages"], tools=given.get("tools"), tokenize=False, add_generation_prompt=prompt
            )
            ids = tokenizer.encode_chat(given["messages"], prompt, tools=given.get("tools"))
            assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2_5", "qwen3", "gemma3"])
@pytest.mark.parametrize("chat", CHATS)
def test_the_turns_are_those_that_the_training_templates_of_trl_mark(model: str, chat: str) -> None:
    """TRL's template for training marks what is trained. With it, transformers gives a mask."""
    if (model, chat) not in CASES:
        pytest.skip("the template does not write such chats")
    given = json.loads(json.dumps(CHATS[chat]))
    text = template(f"{model}_training")
    theirs = transformers_tokenizer(model, text)
    expected = theirs.apply_chat_template(
        given["messages"], tools=given.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = model_with(model, text)
    found = tokenizer.encode_conversation(**given)
    assert found.ids == expected["input_ids"]
    trained = [bool(mask) for mask in expected["assistant_masks"]]
    # For TRL, the ends of the lines before and after the answer belong to it. But the prompt of a generation
    # has the first already, and the second follows the token that ends a generation.
    lines = [tokenizer.decode([id_]) == "\n" for id_ in found.ids]
    for place in range(1, len(trained)):
        after_end = found.ids[place - 1] in tokenizer.eos_ids
        if lines[place] and (after_end or (model == "qwen2_5" and not trained[place - 1])):
            trained[place] = False
    assert found.is_reply == trained
