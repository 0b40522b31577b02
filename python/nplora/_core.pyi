"""The compiled core. It requires exact shapes, dtypes and C order; `_check.py` makes the checks for users.

Every array is C-contiguous. Arrays are float32, or float64 if the weight is float64.
A weight `w` is a `PackedWeight` or a C-contiguous (d_out, d_in) array. x is (n, d_in), dy (n, d_out),
a (d_out, r), b (r, d_in), z (n, r). The caller allocates the output arrays, which are written in place.
Every call releases the GIL.
"""

from typing import Any, NamedTuple, final

import numpy as np
from numpy import ndarray

Array = ndarray[Any, Any]

@final
class PackedWeight:
    """A frozen matrix, stored as "float32", "float64", "bfloat16" or "float16" and packed in panels.

    The constructor copies `w`. The static methods do not copy the given arrays, but keep them alive. The
    caller must not change these arrays.
    """

    def __init__(self, w: Array, storage: str, compute: str = "float") -> None:
        """w: (d_out, d_in) float32 (float64 for "float64"), or uint16 bit patterns for the 16-bit storages.

        compute: "float" computes in float32 (float64 for "float64"). "bfloat16" rounds x, dy, W and B to
        bfloat16, and sums in float32. In the backward pass, and in the forward pass of many rows, it rounds
        all operands of the low-rank products. "int8" rounds x, dy and W to int8 in the products with W, and
        computes the low-rank products as "bfloat16" does.
        """
    @staticmethod
    def of_array(w: Array, storage: str, compute: str) -> PackedWeight:
        """w: (d_out, d_in) float32, float64, or uint16 bit patterns."""
    @staticmethod
    def of_blocks(blocks: Array, storage: str, d_in: int, compute: str) -> PackedWeight:
        """blocks: (d_out, bytes) uint8, in any format of `block_formats` except NF4."""
    @staticmethod
    def of_nf4(codes: Array, absmax: Array, d_out: int, d_in: int, compute: str) -> PackedWeight:
        """codes and absmax: the results of `quantize_nf4` for a (d_out, d_in) array."""
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
        """Like `of_nf4`, with an absmax that `quantize_absmax` has quantised."""
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def storage(self) -> str: ...
    @property
    def compute(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def keep_int8(self) -> None:
        """Keep the codes of int8 products in memory. The weight must compute in "int8"."""
    def drop_int8(self) -> None:
        """Free the kept codes."""
    @property
    def keeps_int8(self) -> bool: ...
    @property
    def int8_nbytes(self) -> int:
        """The size in bytes of the codes that `keep_int8` keeps."""
    def unpack(self, out: Array) -> None:
        """Write the row-major matrix to `out`: float32 (float64 for "float64"), or uint16 bit patterns."""
    def gather_rows(self, ids: Array, out: Array) -> None:
        """out (n, d_in) = W[ids]; ids is int64 and must be in range (IndexError)."""
    def row_sums_of_squares(self, out: Array) -> None:
        """out (d_out,) float64 = the squared norm of each row."""

Weight = PackedWeight | Array

def matmul(w: Weight, x: Array, bias: Array | None, out: Array, int8: bool = True) -> None:
    """out = x Wᵀ [+ bias]. `int8` is described in `lora_forward`."""

def matmul_t(w: Weight, dy: Array, out: Array, int8: bool = True) -> None:
    """out = dy W. `int8` is described in `lora_backward`."""

def add_outer(a: Array, b: Array, scale: float, out: Array) -> None:
    """out (p, q) += scale · aᵀ b with a (n, p), b (n, q)."""

class ForwardPart(NamedTuple):
    """One layer of a forward pass, and the arrays to fill: y (n, d_out) and z (None: not needed).

    If scale is 0, a and b are not read, and z is 0. key: the 64-bit key of the dropout mask.
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

def lora_forward(x: Array, layers: list[ForwardPart], batch: int | None = None, int8: bool = True) -> None:
    """z = drop(x) Bᵀ; y = x Wᵀ + scale · z Aᵀ [+ bias], for layers that read the same x.

    drop is the identity if dropout is 0. If `batch` is given, the bits are those of `infer`. If `int8` is
    False, large batches with weights that compute in int8 are computed in bfloat16, as in `infer`.
    """

@final
class InferenceLayer:
    """A layer for `infer`. It keeps the weight and the arrays, and reads their values in each call.

    If a and b are constant, and bfloat16 has all their values, small batches read copies in bfloat16.
    """

    def __init__(
        self, weight: Weight, a: Array, b: Array, scale: float, bias: Array | None, constant: bool = False
    ) -> None: ...

def infer(x: Array, layers: list[InferenceLayer], batch: int | None = None) -> list[Array]:
    """y = x Wᵀ + scale · (x Bᵀ) Aᵀ [+ bias], for layers that read the same x.

    The result of a row has the same bits in every batch of up to `constants.small_batch` rows. It also has
    the same bits in every larger batch, but these may differ from the bits in small batches. If x is only a
    part of a batch, `batch` is the number of rows of the whole batch.
    """

def infer_groups(x: Array, groups: list[list[InferenceLayer]], rows: list[int]) -> list[Array]:
    """Like `infer`, but each group of rows has its own layers: groups[g] for the next rows[g] rows.

    A weight that all groups share is read once if x has few rows.
    """

class BackwardPart(NamedTuple):
    """One layer of a backward pass, and the gradients to add to: da and db (None: not needed).

    dropout, key and z are those of the forward pass. z may be None if da is None.
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

def lora_backward(
    x: Array | None,
    dx: Array | None,
    layers: list[BackwardPart],
    int8: bool = True,
    dither_key: int | None = None,
) -> None:
    """dz = scale · dy A; dx = Σ dy W + undrop(dz B); da += scale · dyᵀ z; db += dzᵀ drop(x).

    dx None: not needed. x may be None if every db is None. If `int8` is False, weights that compute in int8
    are computed in bfloat16. With a `dither_key`, they round dy stochastically, with random bits that depend
    on the key and on the element. If dy is a gradient of logits, set `int8` to False or give a `dither_key`:
    rounding to the nearest int8 would set small elements to 0.
    """

def explain(
    weight: PackedWeight, rows: int, rank: int, dropout: bool, keep_z: bool, int8: bool = True
) -> dict[str, str]:
    """Describe in words how the forward and backward pass are computed, and why.

    int8: whether training may compute many rows in int8, if the weight has compute="int8".
    """

def merge_lora(w: Array, a: Array, b: Array, scale: float, storage: str, key: int | None = None) -> None:
    """W += scale · A B in place. With a 64-bit key (uint16 only), the sums are rounded stochastically.

    w: (d_out, d_in) float32, float64 or uint16 ("bfloat16", "float16"); rows contiguous, any row stride.
    a and b are float32 (float64 if w is). The element with flat index i uses the same random word as in
    `dropout`.
    """

def dropout(x: Array, probability: float, key: int, out: Array) -> None:
    """out = x / (1 - probability), or 0 for dropped elements.

    The element with flat index i depends on a random word: word i % 4 of Philox4x32-10 at counter i // 4,
    with the 64-bit `key`. The element is dropped if the word < floor(probability · 2³²).
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

    A parameter is (name, value, grad); float32 and float64 may be mixed. is_a (bool, one per parameter) marks
    the parameters with the learning rate lr_of_a. With max_norm, grad_scale is lowered so that the norm of
    all gradients together is at most max_norm. The original norm is returned; if it is not finite, nothing is
    written. Without max_norm, None is returned.
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
    """One SGD step in place. The other arguments are those of adamw_step."""

def sum_of_squares(arrays: tuple[Array, ...]) -> float: ...
def widen(bits: Array, storage: str, out: Array) -> None:
    """uint16 bit patterns to float32, any shape."""

def narrow(values: Array, storage: str, out: Array) -> None:
    """float32 to uint16 bit patterns, round to nearest even."""

def first_nonfinite(values: Array, storage: str) -> int:
    """The flat index of the first NaN or infinity, or -1. Any shape, and the dtypes of `of_array`."""

class BlockFormat:
    """A low-bit format, as its file in csrc/kernels/formats defines it."""

    @property
    def name(self) -> str:
        """The name as in `FrozenWeight.dtype`: ggml's name in lower case, or "nf4"."""

    @property
    def ggml_name(self) -> str | None: ...
    @property
    def elements(self) -> int:
        """Values per block."""

    @property
    def nbytes(self) -> int:
        """Bytes per block (for "nf4", without its absmax)."""

    @property
    def scale_offsets(self) -> tuple[int, ...]:
        """The offsets in a block at which its float16 scales begin."""

    @property
    def shorter(self) -> str | None:
        """The format that llama.cpp uses for rows whose length is not a multiple of this format's block."""

def block_formats() -> dict[str, BlockFormat]:
    """The low-bit formats by name, "nf4" last."""

def quantize(values: Array, format: str, blocks: Array) -> None:
    """Quantise float32 (rows, cols) to uint8 (rows, bytes of cols values), near the least squared error.

    format: any of `block_formats` except "nf4". "q8_0" gives ggml's bits. No block of "q4_0" ... "q5_1" has a
    larger error than ggml's. If a value is not finite or too large, ValueError names its row, and nothing is
    written.
    """

def dequantize(blocks: Array, format: str, out: Array) -> None:
    """Decode the blocks of `quantize` by the format's float32 formula. out is float32 (rows, cols)."""

def quantize_nf4(values: Array, codes: Array, absmax: Array) -> None:
    """Quantise n = rows · cols float32 values to NF4. codes: uint8 (⌈n / 2⌉). absmax: float32 (⌈n / 64⌉)."""

def quantize_absmax(absmax: Array, codes: Array, book: Array, scales: Array) -> float:
    """Quantise absmax, and return an offset: absmax ≈ book[codes] · scales[block // 256] + offset.

    codes: uint8, one per absmax. book: float32 (256,), written. scales: float32, one per 256 absmax.
    """

def dequantize_nf4(codes: Array, absmax: Array, out: Array) -> None:
    """Decode NF4 to float32 of any shape."""

def dequantize_nested_nf4(
    codes: Array, absmax_codes: Array, book: Array, scales: Array, offset: float, out: Array
) -> None:
    """Like `dequantize_nf4`, with a quantised absmax."""

def empty(dtype: np.dtype[Any], shape: tuple[int, ...]) -> ndarray[Any, Any]: ...
def release_buffers() -> None: ...
def allocations() -> int: ...
def rms_norm(x: Array, weight: Array, eps: float, y: Array) -> None:
    """y = weight ∘ x / sqrt(mean x² + eps). x and y are (n, d), weight is (d,).

    Unless something else is said, all arrays of this function and of those below are float32.
    """

def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float, dx: Array, accumulate: bool) -> None:
    """dx = [dx +] the gradient of x. The weight is frozen."""

