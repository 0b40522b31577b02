"""Preference objectives against TRL: losses, gradients and metrics of the same pairs and judged answers."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import FinetuneOptions
from nplora.finetuning.data.batches import TokenBatches
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.objectives import objective_of
from nplora.formats import files

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL and its libraries

Array = np.ndarray[Any, Any]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# TRL computes in float64 here, and ours in float32: sums of at most 72 products, three blocks deep.
LOSS, GRADIENT = 1e-5, 1e-5
PAIRS = [
    {"prompt": "What is 2+2?", "chosen": " It is four.", "rejected": " 5"},
    {"prompt": "Say hello", "chosen": "!", "rejected": " in a very long and tedious way"},
    {"prompt": "A", "chosen": " B", "rejected": " C D"},
    {"prompt": "The sky is", "chosen": " blue today", "rejected": " green"},
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for number, row in enumerate(PAIRS)
    for side in (("chosen", "rejected")[: 1 + number % 2])
]
# TRL pairs each prompt with the answer in the row before, also if that answer belongs to the same prompt.
ONE_EACH = [row for number, row in enumerate(JUDGED) if row["prompt"] != JUDGED[number - 1]["prompt"]]


def save_model(directory: Path) -> Path:
    """A small Llama with a byte-level tokenizer, as a Hugging Face directory."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "<|end|>", "<|pad|>"])}
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=48, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        eos_token_id=vocab["<|end|>"], bos_token_id=None, pad_token_id=vocab["<|pad|>"],
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trainer_of(kind: str, model: Path, rows: list[dict[str, Any]], output: Path) -> Any:
    """TRL's trainer in float64, with random factors, which are saved in output/adapter."""
    import peft
    import trl

    settings = {"output_dir": str(output), "report_to": [], "use_cpu": True, "bf16": False}
    settings |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    if kind == "orpo":
        from trl.experimental import orpo

        made, config = orpo.ORPOTrainer, orpo.ORPOConfig(**settings)
    elif kind == "kto":
        made, config = trl.KTOTrainer, trl.KTOConfig(**settings, train_sampling_strategy="sequential")
    else:
        made, config = trl.DPOTrainer, trl.DPOConfig(**settings)
    trainer = made(
        transformers.AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=TARGETS),
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    trainer.model.save_pretrained(output / "adapter", save_embedding_layers=False)
    trainer.model.double()
    return trainer


@pytest.fixture(scope="module")
def theirs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainers by objective. They are made once, because that takes a second."""
    made: dict[str, Any] = {}

    def of(kind: str) -> Any:
        if kind not in made:
            rows = ONE_EACH if kind == "kto" else PAIRS
            made[kind] = trainer_of(kind, model, [dict(row) for row in rows], tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def ours_of(model: Path, trainer: Any, output: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    """Our model with the trainer's factors, one batch of all rows, and the loss of the objective."""
    lm = nplora.load_model(model)
    chosen = FinetuneOptions(rank=4, alpha=6.0, targets=tuple(TARGETS), **options)
    objective = objective_of(chosen)
    dataset = objective.read("finetune", sources_of("finetune", rows), lm.tokenizer, chosen.reading(64))
    batches = TokenBatches(dataset, batch_examples=len(dataset), shuffle=False)
    output.mkdir(exist_ok=True)
    with files.Directory(output) as directory:
        objective.prepare(lm, [batches], directory, lambda text: None)
    lm.add_lora(rank=4, alpha=6, targets=TARGETS)
    nplora.load_adapter(lm, Path(trainer.args.output_dir) / "adapter")
    [(x, y)] = batches.epoch(0)
    return SimpleNamespace(lm=lm, x=x, y=y, loss=objective.loss(None), dataset=dataset)


def padded(sequences: list[Array], value: int) -> Any:
    longest = max(map(len, sequences))
    return torch.tensor(
        np.stack([np.pad(s, (0, longest - len(s)), constant_values=value) for s in sequences])
    )


def split(x: Any) -> list[tuple[Array, Array]]:
    """The ids of each sequence of a packed batch, and whether each token is a target."""
    is_target = np.concatenate([[False], x.targets[:-1] >= 0])
    spans = itertools.pairwise(x.starts.tolist())
    return [(x.ids[begin:end], is_target[begin:end]) for begin, end in spans]


def dpo_inputs(x: Any) -> dict[str, Any]:
    """A packed batch of pairs as TRL's collator makes it: all chosen sequences, then all rejected ones."""
    sequences = split(x)
    ordered = sequences[::2] + sequences[1::2]
    return {
        "input_ids": padded([ids for ids, _ in ordered], 257),
        "attention_mask": padded([np.ones(len(ids), int) for ids, _ in ordered], 0),
        "completion_mask": padded([mask.astype(int) for _, mask in ordered], 0),
    }


