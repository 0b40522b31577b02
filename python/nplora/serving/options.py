"""ServeOptions: the options of `nplora serve`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nplora import _check
from nplora.lm.pooling import POOLINGS

_OP = "serve"
_ACCESS, _LIMITS = "access", "limits"


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class ServeOptions:
    """The options of a server.

        >>> from nplora.serving.options import ServeOptions
        >>> ServeOptions(port=0, max_requests=4).host
        '127.0.0.1'

    Raises:
        ValueError, TypeError: an option is out of range or has a wrong type, or other machines could use the
            server without a key.
    """

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0: all IPv4 addresses of this machine")
    port: int = _option(8080, "port to listen on; 0: any free port")
    name: str | None = _option(None, "name of the base model in the API (default: the name of its file)")
    embeddings: bool = _option(
        False,
        "serve embeddings and classes of texts or words, instead of generating text (always on for encoders)",
    )
    pooling: str | None = _option(
        None, "pooling that turns the hidden states of a text into its embedding: cls, mean, max, last, "
        "weighted_mean or mean_sqrt (default: as in the model's files)", metavar="NAME",
    )  # fmt: skip
    memory: str | None = _option(
        None, "memory limit for the whole process (default: what the model needs, plus half of the available "
        "memory that remains)", metavar="SIZE",
    )  # fmt: skip
    adapter_memory: str | None = _option(
        None, "memory to reserve for adapters that are added while the server runs, namely "
        "adapters from `adapter_dir`, results of jobs and sums of adapters (default: an eighth of the memory "
        "that remains for requests after the model and the working memory; if neither `adapter_dir` nor "
        "`jobs` is set, at most what sums of adapters can need)",
        metavar="SIZE",
    )  # fmt: skip
    adapter_dtype: str | None = _option(
        None, "data type of adapter weights: bfloat16, which rounds them and makes decoding with several "
        "adapters at once faster (default: as in the adapters' files)", metavar="NAME",
    )  # fmt: skip
    max_requests: int = _option(8, "number of requests computed at the same time; more requests wait")
    jobs: str | None = _option(
        None, "directory for uploaded files and fine-tuning jobs; jobs continue after a restart",
        metavar="DIR", kind="path",
    )  # fmt: skip
    train_share: float = _option(
        0.5, "maximum share of the time that training gets while requests are answered (above 0, at most 1)"
    )
    api_key: tuple[str, ...] = _option(
        (), "key that requests must send; also read from NPLORA_API_KEY (repeatable)", group=_ACCESS,
        metavar="KEY",
    )  # fmt: skip
    adapter_dir: str | None = _option(
        None, "directory that requests may load adapters from while the server runs", group=_ACCESS,
        metavar="DIR", kind="path",
    )  # fmt: skip
    allow_origin: tuple[str, ...] = _option(
        (), "origin of web pages that may use the server (CORS), such as https://example.org; *: any origin "
        "(repeatable)", group=_ACCESS, metavar="ORIGIN",
    )  # fmt: skip
    max_queue: int = _option(
        256, "number of requests that may wait; further requests are refused", group=_LIMITS
    )
    max_tokens: int | None = _option(
        None, "maximum number of generated tokens per answer (default: the model's context)", group=_LIMITS
    )
    max_body: str = _option("8M", "maximum size of a request's body", group=_LIMITS, metavar="SIZE")
    max_file: str = _option("512M", "maximum size of an uploaded file", group=_LIMITS, metavar="SIZE")
    max_files: str = _option("8G", "maximum total size of all uploaded files", group=_LIMITS, metavar="SIZE")
    timeout: float = _option(600.0, "time limit for an answer, in seconds", group=_LIMITS)
    drain: float = _option(
        30.0, "time limit for unfinished answers when the server is stopped, in seconds", group=_LIMITS
    )

    def __post_init__(self) -> None:
        from nplora.finetuning.planning import parse_bytes
        from nplora.serving.api.access import is_loopback

        _check.integer(_OP, "port", self.port, least=0, most=65535)
        if self.pooling is not None:
            _check.choice(_OP, "pooling", self.pooling, POOLINGS)
        if self.adapter_dtype is not None:
            _check.choice(_OP, "adapter_dtype", self.adapter_dtype, ("bfloat16",))
        for name in ("max_requests", "max_queue"):
            _check.integer(_OP, name, getattr(self, name), least=1)
        if self.max_tokens is not None:
            _check.integer(_OP, "max_tokens", self.max_tokens, least=1)
        for name in ("timeout", "drain"):
            if _check.number(_OP, name, getattr(self, name)) <= 0:
                raise ValueError(f"{_OP}: {name} is {getattr(self, name)}, expected above 0")
        if not 0 < _check.number(_OP, "train_share", self.train_share) <= 1:
            raise ValueError(f"{_OP}: train_share is {self.train_share}, expected above 0 and at most 1")
        for name in ("max_body", "max_file", "max_files", "memory", "adapter_memory"):
            size = getattr(self, name)
            if size is not None and (name, size) != ("adapter_memory", "0"):
                parse_bytes(size, _OP, name)
        for name in ("api_key", "allow_origin"):
            texts = _check.texts(_OP, name, getattr(self, name))
            object.__setattr__(self, name, texts)
            if not all(text and text.isascii() and text.isprintable() and " " not in text for text in texts):
                raise ValueError(
                    f"{_OP}: {name} has an empty or invalid value, expected ASCII characters without spaces "
                    "or control characters"
                )
        if not self.api_key and not is_loopback(self.host):
            raise ValueError(
                f"{_OP}: host is {self.host!r}, so other machines could use the server without a key; "
                "expected api_key, or the host 127.0.0.1"
            )