def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float, y: Array) -> None:
    """y = weight ∘ (x - mean x) / sqrt(variance x + eps) [+ bias]. x and y are (n, d), the others (d,)."""

def add_layer_norm(x: Array, sum: Array, weight: Array, bias: Array | None, eps: float, y: Array) -> None:
    """sum += x, then y = the LayerNorm of sum, as in `layer_norm`. All but weight and bias are (n, d)."""

def layer_norm_backward(dy: Array, x: Array, weight: Array, eps: float, dx: Array, accumulate: bool) -> None:
    """dx = [dx +] the gradient of x. Weight and bias are frozen. dx may be the same array as dy."""

def activated(act: str, x: Array, out: Array) -> None:
    """out = act(x), all (n, f); act is as in `gated`.

    x is float32, or uint16 with the bits of bfloat16. If x is float32, out may be the same array.
    """

def activated_narrow(act: str, x: Array, out: Array, bits: Array) -> None:
    """Do the same as `activated` for float32 x, and store x in `bits` as bfloat16 (uint16)."""

def activated_backward(act: str, dout: Array, x: Array, dx: Array) -> None:
    """dx = act'(x) ∘ dout; x is as in `activated`. dx may be the same array as dout, or as x if x is
    float32.
    """

def rope(x: Array, positions: Array, table: Array, interleaved: bool, inverse: bool, head_dim: int) -> None:
    """Rotate the heads of x (n, heads · head_dim) in place, using the rows `positions` (int64) of the table.

    table: (max_positions, rotary_dim): rotary_dim / 2 cosines, then as many sines. rotary_dim is at most
    head_dim. The first rotary_dim values of each head rotate in pairs; the others stay as they are. The two
    values of a pair are rotary_dim / 2 apart, or neighbours if `interleaved` is true. If `inverse` is true,
    the values are rotated back; the gradient needs this.
    """

