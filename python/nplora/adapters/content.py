"""The content of an adapter, independent of its file format.

Layers have Hugging Face's dotted names, as in PEFT: "model.layers.0.self_attn.q_proj".
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from nplora.adapters.trained_rows import HEAD, TokenRows, rows_needed
from nplora.formats.errors import UnsupportedError, brief, counted
from nplora.formats.label_record import LabelRecord
from nplora.formats.tokenizer_json import AddedToken
from nplora.lora.delta import LoraDelta

CLASSIFIER_TASKS = ("SEQ_CLS", "TOKEN_CLS")  # PEFT's names for the tasks of a classifier


@dataclass(eq=False, repr=False)
class AdapterContent(Mapping[str, LoraDelta]):
    """The data of an adapter: a mapping of layer name to `LoraDelta`.

    Attributes:
        source: the name of the adapter's file, directory or model in messages.
        base_model_name_or_path: the name of the base model, or None.
        task_type: PEFT's name for the task, such as "CAUSAL_LM", or None.
        base_digest: the digest of the base model's norm weights (`model_digest.of`), or None.
        modules_to_save: the arrays of the fully trained layers, as {layer's name: {parameter's name: array}}.
            Fully trained layers have no LoRA.
        saved_names: for a classifier, the names that adapter_config.json lists under `modules_to_save`. PEFT
            lists the head as a whole there, and not each layer of the head. `saved_names` is empty if it
            would equal the keys of the attribute `modules_to_save`.
        labels: for a classifier, a record of its task and the names of its outputs; else None.
        token_rows: the trained rows (`TokenRows`) of the embedding and the head, by layer name.
        invocation_tokens: the invocation tokens of an activated LoRA (aLoRA), which acts from the last
            occurrence of these tokens on. None for other adapters.
        is_tied: whether the embedding and the head in `modules_to_save` share one weight.
        dropout: the LoRA dropout probability; if layers differ, the most common one.
        unknown: the keys of adapter_config.json that nplora does not know.
        neighbours: the names of all modules of the model except the LoRA layers; empty if not known.
        uses_expression: whether adapter_config.json selects layers by a regular expression instead of a list.
        added_tokens: the new tokens that the adapter trains. If another program wrote the adapter, every
            token of tokenizer.json that may be new is listed, even if the model already has this token.
        tokenizer_files: the files of the tokenizer with the new tokens. These files are saved with the
            adapter.
        chat_template: whether the training examples were formatted with the chat template; None: not known.
    """

    source: str
    deltas: Mapping[str, LoraDelta]
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    base_digest: str | None = None
    modules_to_save: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    is_tied: bool = False
    dropout: float = 0.0
    unknown: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    uses_expression: bool = False
    invocation_tokens: tuple[int, ...] | None = None
    chat_template: bool | None = None
    added_tokens: tuple[AddedToken, ...] = ()
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    saved_names: tuple[str, ...] = ()
    labels: LabelRecord | None = None

    def __post_init__(self) -> None:
        self.deltas, self.modules_to_save = dict(self.deltas), dict(self.modules_to_save or {})
        self.token_rows = dict(self.token_rows or {})

    def __getitem__(self, name: str) -> LoraDelta:
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {counted(len(self), 'layer')})"

    @property
    def nbytes(self) -> int:
        """The size of all arrays in bytes."""
        factors = (array for delta in self.values() for array in (delta.A, delta.B, delta.m))
        whole = (array for arrays in self.modules_to_save.values() for array in arrays.values())
        rows = (array for rows in self.token_rows.values() for array in (rows.ids, rows.values))
        return sum(array.nbytes for array in (*factors, *whole, *rows) if array is not None)

    @property
    def use_dora(self) -> bool:
        return any(delta.use_dora for delta in self.values())

    @property
    def trained_rows(self) -> dict[str, NDArray[Any] | None]:
        """The ids of the trained rows, by layer name. None stands for all rows.

        A head that shares the rows of the embedding has no entry.
        """
        whole = [name for name in self.modules_to_save if not (self.is_tied and name == HEAD)]
        return {name: rows.ids for name, rows in self.token_rows.items()} | dict.fromkeys(whole)

    @property
    def rows(self) -> int:
        """The smallest number of rows that an embedding and a head must have to fit the adapter."""
        whole = [len(arrays["weight"]) for arrays in self.modules_to_save.values() if "weight" in arrays]
        return max([rows_needed(0, self.trained_rows, ()), *whole])

    def require_always_active(self, op: str) -> None:
        """Raise UnsupportedError for an activated LoRA, whose update cannot be added to a weight."""
        if self.invocation_tokens is not None:
            raise UnsupportedError(
                f"{op}: {self.source} is an activated LoRA (aLoRA), which acts only from its invocation "
                "tokens onwards, so its update cannot be added to the weights"
            )

    def require_low_rank(self, hint: str) -> None:
        """Raise UnsupportedError if the adapter holds fully trained layers or trained tokens."""
        ending = f", expected low-rank factors; {hint}"
        require_low_rank(self.source, self.task_type, self.modules_to_save, self.token_rows, ending)


def require_low_rank(
    source: str, task_type: str | None, whole: Collection[str], tokens: Collection[str], ending: str
) -> None:
    """Raise UnsupportedError if an adapter has fully trained layers, or layers with trained tokens.

    Args:
        task_type: PEFT's name for the adapter's task.
        ending: the end of the message, which says what is possible instead. For the adapter of a classifier,
            `classifier_hint` replaces it.
    """
    for what, layers in (("fully trained layers", whole), ("trained tokens", tokens)):
        if layers:
            names = ", ".join(map(brief, layers))
            instead = f"; {hint}" if (hint := classifier_hint(task_type)) else ending
            raise UnsupportedError(f"{source}: the adapter holds {what} ({names}){instead}")


def classifier_hint(task_type: str | None) -> str:
    """A text that says how to use the adapter of a classifier; "" for an adapter with another task."""
    if task_type not in CLASSIFIER_TASKS:
        return ""
    return (
        f"this is the adapter of a classifier (task_type {task_type}): use it with nplora classify or "
        "load_classifier"
    )
