"""lm-evaluation-harness: our model class against the harness's own class for transformers.

CI does not install the harness, which has 30 dependencies: pip install lm_eval torch transformers accelerate
`test_harness_model.py` tests the class without the harness.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import nplora

os.environ.setdefault("HF_HUB_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATED = """
task: generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["z", "7"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
"""
# Some questions are empty, and some texts are longer than the model's context of 48 tokens.
ROWS = [
    {
        "question": f"what is {n} + {n}?{' ' * (n % 2)}" * (n % 3),
        "choices": [str(2 * n), f"it is {2 * n + 1}", "no idea" * (1 + n % 4)],
        "answer": n % 3,
        "text": f"{n} and {n} are {2 * n}. " * (n + 1),
    }
    for n in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of transformers with a tokenizer of bytes, and an adapter in PEFT's format."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, bos_token_id=None,
        eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("generated", GENERATED), ("rolling", ROLLING)):
        (directory / f"{name}.yaml").write_text(text.format(data=directory / "rows.jsonl"))
    return directory


def results(lm: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The metrics and the samples of all tasks."""
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tasks / "cache")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["choice", "generated", "rolling"]
    found = lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    return found["results"], found["samples"]


def test_every_request_has_the_result_of_the_harness_with_transformers(
    model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from nplora.finetuning.judging.harness import NploraLM

    theirs, their_samples = results(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1), tasks, monkeypatch
    )
    ours, our_samples = results(NploraLM(model), tasks, monkeypatch)
    for task, found in theirs.items():
        for name, value in found.items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-4), f"{task} {name}"
    assert 0 < theirs["choice"]["acc,none"] < 1
    for task, samples in their_samples.items():
        for one, other in zip(our_samples[task], samples, strict=True):
            assert one["doc_id"] == other["doc_id"]
            compare_responses(one["filtered_resps"], other["filtered_resps"])


def compare_responses(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, tuple | list):
            assert one[0] == pytest.approx(float(other[0]), abs=2e-3)
            assert one[1] == other[1]
        elif isinstance(other, float):
            assert one == pytest.approx(other, abs=5e-3)
        else:
            assert one == other


def test_the_model_is_registered_and_takes_an_adapter(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nplora.finetuning.judging.harness

    lm = nplora.load_model(model)
    lm.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(lm, tmp_path / "out")
    made = lm_eval.api.registry.get_model("nplora").create_from_arg_string(
        f"pretrained={model},adapter={tmp_path / 'out'}", {"batch_size": 1, "device": None}
    )
    _, samples = results(made, tasks, monkeypatch)
    sample = next(sample for sample in samples["choice"] if sample["doc_id"] == 4)
    ids = lm.tokenizer.encode("what is 4 + 4? 8")
    log_probs = lm.token_scores(nplora.models.packing.pack([(ids, ids)])).log_probs
    assert sample["filtered_resps"][0][0] == pytest.approx(log_probs[-2:].sum(), abs=1e-4)


def test_sampling_options_are_those_of_the_task(model: Path) -> None:
    from nplora.finetuning.judging.harness import NploraLM

    lm = NploraLM(model, max_gen_toks=9)
    assert lm._sampling({"until": "x"}) == nplora.generate.Sampling(max_new_tokens=9, stop=["x"])
    sampled = lm._sampling({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 3})
    assert sampled == nplora.generate.Sampling(max_new_tokens=3, temperature=0.5, top_p=0.9)
