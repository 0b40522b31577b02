"""Writes evaluations as a table, in plain text or in Markdown. Rows are systems, and columns are metrics."""

from __future__ import annotations

from collections.abc import Mapping

from nplora.finetuning.judging.results import Evaluation, Score, perplexity, shown
from nplora.finetuning.judging.statistics import LEVEL
from nplora.formats.errors import counted


def text_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The table as plain text. All cells of a column have the same width."""
    rows = _rows(evaluations)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The table in Markdown."""
    head, *rows = (
        [cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in _rows(evaluations)
    )
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(evaluations: Mapping[str, Evaluation]) -> list[list[str]]:
    """The cells of the table: a row with the names of the metrics, then a row for each system."""
    names = list(next(iter(evaluations.values()))["metrics"])
    head = ["", "loss", "perplexity", *names[1:]]
    rows = [head]
    for system, evaluation in evaluations.items():
        loss, *others = evaluation["metrics"].items()
        cells = [_cell(*loss), shown("perplexity", perplexity(loss[1]["value"]))]
        rows.append([system, *cells, *(_cell(name, score) for name, score in others)])
    return rows


def _cell(name: str, score: Score) -> str:
    value, low, high = shown(name, score["value"]), score["low"], score["high"]
    interval = "" if low is None or high is None else f" ({shown(name, low)} to {shown(name, high)})"
    return value + interval + _failures(score)


def _failures(score: Score) -> str:
    if score["failed"] == score["examples"] > 0:
        return f", failed in all of {counted(score['examples'], 'example')} ({score['error']})"
    return f", {score['failed']:,} failed" if score["failed"] else ""


def evaluation_text(evaluation: Evaluation) -> str:
    """The results of one system in a few lines."""
    scores = evaluation["metrics"]
    loss = scores["loss"]
    lines = [
        f"loss {loss['value']:.4f} over {counted(evaluation['tokens'], 'token')}{_interval('loss', loss)}",
        f"perplexity {shown('perplexity', evaluation['perplexity'])}",
    ]
    for name, score in scores.items():
        if name != "loss":
            value = shown(name, score["value"])
            lines.append(f"{name} {value}{_interval(name, score)}{_failures(score)}")
    return "\n".join(lines)


def _interval(name: str, score: Score) -> str:
    low, high = score["low"], score["high"]
    if low is None or high is None:
        return ""
    return f" ({LEVEL:.0%} interval {shown(name, low)} to {shown(name, high)})".replace("%", " %")
