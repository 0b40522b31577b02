"""Chat templates in Go's language write what the Jinja templates write."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nplora.formats import gguf
from nplora.formats.gguf import Typed
from nplora.tokenizer import Tokenizer, from_gguf, go_template
from nplora.tokenizer.chat_template import ChatTemplate
from nplora.tokenizer.tokenizer import TRAINING_TIME
from vocabularies import byte_level

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
ANSWER = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", 'A "quoted" {{ .word }}\n\nand lines')],
    [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?")],
    [("system", "Add."), ("user", "1+1?"), ("assistant", "2"), ("user", "so?")],
]
# Gives a template from Go what Ollama gives it: the system messages, and all messages.
PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
	var given struct { Template string; Chats [][]Message }
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
	made := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	texts := []string{}
	for _, chat := range given.Chats {
		system := []string{}
		for _, m := range chat { if m.Role == "system" { system = append(system, m.Content) } }
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": chat, "Response": ""}
		if err := made.Execute(&text, values); err != nil { panic(err) }
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def tokenizer(template: str | None, **metadata: Any) -> Tokenizer:
    pytest.importorskip("tokenizers")
    entries = byte_level(eos_token_id=Typed(0, "UINT32"), **metadata)
    made = from_gguf(gguf.loads(gguf.dumps({}, entries)))
    made.chat_template = None if template is None else ChatTemplate(template, "a template")
    return made


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def found(name: str) -> tuple[Tokenizer, go_template.GoTemplate | None]:
    words = tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    return words, go_template.of(words)


KNOWN = ["gemma3", "granite_3", "llama3_2", "phi_4", "qwen2_5", "qwen3", "qwen3_training"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_fixed_texts_are_found(name: str) -> None:
    words, template = found(name)
    assert template is not None
    for chat in map(messages, CHATS):
        assert template.render(chat) == words.apply_chat_template(chat, True, now=TRAINING_TIME)


def assert_go_writes_the_same(words: Tokenizer, template: go_template.GoTemplate, directory: Path) -> None:
    if shutil.which("go") is None:
        pytest.skip("there is no Go")
    (directory / "main.go").write_text(PROGRAM)
    given = {"Template": str(template), "Chats": [messages(chat) for chat in CHATS]}
    line = ["go", "run", directory / "main.go"]
    run = subprocess.run(line, input=json.dumps(given).encode(), capture_output=True, check=True)
    expected = [words.apply_chat_template(messages(chat), True, now=TRAINING_TIME) for chat in CHATS]
    assert json.loads(run.stdout) == expected


@pytest.mark.parametrize("name", KNOWN)
def test_go_writes_the_same_chat(name: str, tmp_path: Path) -> None:
    words, template = found(name)
    assert template is not None
    assert_go_writes_the_same(words, template, tmp_path)


def test_the_system_message_may_stand_inside_the_first_user_message() -> None:
    _, template = found("gemma3")
    assert str(template).startswith('{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}')
    assert "{{ if $.System }}" in str(template)


def test_a_default_system_message_is_kept_and_the_time_is_that_of_training() -> None:
    assert "You are Qwen, created by Alibaba Cloud." in str(found("qwen2_5")[1])
    assert "Today Date: 26 Jul 2024" in str(found("llama3_2")[1])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ messages | length }}",
        "{{ messages[-1].content }}",
        "{{ 1 / 0 }}",
        "{% for",
    ],
)
def test_a_template_that_does_more_is_not_translated(template: str) -> None:
    assert go_template.of(tokenizer(template)) is None


def test_a_model_without_a_template_has_none() -> None:
    assert go_template.of(tokenizer(None)) is None


def test_a_template_that_refuses_system_messages_has_no_place_for_one() -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = go_template.of(tokenizer(refusing))
    assert template is not None
    assert template.system is None
    assert ".System" not in str(template)


@pytest.mark.parametrize("adds", [False, True])
def test_a_bos_that_the_tokenizer_adds_is_left_out(adds: bool) -> None:
    begun = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    words = tokenizer(begun + ANSWER, bos_token_id=Typed(0, "UINT32"), add_bos_token=adds)
    template = go_template.of(words)
    assert template is not None
    assert ("<|end|>" in str(template)) != adds


def test_special_tokens_of_the_template_are_its_stop_words() -> None:
    words = tokenizer("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}" + ANSWER)
    template = go_template.of(words)
    assert template is not None
    assert go_template.special_tokens(words, template) == ["<|end|>"]


BRACES = [("a{", 'a{{ "{" }}'), ("{{{", '{{ "{{{" }}'), ("{a {{ b", '{a {{ "{{" }} b')]


@pytest.mark.parametrize(("text", "written"), BRACES)
def test_a_brace_before_a_message_does_not_join_its_action(text: str, written: str, tmp_path: Path) -> None:
    message = f"<{{{{ m.role + {text!r} + m.content }}}}>"
    words = tokenizer(f"{{% for m in messages %}}{message}{{% endfor %}}{ANSWER}")
    template = go_template.of(words)
    assert template is not None
    assert f"<user{written}{{{{ .Content }}}}>" in str(template)
    assert_go_writes_the_same(words, template, tmp_path)


@pytest.mark.parametrize(
    ("name", "trimmed", "has_tools"),
    [
        ("gemma3", {"user", "assistant"}, False),
        ("llama3_2", {"system", "user", "assistant"}, True),
        ("qwen2_5", set(), True),
        ("phi_4", set(), False),
    ],
)
def test_what_the_translation_lacks_is_found(name: str, trimmed: set[str], has_tools: bool) -> None:
    _, template = found(name)
    assert template is not None
    assert (set(template.trimmed), template.has_tools) == (trimmed, has_tools)
    spaced = [{"role": role, "content": f" {role} "} for role in ("system", "user", "assistant", "user")]
    stripped = [m | {"content": m["content"].strip()} if m["role"] in trimmed else m for m in spaced]
    words = found(name)[0]
    assert template.render(stripped) == words.apply_chat_template(spaced, True, now=TRAINING_TIME)


def test_a_template_that_changes_spaces_in_another_way_is_not_translated() -> None:
    one_end = "{% for m in messages %}<{{ m.role }}>{{ m.content.lstrip() }}{% endfor %}" + ANSWER
    assert go_template.of(tokenizer(one_end)) is None


def test_a_template_that_trims_one_role_says_which() -> None:
    one_role = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content | trim if m.role == 'user' else m.content }}{% endfor %}"
    )
    template = go_template.of(tokenizer(one_role + ANSWER))
    assert template is not None
    assert template.trimmed == ("user",)
