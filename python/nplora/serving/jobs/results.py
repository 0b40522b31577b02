"""Writes the table of a job's losses, which is stored as a file when the job ends."""

from __future__ import annotations

import csv
import io

from nplora.trainer import History


def results_csv(history: History) -> bytes:
    """Return a CSV table. Each row has a step, and its training loss and validation loss if known."""
    losses = {record.step: record.loss for record in history.steps}
    validated = {record.step: record.val_loss for record in history.evaluations}
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["step", "train_loss", "full_valid_loss"])
    for step in sorted(losses.keys() | validated.keys()):
        table.writerow([step, losses.get(step, ""), validated.get(step, "")])
    return out.getvalue().encode()
