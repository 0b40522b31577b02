"""Teachers that a student learns to imitate: a model, or a file with the log-probabilities of a model."""

from nplora.finetuning.teachers.model_teacher import ModelTeacher, model_digest
from nplora.finetuning.teachers.stored import StoredTeacher, is_stored
from nplora.finetuning.teachers.teacher import DistributionsAt, Teacher
from nplora.finetuning.teachers.vocabulary import require_same_vocabulary

__all__ = [
    "DistributionsAt",
    "ModelTeacher",
    "StoredTeacher",
    "Teacher",
    "is_stored",
    "model_digest",
    "require_same_vocabulary",
]
