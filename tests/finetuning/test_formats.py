"""Every format of rows on a real model: the trained tokens are those that TRL trains on the same rows."""

import json
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nplora.finetuning import FinetuneOptions
from nplora.finetuning.data import read_dataset
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.objectives import objective_of
from nplora.models.packing import IGNORED
from nplora.tokenizer import Tokenizer, from_directory

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
# How SmolLM2's template writes a message, and the same with marks around what the assistant writes.
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi.\n\nYou?"},
    {"role": "user", "content": "  What is 2+2?\n"},
    {"role": "assistant", "content": "4"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASKED = [
    {"role": "user", "content": "Hot in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "31"},
    {"role": "assistant", "content": "Yes."},
]


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same messages as ShareGPT writes them."""
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    turns = []
    for message in messages:
        speaker, value = names[message["role"]], message["content"]
        if "tool_calls" in message:
            speaker, value = "function_call", json.dumps(message["tool_calls"][0]["function"])
        turns.append({"from": speaker, "value": value})
    return turns


ALPACA = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
ASKED_ALPACA = {"role": "user", "content": "Add the numbers.\n2 and 3"}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
# For each format: our rows, the rows for TRL, and whether they have tools.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": TALK}, {"messages": TALK}),
    "messages, system": ({"messages": [SYSTEM, *TALK]}, {"messages": [SYSTEM, *TALK]}),
    "messages, tools": ({"messages": ASKED, "tools": [TOOL]}, {"messages": ASKED, "tools": [TOOL]}),
    "messages as OpenAI writes them": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hot in "},
                                             {"type": "text", "text": "Rome?"}]},
                {"role": "assistant", "content": None, "name": None, "tool_calls": [
                    {"id": "1", "type": "function",
                     "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
                *ASKED[2:],
            ],
            "tools": [TOOL["function"]],
        },
        {"messages": ASKED, "tools": [TOOL]},
    ),
    "sharegpt": ({"conversations": sharegpt(TALK)}, {"messages": TALK}),
    "sharegpt, system": (
        {"conversations": sharegpt(TALK), "system": "Be brief."}, {"messages": [SYSTEM, *TALK]}
    ),
    "sharegpt, tools": (
        {"conversations": sharegpt(ASKED), "tools": json.dumps([TOOL])}, {"messages": ASKED, "tools": [TOOL]}
    ),
    "alpaca": (ALPACA, {"messages": [ASKED_ALPACA, {"role": "assistant", "content": "5"}]}),
    "alpaca, history": (
        {**ALPACA, "system": "Be brief.", "history": [["Hello there", "Hi."]]},
        {"messages": [SYSTEM, TALK[0], {"role": "assistant", "content": "Hi."}, ASKED_ALPACA,
                      {"role": "assistant", "content": "5"}]},
    ),
    "completion of messages": ({"prompt": TALK[:3], "completion": TALK[3:]},) * 2,
    "completion of messages, tools": ({"prompt": ASKED[:3], "completion": ASKED[3:], "tools": [TOOL]},) * 2,
    "completion": (PAIR, PAIR),
    "text": ({"text": "Once upon a time, 12 = 3 * 4."},) * 2,
}  # fmt: skip

YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No idea."))
PREFERRED = {"prompt": ASKED[:3], "chosen": [YES], "rejected": [NO]}
# The same for comparisons.
COMPARISONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"},) * 2,
    "texts without a prompt": ({"chosen": "2 + 2 = 4", "rejected": "2 + 2 = five"},) * 2,
    "messages": ({"prompt": TALK[:3], "chosen": TALK[3:], "rejected": [NO]},) * 2,
    "messages, tools": ({**PREFERRED, "tools": [TOOL]},) * 2,
    "whole chats": ({"chosen": TALK, "rejected": [*TALK[:3], NO]},) * 2,
    "as OpenAI writes them": (
        {"input": {"messages": ASKED[:3], "tools": [TOOL]}, "preferred_output": [YES],
         "non_preferred_output": [NO]},
        {**PREFERRED, "tools": [TOOL]},
    ),
    "sharegpt": (
        {"conversations": sharegpt(ASKED[:3]), "chosen": sharegpt([YES])[0], "rejected": sharegpt([NO])[0],
         "tools": json.dumps([TOOL])},
        {**PREFERRED, "tools": [TOOL]},
    ),
    "alpaca": (
        {"instruction": "Add the numbers.", "input": "2 and 3", "system": "Be brief.", "chosen": "Yes.",
         "rejected": "No idea."},
        {"prompt": [SYSTEM, ASKED_ALPACA], "chosen": [YES], "rejected": [NO]},
    ),
    "judged texts": ({**PAIR, "label": False},) * 2,
    "judged messages": ({"prompt": TALK[:3], "completion": TALK[3:], "label": True},) * 2,
    "judged chat": (
        {"messages": ASKED, "tools": [TOOL], "label": False},
        {"prompt": ASKED[:3], "completion": ASKED[3:], "tools": [TOOL], "label": False},
    ),
    "judged sharegpt": (
        {"conversations": sharegpt(TALK), "system": "Be brief.", "label": True},
        {"prompt": [SYSTEM, *TALK[:3]], "completion": TALK[3:], "label": True},
    ),
    "judged alpaca": (
        {**ALPACA, "label": True},
        {"prompt": [ASKED_ALPACA], "completion": [{"role": "assistant", "content": "5"}], "label": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module", params=["smollm2", "qwen2_5"])
def model(request: pytest.FixtureRequest, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our tokenizer with a template, the template, and that with marks for TRL. Qwen's writes tools."""
    if request.param == "smollm2":
        template = theirs.chat_template
        assert MESSAGE in template
        marked = template.replace(MESSAGE, MARKED)
    else:
        template, marked = ((TEMPLATES / f"qwen2_5{end}.jinja").read_text() for end in ("", "_training"))
    directory = tmp_path_factory.mktemp("tokenizer")
    own = theirs.chat_template
    theirs.chat_template = template
    theirs.save_pretrained(directory)
    theirs.chat_template = own
    return from_directory(directory), template, marked


def dataset_of(row: dict[str, Any]) -> Any:
    """A row for TRL."""
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([row], **({"on_mixed_types": "use_json"} if "tools" in row else {}))


def trained_by_trl(theirs: Any, template: str, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """The tokens and the trained tokens that `SFTTrainer` prepares from a row."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    rows = dataset_of(row)
    is_chat = isinstance(row.get("prompt", row.get("messages")), list)
    settings = types.SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=is_chat,
        max_length=None,
        shuffle_dataset=False,
    )
    trainer = types.SimpleNamespace(
        _tokenizer=theirs, chat_template=template, completion_only_loss=True, assistant_only_loss=is_chat
    )
    prepared = sft_trainer.SFTTrainer._prepare_dataset(trainer, rows, theirs, settings, False, None, "train")[
        0
    ]
    return list(prepared["input_ids"]), [label != IGNORED for label in prepared["labels"]]


def without_line_ends(words: Tokenizer, ids: list[int], trained: list[bool]) -> list[bool]:
    """TRL's template of Qwen marks the ends of the lines before and after the answer, too.

    But a prompt of `generate` has the first already, and the second follows the token that ends the answer.
    """
    found = list(trained)
    for place in range(1, len(ids)):
        is_line = words.decode([ids[place]]) == "\n"
        if is_line and found[place] and (not trained[place - 1] or ids[place - 1] in words.eos_ids):
            found[place] = False
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_the_trained_tokens_of_every_format_are_those_of_trl(name: str, model: Any, theirs: Any) -> None:
    words, _, template = model
    ours, row = ROWS[name]
    if "tools" in row and "tool_call" not in template:
        pytest.skip("the template has no tools")
    [(ids, labels)] = read_dataset([ours], words)
    expected, trained = trained_by_trl(theirs, template, row)
    assert ids.tolist() == expected
    trained = without_line_ends(words, expected, trained)
    assert words.decode(labels[labels != IGNORED]) == words.decode(np.array(expected)[trained])
    assert (labels != IGNORED).tolist() == trained


def compared_by_trl(theirs: Any, template: str, row: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    """The tokens and the trained tokens of each answer that `DPOTrainer` or `KTOTrainer` prepares."""
    made = pytest.importorskip("trl").KTOTrainer if "label" in row else pytest.importorskip("trl").DPOTrainer
    own, theirs.chat_template = theirs.chat_template, template
    try:
        [prepared] = made._prepare_dataset(
            types.SimpleNamespace(_tokenizer=theirs, calculate_KL=False),
            dataset_of(row),
            theirs,
            types.SimpleNamespace(dataset_num_proc=None, max_length=None),
            "train",
        )
    finally:
        theirs.chat_template = own
    prompt = list(prepared["prompt_ids"])
    answers = [list(prepared[f"{name}_ids"]) for name in ("chosen", "rejected", "completion")
               if f"{name}_ids" in prepared]  # fmt: skip
    return [(prompt + ids, [False] * len(prompt) + [True] * len(ids)) for ids in answers]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPARISONS)
def test_the_trained_tokens_of_every_comparison_are_those_of_trl(name: str, model: Any, theirs: Any) -> None:
    words, template, _ = model
    ours, row = COMPARISONS[name]
    if "tools" in row and "tool_call" not in template:
        pytest.skip("the template has no tools")
    options = FinetuneOptions(objective="dpo")
    if "label" in row:  # a KL divergence needs several prompts
        options = FinetuneOptions(objective="kto", loss_type="apo_zero_unpaired")
    objective = objective_of(options)
    [found] = objective.read("finetune", sources_of("finetune", [ours]), words, options.reading(None))
    if "label" in row:
        assert found[2] is row["label"]
        found = [found[:2]]
    expected = compared_by_trl(theirs, template, row)
    assert len(found) == len(expected)
    for (ids, labels), (their_ids, trained) in zip(found, expected, strict=True):
        assert ids.tolist() == their_ids
        assert (labels != IGNORED).tolist() == without_line_ends(words, their_ids, trained)
