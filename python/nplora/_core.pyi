"""The compiled core: strict shapes, dtypes and C order (the friendly checks live in `_check.py`).

Every array is C-contiguous and float32, unless the weight is float64: then all of them are float64.
A weight `w` is a `PackedWeight` or a C-contiguous (d_out, d_in) array. x is (n, d_in), dy (n, d_out),
a (d_out, r), b (r, d_in), z (n, r). Outputs are given by the caller and written in place. Every call releases
the GIL.
"""

from typing import Any, NamedTuple, final

import numpy as np
from numpy import ndarray

Array = ndarray[Any, Any]

@final
class PackedWeight:
    """A frozen matrix, stored as "float32", "float64", "bfloat16" or "float16" and packed in panels; or, by
    the static methods, as it lies in arrays: they are kept alive, read in place, and must not change."""

    def __init__(self, w: Array, storage: str, compute: str = "float") -> None:
        """w: (d_out, d_in) float32 (float64 for "float64"), or uint16 bit patterns for the 16-bit storages.

        compute: "float" (float32, or float64 for "float64"), or "bfloat16": x, dy, W and B (backward or on
        many rows, all of an update) are rounded, sums are float32; or "int8": up to a small batch of x meets
        GGUF's blocks in int8, all else is "bfloat16".
        """
    @staticmethod
    def of_array(w: Array, storage: str, compute: str) -> PackedWeight:
        """w: (d_out, d_in) float32, float64, or uint16 bit patterns."""
    @staticmethod
    def of_blocks(blocks: Array, storage: str, d_in: int, compute: str) -> PackedWeight:
        """blocks: (d_out, bytes) uint8, in any of `block_formats` but NF4."""
    @staticmethod
    def of_nf4(codes: Array, absmax: Array, d_out: int, d_in: int, compute: str) -> PackedWeight:
        """As `quantize_nf4` makes them of (d_out, d_in) values."""
    @staticmethod
    def of_nested_nf4(
        codes: Array,
        absmax_codes: Array,
        book: Array,
        scales: Array,
        offset: float,
        d_out: int,
        d_in: int,
        compute: str,
    ) -> PackedWeight:
        """The same, the absmax as `quantize_absmax` makes them."""
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def storage(self) -> str: ...
    @property
    def compute(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self, out: Array) -> None:
        """Write the row-major matrix: float32 (float64 for "float64"), or uint16 bit patterns."""
    def gather_rows(self, ids: Array, out: Array) -> None:
        """out (n, d_in) = W[ids]; ids is int64 and must be in range (IndexError)."""
    def row_sums_of_squares(self, out: Array) -> None:
        """out (d_out,) float64 = the squared norm of each row."""

Weight = PackedWeight | Array

def matmul(w: Weight, x: Array, bias: Array | None, out: Array) -> None:
    """out = x Wᵀ [+ bias]."""

def matmul_t(w: Weight, dy: Array, out: Array) -> None:
    """out = dy W."""

def add_outer(a: Array, b: Array, scale: float, out: Array) -> None:
    """out (p, q) += scale · aᵀ b with a (n, p), b (n, q)."""

class ForwardPart(NamedTuple):
    """A layer in a forward pass, and the arrays that the pass fills: y (n, d_out) and z (None: not wanted).

    scale 0 leaves a and b unread (z = 0). key: of the dropout mask.
    """

    weight: Weight
    a: Array
    b: Array
    scale: float
    dropout: float
    key: int
    bias: Array | None
    y: Array
    z: Array | None

def lora_forward(x: Array, layers: list[ForwardPart]) -> None:
    """z = drop(x) Bᵀ; y = x Wᵀ + scale · z Aᵀ [+ bias], for layers that read the same x.

    drop is the identity if dropout is 0.
    """

@final
class InferenceLayer:
    """A layer for `infer`: it keeps the weight and the arrays, and reads them as they are then."""

    def __init__(self, weight: Weight, a: Array, b: Array, scale: float, bias: Array | None) -> None: ...

def infer(x: Array, layers: list[InferenceLayer]) -> list[Array]:
    """y = x Wᵀ + scale · (x Bᵀ) Aᵀ [+ bias], for layers that read the same x."""

class BackwardPart(NamedTuple):
    """A layer in a backward pass, and the gradients that the pass adds to: da and db (None: not wanted).

    dropout, key and z are those of the forward pass; z may be None if da is.
    """

    weight: Weight
    a: Array
    b: Array
    scale: float
    dropout: float
    key: int
    dy: Array
    z: Array | None
    da: Array | None
    db: Array | None

