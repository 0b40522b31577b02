"""How well a model learns in each arithmetic: the held-out loss, evaluated in float32.

    python -m bench.arithmetics results.jsonl                     # every run; the file keeps what is done
    python -m bench.arithmetics results.jsonl --tasks style --seeds 0
    python -m bench.arithmetics results.jsonl --models random-0.5B    # a wide model with outliers
    python -m bench.arithmetics results.jsonl --table             # only print what the file has

Each run is `nplora.finetune` with its defaults on 320 rows, once, in 40 steps. Then the adapter is loaded
onto the model in float32, and the loss on 160 rows is measured. So losses differ only because of the
arithmetic of the training.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import nplora
from bench.defaults import models, parser_of_runs
from bench.random_model import WIDE, write_wide
from bench.tasks import split
from nplora.finetuning import evaluate

ARITHMETICS: dict[str, dict[str, Any]] = {
    "float32": {"compute": "float32"},
    "bfloat16": {"compute": "bfloat16"},
    "int8, head in bfloat16": {"compute": "int8", "int8_head": "off"},
    "int8": {"compute": "int8", "int8_head": "forward"},
    "int8, head in int8": {"compute": "int8", "int8_head": "on"},
}
DEFAULT_TASKS = ("style", "instructions", "classification")

Key = tuple[str, str, int, str]


def loss(model: Path, task: str, seed: int, options: dict[str, Any]) -> float:
    """The held-out loss after a run, evaluated in float32."""
    train, held_out = split(task)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "run")
        nplora.finetune(model, train, output, seed=seed, progress=False, **options)
        evaluation = evaluate(model, held_out, adapter=output, compute="float32", progress=False)
    return float(evaluation["loss"])


def read(path: Path) -> dict[Key, float]:
    """(model, task, seed, arithmetic) -> loss, of the runs in a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["model"], row["task"], row["seed"], row["arithmetic"]): row["loss"] for row in rows}


def run(path: Path, key: Key, model: Path) -> None:
    """Make a run, and add a line for it to the file."""
    name, task, seed, arithmetic = key
    found = loss(model, task, seed, ARITHMETICS[arithmetic])
    row = {"model": name, "task": task, "seed": seed, "arithmetic": arithmetic, "loss": found}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name:14}{task:16}{seed:3}  {found:.4f}  {arithmetic}", flush=True)


def table(path: Path) -> None:
    """For each model and task, the mean loss in each arithmetic, over the seeds that also ran in float32."""
    results = read(path)
    for name, task in dict.fromkeys(key[:2] for key in results):
        print(f"\n{name}, {task}")
        for arithmetic in ARITHMETICS:
            seeds = [
                seed for *which, seed, one in results
                if which == [name, task] and one == arithmetic and (name, task, seed, "float32") in results
            ]  # fmt: skip
            if seeds:
                mean, exact = (
                    statistics.fmean(results[name, task, seed, one] for seed in seeds)
                    for one in (arithmetic, "float32")
                )
                change = 100 * (mean / exact - 1)
                print(f"  {mean:.4f}  {change:+6.2f} %  {len(seeds)} seeds  {arithmetic}")


def main() -> None:
    parser = parser_of_runs(__doc__, DEFAULT_TASKS)
    parser.add_argument("--arithmetics", nargs="+", default=list(ARITHMETICS), choices=list(ARITHMETICS))
    given = parser.parse_args()
    if not given.table:
        with tempfile.TemporaryDirectory() as directory:
            files = models(Path(directory))
            if WIDE.name in given.models:
                files[WIDE.name] = write_wide(Path(directory, "wide.gguf"), tokenizer=files["SmolLM2-135M"])
            for seed in given.seeds:
                for name in given.models:
                    for task in given.tasks:
                        for arithmetic in given.arithmetics:
                            key = name, task, seed, arithmetic
                            if key not in read(given.results):
                                run(given.results, key, files[name])
    table(given.results)


if __name__ == "__main__":
    main()
