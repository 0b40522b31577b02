"""What training will take in bytes and seconds, before it runs, and the way of computing that fits."""

from nplora.finetuning.planning.choice import (
    BudgetError,
    Plan,
    Wishes,
    Work,
    choose,
    needed,
    resident_memory,
    shortage,
)
from nplora.finetuning.planning.memory import Adapters, Candidate, Memory, Pass, predicted
from nplora.finetuning.planning.resident import available_memory, current_memory, parse_bytes, peak_memory

__all__ = [
    "Adapters",
    "BudgetError",
    "Candidate",
    "Memory",
    "Pass",
    "Plan",
    "Wishes",
    "Work",
    "available_memory",
    "choose",
    "current_memory",
    "needed",
    "parse_bytes",
    "peak_memory",
    "predicted",
    "resident_memory",
    "shortage",
]
