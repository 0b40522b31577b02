"""Predict the memory and the time of training, and choose a plan that fits into memory."""

from nplora.finetuning.planning.choice import (
    BudgetError,
    PlanConstraints,
    choose,
    needed,
    preferred,
    resident_memory,
)
from nplora.finetuning.planning.memory import Adapters, ExecutionPlan, Memory, MicroBatch, predicted
from nplora.finetuning.planning.memory_plan import Alternative, MemoryPlan, shortage
from nplora.finetuning.planning.nodes import BatchTime, NodesPlan
from nplora.finetuning.planning.resident import parse_bytes
from nplora.finetuning.planning.teaching import Teaching
from nplora.finetuning.planning.work import Work
from nplora.platform.memory import available_memory, current_memory, peak_memory

__all__ = [
    "Adapters",
    "Alternative",
    "BatchTime",
    "BudgetError",
    "ExecutionPlan",
    "Memory",
    "MemoryPlan",
    "MicroBatch",
    "NodesPlan",
    "PlanConstraints",
    "Teaching",
    "Work",
    "available_memory",
    "choose",
    "current_memory",
    "needed",
    "parse_bytes",
    "peak_memory",
    "predicted",
    "preferred",
    "resident_memory",
    "shortage",
]
