"""Chat templates: rendering compared with transformers, and the limits for untrusted templates."""

import contextlib
import datetime
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import systems
from hostile import MOST_BYTES, MOST_SECONDS, refused
from nplora.formats.errors import FormatError, LimitError, UnsafeError
from nplora.platform import limits
from nplora.tokenizer import chat_template
from nplora.tokenizer.chat_template import MAX_TEMPLATE, ChatTemplate

pytest.importorskip("jinja2")

CHAT = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": "Hi <b> & 'quotes' \"ü\" 😀"},
    {"role": "assistant", "content": "<think>hm</think>Hello"},
    {"role": "user", "content": "Add 2 and 2", "extra": {"tools": [1, 2.5, None, True]}},
]

# Each template uses features that the model families' templates use.
TEMPLATES = {
    "chatml": """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']
 + '<|im_end|>' + '\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama 2": """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}{% for message in rest -%}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif -%}
    {% if loop.first and system is defined %}[SYS]{{ system }}[/SYS]{% endif -%}
    {{ message.content.strip() ~ ' ' ~ loop.index }}{% if not loop.last %}|{% endif %}
{%- endfor %}{{ eos_token }}""",
    "qwen 3": """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + content.rstrip() + '<|im_end|>\n' }}
{%- endfor %}{{ ns.last }}""",
    "tools": """{% macro show(value, depth=1) %}{{ value | tojson(indent=depth) }}{% endmacro -%}
{% for m in messages if m.extra is defined %}{{ show(m.extra, 2) }}{{ m.extra.tools | tojson }}
{%- for key, value in m.extra.items() %}{{ key }}={{ value | length }}{% endfor %}{% endfor -%}
{{ messages | map(attribute='role') | unique | join(', ') | upper }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ [1, 2] + [3] }}
{{ 'a,b'.split(',') }} {{ dict(a=1) | items | list }} {{ '%s-%03d' % ('x', 7) }}
{{ 'ab' * 3 }} {{ -7 // 2 }} {{ 2 ** 10 }} {{ 7 % 4 }}""",
    "loops": """{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}
{% if i > 4 %}{% break %}{% endif %}
{{ i }}{% endfor %}{% generation %}said{% endgeneration %}
{%- filter upper %}loud{% endfilter %}{% set block %}a{{ 1 }}b{% endset %}{{ block }}
{%- for a, b in [(1, 2), (3, 4)] %}{{ a }}:{{ b }} {% else %}none{% endfor %}{{ undefined_name }}|
{{- 'yes' if none is none else 'no' }}{{ messages[-1]['content'][0:3] }}{{ {'k': 'v'}['k'] }}""",
}


def transformers_render(template: str, prompt: bool) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_renders_as_in_transformers(name: str, prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], "model")
    expected = transformers_render(TEMPLATES[name], prompt)
    assert template.render(CHAT, prompt, bos_token="<s>", eos_token="</s>") == expected


def render(template: str, messages: Any = (), **variables: Any) -> str:
    return ChatTemplate(template, "model").render(list(messages), **variables)


def test_the_template_gets_the_time() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    then = datetime.datetime(2024, 7, 26, 3, 4, 5)
    assert render("{{ strftime_now('%d %b %Y %X') }}", now=then) == "26 Jul 2024 03:04:05"


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(
        ValueError, match="model: the chat template refuses the messages: roles must alternate"
    ):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="fails with these messages: UndefinedError: 'nothing' is undefined"):
        render("{{ nothing.at_all }}")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    hint = r" \(content is a list: the template may expect a string\)$"
    with pytest.raises(
        ValueError, match=f"with these messages: TypeError: can only concatenate str .*{hint}"
    ):
        render("{{ 'user: ' + messages[0].content }}", parts)
    with pytest.raises(ValueError, match=f"with these messages: UndefinedError: 'tools' is undefined{hint}"):
        render("{{ tools[0] }}", parts)
    assert render("{{ messages[0].content[0].text }}", parts) == "a"
    with pytest.raises(TypeError, match="a message of a chat holds a set"):
        render("", [{"role": "user", "content": {1}}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is not valid Jinja in line 1"),
        ("\n{{ x", "is not valid Jinja in line 2"),
        ("{{ [1] | random }}", "No filter named 'random'"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "is not valid Jinja"),
    ],
)
def test_an_invalid_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        render(template)


def test_a_huge_template_is_refused() -> None:
    with pytest.raises(LimitError, match="300,000 characters, expected at most 65,536"):
        render("x" * 300_000)


