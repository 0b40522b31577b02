"""The Python of examples/browser, without a browser: the stand-in for tokenizers, and training."""

import importlib.util
import io
import sys
import unicodedata
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import gguf
from nplora.formats.gguf import Typed
from nplora.tokenizer import Tokenizer, from_gguf
from small_llama import save_small_llama

BROWSER = Path(__file__).parents[2] / "examples/browser"
ROOT = Path(__file__).parents[2]

TEXTS = [
    "",
    " ",
    "It's we'll THEY'RE 'tis o''d '' 'x",
    "12 345  6\t7\n\n8 ½ ² ४ Ⅷ 一二三",
    "spaces   at the end  \n  \n\t ",
    "Füße, naïve, Ωmega, ру́сский, 漢字かな交じり文, हिन्दी, 👩‍👩‍👧 🇫🇷 e\u0301\u200b\u00a0x\u3000y\x1cz\x85w",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # done\r\n",
]


def load(name: str) -> ModuleType:
    """A file of the page as a module. Its name is not "tokenizers", which the package has."""
    spec = importlib.util.spec_from_file_location(f"browser_{name}", BROWSER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stand_in() -> ModuleType:
    return load("tokenizers")


@pytest.fixture
def both(smollm2: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Tokenizer, Tokenizer]:
    """SmolLM2's tokenizer by the package, and by the stand-in."""
    file = gguf.open(smollm2)
    theirs = from_gguf(file)
    monkeypatch.setitem(sys.modules, "tokenizers", stand_in)
    ours = from_gguf(file)
    assert type(ours._backend).__module__ != type(theirs._backend).__module__
    return theirs, ours


def texts() -> list[str]:
    """Real text: nplora's documentation and code, in English."""
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("python/nplora/nn/*.py")]
    return TEXTS + [file.read_text(encoding="utf-8") for file in files]


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    codes = np.concatenate(
        [np.arange(0x20, 0x7F).repeat(40), np.arange(0x80, 0x3100), np.arange(0x1F300, 0x1F700)]
    )
    return ["".join(map(chr, rng.choice(codes, size=60))) for _ in range(count)]


@pytest.mark.parametrize("parse_special", [False, True])
def test_the_stand_in_encodes_text_as_the_package_does(
    both: tuple[Tokenizer, Tokenizer], parse_special: bool
) -> None:
    theirs, ours = both
    count = 0
    for text in [*texts(), *random_texts(300)]:
        expected = theirs.encode(text, parse_special=parse_special)
        assert ours.encode(text, parse_special=parse_special) == expected, text[:80]
        count += len(expected)
    assert count > 100_000


def test_the_stand_in_decodes_as_the_package_does(both: tuple[Tokenizer, Tokenizer]) -> None:
    theirs, ours = both
    rng = np.random.default_rng(0)
    for text in TEXTS:
        ids = theirs.encode(text, parse_special=True)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for _ in range(100):  # bytes that are not UTF-8
        ids = rng.integers(ours.vocab_size, size=30).tolist()
        assert ours.decode(ids) == theirs.decode(ids)


def test_the_tokenizers_have_the_same_tokens(both: tuple[Tokenizer, Tokenizer]) -> None:
    theirs, ours = both
    assert ours.tokens() == theirs.tokens()
    for name in ("bos_id", "eos_id", "eos_ids", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.id_of("<|im_end|>") == theirs.id_of("<|im_end|>")
    assert ours.encode_prompt("Hello") == theirs.encode_prompt("Hello")


def test_tokens_around_a_text_are_added(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": Typed(3, "UINT32"),
        "tokenizer.ggml.add_bos_token": True,
    }
    file = gguf.loads(gguf.dumps({}, metadata))
    theirs = from_gguf(file)
    monkeypatch.setitem(sys.modules, "tokenizers", stand_in)
    ours = from_gguf(file)
    for text in ("abba", "xayb", "<s>a"):
        expected = theirs.encode(text, add_special_tokens=True, parse_special=True)
        assert ours.encode(text, add_special_tokens=True, parse_special=True) == expected


@pytest.mark.slow
def test_the_classes_of_characters_are_those_of_unicode(stand_in: ModuleType) -> None:
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))[0]
        found = stand_in._CLASSES[code]
        assert (found == "L") == (category == "L"), hex(code)
        assert (found == "N") == (category == "N"), hex(code)


def test_another_kind_of_tokenizer_is_refused(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    monkeypatch.setitem(sys.modules, "tokenizers", stand_in)
    with pytest.raises((NotImplementedError, AttributeError)):
        from_gguf(gguf.loads(gguf.dumps({}, metadata)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("the cat sat on the mat. " * 20, "data.txt"),
        ('{"prompt": "1+1=", "completion": "2"}\n' * 8, "data.jsonl"),
    ],
)
def test_the_page_trains_an_adapter_whose_loss_the_package_repeats(
    text: str, name: str, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = save_small_llama(tmp_path / "model.gguf")
    steps = list[tuple[int, int]]()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", stand_in)
        session = load("train").Session(str(model), text, str(tmp_path / "run"), window=32)
        before = session.loss()
        session.train(10, 4, 1e-2, lambda step, of, loss, seconds: steps.append((step, of)))
        after = session.loss()
        assert isinstance(session.answer("1+1=", 3), str)
    assert steps == [(step, 10) for step in range(1, 11)]
    assert after < before - 0.5
    zipfile.ZipFile(io.BytesIO(session.zipped_adapter())).extractall(tmp_path)
    again = nplora.evaluate(model, tmp_path / "run" / name, adapter=tmp_path / "adapter", max_length=32)
    assert again["loss"] == after
