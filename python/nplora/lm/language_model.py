"""LanguageModel: logits and losses of token ids, gradients of the adapters, and generated text."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter, new_layers, read_for
from nplora.adapters import trained_rows as adapter_rows
from nplora.formats.errors import counted
from nplora.formats.files import Stamp, StrPath
from nplora.formats.model_directory import CONFIG
from nplora.formats.tokenizer_json import AddedToken
from nplora.lm import activated, adapting, slot_models, trained_rows
from nplora.lm.generation import Adapters, Message, Prompt, Sampling, generate
from nplora.lm.named_adapters import NamedAdapters
from nplora.lm.shared_weights import SharedWeights
from nplora.lora.merging import MergeReport
from nplora.models import building, families, head, model_digest, stepwise
from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.continuations import MOST_ROWS, Question
from nplora.models.continuations import token_scores as score_continuations
from nplora.models.decoder import Decoder, DecoderSaved
from nplora.models.packing import IGNORED, PackedBatch, pack
from nplora.models.positions import packed_positions
from nplora.nn import LoRALayer, RMSNorm, TrainedEmbedding, TrainedHead, TrainedRowsLayer, optim
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Gradient, Module, Saved, inference, inferring
from nplora.nn.optim import Optimizer
from nplora.runtime.user_warning import warn_user
from nplora.tokenizer import Tokenizer
from nplora.weights import COMPUTES

Array = npt.NDArray[Any]
P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageModelSaved(Saved):
    """The values that `LanguageModel.backward` needs. `backward` frees these values when it uses them."""

    lead: tuple[int, ...]  # the shape of the ids
    x: Array
    decoder: DecoderSaved
    head: Any
    unused: list[None]  # empty once a backward pass has begun

    def use_up(self, op: str) -> None:
        """Mark these values as used. Raise RuntimeError if the values were used before."""
        try:
            self.unused.pop()
        except IndexError:
            raise RuntimeError(
                f"{op}: an earlier backward pass used and freed the saved values; call forward again"
            ) from None


class TokenScores(NamedTuple):
    """How likely each of m tokens is, according to a model.

    Attributes:
        log_probs: log p of each token, float64 (m,).
        is_top: whether each token is the most likely one, bool (m,).

    >>> import nplora
    >>> lm = nplora.load_model("model.gguf")
    >>> [[scores]] = lm.continuation_scores([[1, 2]], [[[3, 4]]])
    >>> bool((scores.log_probs <= 0).all())
    True
    """

    log_probs: Array
    is_top: Array


def _with_selected_adapter(
    method: Callable[Concatenate[LanguageModel, P], T],
) -> Callable[Concatenate[LanguageModel, P], T]:
    """Decorate a method: `self` becomes the model with the adapters that are selected when a call begins.

    So the call keeps these adapters, even if another thread deletes or replaces them in the meantime.
    """

    @functools.wraps(method)
    def call(self: LanguageModel, /, *args: P.args, **named: P.kwargs) -> T:
        return method(self.selected_model(method.__name__), *args, **named)

    return call


class LanguageModel(Module):
    """A decoder-only language model with frozen weights; `nplora.load_model` loads such a model.

    The layers have the names that transformers gives them: `model.layers.0.self_attn.q_proj`, `lm_head`.

    Gradient checkpointing is off by default. With `lm.model.recompute = True`, the forward pass stores only
    the input of each block, and the backward pass computes the block again.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=4, targets="q_proj,v_proj")
        >>> ids = [[1, 2, 3, 4, 5]]
        >>> optimizer = nplora.AdamW(lr=0.01)
        >>> losses = [lm.train_step(ids, ids, optimizer) for _ in range(5)]
        >>> losses[-1] < losses[0]
        True
        >>> nplora.save_adapter(lm, "my-adapter")

    Attributes:
        config: the sizes and settings of the model.
        model: the embedding, the blocks and the last norm.
        lm_head: the head, which shares the embedding's weight if `config.tie_word_embeddings` is set.
    """

    task_type = "CAUSAL_LM"
    trained_row_layers = adapter_rows.EMBEDDING, adapter_rows.HEAD

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        lm_head: head.AnyHead,
        load_tokenizer: Callable[[], Tokenizer],
        mapped: Sequence[Stamp] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.lm_head = lm_head
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._extended: tuple[tuple[AddedToken, ...], Tokenizer] | None = None
        self._mapped = tuple(mapped)
        self._named = NamedAdapters[LanguageModel]()

    @property
    def ties_head(self) -> bool:  # type: ignore[override]
        """Whether the head shares the embedding's weight."""
        return self.config.tie_word_embeddings

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the model, plus the tokens that the current adapter adds.

        The tokenizer is read at its first use.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> tokenizer.decode(tokenizer.encode("Hello"))
        'Hello'
        """
        lm = self.selected_model("tokenizer")
        return lm._tokenizer_with(lm.added_tokens)

    @property
    def vocab_size(self) -> int:
        """The number of logits at each position: the number of rows of the embedding, including added rows.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2, add_tokens="<step>,</step>")
        >>> lm.vocab_size - lm.config.vocab_size
        2
        """
        return slot_models.vocab_of(self.selected_model("vocab_size"))

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The tokens that the model's own adapter adds to the model's vocabulary.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2, add_tokens="<step>")
        >>> [token.text for token in lm.added_tokens]
        ['<step>']
        """
        embedding = self.model.embed_tokens
        return embedding.rows.tokens if isinstance(embedding, TrainedEmbedding) else ()

    def _file_tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the model, without added tokens."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _tokenizer_with(self, tokens: Sequence[AddedToken]) -> Tokenizer:
        """The model's tokenizer with these added tokens. The result is cached for the next call."""
        if not tokens:
            return self._file_tokenizer()
        extended = self._extended  # another thread may replace it
        if extended is None or extended[0] != tuple(tokens):
            self._extended = extended = tuple(tokens), self._file_tokenizer().with_tokens(tokens)
        return extended[1]

    def new_tokens(self, tokens: Sequence[AddedToken]) -> tuple[AddedToken, ...]:
        """Return those of an adapter's tokens that are new to the model.

        A token is new if the tokenizer does not have it, or if the embedding has no row for it.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.new_tokens([])
            ()

        Raises:
            FormatError: another token of the model already has the id or the text of a token in `tokens`.
        """
        if not tokens:
            return ()
        new = self._file_tokenizer().missing(tokens, self.model.embed_tokens.weight.shape[0])
        self._tokenizer_with(new)  # checks the ids
        return new

    def tokenizer_files(self) -> Mapping[str, bytes]:
        return self._tokenizer_with(self.added_tokens).files() if self.added_tokens else {}

    def with_tokens(self, tokens: Sequence[AddedToken]) -> Self:
        """Create a model that shares the weights, has no adapter, and has additional rows for `tokens`.

        In the embedding and in the head, each new row is the mean of the existing rows. `self` is not
        changed.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.with_tokens([]).vocab_size == lm.vocab_size
            True
        """
        plain = {id(layer): layer.frozen() for layer in self.adapter_layers().values()}
        made = self.copied(plain)
        made._named = NamedAdapters[LanguageModel]()
        made._load_tokenizer = self._file_tokenizer
        made.model.prefix = None
        if tokens:
            ids = np.array([token.id for token in tokens], np.int64)
            rows = adapter_rows.trained_layers(made, adapter_rows.rows_to_train(made, ids, ()), False, tokens)
            modules = dict(made.named_modules())
            made.exchange({id(modules[name]): layer for name, layer in rows.items()})
        return made

    @property
    def compute(self) -> str:
        """The arithmetic of the products with frozen weights: "float32", "bfloat16" or "int8".

        >>> import nplora
        >>> nplora.load_model("model.gguf", compute="bfloat16").compute
        'bfloat16'
        """
        return getattr(self.lm_head.weight, "compute", "float32")

    def with_compute(self, compute: str) -> LanguageModel:
        """Create a model that shares the weights, has no adapter, and computes in the arithmetic `compute`.

        For example, load a model with compute="int8" to generate text, and train a float32 copy of this
        model. `self` is not changed.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf", compute="int8")
            >>> lm.with_compute("float32").compute
            'float32'

        Args:
            compute: as in `nplora.load_model`.
        Raises:
            ValueError: `compute` is not available.
        """
        _check.choice("with_compute", "compute", compute, COMPUTES)
        modules = dict(self.with_tokens(()).named_modules())
        weights = SharedWeights(self.config, modules, self._mapped, compute)
        model, lm_head = building.decoder(self.config, weights)
        return LanguageModel(self.config, model, lm_head, self._file_tokenizer, self._mapped)

    def require_unchanged(self) -> None:
        """Raise CorruptError if a memory-mapped file of the weights was modified after it was opened.

        Every call that returns losses, gradients or scores makes this check after the computation. It is safe
        to replace the model's file by renaming a new file to the same name: the old file stays mapped.

            >>> import nplora
            >>> nplora.load_model("model.gguf").require_unchanged()
        """
        for stamp in self._mapped:
            stamp.require_unchanged()

    # ---- adapters ----

    @property
    def source(self) -> Path:
        """The file or directory that the model was read from.

        >>> import nplora
        >>> nplora.load_model("model.gguf").source.name
        'model.gguf'
        """
        source = Path(self.config.source)
        return source.parent if source.name == CONFIG else source

    def stored_row_order(self, name: str) -> Array | None:
        return adapting.row_order(self.config, name)

    def configuration(self) -> str:
        return self.config.described()

    def base_digest(self) -> str | None:
        """A hash of the norm weights, which identifies the model (see `models.model_digest`).

        >>> nplora.load_model("model.gguf").base_digest() == nplora.load_model("model.gguf").base_digest()
        True
        """
        norms = {name: m.weight for name, m in self.named_modules() if isinstance(m, RMSNorm)}
        family = families.of(self.config)
        return model_digest.of({f"{family.gguf_layer(name)}.weight": norm for name, norm in norms.items()})

    @_check.keywords
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
        rank_pattern: Mapping[str, int] | str | None = None,
        alpha_pattern: Mapping[str, float] | str | None = None,
        trainable_tokens: str | Sequence[str | int] = (),
        modules_to_save: str | Sequence[str] = (),
        invocation: str | Sequence[int] | None = None,
        add_tokens: str | Sequence[str] = (),
        freeze_B: bool = False,
    ) -> None:
        """Put a LoRA adapter on frozen layers.

        With init="zero", the outputs do not change until the adapter is trained. Layers that already have an
        adapter keep this adapter.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2, targets=["q_proj", "down_proj"], layers="last:1")
            >>> [name.rpartition(".")[2] for name in lm.adapter_layers()]
            ['q_proj', 'down_proj']
            >>> other = nplora.load_model("model.gguf")
            >>> ranks = {"layers.0.mlp": 4, "q_proj": 1}
            >>> other.add_lora(rank=2, targets="q_proj,up_proj", rank_pattern=ranks)
            >>> [layer.rank for layer in other.adapter_layers().values()]
            [1, 4, 1, 2]

        Args:
            rank, alpha, dropout, use_rslora, use_dora: as in `LoRALinear`.
            targets: the layers to adapt: "all-linear" (every linear layer of the blocks), "q_proj" (in every
                block), a full dotted name, several names like "q_proj,v_proj", or a list of names. The layers
                "embed_tokens" and "lm_head" are not part of "all-linear"; give their names to adapt them.
            layers: the blocks to adapt: None (all), "last:4", "first:4", a range, or a list of numbers.
            seed: seed of the initial factors. A layer's factors depend on this seed and the layer's name.
            init: initial factors, as in `LoRALinear`. "gaussian" changes the model's outputs at once. "pissa"
                and "olora" need unquantised weights.
            rank_pattern, alpha_pattern: ranks and alphas for some layers, instead of `rank` and `alpha`. The
                keys are parts of the layers' names, as in {"q_proj": 16, "layers.3.mlp": 4} or
                "q_proj=16,layers.3.mlp=4". If several keys match a layer, the first key applies. The scale of
                a layer is its alpha divided by its rank.
            trainable_tokens: a list of tokens (ids and texts), or a text like "<|im_start|>,<|im_end|>" or
                "2,3". For these tokens, the rows of the embedding and of the head are also trained. The
                trained rows start with the model's values, and replace the model's rows, as with PEFT's
                `trainable_token_indices`.
            modules_to_save: "embed_tokens", "lm_head" or both, to train all rows of the embedding or of the
                head in float32. If the embedding and the head share one weight, either name trains this
                weight.
            invocation: the invocation tokens of an activated LoRA (aLoRA), as a text or as ids. In each
                sequence, the adapter acts only on the last occurrence of the invocation tokens and on all
                later tokens. An activated LoRA can adapt only linear layers of the blocks, and cannot use
                DoRA or dropout.
            add_tokens: new tokens, as a list of texts, or a text like "<tool>,</tool>". A new token gets a
                trained row in the embedding and in the head. Each new row starts with the mean of all rows.
                If the model already has one of the tokens, the token's row is also trained, and starts with
                the model's values.
            freeze_B: train only A (LoRA-FA), and keep B at its initial values. DoRA's magnitudes and the rows
                of `trainable_tokens`, `modules_to_save` and `add_tokens` are still trained.
        Raises:
            UnsupportedError: the tokenizer cannot take new tokens.
            ValueError: a target, block or token does not exist, or an option does not fit. This error leaves
                the model unchanged.
        """
        names = adapting.targeted(self, self.config.num_hidden_layers, targets, layers)
        tokens = activated.invocation_tokens(self, "add_lora", invocation)
        if tokens is not None:
            activated.require_plain(
                "add_lora", names, use_dora, dropout, init, trainable_tokens, modules_to_save, add_tokens
            )
        new = trained_rows.new_tokens(self, "add_lora", add_tokens)
        wanted = trained_rows.wanted(self, "add_lora", trainable_tokens, modules_to_save, names, new)
        if new.added:
            self._tokenizer_with(new.added)  # fails before the model is changed
        options = {
            "dropout": dropout, "use_rslora": use_rslora, "use_dora": use_dora, "init": init,
            "freeze_B": freeze_B,
        }  # fmt: skip
        made = adapting.lora_layers(self, names, rank, alpha, rank_pattern, alpha_pattern, seed, options)
        for layer in made.values():
            layer.invocation_tokens = tokens
        modules = dict(self.named_modules())
        rows = adapter_rows.trained_layers(self, wanted, tie_whole=True, tokens=new.added)
        self.exchange({id(modules[name]): layer for name, layer in {**made, **rows}.items()})

    # ---- named adapters ----

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The named adapters, as a read-only mapping from their names. All arrays are read-only too.

        >>> import nplora
        >>> nplora.load_model("model.gguf").adapters
        mappingproxy({})
        """
        return self._named.adapters

    def load_adapter(
        self,
        path: StrPath | Adapter,
        name: str,
        any_base: bool = False,
        dtype: str | None = None,
        replace: bool = False,
    ) -> None:
        """Load an adapter under a name; `set_adapter` can then select the adapter.

        A named adapter does not change the model's own LoRA layers, and can also adapt layers that `add_lora`
        did not adapt. Named adapters are for inference only.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> nplora.save_adapter(lm, "my-adapter")
            >>> lm.load_adapter("my-adapter", "first")
            >>> lm.set_adapter("first")
            >>> list(lm.adapters)
            ['first']

        Args:
            path: a PEFT directory, a GGUF adapter file, or an `Adapter`.
            any_base: as in `nplora.load_adapter`.
            dtype: "bfloat16" rounds A and B to bfloat16. Decoding with many adapters at once is then faster
                than in float32, because A and B have half as many bytes. None: A and B keep their exact
                values. If all these values are bfloat16 numbers, decoding is as fast as with "bfloat16".
            replace: replace the adapter that has this name. If the new adapter cannot be loaded, the old one
                stays.
        Raises:
            ValueError: an adapter with this name is loaded already and `replace` is not set, or `dtype` is
                neither "bfloat16" nor None.
            TypeError: `path` is neither a path nor an `Adapter`, or `name` is not a text or is empty.
            FormatError: the adapter does not fit the model, or belongs to another model. The other errors are
                those of `nplora.load_adapter`.
        """
        if isinstance(path, Adapter):
            adapter = path
        elif isinstance(path, str | os.PathLike):
            _require_not_swapped(path, name)
            adapter = read_for(self, path, self.source, any_base)
        else:
            raise TypeError(
                f"load_adapter: path is {_check.kind(path)}, expected a path or an Adapter; "
                "nplora.combine makes one Adapter from several"
            )
        if dtype is not None:
            _check.choice("load_adapter", "dtype", dtype, ("bfloat16",))
        self._named.add(self, name, adapter, any_base, dtype, replace)

    def set_adapter(self, names: str | Iterable[str] | None) -> None:
        """Select the named adapter that later calls use instead of the model's own LoRA layers.

        The selection is valid in the current thread or asyncio task. A new thread starts without a named
        adapter. A new asyncio task, and a function that `asyncio.to_thread` calls, start with the selection
        of the code that started them. From then on, the two selections are independent.

        A call of a method of this model, or of `nplora.generate.stream`, looks up its adapters once, when it
        begins. The call keeps these adapters, even if another thread then replaces or deletes them.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2, init="gaussian")
            >>> lm.load_adapter(nplora.adapters.Adapter.from_model(lm), "first")
            >>> lm.set_adapter("first")   # one adapter
            >>> lm.set_adapter(None)      # none: the model's own LoRA layers

        Args:
            names: a name; or several names, whose adapters are added up; or None for no named adapter. An
                empty list means the same as None. The sum does not depend on the order of the names. The
                model stores only the 8 sums that were used most recently, and computes any older sum again.
        Raises:
            KeyError: one of the names is unknown; the message lists the nearest names, or all names.
            ValueError: a name is given twice.
            RuntimeError: the call is inside `disable_adapter`.
            TypeError: `names` is neither a name, nor a list of names, nor None.
            UnsupportedError: there are several names, and one of the adapters uses DoRA.
        """
        given: Any = (names,) if isinstance(names, str) else () if names is None else names
        chosen = tuple(given) if np.iterable(given) else (given,)
        if not all(isinstance(name, str) for name in chosen):
            raise TypeError(f"set_adapter: names is {names!r}, expected a name, a list of names, or None")
        if twice := next((name for name in chosen if chosen.count(name) > 1), None):
            raise ValueError(
                f"set_adapter: {twice!r} is given twice, expected each name once; to give an adapter more "
                "weight, use nplora.combine"
            )
        self._named.model(self, "set_adapter", chosen)
        self._named.select(chosen)

    def delete_adapter(self, name: str) -> None:
        """Delete a named adapter. The current thread keeps all other adapters of its selection.

        If another thread (or asyncio task) selected this adapter, the next call of the model in that thread
        raises KeyError.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> lm.load_adapter(nplora.adapters.Adapter.from_model(lm), "first")
            >>> lm.delete_adapter("first")
            >>> len(lm.adapters)
            0

        Raises:
            KeyError: no adapter has this name; the message lists the nearest names, or all names.
        """
        self._named.delete(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """A context in which the model uses neither its LoRA layers nor the selected named adapters.

        After the `with` block, the model uses the selected adapters again. In the block, `set_adapter` raises
        RuntimeError. Named adapters in the arguments of a call (`generate(adapters=...)`) are still used. A
        cache that was made outside the block keeps its named adapters.

            >>> import nplora, numpy as np
            >>> lm = nplora.load_model("model.gguf")
            >>> plain = lm.logits([1, 2])
            >>> lm.add_lora(rank=2, init="gaussian")
            >>> with lm.disable_adapter():
            ...     np.array_equal(lm.logits([1, 2]), plain)
            True
        """
        with super().disable_adapter(), self._named.none_selected():
            yield self

    def with_adapter(self, adapter: Adapter, any_base: bool = False) -> Self:
        """Create a model that shares the frozen weights and has only this adapter. `self` is not changed.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> adapter = nplora.adapters.Adapter.from_model(lm)
            >>> other = lm.with_adapter(adapter)
            >>> other.adapter_layers().keys() == lm.adapter_layers().keys()
            True

        Raises:
            TypeError: `adapter` is not an `Adapter`.
            FormatError: the adapter does not fit the model, or belongs to another model.
        """
        if not isinstance(adapter, Adapter):
            hint = "; Adapter.read(path) reads one" if isinstance(adapter, str | os.PathLike) else ""
            raise TypeError(f"with_adapter: adapter is {_check.kind(adapter)}, expected an Adapter{hint}")
        own = {id(layer): layer.frozen() for layer in self.adapter_layers().values()}
        names = {name: id(module) for name, module in self.named_modules()}
        added = {names[name]: layer for name, layer in new_layers(adapter, self, any_base).items()}
        made = self.copied({**own, **added})
        made._named = NamedAdapters[LanguageModel]()
        made._load_tokenizer = self._file_tokenizer
        made.model.prefix = None
        return made

    def named_model(self, adapter: str | Adapter, op: str = "named_model") -> LanguageModel:
        """The model with one named adapter, for inference.

        The returned model shares the frozen weights with `self`.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2, init="gaussian")
            >>> lm.load_adapter(nplora.adapters.Adapter.from_model(lm), "first")
            >>> first = lm.named_model("first")
            >>> [first.generate("Hello", 8)] == lm.generate(["Hello"], 8, adapters=["first"])
            True

        Args:
            adapter: a name, or an `Adapter` from the values of `adapters`. An `Adapter` may be given even
                after `delete_adapter` has removed it from `adapters`.
            op: the name of the calling function in messages.
        Raises:
            KeyError: no adapter has this name.
            TypeError: `adapter` is neither a name nor an `Adapter`.
        """
        if not isinstance(adapter, Adapter | str):
            raise TypeError(f"{op}: adapter is {_check.kind(adapter)}, expected a name or an Adapter")
        return self._named.model_of(self, op, adapter)

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        super().exchange(replaced)
        self._named.forget_models()

    def selected_model(self, op: str) -> LanguageModel:
        """The model with the named adapters that this thread has selected; `self` if none is selected.

        A function that uses the model several times calls this method once, to keep the same adapters.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.selected_model("my_program") is lm
            True

        Args:
            op: the name of the calling function in messages.
        Raises:
            KeyError: a selected adapter was deleted.
        """
        return self._named.model(self, op, self._named.selected)

    def merge(self, dtype: str | None = None) -> list[MergeReport]:
        """Like `Module.merge`, but raise RuntimeError if a named adapter is selected.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2)
        >>> reports = lm.merge()
        >>> lm.unmerge()
        """
        self._require_none_selected("merge")
        return super().merge(dtype)

    def merge_and_unload(self) -> Module:
        """Like `Module.merge_and_unload`, but raise RuntimeError if a named adapter is selected.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2)
        >>> lm.merge_and_unload() is lm, len(lm.adapter_layers())
        (True, 0)
        """
        self._require_none_selected("merge_and_unload")
        tokenizer = self.tokenizer if self.added_tokens else self._tokenizer
        made = super().merge_and_unload()
        self._tokenizer = tokenizer
        return made

    # ---- inference ----

    def logits(self, token_ids: npt.ArrayLike) -> Array:
        """Compute the scores of all possible next tokens at each position.

        The result has shape (batch, time, vocab) for ids of shape (batch, time), and (time, vocab) for ids of
        shape (time,).

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.logits([[1, 2, 3], [4, 5, 6]]).shape == (2, 3, lm.config.vocab_size)
            True

        Raises:
            TypeError: `token_ids` are not integers.
            ValueError: `token_ids` have the wrong number of axes, or an id is not in the vocabulary.
            CorruptError: as in `require_unchanged`.
        """
        return self(token_ids)

    @_with_selected_adapter
    def loss(self, token_ids: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """The mean of -log p(label) over all labels that are not ignored; 0 if all are ignored.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.loss([1, 2, 3], [-100, -100, 3]) > 0   # how well 1, 2 predict 3
            True

        Args:
            token_ids: integers (batch, time) or (time,).
            labels: integers of the same shape, not shifted: each label is compared with the prediction from
                the tokens before it. The first label and labels of -100 are ignored.
        Raises:
            TypeError, ValueError, CorruptError: as in `logits`.
        """
        return self.loss_packed(self._packed("loss", token_ids, labels))

    @_with_selected_adapter
    def loss_packed(self, batch: PackedBatch, as_decoded: bool = True) -> float:
        """Like `loss`, for packed sequences.

            >>> import nplora
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> batch = pack([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])
            >>> batch.num_targets, lm.loss_packed(batch) > 0
            (3, True)

        Args:
            as_decoded: has an effect only with compute="int8". True: compute a few tokens at a time, with the
                arithmetic of decoding. False: compute whole sequences in bfloat16, as for prompts. This is
                faster.
        Raises:
            ValueError, CorruptError: as in `logits`.
        """
        self._check_batch("loss_packed", batch)
        with inference():
            if self.compute == "int8" and as_decoded:
                total = stepwise.loss(self.config, self.model, self.lm_head, batch)
            else:
                x = self.model.infer(batch.ids, packed_positions(batch.starts))
                total = head.loss(self.model, self.lm_head, x, batch.targets)
        self.require_unchanged()
        return total / max(1, batch.num_targets)

    @_with_selected_adapter
    def log_probs(self, batch: PackedBatch) -> Array:
        """The log-probability of each of a batch's m targets, float64 (m,), in the order of the targets.

            >>> import nplora
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> batch = pack([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])
            >>> lm.log_probs(batch).shape
            (3,)

        Raises:
            ValueError, CorruptError: as in `logits`.
        """
        self._check_batch("log_probs", batch)
        with inference():
            x = self.model.infer(batch.ids, packed_positions(batch.starts))
            losses = head.token_losses(self.model, self.lm_head, x, batch.targets)
        self.require_unchanged()
        return -losses

    @_with_selected_adapter
    def hidden_states(self, token_ids: npt.ArrayLike) -> Array:
        """The hidden states after the last norm, which the head turns into logits.

        The result has shape (batch, time, hidden_size) for ids of shape (batch, time), and (time,
        hidden_size) for ids of shape (time,). For texts of different lengths, for embeddings, or for
        gradients of the hidden states, load the model with `nplora.load_encoder`.

            >>> import nplora, numpy as np
            >>> lm = nplora.load_model("model.gguf")
            >>> states = lm.hidden_states([1, 2, 3])
            >>> states.shape == (3, lm.config.hidden_size)
            True
            >>> np.allclose(states @ lm.lm_head.weight.to_numpy().T, lm.logits([1, 2, 3]), atol=1e-4)
            True

        Raises:
            TypeError, ValueError, CorruptError: as in `logits`.
        """
        op = "hidden_states"
        ids = self._ids(op, token_ids)
        rows = np.atleast_2d(ids)
        self._warn_if_longer(op, rows.shape[1])
        starts = np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1]
        with inference():
            states = self.model.hidden_states(self.model.infer(rows.reshape(-1), packed_positions(starts)))
        self.require_unchanged()
        return states.reshape(*ids.shape, -1)

    @_with_selected_adapter
    def residual_stream(self, batch: PackedBatch) -> Array:
        """The residual stream (n, hidden_size) after the last block, for the n tokens of a batch.

        `logits_of` turns rows of the residual stream into logits.

            >>> import nplora
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> x = lm.residual_stream(pack([([1, 2, 3], [1, 2, 3])]))
            >>> x.shape == (3, lm.config.hidden_size)
            True

        Raises:
            ValueError, CorruptError: as in `logits`.
        """
        self._check_batch("residual_stream", batch)
        with inference():
            x = self.model.infer(batch.ids, packed_positions(batch.starts))
        self.require_unchanged()
        return x

    @_with_selected_adapter
    def logits_of(self, residual_stream: Array) -> Array:
        """Compute logits (m, vocab) from rows (m, hidden_size) of the result of `residual_stream`.

        >>> import nplora, numpy as np
        >>> from nplora.models.packing import pack
        >>> lm = nplora.load_model("model.gguf")
        >>> x = lm.residual_stream(pack([([1, 2, 3], [1, 2, 3])]))
        >>> np.allclose(lm.logits_of(x[1:]), lm.logits([1, 2, 3])[1:], atol=1e-4)
        True
        """
        with inference():
            return head.logits_of(self.model, self.lm_head, residual_stream)

    @_with_selected_adapter
    def loss_with(self, batch: PackedBatch, loss: head.LogitLoss) -> float:
        """Return the sum of a loss over all positions that have a target.

        The argument `loss` is described in `forward_backward_with`.

        Raises:
            ValueError, CorruptError: as in `logits`.

        >>> import nplora, numpy as np
        >>> from nplora.models.packing import pack
        >>> lm = nplora.load_model("model.gguf")
        >>> batch = pack([([1, 2, 3], [1, 2, 3])])
        >>> lm.loss_with(batch, lambda logits, rows, factor, gradient: np.ones(len(rows)))
        2.0
        """
        self._check_batch("loss_with", batch)
        with inference():
            x = self.model.infer(batch.ids, packed_positions(batch.starts))
            total = head.logit_loss(self.model, self.lm_head, x, batch.targets, loss)
        self.require_unchanged()
        return total

    @_with_selected_adapter
    def token_scores(self, batch: PackedBatch) -> TokenScores:
        """Return each target's log-probability, and whether the target is the most likely token.

        The targets are in the order of the batch. With compute="int8", a few tokens are computed at a time,
        as in decoding.

            >>> import nplora
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> batch = pack([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])
            >>> scores = lm.token_scores(batch)
            >>> scores.log_probs.shape, scores.is_top.dtype
            ((3,), dtype('bool'))

        Raises:
            ValueError, CorruptError: as in `logits`.
        """
        self._check_batch("token_scores", batch)
        with inference():
            if self.compute == "int8":
                losses, is_top = stepwise.token_scores(self.config, self.model, self.lm_head, batch)
            else:
                x = self.model.infer(batch.ids, packed_positions(batch.starts))
                losses, is_top = head.token_scores(self.model, self.lm_head, x, batch.targets)
        self.require_unchanged()
        return TokenScores(-losses, is_top)

    @_with_selected_adapter
    def continuation_scores(
        self, prompts: Sequence[npt.ArrayLike], continuations: Sequence[Sequence[npt.ArrayLike]]
    ) -> list[list[TokenScores]]:
        """Return the `TokenScores` of several continuations of each prompt.

        The model processes a prompt only once for all its continuations. An activated LoRA begins to act at
        the last occurrence of its invocation tokens in the prompt, as in `generate`.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> [[one, other]] = lm.continuation_scores([[1, 2, 3]], [[[4], [5, 6]]])
            >>> one.log_probs.shape, other.log_probs.shape
            ((1,), (2,))

        Args:
            prompts: the token ids of each prompt. A prompt has at least one token.
            continuations: for each prompt, the token ids of each continuation. A prompt has at least one
                continuation, and a continuation has at least one token.
        Raises:
            ValueError: a prompt or continuation is empty, a prompt has no continuation, or the two lists have
                different lengths; see `logits` for more reasons.
            TypeError, CorruptError: as in `logits`.
        """
        op = "continuation_scores"
        prompts, continuations = list(prompts), list(continuations)
        if len(prompts) != len(continuations):
            raise ValueError(
                f"{op}: continuations has {counted(len(continuations), 'list')}, "
                f"expected {len(prompts)}, one for each prompt"
            )
        questions = [
            Question(self._sequence(op, prompt), [self._sequence(op, tokens) for tokens in several])
            for prompt, several in zip(prompts, continuations, strict=True)
        ]
        if not all(question.continuations for question in questions):
            raise ValueError(f"{op}: a prompt has no continuation, expected at least one")
        self._warn_if_longer(op, max((question.computed for question in questions), default=0))
        rows = stepwise.FEW if self.compute == "int8" else MOST_ROWS
        with inference():
            scores = score_continuations(self.config, self.model, self.lm_head, questions, rows)
        self.require_unchanged()
        return [[TokenScores(-losses, is_top) for losses, is_top in each] for each in scores]

    def _sequence(self, op: str, token_ids: npt.ArrayLike) -> Array:
        """Check the ids of one sequence, which must not be empty."""
        ids = self._ids(op, token_ids)
        if ids.ndim != 1 or not ids.size:
            raise ValueError(
                f"{op}: a sequence has shape {ids.shape}, expected (time,) with at least 1 token"
            )
        return ids

    # ---- training ----

    def train_step(self, token_ids: npt.ArrayLike, labels: npt.ArrayLike, optimizer: Optimizer) -> float:
        """Run a forward and a backward pass, and update the adapters. Return the loss before the update.

        If all labels are ignored, the loss is 0, and neither the parameters nor the optimiser's state change.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> optimizer = nplora.AdamW(lr=0.01)
            >>> before = lm.train_step([1, 2, 3], [1, 2, 3], optimizer)
            >>> lm.loss([1, 2, 3], [1, 2, 3]) < before
            True

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; nothing was updated.
            ValueError: the model has no adapter; see `loss` for more reasons.
            TypeError: `optimizer` is not an optimiser of nplora; see `loss` for more reasons.
            RuntimeError: as in `forward_backward`.
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
        """Return the sum of the losses at all targets of a batch.

        Add `factor` times the gradient of the sum of losses to the adapters' gradients. For the mean over
        several batches, set `factor` to 1 / (the number of targets of all batches). A batch without targets
        is not computed, and its loss is 0.

            >>> import nplora
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> batch = pack([([1, 2, 3], [1, 2, 3])])
            >>> total = lm.forward_backward(batch, 1 / batch.num_targets)
            >>> bool(lm.parameters()[0].grad.any())
            True

        Raises:
            ValueError: the model has no adapter, or an id or target is not in the vocabulary.
            RuntimeError: a layer is merged, a named adapter is selected, or all adapters are switched off.
            CorruptError: as in `require_unchanged`; the gradients are then not valid.
        """
        self._require_ready("forward_backward", batch)
        if not batch.num_targets:
            return 0.0
        x, saved = self.model.run(batch.ids, packed_positions(batch.starts))
        with self._added_at_once():
            total, dx = head.loss_and_gradient(self.model, self.lm_head, x, batch.targets, factor)
            self.model.run_backward(dx, saved)
        self.require_unchanged()
        return total

    def forward_backward_of(self, batch: PackedBatch, loss: Callable[[Array], tuple[float, Array]]) -> float:
        """Return the loss that the function `loss` computes from the log-probabilities of the targets.

        Add the gradient of the loss to the adapters' gradients.

            >>> import nplora, numpy as np
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> batch = pack([([1, 2, 3], [1, 2, 3])])
            >>> def unlikely(log_probs):  # the loss makes the targets less likely
            ...     return float(log_probs.sum()), np.ones_like(log_probs)
            >>> bool(lm.forward_backward_of(batch, unlikely) == lm.log_probs(batch).sum())
            True

        Args:
            loss: a function of one argument: the log-probability of each target of the batch, float64 (m,).
                The function returns the loss, and the loss's derivative with respect to each log-probability
                (m,).
        Raises the errors that `forward_backward` raises.
        """
        self._require_ready("forward_backward_of", batch)
        x, saved = self.model.run(batch.ids, packed_positions(batch.starts))

        def function(losses: Array) -> tuple[float, Array]:
            value, gradient = loss(-losses)
            return value, -gradient

        with self._added_at_once():
            value, dx = head.gradient_of_losses(self.model, self.lm_head, x, batch.targets, function)
            self.model.run_backward(dx, saved)
        self.require_unchanged()
        return value

    def forward_backward_with(self, batch: PackedBatch, loss: head.LogitLoss, factor: float) -> float:
        """Return the sum of a loss over all positions that have a target.

        Add `factor` times the gradient of this sum to the adapters' gradients. The function `loss` is called
        for a few positions at a time, so the logits of all tokens are never in memory at once.

            >>> import nplora, numpy as np
            >>> from nplora.models.packing import pack
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> batch = pack([([1, 2, 3], [1, 2, 3])])
            >>> def small(logits, rows, factor, gradient):  # the loss makes all logits small
            ...     losses = np.square(logits).sum(axis=1, dtype=float)
            ...     logits *= 2 * factor
            ...     return losses
            >>> lm.forward_backward_with(batch, small, 1 / batch.num_targets) > 0
            True

        Args:
            loss: a function that is called as loss(logits, rows, factor, gradient). Row i of `logits` belongs
                to the position rows[i] of the batch. The function returns the loss of each row. If `gradient`
                is true, the function also overwrites `logits` with `factor` times the gradient.
        Raises the errors that `forward_backward` raises.
        """
        self._require_ready("forward_backward_with", batch)
        if not batch.num_targets:
            return 0.0
        x, saved = self.model.run(batch.ids, packed_positions(batch.starts))
        with self._added_at_once():
            total, dx = head.gradient_of_logit_loss(self.model, self.lm_head, x, batch.targets, loss, factor)
            self.model.run_backward(dx, saved)
        self.require_unchanged()
        return total

    @contextlib.contextmanager
    def _added_at_once(self) -> Iterator[None]:
        """A context in which the head's gradients start at 0.

        When the context ends, the head's earlier gradients are added to the gradients of this context.

        The head processes a batch in several parts. This context first sums the gradients of all parts of one
        batch, and then adds the gradients of earlier batches. So the sum over several batches has the same
        bits, whether one or several processes compute the batches. If all rows of the head are trained, the
        context does nothing, because a copy of the gradients would be too large.
        """
        arrays = [parameter.grad for parameter in self.lm_head.parameters()]
        if isinstance(self.lm_head, TrainedHead):
            # `parameters` of a tied head lacks the rows of the shared weight: they belong to the embedding.
            arrays = [] if self.lm_head.is_whole else [self.lm_head.rows.grad]
        before = [(array, array.copy()) for array in arrays if array.any()]
        for array, _ in before:
            array.fill(0)
        try:
            yield
        finally:
            for array, sums in before:
                array += sums

    def _require_ready(self, op: str, batch: PackedBatch) -> None:
        """Check that the model can be trained on a batch."""
        self._require_none_selected(op)
        self._check_batch(op, batch)
        if not self.adapter_layers():
            raise ValueError(f"{op}: the model has no adapter; call add_lora() first")
        if not any(layer.adapter_enabled for layer in self.adapter_layers().values()):
            raise RuntimeError(f"{op}: nothing is trained, because all adapters are switched off")
        self.require_trainable(op)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, LanguageModelSaved | None]:
        """Return the logits of token ids `x`, as `logits` does, and the values that `backward` needs.

        The loss may be any function of the logits.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> logits, saved = lm.forward([1, 2, 3])
            >>> loss, dlogits = nplora.losses.cross_entropy(logits[:-1], [2, 3])

        Raises:
            RuntimeError: a named adapter is selected. The other errors are those of `logits`.
        """
        if not inferring():
            self._require_none_selected("LanguageModel.forward")
        elif (lm := self.selected_model("LanguageModel.forward")) is not self:
            return lm.forward(x)
        ids = self._ids("LanguageModel.forward", x)
        starts = np.arange(len(ids.reshape(-1, ids.shape[-1])) + 1 if ids.size else 1, dtype=np.int64)
        starts *= ids.shape[-1]
        positions = packed_positions(starts)
        if inferring():
            stream, saved = self.model.infer(ids.reshape(-1), positions), None
        else:
            stream, saved = self.model.run(ids.reshape(-1), positions)
        logits, kept = head.logits_forward(self.lm_head, self.model.read_out(stream))
        self.require_unchanged()
        shaped = logits.reshape(*ids.shape, logits.shape[1])
        if saved is None:
            return shaped, None
        return shaped, LanguageModelSaved(ids.shape, stream, saved, kept, [None], layer=self)

    def backward(self, dy: Array, saved: LanguageModelSaved, need_dx: bool = True) -> Gradient:
        """Accumulate the gradients of the adapters. `saved` is freed, and cannot be used again.

        Without an adapter, no gradient is accumulated, and no error is raised. So a frozen model can be a
        part of a larger model that is trained.

            >>> import nplora, numpy as np
            >>> lm = nplora.load_model("model.gguf")
            >>> lm.add_lora(rank=2)
            >>> logits, saved = lm.forward([1, 2, 3])
            >>> lm.backward(np.ones_like(logits), saved)
            >>> bool(lm.parameters()[0].grad.any())
            True

        Args:
            dy: the gradient of the loss with respect to the logits, with the same shape.
        Raises:
            ValueError: `dy` does not have the shape of the logits, or `saved` was returned by another model.
            TypeError: `saved` was not returned by `forward`.
            RuntimeError: `saved` was used before, or a layer is merged.
        """
        op, vocab = "LanguageModel.backward", slot_models.vocab_of(self)
        _check.saved(op, saved, LanguageModelSaved)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, vocab), np.float32).reshape(-1, vocab)
        _check.own(op, saved, self)
        for layer in self.adapter_layers().values():
            layer.require_trainable("backward")
        saved.use_up(op)
        if isinstance(self.lm_head, TrainedHead):
            rows = rows.copy()  # the head overwrites its argument
        dnormed = head.logits_backward(self.lm_head, rows, saved.head)
        self.model.run_backward(self.model.read_out_backward(dnormed, saved.x), saved.decoder)
        return None

    # ---- decoding ----

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Create a cache for `slots` sequences of at most `capacity` tokens.

        A slot uses the adapter that is selected now, unless you set another adapter in `cache.adapters`.

        A model with LongRoPE (Phi-3 with a long context) has two sets of rotation factors: one for sequences
        up to the model's original context, and one for longer sequences. `cache.limits`, the maximum length
        of the sequence in each slot, decides which set is used. At first, each limit is `capacity`. If a
        sequence will stay short, lower the limit of its slot before you add its first token. `generate`
        begins with the factors for short sequences, as transformers does. When a sequence outgrows the
        original context, `generate` processes all tokens of the sequence again.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> cache = lm.new_cache(slots=2, capacity=16)
            >>> lm.decode([[1, 2, 3], [4, 5, 6]], [0, 1], cache).shape == (2, lm.config.vocab_size)
            True
            >>> cache.lengths
            array([3, 3])

        Raises:
            CorruptError: as in `require_unchanged`.
            KeyError: the selected adapter was deleted.
        """
        self.require_unchanged()
        resolve = functools.partial(self.named_model, op="KVCache.adapters")
        return KVCache(self.config, slots, capacity, self.selected_model("new_cache"), resolve)

    def decode(self, token_ids: npt.ArrayLike, slots: npt.ArrayLike, cache: KVCache) -> Array:
        """Add tokens of m sequences to a cache. Return the logits (m, vocab) of each sequence's next token.

        The logits of a sequence have the same bits no matter which other sequences the same call computes.
        For each sequence, `cache.adapters` gives the adapter of the sequence's slot. If an adapter adds
        tokens, these tokens have scores of -inf in sequences with other adapters.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> cache = lm.new_cache(slots=1, capacity=8)
            >>> ids = [1, 2]
            >>> logits = lm.decode([ids], [0], cache)
            >>> for _ in range(3):
            ...     ids.append(int(logits[0].argmax()))
            ...     logits = lm.decode(ids[-1:], [0], cache)
            >>> len(ids), int(cache.lengths[0])
            (5, 5)

        Args:
            token_ids: integers (m, count) or (m,), the next tokens of each sequence; or a list of m arrays
                (count,) of different lengths. A long prompt may be added by several calls.
            slots: integers (m,), the cache slot of each sequence. No slot may occur twice.
        Raises:
            TypeError: `token_ids` or `slots` are not integers.
            ValueError: the shapes do not fit, an id or slot is out of range, or the cache is full. This error
                leaves the cache unchanged.
            CorruptError: as in `require_unchanged`.
        """
        pieces = slot_models.pieces_of(token_ids)
        rows = _check.integers("decode", "slots", slots)
        if rows.shape != (len(pieces),):
            raise ValueError(
                f"decode: slots have shape {rows.shape}, expected one slot for each of "
                f"{len(pieces)} sequences"
            )
        counts = np.array([len(piece) for piece in pieces])
        cache.require_room(rows, counts)
        slot_models.forget(cache, self._named.models)
        with inference():
            logits = slot_models.decode(self, pieces, rows, cache)
        self.require_unchanged()
        cache.lengths[rows] += counts
        return logits

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = (),
        adapters: Adapters | None = None,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Iterable[Prompt],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = (),
        adapters: Adapters | None = None,
    ) -> list[str]: ...
    @_check.keywords
    def generate(
        self,
        prompt: Prompt | Iterable[Prompt],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = (),
        adapters: Adapters | None = None,
    ) -> str | list[str]:
        """Generate a text after a prompt, or after each of several prompts.

        By default, each token is the most likely one.

            >>> import nplora
            >>> lm = nplora.load_model("model.gguf")
            >>> text = lm.generate("Hello", max_new_tokens=8)
            >>> texts = lm.generate(["Hello", "Good"], max_new_tokens=8, temperature=0.8, top_p=0.95, seed=1)
            >>> reply = lm.generate([{"role": "user", "content": "Hello"}], max_new_tokens=8)
            >>> type(text), len(texts), type(reply)
            (<class 'str'>, 2, <class 'str'>)

        Args:
            prompt: a text; a chat, which is a list of messages {"role": ..., "content": ...}; or an iterable
                of several texts or chats.
            max_new_tokens: the maximum number of generated tokens.
            temperature: sampling temperature. At 0, the most likely token is always chosen; at 1, the model's
                own probabilities are used. Lower values favour likely tokens, higher values favour unlikely
                ones.
            top_k: number of tokens to sample from, the most likely ones.
            top_p: total probability of the most likely tokens to sample from, above 0 and at most 1.
            repetition_penalty: a value above 1 makes tokens that are already in the text less likely.
            stop: texts that end generation, and that are not part of the returned text.
            seed: random seed of the sampling. The same seed gives the same text.
            presence_penalty: a number that is subtracted from the score of every token that was generated
                before.
            frequency_penalty: a number that is subtracted from a token's score once for each time that the
                token was generated before.
            logit_bias: numbers that are added to the scores of tokens, by token id; -inf rules a token out.
            adapters: for each prompt, the name of a named adapter, an `Adapter`, or None for the model with
                its selected adapters. All prompts are processed together, but each text is the same as if its
                prompt were processed alone.
        Returns:
            the generated text without its prompt; a list of texts for several prompts.
        Raises:
            ValueError: an option is out of range, a prompt is empty or fills the context, or the numbers of
                prompts and adapters differ.
            TypeError: an option is not known, or a prompt is neither a text nor a chat.
            KeyError: an adapter is unknown.
            FloatingPointError: the model's scores are NaN, or the largest one is infinite.
            CorruptError: as in `require_unchanged`.
        Warns:
            UserWarning: the context was full before the text ended, or `top_k` or `top_p` has no effect.
        """
        options = max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop, seed
        penalties = presence_penalty, frequency_penalty, logit_bias
        sampling = Sampling(*options, *penalties)  # type: ignore[arg-type]  # Sampling makes a tuple of `stop`
        if not np.iterable(prompt) or isinstance(prompt, str | bytes | bytearray | Mapping):
            return generate(self, [prompt], sampling, adapters)[0]  # type: ignore[list-item]
        given: list[Any] = list(prompt)
        if given and all(isinstance(message, Mapping) for message in given):
            return generate(self, [given], sampling, adapters)[0]
        return generate(self, given, sampling, adapters)

    def require_trainable(self, what: str) -> None:
        """Like `Module.require_trainable`, but also raise RuntimeError if a named adapter is selected."""
        self._require_none_selected(what)
        super().require_trainable(what)

    def _require_none_selected(self, op: str) -> None:
        if names := self._named.selected:
            raise RuntimeError(
                f"{op}: the named adapter {', '.join(map(repr, names))} is selected, but named adapters are "
                "for inference only; call set_adapter(None) first, or attach the adapter to the model"
            )

    def __repr__(self) -> str:
        config = self.config
        lines = [
            f"LanguageModel({str(self.source)!r}, {config.model_type}: "
            f"{counted(config.num_hidden_layers, 'block')} of width {config.hidden_size:,}, "
            f"vocabulary {slot_models.vocab_of(self):,}, context {config.max_position_embeddings:,})",
            f"  weights: {self.num_parameters - self.num_trainable:,} values in {self._storages()}, "
            f"compute {self.compute!r}",
        ]
        if layers := self.adapter_layers():
            rows = _rows(layers.values())
            lines.append(f"  adapter: {_ranks(layers.values())}{rows}, {self.num_trainable:,} trained values")
        if named := self.adapters:
            chosen = self._named.selected
            shown = (f"{name!r}{' (selected)' * (name in chosen)}" for name in named)
            lines.append(f"  named adapters: {', '.join(shown)}")
        return "\n".join(lines)

    def _storages(self) -> str:
        """The storage formats of the weights; the format with the most values comes first."""
        held = {id(a): a for _, module in self.named_modules() for a in module.local_frozen()}
        sizes = Counter[str]()
        for array in held.values():
            sizes[str(array.dtype)] += array.size if len(array.shape) > 1 else 0  # no norms or biases
        return ", ".join(name for name, size in sizes.most_common() if size)

    # ---- checks of arguments ----

    def _ids(self, op: str, token_ids: npt.ArrayLike) -> Array:
        ids, vocab = _check.integers(op, "token_ids", token_ids), slot_models.vocab_of(self)
        _check.in_range(op, "token_ids", ids, vocab)
        if ids.ndim not in (1, 2):
            raise ValueError(f"{op}: token_ids have shape {ids.shape}, expected (batch, time) or (time,)")
        return ids

    def _packed(self, op: str, token_ids: npt.ArrayLike, labels: npt.ArrayLike) -> PackedBatch:
        ids, wanted = self._ids(op, token_ids), _check.integers(op, "labels", labels)
        if ids.shape != wanted.shape:
            raise ValueError(f"{op}: token_ids have shape {ids.shape}, but labels have shape {wanted.shape}")
        return pack(zip(np.atleast_2d(ids), np.atleast_2d(wanted), strict=True))

    def _check_batch(self, op: str, batch: PackedBatch) -> None:
        """Check the ids and targets of a batch before the forward pass begins."""
        vocab = slot_models.vocab_of(self)
        _check.in_range(op, "ids", batch.ids, vocab)
        _check.in_range(op, "targets", batch.targets[batch.targets != IGNORED], vocab)
        self._warn_if_longer(op, int(np.diff(batch.starts).max(initial=0)))

    def _warn_if_longer(self, op: str, longest: int) -> None:
        """Warn if the longest sequence does not fit into the model's context."""
        if longest > self.config.max_position_embeddings:
            warn_user(
                f"{op}: a sequence has {longest} tokens, but the model was trained for at most "
                f"{self.config.max_position_embeddings}"
            )


