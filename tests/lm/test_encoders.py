"""Encoders without torch: files, pooling, texts and errors."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import reference
import small_models
from nplora.formats import safetensors
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError
from nplora.lm import Encoder
from nplora.lm.pooling import POOLINGS, Pooling
from nplora.nn import Linear, LoRALinear
from small_encoder import HEADS, LAYERS, POSITIONS, WIDTH, WORDS, modules, save_small_encoder, tensors

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]
TEXTS = ["a cat", "the dog sat on the mat .", "a", "where is my parcel"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoders") / "model")


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file. None removes a field."""
    values = json.loads(path.read_text(encoding="utf-8")) | fields if path.exists() else fields
    path.write_text(
        json.dumps({name: value for name, value in values.items() if value is not None}), encoding="utf-8"
    )


# ---- hidden states against plain NumPy in float64 ----


def exact_states(ids: list[int]) -> Array:
    """BERT's hidden states of one text, in float64."""
    w = {name: array.astype(np.float64) for name, array in tensors().items()}

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    def norm(x: Array, name: str) -> Array:
        return reference.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").reshape(len(ids), HEADS, -1)
            for part in ("query", "key", "value")
        )
        scale = 1 / np.sqrt(WIDTH / HEADS)
        heads = [
            reference.attention(q[:, h], k[:, h], v[:, h], scale, 0, causal=False)[0] for h in range(HEADS)
        ]
        out = linear(np.concatenate(heads, axis=1), f"{layer}.attention.output.dense")
        x = norm(x + out, f"{layer}.attention.output.LayerNorm")
        hidden = reference.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def some_ids() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(5, len(WORDS), length).tolist() for length in (7, 1, 2, POSITIONS, 30)]


def test_hidden_states_are_those_of_plain_numpy_whatever_other_texts_there_are(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    texts = some_ids()
    for ids, states in zip(texts, encoder.hidden_states(texts), strict=True):
        np.testing.assert_allclose(states, exact_states(ids), rtol=0, atol=2e-5)
    many = [texts[0]] * 700  # more than fit into one batch
    found = encoder.hidden_states(many)
    assert len(found) == 700
    assert max(np.abs(one - exact_states(texts[0])).max() for one in found) < 2e-5


def test_an_embedding_is_the_normalised_mean_and_one_text_gives_one_vector(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    vectors = encoder.embed(TEXTS)
    assert vectors.shape == (4, WIDTH)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        mean = exact_states(encoder.encode([text])[0]).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(encoder.embed(TEXTS[0]), vectors[0], atol=1e-6)
    np.testing.assert_allclose(encoder.embed(TEXTS, batch_size=3), vectors, atol=1e-6)
    mean = encoder.embed(TEXTS, normalize=False)
    np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), vectors, atol=1e-6)
    assert encoder.embed([]).shape == (0, WIDTH)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_memory_that_a_block_keeps_is_what_its_footprint_says(directory: Path, compute: str) -> None:
    encoder = nplora.load_encoder(directory, compute=compute)
    encoder.add_lora(rank=2)
    block = encoder.model.layers[0]
    _, saved = encoder.forward([[5] * 40])
    outputs = {
        name.rpartition(".")[2]: layer.weight.shape[0]
        for name, layer in block.named_modules()
        if isinstance(layer, LoRALinear)
    }
    from nplora.models.footprint import Adapted

    footprint = block.footprint(Adapted(2, False, outputs), narrow=compute == "bfloat16")
    kept = nplora.saved_nbytes(saved.decoder.blocks[0])
    assert kept == 40 * footprint.saved


