"""Training data: turns rows of files or of Python into tokens and labels, and packs them into batches."""

from nplora.finetuning.data.batches import EVALUATION_TOKENS, TokenBatches
from nplora.finetuning.data.dataset import Dataset, read_dataset
from nplora.finetuning.data.encoding import LEARN
from nplora.finetuning.data.kinds import KINDS
from nplora.finetuning.data.preview import Preview, preview
from nplora.finetuning.data.sources import Data, find_evaluated, find_splits
from nplora.finetuning.data.stored import DataReport

FORMATS = tuple(kind.name for kind in KINDS if kind.name != "choice")
ONE_ANSWER = tuple(name for name in FORMATS if name not in ("preference", "kto"))

__all__ = [
    "EVALUATION_TOKENS",
    "FORMATS",
    "LEARN",
    "Data",
    "DataReport",
    "Dataset",
    "Preview",
    "TokenBatches",
    "find_evaluated",
    "find_splits",
    "preview",
    "read_dataset",
]
