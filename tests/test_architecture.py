"""The rules between rooms: the imports and #includes that each room may have."""

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "nplora"

# A room may import only rooms that come before it here. A new module needs a place here too.
PYTHON_ROOMS = [
    "platform",
    "_core",
    "_check",
    "runtime",
    "distributed",
    "formats",
    "weights",
    "lora",
    "nn",
    "tokenizer",
    "models",
    "adapters",
    "lm",
    "trainer",
    "finetuning",
    "sklearn",
    "serving",
    "cli",
    "__init__",
    "__main__",
]
# Short names of modules that are in a room. Nothing in the package imports them.
ALIASES = {"data", "embedding", "generate", "losses", "optim", "plot"}
STRANGERS = [("trainer", "models"), ("trainer", "lm"), ("formats", "_core")]  # neither imports the other

# The packages that a room may import, only inside functions, besides the standard library and NumPy: extras.
OPTIONAL_PACKAGES = {
    "runtime": {"threadpoolctl"},
    "distributed": {"mpi4py"},
    "tokenizer": {"jinja2", "tokenizers"},
    "trainer": {"matplotlib", "mlflow", "tensorboardX", "tqdm", "wandb"},
    "finetuning": {"lm_eval", "matplotlib", "optuna", "pyarrow"},
    "serving": {"llguidance", "python_multipart", "starlette", "uvicorn"},
    "sklearn": {"sklearn"},
    "cli": {"sklearn"},
}

# These need an extra as soon as they are imported, and no other module imports them: the first runs in a
# separate process, and the second derives a class from one of the extra.
PROGRAMS = {"renderer.py", "harness.py"}

# Every module of this room derives its classes from those of an extra, and no other room imports it.
ROOM_OF_AN_EXTRA = "sklearn"

CSRC_ROOMS = ["base", "simd", "kernels", "ops", "bindings"]
INTRINSICS = {"immintrin.h", "xmmintrin.h", "emmintrin.h", "x86intrin.h", "cpuid.h", "arm_neon.h"}
THREADS = {"thread", "mutex", "condition_variable", "future", "pthread.h", "omp.h"}


# ---- Python ----


@functools.cache
def python_files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if room_of(file) not in ALIASES]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(node: ast.Import | ast.ImportFrom, file: Path) -> Iterator[str]:
    """The absolute dotted names in an import statement."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    module = node.module or ""
    if node.level:
        parts = ("nplora", *file.relative_to(PACKAGE).parts[:-1])
        module = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [module])])
    yield from (f"{module}.{alias.name}" for alias in node.names)


@functools.cache
def nodes_of(file: Path) -> list[ast.AST]:
    """The syntax tree of a module, from its root on."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))))


@functools.cache
def imports(file: Path) -> list[tuple[str, bool]]:
    """Every imported name, and whether it is imported when the module is."""
    inner = {
        id(node)
        for function in nodes_of(file)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    return [
        (name, id(node) not in inner)
        for node in nodes_of(file)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node, file)
    ]


def rooms_imported_by(file: Path) -> set[str]:
    """The rooms of the package that a file imports. "__init__" stands for the package itself."""
    rooms = set()
    for name, _ in imports(file):
        package, _, rest = name.partition(".")
        if package == "nplora":
            room = rest.partition(".")[0]
            rooms.add(room if room in PYTHON_ROOMS else "__init__")
    return rooms - {room_of(file)}


def test_every_module_has_its_place_in_the_order_of_rooms() -> None:
    assert {room_of(file) for file in python_files()} <= set(PYTHON_ROOMS)


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_python_room_imports_only_rooms_above_it(file: Path) -> None:
    allowed = set(PYTHON_ROOMS[: PYTHON_ROOMS.index(room_of(file))])
    assert rooms_imported_by(file) <= allowed, "imports a room below its own"


def test_there_are_few_rooms() -> None:
    assert len([room for room in PYTHON_ROOMS if not room.startswith("__")]) <= 18


