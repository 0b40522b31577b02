"""The effect of each changed option on a resumed run, as the table in docs/reproducibility.md says."""

import dataclasses
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from nplora.adapters import merge_adapter, save_adapter
from nplora.finetuning import FinetuneOptions, finetune
from nplora.formats.errors import CorruptError
from nplora.lm import load_model
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

PAGE = Path(__file__).parents[2] / "docs/reproducibility.md"
SUMS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in SUMS]
JUDGED = [{**row, "label": number % 2 == 0} for number, row in enumerate(SUMS)]

# The run that is resumed: its data and its options besides those of all runs.
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SUMS, {}),
    "tokens": (SUMS, {"batch_examples": None, "batch_tokens": 64}),
    "upper": (SUMS, {"layers": "last:1"}),
    "valid": (SUMS, {"valid": SUMS[:2]}),
    "dpo": (PAIRS, {"objective": "dpo", "loss_type": "robust", "label_smoothing": 0.1}),
    "kto": (JUDGED, {"objective": "kto"}),
    "distill": (SUMS, {"objective": "distill", "teacher": "teacher.gguf"}),
    "local": (SUMS, {"local_steps": 1}),
    "int8": (SUMS, {"compute": "int8", "int8_head": "off"}),
}

# For each option: the run that is resumed with another value of the option, and that value.
OTHERS: dict[str, tuple[str, Any]] = {
    "seed": ("sft", 1),
    "chat": ("sft", True),
    "valid_split": ("sft", 0.3),
    "max_length": ("sft", 5),
    "learn": ("sft", "all"),
    "batch_examples": ("sft", 2),
    "batch_tokens": ("tokens", 32),
    "accumulate": ("sft", 2),
    "compute": ("sft", "bfloat16"),
    "rank": ("sft", 3),
    "alpha": ("sft", 8.0),
    "rank_pattern": ("sft", "q_proj=3"),
    "alpha_pattern": ("sft", "q_proj=3"),
    "targets": ("sft", "q_proj"),
    "layers": ("sft", "last:1"),
    "dropout": ("sft", 0.1),
    "use_rslora": ("sft", True),
    "use_dora": ("sft", True),
    "freeze_B": ("sft", True),
    "trainable_tokens": ("sft", "5,6"),
    "add_tokens": ("sft", "<new>"),
    "modules_to_save": ("sft", "embed_tokens"),
    "invocation": ("sft", "="),
    "adapter": ("sft", "adapter"),
    "objective": ("sft", "distill"),
    "beta": ("dpo", 0.2),
    "loss_type": ("dpo", "sigmoid"),
    "label_smoothing": ("dpo", 0.2),
    "desirable_weight": ("kto", 2.0),
    "undesirable_weight": ("kto", 2.0),
    "teacher": ("distill", "other.gguf"),
    "kl": ("distill", "reverse"),
    "temperature": ("distill", 2.0),
    "kd_ratio": ("distill", 0.4),
    "lr": ("sft", 1e-3),
    "lora_plus_ratio": ("sft", 4.0),
    "schedule": ("sft", "linear"),
    "warmup": ("sft", 1),
    "weight_decay": ("sft", 0.1),
    "max_grad_norm": ("sft", 2.0),
    "init": ("sft", "gaussian"),
    "eval_every": ("valid", 1),
    "patience": ("valid", 5),
    "keep": ("valid", "last"),
    "recompute": ("sft", True),
    "filter_vocabulary": ("sft", 1e-4),
    "memory": ("sft", "8G"),
    "int8_head": ("int8", "on"),
    "keep_int8": ("int8", True),
    "keep_prefix": ("upper", "memory"),
    "any_base": ("sft", True),
    "save_every": ("sft", 7),
    "save_minutes": ("sft", 1.0),
    "report_to": ("sft", ("csv",)),
    "profile": ("sft", True),
    "sample": ("sft", ("1+1=",)),
    "distributed": ("sft", "off"),
    "communication_dtype": ("sft", "bfloat16"),
    "local_steps": ("local", 2),
    "outer_lr": ("local", 0.5),
    "outer_momentum": ("local", 0.9),
}


def table() -> dict[str, list[str]]:
    """For each option in the table, the texts of the second column."""
    text = PAGE.read_text().partition("| `--resume` with another")[2].partition("\n\n")[0]
    found: dict[str, list[str]] = {}
    for line in text.splitlines()[2:]:
        options, effect = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in re.findall(r"`--([a-zA-Z0-9-]+)`", options):
            found.setdefault(name.replace("-", "_"), []).append(effect)
    return found


def test_the_table_lists_every_option() -> None:
    names = {field.name for field in dataclasses.fields(FinetuneOptions)}
    names -= {"resume", "change_compute", "overwrite"}
    assert table().keys() == names | {"valid"}
    assert {name for name, effects in table().items() if len(effects) > 1} == {"steps", "epochs"}
    data = {name for name, effects in table().items() if effects[0].startswith("refused if")}
    assert names - data - OTHERS.keys() == {"steps", "epochs"}, (
        "the options that the next test does not check"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, an adapter, two teachers and the runs."""
    place = tmp_path_factory.mktemp("resumed")
    model = save_small_llama(place / "model.gguf")
    lm = load_model(model)
    lm.add_lora(rank=1, init="gaussian")
    save_adapter(lm, place / "adapter")
    merge_adapter(model, place / "adapter", place / "teacher.gguf")
    merge_adapter(model, place / "adapter", place / "other.gguf", dtype="q8_0", lossy=True)
    for name in RUNS:
        finetuned(place, name, place / name)
    return place


def finetuned(place: Path, run: str, output: Path, **changed: Any) -> None:
    data, more = RUNS[run]
    options = {"rank": 2, "batch_examples": 4, "steps": 2, "progress": False, **more, **changed}
    for name in ("teacher", "adapter"):
        if options.get(name) is not None:
            options[name] = place / options[name]
    if "adapter" in options:
        del options["rank"]  # the adapter decides the rank
    finetune(place / "model.gguf", data, output, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_value_has_the_effect_in_the_table(name: str, place: Path, tmp_path: Path) -> None:
    run, value = OTHERS[name]
    shutil.copytree(place / run, tmp_path / "run")
    more = {"teacher": "teacher.gguf"} if value == "distill" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            finetuned(place, run, tmp_path / "run", **{name: value}, **more, resume=True)
        except (ValueError, CorruptError) as error:
            effect = (
                "refused" if "cannot continue with other data or settings: " in str(error) else str(error)
            )
        else:
            words = "the settings of the resumed run differ from the checkpoint's: "
            told = any(words in str(one.message) for one in caught)
            effect = "the run continues, with a warning" if told else "the run continues"
    [expected] = table()[name]
    if effect == "the run continues":
        assert "warning" not in expected
    assert expected.startswith(effect)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_change_the_frozen_weights_are_refused(init: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "sft", tmp_path / "run")
    with pytest.raises(CorruptError, match="the frozen weights or the configuration differ"):
        finetuned(place, "sft", tmp_path / "run", init=init, resume=True)
