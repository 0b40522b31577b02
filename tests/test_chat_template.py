"""Chat templates: what transformers renders, and what templates that nobody vouches for may not do."""

import sys
import threading
import time
import tracemalloc
from typing import Any

import pytest

from hostile import MOST_BYTES, MOST_SECONDS, refused
from nplora.formats.errors import FormatError, LimitError, UnsafeError
from nplora.tokenizer import ExhaustedError
from nplora.tokenizer.chat_template import ChatTemplate
from nplora.tokenizer.sandbox import MAX_TEMPLATE

pytest.importorskip("jinja2")

CHAT = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": "Hi <b> & 'quotes' \"ü\" 😀"},
    {"role": "assistant", "content": "<think>hm</think>Hello"},
    {"role": "user", "content": "Add 2 and 2", "extra": {"tools": [1, 2.5, None, True]}},
]

# Each uses what the templates of the model families use.
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


def test_the_time_is_told() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


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
        ("{% for %}", "is not Jinja, in line 1"),
        ("\n{{ x", "is not Jinja, in line 2"),
        ("{{ 1 | center(3) }}", "No filter named 'center'"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "is not Jinja"),
    ],
)
def test_what_is_not_a_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        render(template)


def test_a_huge_template_is_refused() -> None:
    with pytest.raises(LimitError, match="300,000 characters, at most 65,536"):
        render("x" * 300_000)


DOUBLING = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = OF %}{% endfor %}{{ n.x }}"
)
NESTING = "{% set n = namespace(x=[0]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"

ENDLESS = {
    "a loop": "{% for i in range(1000000000) %}x{% endfor %}",
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
    "shared lists compared": NESTING + "{% if n.x == [n.x] %}{% endif %}",
    "shared lists sought": NESTING + "{% if 1 in n.x %}{% endif %}",
    "shared lists refused": NESTING + "{{ raise_exception(n.x) }}",
    "shared lists counted": NESTING + "{{ [n.x, 1].count([n.x]) }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.n = [n, n] %}{{ n }}",
    "slices": "{% set x = range(5000) | list %}{% set n = namespace(y=[]) %}"
    "{% for i in range(19999) %}{% set n.y = [x[0:], n.y] %}{% endfor %}",
    "literals": "{% set n = namespace(y=[]) %}{% for i in range(99999) %}"
    "{% set n.y = [n.y, " + "[]," * 500 + "] %}{% endfor %}",
    "comparisons": "{% for i in range(99999) %}{% set x = 0" + "==0" * 900 + " %}{% endfor %}",
    "a deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "the time": "{{ strftime_now('%999999999d') }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str) -> None:
    long = name in ("split", "a format of a large text")
    chat = [{"role": "user", "content": "ab " * 100_000 if long else "Hi"}]
    start = time.process_time()
    with pytest.raises(UnsafeError, match="model: the chat template"):
        render(ENDLESS[name], chat)
    assert time.process_time() - start < MOST_SECONDS  # up to 0.2 s
    tracemalloc.start()
    with pytest.raises(UnsafeError):
        render(ENDLESS[name], chat)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


def filled(unit: str) -> str:
    """The longest template of copies of it."""
    return unit * (MAX_TEMPLATE // len(unit))


def names(count: int) -> str:
    return ",".join(f"a{i}" for i in range(count))


SLOW_TO_COMPILE = {
    "signs": (filled("{{ " + "+" * 190 + "messages }}"), "takes more than"),
    "filters": (filled("{{ messages" + "|e" * 80 + " }}"), "takes more than"),
    "attributes": (("{{ true" + ".a" * 80 + " }}") * 45, "has no attribute 'a'"),
    "loops": ("{% for a in b %}" * 150 + "{{ a.b.c }}" * 4000 + "{% endfor %}" * 150, "takes more than"),
    "names in branches": (
        f"{{% set {names(1400)} = 0 %}}{{% if a %}}" + "{% elif a %}" * 900 + "{% endif %}",
        "takes more than",
    ),
    "names of attributes": (
        "{% if 0 %}{% set "
        + ",".join(f"a{i}.b" for i in range(3000))
        + " = 0 %}{% endif %}{% if a %}"
        + "{% elif a %}" * 1000
        + "{% endif %}",
        "takes more than",
    ),
    "names in choices": (
        f"{{% set {names(3000)} = 0 %}}{{{{ [" + "0 if 0," * 3600 + "] }}",
        "takes more than",
    ),
    "names in templates": (
        f"{{% set {names(900)} = 0 %}}" + "{% include 'x' %}" * 900,
        "reaches for another template",
    ),
    "names in blocks": (
        f"{{% for {names(900)} in b %}}{{% block b scoped %}}{{% endblock %}}{{% endfor %}}",
        "has a scoped block",
    ),
}


@pytest.mark.parametrize("name", SLOW_TO_COMPILE)
def test_what_takes_long_to_compile_is_stopped(name: str) -> None:
    template, outcome = SLOW_TO_COMPILE[name]
    assert len(template) <= MAX_TEMPLATE
    start = time.process_time()
    with pytest.raises(ValueError, match=outcome) as told:
        render(template)
    assert time.process_time() - start < MOST_SECONDS  # up to 0.3 s
    assert not isinstance(told.value, ExhaustedError), "as if another chat could help"


def test_the_end_does_not_depend_on_the_clock() -> None:
    lengths = [0, 0]
    for run in range(2):
        low, high = 0, 99999
        while high - low > 1:
            middle = (low + high) // 2
            loop = f"{{% for i in range({middle}) %}}{{% set x = i %}}{{% endfor %}}"
            try:
                render(loop)
                low = middle
            except UnsafeError:
                high = middle
        lengths[run] = low
    assert lengths[0] == lengths[1] > 10_000


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


def test_an_exhausted_allowance_tells_that_another_chat_may_do() -> None:
    with pytest.raises(ExhaustedError):
        render(ENDLESS["loops"])
    with pytest.raises(UnsafeError) as caught:
        render("{{ ''.__class__ }}")
    assert caught.type is UnsafeError


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
        "{{ ''.format_map({}) }}",
        "{{ joiner.__call__ }}",
    ],
)
def test_what_lies_outside_the_sandbox_is_out_of_reach(template: str) -> None:
    with refused(UnsafeError, "the chat template is not safe: it reaches for", "model: "):
        render(template, CHAT)


@pytest.mark.parametrize("template", ["{% include 'x' %}", "{% import 'x' as x %}", "{% extends 'x' %}"])
def test_a_template_reads_no_other(template: str) -> None:
    with refused(UnsafeError, "the chat template is not safe: it reaches for another template", "model: "):
        render(template)


def test_messages_stay_as_they_are() -> None:
    chat = [{"role": "user", "content": ["a"]}]
    with pytest.raises(UnsafeError):
        render("{{ messages[0].content.append('b') }}", chat)
    assert chat == [{"role": "user", "content": ["a"]}]


def test_a_debugger_is_left_in_place() -> None:
    def trace(*arguments: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        render("{{ 1 }}")
        with pytest.raises(UnsafeError):
            render(ENDLESS["loops"])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


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
