// The whole contract between the kernels and the rest of the library: one table of function pointers per
// instruction set, chosen once. A kernel touches only the elements that its shapes name. It allocates
// nothing, throws nothing and does not know about threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cache_line.h"
#include "kernels/formats.h"

namespace nplora::kernels {

// W is stored in panels of this many columns: 48 = 3 AVX-512, 6 AVX2 or 12 NEON vectors of float. So one
// layout serves every instruction set, and a tile of 8 rows x 48 columns (24 AVX-512 registers) hides the
// latency of FMA.
inline constexpr size_t kPanelColumns = 48;

// Element (row, col) of a panelled matrix is data[(col / 48) * panel_stride + row * row_stride + col % 48].
// A plain row-major matrix is the special case panel_stride == 48.
template <class T>
struct Panels {
  const T* data;
  size_t row_stride;
  size_t panel_stride;
};

// Element (i, step) is data[i * row_stride + step * step_stride].
template <class T>
struct Strided {
  const T* data;
  size_t row_stride;
  size_t step_stride;
};

// A bfloat16 value of a weight. The products of small batches widen it to float in registers.
enum class Bf16 : uint16_t {};

// Two bfloat16 values that are neighbours along the depth, the first in the low half. The element type of the
// bfloat16 products.
enum class Bf16Pair : uint32_t {};

// The type in which products of E are summed.
template <class E>
struct SumOf {
  using Type = E;
};
template <>
struct SumOf<Bf16> {
  using Type = float;
};
template <>
struct SumOf<Bf16Pair> {
  using Type = float;
};
template <class E>
using Sum = typename SumOf<E>::Type;

// The number of values along the depth that one element holds.
template <class E>
inline constexpr size_t kValuesPerElement = 1;
template <>
inline constexpr size_t kValuesPerElement<Bf16Pair> = 2;

// The number of elements of a full panel along the depth.
template <class E>
inline constexpr size_t kPanelDepth = kPanelColumns / kValuesPerElement<E>;

// Memory that a kernel brings into the cache while it works: nothing, given cache lines, or rows of w that it
// reads later.
struct Fetch {
  const char* at = nullptr;
  size_t lines = 0, each = 0;

  static constexpr Fetch none() { return {}; }

  // `lines` cache lines. gemm_outputs_in_lanes fetches `each` of them at each step, but never more than it
  // reads of w. When too few lines are left for all steps, it fetches rows of w ahead instead. The products
  // with blocks ignore `each` and spread the lines over their rows.
  static constexpr Fetch memory(const void* from, size_t lines, size_t each = 0) {
    return {static_cast<const char*>(from), lines, each};
  }

  // Only for gemm_outputs_in_lanes: the rows of w that are read kFetchAhead bytes later, or the rows of the
  // next L1 block (see l1_block_bytes).
  static constexpr Fetch rows_ahead() { return {nullptr, 0, 1}; }
};

// How far ahead W is fetched, in bytes, where it is read once. Memory delivers 10 bytes in a cycle. The first
// of them come more than 500 cycles after the request, or 1000 if other programs use the same memory.
inline constexpr size_t kFetchAhead = 12288;

// Each depth_unit (see Tiles) divides this number. If a depth is cut at multiples of
// kDepthUnit, the sums are the same as for the whole depth, on every instruction set. The size of a panel of
// floats is such a multiple. A panel of pairs has 24 elements, which is not a multiple (see kDepthCut).
inline constexpr size_t kDepthUnit = 16;
static_assert(kPanelDepth<float> % kDepthUnit == 0);

// The two products on which everything else is built. depth counts elements. Both sum over the depth strictly
// in order (by fused multiply-adds if the instruction set has them), or first sum each group of depth_unit
// elements. If the depth is cut only at multiples of depth_unit, a result does not depend on tile sizes,
// blocking or threads, and both products give the same bits.
template <class E>
struct Tiles {
  // Tokens in a full tile of gemm_tokens_in_lanes: two vectors. Small batches use one vector, lanes / 2.
  size_t lanes;
  // The number of rows of w at which gemm_tokens_in_lanes is fastest. Any number is allowed.
  size_t tile_rows;
  // The number of rows of a at which gemm_outputs_in_lanes is fastest if the rows of w are not dense. It then
  // reads tile_columns columns of w at a time, and reads w once for each group of tile_columns.
  size_t tile_tokens, tile_columns;
  // gemm_outputs_in_lanes processes a dense panel in blocks of at most this many bytes, which stay in L1. 0:
  // in one block.
  size_t l1_block_bytes;
  size_t depth_unit;  // in elements; divides kDepthUnit