DOUBLING = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = OF %}{% endfor %}{{ n.x }}"
)
NESTING = "{% set n = namespace(x=[0]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
SHARED = (
    "{% set n = namespace(x=[1], y=[1], t=(1,)) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)

ENDLESS = {
    "a loop": "{% for i in range(1000000000) %}x{% endfor %}",
    "the longest text": "{{ 'a' * 10 ** 19 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over one list": "{% set x = range(999) %}{% for i in x %}{% for j in x %}{% for k in x %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a block": "{% set n = namespace(y=[]) %}{% for i in range(10) %}{% set b %}{% for j in range(3000) %}"
    + "b" * 10_000
    + "{% endfor %}{% endset %}{% set n.y = [n.y, b] %}{% endfor %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a tree of calls": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a long text": "{{ 'a' * 1000000000 }}",
    "a long list": "{{ [1] * 1000000000 }}",
    "a large number": "{{ 10 ** 10000000 }}",
    "a larger number": DOUBLING.replace("'aaaaaaaa'", "9").replace("OF", "n.x * n.x"),
    "doubling by ~": DOUBLING.replace("OF", "n.x ~ n.x"),
    "doubling by +": DOUBLING.replace("OF", "n.x + n.x"),
    "doubling by join": DOUBLING.replace("OF", "[n.x, n.x] | join"),
    "doubling by a filter block": DOUBLING.replace(
        "{% set n.x = OF %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    ),
    "replace": "{{ ('a' * 99999) | replace('a', 'a' * 9999) }}",
    "replace of nothing": "{{ ('a' * 99999).replace('', 'a' * 9999) }}",
    "join": "{{ (('b' * 9999) | list) | join('a' * 99999) }}",
    "the method join": "{{ ('a' * 99999).join(('b' * 9999) | list) }}",
    "split": "{{ (messages[0].content * 20).split() }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format's argument": "{{ '%*d' % (1000000000, 1) }}",
    "the filter format": "{{ '%999999999s' | format(1) }}",
    "the method format": "{{ '{:>1000000000}'.format(1) }}",
    "a format by name": "{{ ('%(a)999d' * 20000) % {'a': 1} }}",
    "a format of a large text": "{{ ('%(a)s' * 5000) % {'a': messages[0].content} }}",
    "the filter format by name": "{{ ('%(a)999d' * 20000) | format(a=1) }}",
    "shared lists by the filter string": NESTING + "{{ (n.x | string) | length }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "indent": "{{ 'a' | indent(1000000000, true) }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "shared lists as text": NESTING + "{{ n.x }}",
    "shared lists in a text": NESTING + "{{ 'x' ~ n.x }}",
    "shared lists as JSON": NESTING + "{{ n.x | tojson }}",
    "shared lists refused": NESTING + "{{ raise_exception(n.x) }}",
    "slices": "{% set x = range(5000) | list %}{% set n = namespace(y=[]) %}"
    "{% for i in range(19999) %}{% set n.y = [x[0:], n.y] %}{% endfor %}",
    "literals": "{% set n = namespace(y=[]) %}{% for i in range(99999) %}"
    "{% set n.y = [n.y, " + "[]," * 500 + "] %}{% endfor %}",
    "comparisons": "{% for i in range(99999) %}{% set x = 0" + "==0" * 2700 + " %}{% endfor %}",
    "a deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "shared lists that change": SHARED + "{% for x in [n.x, n.y] %}{{ loop.changed(x) }}{% endfor %}",
    "shared lists in a message": SHARED + "{{ {}[n.x].a }}",
    "shared tuples as keys": SHARED + "{{ {n.t: 1} }}",
    "shared tuples sought": SHARED + "{{ {}[n.t] }}",
    "shared tuples as a filter": SHARED + "{{ [1] | map(n.t) | list }}",
    "a deep tuple": "{% set n = namespace(t=()) %}{% for i in range(30000) %}"
    "{% set n.t = ((((((((((n.t,),),),),),),),),),) %}{% endfor %}{{ {n.t: 1} }}",
    "attributes": "{% set n = namespace() %}{% set n.n = n %}{% for i in range(20000) %}"
    "{% set y = n" + ".n" * 80 + " %}{% endfor %}",
    "a filter's attribute": "{{ ('a' * 20000) | map(attribute='0.' * 20000 ~ '0') | list }}",
    "named operands of join": "{{ (('b' * 9999) | list) | join(d='a' * 99999) }}",
    "named operands of replace": "{{ ('a' * 9999) | replace(old='a', new='b' * 99999) }}",
    "indent by a text": "{{ ('\\n' * 9999) | indent('b' * 99999, blank=true) }}",
    "json by a text": "{{ ([1] * 9999) | tojson(indent='b' * 99999) }}",
    "join of a generator": "{{ ('a' * 99999).join(('b' * 9999) | select) }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 500000 ~ 'a') }}",
    "title": "{{ ('ab ' * 900000) | title }}",
    "sort": "{{ (range(99999) | list * 9) | sort(attribute='real') | list }}",
}


STOPPED_BY_TIME = {
    "loops",
    "loops over one list",
    "a tree of calls",
    "a large number",
    "a larger number",
    "round",
    "comparisons",
    "shared lists that change",
    "shared tuples as keys",
    "shared tuples sought",
    "shared tuples as a filter",
    "attributes",
    "a filter's attribute",
    "strip",
}


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """The body takes limited CPU time, here and in the rendering process, and little memory here."""

    def used() -> float:
        chat_template._PROCESS.stop()
        times = os.times()
        return times.children_user + times.children_system + time.process_time()

    start = used()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used() - start < seconds
    assert peak < MOST_BYTES


def limit_the_sum_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """For systems where the parent limits the sum of all times: allow little but rendering."""
    render("{{ 1 }}")
    monkeypatch.setattr(limits, "_IDLE", (limits._IDLE[0], 0.0))
    monkeypatch.setattr(chat_template, "_COMPILING", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most with a fifth of the usual limit."""
    if systems.IS_WINE and name in STOPPED_BY_TIME:
        pytest.skip("Wine takes this process's processor time for that of any other")
    if systems.IS_WINE and name == "a deep tuple":
        pytest.skip("Wine does not report that a stack is too deep")
    if name != "a loop":
        monkeypatch.setattr(chat_template, "_RENDERING", 0.1)
    long = name in ("split", "a format of a large text")
    chat = [{"role": "user", "content": "ab " * 100_000 if long else "Hi"}]
    passed = r"takes more than 0\.[15] s of CPU time|takes too much memory"
    reasons = rf"({passed}|is nested too deeply|asks for too much: .*)$"
    with bounded(MOST_SECONDS):
        if not limits.LIMITS_TIME:
            limit_the_sum_of_times(monkeypatch)
        with pytest.raises(UnsafeError, match=f"model: the chat template {reasons}"):
            render(ENDLESS[name], chat)


def filled(unit: str) -> str:
    """The longest template made of copies of a text."""
    return unit * (MAX_TEMPLATE // len(unit))


def names(count: int) -> str:
    return ",".join(f"a{i}" for i in range(count))


SLOW_TO_COMPILE = {
    "signs": filled("{{ " + "+" * 190 + "messages }}"),
    "filters": filled("{{ messages" + "|e" * 80 + " }}"),
    "unknown filters": filled(
        "{% if 0 %}" * 8 + "{{ x|" + "|".join(f"aa{i}" for i in range(170)) + " }}" + "{% endif %}" * 8
    ),
    "loops": "{% for a in b %}" * 150 + "{{ a.b.c }}" * 4000 + "{% endfor %}" * 150,
    "names in branches": f"{{% set {names(1400)} = 0 %}}{{% if a %}}" + "{% elif a %}" * 900 + "{% endif %}",
    "names in choices": f"{{% set {names(3000)} = 0 %}}{{{{ [" + "0 if 0," * 3600 + "] }}",
    "names in templates": f"{{% set {names(900)} = 0 %}}" + "{% include 'x' %}" * 900,
    "an expression": "{{ " + "1 + " * 16_000 + "1 }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TO_COMPILE)
def test_compiling_is_limited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fourth of the usual limit, which the next test reaches."""
    assert len(SLOW_TO_COMPILE[name]) <= MAX_TEMPLATE
    monkeypatch.setattr(chat_template, "_COMPILING", 0.5)
    with bounded(2.5), contextlib.suppress(ValueError):
        render(SLOW_TO_COMPILE[name])


@pytest.mark.slow
@pytest.mark.skipif(not limits.LIMITS_TIME, reason="this system limits only the sum of all times")
def test_a_template_that_takes_long_to_compile_is_stopped() -> None:
    with pytest.raises(UnsafeError, match=r"model: the chat template takes more than 2\.0 s .* to compile"):
        render(SLOW_TO_COMPILE["loops"])


def test_a_long_chat_is_not_taken_for_an_endless_one() -> None:
    chat = [{"role": ("user", "assistant")[n % 2], "content": "word " * 500} for n in range(600)]
    for name in ("chatml", "qwen 3"):
        assert len(render(TEMPLATES[name], chat)) > 600 * 2500


def test_a_chat_of_many_short_messages_is_not_taken_for_an_endless_one() -> None:
    chat = [{"role": ("user", "assistant")[n % 2], "content": "hi"} for n in range(2000)]
    assert len(render(TEMPLATES["qwen 3"], chat)) > 2000 * len("<|im_start|>user")
    every = "{% for m in messages %}{{ messages|length }}{{ messages|count }}{{ (messages|first).role }}"
    every += "{{ (messages|last).role }}{% if messages is iterable %},{% endif %}{% endfor %}"
    assert render(every, chat) == "20002000userassistant," * 2000


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ self.__init__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{{ dict.fromkeys([1]) }}",
        "{{ joiner.__call__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    with refused(UnsafeError, "the chat template is not safe: it tries to access", "model: "):
        render(template, CHAT)


def test_the_method_format_is_unreachable() -> None:
    from nplora.tokenizer import renderer

    for name in ("format", "format_map"):
        assert not renderer.Environment().is_safe_attribute("", name, getattr("", name))


@pytest.mark.parametrize("template", ["{% include 'x' %}", "{% import 'x' as x %}", "{% extends 'x' %}"])
def test_a_template_cannot_read_another(template: str) -> None:
    with refused(UnsafeError, "the chat template is not safe: it tries to load another template", "model: "):
        render(template)


def test_threads_render_one_template_at_the_same_time() -> None:
    template = ChatTemplate(TEMPLATES["chatml"], "model")
    expected = template.render(CHAT)
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.extend(template.render(CHAT) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 200


# ---- the process ----


def wait_until(done: Callable[[], bool]) -> None:
    last = time.monotonic() + 10
    while not done():
        assert time.monotonic() < last
        time.sleep(0.001)


def process() -> subprocess.Popen[bytes]:
    child = chat_template._PROCESS._child
    assert child is not None
    return child.process


def test_one_process_renders_all_templates() -> None:
    assert render("{{ 1 }}") == "1"
    first = process()
    assert render("{{ 2 }}") == "2"
    with pytest.raises(UnsafeError):
        render("{{ ''.__class__ }}")
    assert process() is first


@pytest.mark.slow
def test_a_template_renders_after_its_process_has_ended() -> None:
    assert render("{{ 1 }}") == "1"
    first = process()
    first.kill()
    first.wait()
    assert render("{{ 2 }}") == "2"
    with pytest.raises(UnsafeError):
        render(ENDLESS["a tree of calls"])
    assert render("{{ 3 }}") == "3"


def test_a_broken_program_is_not_the_templates_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chat_template._PROCESS.stop()
    (tmp_path / "program.py").write_text("import nothing_of_this_name")
    monkeypatch.setattr("nplora.tokenizer.render_process._PROGRAM", tmp_path / "program.py")
    with pytest.raises(
        RuntimeError, match=r"model: .* ended with 1: ModuleNotFoundError: .*nothing_of_this_name"
    ):
        render("{{ 1 }}")
    chat_template._PROCESS.stop()
    monkeypatch.setattr("nplora.tokenizer.render_process._PROGRAM", tmp_path / "none.py")
    with pytest.raises(OSError, match=r"cannot run .*none\.py"):
        render("{{ 1 }}")


def test_memory_that_templates_leave_behind_does_not_add_up() -> None:
    import resource

    ring = "{% set n = namespace() %}{% set n.n = n %}{% set n.x = 'a' * 20000000 %}x"
    for _ in range(12):
        assert render(ring) == "x"
    pages = int(Path(f"/proc/{process().pid}/statm").read_text(encoding="utf-8").split()[0])
    assert pages * resource.getpagesize() < 100 << 20


def test_warnings_of_python_do_not_block_a_template() -> None:
    assert render("{% if 0 %}" + "{{1[:]}}" * 2000 + "{% endif %}ok") == "ok"


def test_a_large_answer_does_not_affect_the_next_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MEMORY", 10 << 20)
    chat = [{"role": "user", "content": "a" * 3_000_000}]
    assert len(render("{{ messages[0].content * 12 }}", chat)) == 36_000_000
    first = process()
    assert render("{{ ('a' * 5000000) | length }}") == "5000000"
    assert process() is first


def test_messages_that_cannot_be_passed_to_a_template_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="is nested too deeply"):
        chat_template.plain(deep)
    for value in (deep, 10**5000):
        with pytest.raises(ValueError, match="model: the messages cannot be passed to a template"):
            render("{{ 1 }}", [{"role": "user", "content": value}])


def test_entries_of_sys_path_that_are_not_text_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template._PROCESS.stop()
    monkeypatch.setattr(sys, "path", [*sys.path, None, "a\0b", Path("/")])
    assert render("{{ 1 }}") == "1"


@pytest.mark.parametrize("executable", ["", "/no/python"])
def test_a_python_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    chat_template._PROCESS.stop()
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(OSError, match=executable or "sys.executable '' cannot run"):
        render("{{ 1 }}")


def test_a_missing_jinja2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template._PROCESS.stop()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r'package jinja2: pip install "nplora\[llm\]"'):
        render("{{ 1 }}")


def test_an_interrupted_rendering_does_not_affect_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    assert render("{{ 1 }}") == "1"
    first = process()

    def interrupt_the_rendering() -> None:
        wait_until(chat_template._PROCESS._lock.locked)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=interrupt_the_rendering)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            render(ENDLESS["a tree of calls"])
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    assert first.returncode == -signal.SIGKILL
    assert render("{{ 2 }}") == "2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGPROF", "SIGVTALRM"])
