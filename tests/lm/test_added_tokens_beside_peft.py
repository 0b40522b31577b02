"""New tokens beside transformers and PEFT: the same tokens, logits, losses and gradients; files both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.adapters import Adapter
from nplora.finetuning import attach_adapter
from nplora.lm import LanguageModel
from nplora.models.packing import pack
from vocabularies import byte_level

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
torch_models = pytest.importorskip("torch_models")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*has copies of the base model's weights"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-3  # as in test_torch
TEXTS = ("hello <tool>123</tool> 12", "<tool><tool>x", "no token, 12 hello", "</tool> hello</tool>")
NEW = ["<tool>", "</tool>"]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def vocabulary() -> list[str]:
    return list(byte_level()["tokenizer.ggml.tokens"][:-1])  # the last one is <tool>


def save_model(family: str, directory: Path, padding: int = 0) -> Path:
    """A random model with a byte-level tokenizer, as transformers saves them."""
    tokens, metadata = vocabulary(), byte_level()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokens[0]])
    torch_models.make(family, vocab_size=len(tokens) + padding).save_pretrained(directory)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0])
    fast.save_pretrained(directory)
    return directory


def resized(directory: Path, multiple: int | None = None) -> tuple[Any, Any]:
    """Their model and tokenizer with the new tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert tokenizer.add_tokens(NEW) == 2
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    return model, tokenizer


def adapted(model: Any, directory: Path, tokenizer: Any, **options: Any) -> Any:
    """Their model with a random adapter, which is saved with the tokenizer."""
    linears = sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if n.endswith("_proj")})
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": linears, **options}
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return made


def batch_of(tokenizer: Any, length: int = 16) -> Array:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    return np.array([(row * length)[:length] for row in ids])


def logits_of(model: Any, ids: Array) -> Array:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()  # type: ignore[no-any-return]


