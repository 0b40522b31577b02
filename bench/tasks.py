"""Tasks made from data that every machine has, to compare options of fine-tuning by their held-out loss.

- style: words of The Devil's Dictionary, with their definitions.
- instructions: what a function of Python's standard library does, with the first sentence of its docstring.
- classification: the topic of such a function, as text.
- arithmetic: sums and differences of two numbers.
- preferences: words of The Devil's Dictionary; the definition of the next word is the rejected answer.
"""

import importlib
import inspect
import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache

Rows = list[dict[str, str]]

TOPICS = {
    "numbers": "math cmath decimal fractions statistics random numbers",
    "text": "string re textwrap unicodedata codecs difflib locale gettext",
    "files": "shutil pathlib tempfile glob zipfile tarfile fileinput filecmp",
    "time": "datetime calendar time sched zoneinfo",
    "network": "socket ssl http.client ftplib smtplib imaplib urllib.request ipaddress",
    "processes": "threading multiprocessing.pool subprocess concurrent.futures queue asyncio",
    "mail": "email.message email.utils email.header mailbox poplib",
    "programs": "ast dis inspect tokenize pdb traceback types importlib.util",
}
_SENTENCE = re.compile(r".*?[a-z\d)'\"]\.(?=\s|$)", re.DOTALL)


def split(task: str, train: int = 320, held_out: int = 160) -> tuple[Rows, Rows]:
    """Rows to train on, and rows to judge by. The same call gives the same rows."""
    rows = list(TASKS[task]())
    random.Random(task).shuffle(rows)
    if len(rows) < train + held_out:
        raise ValueError(f"{task}: {len(rows)} rows, expected at least {train + held_out}")
    return rows[held_out : held_out + train], rows[:held_out]


def style() -> Iterator[dict[str, str]]:
    import nplora.cli.demo.dictionary as demo

    for name in ("train", "valid"):
        for line in (demo.DATA / f"{name}.jsonl").read_text().splitlines():
            yield json.loads(line)


def instructions() -> Iterator[dict[str, str]]:
    for _, name, sentence in _functions():
        yield {"prompt": f"Question: What does {name} of Python do?\nAnswer:", "completion": f" {sentence}"}


def classification() -> Iterator[dict[str, str]]:
    for topic, name, sentence in _functions():
        text = f"{name.rpartition('.')[2]}: {sentence}"
        yield {"prompt": f"{text}\nTopic:", "completion": f" {topic}"}


def arithmetic() -> Iterator[dict[str, str]]:
    numbers = random.Random(0)
    seen = set[tuple[int, int, str]]()
    while len(seen) < 1000:
        a, b, sign = numbers.randrange(100), numbers.randrange(100), numbers.choice("+-")
        if (a, b, sign) in seen:
            continue
        seen.add((a, b, sign))
        yield {"prompt": f"{a} {sign} {b} =", "completion": f" {a + b if sign == '+' else a - b}"}


def preferences() -> Iterator[dict[str, str]]:
    for one, other in itertools.pairwise(style()):
        yield {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}


TASKS = {
    "style": style,
    "instructions": instructions,
    "classification": classification,
    "arithmetic": arithmetic,
    "preferences": preferences,
}


@cache
def _functions() -> list[tuple[str, str, str]]:
    """(topic, name, first sentence of the docstring) of functions and methods of the standard library."""
    found = dict[str, tuple[str, str, str]]()
    for topic, modules in TOPICS.items():
        for module in modules.split():
            for name, value in _documented(importlib.import_module(module), module):
                sentence = _first_sentence(value)
                if sentence:
                    found.setdefault(sentence, (topic, name, sentence))
    return list(found.values())


def _documented(owner: object, name: str) -> Iterator[tuple[str, object]]:
    for part, value in sorted(vars(owner).items(), key=lambda item: item[0]):
        if part.startswith("_"):
            continue
        home = getattr(value, "__module__", None)
        if inspect.isclass(value) and inspect.ismodule(owner) and home == name:
            yield from _documented(value, f"{name}.{part}")
        elif inspect.isroutine(value):
            yield f"{name}.{part}", value


def _first_sentence(value: object) -> str:
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    match = _SENTENCE.match(paragraph)
    sentence = " ".join(match[0].split()) if match else ""
    return sentence if 20 <= len(sentence) <= 200 and "->" not in sentence else ""
