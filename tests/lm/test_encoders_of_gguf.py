"""Encoders from GGUF files, written as llama.cpp's converter writes them."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import nplora
from nplora.formats import gguf, safetensors
from nplora.formats.config_json import read_fields
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError
from nplora.lm.encoder_loading import is_encoder
from nplora.models import families
from nplora.tokenizer import Tokenizer, from_directory, from_gguf
from nplora.tokenizer.character_table import growth
from small_encoder import WIDTH, WORDS, gguf_metadata, gguf_name, save_gguf, save_small_encoder, tensors

pytest.importorskip("tokenizers")

Array = npt.NDArray[Any]

TEXTS = ["a cat", "the dogs sat on the mat .", "Where is my PARCEL"]


def test_an_encoder_from_gguf_is_that_of_the_directory(tmp_path: Path) -> None:
    ours = nplora.load_encoder(save_gguf(tmp_path / "model.gguf"))
    theirs = nplora.load_encoder(save_small_encoder(tmp_path / "model"))
    assert ours.encode(TEXTS) == theirs.encode(TEXTS)
    assert ours.pooling.modes == ("mean",)
    np.testing.assert_allclose(ours.embed(TEXTS), theirs.embed(TEXTS), atol=1e-6)
    assert ours.tokenizer.decode(ours.encode(["the dogs sat"])[0], skip_special_tokens=True) == "the dogs sat"


@pytest.mark.parametrize(("kind", "mode"), [(2, "cls"), (3, "last")])
def test_the_pooling_of_the_metadata_is_used(kind: int, mode: str, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "model.gguf", bert__pooling_type=gguf.Typed(kind, "UINT32"))
    assert nplora.load_encoder(path).pooling.modes == (mode,)


def test_old_files_name_cls_and_sep_only_in_their_tokens(tmp_path: Path) -> None:
    old = {"tokenizer.ggml.cls_token_id": None, "tokenizer.ggml.seperator_token_id": None}
    path = save_gguf(tmp_path / "model.gguf", **old)
    wanted = nplora.load_encoder(save_gguf(tmp_path / "new.gguf")).encode(TEXTS)
    assert nplora.load_encoder(path).encode(TEXTS) == wanted


def test_what_a_file_cannot_be_is_refused(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "model.gguf", bert__attention__causal=True)
    with pytest.raises(UnsupportedError, match=r"bert\.attention\.causal is set, expected an encoder"):
        nplora.load_encoder(path)
    with pytest.raises(UnsupportedError, match=r"'bert', .*nplora\.load_encoder reads"):
        nplora.load_model(path)
    kept = tensors()
    del kept["encoder.layer.1.output.dense.bias"]
    with pytest.raises(FormatError, match=r"'blk\.1\.ffn_down\.bias' is missing"):
        nplora.load_encoder(save_gguf(path, kept))


@pytest.mark.parametrize("name", ["$A", "$B", "$7", "$", "a:b", "x:9", "[CLS]:1"])
def test_any_token_may_be_the_one_before_a_text(name: str, tmp_path: Path) -> None:
    words = list(gguf_metadata()["tokenizer.ggml.tokens"])
    words[2] = name
    save_gguf(tmp_path / "model.gguf", tokenizer__ggml__tokens=words)
    assert nplora.load_encoder(tmp_path / "model.gguf").encode(["a cat"]) == [[2, 5, 6, 3]]


@pytest.mark.parametrize("number", [4, 9])
def test_a_pooling_that_is_not_known_is_refused(number: int, tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", bert__pooling_type=gguf.Typed(number, "UINT32"))
    with pytest.raises(UnsupportedError, match=f"pooling_type is {number}, expected 0"):
        nplora.load_encoder(tmp_path / "model.gguf")


# ---- other families: the tensors of a directory, under the names of llama.cpp's own package ----

SIZES = {"vocab_size": 80, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 5,
         "num_attention_heads": 6, "max_position_embeddings": 66}  # fmt: skip
IDS = [np.random.default_rng(n).integers(3, 80, n).tolist() for n in (5, 1, 60, 17)]


@dataclass(frozen=True)
class Kind:
    """A family whose GGUF file is compared with its directory.

    Attributes:
        model_type: the name in config.json.
        architecture, tokenizer: the names in GGUF.
        config: fields of config.json, besides `SIZES`.
        entries: the converter's metadata, without the architecture's name.
        unused_rows: rows of the table of positions that the converter leaves out.
    """

    model_type: str
    architecture: str
    tokenizer: str
    config: dict[str, Any]
    entries: dict[str, Any]
    unused_rows: int = 0


def whole(number: int) -> gguf.Typed:
    return gguf.Typed(number, "UINT32")


ROBERTA = {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
EPSILON = {"attention.layer_norm_epsilon": np.float32(1e-5), "attention.causal": False}
KINDS = [
    Kind("roberta", "bert", "gpt2", ROBERTA, EPSILON, 2),
    Kind("xlm-roberta", "bert", "t5", ROBERTA, EPSILON, 2),
    Kind(
        "modernbert",
        "modern-bert",
        "gpt2",
        {"local_attention": 10, "norm_eps": 1e-5},
        EPSILON
        | {
            "attention.sliding_window": whole(10),
            "attention.sliding_window_pattern": whole(3),
            "rope.freq_base": np.float32(160_000),
            "rope.freq_base_swa": np.float32(10_000),
            "rope.scaling.type": "none",
        },
    ),
    Kind(
        "gemma3_text",
        "gemma-embedding",
        "llama",
        {"num_hidden_layers": 7, "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 10,
         "sliding_window": 6, "use_bidirectional_attention": True, "tie_word_embeddings": True},
        {"attention.layer_norm_rms_epsilon": np.float32(1e-6), "attention.head_count_kv": whole(2),
         "attention.key_length": whole(10), "attention.value_length": whole(10),
         "attention.sliding_window": whole(6), "rope.freq_base": np.float32(1e6)},
    ),
]  # fmt: skip


def save_both(kind: Kind, directory: Path, more: dict[str, Any] | None = None) -> Path:
    """Write a model of random numbers as a directory, and as model.gguf in it, with `more` tensors there."""
    theirs = pytest.importorskip("gguf")
    config = {"model_type": kind.model_type, **SIZES, **kind.config}
    (directory / "config.json").write_text(json.dumps(config))
    family = families.encoder_by_model_type(kind.model_type) or families.by_model_type("", kind.model_type)
    fields = read_fields(directory / "config.json")
    rng = np.random.default_rng(0)
    tensors_of_both = {
        tensor.name: 0.15 * rng.standard_normal(tensor.shape, np.float32)
        for tensor in family.tensors(family.read_config(fields))  # type: ignore[arg-type]
    }
    safetensors.save(directory / "model.safetensors", tensors_of_both)
    numbers = {name: number for number, name in theirs.MODEL_ARCH_NAMES.items()}
    names = theirs.get_tensor_name_map(numbers[kind.architecture], config["num_hidden_layers"])
    stored = dict(more or {})
    for name, array in tensors_of_both.items():
        rows = kind.unused_rows if "position_embeddings" in name else 0
        offset = np.float32(kind.model_type == "gemma3_text" and "norm" in name)
        stored[names.get_name(name, (".weight", ".bias"))] = array[rows:] + offset
    sizes = {
        "block_count": config["num_hidden_layers"], "embedding_length": 48, "feed_forward_length": 72,
        "context_length": 66 - kind.unused_rows, "attention.head_count": 6, "pooling_type": 1,
    }  # fmt: skip
    entries = {name: whole(size) for name, size in sizes.items()} | kind.entries
    metadata = {f"{kind.architecture}.{name}": value for name, value in entries.items()}
    metadata |= {"general.architecture": kind.architecture, "tokenizer.ggml.model": kind.tokenizer}
    gguf.save(directory / "model.gguf", stored, metadata)
    return directory


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_hidden_states_are_those_of_the_directory(kind: Kind, tmp_path: Path) -> None:
    """`test_encoders_beside_transformers` compares directories with transformers."""
    theirs = nplora.load_encoder(save_both(kind, tmp_path), pooling="mean")
    ours = nplora.load_encoder(tmp_path / "model.gguf")
    assert ours.config.model_type == kind.model_type
    assert ours.max_length == theirs.max_length
    assert is_encoder(tmp_path / "model.gguf")
    for one, other in zip(ours.hidden_states(IDS), theirs.hidden_states(IDS), strict=True):
        np.testing.assert_array_equal(one, other)
    theirs.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(theirs, tmp_path / "adapter")
    nplora.read_adapter(tmp_path / "adapter").attach(ours)
    np.testing.assert_array_equal(ours.embed_ids(IDS, normalize=False), theirs.embed_ids(IDS))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_dense_modules_of_embeddinggemma_compute_in_float32(compute: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.standard_normal(shape, np.float32) for shape in ((32, 48), (12, 32)))
    packed = nplora.FrozenWeight(second, dtype="q8_0")
    more = {"dense_2.weight": first, "dense_3.weight": packed.to_gguf("dense_3.weight")}
    path = save_both(KINDS[-1], tmp_path, more) / "model.gguf"
    encoder = nplora.load_encoder(path, compute=compute)
    means = np.stack([states.astype(np.float64).mean(axis=0) for states in encoder.hidden_states(IDS)])
    wanted = means @ first.T @ packed.to_numpy().T
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed_ids(IDS), wanted, rtol=0, atol=1e-5)
    assert nplora.load_encoder(path, pooling="last").dim == 48
    with pytest.raises(UnsupportedError, match=r"'gemma-embedding', .*nplora\.load_encoder reads"):
        nplora.load_model(path)


def test_a_dense_module_needs_two_axes(tmp_path: Path) -> None:
    more = {"dense_2.weight": np.ones(48, np.float32)}
    path = save_both(KINDS[-1], tmp_path, more) / "model.gguf"
    with pytest.raises(FormatError, match=r"tensor dense_2\.weight has shape \(48,\), expected two axes"):
        nplora.load_encoder(path)


def test_dense_modules_without_a_pooling_are_refused(tmp_path: Path) -> None:
    more = {"dense_2.weight": np.ones((32, 48), np.float32)}
    kind = KINDS[-1]
    no_pooling = replace(kind, entries=kind.entries | {"pooling_type": whole(0)})
    path = save_both(no_pooling, tmp_path, more) / "model.gguf"
    with pytest.raises(UnsupportedError, match=r"dense_2\.weight must follow a pooling"):
        nplora.load_encoder(path)


# ---- Unigram, the tokenizer of XLM-RoBERTa ----

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TEXTS_OF_XLM_R = ["a cat", "def  unigram (x):  ", "", "ünknöwn 中文 <s>", "one\ttwo\nthree", "▁a▁"]


def unigram() -> Any:
    """A small tokenizer with the parts of XLM-RoBERTa's, but for its table of characters."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    options: dict[str, Any] = {"special_tokens": list(SPECIAL), "unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=200, **options)
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


