"""LanguageModel: tokens in, logits or a loss out, and gradients of its adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter, new_layers, read_for
from nplora.formats.files import Stamp, StrPath
from nplora.formats.model_directory import CONFIG
from nplora.lm import adapting
from nplora.lm.generation import Prompt, Sampling, generate
from nplora.lm.named_adapters import NamedAdapters
from nplora.lora.merging import MergeReport
from nplora.models import families, head, model_digest, stepwise
from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder, DecoderSaved
from nplora.models.packing import IGNORED, PackedBatch, pack
from nplora.models.positions import cache_positions, packed_positions
from nplora.nn import Linear, LoRALinear, RMSNorm, optim, stack_backward, stack_forward
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Gradient, Module, Saved, inference, inferring, layer_stream
from nplora.nn.optim import Optimizer
from nplora.nn.stack import StackSaved
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageModelSaved(Saved):
    """What `LanguageModel.backward` needs, for one call: it frees what a block kept when that is done."""

    lead: tuple[int, ...]  # the shape of the ids
    x: Array
    decoder: DecoderSaved
    head: StackSaved
    unused: list[None]  # empty once a backward pass has begun

    def use_up(self, op: str) -> None:
        """Let the caller be the only one that uses it."""
        try:
            self.unused.pop()
        except IndexError:
            raise RuntimeError(
                f"{op}: saved was used by an earlier backward pass, which freed it; call forward again"
            ) from None


class LanguageModel(Module):
    """A decoder-only language model with frozen weights, as `nplora.load_model` makes it.

    Its layers have the names that transformers gives them: `model.layers.0.self_attn.q_proj`, `lm_head`.

    Attributes:
        config: sizes and switches.
        model: embedding, blocks, last norm.
        lm_head: the head; where `config.tie_word_embeddings`, its weight is the embedding's.
        model.recompute: True computes each block again in backward and keeps its input only.
    """

    task_type = "CAUSAL_LM"

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        lm_head: Linear,
        load_tokenizer: Callable[[], Tokenizer],
        mapped: Sequence[Stamp] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.lm_head: Linear | LoRALinear = lm_head
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._mapped = tuple(mapped)
        self._named = NamedAdapters[LanguageModel]()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the model, read when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    @property
    def compute(self) -> str:
        """The arithmetic of the frozen products: "float32", "bfloat16" or "int8"."""
        return getattr(self.lm_head.weight, "compute", "float32")

    def require_unchanged(self) -> None:
        """Raise CorruptError if a file that the weights are mapped from was written to since it was opened.

        Losses, gradients and scores are checked so after they were computed. A file that was renamed over the
        model's is another file, and does no harm.
        """
        for stamp in self._mapped:
            stamp.require_unchanged()

    # ---- adapters ----

    @property
    def source(self) -> Path:
        """The file or directory that the model was read from."""
        source = Path(self.config.source)
        return source.parent if source.name == CONFIG else source

    def stored_row_order(self, name: str) -> Array | None:
        return adapting.row_order(self.config, name)

    def base_digest(self) -> str | None:
        """That of the norms, as `formats.model_digest` has it."""
        norms = {name: m.weight for name, m in self.named_modules() if isinstance(m, RMSNorm)}
        family = families.of(self.config)
        return model_digest.of({f"{family.gguf_layer(name)}.weight": norm for name, norm in norms.items()})

    def add_lora(
        self,
        rank: int = 8,
        alpha: float = 16,
        targets: str | Iterable[str] = adapting.ALL_LINEAR,
        layers: str | Sequence[int] | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        seed: int = 0,
        init: str = "zero",
    ) -> None:
        """Put a LoRA adapter on frozen layers; the answers stay the same until it is trained.

        Adapters that other layers have stay as they are.

        Args:
            rank, alpha, dropout, use_rslora, use_dora: as in LoRALinear.
            targets: "all-linear" (every linear layer of the blocks), "q_proj" (in every block), a whole
                dotted name, several as "q_proj,v_proj" or as a list. "embed_tokens" and "lm_head" have to be
                named.
            layers: the blocks: None (all), "last:4", "first:4", a range or numbers.
            seed: every layer draws its start from (seed, its name).
            init: how the factors start, as in LoRALinear. "gaussian" changes the answers at once. "pissa" and
                "olora" need weights of floats: what they leave of one in low-bit blocks could not be stored.
        Raises:
            ValueError: a target or block is not there, or an option does not fit; then nothing is changed.
        """
        names = adapting.targeted(self, self.config.num_hidden_layers, targets, layers)
        options = {
            "rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora, "use_dora": use_dora,
            "init": init,
        }  # fmt: skip
        modules: dict[str, Any] = dict(self.named_modules())
        with adapting.factors_side_by_side([modules[name] for name in names], rank):
            made = {
                name: adapting.adapted(name, modules[name], self.stored_row_order(name), options)
                for name in names
            }
        seed = _check.integer("add_lora", "seed", seed, least=0)
        for name, layer in made.items():
            layer.reset(layer_stream(seed, name))
        self.exchange({id(modules[name]): layer for name, layer in made.items()})

    # ---- named adapters ----

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The named adapters."""
        return self._named.adapters

    def load_adapter(self, path: StrPath | Adapter, name: str, any_base: bool = False) -> None:
        """Keep an adapter under a name; `set_adapter` lets calls use it.

        It is kept beside the model's own LoRA layers, and its targets may be others. Named adapters are for
        inference.

        Args:
            path: a PEFT directory, llama.cpp's file, or an `Adapter`.
            any_base: as in `nplora.load_adapter`.
        Raises:
            ValueError: there is an adapter of this name. TypeError: the name is no text, or empty.
            FormatError: the adapter does not fit the model, or is of another one. Others as
                `nplora.load_adapter`.
        """
        adapter = path if isinstance(path, Adapter) else read_for(self, path, self.source, any_base)
        self._named.add(self, name, adapter, any_base)

    def set_adapter(self, names: str | Sequence[str] | None) -> None:
        """Let the calls that follow use a named adapter, in place of the LoRA layers that the model has.

        This holds for the thread (or asyncio task) that calls it. Another thread uses what it selects itself,
        and at first none. A call keeps the adapter that it began with, also if it is deleted meanwhile.

        Args:
            names: a name, several, which add up, or None: the model as it is without named adapters.
        Raises:
            KeyError: there is no adapter of a name; the nearest names are listed.
            UnsupportedError: there are several names, and an adapter has DoRA.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names or ())
        self._named.model(self, "set_adapter", chosen)
        self._named.select(chosen)

    def delete_adapter(self, name: str) -> None:
        """Forget a named adapter. Other contexts that selected it get a KeyError from their next call.

        Raises:
            KeyError: there is no adapter of this name; the nearest names are listed.
        """
        self._named.delete(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """As `Module.disable_adapter`; named adapters are off too."""
        with super().disable_adapter(), self._named.none_selected():
            yield self

    def with_adapter(self, adapter: Adapter, any_base: bool = False) -> Self:
        """A model over the same frozen weights with these LoRA layers alone. This one stays as it is.

        Raises:
            FormatError: the adapter does not fit, or is of another model.
        """
        own = {id(layer): layer.frozen() for layer in self.adapter_layers().values()}
        names = {name: id(module) for name, module in self.named_modules()}
        added = {names[name]: layer for name, layer in new_layers(adapter, self, any_base).items()}
        made = self.copied({**own, **added})
        made._named = NamedAdapters[LanguageModel]()
        made._load_tokenizer = lambda: self.tokenizer
        made.model.prefix = None
        return made

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        super().exchange(replaced)
        self._named.forget_models()

    def _selected(self, op: str) -> LanguageModel:
        """This model, or the one with the named adapters that this context has selected."""
        return self._named.model(self, op, self._named.selected)

    def merge(self, dtype: str | None = None) -> list[MergeReport]:
        """As `Module.merge`. Raises RuntimeError, too, where a named adapter is selected: it stays one."""
        self._require_none_selected("merge")
        return super().merge(dtype)

    def merge_and_unload(self) -> Module:
        """As `Module.merge_and_unload`. Raises RuntimeError, too, where a named adapter is selected."""
        self._require_none_selected("merge_and_unload")
        return super().merge_and_unload()

    # ---- inference ----

    def logits(self, token_ids: npt.ArrayLike) -> Array:
        """Scores of the next token: (batch, time, vocab) for ids (batch, time), (time, vocab) for (time,).

        Raises:
            TypeError: ids are not integers.
            ValueError: ids have another number of axes, or one is not in the vocabulary.
            CorruptError: as `require_unchanged`.
        """
        return self(token_ids)

    def loss(self, token_ids: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """The mean over all labels of -log p(label); 0 where there is none.

        Args:
            token_ids: integers (batch, time) or (time,).
            labels: of the same shape, and unshifted: the label of a token is compared with what the tokens
                before it predict. -100 is ignored.
        Raises:
            TypeError, ValueError, CorruptError: as `logits`.
        """
        return self.loss_packed(self._packed("loss", token_ids, labels))

    def loss_packed(self, batch: PackedBatch) -> float:
        """The same for packed sequences. In int8: as decoding computes it, a few tokens at a time."""
        self._check_batch("loss_packed", batch)
        if (lm := self._selected("loss_packed")) is not self:
            return lm.loss_packed(batch)
        with inference():
            if self.compute == "int8":
                total = stepwise.loss(self.config, self.model, self.lm_head, batch)
            else:
                x = self.model.infer(batch.ids, packed_positions(batch.starts))
                total = head.loss(self.model, self.lm_head, x, batch.targets)
        self.require_unchanged()
        return total / max(1, batch.num_targets)

    # ---- training ----

    def train_step(self, token_ids: npt.ArrayLike, labels: npt.ArrayLike, optimizer: Optimizer) -> float:
        """One forward and backward pass and one update of the adapters; returns the loss before it.

        Without a label that counts, the loss is 0 and nothing is updated: no parameter, no moment, no count.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; nothing was updated.
            ValueError: there is no adapter; and as `loss`.
            TypeError: optimizer is not nplora's; and as `loss`.
        """
        optim.require("train_step", optimizer)
        batch = self._packed("train_step", token_ids, labels)
        self.zero_grad()
        loss = self.forward_backward(batch, 1 / max(1, batch.num_targets)) / max(1, batch.num_targets)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"train_step: the loss is {loss} at step {optimizer.steps + 1}")
        if batch.num_targets:
            optimizer.step(self.parameters())
        return loss

    def forward_backward(self, batch: PackedBatch, factor: float) -> float:
        """The sum of the losses of a batch; adds `factor` times its gradient to those of the adapters.

        For a mean over several batches, factor is 1 / (the targets of all of them). A batch without targets
        is not computed: its loss is 0.

        Raises:
            ValueError: there is no adapter, or an id or target is not in the vocabulary.
            RuntimeError: a layer is merged, or computes in int8; or a named adapter is selected.
            CorruptError: as `require_unchanged`; the gradients are not to be used.
        """
        op = "forward_backward"
        self._check_batch(op, batch)
        self._require_none_selected(op)
        if not self.adapter_layers():
            raise ValueError(f"{op}: the model has no adapter; add_lora() first")
        for layer in self.adapter_layers().values():
            layer.require_trainable(op)
        if not batch.num_targets:
            return 0.0
        x, saved = self.model.run(batch.ids, packed_positions(batch.starts))
        total, dx = head.loss_and_gradient(self.model, self.lm_head, x, batch.targets, factor)
        self.model.run_backward(dx, saved)
        self.require_unchanged()
        return total

    def forward(self, x: npt.ArrayLike) -> tuple[Array, LanguageModelSaved | None]:
        """Logits of ids x as `logits` has them, and what `backward` needs: for losses of your own."""
        if not inferring():
            self._require_none_selected("LanguageModel.forward")
        elif (lm := self._selected("LanguageModel.forward")) is not self:
            return lm.forward(x)
        ids = self._ids("LanguageModel.forward", x)
        starts = np.arange(0, ids.size + 1, ids.shape[-1]) if ids.size else np.zeros(1, np.int64)
        positions = packed_positions(starts)
        if inferring():
            stream, saved = self.model.infer(ids.reshape(-1), positions), None
        else:
            stream, saved = self.model.run(ids.reshape(-1), positions)
        (logits,), kept = stack_forward((self.lm_head,), self.model.read_out(stream))
        self.require_unchanged()
        shaped = logits.reshape(*ids.shape, logits.shape[1])
        if saved is None:
            return shaped, None
        return shaped, LanguageModelSaved(ids.shape, stream, saved, kept, [None], layer=self)

    def backward(self, dy: Array, saved: LanguageModelSaved, need_dx: bool = True) -> Gradient:
        """Add to the gradients of the adapters, for dy of the shape of the logits. Uses `saved` up.

        Raises:
            ValueError: dy has not the shape of the logits, or saved is of a pass of another model.
            TypeError: saved is not what `forward` returned.
            RuntimeError: saved was used before, or a layer is merged or computes in int8.
        """
        op, vocab = "LanguageModel.backward", self.lm_head.weight.shape[0]
        _check.saved(op, saved, LanguageModelSaved)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, vocab), np.float32).reshape(-1, vocab)
        _check.own(op, saved, self)
        for layer in self.adapter_layers().values():
            layer.require_trainable("backward")
        saved.use_up(op)
        dnormed = stack_backward((self.lm_head,), [rows], saved.head)
        self.model.run_backward(self.model.read_out_backward(dnormed, saved.x), saved.decoder)
        return None

    # ---- decoding ----

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Room for `slots` sequences of at most `capacity` tokens, for the adapter selected now.

        Raises:
            CorruptError: as `require_unchanged`. KeyError: the adapter selected was deleted.
        """
        self.require_unchanged()
        return KVCache(self.config, slots, capacity, self._selected("new_cache"))

    def decode(self, token_ids: npt.ArrayLike, slots: npt.ArrayLike, cache: KVCache) -> Array:
        """Read the next tokens of some sequences; the logits (m, vocab) that follow the last of each.

        Args:
            token_ids: integers (m, count) or (m,): the next tokens of each of these sequences. A long prompt
                may come in pieces.
            slots: integers (m,), the sequence of each row, each one once.
        Raises:
            TypeError: ids or slots are not integers.
            ValueError: shapes do not fit, an id or slot is out of range, or the cache is full; then it is as
                it was.
            CorruptError: as `require_unchanged`.
        """
        if isinstance(cache.owner, LanguageModel) and cache.owner is not self:
            return cache.owner.decode(token_ids, slots, cache)
        ids, rows = self._ids("decode", token_ids), _check.integers("decode", "slots", slots)
        ids = ids[:, None] if ids.ndim == 1 else ids
        if rows.ndim != 1 or ids.ndim != 2 or len(ids) != len(rows) or not ids.size:
            raise ValueError(
                f"decode: token_ids have shape {ids.shape}, slots {rows.shape}; expected (m, count) and (m,)"
            )
        count = ids.shape[1]
        cache.require_room(rows, count)
        with inference():
            positions = cache_positions(rows, cache.lengths[rows], cache.limits[rows], count)
            x = self.model.run_cached(ids.reshape(-1), positions, cache)
            logits = self.lm_head.forward(self.model.read_out(x[count - 1 :: count].copy()))[0]
        self.require_unchanged()
        cache.lengths[rows] += count
        return logits

    def generate(
        self, prompt: Prompt | Iterable[Prompt], max_new_tokens: int = 128, **options: Any
    ) -> str | list[str]:
        """What the model says after a prompt, or after each of several; the likeliest tokens by default.

        Args:
            prompt: a text; a chat, which is a list of messages {"role": ..., "content": ...}; or several of
                either, in any iterable.
            max_new_tokens: the most tokens of an answer.
            options: temperature, top_k, top_p, repetition_penalty, stop (a list of texts) and seed, as
                `nplora.generate.Sampling` has them.
        Raises:
            ValueError: an option is out of range, or a prompt is empty or fills the context.
            TypeError: an option is not known, or a prompt is neither a text nor a chat.
            CorruptError: as `require_unchanged`.
        """
        sampling = _check.options("generate", Sampling, {"max_new_tokens": max_new_tokens, **options})
        if not np.iterable(prompt) or isinstance(prompt, str | bytes | bytearray | Mapping):
            return generate(self, [prompt], sampling)[0]  # type: ignore[list-item]
        given: list[Any] = list(prompt)
        if given and all(isinstance(message, Mapping) for message in given):
            return generate(self, [given], sampling)[0]
        return generate(self, given, sampling)

    def _require_none_selected(self, op: str) -> None:
        if names := self._named.selected:
            raise RuntimeError(
                f"{op}: {', '.join(map(repr, names))}: a named adapter is for inference; set_adapter(None) "
                "first, or attach it to the model"
            )

    # ---- what comes in ----

    @property
    def _vocab(self) -> int:
        return self.config.vocab_size

    def _ids(self, op: str, token_ids: npt.ArrayLike) -> Array:
        ids = _check.in_range(op, "token_ids", _check.integers(op, "token_ids", token_ids), self._vocab)
        if ids.ndim not in (1, 2):
            raise ValueError(f"{op}: token_ids have shape {ids.shape}, expected (batch, time) or (time,)")
        return ids

    def _packed(self, op: str, token_ids: npt.ArrayLike, labels: npt.ArrayLike) -> PackedBatch:
        ids, wanted = self._ids(op, token_ids), _check.integers(op, "labels", labels)
        if ids.shape != wanted.shape:
            raise ValueError(f"{op}: token_ids have shape {ids.shape}, labels {wanted.shape}")
        return pack(zip(np.atleast_2d(ids), np.atleast_2d(wanted), strict=True))

    def _check_batch(self, op: str, batch: PackedBatch) -> None:
        """What would otherwise come up in the middle of a pass."""
        _check.in_range(op, "ids", batch.ids, self._vocab)
        _check.in_range(op, "targets", batch.targets[batch.targets != IGNORED], self._vocab)
        longest = int(np.diff(batch.starts).max(initial=0))
        if longest > self.config.max_position_embeddings:
            warnings.warn(
                f"{op}: a sequence of {longest} tokens, the model was trained for "
                f"{self.config.max_position_embeddings}",
                stacklevel=3,
            )