def lora_backward(x: Array | None, dx: Array | None, layers: list[BackwardPart]) -> None:
    """dz = scale · dy A; dx = Σ dy W + undrop(dz B); da += scale · dyᵀ z; db += dzᵀ drop(x).

    dx None: not wanted. x may be None if every db is.
    """

def explain(weight: PackedWeight, rows: int, rank: int, dropout: bool, keep_z: bool) -> dict[str, str]:
    """How the forward and the backward pass are computed, and why, in words."""

def merge_lora(w: Array, a: Array, b: Array, scale: float, storage: str, key: int | None = None) -> None:
    """W += scale · A B in place; with a 64-bit key (uint16 alone) rounded stochastically.

    w: (d_out, d_in) float32, float64 or uint16 ("bfloat16", "float16"); rows contiguous, any row stride.
    a and b are float32 (float64 if w is). The chance of element i (flat) is that of dropout.
    """

def dropout(x: Array, probability: float, key: int, out: Array) -> None:
    """out = x where kept, scaled by 1 / (1 - probability).

    Element i (flat) is decided by Philox4x32-10 at counter i // 4, word i % 4, key `key` (64 bits): dropped
    where the word < floor(probability · 2³²).
    """

def gelu(x: Array, tanh: bool, out: Array) -> None: ...
def gelu_backward(x: Array, dy: Array, tanh: bool, out: Array) -> None: ...
def adamw_step(
    parameters: tuple[tuple[str, Array, Array], ...],
    exp_avgs: tuple[Array, ...],
    exp_avg_sqs: tuple[Array, ...],
    lr: float,
    lr_of_a: float,
    is_a: Array,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float,
    max_norm: float | None,
) -> float | None:
    """One AdamW step in place (Loshchilov & Hutter 2019).

    A parameter is (name, value, grad); float32 and float64 may be mixed. is_a (bool) marks those of rate
    lr_of_a. With a max_norm, grad_scale is lowered to keep the norm of all gradients together at most that;
    the norm before is returned, and where it is not finite nothing is written.
    """

def sgd_step(
    parameters: tuple[tuple[str, Array, Array], ...],
    momentum_buffers: tuple[Array, ...] | None,
    lr: float,
    lr_of_a: float,
    is_a: Array,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    grad_scale: float,
    max_norm: float | None,
) -> float | None:
    """One SGD step in place; the rest as in adamw_step."""

def sum_of_squares(arrays: tuple[Array, ...]) -> float: ...
def widen(bits: Array, storage: str, out: Array) -> None:
    """uint16 bit patterns to float32, any shape."""

def narrow(values: Array, storage: str, out: Array) -> None:
    """float32 to uint16 bit patterns, round to nearest even."""

def first_nonfinite(values: Array, storage: str) -> int:
    """The flat index of the first NaN or infinity, or -1; values as in `PackedWeight.of_array`, any shape."""

class BlockFormat:
    """A low-bit format: what its file in csrc/kernels/formats says."""

    @property
    def name(self) -> str:
        """As `FrozenWeight.dtype` has it: ggml's name in lower case, or "nf4"."""

    @property
    def ggml_name(self) -> str | None: ...
    @property
    def elements(self) -> int:
        """Values in a block."""

    @property
    def nbytes(self) -> int:
        """Bytes of a block (of "nf4" without its absmax)."""

    @property
    def scale_offsets(self) -> tuple[int, ...]:
        """The bytes of a block at which its float16 scales begin."""

    @property
    def shorter(self) -> str | None:
        """The format that llama.cpp takes for rows that are not whole blocks of this one."""

def block_formats() -> dict[str, BlockFormat]:
    """The low-bit formats by their names, "nf4" last."""

def quantize(values: Array, format: str, blocks: Array) -> None:
    """float32 (rows, cols) to uint8 (rows, bytes of cols values), near to the least squared error.

    "q8_0" has ggml's bits; "q4_0" ... "q5_1" have no block with a larger error than ggml's. ValueError, which
    names the row, and nothing is written, where a value is not finite or too large. Any format but "nf4".
    """

def dequantize(blocks: Array, format: str, out: Array) -> None:
    """The reverse: out is float32 (rows, cols), the bits of the format's float32 arithmetic."""

def quantize_nf4(values: Array, codes: Array, absmax: Array) -> None:
    """float32 (rows, cols) to NF4 of all n = rows · cols values: uint8 (⌈n / 2⌉), float32 (⌈n / 64⌉)."""