def unigram_metadata(vocab: list[tuple[str, float]], **changes: Any) -> dict[str, Any]:
    """The metadata of a Unigram tokenizer, as llama.cpp's converter writes them."""
    entries = {
        "model": "t5",
        "pre": "default",
        "tokens": [token for token, _ in vocab],
        "scores": np.float32([score for _, score in vocab]),
        "token_type": np.int32([3, 3, 3, 2] + [1] * (len(vocab) - 4)),
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "bos_token_id": gguf.Typed(0, "UINT32"),
        "eos_token_id": gguf.Typed(2, "UINT32"),
        "add_bos_token": True,
        "add_eos_token": True,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items() if value is not None}


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    return from_gguf(gguf.loads(gguf.dumps({}, metadata)))


def test_unigram_tokens_are_those_of_tokenizer_json() -> None:
    theirs = unigram()
    vocab = json.loads(theirs.to_str())["model"]["vocab"]
    ours = tokenizer_of(unigram_metadata(vocab))
    theirs.encode_special_tokens = True
    bare = tokenizer_of(unigram_metadata(vocab, add_bos_token=None, add_eos_token=None))
    [ids] = ours.encode_texts(["a cat"], 99)[0]
    assert bare.encode_texts(["a cat"], 99)[0] == [ids[1:]]  # llama.cpp's defaults: EOS but no BOS
    for text in TEXTS_OF_XLM_R:
        plain = " ".join(text.split())  # without SentencePiece's table, line breaks are letters
        assert ours.encode_texts([plain], 99)[0] == [theirs.encode(plain).ids]
    assert ours.encode_texts(["a  cat "], 99) == ours.encode_texts(["a cat"], 99)
    assert ours.decode(ours.encode("a cat sat")) == "a cat sat"
    kept = tokenizer_of(unigram_metadata(vocab, remove_extra_whitespaces=False))
    assert kept.encode_texts(["a  cat"], 99) != ours.encode_texts(["a  cat"], 99)