  // yt (rows, n_lanes) = [yt +] w (rows, depth) xt (depth, n_lanes).   n_lanes is `lanes` or `lanes / 2`.
  // Tokens are in the SIMD lanes, and w is broadcast. xt and yt are dense.
  void (*gemm_tokens_in_lanes)(size_t n_lanes, size_t rows, size_t depth, const Panels<E>& w, const E* xt,
                               Sum<E>* yt, bool accumulate);

  // c (m, n) = [c +] a (m, depth) w (depth, n),  n <= kPanelColumns.
  // Outputs, the columns of c, are in the SIMD lanes, and a is broadcast.
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<E>& a, const E* w,
                                size_t w_stride, Sum<E>* c, size_t c_stride, bool accumulate,
                                const Fetch& next);
};

// The most rows of a small batch: as many as a vector has lanes. A vector has at least kLeastSmallBatch
// floats on every instruction set; no small batch has more than kMostSmallBatch rows.
inline constexpr size_t kLeastSmallBatch = 4, kMostSmallBatch = 8;

// The element type of x in products with a weight of type W: bfloat16 is widened to float, pairs are
// multiplied by pairs.
template <class W>
struct OperandOf {
  using Type = Sum<W>;
};
template <>
struct OperandOf<Bf16Pair> {
  using Type = Bf16Pair;
};
template <class W>
using Operand = typename OperandOf<W>::Type;

// The type in memory where gemm_outputs_in_lanes multiplies pairs: single bfloat16 values. It pairs the rows
// of W itself.
template <class W>
struct StoredOf {
  using Type = W;
};
template <>
struct StoredOf<Bf16Pair> {
  using Type = Bf16;
};

// Small batches have fewer rows than a vector has lanes. The interleave factor f puts every lane to work:
// lane (token * f + i) holds the elements k of the depth with k % f == i. For m rows, f is as large as the
// lanes allow.
inline size_t interleave_factor(size_t m, size_t lanes) {
  size_t factor = lanes;
  while (factor > 1 && factor * m > lanes) factor /= 2;
  return factor;
}

// The products of small batches. W is read once, in its storage layout, and nothing is transposed.
template <class W>
struct SmallProducts {
  // part (rows, lanes / 2) = [part +] w (rows, depth) xs, one sum for each lane.   xs comes from interleave.
  // If w has columns, row_stride > 0. A row is summed in the same order in panels and row-major. Pairs of
  // bfloat16 need an interleave factor of at most 8.
  void (*dots)(size_t interleave_factor, size_t rows, size_t depth, const Panels<W>& w, const Operand<W>* xs,
               Sum<W>* part, bool accumulate);

  // gemm_outputs_in_lanes of Tiles, except that its depth counts rows of w.
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<Operand<W>>& a,
                                const typename StoredOf<W>::Type* w, size_t w_stride, Sum<W>* c,
                                size_t c_stride, bool accumulate, const Fetch& next);
};

// The products of pairs that AMX adds to the table of another instruction set.
struct PairProducts {
  Tiles<Bf16Pair> tiles;
  decltype(SmallProducts<Bf16Pair>::gemm_outputs_in_lanes) small_gemm_outputs_in_lanes;
};

struct AdamWCoefficients {
  double lr, beta1, beta2, eps, weight_decay;
  double bias1, bias2;  // 1 - beta1^t, 1 - beta2^t
  double grad_scale;
};

struct SgdCoefficients {
  double lr, momentum, weight_decay, grad_scale;
  bool nesterov;
};

template <class T>
struct Products : Tiles<T> {
  // xt (cols, n_lanes) = x (rows, cols) transposed, rows <= n_lanes. Lanes without a row are set to zero.
  void (*to_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* x, size_t x_stride, T* xt);

  // y (rows, cols) = yt (cols, n_lanes) transposed [+ bias (cols)], rows <= n_lanes.   bias may be null.
  void (*from_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* yt, const T* bias, T* y,
                     size_t y_stride);

  // xt (cols, rows) = x (rows, cols) transposed.
  void (*transpose)(size_t rows, size_t cols, const T* x, size_t x_stride, T* xt, size_t xt_stride);

