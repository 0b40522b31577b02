"""Encoder: hidden states and embeddings of texts, and gradients of the adapters."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.formats.errors import FormatError, UnsupportedError, counted
from nplora.formats.files import Stamp
from nplora.formats.model_directory import CONFIG
from nplora.lm import adapting
from nplora.lm.pooling import Pooling, PoolingSaved
from nplora.lm.word_ids import WordIds
from nplora.models import model_digest
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder, DecoderSaved, frozen_weights
from nplora.models.encoder_config import EncoderConfig
from nplora.models.packing import cut
from nplora.models.positions import packed_positions
from nplora.nn import LayerNorm, RMSNorm
from nplora.nn.module import Gradient, Module, Saved, inference
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Ids = Sequence[npt.ArrayLike]  # the token ids of each text

# The maximum number of tokens that `embed` and `hidden_states` compute at once. More tokens would take more
# memory. With 4,096 tokens, MiniLM embedded 4 % fewer texts a second.
MOST_TOKENS = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderSaved(Saved):
    """The values that `Encoder.backward` needs. `backward` frees these values when it uses them.

    `x` has a row for each token whose hidden state was computed. `starts` holds the index of each text's
    first row in `x`, followed by the number of rows.
    """

    x: Array
    starts: Array
    decoder: DecoderSaved
    pooling: PoolingSaved | None
    unused: list[None]  # empty once a backward pass has begun

    def use_up(self, op: str) -> None:
        """Mark these values as used. Raise RuntimeError if the values were used before."""
        try:
            self.unused.pop()
        except IndexError:
            raise RuntimeError(
                f"{op}: an earlier backward pass used and freed the saved values; call forward again"
            ) from None


def require_encoder(op: str, value: object) -> None:
    """Raise TypeError if a value is not an `Encoder`."""
    if not isinstance(value, Encoder):
        raise TypeError(
            f"{op}: encoder is {_check.kind(value)}, expected an encoder, as load_encoder returns it"
        )


class Encoder(Module):
    """A model with frozen weights that turns texts into vectors; `nplora.load_encoder` loads such a model.

    The layers have the names that transformers gives them in the model without a head:
    `encoder.layer.0.attention.self.query` in BERT, `layers.0.self_attn.q_proj` in Llama.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.embed(["a cat", "a dog and a cat"]).shape == (2, encoder.dim)
        True

    Attributes:
        config: the sizes and settings of the model.
        model: the embeddings, the blocks and the last norm.
        pooling: how the hidden states of a text become its embedding.
        max_length: the largest number of tokens of a text; `embed` cuts longer texts. `max_length` can be
            changed.
        prompts: a dict from names to prompts. `embed` can put one of the prompts before each text.
        default_prompt: the name of the prompt that `embed` uses by default, or None.
        prefix: the name of the attribute that holds this model in transformers' models with a head, such as
            "bert" in BertForSequenceClassification.
    """

    task_type = "FEATURE_EXTRACTION"

    def __init__(
        self,
        config: EncoderConfig | ModelConfig,
        model: Decoder,
        load_tokenizer: Callable[[], Tokenizer],
        pooling: Pooling,
        *,
        prefix: str,
        max_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        include_prompt: bool = True,
        mapped: Sequence[Stamp] = (),
        read_tensor: Callable[[str], Array | None] = lambda name: None,
    ) -> None:
        self.config, self.model, self.pooling, self.prefix = config, model, pooling, prefix
        self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self.prompts, self.default_prompt = dict(prompts or {}), default_prompt
        self._include_prompt = include_prompt
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._mapped = tuple(mapped)
        self._read_tensor = read_tensor

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        """Yield each module with its name in transformers and PEFT. The names do not begin with "model."."""
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for child, name in ((self.model, ""), (self.pooling, "pooling")):
            for found, module in child._walk(name, seen):
                yield ".".join(filter(None, (prefix, found or "model"))), module

    @property
    def compute(self) -> str:
        """The arithmetic of the products with frozen weights: "float32", "bfloat16" or "int8".

        >>> import nplora
        >>> nplora.load_encoder("encoder-model", compute="bfloat16").compute
        'bfloat16'
        """
        weights = frozen_weights(self.model.layers)
        return next((weight.compute for weight in weights), "float32")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the model. The tokenizer is read at its first use.

        >>> import nplora
        >>> tokenizer = nplora.load_encoder("encoder-model").tokenizer
        >>> tokenizer.decode(tokenizer.encode("a cat"))
        'a cat'
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    @property
    def dim(self) -> int:
        """The width of the embeddings.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.dim == encoder.config.hidden_size
        True
        """
        return self.pooling.dim(self.config.hidden_size)

    def head_tensor(self, name: str) -> Array | None:
        """Read a tensor that the model's files contain, but that this encoder does not use.

        Return the tensor as float32, or None if the files do not have it.

        For example, BERT's classifiers begin with the layer "pooler.dense".

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> encoder.head_tensor("pooler.dense.weight") is None
            True

        Args:
            name: the name in transformers, with or without the `prefix` of models with a head.
        Raises:
            FormatError: a value is NaN or infinite.
            UnsupportedError: the tensor does not hold floats.
        """
        found = self._read_tensor(name)
        return self._read_tensor(name.removeprefix(f"{self.prefix}.")) if found is None else found

    # ---- adapters ----

    @property
    def source(self) -> Path:
        """The file or directory that the model was read from.

        >>> import nplora
        >>> nplora.load_encoder("encoder-model").source.name
        'encoder-model'
        """
        source = Path(self.config.source)
        return source.parent if source.name == CONFIG else source

    def stored_row_order(self, name: str) -> Array | None:
        return adapting.row_order(self.config, name) if isinstance(self.config, ModelConfig) else None

    def configuration(self) -> str:
        return self.config.described()

    def base_digest(self) -> str | None:
        """A hash of the norm weights, which identifies the model (see `models.model_digest`)."""
        norms = {
            f"{name}.weight": module.weight
            for name, module in self.named_modules()
            if isinstance(module, LayerNorm | RMSNorm)
        }
        return model_digest.of(norms)

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
        freeze_B: bool = False,
    ) -> None:
        """Put a LoRA adapter on frozen layers.

        With init="zero", the outputs do not change until the adapter is trained. Layers that already have an
        adapter keep this adapter. `nplora.save_adapter` writes a PEFT adapter.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> encoder.add_lora(rank=2, targets="query,value", layers="last:1")
            >>> list(encoder.adapter_layers())
            ['encoder.layer.1.attention.self.query', 'encoder.layer.1.attention.self.value']

        Args:
            rank, alpha, dropout, use_rslora, use_dora: as in `LoRALinear`.
            targets: the layers to adapt: "all-linear" means every linear layer of the blocks. A text such as
                "query,value", or a list, gives the last parts of the layers' names in transformers.
            layers: the blocks to adapt: None (all), "last:4", "first:4", a range, or a list of numbers.
            seed, init, rank_pattern, alpha_pattern, freeze_B: as in `LanguageModel.add_lora`.
        Raises:
            ValueError: a target or block does not exist, or an option does not fit. This error leaves the
                model unchanged.
        """
        names = adapting.targeted(self, self.config.num_hidden_layers, targets, layers)
        options = {
            "dropout": dropout, "use_rslora": use_rslora, "use_dora": use_dora, "init": init,
            "freeze_B": freeze_B,
        }  # fmt: skip
        made = adapting.lora_layers(self, names, rank, alpha, rank_pattern, alpha_pattern, seed, options)
        modules = dict(self.named_modules())
        self.exchange({id(modules[name]): layer for name, layer in made.items()})

    def require_unchanged(self) -> None:
        """Raise CorruptError if a memory-mapped file of the weights was modified after it was opened.

        >>> import nplora
        >>> nplora.load_encoder("encoder-model").require_unchanged()
        """
        for stamp in self._mapped:
            stamp.require_unchanged()

    # ---- inference ----

    def encode(self, texts: Iterable[str], max_length: int | None = None) -> list[list[int]]:
        """The token ids of each text, with the special tokens that the tokenizer puts around a text.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> [len(ids) for ids in encoder.encode(["a cat", "a"])]
            [4, 3]

        Args:
            max_length: the largest number of tokens of a text; None: `max_length` of the encoder.
        Warns:
            UserWarning: texts had more than `max_length` tokens, and were cut; the message says how many.
        """
        longest = self._longest("encode", max_length)
        ids, shortened = self.token_ids(texts_of("encode", texts), longest)
        if shortened:
            warnings.warn(
                f"encode: {shortened:,} of {counted(len(ids), 'text')} are longer than {longest} tokens, and "
                "were cut",
                stacklevel=3,
            )
        return ids

    def token_ids(self, texts: list[str], longest: int) -> tuple[list[list[int]], int]:
        """Return the token ids of each text, cut to `longest` tokens, and the number of texts that were cut.

            >>> import nplora
            >>> nplora.load_encoder("encoder-model").token_ids(["a cat", "a"], 3)[1]
            1

        Raises:
            FormatError: the tokenizer has tokens that the model does not have.
        """
        ids, cut = self.tokenizer.encode_texts(texts, longest)
        self._require_known(ids)
        return ids, cut

    def word_ids(self, sentences: Sequence[Sequence[str]], longest: int | None = None) -> WordIds:
        """Return the token ids of sentences, and the position of each word's first token.

            >>> import nplora
            >>> words = nplora.load_encoder("encoder-model").word_ids([["a", "cat"], ["sitting"]], 8)
            >>> words.ids, [first.tolist() for first in words.first]
            ([[2, 5, 6, 3], [2, 1, 3]], [[1, 2], [1]])

        Args:
            sentences: the words of each sentence.
            longest: the largest number of tokens of a sentence, including special tokens. The end of a longer
                sentence is cut off, and the result's attribute `cut` counts these sentences. None: no
                sentence is cut; call `WordIds.windows` to divide sentences that are too long for the model.
        Raises:
            TypeError: a sentence is not a list of texts.
            ValueError: a word is empty or has only spaces, or `longest` has no room for the special tokens.
            FormatError: as in `token_ids`.
        """
        # In a language model, a token that is only the space before a word does not attend to the word, so
        # this token cannot carry the word's tag.
        with_space = not isinstance(self.config, ModelConfig)
        ids, first, cut = self.tokenizer.encode_words(sentences, longest, with_space)
        self._require_known(ids)
        return WordIds(ids, [np.array(own, np.int64) for own in first], cut)

    def _require_known(self, ids: Sequence[Sequence[int]]) -> None:
        largest = max((max(text) for text in ids if text), default=0)
        if largest >= self.config.vocab_size:
            raise FormatError(
                f"{self.source}: the tokenizer has a token with id {largest:,}, but the model's vocabulary "
                f"has {self.config.vocab_size:,} tokens; expected the tokenizer of this model"
            )

    def hidden_states(self, ids: Ids) -> list[Array]:
        """The hidden states of each text's tokens, after the last norm.

        The states of a text do not depend on the other texts, because there is no padding.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> states = encoder.hidden_states([[2, 5, 3], [2, 5, 6, 7, 3]])
            >>> [array.shape == (n, encoder.config.hidden_size) for array, n in zip(states, (3, 5))]
            [True, True]

        Args:
            ids: the token ids of each text, including the special tokens.
        Returns:
            a list with an array (tokens, hidden_size), float32, for each text.
        Raises:
            TypeError: the ids are not integers.
            ValueError: a text has no tokens or too many, or an id is not in the vocabulary.
            CorruptError: as in `require_unchanged`.
        """
        states = list[Array]()
        for rows, starts in self.packed_states("hidden_states", ids):
            states += np.split(rows, starts[1:-1])
        return states

    @_check.keywords
    def embed(
        self,
        texts: str | Iterable[str],
        batch_size: int | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
    ) -> Array:
        """The embedding of each text.

        Texts that are too long are cut, and a warning says how many.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> vectors = encoder.embed(["a cat", "a dog"], normalize=True)
            >>> similarity = vectors @ vectors.T

        Args:
            texts: the texts, or one text.
            batch_size: the number of texts that are computed together. None: a batch has about 2,048 tokens.
                The batch size changes the result only by rounding.
            normalize: whether to scale the embeddings to length 1, so that their dot products are cosines.
                With None, the setting in the model's files decides.
            prompt: a text to put before each text, such as "query: ". "" means no prompt.
            prompt_name: the name of a prompt in `prompts`. Give either `prompt` or `prompt_name`.
            max_length: the largest number of tokens of a text; None: `max_length` of the encoder.
        Returns:
            float32 (texts, dim); (dim,) for one text.
        Raises:
            TypeError: an item of `texts` is not a text.
            ValueError: a text has no tokens, an option is out of range, or `prompt` and `prompt_name` are
                both given.
            ValueError: there is no prompt with this name; the message lists the names.
            CorruptError: as in `require_unchanged`.
        Warns:
            UserWarning: texts were cut.
        """
        if isinstance(texts, str):
            alone: Array = self.embed([texts], batch_size, normalize, prompt, prompt_name, max_length)
            return np.asarray(alone[0])
        given = texts_of("embed", texts)
        before = self.prompt_text(prompt, prompt_name)
        ids = self.encode([before + text for text in given] if before else given, max_length)
        return self.embed_ids(ids, batch_size, normalize)

    def embed_ids(self, ids: Ids, batch_size: int | None = None, normalize: bool | None = None) -> Array:
        """Like `embed`, but for the token ids of each text.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.embed_ids([[2, 5, 3], [2, 5, 6, 3]]).shape == (2, encoder.dim)
        True
        """
        if batch_size is not None:
            _check.integer("embed", "batch_size", batch_size, least=1)
        made, done = np.empty((len(ids), self.dim), np.float32), 0
        for states, starts in self.packed_states("embed", ids, batch_size, self.pooling):
            with inference():
                rows = self.pooling.pool(states, starts, normalize)
            made[done : done + len(rows)] = rows
            done += len(rows)
        return made

    # ---- training ----

    def forward(self, ids: Ids) -> tuple[Array, EncoderSaved]:
        """The hidden states (n, hidden_size) of all texts in order, and the values that `backward` needs.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> states, saved = encoder.forward([[2, 5, 3], [2, 5, 6, 3]])
            >>> states.shape == (7, encoder.config.hidden_size)
            True

        Raises:
            TypeError, ValueError, CorruptError: as in `hidden_states`.
        """
        return self.forward_for(None, ids)

    def forward_for(self, pooling: Pooling | None, ids: Ids) -> tuple[Array, EncoderSaved]:
        """Like `forward`, but return only the hidden states of the tokens that the pooling reads.

        `saved.starts` has the index of each text's first row in the returned array, followed by the number of
        rows.

        >>> import nplora
        >>> from nplora.lm.pooling import Pooling
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> states, saved = encoder.forward_for(Pooling("cls"), [[2, 5, 3], [2, 3]])
        >>> len(states), saved.starts
        (2, array([0, 1, 2]))
        """
        packed, starts = self._packed("Encoder.forward", ids)
        rows, own = self._read_by(pooling, starts)
        x, decoder = self.model.run(packed, packed_positions(starts), rows)
        self.require_unchanged()
        return self.model.hidden_states(x), EncoderSaved(x, own, decoder, None, [None], layer=self)

    def _read_by(self, pooling: Pooling | None, starts: Array) -> tuple[Array | None, Array]:
        """Return the positions of the tokens that a pooling reads (None: all tokens), and the texts' starts.

        The starts hold the index of each text's first token among the tokens that are read, followed by the
        number of these tokens.
        """
        one = pooling is not None and pooling.modes in (("cls",), ("last",))
        if pooling is None or not one or not self.model.may_leave_out_rows():
            return None, starts
        return (starts[:-1] if pooling.modes == ("cls",) else starts[1:] - 1), np.arange(len(starts))

    def backward(self, dy: Array, saved: EncoderSaved, need_dx: bool = True) -> Gradient:
        """Accumulate the gradients of the adapters. Return None, because token ids have no gradient.

        Without an adapter, no gradient is accumulated, and no error is raised. So a frozen encoder can be a
        part of a larger model that is trained.

            >>> import nplora, numpy as np
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> encoder.add_lora(rank=2)
            >>> states, saved = encoder.forward([[2, 5, 3], [2, 5, 6, 3]])
            >>> encoder.backward(states, saved)
            >>> bool(encoder.parameters()[0].grad.any())
            True

        Args:
            dy: the gradient of the loss with respect to the result of `forward`.
        Raises:
            ValueError: `dy` does not have the shape of the result of `forward`, or `saved` was returned by
                another model.
            TypeError: `saved` was not returned by `forward`.
            RuntimeError: `saved` was used before, or a layer is merged.
        """
        op = "Encoder.backward"
        _check.saved(op, saved, EncoderSaved)
        rows = _check.shaped(op, "dy", dy, saved.x.shape, np.float32)
        self.use_up(op, saved)
        self.run_backward(rows, saved)
        return None

    def embed_forward(self, ids: Ids, normalize: bool | None = None) -> tuple[Array, EncoderSaved]:
        """The embeddings (texts, dim) for training, and the values that `embed_backward` needs.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> encoder.add_lora(rank=2)
        >>> vectors, saved = encoder.embed_forward([[2, 5, 3], [2, 5, 6, 3]])
        >>> encoder.embed_backward(vectors, saved)
        """
        states, saved = self.forward_for(self.pooling, ids)
        vectors, pooled = self.pooling.run(states, saved.starts, normalize)
        return vectors, dataclasses.replace(saved, pooling=pooled)

    def embed_backward(self, dy: Array, saved: EncoderSaved) -> None:
        """Accumulate the gradients of the adapters, given the gradient of the embeddings.

        The errors are those of `backward`.
        """
        op = "Encoder.embed_backward"
        _check.saved(op, saved, EncoderSaved)
        if saved.pooling is None:
            raise ValueError(f"{op}: `saved` is from forward, expected the saved values of embed_forward")
        shape = len(saved.pooling.starts) - 1, self.dim
        rows = _check.shaped(op, "dy", dy, shape, np.float32)
        self.use_up(op, saved)
        self.run_backward(self.pooling.run_backward(rows, saved.pooling), saved)

    def use_up(self, op: str, saved: EncoderSaved) -> None:
        """Check that a backward pass with `saved` is possible, and mark `saved` as used."""
        _check.own(op, saved, self)
        for layer in self.adapter_layers().values():
            layer.require_trainable("backward")
        saved.use_up(op)

    def run_backward(self, dy: Array, saved: EncoderSaved) -> None:
        """Like `backward`, without any check of the arguments."""
        self.model.run_backward(self.model.hidden_states_backward(dy, saved.x), saved.decoder)

    def __repr__(self) -> str:
        config = self.config
        lines = [
            f"Encoder({str(self.source)!r}, {config.model_type}: "
            f"{counted(config.num_hidden_layers, 'block')} of width {config.hidden_size:,}, "
            f"vocabulary {config.vocab_size:,}, texts of at most {self.max_length:,} tokens)",
            f"  embeddings of {self.dim:,} values: {self.pooling!r}",
        ]
        if layers := self.adapter_layers():
            lines.append(
                f"  adapter on {counted(len(layers), 'layer')}, {self.num_trainable:,} trained values"
            )
        return "\n".join(lines)

    # ---- checks of arguments ----

    def _packed(self, op: str, ids: Ids) -> tuple[Array, Array]:
        """Concatenate the ids of all texts.

        Return two int64 arrays: the ids; and the index of each text's first id, followed by the total count.
        """
        texts = [_check.integers(op, f"ids[{i}]", text) for i, text in enumerate(ids)]
        longest = self.config.max_position_embeddings
        for i, text in enumerate(texts):
            if text.ndim != 1 or not 1 <= len(text) <= longest:
                raise ValueError(
                    f"{op}: ids[{i}] have shape {text.shape}, expected 1 to {longest:,} token ids"
                )
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        packed = np.concatenate([np.empty(0, np.int64), *texts]).astype(np.int64, copy=False)
        return _check.in_range(op, "ids", packed, self.config.vocab_size), starts

    def _batches(
        self, packed: Array, starts: Array, most: int, batch_size: int | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Cut packed texts into batches. Yield a pair for each batch: ids and starts, as in `_packed`."""
        lengths = np.diff(starts)
        if batch_size is None:
            cuts = cut(lengths, most)
        else:
            cuts = [*range(0, len(lengths), batch_size), len(lengths)]
        for first, end in itertools.pairwise(cuts):
            own = starts[first : end + 1]
            yield packed[own[0] : own[-1]], own - own[0]

    def packed_states(
        self, op: str, ids: Ids, batch_size: int | None = None, pooling: Pooling | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Compute hidden states for a few texts at a time.

        Yield pairs of two arrays: the hidden states, and the index of each text's first row in this array,
        followed by the number of rows.

        Args:
            op: the name of the calling function, for error messages.
            batch_size: the number of texts that are computed at once; None: as in `embed`.
            pooling: return only the states of the tokens that this pooling reads; None: those of all tokens.
        """
        packed, starts = self._packed(op, ids)
        for own_ids, own_starts in self._batches(packed, starts, MOST_TOKENS, batch_size):
            rows, kept = self._read_by(pooling, own_starts)
            with inference():
                x = self.model.infer(own_ids, packed_positions(own_starts), rows)
                states = self.model.hidden_states(x)
            self.require_unchanged()
            yield states, kept

    def _longest(self, op: str, max_length: int | None) -> int:
        most = self.config.max_position_embeddings
        if max_length is None:
            return min(self.max_length, most)
        return _check.integer(op, "max_length", max_length, least=1, most=most)

    def prompt_text(self, prompt: str | None = None, name: str | None = None) -> str:
        """Return the prompt for all texts, given the arguments `prompt` and `prompt_name` of `embed`.

            >>> import nplora
            >>> nplora.load_encoder("encoder-model").prompt_text("query: ")
            'query: '

        Raises:
            ValueError: as in `embed`.
            UnsupportedError: according to the model's files, the pooling must leave out the prompt.
        """
        if prompt is not None and name is not None:
            raise ValueError("embed: prompt and prompt_name are both given, expected one of them")
        if name is not None and name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise ValueError(f"embed: no prompt is named {name!r}; the model has: {known}")
        name = self.default_prompt if name is None and prompt is None else name
        text = self.prompts[name] if name is not None else prompt or ""
        if text and not self._include_prompt:
            raise UnsupportedError(
                f"{self.source}: include_prompt is false, so the pooling must leave the prompt out, which is "
                "not supported"
            )
        return text


def texts_of(op: str, texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises TypeError if an item is not a text."""
    if isinstance(texts, str) or not np.iterable(texts):
        raise TypeError(f"{op}: texts is {_check.kind(texts)}, expected a list of texts")
    given = list(texts)
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"{op}: texts[{i}] is {_check.kind(text)}, expected a text")
    return given
