"""Baseline: the loss and the sample texts of a model before training, for comparison with the results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from nplora.distributed.communicator import Ranks
from nplora.finetuning.data import TokenBatches
from nplora.finetuning.objectives import PackedLoss
from nplora.finetuning.report import in_words
from nplora.lm import LanguageModel
from nplora.lm.generation import Prompt, Sampling, generate
from nplora.runtime.user_warning import warn_user
from nplora.trainer import Callback, Run
from nplora.trainer.evaluation import evaluate

_EVENT = "before"  # the name of the baseline's event in the log
# Without the penalty, small models repeat themselves.
_SAMPLING = Sampling(max_new_tokens=48, repetition_penalty=1.1)


def answers_of(lm: LanguageModel, prompts: Sequence[Prompt]) -> list[str]:
    """Return the text that the model generates after each prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no warning of a full context: the user did not choose the length
        return generate(lm, prompts, _SAMPLING)


class Baseline(Callback):
    """Evaluates the model before the first step. A resumed run reads the results from its log.

    Attributes:
        loss: validation loss before training; None if there are no validation data, or if the log of a
            resumed run has no loss on these data.
        metrics: a dict of all other metrics on the validation data; may be empty.
        was_finished: whether the resumed run was already finished, so that nothing was trained.
        answers: the generated text for each prompt; "" if the log of a resumed run does not have it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        loss: PackedLoss,
        validation: TokenBatches | None,
        prompts: Sequence[Prompt],
        say: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._lm, self._loss, self._validation, self._prompts, self._say = lm, loss, validation, prompts, say
        self._data = None if validation is None else validation.dataset.fingerprint()
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}
        self.answers = [""] * len(prompts)
        self._is_measured = False
        self.was_finished = False

    def measure(self, ranks: Ranks | None = None) -> None:
        """Evaluate the model, and generate a text after each prompt.

        Args:
            ranks: the processes that evaluate together; None: the ranks given to the constructor.
        """
        if self._validation is not None:
            self.metrics = evaluate(self._lm, self._loss, self._validation, ranks or self._ranks)
            self.loss = self.metrics.pop("loss")
            self._say(f"validation loss {self.loss:.4f}{in_words(self.metrics)} before training")
        if self._ranks.rank == 0:
            self.answers = answers_of(self._lm, self._prompts)
        self._is_measured = True

    def on_fit_start(self, run: Run) -> None:
        self.was_finished = run.was_finished
        if run.step:
            if not self.was_finished:
                self._say(f"the run continues after step {run.step} of {run.total_steps}")
            self._recall(run)
            return
        if not self._is_measured:
            self.measure(run.ranks)
        answers = dict(zip(map(_text, self._prompts), self.answers, strict=True))
        metrics = {"metrics": self.metrics} if self.metrics else {}
        run.log(_EVENT, {"loss": self.loss, "data": self._data, "answers": answers, **metrics})

    def _recall(self, run: Run) -> None:
        """Read the baseline's results from the log of a resumed run."""
        logged = run.logged(_EVENT)
        data, loss, answers = logged.get("data"), logged.get("loss"), logged.get("answers")
        if data not in (None, self._data) and not self.was_finished:
            now = "without any" if self._data is None else "with other data"
            warn_user(f"finetune: the run used validation data before, and continues {now}")
        if self._data is not None and data == self._data and type(loss) is float:
            self.loss, self.metrics = loss, _numbers(logged.get("metrics"))
        if isinstance(answers, dict):
            self.answers = [str(answers.get(_text(prompt), "")) for prompt in self._prompts]


def _text(prompt: Prompt) -> str:
    """The text of a prompt. If the prompt is a chat, this is the text of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _numbers(logged: object) -> dict[str, float]:
    """The metrics in a line of the log. Values that are not numbers are left out."""
    values = logged if isinstance(logged, dict) else {}
    return {str(name): value for name, value in values.items() if type(value) is float}