  // xs (ceil(cols / interleave_factor), lanes / 2) = x (m, cols), each element in its lane, with zeros where
  // x has none.
  // Pairs of bfloat16 are moved as floats.
  void (*interleave)(size_t m, size_t interleave_factor, size_t cols, const T* x, size_t x_stride, T* xs);

  // y (m, rows) = the sums over each token's lanes of part (rows, lanes / 2), in a fixed tree [+ bias
  // (rows)].
  // bias may be null.
  void (*sum_parts)(size_t m, size_t interleave_factor, size_t rows, const T* part, const T* bias, T* y,
                    size_t y_stride);

  // y (m, rows) += z (m, depth) aᵀ with a (rows, depth) dense. It adds the low-rank term of a small batch: m
  // <= kMostSmallBatch, and depth is a rank.
  void (*add_dots)(size_t m, size_t rows, size_t depth, const T* a, const T* z, size_t z_stride, T* y,
                   size_t y_stride);

  // One AdamW step on n elements (Loshchilov & Hutter 2019, algorithm 2, as torch computes it). g is first
  // multiplied by grad_scale.
  void (*adamw)(size_t n, T* p, const T* g, T* m, T* v, const AdamWCoefficients& k);

  // g = grad_scale * g + weight_decay * p;  buf = momentum * buf + g;  p -= lr * (nesterov ? g + momentum *
  // buf : buf).
  // buf may be null if momentum is 0.
  void (*sgd)(size_t n, T* p, const T* g, T* buf, const SgdCoefficients& k);

  // The sum of squares, in double and in a fixed order.
  double (*sum_of_squares)(size_t n, const T* x);

  // out = keep(seed, first + i) ? x * factor : 0. Element i is dropped if its 32 bits from Philox4x32-10 are
  // below threshold.
  void (*dropout)(size_t n, uint64_t seed, uint64_t first, uint32_t threshold, T factor, const T* x, T* out);

  // c (m, n) += a (m, depth) w (depth, n), summed in the order of gemm_outputs_in_lanes.   a is dense.
  // panels holds w in panels of kPanelColumns columns, each dense; the last panel has the remaining columns.
  // streams: c is too large for the cache and is fetched ahead.
  void (*merge)(size_t m, size_t n, size_t depth, const T* a, const T* panels, T* c, size_t c_stride,
                bool streams);
};

// Conversions to and from 16-bit storage. Narrowing rounds to nearest even, keeps NaN and subnormals, and
// overflows to Inf.
struct Conversions {
  void (*widen_bfloat16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_bfloat16)(size_t n, const float* from, uint16_t* to);
  void (*widen_float16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_float16)(size_t n, const float* from, uint16_t* to);

  // Each x becomes one of its two neighbours in the format. The choice is random, so that the expected value
  // is x (for float16 below 2^-14: to 2^-48). The random bits come from dropout's generator. Values beyond
  // the largest finite number stay as they are.
  void (*dither_bfloat16)(size_t n, uint64_t seed, uint64_t first, float* x);
  void (*dither_float16)(size_t n, uint64_t seed, uint64_t first, float* x);

  // out (ceil(rows / 2), cols) = pairs of neighbours down the columns of x (rows, cols), narrowed if x is
  // float. An odd last row is paired with zeros.
  void (*pair_rows)(size_t rows, size_t cols, const float* x, size_t x_stride, Bf16Pair* out);
  void (*pair_bits)(size_t rows, size_t cols, const uint16_t* x, size_t x_stride, Bf16Pair* out);
};

// A weight in NF4: the nibbles of the flat tensor, and a scale for each block of 64. The scale of a block is
// absmax[block] or, if absmax is null, absmax_book[absmax_codes[block]] * absmax_scales[block / kNf4Group] +
// absmax_offset, rounded after each operation.
struct Nf4 {
  const uint8_t* codes;
  const float* absmax;
  const uint8_t* absmax_codes = nullptr;
  const float *absmax_book = nullptr, *absmax_scales = nullptr;
  float absmax_offset = 0;
};

// Rows of decoded floats. Columns from kPanelColumns on are stored `apart` elements further on, so that two
// panels can each have rows without gaps.
struct DecodedRows {
  float* data;
  size_t stride, apart = 0;
};

// Conversions of low-bit blocks (kernels/formats) to float. Every value is computed as if in float32 without
// fused multiply-adds, so all instruction sets give the same bits.
struct BlockDecoders {
  // to (rows, cols) = columns first ... first + cols - 1 of rows of blocks, which begin row_bytes apart.
  // first and cols are multiples of kSubBlock. One kernel for each row format, in the order of BlockFormat.
  void (*decode[kRowFormats])(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                              const DecodedRows& to);