@pytest.fixture(scope="module")
def sentencepiece() -> tuple[Any, Array]:
    """A small model of SentencePiece, and its table of characters."""
    theirs = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    text, file = Path(__file__).read_text(encoding="utf-8"), io.BytesIO()
    theirs.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=file, vocab_size=200, minloglevel=9
    )
    model = proto.ModelProto.FromString(file.getvalue())
    table = np.frombuffer(model.normalizer_spec.precompiled_charsmap, np.uint8)
    assert table.size
    return theirs.SentencePieceProcessor(model_proto=file.getvalue()), table


def test_unigram_tokens_are_those_of_sentencepiece(sentencepiece: tuple[Any, Array]) -> None:
    """With SentencePiece's own table of characters, as in a real file."""
    spm, table = sentencepiece
    vocab = [(name, 0.0) for name in SPECIAL]
    vocab += [(spm.id_to_piece(i), spm.get_score(i)) for i in range(3, spm.vocab_size())]
    ours = tokenizer_of(unigram_metadata(vocab, precompiled_charsmap=table))
    for text in [*TEXTS_OF_XLM_R, "ﬁne ａｂｃ ½"]:
        if "<s>" not in text:  # SentencePiece has no such token
            ids = [3 if i == 0 else i + 1 for i in spm.encode(text)]  # as in XLM-RoBERTa
            assert ours.encode_texts([text], 99)[0] == [[0, *ids, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompiled_charsmap": np.uint8([255] * 9)}, "precompiled_charsmap is damaged"),
        ({"precompiled_charsmap": np.int32([1])}, "expected an array of UINT8"),
        ({"token_type": np.int32([3, 3, 3, 1, 1])}, "has no token for unknown text"),
        ({"scores": np.float32([0, 0, 0, 0, np.nan])}, "the score of token 4 is not finite"),
    ],
)
def test_damaged_unigram_metadata_are_refused(changes: dict[str, Any], message: str) -> None:
    vocab = [*((name, 0.0) for name in SPECIAL), ("▁a", -1.0)]
    with pytest.raises(FormatError, match=message):
        tokenizer_of(unigram_metadata(vocab, **changes))