def mismatched(sequences: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """Each prompt with the nearest answer before it, in a circle, that belongs to another prompt."""
    sides = [(ids[~is_answer], ids[is_answer]) for ids, is_answer in sequences]
    found = []
    for number, (prompt, _) in enumerate(sides):
        before = [sides[number - step] for step in range(1, len(sides))]
        answer = next(answer for other, answer in before if not np.array_equal(other, prompt))
        is_answer = np.arange(len(prompt) + len(answer)) >= len(prompt)
        found.append((np.concatenate([prompt, answer]), is_answer))
    return found


def kto_inputs(x: Any, y: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"label": torch.tensor(y.good)}
    for prefix, sequences in (("", split(x)), ("KL_", mismatched(split(x)))):
        found |= {
            f"{prefix}input_ids": padded([ids for ids, _ in sequences], 257),
            f"{prefix}attention_mask": padded([np.ones(len(ids), int) for ids, _ in sequences], 0),
            f"{prefix}completion_mask": padded([mask.astype(int) for _, mask in sequences], 0),
        }
    return found


def orpo_inputs(x: Any, is_answer: Array) -> dict[str, Any]:
    answer = np.concatenate([[False], is_answer[:-1]])
    found: dict[str, Any] = {}
    spans = list(itertools.pairwise(x.starts.tolist()))
    for side, part in (("chosen", spans[::2]), ("rejected", spans[1::2])):
        ids = [x.ids[begin:end] for begin, end in part]
        labels = [np.where(answer[begin:end], x.ids[begin:end], -100) for begin, end in part]
        found |= {
            f"{side}_input_ids": padded(ids, 257),
            f"{side}_attention_mask": padded([np.ones(len(one), int) for one in ids], 0),
            f"{side}_labels": padded(labels, -100),
        }
    return found


def gradients(trainer: Any) -> dict[str, Array]:
    """The gradients of PEFT's factors by our names. PEFT's A is our B."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{module}.{'B' if factor.startswith('A') else 'A'}"] = parameter.grad.numpy()
    return found


def assert_same(trainer: Any, value: Any, ours: Any) -> None:
    """The loss and all gradients agree."""
    trainer.model.zero_grad()
    value.backward()
    count = ours.loss.count(ours.x, ours.y)
    ours.lm.zero_grad()
    total = ours.loss.forward_backward(ours.lm, ours.x, ours.y, 1 / count)
    assert total / count == pytest.approx(value.item(), rel=LOSS)
    wanted, found = gradients(trainer), {p.name: p.grad for p in ours.lm.parameters()}
    assert wanted.keys() == found.keys()
    largest = max(np.linalg.norm(gradient) for gradient in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        assert np.linalg.norm(found[name] - gradient) <= GRADIENT * np.linalg.norm(gradient) + 1e-7, name


def metrics_of(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same_metrics(trainer: Any, ours: Any, *others: str) -> None:
    found = ours.loss.take_metrics()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", *others):
        assert found[name] == pytest.approx(metrics_of(trainer)[name], rel=1e-4, abs=1e-6), name


# Ours, and TRL's options for the same loss. TRL has no conservative DPO, but its "aot" of one pair is that.
DPO: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"beta": 0.5}, {"beta": 0.5}),
    ({"loss_type": "hinge", "beta": 0.3}, {"loss_types": ["hinge"], "beta": 0.3}),
    ({"loss_type": "ipo"}, {"loss_types": ["ipo"]}),
    ({"loss_type": "sigmoid_norm", "beta": 2.0}, {"loss_types": ["sigmoid_norm"], "beta": 2.0}),
    ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ({"label_smoothing": 0.3}, {"loss_types": ["aot"], "label_smoothing": 0.3}),
]
DEFAULTS = {"loss_types": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0}


@pytest.mark.parametrize(("options", "same"), DPO, ids=str)
def test_dpo_is_trl_s(
    options: dict[str, Any], same: dict[str, Any], model: Path, theirs: Any, tmp_path: Path
) -> None:
    trainer = theirs("dpo")
    vars(trainer).update(DEFAULTS | same)
    rows = PAIRS[:1] if "aot" in same.get("loss_types", []) else PAIRS
    ours = ours_of(model, trainer, tmp_path, rows, objective="dpo", **options)
    assert_same(trainer, trainer._compute_loss(trainer.model, dpo_inputs(ours.x), False), ours)
    assert_same_metrics(trainer, ours, "rewards/accuracies")


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_is_trl_s(beta: float, model: Path, theirs: Any, tmp_path: Path) -> None:
    trainer = theirs("orpo")
    trainer.beta = beta
    ours = ours_of(model, trainer, tmp_path, PAIRS, objective="orpo", beta=beta)
    value, metrics = trainer.get_batch_loss_metrics(trainer.model, orpo_inputs(ours.x, ours.y.is_answer))
    assert_same(trainer, value, ours)
    found = ours.loss.take_metrics()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "nll_loss"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
def test_kto_is_trl_s(options: dict[str, Any], model: Path, theirs: Any, tmp_path: Path) -> None:
    trainer = theirs("kto")
    defaults = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    vars(trainer).update(defaults | options)
    trainer.calculate_KL = trainer.loss_type == "kto"
    ours = ours_of(model, trainer, tmp_path, JUDGED, objective="kto", **options)
    assert_same(trainer, trainer._compute_loss(trainer.model, kto_inputs(ours.x, ours.y), False), ours)
    assert_same_metrics(trainer, ours, *(["kl"] if trainer.calculate_KL else []))
    if trainer.calculate_KL:
        assert metrics_of(trainer)["kl"] > 0, "a KL of 0 would not show whether it is right"


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_trl_tokenises_the_same_rows_as_the_same_batch(
    kind: str, model: Path, theirs: Any, tmp_path: Path
) -> None:
    """The batch is TRL's own, from the rows to the collator."""
    trainer = theirs(kind)
    vars(trainer).update({"beta": 0.1, "label_smoothing": 0.0})
    vars(trainer).update({"loss_type": "kto", "calculate_KL": True} if kind == "kto" else DEFAULTS)
    rows = ONE_EACH if kind == "kto" else PAIRS
    ours = ours_of(model, trainer, tmp_path, rows, objective=kind)
    examples = [trainer.train_dataset[index] for index in range(len(rows))]
    batch = trainer.data_collator(examples)
    made = kto_inputs(ours.x, ours.y) if kind == "kto" else dpo_inputs(ours.x)
    for name, tensor in made.items():
        assert torch.equal(tensor, batch[name]), name
    assert_same(trainer, trainer._compute_loss(trainer.model, batch, False), ours)