def module_of(file: Path) -> str:
    parts = ("nplora", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types and imports inside functions count too."""
    modules = {module_of(file): file for file in python_files()}
    graph = {}
    for module, file in modules.items():
        names = {name for name, _ in imports(file)} if module != "nplora" else set()
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} - {"nplora"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which lists the cycle


@pytest.mark.parametrize("pair", STRANGERS, ids="-".join)
def test_these_rooms_do_not_know_each_other(pair: tuple[str, str]) -> None:
    for file in python_files():
        if room_of(file) in pair:
            assert not rooms_imported_by(file) & set(pair), file


# What the trainer knows of the room `distributed`: not which library connects the ranks.
CONNECTION = {"nplora.distributed.communicator", "nplora.distributed.ordered_sum"}


def test_the_trainer_knows_only_the_protocol_of_its_ranks() -> None:
    for file in python_files():
        if room_of(file) == "trainer":
            found = {name.rpartition(".")[0] for name, _ in imports(file) if ".distributed" in name}
            assert found <= CONNECTION, file


# The modules that all families share.
FAMILY_BASES = {
    "__init__",
    "family",
    "encoder_family",
    "head_spec",
    "tensor_spec",
    "config_fields",
    "gguf_fields",
}


# Families that change what another family does.
DERIVED_FAMILIES = {"qwen3": {"qwen2"}, "xlm_roberta": {"roberta"}}


def test_only_the_registry_imports_a_family() -> None:
    directory = PACKAGE / "models" / "families"
    families = {file.stem for file in directory.glob("*.py")} - FAMILY_BASES
    assert families >= {"llama", "mistral", "qwen2", "qwen3"}
    for file in python_files():
        if file == directory / "__init__.py":
            continue
        names = {name for name, _ in imports(file)}
        found = {name.split(".")[3] for name in names if name.startswith("nplora.models.families.")}
        base = DERIVED_FAMILIES.get(file.stem, set()) if file.parent == directory else set()
        assert not found & families - base, file


def test_only_numpy_is_required_and_extras_are_imported_inside_functions() -> None:
    for file in python_files():
        for name, at_import in imports(file):
            package = name.partition(".")[0]
            if package in sys.stdlib_module_names or package in {"numpy", "nplora"}:
                continue
            assert package in OPTIONAL_PACKAGES.get(room_of(file), set()), f"{file} imports {package}"
            is_program = file.name in PROGRAMS or room_of(file) == ROOM_OF_AN_EXTRA
            assert not at_import or is_program, f"{file} imports {package} outside a function"


def test_no_other_room_needs_the_room_of_an_extra() -> None:
    for file in python_files():
        assert ROOM_OF_AN_EXTRA not in rooms_imported_by(file) or file == PACKAGE / "__init__.py", file


def test_no_room_reads_files_that_hold_code() -> None:
    for file in python_files():
        assert not {name.partition(".")[0] for name, _ in imports(file)} & {"pickle", "marshal", "shelve"}, (
            file
        )


# What exists on some systems only, or asks which system this is.
SYSTEM_MODULES = {
    *("_winapi", "ctypes", "fcntl", "grp", "msvcrt", "nt", "platform", "posix", "pty", "pwd", "resource"),
    *("termios", "tty", "winreg"),
}
SYSTEM_NAMES = {
    "sys": {"platform", "getwindowsversion", "winver"},
    "os": {
        *("name", "uname", "environb", "fork", "forkpty", "register_at_fork", "killpg", "setsid", "getpgid"),
        *("getuid", "geteuid", "preadv", "pwritev", "pread", "pwrite", "posix_fallocate", "posix_fadvise"),
        *("fchmod", "fchown", "fchdir", "sysconf", "sched_getaffinity", "sched_setaffinity", "openpty"),
        *("mkfifo", "getloadavg", "nice", "startfile", "set_blocking", "statvfs", "fstatvfs", "symlink"),
        *("sendfile", "copy_file_range", "memfd_create", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"),
        *("O_DIRECTORY", "O_BINARY", "O_DSYNC", "O_SYNC", "O_TMPFILE"),
    },
    "signal": {
        *("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGBUS", "SIGALRM", "SIGPROF", "SIGVTALRM"),
        *("SIGBREAK", "SIGCHLD", "SIGQUIT", "SIGSTOP", "SIGCONT", "SIGTSTP", "CTRL_C_EVENT", "alarm"),
        *("setitimer", "pthread_sigmask", "pthread_kill", "sigwait", "ITIMER_REAL", "ITIMER_VIRTUAL"),
    },
    "socket": {
        *("AF_UNIX", "SO_REUSEADDR", "SO_EXCLUSIVEADDRUSE", "TCP_KEEPIDLE", "TCP_KEEPALIVE"),
        *("TCP_USER_TIMEOUT", "TCP_KEEPINTVL", "TCP_KEEPCNT"),
    },
    "mmap": {"MAP_SHARED", "MAP_PRIVATE", "PROT_READ", "PROT_WRITE", "MADV_WILLNEED", "MADV_DONTNEED"},
}
SYSTEM_ARGUMENTS = {
    *("dir_fd", "src_dir_fd", "dst_dir_fd", "start_new_session", "preexec_fn", "creationflags", "pass_fds"),
}


def system_specifics(file: Path) -> Iterator[str]:
    """The names that a module uses and that are not the same on all operating systems."""
    for name, _ in imports(file):
        if name.partition(".")[0] in SYSTEM_MODULES:
            yield f"import {name}"
    for node in nodes_of(file):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in SYSTEM_NAMES.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in SYSTEM_NAMES:
            yield from (a.name for a in node.names if a.name in SYSTEM_NAMES[node.module])
        elif isinstance(node, ast.keyword) and node.arg in SYSTEM_ARGUMENTS:
            yield f"{node.arg}="
        elif isinstance(node, ast.Constant) and re.match(r"/?(proc|sys|dev)/", str(node.value)):
            yield str(node.value)


def test_only_one_room_knows_the_operating_system() -> None:
    found = {
        str(file.relative_to(PACKAGE)): specifics
        for file in python_files()
        if room_of(file) != "platform" and (specifics := sorted(set(system_specifics(file))))
    }
    assert found == {}


def in_bytes(call: ast.Call) -> bool:
    """Whether a call of `open` has a mode such as "rb"."""
    return any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in call.args[1:2])


def text_without_encoding(file: Path) -> Iterator[int]:
    """The lines that open a file as text without an encoding: on Windows it would not be UTF-8."""
    for node in nodes_of(file):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        is_open = isinstance(node.func, ast.Name) and name == "open" and not in_bytes(node)
        if "encoding" not in given and (is_open or name in {"read_text", "write_text"}):
            yield node.lineno


def test_text_has_its_encoding_on_every_system() -> None:
    """The room of the platform reads Linux' own files, whose text is ASCII."""
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in python_files()
        if room_of(file) != "platform"
        if (lines := list(text_without_encoding(file)))
    }
    assert found == {}