def quantize_absmax(absmax: Array, codes: Array, book: Array, scales: Array) -> float:
    """The second quantisation: absmax ≈ book[codes] · scales[block // 256] + the number returned.

    codes: uint8, one for each absmax; book: float32 (256,), written; scales: float32, one for 256 absmax.
    """

def dequantize_nf4(codes: Array, absmax: Array, out: Array) -> None:
    """NF4 to float32 of any shape."""

def dequantize_nested_nf4(
    codes: Array, absmax_codes: Array, book: Array, scales: Array, offset: float, out: Array
) -> None:
    """The same with a quantised absmax."""

def empty(dtype: np.dtype[Any], shape: tuple[int, ...]) -> ndarray[Any, Any]: ...
def release_buffers() -> None: ...
def allocations() -> int: ...
def rms_norm(x: Array, weight: Array, eps: float, y: Array) -> None:
    """y = weight ∘ x / sqrt(mean x² + eps); x and y (n, d), weight (d,), all float32 as in what follows."""

def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float, dx: Array, accumulate: bool) -> None:
    """dx = [dx +] the gradient of x; the weight is frozen."""

def rope(x: Array, positions: Array, table: Array, interleaved: bool, inverse: bool, head_dim: int) -> None:
    """Rotate the heads of x (n, heads · head_dim) in place by rows `positions` (int64) of the table.

    table: (max_positions, rotary_dim), rotary_dim / 2 cosines, then as many sines; rotary_dim is at most
    head_dim. The first rotary_dim values of each head rotate, the rest stay as they are. The values of a pair
    are rotary_dim / 2 apart, or neighbours if interleaved. inverse: turn back, which is the gradient.
    """

def gated(act: str, gate: Array, up: Array, out: Array) -> None:
    """out = act(gate) ∘ up, all (n, f); act is "silu" or "gelu_pytorch_tanh"."""

def gated_backward(act: str, dout: Array, gate: Array, up: Array, dgate: Array, dup: Array) -> None:
    """The gradients of both; dgate may be gate, and dup up."""

def attention(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    out: Array,
    lse: Array,
) -> None:
    """Causal attention within packed sequences, tile by tile.

    q, out: (n, heads · head_dim); k, v: (n, kv_heads · head_dim); starts: int64, where the sequences begin
    and the last one ends. window: the keys that a query sees, itself the last of them; 0: all before it.
    lse (n, heads): log Σ exp(scale q kᵀ), for `attention_backward`.
    """

def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    starts: Array,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    dq: Array,
    dk: Array,
    dv: Array,
) -> None:
    """The gradients of q, k and v, from what `attention` read and wrote."""

def attention_cached(
    q: Array,
    keys: Array,
    values: Array,
    slots: Array,
    lengths: Array,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    out: Array,
) -> None:
    """Row i of q sees the first lengths[i] tokens of slots[i], of which it is the last (int64, both).

    keys, values: (slots, capacity, kv_heads · head_dim).
    """

def cross_entropy(logits: Array, targets: Array, factor: float, losses: Array, gradient: bool) -> None:
    """losses (n,) float64 = log Σ exp(logits) - logits[target], 0 where the target (int64) is -100.

    gradient: logits (n, vocab) become factor · (softmax - one_hot), 0 where ignored. ValueError: a target out
    of range.
    """

class Constants(NamedTuple):
    """Numbers of the core, the same on every machine."""

    cache_line: int  # bytes
    least_buffer_bytes: int  # smaller arrays are left to NumPy
    least_small_batch: int  # rows of float32 that are a small batch on every instruction set
    most_small_batch: int  # up to this many rows, products may sum in another order than for more rows
    float_batch: int  # up to this many rows, products are not rounded to bfloat16
    task_tokens: int  # the most tokens of one task
    lanes_bytes: int  # the most bytes of x in scratch, in lanes or in pairs
    l3_block_bytes: int  # the most bytes of the tokens that share a transposed block of W
    nf4_group: int  # absmax that share a scale when they are quantised
    nf4_book: int  # levels of a quantised absmax

constants: Constants

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, Any]:
    """version, isa, num_threads, parallel ("pool" or "openmp"), openmp (0: no), compiler."""

def watch_mapping(mapping: Any, message: bytes) -> int:
    """From now on a SIGBUS in this memory writes the message to stderr and ends the process with status 135.

    The handler that was there before is called in between. Returns a number for `unwatch_mapping`.
    """

def unwatch_mapping(number: int) -> None:
    """The mapping is gone. Other numbers are ignored."""

def available_isas() -> list[str]:
    """What NPLORA_ISA may name on this machine, best last; Linux may still refuse the registers of amx."""
