"""When LoRA is worth it: five ways to classify three real sets of texts, with few and with all examples.

- tfidf: words and pairs of words, TF-IDF, logistic regression.
- frozen: MiniLM's embeddings as they are, logistic regression.
- lora: MiniLM with LoRA and a new head, by nplora, trained with compute="int8".
- pairs: MiniLM with LoRA, trained in int8 by nplora on 640 pairs of texts with equal and different labels;
  then logistic regression on the embeddings.
- setfit: MiniLM trained on pairs of texts by SetFit, logistic regression. There are about 640 pairs, or two
  for each text if that is more. `--setfit` is the path of the Python that has SetFit.

Each run is a process of its own. Its CPU time and its peak memory are those of the training, with the loading
of the model. The accuracy is that on the held-out texts, as the mean of the seeds. `--most` and `--held-out`
leave out texts beyond a number.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from statistics import mean
from typing import Any

from bench import labelled_texts
from bench.bench_embed import model_directory

SIZES = {"8": 8, "64": 64, "all": None}  # examples per label
LONGEST = 64  # tokens of a text, for every contestant
EPOCHS = {8: 20, 64: 10, None: 2}  # of LoRA
PAIRS = 640  # of texts, half of them with the same label; SetFit may have more
Result = dict[str, float]


def tfidf(train: labelled_texts.Rows, per_class: int | None, seed: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    return model.fit(*columns(train)).predict


def frozen(train: labelled_texts.Rows, per_class: int | None, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    import nplora

    encoder = nplora.load_encoder(model_directory())
    texts, labels = columns(train)
    model = LogisticRegression(C=10, max_iter=1000).fit(encoder.embed(texts, max_length=LONGEST), labels)
    return lambda given: model.predict(encoder.embed(given, max_length=LONGEST))


def lora(train: labelled_texts.Rows, per_class: int | None, seed: int) -> Any:
    from nplora.finetuning import train_classifier

    with tempfile.TemporaryDirectory() as output:
        run = train_classifier(
            model_directory(), train, output, epochs=EPOCHS[per_class], seed=seed, max_length=LONGEST,
            batch_examples=16 if per_class else 32, compute="int8", progress=False,
        )  # fmt: skip
    return run.classifier.predict


def pairs(train: labelled_texts.Rows, per_class: int | None, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    import nplora

    texts, labels = columns(train)
    rows = nplora.embedding.label_pairs(texts, labels, PAIRS, seed)
    with tempfile.TemporaryDirectory() as output:
        encoder = nplora.embedding.train(
            model_directory(), rows, output, loss="cosine", lr=2e-4, batch_size=16, seed=seed,
            max_length=LONGEST, compute="int8", progress=False,
        ).encoder  # fmt: skip
    model = LogisticRegression(C=10, max_iter=1000).fit(encoder.embed(texts, max_length=LONGEST), labels)
    return lambda given: model.predict(encoder.embed(given, max_length=LONGEST))


def setfit(train: labelled_texts.Rows, per_class: int | None, seed: int) -> Any:
    import datasets
    import setfit as library
    import torch

    torch.set_num_threads(2)
    model = library.SetFitModel.from_pretrained(str(model_directory()), device="cpu")
    model.model_body.max_seq_length = LONGEST
    with tempfile.TemporaryDirectory() as output:
        settings = library.TrainingArguments(
            num_iterations=max(1, PAIRS // (2 * len(train))), seed=seed, report_to="none", output_dir=output
        )
        library.Trainer(model=model, args=settings, train_dataset=datasets.Dataset.from_list(train)).train()
    return model.predict


CONTESTANTS = {"tfidf": tfidf, "frozen": frozen, "lora": lora, "pairs": pairs, "setfit": setfit}


def columns(rows: labelled_texts.Rows) -> tuple[list[str], list[str]]:
    return [row["text"] for row in rows], [row["label"] for row in rows]


def measured(
    name: str, data: str, per_class: int | None, seed: int, most: int | None, held: int | None
) -> Result:
    """Train in this process, and predict the held-out texts."""
    train, held_out = labelled_texts.split(data)
    chosen = labelled_texts.shots(train, per_class, seed)[:most]
    if held is not None:
        held_out = random.Random(0).sample(held_out, min(held, len(held_out)))
    begun = time.process_time()
    predict = CONTESTANTS[name](chosen, per_class, seed)
    seconds, peak = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts, labels = columns(held_out)
    right = sum(str(a) == b for a, b in zip(predict(texts), labels, strict=True))
    return {"seconds": seconds, "peak": 1024.0 * peak, "accuracy": right / len(held_out)}


def in_new_process(python: str, *arguments: Any) -> Result:
    command = [python, "-m", "bench.classify_sets", "--one", json.dumps(arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def table(
    sets: list[str],
    sizes: list[int | None],
    names: list[str],
    setfit_python: str | None,
    most: int | None,
    held: int | None,
) -> None:
    """Print a row for each set and each number of examples, as soon as it is known."""
    shown = [name for name in names if name != "setfit" or setfit_python]
    print("| set | texts | " + " | ".join(shown) + " |", "| --- | --- |" + " --- |" * len(shown), sep="\n")
    for data in sets:
        for per_class in sizes:
            seeds = range(3 if per_class == 8 else 1)
            count = len(labelled_texts.shots(labelled_texts.split(data)[0], per_class, 0)[:most])
            cells = []
            for name in shown:
                python = setfit_python if name == "setfit" and setfit_python else sys.executable
                found = [in_new_process(python, name, data, per_class, seed, most, held) for seed in seeds]
                accuracy, seconds, peak = (
                    mean(result[key] for result in found) for key in ("accuracy", "seconds", "peak")
                )
                cells.append(f"{accuracy:.1%}, {seconds / 60:.2f} min, {peak / 1e6:.0f} MB")
            print(f"| {data} | {count:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sets", default=",".join(labelled_texts.PACKAGES), metavar="NAMES", help="sets of texts"
    )
    parser.add_argument("--shots", choices=SIZES, nargs="+", default=list(SIZES), help="examples per label")
    parser.add_argument("--only", default=",".join(CONTESTANTS), metavar="NAMES", help="contestants")
    parser.add_argument("--setfit", metavar="PYTHON", help="python that has SetFit")
    parser.add_argument("--most", type=int, metavar="N", help="the most texts to train on")
    parser.add_argument("--held-out", type=int, metavar="N", help="the most texts to predict")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*json.loads(given.one))))
    else:
        sizes = [SIZES[size] for size in given.shots]
        table(given.sets.split(","), sizes, given.only.split(","), given.setfit, given.most, given.held_out)