  // to (rows, cols): element (i, j) is number first + i * row_step + j of the flat tensor. Any numbers work;
  // even numbers are fast. If panels are apart (see DecodedRows), first and row_step must be multiples of 16.
  void (*decode_nf4)(size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const DecodedRows& to);
};

// The products of small batches with low-bit blocks, which are decoded in registers. W is read once, in its
// storage layout.
struct BlockDots {
  // part (m, rows, lanes / 2) = x (m, cols) times rows of blocks: lane i sums the elements k with k % (lanes
  // / 2) == i. cols is a multiple of the block's elements. In the order of BlockFormat, without kNf4. A scale
  // may multiply the sum of its sub-block, so x beyond 1e34 can overflow.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const float* x, size_t x_stride, float* part, const Fetch& next);

  // The function `dots` for NF4. Row i begins with number first + i * row_step of the flat tensor. first,
  // row_step and cols are multiples of 64.
  void (*dots_nf4)(size_t m, size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const float* x,
                   size_t x_stride, float* part, const Fetch& next);
};

// Rows of x in int8. Element i of a row is about codes[i] * scale, with one scale for each sub-block. sums =
// scale * Σ codes over a sub-block; half_sums is the same over each half. The arrays are (m, cols), (m, cols
// / kSubBlock) twice and (m, 2 * cols / kSubBlock).
struct Int8Rows {
  const int8_t* codes;
  const float *scales, *sums, *half_sums;
};

// The products of small batches with low-bit blocks, in integers.
struct Int8Products {
  // One row of n elements, n a multiple of kSubBlock: scale = max |x| / 127, codes = x / scale, rounded to
  // nearest. A sub-block whose values are all below 2^-119 counts as zero. A sub-block with a NaN or infinity
  // counts as NaN.
  void (*quantize)(size_t n, const float* x, int8_t* codes, float* scales, float* sums, float* half_sums);

  // y (m, rows) = x (m, cols) times rows of blocks.   cols is a multiple of the block's elements.
  // In the order of BlockFormat, without kNf4.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const Int8Rows& x, float* y, const Fetch& next);
};

// The activations of gated units: silu(g) = g / (1 + exp(-g)), and GELU in its tanh form.
enum class Activation : uint8_t { kSilu, kGeluTanh };
inline constexpr size_t kActivations = 2;

// The functions of a language model other than its products. If an output may be the same array as an input,
// element i of the output is written after element i of the input was read.
struct Transformer {
  // y = x * weight / sqrt(mean x² + eps), of n elements.
  void (*rms_norm)(size_t n, const float* x, const float* weight, float eps, float* y);

  // dx = [dx +] r * (dn - x * r² * mean(dn * x))  with dn = dy * weight and r = 1 / sqrt(mean x² + eps).
  // dx may be dy.
  void (*rms_norm_backward)(size_t n, const float* dy, const float* x, const float* weight, float eps,
                            float* dx, bool accumulate);

  // The pairs (a, b) of x (heads, head_dim) become (a cos - b sin, b cos + a sin). A pair is elements i and
  // half + i of a head, or 2i and 2i + 1 if interleaved. Elements of a head after its first 2 * half are
  // neither read nor written. table holds half cosines, then half sines. inverse negates the sines.
  void (*rotate)(size_t heads, size_t head_dim, size_t half, const float* table, bool interleaved,
                 bool inverse, float* x);

  // out = act(gate) * up, for each Activation.
  void (*gated[kActivations])(size_t n, const float* gate, const float* up, float* out);

  // dgate = dout * up * act'(gate);  dup = dout * act(gate).   dgate and dup may be any of the inputs.
  void (*gated_backward[kActivations])(size_t n, const float* dout, const float* gate, const float* up,
                                       float* dgate, float* dup);

  // The largest of n elements, or the lowest float if n is 0. If an element is NaN, the result may be NaN or
  // not.
  float (*largest)(size_t n, const float* x);

  // The sum of y = exp(x - shift), in as many partial sums as there are lanes.   y may be null, or x.
  float (*exp_sum)(size_t n, const float* x, float shift, float* y);

  // y = [y +] factor * x.   y may be x.
  void (*scaled)(size_t n, float factor, const float* x, float* y, bool accumulate);

