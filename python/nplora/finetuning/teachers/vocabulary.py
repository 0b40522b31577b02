"""Compares the vocabularies of a teacher and a student, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nplora.formats.errors import FormatError, brief

_PADDING = re.compile(r"\[PAD\d+\]")  # how llama.cpp's converter names ids without a token
_SHOWN = 3


def require_same_vocabulary(
    op: str, teacher: str, theirs: Sequence[str | None], student: str, ours: Sequence[str | None]
) -> None:
    """Raise FormatError if an id has different tokens in the two vocabularies.

    One vocabulary may be longer than the other. An id without a token, or with a padding token such as
    [PAD151936], may have any token in the other vocabulary.

    Args:
        teacher, student: the names of the two models, for error messages.
        theirs, ours: the teacher's and the student's token for each id; None for an id without a token.
    """
    differing = [
        id_
        for id_, (a, b) in enumerate(zip(theirs, ours, strict=False))
        if a != b and not (_is_padding(a) or _is_padding(b))
    ]
    if not differing:
        return
    shown = "; ".join(
        f"token {id_} is {brief(theirs[id_])}, expected {brief(ours[id_])}" for id_ in differing[:_SHOWN]
    )
    common = min(len(theirs), len(ours))
    raise FormatError(
        f"{op}: the vocabulary of the teacher {teacher} differs from the vocabulary of {student}: {shown}"
        f"{'; ...' * (len(differing) > _SHOWN)} ({len(differing):,} of {common:,} tokens differ)"
    )


def _is_padding(token: str | None) -> bool:
    return not token or _PADDING.fullmatch(token) is not None
