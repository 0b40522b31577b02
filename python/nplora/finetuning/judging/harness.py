"""NploraLM: a model class for lm-evaluation-harness (the package `lm_eval`, in the extra `eval`).

Importing this module registers the class under the name "nplora". Run as a program, this module is the
command `lm_eval` with the additional model "nplora":

    python -m nplora.finetuning.judging.harness run --model nplora \
        --model_args pretrained=model.gguf,adapter=out --tasks arc_easy
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nplora.finetuning.attach import Adapters, with_adapters
from nplora.finetuning.judging.answers import groups
from nplora.finetuning.load import opened
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate_ids

Request = Any  # lm_eval's Instance
Pair = tuple[list[int], list[int]]

_TOGETHER = 16  # contexts in one call; the model divides them further by their tokens


@register_model("nplora")
class NploraLM(LM):  # type: ignore[misc]
    """A language model with an adapter, for lm-evaluation-harness.

    If several continuations have the same context, the model computes the context only once. If a text is too
    long, its beginning is cut off, as in the models of the harness. The text of a special token, such as
    `<|end|>`, is encoded as this token.

    Args:
        pretrained: a GGUF file, a Hugging Face directory, or a loaded `LanguageModel`.
        adapter: as in `nplora.evaluate`; or several paths, separated by "+", whose adapters are added up.
        compute: arithmetic of the products with frozen weights.
        any_base: accept an adapter that was trained on another model with the same shapes.
        max_length: the maximum number of tokens of a text; None: the model's context.
        max_gen_toks: the maximum number of generated tokens for tasks that do not set it.
        batch_size, max_batch_size, device: not used. The harness passes these arguments to every model.
    """

    def __init__(
        self,
        pretrained: StrPath | LanguageModel,
        adapter: Adapters | None = None,
        compute: str | None = None,
        any_base: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        lm = opened("NploraLM", pretrained, compute)
        if isinstance(adapter, str) and not os.path.exists(adapter) and "+" in adapter:
            adapter = adapter.split("+")
        self.lm = lm if adapter is None else with_adapters("NploraLM", lm, adapter, any_base)
        context = lm.config.max_position_embeddings
        self.max_length = context if max_length is None else min(int(max_length), context)
        self.max_gen_toks = int(max_gen_toks)
        tokenizer = self.lm.tokenizer
        self._bos = tokenizer.bos_id if tokenizer.encode_prompt("a")[0] == tokenizer.bos_id else None
        self._prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    # ---- the methods that the harness calls ----

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return a tuple for each continuation: its log-probability, and whether greedy decoding would
        generate it."""
        pairs = [self._pair(*request.args) for request in requests]
        found = self._scores(pairs)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Request], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text. Long texts are divided into windows of `max_length` tokens."""
        found = list[float]()
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.lm.tokenizer.encode(text, parse_special=True), self._prefix, self.max_length, 1
            )
            scores = self._scores([make_disjoint_window(window) for window in windows])
            found.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Request], disable_tqdm: bool = False) -> list[str]:
        """Generate a text after each context. A text ends before the first of its task's stop texts."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in alike.values():
            sampling = self._sampling(requests[indices[0]].args[1])
            room = max(1, self.max_length - sampling.max_new_tokens)
            prompts = [self._encode(requests[index].args[0])[-room:] for index in indices]
            texts = [
                text
                for group in groups(prompts, sampling.max_new_tokens)
                for text in generate_ids(self.lm, group, sampling)
            ]
            for index, text in zip(indices, texts, strict=True):
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text."""
        return self.lm.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return str(self.lm.source).replace("/", "__")

    # ---- tokens ----

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text. The model's BOS is added, unless the text already begins with it."""
        ids = self.lm.tokenizer.encode(text, parse_special=True)
        if self._bos is None or ids[:1] == [self._bos]:
            return ids or [self._prefix_id()]
        return [self._bos, *ids]

    def _prefix_id(self) -> int:
        """The token to begin with if a text has no context: BOS, or EOS if the model has no BOS."""
        if self._prefix is None:
            raise ValueError(f"{self.lm.source}: the model has neither BOS nor EOS to begin a text with")
        return self._prefix

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return the tokens of a context and the tokens of a continuation: at most `max_length` + 1 in all.

        White space at the end of the context is moved to the beginning of the continuation.
        """
        before = context.rstrip()
        continuation = context[len(before) :] + continuation
        if context:
            prompt = self._encode(before)
            tokens = self._encode(before + continuation)[len(prompt) :]
        else:
            prompt = [self._prefix_id()]
            tokens = self.lm.tokenizer.encode(continuation, parse_special=True)
            tokens = tokens[1:] if tokens[:1] == prompt else tokens
        tokens = tokens[-self.max_length :]
        return prompt[-(self.max_length + 1 - len(tokens)) :], tokens

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return a tuple for each continuation: its log-probability, and whether all its tokens are the
        model's most likely tokens."""
        places: dict[tuple[int, ...], list[int]] = {}
        found = [(0.0, True)] * len(pairs)
        for index, (prompt, tokens) in enumerate(pairs):
            if tokens:
                places.setdefault(tuple(prompt), []).append(index)
        prompts = list(places)
        for begin in range(0, len(prompts), _TOGETHER):
            group = prompts[begin : begin + _TOGETHER]
            scores = self.lm.continuation_scores(
                group, [[pairs[index][1] for index in places[key]] for key in group]
            )
            for key, several in zip(group, scores, strict=True):
                for index, score in zip(places[key], several, strict=True):
                    found[index] = float(score.log_probs.sum()), bool(score.is_top.all())
        return found

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """The sampling options for a task. `options` has the names of transformers, such as "do_sample"."""
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        count = options.get("max_gen_toks", options.get("max_new_tokens", self.max_gen_toks))
        if not options.get("do_sample", bool(options.get("temperature"))):
            return Sampling(max_new_tokens=int(count), stop=tuple(filter(None, stop)))
        return Sampling(
            max_new_tokens=int(count),
            temperature=float(options.get("temperature", 1.0)),
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            stop=tuple(filter(None, stop)),
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
