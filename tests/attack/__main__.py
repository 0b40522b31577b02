"""Attack nplora and print a table of the results: `PYTHONPATH=tests python -m attack [WORD]...`

A row of the table is a kind of attack. Words choose the rows whose names contain one of them. The environment
variable ATTACK_WORKERS says how many cases run at a time.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

from attack import forks, mapped, resources, runs, targets
from attack.case import Case

WORKERS = int(os.environ.get("ATTACK_WORKERS", "2"))
LEAST_KILLS = 200


class Outcome(NamedTuple):
    """The result of one case.

    Attributes:
        attacks: the number of attacks.
        seconds: their total time.
        problem: a description of the failure; empty if nplora survived.
        note: a measurement.
    """

    attacks: int
    seconds: float
    problem: str
    note: str


_cases: list[Case] = []  # forked workers find the cases here


def attempt(number: int) -> Outcome:
    begin, made, note, problem = time.monotonic(), 1, "", ""
    try:
        result = _cases[number].attack()
        made, note = (result, "") if isinstance(result, int) else (1, result or "")
    except Exception:
        problem = traceback.format_exc(limit=4)
    return Outcome(made, time.monotonic() - begin, problem, note)


def main(words: list[str]) -> int:
    warnings.simplefilter("ignore")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as room:
        for module in (runs, targets, forks, mapped, resources):
            place = Path(room, module.__name__.rpartition(".")[2])
            place.mkdir()
            _cases.extend(
                case for case in module.cases(place) if not words or any(word in case.row for word in words)
            )
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            outcomes = pool.map(attempt, range(len(_cases)), chunksize=1)
    return report(outcomes, time.monotonic() - begin, bool(words))


def report(outcomes: list[Outcome], seconds: float, is_part: bool) -> int:
    failed, kills = 0, 0
    print(f"{'attack':<44}{'attacks':>8}{'failed':>8}{'seconds':>9}")
    for row in dict.fromkeys(case.row for case in _cases):
        pairs = [(case, outcome) for case, outcome in zip(_cases, outcomes, strict=True) if case.row == row]
        bad = sum(bool(outcome.problem) for _, outcome in pairs)
        made = sum(outcome.attacks for _, outcome in pairs)
        print(f"{row:<44}{made:>8}{bad:>8}{sum(outcome.seconds for _, outcome in pairs):>9.1f}")
        for case, outcome in pairs:
            if outcome.note:
                print(f"    {case.name}: {outcome.note}")
        failed += bad
        kills += made if "killed" in row else 0
    for case, outcome in zip(_cases, outcomes, strict=True):
        if outcome.problem:
            print(f"\n--- {case.row}, {case.name}\n{outcome.problem}")
    if not is_part and kills < LEAST_KILLS:
        print(f"only {kills} processes were killed, expected {LEAST_KILLS}")
        failed += 1
    print(f"\n{kills} processes killed; {seconds:.0f} s with {WORKERS} cases at a time")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
