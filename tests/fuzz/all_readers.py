"""Fuzzes every reader: python tests/fuzz/all_readers.py DIRECTORY [READER...]

A bug planted in a reader must be found, and then nothing. Findings and logs are written to the directory.
Every reader is fuzzed in a forked child: to import nplora with Atheris's instruments takes 7 s.
"""

import os
import shutil
import sys
from pathlib import Path

import fuzz  # before seeds, because it imports nplora with the instruments
import seeds

LIMITS = ["-seed=1", "-runs=100000", "-timeout=20", "-malloc_limit_mb=512"]
# The package tokenizers keeps about 3 KB of each tokenizer that encoded a text, so the process may grow.
LIMITS += ["-rss_limit_mb=1536"]
SECONDS_TO_FIND = 120  # for a planted bug: a busy machine runs 300 inputs a second
# Readers that changed lately, or in which five seconds do not reach what more would.
LONGER = {"rows", "checkpoint", "peft_adapter", "gguf_adapter", "config_json", "gguf_config", "chat_template"}


def in_child(reader: str, planted: bool, options: list[str], log: Path) -> int:
    """The exit status of a child that fuzzes."""
    pid = os.fork()
    if pid == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            fuzz.fuzz(reader, planted, options)
        finally:
            os._exit(70)  # fuzzing ends the process itself
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(reader: str, room: Path) -> str:
    """The problem of a reader; empty if there is none."""
    corpora = {kind: room / f"{kind}-{reader}" for kind in ("planted", "corpus")}
    for corpus in corpora.values():
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
    inputs = str(seeds.write(reader, room / f"seeds-{reader}"))
    limits = [*LIMITS, f"-artifact_prefix={room / reader}-"]

    log = room / f"planted-{reader}.log"
    options = [*limits, f"-max_total_time={SECONDS_TO_FIND}", str(corpora["planted"]), inputs]
    status = in_child(reader, True, options, log)
    if status == 0 or "Uncaught Python exception" not in log.read_text(errors="replace"):
        return f"{log}: the planted bug was not found, exit status {status}"

    log = room / f"{reader}.log"
    seconds = 8 if reader in LONGER else 5
    options = [*limits, f"-max_total_time={seconds}", str(corpora["corpus"]), inputs]
    status = in_child(reader, False, options, log)
    lines = log.read_text(errors="replace").splitlines()
    done = [line for line in lines if line.startswith("Done ")]
    if status != 0 or not done:
        return "\n".join([*lines[-40:], f"{log}: exit status {status}"])
    print(f"{reader}: {done[-1]}", flush=True)
    return ""


def main(room: Path, chosen: list[str]) -> int:
    for reader in chosen or seeds.SEEDS:
        if problem := check(reader, room):
            print(problem)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