  // The sum of a * b, in as many partial sums as there are lanes.
  float (*dot)(size_t n, const float* a, const float* b);

  // The dot products of a query's heads with rows of keys: scores (heads, rows) = q (heads, dim) k (rows,
  // heads / group * dim)ᵀ, where head h uses the columns h / group * dim ... of k.
  void (*key_dots)(size_t rows, size_t heads, size_t group, size_t dim, const float* q, const float* k,
                   size_t k_stride, float* scores, size_t s_stride);

  // out (heads, dim) += weights (heads, rows) v (rows, heads / group * dim), where head h uses the columns h
  // / group * dim ... of v.
  void (*add_values)(size_t rows, size_t heads, size_t group, size_t dim, const float* weights,
                     size_t w_stride, const float* v, size_t v_stride, float* out);

  // x (rows, n) = x * factor (n).
  void (*scale_columns)(size_t rows, size_t n, const float* factor, float* x, size_t x_stride);

  // One step of a softmax down the columns of s (rows, n), whose rows arrive tile by tile (Milakov &
  // Gimelshein 2018). If a tile has a new largest element, all earlier sums must shrink by `factor`.
  //   new = max(largest, max s);  factor = exp(largest - new);  s = exp(s - new);
  //   sum = sum * factor + Σ s;  largest = new.
  // Elements of -Inf have no weight, even if all are -Inf, provided that largest begins as the lowest float.
  void (*softmax_step)(size_t rows, size_t n, float* s, size_t s_stride, float* largest, float* sum,
                       float* factor);

  // p = exp(min(s - lse, 0));  ds = p * (dp - delta), down the columns of s and dp (rows, n), in place: s
  // becomes p, dp becomes ds.
  void (*softmax_backward)(size_t rows, size_t n, const float* lse, const float* delta, float* s, float* dp,
                           size_t stride);

  // softmax_backward if the rows hold all keys of each column: p = softmax(s) and delta = Σ p * dp.
  void (*whole_softmax_backward)(size_t rows, size_t n, float* s, float* dp, size_t stride);
};

struct KernelTable {
  const char* isa;
  Products<float> f32;
  Products<double> f64;
  Tiles<Bf16Pair> bf16;
  SmallProducts<float> small_f32;
  SmallProducts<double> small_f64;
  SmallProducts<Bf16> small_bf16;
  SmallProducts<Bf16Pair> small_pairs;
  Conversions convert;
  BlockDecoders blocks;
  BlockDots block_dots;
  Int8Products int8;
  Transformer transformer;

  // Whether small_pairs.gemm_outputs_in_lanes pairs the rows of w in registers. Otherwise each call makes a
  // paired copy.
  bool pairs_in_registers = true;

  template <class T>
  const Products<T>& products() const;
  template <class E>
  const Tiles<E>& tiles() const;
  template <class W>
  const SmallProducts<W>& small() const;
};
template <>
inline const Products<float>& KernelTable::products<float>() const {
  return f32;
}
template <>
inline const Products<double>& KernelTable::products<double>() const {
  return f64;
}

template <>
inline const Tiles<float>& KernelTable::tiles<float>() const {
  return f32;
}
template <>
inline const Tiles<double>& KernelTable::tiles<double>() const {
  return f64;
}
template <>
inline const Tiles<Bf16Pair>& KernelTable::tiles<Bf16Pair>() const {
  return bf16;
}
template <>
inline const SmallProducts<float>& KernelTable::small<float>() const {
  return small_f32;
}
template <>
inline const SmallProducts<double>& KernelTable::small<double>() const {
  return small_f64;
}
template <>
inline const SmallProducts<Bf16>& KernelTable::small<Bf16>() const {
  return small_bf16;
}
template <>
inline const SmallProducts<Bf16Pair>& KernelTable::small<Bf16Pair>() const {
  return small_pairs;
}

// The table in use: the best table that this machine runs, or the table that NPLORA_ISA names. The first call
// chooses it. Linux is asked for the AMX registers only if they would be used. If Linux refuses, the next
// best table is used, unless NPLORA_ISA=amx. Throws std::invalid_argument, with the reason, if NPLORA_ISA
// names a table that is unknown, not built in or not runnable.
const KernelTable& table();

// Every table that this build holds and this machine runs, best last. Does not ask Linux for AMX. For tests
// and show_config.
size_t available_tables(const KernelTable** out, size_t capacity);

}  // namespace nplora::kernels