def gradients_of(model: Any) -> dict[str, Array]:
    """Their gradients of the rows and factors, by our parameters' names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.removeprefix("base_model.model.")
            for part, ending in (
                (".token_adapter.", "rows"), (".modules_to_save.", "weight"),
                (".lora_A.", "B"), (".lora_B.", "A"),
            ):  # fmt: skip
                if part in layer:
                    found[f"{layer.partition(part)[0]}.{ending}"] = parameter.grad.numpy()
    return found


def both(ids: list[int]) -> dict[str, list[int]]:
    return {"embed_tokens": ids, "lm_head": ids}


@pytest.mark.parametrize(
    ("family", "padding"), [("llama", 0), ("llama", 5), ("qwen2", 0), ("qwen2", 5), ("gemma3", 0)]
)
def test_added_tokens_are_those_of_peft_in_float64(
    family: str, padding: int, tmp_path: Path, figure: Figure
) -> None:
    """Untied, tied, and tied with scaled embeddings. With padding, the tokens take rows that exist."""
    path = save_model(family, tmp_path / "base", padding)
    ours = nplora.load_model(path)
    model, tokenizer = resized(path)
    ids = batch_of(tokenizer)
    count = len(vocabulary())
    indices: Any = [count, count + 1] if ours.ties_head else both([count, count + 1])
    ours.add_lora(rank=4, alpha=6, add_tokens=NEW)
    assert [ours.tokenizer.encode(text) for text in TEXTS] == [
        tokenizer.encode(text, add_special_tokens=False) for text in TEXTS
    ]
    assert ours.vocab_size == model.config.vocab_size == count + max(2, padding)
    if not padding:  # the mean of all rows; theirs has noise of the rows' covariance times 1e-9
        rows = model.get_input_embeddings().weight[count:].detach().numpy()
        np.testing.assert_allclose(ours.model.embed_tokens.rows.value, rows, rtol=0, atol=5e-5)
        rows = model.get_output_embeddings().weight[count:].detach().numpy()
        np.testing.assert_allclose(ours.lm_head.rows.value, rows, rtol=0, atol=5e-5)

    theirs = adapted(model, tmp_path / "theirs", tokenizer, trainable_token_indices=indices)
    nplora.load_adapter(ours, tmp_path / "theirs")
    theirs.double()
    expected = logits_of(theirs, ids)
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=TOLERANCE)
    labels = ids.copy()
    labels[0, :5] = -100
    loss = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    batch = pack(zip(ids, labels, strict=True))
    total = ours.forward_backward(batch, 1 / batch.num_targets)
    assert total / batch.num_targets == pytest.approx(loss.item(), abs=1e-5)
    wanted, found = gradients_of(theirs), {p.name: p.grad for p in ours.parameters()}
    assert wanted.keys() == found.keys()
    errors = [np.abs(found[name] - want).max() / np.abs(want).max() for name, want in wanted.items()]
    figure("error of a gradient with added tokens, relative to float64", max(errors))
    assert max(errors) < 5e-5

    logits, saved = ours.forward(ids)
    assert saved is not None
    ours.zero_grad()
    theirs.zero_grad()
    dlogits = torch.randn(*logits.shape, dtype=torch.float64)
    theirs(torch.from_numpy(ids)).logits.backward(dlogits)
    ours.backward(dlogits.numpy(), saved)
    found, wanted = {p.name: p.grad for p in ours.parameters()}, gradients_of(theirs)
    assert max(np.abs(found[name] - want).max() / np.abs(want).max() for name, want in wanted.items()) < 5e-5

    twin = nplora.load_model(path)
    attach_adapter(twin, tmp_path / "theirs")
    np.testing.assert_array_equal(twin.logits(ids), ours.logits(ids))
    assert twin.tokenizer.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0], add_special_tokens=False)

    nplora.save_adapter(ours, tmp_path / "ours", str(path))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.decode(ids[0]) == tokenizer.decode(ids[0])
    base = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    if len(again) > base.config.vocab_size:
        base.resize_token_embeddings(len(again))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    np.testing.assert_allclose(logits_of(loaded, ids), expected, rtol=0, atol=TOLERANCE)
    nplora.merge_adapter(path, tmp_path / "ours", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == ours.vocab_size
    np.testing.assert_allclose(logits_of(merged, ids), expected, rtol=0, atol=TOLERANCE)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(logits_of(automatic, ids), expected, rtol=0, atol=TOLERANCE)


COUNT = len(vocabulary())
# how PEFT trains the new rows; the multiple of rows that the embedding is padded to
FORMS: dict[str, tuple[dict[str, Any], int | None]] = {
    "tokens of the embedding alone": ({"trainable_token_indices": [COUNT, COUNT + 1]}, None),
    "padded to a multiple": ({"trainable_token_indices": both([COUNT, COUNT + 1])}, 32),
    "one of two tokens": ({"trainable_token_indices": both([COUNT + 1])}, None),
    "embedding and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "embedding and head, padded": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 32),
    "the embedding": ({"modules_to_save": ["embed_tokens"]}, None),
    "the head": ({"modules_to_save": ["lm_head"]}, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_resized_model_of_peft_is_read(family: str, form: str, tmp_path: Path) -> None:
    """PEFT stores copies of the frozen rows, which hold those rows that nobody trained."""
    options, multiple = FORMS[form]
    if family == "qwen2" and form in ("the embedding", "the head"):
        options = options | {"ensure_weight_tying": True}
    path = save_model(family, tmp_path / "base")
    model, tokenizer = resized(path, multiple)
    theirs = adapted(model, tmp_path / "theirs", tokenizer, **options)
    ids = batch_of(tokenizer)
    expected = logits_of(theirs, ids)
    ours = nplora.load_model(path)
    attach_adapter(ours, tmp_path / "theirs")
    assert ours.vocab_size == model.config.vocab_size
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=TOLERANCE)
    assert [ours.tokenizer.encode(text) for text in TEXTS] == [
        tokenizer.encode(text, add_special_tokens=False) for text in TEXTS
    ]
    nplora.save_adapter(ours, tmp_path / "ours")
    again = nplora.load_model(path).with_adapter(Adapter.read(tmp_path / "ours"))
    np.testing.assert_array_equal(again.logits(ids), ours.logits(ids))
    base = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    base.resize_token_embeddings(ours.vocab_size)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    np.testing.assert_allclose(logits_of(loaded, ids), expected, rtol=0, atol=TOLERANCE)


def test_training_with_added_tokens_is_that_of_peft(tmp_path: Path) -> None:
    path = save_model("qwen2", tmp_path / "base")
    model, tokenizer = resized(path)
    ours: LanguageModel = nplora.load_model(path)
    options: dict[str, Any] = {"trainable_token_indices": [COUNT, COUNT + 1], "target_modules": ["q_proj"]}
    theirs = adapted(model, tmp_path / "theirs", tokenizer, **options)
    ours.add_lora(rank=4, alpha=6, targets="q_proj", add_tokens=NEW)
    nplora.load_adapter(ours, tmp_path / "theirs")
    ids = batch_of(tokenizer)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    trained = [p for p in theirs.parameters() if p.requires_grad]
    theirs_optimizer, optimizer = torch.optim.AdamW(trained, **settings), nplora.AdamW(**settings)
    for _ in range(8):
        loss = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
        theirs_optimizer.zero_grad()
        loss.backward()
        theirs_optimizer.step()
        assert ours.train_step(ids, ids, optimizer) == pytest.approx(loss.item(), abs=1e-3)