# ---- pooling ----


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("modes", [*POOLINGS, ("cls", "max", "mean")], ids=str)
def test_the_gradient_of_a_pooling_is_its_slope(
    modes: Any, normalize: bool, rng: np.random.Generator
) -> None:
    x, starts = rng.standard_normal((9, 4), np.float32), np.array([0, 1, 6, 9])
    width = 4 * (1 if isinstance(modes, str) else len(modes))
    dense = Linear(rng.standard_normal((5, width), np.float32), rng.standard_normal(5, np.float32))
    pooling = Pooling(modes, [(dense, "tanh"), (Linear(np.eye(5, dtype=np.float32)), None)], normalize)
    y, saved = pooling.run(x, starts)
    c = rng.standard_normal(y.shape, np.float32)
    dx = pooling.run_backward(c, saved)
    step = np.float32(1e-2)
    for row, column in np.ndindex(x.shape):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[row, column] += sign * step
            values.append(float((c * pooling.pool(moved, starts)).sum(dtype=np.float64)))
        assert dx[row, column] == pytest.approx((values[0] - values[1]) / (2 * step), abs=5e-3)


def test_each_pooling_is_what_its_name_says() -> None:
    x = np.float32([[1, 8], [3, 2], [5, 5], [-1, 4]])
    starts = np.array([0, 3, 4])
    wanted = {
        "cls": [1, 8], "mean": [3, 5], "max": [5, 8], "last": [5, 5],
        "weighted_mean": [(1 + 6 + 15) / 6, (8 + 4 + 15) / 6], "mean_sqrt": [9 / 3**0.5, 15 / 3**0.5],
    }  # fmt: skip
    for mode, first in wanted.items():
        np.testing.assert_allclose(Pooling(mode).pool(x, starts), [first, [-1, 4]], rtol=1e-6)
    assert Pooling(("cls", "max")).pool(x, starts).tolist() == [[1, 8, 5, 8], [-1, 4, -1, 4]]


# ---- the files of sentence-transformers ----


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [("cls", "cls"), ("max", "max"), ("mean_sqrt_len_tokens", "mean_sqrt"), ("lasttoken", "last"),
     ("weightedmean_tokens", "weighted_mean")],
)  # fmt: skip
def test_the_pooling_of_the_files_is_used(pooling: str, mode: str, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(save_small_encoder(tmp_path / "model", pooling))
    assert encoder.pooling.modes == (mode,)
    assert encoder.pooling.normalize
    assert encoder.max_length == 32
    assert nplora.load_encoder(tmp_path / "model", pooling="max").pooling.modes == ("max",)


def test_new_files_name_several_poolings(directory: Path, tmp_path: Path) -> None:
    model = copied(directory, tmp_path)
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["max", "lasttoken"]}))
    assert nplora.load_encoder(model).dim == 2 * WIDTH
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(UnsupportedError, match="pooling_mode is 'median', expected one of cls"):
        nplora.load_encoder(model)
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH}))
    with pytest.raises(FormatError, match="no pooling is chosen"):
        nplora.load_encoder(model)


def with_dense(
    directory: Path, tmp_path: Path, rng: np.random.Generator, **fields: Any
) -> tuple[Path, Array]:
    model = copied(directory, tmp_path)
    (model / "modules.json").write_text(json.dumps(modules("Transformer", "Pooling", "Dense")))
    dense = model / "2_Dense"
    dense.mkdir()
    settings = {"in_features": WIDTH, "out_features": 6, "bias": True}
    change(dense / "config.json", **(settings | fields))
    weight = rng.standard_normal((6, WIDTH), np.float32)
    safetensors.save(
        dense / "model.safetensors", {"linear.weight": weight, "linear.bias": np.ones(6, np.float32)}
    )
    return model, weight