def test_signals_that_are_blocked_here_still_end_the_process(name: str) -> None:
    chat_template._PROCESS.stop()
    number = getattr(signal, name)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    before = signal.signal(number, signal.SIG_IGN)
    try:
        template = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
        with pytest.raises(UnsafeError, match="takes more than"):
            render(template if number == signal.SIGPROF else SLOW_TO_COMPILE["loops"])
    finally:
        signal.signal(number, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_starts_its_own_rendering_process(busy: bool) -> None:
    def render_for_long() -> None:
        with pytest.raises(UnsafeError, match="CPU time"):
            render(ENDLESS["a tree of calls"])

    assert render("{{ 1 }}") == "1"
    first = process().pid
    thread = threading.Thread(target=render_for_long)
    if busy:
        thread.start()
        wait_until(chat_template._PROCESS._lock.locked)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                os._exit(render("{{ 2 }}") != "2" or process().pid == first or bool(shown))
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    if busy:
        thread.join()
    assert render("{{ 3 }}") == "3"
    assert busy or process().pid == first


@pytest.mark.slow
@systems.needs_signals
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_process_ends_with_its_parent(end: str) -> None:
    script = (
        "import os, signal\nfrom nplora.tokenizer.chat_template import _PROCESS, ChatTemplate\n"
        f"ChatTemplate('', '').render([])\nprint(_PROCESS._child.process.pid, flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True)
    assert done.returncode == (-signal.SIGKILL if end else 0)
    assert done.stderr == b""
    last = time.monotonic() + 5
    while Path(f"/proc/{int(done.stdout)}/cmdline").is_file() and time.monotonic() < last:
        if not Path(f"/proc/{int(done.stdout)}/cmdline").read_bytes():  # a zombie that no parent collects
            break
        time.sleep(0.01)
    assert time.monotonic() < last


@pytest.mark.slow
@pytest.mark.skipif(systems.IS_WINE, reason="Wine takes this process's processor time for that of any other")
def test_limits_grow_with_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_RENDERING", 0.001)
    chat = [{"role": "user", "content": "ab " * 33_000}]
    with pytest.raises(UnsafeError, match=r"takes more than 1\.0 s"):
        render(ENDLESS["a tree of calls"], chat)
    if not limits.LIMITS_MEMORY:  # the parent's limit leaves room for what the process needs to start
        return
    monkeypatch.setattr(chat_template, "_MEMORY", 8 << 20)
    copies = "{{ [messages[0].content * 200] | length }}"
    assert render(copies, chat * 4) == "1"
    with pytest.raises(UnsafeError, match="takes too much memory"):
        render(copies, chat)


def test_a_template_can_be_pickled() -> None:
    template = ChatTemplate("{{ messages[0].a }}", "model")
    assert template.render([{"a": 1}]) == "1"
    assert pickle.loads(pickle.dumps(template)).render([{"a": 2}]) == "2"
