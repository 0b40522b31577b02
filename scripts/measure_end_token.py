"""Measure whether a base model learns to end its answers with a token that it was never trained on.

    python scripts/measure_end_token.py MODEL.gguf [END] [LR]

The script copies the model with END (default: <end_of_turn>) as its end token. It trains the copy on 96
sums, by LoRA alone and with END among the trained tokens. The output is the log-probability of END after
right answers, before the training and after every fourth step, and the number of answers that end within 16
tokens.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.formats import gguf
from nplora.trainer import Callback

STEPS, LIMIT = 24, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("end", nargs="?", default="<end_of_turn>")
    parser.add_argument("lr", nargs="?", type=float, default=2e-4)
    given = parser.parse_args()
    end = list(gguf.open(given.model).metadata.strings("tokenizer.ggml.tokens")).index(given.end)
    rows = sums(104)
    with tempfile.TemporaryDirectory() as place:
        model = with_end_token(given.model, Path(place, "model.gguf"), end)
        runs: dict[str, dict[str, Any]] = {
            "LoRA alone": {},
            "with the trained token": {"trainable_tokens": [end]},
        }
        for name, more in runs.items():
            lm = nplora.load_model(model)
            watch = Watch(end, rows[96:100])
            nplora.finetune(
                lm, rows[:96], Path(place, name), lr=given.lr, steps=STEPS, schedule="constant",
                progress=False, callbacks=[watch], **more,
            )  # fmt: skip
            answers = [lm.generate(row["prompt"], max_new_tokens=LIMIT) for row in rows[96:]]
            longer = [lm.generate(row["prompt"], max_new_tokens=2 * LIMIT) for row in rows[96:]]
            ended = sum(one == two for one, two in zip(answers, longer, strict=True))
            right = sum(answer == row["completion"] for answer, row in zip(answers, rows[96:], strict=True))
            found = ", ".join(f"{value:.2f}" for value in watch.found)
            print(f"{name}: {found}; {ended} of {len(answers)} end, {right} are right", flush=True)


def sums(count: int) -> list[dict[str, str]]:
    """Questions for small sums, and the answers."""
    numbers = np.random.default_rng(0).integers(1, 10, (count, 2)).tolist()
    return [{"prompt": f"User: {a} plus {b}\nModel:", "completion": f" {a + b}"} for a, b in numbers]


def with_end_token(model: Path, copy: Path, end: int) -> Path:
    """A copy of the model with another end token."""
    content, key = bytearray(model.read_bytes()), b"tokenizer.ggml.eos_token_id"
    place = content.index(key) + len(key) + 4  # after the type of the value
    content[place : place + 4] = end.to_bytes(4, "little")
    copy.write_bytes(content)
    return copy


class Watch(Callback):
    """The mean log-probability of the end token after right answers."""

    def __init__(self, end: int, rows: list[dict[str, str]]) -> None:
        self.end, self.rows, self.found = end, rows, list[float]()

    def on_fit_start(self, run: Any) -> None:
        self.found.append(self.measure(run.model))

    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step % 4 == 0:
            self.found.append(self.measure(run.model))

    def measure(self, lm: nplora.LanguageModel) -> float:
        values = list[float]()
        for row in self.rows:
            ids = lm.tokenizer.encode_prompt(row["prompt"]) + lm.tokenizer.encode(row["completion"])
            logits = lm.logits(np.array([ids]))[0, -1].astype(np.float64)
            shifted = logits - logits.max()
            values.append(float(shifted[self.end] - np.log(np.exp(shifted).sum())))
        return float(np.mean(values))


if __name__ == "__main__":
    main()
