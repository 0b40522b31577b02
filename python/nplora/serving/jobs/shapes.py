"""Converts records of files, jobs and checkpoints to the JSON objects of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shape = dict[str, Any]  # an object of OpenAI's API

_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
_SHOWN = (
    "id", "created_at", "error", "fine_tuned_model", "finished_at", "model", "result_files", "seed", "status",
    "trained_tokens", "training_file", "validation_file", "metadata",
)  # fmt: skip


def file(record: Mapping[str, Any]) -> Shape:
    """Return the object of a file."""
    shown = {name: record[name] for name in ("id", "bytes", "created_at", "filename", "purpose")}
    return {
        **shown, "object": "file", "status": "processed", "status_details": None, "expires_at": None,
    }  # fmt: skip


def job(record: Mapping[str, Any], estimated_finish: int | None) -> Shape:
    """Return the object of a fine-tuning job.

    Args:
        estimated_finish: the Unix time at which the job may end; None if it is not known.
    """
    known = {**record["hyperparameters"], **record["resolved"]}
    hyperparameters: Shape = {name: known.get(name, "auto") for name in _HYPERPARAMETERS}
    method = record["method"]
    own = {name: value for name, value in record["options"].items() if name == "beta"}
    return {
        **{name: record[name] for name in _SHOWN},
        "object": "fine_tuning.job",
        "organization_id": "",
        "hyperparameters": hyperparameters,
        "method": {"type": method, method: {"hyperparameters": hyperparameters | own}},
        "integrations": [],
        "estimated_finish": estimated_finish if record["status"] == "running" else None,
        "user_provided_suffix": record["suffix"],
        "options": record["options"],
    }


def checkpoint(job_id: str, record: Mapping[str, Any]) -> Shape:
    """Return the object of a job's checkpoint, with the name under which its adapter is available."""
    return {
        "id": record["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": record["created_at"],
        "fine_tuning_job_id": job_id,
        "fine_tuned_model_checkpoint": record["name"],
        "step_number": record["step"],
        "metrics": {
            "step": record["step"],
            "train_loss": record["train_loss"],
            "full_valid_loss": record["valid_loss"],
            "valid_loss": record["valid_loss"],
        },
    }
