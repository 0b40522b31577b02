"""HeadSpec: describes the head of transformers' models for classification, for one family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSpec:
    """The layers between the hidden states and the logits: norm(activation(dense(pooled))), then `out`.

    The names of layers are those in transformers' classification model, such as "bert.pooler.dense".

    Attributes:
        pooling: how the hidden states of a text become one vector: "cls", "mean" or "last"; None: each token
            has its own logits.
        out: the name of the last layer, which gives the logits.
        saved: the entries for PEFT's `modules_to_save` that select all layers of the head.
        dense: the name of the dense layer, or None.
        activation: the activation after the dense layer: "tanh", "relu", "gelu" or "silu".
        norm: the name of the LayerNorm after the activation, or None.
        dense_bias, norm_bias, out_bias: whether the layers have a bias.
    """

    pooling: str | None
    out: str
    saved: tuple[str, ...]
    dense: str | None = None
    activation: str = "tanh"
    norm: str | None = None
    dense_bias: bool = True
    norm_bias: bool = True
    out_bias: bool = True

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers of the head, in the order of the forward pass."""
        return tuple(name for name in (self.dense, self.norm, self.out) if name is not None)


def language_model_head(tokens: bool) -> HeadSpec:
    """The head of all language models: one layer, applied to each token, or to the last token of a text."""
    return HeadSpec(None if tokens else "last", "score", ("score",), out_bias=tokens)