def test_a_dense_module_follows_the_pooling(
    directory: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model, weight = with_dense(directory, tmp_path, rng)
    encoder = nplora.load_encoder(model)
    assert encoder.dim == 6
    mean = nplora.load_encoder(directory).embed(TEXTS, normalize=False)
    np.testing.assert_allclose(encoder.embed(TEXTS), np.tanh(mean @ weight.T + 1), atol=1e-5)
    change(model / "2_Dense" / "config.json", activation_function="torch.nn.modules.linear.Identity")
    np.testing.assert_allclose(nplora.load_encoder(model).embed(TEXTS), mean @ weight.T + 1, atol=1e-4)
    change(model / "2_Dense" / "config.json", activation_function="os.system")
    with pytest.raises(UnsupportedError, match="activation_function is 'system', expected Identity or Tanh"):
        nplora.load_encoder(model)


def test_a_dense_module_of_another_shape_or_in_a_pickle_is_refused(
    directory: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model, _ = with_dense(directory, tmp_path, rng, out_features=7)
    with pytest.raises(
        FormatError, match=r"tensor linear.weight is float32 \(6, 32\), expected float32 \(7, 32\)"
    ):
        nplora.load_encoder(model)
    (model / "2_Dense" / "model.safetensors").rename(model / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="a pickle can run any code"):
        nplora.load_encoder(model)


@pytest.mark.parametrize(
    ("listed", "error", "words"),
    [
        ([], FormatError, "expected a list of 1 to 32 modules"),
        ([3], FormatError, "3, expected an object"),
        (modules("Pooling"), UnsupportedError, "the first module is 'Pooling', expected Transformer"),
        (modules("Transformer", "LSTM"), UnsupportedError, "module 'LSTM' is not supported at this position"),
        (modules("Transformer", "Normalize"), UnsupportedError, "module 'Normalize' is not supported at"),
        (modules("Transformer"), UnsupportedError, "no module Pooling"),
        ([{"type": "a.Transformer", "path": "../.."}], UnsafeError, "leads out of the directory"),
        ([{"type": "a.Transformer", "path": "/etc"}], UnsafeError, "leads out of the directory"),
        ([{"type": "a.Transformer", "path": "C:a"}], UnsafeError, "leads out of the directory"),
        ([{"type": "a.Transformer", "path": "a\0b"}], UnsafeError, "leads out of the directory"),
    ],
)
def test_bad_module_files_are_refused(
    listed: Any, error: type[Exception], words: str, directory: Path, tmp_path: Path
) -> None:
    model = copied(directory, tmp_path)
    (model / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(error, match=words):
        nplora.load_encoder(model)


@pytest.mark.parametrize(
    ("pooling", "error", "words"),
    [
        ([{}], UnsupportedError, "pooling_mode is {}, expected one of cls"),
        ({"a": 1}, UnsupportedError, "pooling_mode is .*, expected one of cls"),
        ([], FormatError, "pooling_mode is an empty list"),
        (["mean"] * 1000, FormatError, "names a pooling twice"),
    ],
)
def test_bad_poolings_are_refused(
    pooling: Any, error: type[Exception], words: str, directory: Path, tmp_path: Path
) -> None:
    model = copied(directory, tmp_path)
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    with pytest.raises(error, match=words):
        nplora.load_encoder(model)


def test_dense_modules_that_do_not_fit_are_refused(
    directory: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model, _ = with_dense(directory, tmp_path, rng, in_features=7)
    stored = model / "2_Dense" / "model.safetensors"
    bias = {"linear.bias": np.ones(6, np.float32)}
    safetensors.save(stored, {"linear.weight": np.ones((6, 7), np.float32)} | bias)
    with pytest.raises(FormatError, match=r"Dense module 1 .* in_features 7, but its input has 32 values"):
        nplora.load_encoder(model)
    safetensors.save(stored, bias)
    with pytest.raises(FormatError, match=r"there is no tensor linear\.weight"):
        nplora.load_encoder(model)
    change(model / "2_Dense" / "config.json", in_features=WIDTH)
    safetensors.save(stored, {"linear.weight": np.full((6, WIDTH), 1e300)} | bias)
    with pytest.raises(FormatError, match=r"tensor linear\.weight holds NaN or an infinity"):
        nplora.load_encoder(model)
    safetensors.save(stored, {"linear.weight": np.ones((6, WIDTH), np.float32)} | bias)
    shutil.copytree(model / "2_Dense", model / "3_Dense")
    (model / "modules.json").write_text(json.dumps(modules("Transformer", "Pooling", "Dense", "Dense")))
    with pytest.raises(FormatError, match=r"Dense module 2 .* in_features 32, but its input has 6 values"):
        nplora.load_encoder(model)
    change(model / "2_Dense" / "config.json", in_features=0)
    with pytest.raises(FormatError, match=r"out_features and in_features are \(6, 0\), expected at least 1"):
        nplora.load_encoder(model)


def test_pooled_parts_are_written_into_one_array_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are kept until the end would double the memory of the result."""
    import weakref

    encoder, pool = nplora.load_encoder(directory), Pooling.pool
    alive, most = list[weakref.ref[Any]](), 0

    def watched(self: Pooling, *given: Any) -> Any:
        nonlocal most
        most = max(most, sum(part() is not None for part in alive))
        made = pool(self, *given)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Pooling, "pool", watched)
    assert encoder.embed_ids([[2, 5, 3]] * 8, batch_size=1).shape == (8, encoder.dim)
    assert len(alive) == 8
    assert most <= 1


def test_a_second_embed_backward_adds_no_gradient(
    directory: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    encoder = nplora.load_encoder(with_dense(directory, tmp_path, rng)[0])
    encoder.add_lora(rank=2, targets=["query", "pooling.dense.0"], init="gaussian")
    vectors, saved = encoder.embed_forward([[2, 5, 3], [2, 6, 3]])
    encoder.embed_backward(vectors, saved)
    earlier = [p.grad.copy() for p in encoder.parameters()]
    with pytest.raises(RuntimeError, match=r"Encoder\.embed_backward: an earlier backward pass used"):
        encoder.embed_backward(vectors, saved)
    for parameter, before in zip(encoder.parameters(), earlier, strict=True):
        np.testing.assert_array_equal(parameter.grad, before)


class Probe(nplora.Module):
    """A trained head on an encoder."""

    def __init__(self, encoder: Encoder, weight: Array) -> None:
        self.encoder, self.head = encoder, nplora.Linear(weight, trainable=True)

    def forward(self, x: Any) -> tuple[Array, Any]:
        vectors, encoder = self.encoder.embed_forward(x)
        y, head = self.head.forward(vectors)
        return y, (encoder, head)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> None:
        encoder, head = saved
        self.encoder.embed_backward(self.head.backward(dy, head), encoder)


def test_a_frozen_encoder_may_be_a_part_of_a_model_that_is_trained(directory: Path) -> None:
    encoder, ids, rng = nplora.load_encoder(directory), [[2, 5, 3], [2, 6, 3]], np.random.default_rng(0)
    probe = Probe(encoder, rng.standard_normal((3, encoder.dim), np.float32))
    y, saved = probe.forward(ids)
    dy = rng.standard_normal(y.shape, np.float32)
    probe.backward(dy, saved)
    [trained] = probe.parameters()
    np.testing.assert_allclose(trained.grad, dy.T @ encoder.embed_forward(ids)[0], rtol=1e-5, atol=1e-5)
    states, kept = encoder.forward(ids)
    encoder.backward(states, kept)
    with pytest.raises(RuntimeError, match="an earlier backward pass used and freed the saved values"):
        probe.backward(dy, saved)


def test_without_pooling_information_a_message_says_what_is_assumed(tmp_path: Path) -> None:
    model = save_small_encoder(tmp_path / "model", pooling=None)
    with pytest.warns(UserWarning, match="name no pooling, so a text's embedding is the mean of its tokens"):
        encoder = nplora.load_encoder(model)
    assert encoder.pooling.modes == ("mean",)
    assert not encoder.pooling.normalize
    assert encoder.max_length == POSITIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nplora.load_encoder(model, pooling="cls").pooling.modes == ("cls",)
    with pytest.raises(ValueError, match="pooling='sum' is not available"):
        nplora.load_encoder(model, pooling="sum")


# ---- prompts and lengths ----


def test_a_prompt_is_put_before_each_text(directory: Path, tmp_path: Path) -> None:
    model = copied(directory, tmp_path)
    settings = model / "config_sentence_transformers.json"
    change(settings, prompts={"query": "query: ", "none": ""})
    encoder = nplora.load_encoder(model)
    plain, wanted = encoder.embed(["a cat"]), encoder.embed(["query: a cat"])
    assert not np.allclose(plain, wanted, atol=1e-3)
    assert np.array_equal(encoder.embed(["a cat"], prompt="query: "), wanted)
    assert np.array_equal(encoder.embed(["a cat"], prompt_name="query"), wanted)
    change(settings, default_prompt_name="query")
    encoder = nplora.load_encoder(model)
    assert np.array_equal(encoder.embed(["a cat"]), wanted)
    assert np.array_equal(encoder.embed(["a cat"], prompt=""), plain)
    with pytest.raises(ValueError, match="no prompt is named 'document'; the model has: 'query', 'none'"):
        encoder.embed(["a"], prompt_name="document")
    with pytest.raises(ValueError, match="prompt and prompt_name are both given"):
        encoder.embed(["a"], prompt="a", prompt_name="query")
    change(model / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(UnsupportedError, match="include_prompt is false"):
        nplora.load_encoder(model).embed(["a"])
    change(settings, default_prompt_name="other")
    with pytest.raises(FormatError, match="default_prompt_name is 'other', but no prompt has this name"):
        nplora.load_encoder(model)


def test_long_texts_are_cut_and_counted(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    texts = ["cat " * 100, "a cat", "dog " * 31, "cat " * 30]
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than 32 tokens, and were cut"):
        found = encoder.embed(texts)
    np.testing.assert_allclose(found[0], encoder.embed("cat " * 30), atol=1e-6)
    np.testing.assert_allclose(found[3], found[0], atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 1 text"):
        ids = encoder.encode(["a cat and a dog"], max_length=4)
    assert [WORDS[i] for i in ids[0]] == ["[CLS]", "a", "cat", "[SEP]"]
    with pytest.warns(UserWarning, match="1 of 1 text"):
        assert len(encoder.encode(["cat " * 400_000])[0]) == 32
    assert len(encoder.encode([" " * 400_000 + "a cat"])[0]) == 4  # its beginning has no tokens
    spaces = (
        " " * 33_692 + "a" + "s" * 149 + " cat cat cat"
    )  # the beginning that is read ends inside the word
    assert [WORDS[i] for i in encoder.encode([spaces])[0]] == ["[CLS]", "[UNK]", "cat", "cat", "cat", "[SEP]"]
    with pytest.raises(ValueError, match="max_length"):
        encoder.embed(TEXTS, max_length=POSITIONS + 1)
    with pytest.raises(ValueError, match="longest is 1, expected at least 2, the number of special tokens"):
        encoder.embed(TEXTS, max_length=1)


def test_the_length_is_that_of_the_tokenizer_if_no_other_file_has_it(directory: Path, tmp_path: Path) -> None:
    """sentence-transformers 6 writes max_seq_length as the tokenizer's model_max_length."""
    model = copied(directory, tmp_path)
    change(model / "tokenizer_config.json", model_max_length=16)
    assert nplora.load_encoder(model).max_length == 32  # of sentence_bert_config.json
    change(model / "sentence_bert_config.json", max_seq_length=None)
    assert nplora.load_encoder(model).max_length == 16
    for no_limit in (int(1e30), "16", True, 0):
        change(model / "tokenizer_config.json", model_max_length=no_limit)
        assert nplora.load_encoder(model).max_length == POSITIONS


def test_names_of_special_tokens_in_a_text_are_plain_text(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    assert encoder.encode(["[SEP]"])[0].count(WORDS.index("[SEP]")) == 1


# ---- what is refused ----


def test_wrong_texts_and_ids_are_refused(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    with pytest.raises(TypeError, match=r"texts\[1\] is a float, expected a text"):
        encoder.embed(["a", np.nan])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="texts is a int, expected a list of texts"):
        encoder.embed(3)  # type: ignore[arg-type]
    assert np.array_equal(encoder.embed(np.array(TEXTS)), encoder.embed(TEXTS))
    assert np.array_equal(encoder.embed(text for text in TEXTS), encoder.embed(TEXTS))
    with pytest.raises(ValueError, match="surrogate"):
        encoder.embed(["\ud800"])
    with pytest.raises(ValueError, match=r"ids\[1\] have shape \(0,\), expected 1 to 64 token ids"):
        encoder.hidden_states([[2, 3], np.empty(0, np.int64)])
    with pytest.raises(ValueError, match=r"ids\[0\] have shape \(65,\)"):
        encoder.hidden_states([[2] * 65])
    with pytest.raises(ValueError, match="ids"):
        encoder.hidden_states([[2, len(WORDS)]])
    with pytest.raises(TypeError, match=r"ids\[0\]"):
        encoder.hidden_states([[0.5]])  # type: ignore[list-item]


def test_wrong_configurations_are_refused(tmp_path: Path) -> None:
    for changes, error, words in (
        ({"is_decoder": True}, UnsupportedError, "is_decoder is set"),
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type is"),
        ({"hidden_act": "relu"}, UnsupportedError, "hidden_act is 'relu', expected one of"),
        (
            {"num_attention_heads": 5},
            FormatError,
            "hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        ({"num_attention_heads": 0}, FormatError, "num_attention_heads is 0"),
        ({"num_hidden_layers": 10**9}, FormatError, "layers, expected 1 to"),
        ({"layer_norm_eps": 0.0}, FormatError, "layer_norm_eps is 0.0"),
        ({"max_position_embeddings": 0}, FormatError, "max_position_embeddings is 0"),
        ({"vocab_size": 30}, FormatError, "word_embeddings.weight' has shape"),
        ({"model_type": "t5"}, UnsupportedError, "expected one of bert, distilbert, gemma3_text"),
    ):
        model = save_small_encoder(tmp_path / "model", **changes)
        with pytest.raises(error, match=words):
            nplora.load_encoder(model)


def test_tensors_that_the_configuration_does_not_explain_are_refused(directory: Path, tmp_path: Path) -> None:
    model = copied(directory, tmp_path)
    found = tensors()
    safetensors.save(
        model / "model.safetensors", found | {"encoder.layer.0.other.weight": np.ones(2, np.float32)}
    )
    with pytest.raises(FormatError, match=r"'encoder\.layer\.0\.other\.weight' is not used by bert"):
        nplora.load_encoder(model)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in found.items()
    }
    pooler = {"pooler.dense.weight": np.ones((WIDTH, WIDTH), np.float32)}
    safetensors.save(model / "model.safetensors", old | pooler)
    wanted = nplora.load_encoder(directory).embed(TEXTS)
    assert np.array_equal(nplora.load_encoder(model).embed(TEXTS), wanted)


def test_a_language_model_is_not_loaded_as_an_encoder_by_load_model(directory: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model_type is 'bert', .*nplora\.load_encoder reads"):
        nplora.load_model(directory)


# ---- adapters ----


def test_only_layers_that_are_trained_take_an_adapter(directory: Path) -> None:
    encoder = nplora.load_encoder(directory)
    for target in ("position_embeddings", "LayerNorm", "q_proj"):
        with pytest.raises(ValueError, match=f"the model has no layer '{target}'"):
            encoder.add_lora(targets=target)
    assert encoder.num_parameters == sum(array.size for array in tensors().values())
    encoder.add_lora(rank=2, targets="word_embeddings,output.dense", layers="last:1")
    assert list(encoder.adapter_layers()) == [
        "embeddings.word_embeddings",
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
    ]


def test_an_adapter_is_saved_merged_and_refused_by_another_model(directory: Path, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(directory)
    plain = encoder.embed(TEXTS)
    encoder.add_lora(rank=2, targets="query,value,dense", layers="first:1", init="gaussian")
    changed = encoder.embed(TEXTS)
    assert not np.allclose(changed, plain, atol=1e-3)
    nplora.save_adapter(encoder, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "FEATURE_EXTRACTION"
    other = nplora.load_encoder(directory)
    nplora.read_adapter(tmp_path / "adapter").attach(other)
    assert np.array_equal(other.embed(TEXTS), changed)
    with encoder.disable_adapter():
        np.testing.assert_allclose(encoder.embed(TEXTS), plain, atol=1e-6)
    encoder.merge_and_unload()
    np.testing.assert_allclose(encoder.embed(TEXTS), changed, atol=1e-5)

    model = copied(directory, tmp_path)
    safetensors.save(model / "model.safetensors", tensors(seed=1))
    with pytest.raises(FormatError, match="another model"):
        nplora.read_adapter(tmp_path / "adapter").attach(nplora.load_encoder(model))


def test_embed_backward_is_the_slope_of_the_embeddings(directory: Path, rng: np.random.Generator) -> None:
    encoder = nplora.load_encoder(directory)
    encoder.add_lora(rank=2, init="gaussian")
    texts = some_ids()
    vectors, saved = encoder.embed_forward(texts)
    np.testing.assert_allclose(vectors, encoder.embed_ids(texts), atol=1e-6)
    c = rng.standard_normal(vectors.shape, np.float32)
    encoder.embed_backward(c, saved)
    with pytest.raises(RuntimeError, match="an earlier backward pass used and freed"):
        encoder.embed_backward(c, saved)
    slopes, gradients = [], []
    for parameter in encoder.parameters()[::5]:
        direction = rng.standard_normal(parameter.value.shape, np.float32)
        before, values = parameter.value.copy(), []
        for sign in (1, -1):
            parameter.value[...] = before + sign * np.float32(1e-3) * direction
            values.append(float((c * encoder.embed_ids(texts)).sum(dtype=np.float64)))
        parameter.value[...] = before
        slopes.append((values[0] - values[1]) / 2e-3)
        gradients.append(float((parameter.grad * direction).sum(dtype=np.float64)))
    np.testing.assert_allclose(gradients, slopes, rtol=0.02, atol=0.02 * np.abs(slopes).max())


# ---- language models as encoders ----


def test_a_language_model_embeds_by_its_last_token(tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    with pytest.warns(UserWarning, match="a text's embedding is its last token"):
        encoder = nplora.load_encoder(path)
    lm = nplora.load_model(path)
    ids = [[1, 5, 9], [7], [3, 4]]
    states = encoder.hidden_states(ids)
    for one, text in zip(states, ids, strict=True):
        np.testing.assert_allclose(one @ lm.lm_head.weight.to_numpy().T, lm.logits(text), atol=1e-4)
    assert np.array_equal(encoder.embed_ids(ids), np.stack([one[-1] for one in states]))
    encoder.add_lora(rank=2, targets="q_proj,down_proj", layers="last:1")
    assert list(encoder.adapter_layers()) == ["layers.2.self_attn.q_proj", "layers.2.mlp.down_proj"]
    vectors, saved = encoder.embed_forward(ids)
    encoder.embed_backward(vectors, saved)
    assert encoder.parameters()[0].grad.any()


def test_tensors_of_a_head_can_be_read(directory: Path, tmp_path: Path) -> None:
    model = copied(directory, tmp_path)
    pooler = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
    named = {f"bert.{name}": array for name, array in tensors().items()}
    extra = {"bert.pooler.dense.weight": pooler, "classifier.bias": np.ones(2, np.float32)}
    safetensors.save(model / "model.safetensors", named | extra)
    encoder = nplora.load_encoder(model)
    for name in ("pooler.dense.weight", "bert.pooler.dense.weight"):
        found = encoder.head_tensor(name)
        assert found is not None
        assert np.array_equal(found, pooler)
    assert encoder.head_tensor("classifier.bias") is not None
    assert encoder.head_tensor("classifier.weight") is None