TESTS = ROOT / "tests"
ASKING = re.compile(r"\b(sys\.platform|os\.name|platform\.system)\b")


def test_tests_ask_one_module_for_the_operating_system() -> None:
    files = [file for file in TESTS.rglob("*.py") if file.name not in {"systems.py", Path(__file__).name}]
    assert len(files) > 100
    assert [file for file in files if ASKING.search(file.read_text(encoding="utf-8"))] == []


# Imports for `nplora demo` and for `nplora info`, which prints the norms of an adapter.
COMPUTES = {"demo/dictionary.py", "demo/digits.py", "description.py"}


def test_the_command_line_holds_no_arithmetic() -> None:
    files = [file for file in python_files() if room_of(file) == "cli"]
    commands = {file.relative_to(PACKAGE / "cli").as_posix(): file for file in files}
    assert commands.keys() > COMPUTES
    for name in commands.keys() - COMPUTES:
        found = {imported.partition(".")[0] for imported, _ in imports(commands[name])}
        assert "numpy" not in found, name


# ---- C++ ----


@functools.cache
def cpp_files() -> list[Path]:
    return sorted(file for file in CSRC.rglob("*") if file.suffix in {".h", ".cpp"})


def cpp_room(file: Path) -> str:
    return file.relative_to(CSRC).parts[0]


@functools.cache
def code_of(file: Path) -> str:
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)


