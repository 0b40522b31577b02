"""Reads the bodies of requests to /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling
from nplora.serving.api import guides, messages, sampling
from nplora.serving.api.models import Models
from nplora.serving.fields import Fields, checked_integer, checked_list, wrong
from nplora.serving.request_error import RequestError

# Fields that do not change the answer.
_NO_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prompt_cache_options", "cache_prompt", "stream_options", "verbosity"),
    *("reasoning_effort", "prediction", "moderation"),
    # fields of llama.cpp
    *("timings_per_token", "return_progress", "id_slot", "samplers", "reasoning_format"),
    *("dynatemp_exponent", "xtc_threshold"),
}
_COMMON = {"model", "lora", "stream", "logprobs", *sampling.FIELDS, *_NO_EFFECT}
_CHAT = _COMMON | {
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "top_logprobs"),
}
_COMPLETION = _COMMON | {"prompt", "echo", "best_of", "response_format"}
# Fields that are not implemented. Each field is accepted only with the listed values, which change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "min_p": (0, 0.0),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "web_search_options": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "dynatemp_range": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "dry_multiplier": (0, 0.0),
}
_UNSUPPORTED_CHAT = {**_UNSUPPORTED, "best_of": (1,)}
_MOST_TOP = 20
_MOST_PROMPTS = 64
_COMPLETION_TOKENS = 16  # the default of OpenAI's API


@dataclass(frozen=True)
class TextRequest:
    """The checked content of a request for generated text.

    Attributes:
        model: the name of the model, which the answer repeats.
        prompts: the token ids of each prompt.
        texts: the text of each prompt, which the answer repeats; empty if the answer does not repeat the
            prompt.
        n: the number of answers to each prompt.
        sampling: how tokens are chosen.
        logprobs: how many of the most likely tokens the answer reports at each position, in addition to the
            generated token; None: no log-probabilities.
        stream: whether the answer is sent while it is generated, as a stream of events.
        usage: whether the stream ends with the token counts of the prompt and of the answer.
        grammar: a JSON schema that the text must follow, or None.
        tools: the names of the functions for which the model may generate tool calls.
        most_calls: the largest number of tool calls in an answer; None: no limit.
    """

    model: str
    prompts: list[list[int]]
    n: int
    sampling: Sampling
    logprobs: int | None
    stream: bool
    usage: bool
    texts: tuple[str, ...] = ()
    grammar: str | None = None
    tools: frozenset[str] = frozenset()
    most_calls: int | None = None


class Reader:
    """Reads requests for generated text.

    `chat` and `completion` return a pair: the model with the request's adapter, and the request. The model's
    tokenizer encoded the prompts. The request does not hold the model, because a client may read an answer
    long after the engine has completed it.

    Do not call these methods in the event loop, because they wait until another process has rendered the chat
    template.

    Args:
        context: the largest number of tokens of a prompt plus its answer.
        most_tokens: the largest accepted `max_tokens`; None: the only limit is the context.
    """

    def __init__(self, models: Models[LanguageModel], context: int, most_tokens: int | None = None) -> None:
        self._models, self._context, self._most_tokens = models, context, most_tokens
        self._guides = guides.Guides()

    def chat(self, values: object) -> tuple[LanguageModel, TextRequest]:
        """Read the body of /v1/chat/completions.

        Raises:
            RequestError: a field is missing, unknown or wrong, or the prompt is too long.
            KeyError: the adapter was unloaded while the request was read.
        """
        body = Fields(values)
        body.require_known(_CHAT, _UNSUPPORTED_CHAT)
        name, adapter = self._models.chosen(body)
        chat = messages.read_messages(body)
        tools, must_call = messages.chosen_tools(body, messages.read_tools(body))
        logprobs = None
        top = body.integer("top_logprobs", 0, _MOST_TOP)
        if body.boolean("logprobs"):
            logprobs = top or 0
        elif top:
            raise RequestError("top_logprobs is given, but logprobs is not true", param="top_logprobs")
        lm = self._model(adapter)
        ids = self._encode_chat(lm, chat, tools)
        format_ = guides.read_format(body)
        grammar = guides.calls(tools) if must_call else format_
        is_free = must_call or format_ is None
        names = frozenset(tool["function"]["name"] for tool in tools) if is_free else frozenset()
        return self._request(
            body, lm, name, [ids], logprobs, grammar=grammar, tools=names, default_tokens=None,
            most_calls=None if body.boolean("parallel_tool_calls", True) else 1,
        )  # fmt: skip

    def completion(self, values: object) -> tuple[LanguageModel, TextRequest]:
        """Read the body of /v1/completions. This method raises the same errors as `chat`."""
        body = Fields(values)
        body.require_known(_COMPLETION, _UNSUPPORTED)
        name, adapter = self._models.chosen(body)
        logprobs = body.integer("logprobs", 0, _MOST_TOP)
        lm = self._model(adapter)
        prompts = self._prompts(lm, body)
        echo = body.boolean("echo")
        if echo and logprobs is not None:
            raise RequestError(
                "echo with logprobs is not supported: the log-probabilities of a prompt are not computed",
                param="echo",
                code="unsupported_parameter",
            )
        texts = tuple(lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts) if echo else ()
        grammar = guides.read_format(body)
        return self._request(
            body, lm, name, prompts, logprobs, grammar=grammar, texts=texts,
            default_tokens=_COMPLETION_TOKENS,
        )  # fmt: skip

    def guide(self, lm: LanguageModel, request: TextRequest) -> Any:
        """Return a new guide, which restricts the tokens of one answer to the request's grammar.

        Return None if the request has no grammar.

        Raises:
            RequestError: the grammar is wrong.
        """
        if request.grammar is None:
            return None
        return self._guides.guide(lm.tokenizer, request.grammar)

    def _model(self, adapter: str | None) -> LanguageModel:
        """Return the model with an adapter. The request uses this model until the request ends."""
        lm = self._models.lm
        lm.set_adapter(None)  # the caller may have selected an adapter
        return lm if adapter is None else lm.named_model(adapter)

    def _request(
        self,
        body: Fields,
        lm: LanguageModel,
        name: str,
        prompts: list[list[int]],
        logprobs: int | None,
        *,
        default_tokens: int | None,
        **more: Any,
    ) -> tuple[LanguageModel, TextRequest]:
        longest = max(map(len, prompts))
        left = self._context - longest
        if left < 1:
            raise RequestError(
                f"the prompt has {'at least ' * (longest > self._context)}{longest:,} tokens, but the "
                f"maximum context length is {self._context:,} tokens, and the answer needs at least 1",
                param="messages" if body.has("messages") else "prompt",
                code="context_length_exceeded",
            )
        most = left if self._most_tokens is None else min(left, self._most_tokens)
        wanted = sampling.read_sampling(body, min(default_tokens or most, most), most, lm.vocab_size)
        if self._most_tokens is not None and wanted.max_new_tokens > self._most_tokens:
            field = next(name for name in sampling.LIMITS if body.has(name))
            raise RequestError(
                f"{field} is {wanted.max_new_tokens:,}, but this server generates at most "
                f"{self._most_tokens:,} tokens for an answer",
                param=field,
                code="invalid_value",
            )
        options = body.object("stream_options") if body.has("stream_options") else None
        stream = body.boolean("stream")
        return lm, TextRequest(
            name,
            prompts,
            sampling.read_choices(body, wanted),
            wanted,
            logprobs,
            stream,
            usage=options is not None and options.boolean("include_usage"),
            **more,
        )

    # ---- prompts ----

    def _encode_chat(
        self, lm: LanguageModel, chat: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> list[int]:
        tokenizer = lm.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        most = self._context + 1
        try:
            ids = tokenizer.encode_chat(chat, True, tools=tools or None, most=most)
            if tools and ids == tokenizer.encode_chat(chat, True, most=most):
                raise RequestError(
                    "this model's chat template has no place for tools",
                    param="tools",
                    code="unsupported_parameter",
                )
        except (ValueError, TypeError) as error:
            raise RequestError(str(error), param="messages", code="invalid_messages") from error
        return ids

    def _prompts(self, lm: LanguageModel, body: Fields) -> list[list[int]]:
        """Return the token ids of each prompt.

        The field `prompt` is a text, a list of texts, a list of token ids, or a list of lists of token ids.
        """
        given = body.required("prompt")
        if isinstance(given, list) and given and not isinstance(given[0], int):
            prompts = checked_list("prompt", given, _MOST_PROMPTS)
        else:
            prompts = [given]
        return [self._prompt(lm, prompt) for prompt in prompts]

    def _prompt(self, lm: LanguageModel, given: Any) -> list[int]:
        if isinstance(given, str):
            try:
                ids = lm.tokenizer.encode_prompt(given, most=self._context + 1)
            except ValueError as error:
                raise RequestError(str(error), param="prompt", code="invalid_value") from error
        elif isinstance(given, list):
            most = lm.vocab_size - 1
            ids = [checked_integer("prompt", id_, 0, most) for id_ in given[: self._context + 1]]
        else:
            raise wrong("prompt", given, "a text, a list of texts, or a list of token ids")
        if not ids:
            raise RequestError("prompt is empty", param="prompt", code="invalid_value")
        return ids
