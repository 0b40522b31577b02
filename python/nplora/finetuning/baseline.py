"""What a model did before it was trained: its loss and its answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from nplora.finetuning.data import TokenBatches
from nplora.finetuning.evaluation import evaluate_batches
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate
from nplora.runtime.user_warning import warn_user
from nplora.trainer import Callback, Run

_EVENT = "before"
_SAMPLING = Sampling(max_new_tokens=48, repetition_penalty=1.1)  # small models fall into loops


def answers_of(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody asked for so many tokens as a context may be too short for
        return generate(lm, prompts, _SAMPLING)


class Before(Callback):
    """Looks at the model before the first step; a run that goes on finds in its log what was seen.

    Attributes:
        loss: of the batches to check; None without any, or where the log tells it of others or not at all.
        was_finished: the run had made all of its steps when it was to go on.
        answers: to each of the prompts, "" where the log does not tell.
    """

    def __init__(
        self,
        lm: LanguageModel,
        checks: TokenBatches | None,
        prompts: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._lm, self._checks, self._prompts, self._say = lm, checks, prompts, say
        self._checked = None if checks is None else checks.dataset.fingerprint()
        self.loss: float | None = None
        self.answers = [""] * len(prompts)
        self._looked = False
        self.was_finished = False

    def look(self) -> None:
        if self._checks is not None:
            self.loss = evaluate_batches(self._lm, self._checks)["loss"]
            self._say(f"validation loss {self.loss:.4f} before training")
        self.answers = answers_of(self._lm, self._prompts)
        self._looked = True

    def on_fit_start(self, run: Run) -> None:
        self.was_finished = run.step > 0 and run.step == run.total_steps
        if run.step:
            self._recall(run)
            return
        if not self._looked:
            self.look()
        answers = dict(zip(self._prompts, self.answers, strict=True))
        run.log(_EVENT, {"loss": self.loss, "data": self._checked, "answers": answers})

    def _recall(self, run: Run) -> None:
        told = run.logged(_EVENT)
        if told.get("data") not in (None, self._checked) and not self.was_finished:
            now = "none" if self._checked is None else "others"
            warn_user(f"the run was evaluated on validation data, and goes on with {now}")
        if (
            self._checked is not None
            and told.get("data") == self._checked
            and type(told.get("loss")) is float
        ):
            self.loss = told["loss"]
        answers = told.get("answers")
        if isinstance(answers, dict):
            self.answers = [str(answers.get(prompt, "")) for prompt in self._prompts]
