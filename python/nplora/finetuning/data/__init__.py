"""Training data: files of text become tokens and labels, and these become packed batches."""

from nplora.finetuning.data.batches import EVALUATION_TOKENS, TokenBatches
from nplora.finetuning.data.dataset import (
    LEARN,
    DataReport,
    Dataset,
    find_evaluated,
    find_splits,
    read_dataset,
)

__all__ = [
    "EVALUATION_TOKENS",
    "LEARN",
    "DataReport",
    "Dataset",
    "TokenBatches",
    "find_evaluated",
    "find_splits",
    "read_dataset",
]
