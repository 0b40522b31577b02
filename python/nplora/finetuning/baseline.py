"""Baseline: what a model did before it was trained, to compare with what it does after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from nplora.finetuning.data import TokenBatches
from nplora.finetuning.evaluation import evaluate_batches
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate
from nplora.runtime.user_warning import warn_user
from nplora.trainer import Callback, Run

_EVENT = "before"  # of the line in the log
_SAMPLING = Sampling(max_new_tokens=48, repetition_penalty=1.1)  # small models repeat themselves


def answers_of(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a full context is no matter: the length was not the user's choice
        return generate(lm, prompts, _SAMPLING)


class Baseline(Callback):
    """Evaluates the model before the first step. A resumed run reads from its log what was found then.

    Attributes:
        loss: the loss of the validation batches; None without such batches, or if the log has it of other
            batches or not at all.
        was_finished: the run that was resumed had made all of its steps.
        answers: the answers to the prompts; "" if the log does not have one.
    """

    def __init__(
        self,
        lm: LanguageModel,
        validation: TokenBatches | None,
        prompts: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._lm, self._validation, self._prompts, self._say = lm, validation, prompts, say
        self._data = None if validation is None else validation.dataset.fingerprint()
        self.loss: float | None = None
        self.answers = [""] * len(prompts)
        self._is_measured = False
        self.was_finished = False

    def measure(self) -> None:
        """Evaluate the model and have it answer the prompts."""
        if self._validation is not None:
            self.loss = evaluate_batches(self._lm, self._validation)["loss"]
            self._say(f"validation loss {self.loss:.4f} before training")
        self.answers = answers_of(self._lm, self._prompts)
        self._is_measured = True

    def on_fit_start(self, run: Run) -> None:
        self.was_finished = run.step > 0 and run.step == run.total_steps
        if run.step:
            self._recall(run)
            return
        if not self._is_measured:
            self.measure()
        answers = dict(zip(self._prompts, self.answers, strict=True))
        run.log(_EVENT, {"loss": self.loss, "data": self._data, "answers": answers})

    def _recall(self, run: Run) -> None:
        """Read the log."""
        logged = run.logged(_EVENT)
        data, loss, answers = logged.get("data"), logged.get("loss"), logged.get("answers")
        if data not in (None, self._data) and not self.was_finished:
            now = "without any" if self._data is None else "with others"
            warn_user(f"the run was evaluated on validation data, and continues {now}")
        if self._data is not None and data == self._data and type(loss) is float:
            self.loss = loss
        if isinstance(answers, dict):
            self.answers = [str(answers.get(prompt, "")) for prompt in self._prompts]