def gated(act: str, gate: Array, up: Array, out: Array) -> None:
    """out = act(gate) ∘ up, all (n, f); act is "silu", "gelu_pytorch_tanh" or "gelu" (exact).

    gate and up are float32, or uint16 bits of bfloat16.
    """

def gated_narrow(act: str, gate: Array, up: Array, out: Array, gate_bits: Array, up_bits: Array) -> None:
    """Do the same as `gated` for float32 arrays, and store gate and up as bits of bfloat16 (uint16).

    out may be the same array as gate.
    """

def gated_backward(act: str, dout: Array, gate: Array, up: Array, dgate: Array, dup: Array) -> None:
    """The gradients of gate and up, which are float32, or uint16 with the bits of bfloat16.

    dgate may be the same array as dout. In float32, dgate may also be gate, and dup may be up.
    """

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
    bfloat16: bool = False,
    causal: bool = True,
    bias: Array | None = None,
) -> None:
    """Attention within packed sequences, tile by tile.

    q, out: (n, heads · head_dim). k, v: (n, kv_heads · head_dim). starts: int64, the start of each sequence
    and the end of the last. window: the number of keys that a query attends to, the last of which is its own;
    0: all keys up to its own. If `causal` is false, a query also attends to the keys after its own: to
    window - 1 of them, or with window = 0 to all.
    bias (heads, 2 reach + 1): for each head, column reach + d is added to the score of a query and the key
    that is d tokens after it. No sequence has more than reach + 1 tokens.
    lse (n, heads): log Σ exp(scale q kᵀ), for `attention_backward`.
    bfloat16: round the factors of products to bfloat16, and sum in float32. Sequences of only a few queries,
        and heads of an odd size, are not rounded.
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
    bfloat16: bool = False,
    causal: bool = True,
    bias: Array | None = None,
) -> None:
    """The gradients of q, k and v, from what `attention` read and wrote."""

def attention_cached(
    q: Array,
    keys: Array,
    values: Array,
    pages: Array,
    slots: Array,
    lengths: Array,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    out: Array,
) -> None:
    """Attention to a key-value cache. Row i of q attends to the first lengths[i] tokens of slots[i].

    The last of these tokens is the row's own. pages, slots and lengths are int64.
    keys, values: (pages, page_tokens, kv_heads · head_dim).
    pages: (slots, slot_pages), the pages of each slot in order. Entries beyond a slot's length are not read,
        but must name a page. If slot_pages is above 1, page_tokens must be a multiple of 16.
    """

def cross_entropy(logits: Array, targets: Array, factor: float, losses: Array, gradient: bool) -> None:
    """losses (n,) float64 = log Σ exp(logits) - logits[target], 0 where the target (int64) is -100.

    If gradient is True, logits (n, vocab) become factor · (softmax - one_hot), 0 for ignored rows. Raises
    ValueError if a target is out of range.
    """

def filtered_cross_entropy(
    weight: Weight,
    logits: Array,
    targets: Array,
    factor: float,
    bound: float,
    mean: Array,
    losses: Array,
    skipped: Array,
    kept: Array,
    dx: Array,
    x: Array | None = None,
    dweight: Array | None = None,
) -> None:
    """The losses of cross_entropy for logits = x Wᵀ, and the gradients without unlikely words.

    dx (n, d) = factor · (Σ p W + skipped · mean - W[target]), where Σ runs over the words with p >= bound and
    the target, and `skipped` (n,) float64 is the probability of all other words. `kept` (n,) int64 is the
    number of words in the sum. If x (n, d) and dweight (vocab, d) are given, dweight += factor ·
    (p - one_hot)ᵀ x, without the skipped words of each row.

    If more than a quarter of all words have p >= bound in a row, `kept` is the number of all words: the
    logits and the dx of the row do not change, the row adds nothing to dweight, and its `skipped` is 0. The
    logits of all other rows become undefined. The weight must not be float64.
    """

class Constants(NamedTuple):
    """Constants of the core, the same on every machine."""

    cache_line: int  # bytes
    least_buffer_bytes: int  # NumPy's own allocator serves smaller arrays
    small_batch: int  # up to this many rows, products add up in another order, the same for each row
    spare_buffer_bytes: int  # used and idle buffers together may exceed the peak of used buffers by this much
    float_batch: int  # up to this many rows, products of the backward pass are not rounded to bfloat16
    task_tokens: int  # the most tokens that one task keeps in L2 or L3
    lanes_bytes: int  # the most scratch bytes for the rows of x, rearranged for the products
    l3_block_bytes: int  # the most bytes of the tokens that use one transposed block of W
    nf4_group: int  # the number of quantised absmax values that share one scale
    nf4_book: int  # the number of levels of a quantised absmax

constants: Constants

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def set_outer_threads(n: int) -> None:
    """Limit the number of threads for calls from this thread, like omp_set_num_threads."""

def get_outer_threads() -> int:
    """The limit that `set_outer_threads` has set, at first that of OMP_NUM_THREADS."""

def config() -> dict[str, Any]:
    """version, isa, num_threads, parallel ("pool" or "openmp"), openmp (0: no), compiler."""

def watch_mapping(mapping: Any, message: bytes) -> int:
    """Watch a mapping: a SIGBUS in it writes the message to stderr and ends the process with status 135.

    A SIGBUS handler that was installed earlier is called before the process ends. Returns a number for
    `unwatch_mapping`.
    """

def unwatch_mapping(number: int) -> None:
    """Stop watching a mapping. Unknown numbers are ignored."""

def available_isas() -> list[str]:
    """The values of NPLORA_ISA for this machine, the best last. Linux may still refuse to enable amx."""

def start_profile() -> None:
    """Time the later calls of this thread, and count the operations of their products."""

def stop_profile() -> None:
    """Stop timing the calls of this thread."""

def take_profile() -> list[Any]:
    """(activity, calls, seconds, {arithmetic: operations}) since the last call of this or `start_profile`."""

def peak_rate(arithmetic: str) -> float:
    """The most operations per second of products in registers, on all threads, measured now.

    arithmetic: "float64", "float32", "bfloat16" or "int8".
    """