@functools.cache
def includes(file: Path) -> tuple[set[str], set[str]]:
    """The includes of a file: "ours" and <system>."""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', code_of(file), flags=re.MULTILINE)
    return {name for mark, name in found if mark == '"'}, {name for mark, name in found if mark == "<"}


def including(headers: set[str]) -> set[str]:
    """The rooms, or files, that include one of these system headers."""
    return {file.relative_to(CSRC).as_posix() for file in cpp_files() if includes(file)[1] & headers}


def unit_sources(unit: Path) -> set[Path]:
    """A kernel unit and every file of ours that it includes, directly or indirectly."""
    seen: set[Path] = set()
    waiting = [unit]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting.extend(CSRC / name for name in includes(file)[0])
    return seen


def kernel_units() -> list[Path]:
    return sorted(CSRC.glob("kernels/isa_*.cpp"))


def test_every_cpp_file_is_in_a_room() -> None:
    assert cpp_files()
    assert {cpp_room(file) for file in cpp_files()} == set(CSRC_ROOMS)


@pytest.mark.parametrize("file", cpp_files(), ids=lambda file: str(file.relative_to(CSRC)))
def test_a_cpp_room_includes_only_rooms_of_a_lower_number(file: Path) -> None:
    number = CSRC_ROOMS.index(cpp_room(file))
    for name in includes(file)[0]:
        assert (CSRC / name).is_file(), f'"{name}" is not written as "room/file"'
        assert CSRC_ROOMS.index(name.partition("/")[0]) <= number, f'"{name}" is in a higher room'


def test_base_uses_only_the_standard_library_and_the_system() -> None:
    for file in cpp_files():
        if cpp_room(file) == "base":
            assert all(name.startswith("base/") for name in includes(file)[0]), file


SYSTEM_MACROS = re.compile(
    r"\b(__linux__|__gnu_linux__|__unix__|_?WIN32|_WIN64|__MINGW\d+__|__CYGWIN__|_MSC_VER|__APPLE__|__MACH__|"
    r"TARGET_OS_\w+|__EMSCRIPTEN__|__wasm\w*__|__\w+BSD__|__ANDROID__|__GLIBC__|__BIONIC__|_POSIX_\w+|"
    r"_SC_\w+|MADV_\w+)\b"
)
STANDARD_C_HEADERS = {"stddef.h", "stdint.h"}


def test_only_the_files_of_the_platform_know_the_operating_system() -> None:
    """CMakeLists.txt chooses between these files, so that no file asks which system it is compiled for."""
    for file in cpp_files():
        path = file.relative_to(CSRC).as_posix()
        if re.fullmatch(r"base/platform_\w+\.cpp", path):
            assert not re.search(r"#\s*(el)?ifn?(def)?\b.*\b(linux|WIN|APPLE|EMSC|wasm)", code_of(file)), path
            continue
        assert not SYSTEM_MACROS.search(code_of(file)), path
        headers = {name for name in includes(file)[1] if name.endswith(".h") and "/" not in name}
        headers |= {name for name in includes(file)[1] if name.startswith("sys/")}
        assert headers <= STANDARD_C_HEADERS | INTRINSICS | {"omp.h", "Python.h"}, path


def test_python_is_known_to_bindings_only() -> None:
    for file in cpp_files():
        knows = any(name.startswith(("Python.h", "pybind11/", "numpy/")) for name in includes(file)[1])
        assert not knows or cpp_room(file) == "bindings", file


def test_intrinsics_are_used_in_simd_and_kernels_only() -> None:
    assert {name.partition("/")[0] for name in including(INTRINSICS)} <= {"simd", "kernels"}
    intrinsic = re.compile(r"\b(_mm\d*_\w+|__m(128|256|512)\w*|__builtin_ia32_(?!pause)\w+)")
    for file in cpp_files():
        assert cpp_room(file) in {"simd", "kernels"} or not intrinsic.search(code_of(file)), file


def test_openmp_is_used_in_base_parallel_only() -> None:
    assert including({"omp.h"}) <= {"base/parallel.cpp"}
    for file in cpp_files():
        if re.search(r"#\s*pragma\s+omp|\bomp_\w+\(", code_of(file)):
            assert file.relative_to(CSRC).as_posix() == "base/parallel.cpp"


