"""Encoders against transformers and PEFT: hidden states, gradients, adapters both ways."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.formats.errors import UnsupportedError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import torch_encoders  # noqa: E402
import torch_models  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*name no pooling:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

Array = np.ndarray[Any, Any]
KINDS = list(torch_encoders.KINDS)

# Hidden states are of the order of 1, because a norm ends each model. They are sums of at most 150 float32
# products, in three to five blocks one after the other.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # relative to the largest element of a factor's gradient


def saved(kind: str, directory: Path) -> tuple[Any, nplora.Encoder]:
    """transformers' model in float64, and ours from its float32 files."""
    theirs = torch_encoders.make(kind)
    ours = nplora.load_encoder(torch_encoders.save(theirs, directory))
    return theirs.double(), ours


def linear_names(model: Any) -> list[str]:
    """The names of all linear layers of the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layer" in name
    ]


def adapted(theirs: Any, ours: nplora.Encoder, directory: Path, targets: list[str], **options: Any) -> Any:
    """PEFT's model with random factors, which ours has loaded."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets, **options}
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="FEATURE_EXTRACTION", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "theirs", save_embedding_layers=False)
    ours.add_lora(rank=4, alpha=6, targets=targets, use_dora=settings.get("use_dora", False))
    nplora.load_adapter(ours, directory / "theirs")
    return model


def assert_gradients_agree(ours: nplora.Encoder, model: Any) -> float:
    """Returns the largest error of a factor's gradient, relative to its largest element."""
    found = {p.name: p.grad for p in ours.parameters()}
    errors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            key, wanted = (
                "A" if ".lora_B" in name else "m" if "magnitude" in name else "B",
                parameter.grad.numpy(),
            )
            if "embedding" in name:  # their factors are transposed
                key, wanted = "A" if "embedding_A" in name else "B", wanted.T
            errors[f"{module}.{key}"] = np.abs(found[f"{module}.{key}"] - wanted).max() / np.abs(wanted).max()
    assert errors.keys() == found.keys()
    assert all(error <= GRADIENT_TOLERANCE for error in errors.values()), errors
    return float(max(errors.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_gradients_are_those_of_torch(kind: str, tmp_path: Path, figure: Figure) -> None:
    theirs, ours = saved(kind, tmp_path)
    model = adapted(theirs, ours, tmp_path, linear_names(theirs))
    texts, rng = torch_encoders.some_texts(), np.random.default_rng(0)
    dy = rng.standard_normal((sum(map(len, texts)), 48), np.float32)
    starts = np.cumsum([0, *map(len, texts)])
    states, kept = ours.forward(texts)
    ours.backward(dy, kept)
    total, worst = 0.0, 0.0
    for ids, first, end in zip(texts, starts[:-1], starts[1:], strict=True):
        theirs_states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        worst = max(worst, np.abs(states[first:end] - theirs_states.detach().numpy()).max())
        total = total + (theirs_states * torch.from_numpy(dy[first:end])).sum()
    assert worst <= TOLERANCE
    total.backward()
    figure("error of a hidden state", worst)
    figure("error of a gradient of an encoder, relative", assert_gradients_agree(ours, model))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_gradients_of_dora_and_of_the_embedding_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    for names, options in (((), {"use_dora": True}), (("word_embeddings", "tok_embeddings"), {})):
        theirs, ours = saved(kind, tmp_path)
        linears = [name for name in linear_names(theirs) if "att" in name]
        embeddings = [name for name, _ in theirs.named_modules() if name.endswith(tuple(names))]
        targets = embeddings or linears
        model = adapted(theirs, ours, tmp_path, targets, **options)
        ours.model.recompute = True
        texts = torch_encoders.some_texts()
        states, kept = ours.forward(texts)
        ours.backward(states, kept)
        total = sum((model(input_ids=torch.tensor([ids])).last_hidden_state ** 2 / 2).sum() for ids in texts)
        total.backward()
        assert_gradients_agree(ours, model)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "mpnet", "modernbert"])
def test_an_adapter_of_ours_gives_the_same_hidden_states_in_peft(kind: str, tmp_path: Path) -> None:
    theirs, ours = saved(kind, tmp_path / "model")
    ours.add_lora(rank=3, init="gaussian", layers="last:2")
    for layer in ours.adapter_layers().values():
        layer.A[...] *= np.float32(0.03)  # type: ignore[attr-defined]  # large factors magnify rounding
    nplora.save_adapter(ours, tmp_path / "adapter")
    texts = torch_encoders.some_texts()
    plain = torch_encoders.hidden_states(theirs, texts)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    wanted = torch_encoders.hidden_states(model, texts)
    assert max(abs(a - b).max() for a, b in zip(plain, wanted, strict=True)) > 100 * TOLERANCE
    for one, other in zip(ours.hidden_states(texts), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5 * TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "distilbert", "mpnet", "modernbert"])
def test_the_files_of_a_model_with_a_head_are_read(kind: str, tmp_path: Path) -> None:
    theirs = torch_encoders.make(kind, "ForMaskedLM")
    ours = nplora.load_encoder(torch_encoders.save(theirs, tmp_path))
    texts = torch_encoders.some_texts()[:2]
    inner = theirs.base_model.double()
    for one, other in zip(ours.hidden_states(texts), torch_encoders.hidden_states(inner, texts), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "with_head", "changes"),
    [
        ("qwen3", True, {}),
        ("qwen3", False, {}),
        ("granite", True, {}),
        ("gemma3", False, {"use_bidirectional_attention": True}),  # EmbeddingGemma
    ],
)
def test_a_language_model_is_read_as_an_encoder(
    family: str, with_head: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = torch_models.make(family, **changes)
    (theirs if with_head else theirs.model).save_pretrained(tmp_path)
    window = getattr(theirs.config, "sliding_window", None)
    if changes:  # transformers halves the window when it reads the file, and saves the half
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 2 * (window - 1)}))
        with pytest.raises(UnsupportedError, match="the model is not causal"):
            nplora.load_model(tmp_path)
    ours = nplora.load_encoder(tmp_path)
    texts = torch_encoders.some_texts(longest=60)
    wanted = torch_encoders.hidden_states(theirs.model.double(), texts)
    for one, other in zip(ours.hidden_states(texts), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    if not changes and with_head:
        lm, ids = nplora.load_model(tmp_path), np.array(texts[0])
        np.testing.assert_allclose(lm.hidden_states(ids), wanted[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(lm.hidden_states([ids, ids])[1], wanted[0], rtol=0, atol=1e-4)


def trained_tokenizer(kind: str, directory: Path) -> None:
    """Write a small tokenizer of XLM-R's kind (Unigram) or of RoBERTa's (byte-level BPE)."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    if kind == "unigram":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    else:
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.enable_truncation(7)
    backend.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_texts_become_tokens_and_are_cut_as_in_transformers(kind: str, tmp_path: Path) -> None:
    model = torch_encoders.make("xlm-roberta", vocab_size=300, max_position_embeddings=34)
    ours = nplora.load_encoder(torch_encoders.save(model, tmp_path))
    trained_tokenizer(kind, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ["def test", "a text that is far longer than thirty-two tokens, " * 9, "", "ünknöwn 中文"]
    with pytest.warns(UserWarning, match="1 of 4 texts are longer than 32 tokens"):
        found = ours.encode(texts)
    assert found == [theirs(text, truncation=True, max_length=32).input_ids for text in texts]
    assert len(found[1]) == 32
