"""Training and evaluation of embeddings: losses, data, batches of any size, and measures of quality.

`nplora.embedding` is this package.
"""

from nplora.finetuning.embedding.batches import ExampleBatches, TextBatch
from nplora.finetuning.embedding.examples import TextExamples, TextReport, read_examples
from nplora.finetuning.embedding.files import Embedded, embed_file
from nplora.finetuning.embedding.label_pairs import label_pairs
from nplora.finetuning.embedding.loss import EmbeddingLoss
from nplora.finetuning.embedding.metrics import (
    RetrievalScores,
    evaluate_retrieval,
    evaluate_similarity,
    pearson,
    spearman,
)
from nplora.finetuning.embedding.training import EmbeddingTraining, train
from nplora.nn.embedding_losses import CoSENTLoss, CosineLoss, MatryoshkaLoss, RankingLoss, TripletLoss

__all__ = [
    "CoSENTLoss",
    "CosineLoss",
    "Embedded",
    "EmbeddingLoss",
    "EmbeddingTraining",
    "ExampleBatches",
    "MatryoshkaLoss",
    "RankingLoss",
    "RetrievalScores",
    "TextBatch",
    "TextExamples",
    "TextReport",
    "TripletLoss",
    "embed_file",
    "evaluate_retrieval",
    "evaluate_similarity",
    "label_pairs",
    "pearson",
    "read_examples",
    "spearman",
    "train",
]