def test_kernels_and_operations_start_no_threads() -> None:
    assert {name.partition("/")[0] for name in including(THREADS)} <= {"base", "bindings"}


def test_each_instruction_set_has_a_unit_with_its_own_namespace() -> None:
    names = {unit.stem for unit in kernel_units()}
    assert names >= {
        f"isa_{isa}"
        for isa in (
            "generic",
            "avx2",
            "avxvnni",
            "avx512",
            "avx512vnni",
            "avx512bf16",
            "amx",
            "neon",
            "neondot",
            "neonbf16",
            "neoni8mm",
        )
    }
    for unit in kernel_units():
        isa = unit.stem.removeprefix("isa_")
        assert re.search(rf"^#define NPLORA_ISA {isa}$", unit.read_text(), flags=re.MULTILINE), unit


@pytest.mark.parametrize("unit", kernel_units(), ids=lambda unit: unit.stem)
def test_a_kernel_unit_shares_no_inline_code_with_another(unit: Path) -> None:
    """The linker keeps one copy of a shared inline function, which older machines may be unable to run."""
    for file in unit_sources(unit):
        ours, system = includes(file)
        assert all(
            name.startswith(("kernels/", "simd/vec"))
            or name in {"base/cache_line.h", "base/block.h", "simd/tile_registers.h"}
            for name in ours
        ), file
        assert system <= {"cstddef", "cstdint", "stddef.h", "stdint.h", "immintrin.h", "arm_neon.h"}, file
        assert "std::" not in code_of(file), file


def test_the_build_never_trades_exactness_for_speed() -> None:
    build = re.sub(r"#[^\n]*", "", (ROOT / "CMakeLists.txt").read_text())
    assert not re.search(r"-ffast-math|-Ofast|-funsafe-math|-fassociative-math|-march=native", build)


# ---- block formats ----


def format_list() -> dict[str, str]:
    """The formats in the list of kernels/formats.h: their names, and the names of their C++ types."""
    text = (CSRC / "kernels/formats.h").read_text()
    listed = text[text.index("#define NPLORA_ROW_FORMATS") : text.index("enum class BlockFormat")]
    return dict(re.findall(r"\bX\((\w+), (\w+)\)", listed))


def test_every_block_format_has_one_file_and_one_quantiser_and_is_in_the_list() -> None:
    names = {*format_list(), "nf4"}
    assert len(names) > 8
    assert {file.name for file in (CSRC / "kernels/formats").iterdir()} == {f"{name}-inl.h" for name in names}
    assert {file.stem for file in (CSRC / "ops/quantizers").glob("*.cpp")} == names
    included = includes(CSRC / "kernels/formats.h")[0]
    assert included == {"base/block.h", *(f"kernels/formats/{name}-inl.h" for name in names)}


def test_only_the_list_knows_the_block_formats() -> None:
    types = "|".join(format_list().values())
    for file in cpp_files():
        path = file.relative_to(CSRC).as_posix()
        if path == "kernels/formats.h":
            continue
        known = any(name.startswith("kernels/formats/") for name in includes(file)[0])
        assert not known or path.startswith("kernels/formats/"), path
        named = set(re.findall(rf"\b(?:Block|k)({types})\b", code_of(file)))
        if path.startswith(("kernels/formats/", "ops/quantizers/")):
            assert {name.lower() for name in named} <= {file.stem.removesuffix("-inl")}, path
        else:
            assert not named, path


# Types that GGUF files may contain, decoded or not; and one format that a text or a rule recommends.
FORMAT_TABLES = {"formats/gguf/ggml_types.py", "formats/gguf/file_type.py"}
RECOMMENDED = "q8_0"


def test_python_asks_the_core_for_the_block_formats() -> None:
    names = {name for pair in format_list().items() for name in pair}
    for file in python_files():
        if file.relative_to(PACKAGE).as_posix() in FORMAT_TABLES:
            continue
        constants = {node.value for node in nodes_of(file) if isinstance(node, ast.Constant)}
        assert not (constants & names) - {RECOMMENDED}, file