def _require_not_swapped(path: StrPath, name: object) -> None:
    """Raise FileNotFoundError if `path` does not exist, and `name` looks like the path of an adapter.

    A name without a path separator is not checked: an adapter often has the name of its directory.
    """
    if os.path.lexists(path):
        return
    if isinstance(name, Adapter):
        found = "is an Adapter"
    elif isinstance(name, str | os.PathLike) and os.path.basename(name) != name and os.path.lexists(name):
        found = f"{os.fspath(name)!r} exists"
    else:
        return
    message = f"load_adapter: path, the first argument, does not exist, but the second argument {found}"
    raise FileNotFoundError(errno.ENOENT, f"{message}: swap the two", os.fspath(path))


def _ranks(layers: Iterable[Module]) -> str:
    """Describe the ranks and alphas of LoRA layers: "rank 8, alpha 16 on 14 layers"."""
    found = [layer for layer in layers if isinstance(layer, LoRALayer)]
    ranks, alphas = sorted({a.rank for a in found}), sorted({a.alpha for a in found})
    parts = [
        f"{name} {values[0]:g}" if len(values) == 1 else f"{name} {values[0]:g} to {values[-1]:g}"
        for name, values in (("rank", ranks), ("alpha", alphas))
    ]
    extras = [word for word, on in (("DoRA", any(a.use_dora for a in found)),) if on]
    extras += ["merged"] if any(a.merged for a in found) else []
    return f"{', '.join([*parts, *extras])} on {counted(len(found), 'layer')}"


def _rows(layers: Iterable[Module]) -> str:
    """Describe trained rows of the embedding and the head: ", 2 trained tokens" or ", the whole head"."""
    found = {
        name: layer for layer in layers if isinstance(layer, TrainedRowsLayer) for name in (type(layer),)
    }
    parts = []
    if tokens := {len(layer.rows.ids) for layer in found.values() if layer.rows.ids is not None}:
        parts.append(counted(max(tokens), "trained token"))
    words = ((TrainedEmbedding, "the whole embedding"), (TrainedHead, "the whole head"))
    parts += [word for kind, word in words if kind in found and found[kind].is_whole]
    return "".join(f", {part}" for part in parts)