def character_table(replacements: bytes, units: dict[int, int] | None = None, size: int = 1024) -> bytes:
    """A table of characters. Units of its search tree that are not given are 0."""
    tree = np.zeros(256, "<u4")
    for place, unit in (units or {}).items():
        tree[place] = unit
    return size.to_bytes(4, "little") + tree.tobytes() + replacements


def long_table(longest: int) -> bytes:
    """A table whose longest replacement has so many characters."""
    return character_table(b"b\0" + longest * b"a" + b"\0b")


def a_becomes(place: int) -> dict[int, int]:
    """The units of a tree that replaces "a" by the text at this place of the replacements."""
    label, is_replaced, offset = ord("a"), 1 << 8, ord("a") ^ 200
    return {label: label | is_replaced | offset << 10, 200: 1 << 31 | place}


def normalizer(table: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def readers_of(table: bytes, directory: Path) -> list[Callable[[], Tokenizer]]:
    """Functions that read a tokenizer with this table of characters from GGUF and from a directory."""
    vocab = [*((name, 0.0) for name in SPECIAL), *((f"▁{word}", -1.0) for word in WORDS[4:])]
    path = save_small_encoder(directory / "model")
    fields = json.loads((path / "tokenizer.json").read_text())
    fields["normalizer"] = normalizer(table)
    (path / "tokenizer.json").write_text(json.dumps(fields))
    array = np.frombuffer(table, np.uint8)
    return [
        lambda: tokenizer_of(unigram_metadata(vocab, precompiled_charsmap=array)),
        lambda: from_directory(path),
    ]


@pytest.mark.parametrize("longest", [100, 101])
def test_a_table_that_makes_texts_very_long_is_refused(longest: int, tmp_path: Path) -> None:
    for read in readers_of(long_table(longest), tmp_path):
        if longest <= 100:
            read()
            continue
        with pytest.raises(UnsafeError, match="could make a text more than 100 times as long"):
            read()


def test_two_tables_that_together_make_texts_very_long_are_refused(tmp_path: Path) -> None:
    """Each makes a text eleven times as long."""
    path = save_small_encoder(tmp_path / "model")
    fields = json.loads((path / "tokenizer.json").read_text())
    step = normalizer(long_table(11))
    fields["normalizer"] = {"type": "Sequence", "normalizers": [step, step]}
    (path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UnsafeError, match="could make a text more than 100 times as long"):
        from_directory(path)


def test_a_table_of_characters_is_used(tmp_path: Path) -> None:
    for read in readers_of(character_table("é\0dog\0".encode(), a_becomes(3)), tmp_path):
        tokenizer = read()
        assert tokenizer.encode("a") == tokenizer.encode("dog") != tokenizer.encode("on")


@pytest.mark.parametrize(
    "table",
    [
        character_table(b"b\0", size=0),
        character_table(b"b\0", size=4),
        character_table(b"b\0", size=2048),
        character_table(b"\xc3\0"),
        character_table(b"b\0", {0: 256 << 10}),
        character_table(b"b\0", {ord("a"): ord("a") | 256 << 10}),
        character_table(b"b\0", a_becomes(3)),
        character_table("é\0".encode(), a_becomes(1)),
    ],
    ids=["no tree", "no block", "cut tree", "half a character", "root outside", "node outside",
         "place outside", "place in a character"],
)  # fmt: skip
def test_a_damaged_table_is_refused_without_a_trace(
    table: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The package `tokenizers` panics, with some of these tables only when a text has an "a"."""
    for read in readers_of(table, tmp_path):
        with pytest.raises(FormatError, match="precompiled_charsmap is damaged"):
            read()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("written", "escaped"),
    [("/", "\\/"), ("A", "\\u0041"), ("precompiled_charsmap", "\\u0070recompiled\\u005fcharsma\\u0070")],
)
def test_a_damaged_table_with_escaped_characters_is_refused_without_a_trace(
    written: str, escaped: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The package `tokenizers` panics if the root is outside of the tree."""
    table = character_table(b"\xff\xff\xff\0", {0: 256 << 10})
    readers_of(table, tmp_path)
    file = tmp_path / "model" / "tokenizer.json"
    before, after = file.read_text().split('"precompiled_charsmap": "')
    assert written in "precompiled_charsmap" + after.partition('"')[0]
    changed = ('precompiled_charsmap": "' + after).replace(written, escaped, 1)
    file.write_text(f'{before}"{changed}')
    with pytest.raises(FormatError, match="precompiled_charsmap is damaged"):
        from_directory(tmp_path / "model")
    assert capfd.readouterr().err == ""


def test_a_table_with_damaged_bits_is_refused_or_reads_every_text(sentencepiece: tuple[Any, Array]) -> None:
    from tokenizers.normalizers import Precompiled

    (_, table), rng = sentencepiece, np.random.default_rng(0)
    text = "\n".join(chr(code) for code in range(1, 0x3400))
    refused = 0
    for _ in range(100):
        damaged = table.copy()
        damaged[rng.integers(len(table), size=2)] ^= np.uint8(1 << rng.integers(8))
        try:
            growth(damaged.tobytes(), "a table")
        except FormatError:
            refused += 1
        else:
            Precompiled(damaged.tobytes()).normalize_str(text)
    assert 0 < refused < 100


def test_a_bert_with_unigram_tokens_is_an_xlm_roberta(tmp_path: Path) -> None:
    vocab = [*((name, 0.0) for name in SPECIAL), *((f"▁{word}", -1.0) for word in WORDS[4:])]
    plain = {name: value for name, value in gguf_metadata().items() if not name.startswith("tokenizer.")}
    made = {gguf_name(name): array for name, array in tensors().items()}
    gguf.save(tmp_path / "model.gguf", made, plain | unigram_metadata(vocab))
    encoder = nplora.load_encoder(tmp_path / "model.gguf")
    assert (encoder.config.model_type, encoder.prefix) == ("xlm-roberta", "roberta")
    assert encoder.encode(["a cat"]) == [[0, vocab.index(("▁a", -1.0)), vocab.index(("▁cat", -1.0)), 2]]
    assert encoder.embed(["a cat"]).shape == (1, WIDTH)
