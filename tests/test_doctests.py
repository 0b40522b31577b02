"""The examples in docstrings: each runs, and prints what the docstring shows.

An example knows the names of its module, and `np`, `nplora` and `os`. It runs in its own directory, with

    model.gguf      a small Llama with a tokenizer and a chat template; its context is 64 tokens
    adapter/        a PEFT adapter for it, of rank 2
    encoder-model/  a small BERT with a tokenizer; its texts have at most 32 tokens
    train.jsonl     16 rows {"prompt": "3+3=", "completion": "6"}; valid.jsonl has 4 more
"""

import doctest
import importlib
import inspect
import io
import json
import os
import pkgutil
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import nplora
import systems
from small_encoder import save_small_encoder
from small_llama import save_small_llama

# Every public name of these modules (their __all__) has an example. Add yours.
WITH_EXAMPLES = [
    "nplora",
    "nplora.adapters",
    "nplora.distributed",
    "nplora.finetuning",
    "nplora.finetuning.data",
    "nplora.finetuning.embedding",
    "nplora.finetuning.planning",
    "nplora.formats",
    "nplora.formats.gguf",
    "nplora.lm",
    "nplora.lm.generation",
    "nplora.lora",
    "nplora.models",
    "nplora.nn",
    "nplora.runtime",
    "nplora.serving",
    "nplora.sklearn",
    "nplora.tokenizer",
    "nplora.trainer",
    "nplora.trainer.reporters",
]
# Every public method of these classes has an example.
METHODS_WITH_EXAMPLES = [
    nplora.adapters.Adapter,
    nplora.adapters.LoraDelta,
    nplora.finetuning.Comparison,
    nplora.formats.gguf.Metadata,
    nplora.formats.safetensors.SafetensorsFile,
    nplora.generate.StopText,
    nplora.models.PrefixCache,
    nplora.tokenizer.StreamDecoder,
    nplora.tokenizer.Tokenizer,
]

# Programs, the core, and a module that needs the package lm_eval.
_NOT_IMPORTED = {
    "nplora.__main__",
    "nplora._core",
    "nplora.tokenizer.renderer",
    "nplora.finetuning.judging.harness",
}
_NEEDS_TOKENIZERS = ("model.gguf", "encoder-model")
_NEEDS = {  # what an example uses, and the package that it needs
    "MPICommunicator() as": "mpi4py",
    "TensorBoardReporter(": "tensorboardX",
    "WandbReporter(": "wandb",
    "MlflowReporter(": "mlflow",
}


class _Finder(doctest.DocTestFinder):
    """Finds examples of decorated functions too."""

    def _from_module(self, module: ModuleType | None, object: Any) -> bool:
        return super()._from_module(module, inspect.unwrap(object))  # type: ignore[misc]


class _Checker(doctest.OutputChecker):
    """Takes a path as Windows writes it for the same path with slashes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if os.sep == "\\":
            with_slashes = got.replace("\\", "/").replace("WindowsPath(", "PosixPath(")
            if super().check_output(want, with_slashes, optionflags):
                return True
        return super().check_output(want, got, optionflags)


def examples() -> list[doctest.DocTest]:
    """The docstrings that have examples."""
    found = list[doctest.DocTest]()
    names = [info.name for info in pkgutil.walk_packages(nplora.__path__, "nplora.")]
    for name in ("nplora", *names):
        if name not in _NOT_IMPORTED:
            found += _Finder(exclude_empty=True).find(importlib.import_module(name), name)
    return [test for test in found if test.examples]


@pytest.fixture(scope="session")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that an example finds in its directory."""
    directory = tmp_path_factory.mktemp("examples")
    lm = nplora.load_model(save_small_llama(directory / "model.gguf"))
    lm.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(lm, directory / "adapter")
    save_small_encoder(directory / "encoder-model")
    rows = [json.dumps({"prompt": f"{n}+{n}=", "completion": str(2 * n)}) + "\n" for n in range(20)]
    (directory / "train.jsonl").write_text("".join(rows[:16]))
    (directory / "valid.jsonl").write_text("".join(rows[16:]))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_an_example_prints_what_its_docstring_shows(
    test: doctest.DocTest, small_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(name in (test.docstring or "") for name in _NEEDS_TOKENIZERS):
        pytest.importorskip("tokenizers")
    for used, package in _NEEDS.items():
        if used in (test.docstring or ""):
            pytest.importorskip(package)
            if package == "mpi4py":
                try:
                    importlib.import_module("mpi4py.MPI")
                except RuntimeError as error:
                    pytest.skip(f"mpi4py finds no library: {str(error).partition(chr(10))[0]}")
    if "os.symlink(" in (test.docstring or "") and not systems.HAS_LINKS:
        pytest.skip("this system lacks symbolic links for this user")
    shutil.copytree(small_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    test.globs |= {"np": np, "nplora": nplora, "os": os}
    report = io.StringIO()
    doctest.DocTestRunner(_Checker(), optionflags=doctest.ELLIPSIS).run(test, out=report.write)
    assert not report.getvalue(), report.getvalue()


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_public_name_has_an_example(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert ">>> " in (inspect.getdoc(value) or ""), f"{name}.{public} has no example"


@pytest.mark.parametrize("kind", METHODS_WITH_EXAMPLES)
def test_every_public_method_has_an_example(kind: type) -> None:
    for name, value in vars(kind).items():
        method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if inspect.isfunction(method) and not name.startswith("_"):
            assert ">>> " in (inspect.getdoc(method) or ""), f"{kind.__name__}.{name} has no example"
