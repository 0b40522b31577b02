// The whole contract between kernels and the rest: one table of function pointers per instruction set, chosen
// once. A kernel touches only the elements its shapes name, allocates nothing, throws nothing and knows no
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cache_line.h"
#include "kernels/formats.h"

namespace nplora::kernels {

// W is stored in panels of this many columns: 48 = 3 AVX-512, 6 AVX2 or 12 NEON vectors of float, so that one
// layout serves every instruction set and 8 rows x 48 columns (24 AVX-512 registers) hide the latency of FMA.
inline constexpr size_t kPanelColumns = 48;

// Element (row, col) of a panelled matrix lies at data[(col / 48) * panel_stride + row * row_stride + col %
// 48]. A plain row-major matrix is the special case panel_stride == 48.
template <class T>
struct Panels {
  const T* data;
  size_t row_stride;
  size_t panel_stride;
};

// Element (i, step) lies at data[i * row_stride + step * step_stride].
template <class T>
struct Strided {
  const T* data;
  size_t row_stride;
  size_t step_stride;
};

// A bfloat16 value, as a weight of small batches is read: widened to float in registers.
enum class Bf16 : uint16_t {};

// Two bfloat16 values, neighbours along the depth, the first in the low half: the element of the bfloat16 products.
enum class Bf16Pair : uint32_t {};

// The type that products of E are summed in.
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

// How many values along the depth one element holds.
template <class E>
inline constexpr size_t kValuesPerElement = 1;
template <>
inline constexpr size_t kValuesPerElement<Bf16Pair> = 2;

// The elements of a full panel along the depth.
template <class E>
inline constexpr size_t kPanelDepth = kPanelColumns / kValuesPerElement<E>;

// Memory that a kernel brings into the cache while it works: none, whole cache lines, or the rows of w that it reads later.
struct Fetch {
  const char* at = nullptr;
  size_t lines = 0, each = 0;

  static constexpr Fetch none() { return {}; }

  // gemm_outputs_in_lanes takes `each` lines at each step of its work, at most as many as it reads of w, and rows ahead when too
  // few are left. The products with blocks spread the lines over their rows, and do not read `each`.
  static constexpr Fetch memory(const void* from, size_t lines, size_t each = 0) {
    return {static_cast<const char*>(from), lines, each};
  }

  // The rows of w that come kFetchAhead later, or in the next L1 block (see l1_block_bytes). For gemm_outputs_in_lanes.
  static constexpr Fetch rows_ahead() { return {nullptr, 0, 1}; }
};

// How far ahead in memory W is fetched where it is read once: 10 bytes a cycle arrive, over 500 cycles after the request, and
// after twice as many where others use the same path.
inline constexpr size_t kFetchAhead = 12288;

// Each depth_unit (see Tiles) divides this: a depth that is cut at multiples of so many elements is summed as if it were whole, on
// every instruction set. A panel of floats ends at such a multiple; one of pairs, 24 elements, does not (see kDepthCut).
inline constexpr size_t kDepthUnit = 16;
static_assert(kPanelDepth<float> % kDepthUnit == 0);

// The two products that everything is made of; depth counts elements. Both sum over the depth strictly in order (by fused
// multiply-adds if the instruction set has them), or sum each depth_unit elements by themselves first. If the depth is cut at
// multiples of depth_unit, a result does not depend on tile sizes, blocking or threads, and both products give the same bits.
template <class E>
struct Tiles {
  size_t
      lanes;  // tokens in a full tile of gemm_tokens_in_lanes: two vectors (small batches take one, lanes / 2)
  size_t
      tile_rows;  // the number of rows of w for which gemm_tokens_in_lanes is fastest (it takes any number)
  size_t tile_tokens;   // the same for the rows of a in gemm_outputs_in_lanes, if the rows of w are not dense
  size_t tile_columns;  // the columns of w that it takes at a time then: w is read once for each such group
  size_t
      l1_block_bytes;  // the most of a dense panel that is read several times, from L1, before the rest; 0: all of it
  size_t depth_unit;  // in elements; divides kDepthUnit

  // yt (rows, n_lanes) = [yt +] w (rows, depth) xt (depth, n_lanes).   n_lanes is `lanes` or `lanes / 2`.
  // Tokens are in the SIMD lanes, w is broadcast. xt and yt are dense.
  void (*gemm_tokens_in_lanes)(size_t n_lanes, size_t rows, size_t depth, const Panels<E>& w, const E* xt,
                               Sum<E>* yt, bool accumulate);

  // c (m, n) = [c +] a (m, depth) w (depth, n),  n <= kPanelColumns.
  // The outputs, which are columns of c, are in the SIMD lanes, a is broadcast.
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<E>& a, const E* w,
                                size_t w_stride, Sum<E>* c, size_t c_stride, bool accumulate,
                                const Fetch& next);
};

// The most rows of a small batch: as many as there are lanes, from kLeastSmallBatch on every instruction set (for floats) to
// kMostSmallBatch.
inline constexpr size_t kLeastSmallBatch = 4, kMostSmallBatch = 8;

// The elements that x is multiplied in where W holds W: bfloat16 is widened, pairs are met by pairs.
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

// What lies in memory where the rows of W are met by pairs: single values, which gemm_outputs_in_lanes pairs.
template <class W>
struct StoredOf {
  using Type = W;
};
template <>
struct StoredOf<Bf16Pair> {
  using Type = Bf16;
};

// Small batches have fewer rows than a vector has lanes. An interleave factor f puts every lane to work: lane (token * f + i)
// takes the elements k of the depth for which k % f == i. For m rows it is as large as the lanes allow.
inline size_t interleave_factor(size_t m, size_t lanes) {
  size_t factor = lanes;
  while (factor > 1 && factor * m > lanes) factor /= 2;
  return factor;
}

// The products of small batches: W is read once, as it is stored, and nothing is transposed.
template <class W>
struct SmallProducts {
  // part (rows, lanes / 2) = [part +] w (rows, depth) xs, a sum for each lane.   xs is x as interleave leaves it.
  // If w has columns, row_stride > 0. A row is summed in the same order in panels and row-major.
  // Pairs of bfloat16 take an interleave factor of at most 8.
  void (*dots)(size_t interleave_factor, size_t rows, size_t depth, const Panels<W>& w, const Operand<W>* xs,
               Sum<W>* part, bool accumulate);

  // gemm_outputs_in_lanes of Tiles, its depth counting rows of w.
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<Operand<W>>& a,
                                const typename StoredOf<W>::Type* w, size_t w_stride, Sum<W>* c,
                                size_t c_stride, bool accumulate, const Fetch& next);
};

// What AMX adds to another table: the products of pairs.
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
  // xt (cols, n_lanes) = x (rows, cols) transposed, rows <= n_lanes; the lanes behind rows are set to zero.
  void (*to_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* x, size_t x_stride, T* xt);

  // y (rows, cols) = yt (cols, n_lanes) transposed [+ bias (cols)], rows <= n_lanes.   bias may be null.
  void (*from_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* yt, const T* bias, T* y,
                     size_t y_stride);

  // xt (cols, rows) = x (rows, cols) transposed.
  void (*transpose)(size_t rows, size_t cols, const T* x, size_t x_stride, T* xt, size_t xt_stride);

  // xs (ceil(cols / interleave_factor), lanes / 2) = x (m, cols), each element in its lane, with zeros where x has no element.
  // Pairs of bfloat16 are moved as floats are.
  void (*interleave)(size_t m, size_t interleave_factor, size_t cols, const T* x, size_t x_stride, T* xs);

  // y (m, rows) = the sums of each token's lanes of part (rows, lanes / 2), in a fixed tree [+ bias (rows)].   bias may be null.
  void (*sum_parts)(size_t m, size_t interleave_factor, size_t rows, const T* part, const T* bias, T* y,
                    size_t y_stride);

  // y (m, rows) += z (m, depth) aᵀ with a (rows, depth) dense: the update of a small batch, m <= kMostSmallBatch, depth a rank.
  void (*add_dots)(size_t m, size_t rows, size_t depth, const T* a, const T* z, size_t z_stride, T* y,
                   size_t y_stride);

  // One AdamW step (Loshchilov & Hutter 2019, algorithm 2, as torch computes it) on n elements; g is scaled
  // by grad_scale.
  void (*adamw)(size_t n, T* p, const T* g, T* m, T* v, const AdamWCoefficients& k);

  // g = grad_scale * g + weight_decay * p; buf = momentum * buf + g; p -= lr * (nesterov ? g + momentum * buf : buf).
  // buf may be null where momentum is 0.
  void (*sgd)(size_t n, T* p, const T* g, T* buf, const SgdCoefficients& k);

  // Sum of squares, in double, in a fixed order.
  double (*sum_of_squares)(size_t n, const T* x);

  // out = keep(seed, first + i) ? x * factor : 0 with Philox4x32-10: element i is dropped where its 32 bits <
  // threshold.
  void (*dropout)(size_t n, uint64_t seed, uint64_t first, uint32_t threshold, T factor, const T* x, T* out);

  // c (m, n) += a (m, depth) w (depth, n), summed as gemm_outputs_in_lanes does.   a is dense; panels holds w, kPanelColumns columns each and the
  // last what is left, each dense. Where c streams by, it is fetched ahead.
  void (*merge)(size_t m, size_t n, size_t depth, const T* a, const T* panels, T* c, size_t c_stride,
                bool streams);
};

// To and from 16-bit storage. Narrowing rounds to nearest even, keeps NaN a NaN, keeps subnormals and
// overflows to Inf.
struct Conversions {
  void (*widen_bfloat16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_bfloat16)(size_t n, const float* from, uint16_t* to);
  void (*widen_float16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_float16)(size_t n, const float* from, uint16_t* to);

  // Each x becomes one of its two neighbours in the format, by chance so that its mean is x (float16 below 2^-14: to 2^-48); the
  // chance is that of dropout. What lies beyond the largest finite number is left alone.
  void (*dither_bfloat16)(size_t n, uint64_t seed, uint64_t first, float* x);
  void (*dither_float16)(size_t n, uint64_t seed, uint64_t first, float* x);

  // out (ceil(rows / 2), cols): pairs of neighbours down the columns of x (rows, cols), narrowed if float; an odd last row is
  // paired with zeros.
  void (*pair_rows)(size_t rows, size_t cols, const float* x, size_t x_stride, Bf16Pair* out);
  void (*pair_bits)(size_t rows, size_t cols, const uint16_t* x, size_t x_stride, Bf16Pair* out);
};

// A weight in NF4: the nibbles of the flat tensor and a scale for each block of 64: absmax[block]; or, where that is null,
// absmax_book[absmax_codes[block]] * absmax_scales[block / kNf4Group] + absmax_offset, rounded twice.
struct Nf4 {
  const uint8_t* codes;
  const float* absmax;
  const uint8_t* absmax_codes = nullptr;
  const float *absmax_book = nullptr, *absmax_scales = nullptr;
  float absmax_offset = 0;
};

// Rows of decoded floats; the columns from kPanelColumns on lie `apart` elements further than behind the others, so that two panels
// can each have rows without gaps.
struct DecodedRows {
  float* data;
  size_t stride, apart = 0;
};

// Low-bit blocks (kernels/formats) to float. Every value is that of float32 arithmetic without fused multiply-adds: the same
// bits on every instruction set.
struct BlockDecoders {
  // to (rows, cols) = columns first ... first + cols - 1 of rows of blocks, which begin row_bytes apart.   first and cols are multiples
  // of kSubBlock. One kernel for each format of rows, in the order of BlockFormat.
  void (*decode[kRowFormats])(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                              const DecodedRows& to);

  // to (rows, cols): element (i, j) is number first + i * row_step + j of the flat tensor.   Any number; even ones are fast.
  // Where panels lie apart, first and row_step are multiples of 16.
  void (*decode_nf4)(size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const DecodedRows& to);
};

// The products of small batches with low-bit blocks, decoded in registers: W is read once, as it lies.
struct BlockDots {
  // part (m, rows, lanes / 2) = x (m, cols) times rows of blocks: lane i sums the elements k with k % (lanes / 2) == i.
  // cols is a multiple of the block's elements. In the order of BlockFormat, kNf4 excepted. A scale may multiply the sum of its
  // sub-block: x beyond 1e34 can overflow there.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const float* x, size_t x_stride, float* part, const Fetch& next);

  // The same where row i begins with number first + i * row_step of the flat tensor: those, and cols, are multiples of 64.
  void (*dots_nf4)(size_t m, size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const float* x,
                   size_t x_stride, float* part, const Fetch& next);
};

// Rows of x in int8: element i of a row is about codes[i] * scale, with a scale for each sub-block, sums = scale * Σ codes, and
// half_sums the same over each half of a sub-block. The arrays are (m, cols), (m, cols / kSubBlock) twice and
// (m, 2 * cols / kSubBlock).
struct Int8Rows {
  const int8_t* codes;
  const float *scales, *sums, *half_sums;
};

// The products of small batches with low-bit blocks in integers.
struct Int8Products {
  // One row of n elements, n a multiple of kSubBlock: scale = max |x| / 127, codes = x / scale to the nearest. A sub-block that is below
  // 2^-119 everywhere counts as zero, and one that holds NaN or infinity as NaN.
  void (*quantize)(size_t n, const float* x, int8_t* codes, float* scales, float* sums, float* half_sums);

  // y (m, rows) = x (m, cols) times rows of blocks.   cols is a multiple of the block's elements. In the order of BlockFormat, kNf4
  // excepted.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const Int8Rows& x, float* y, const Fetch& next);
};

// Of gated units: silu(g) = g / (1 + exp(-g)), and GELU by tanh.
enum class Activation : uint8_t { kSilu, kGeluTanh };
inline constexpr size_t kActivations = 2;

// What a language model computes beside its products. Where an output may be an input, element i of one is written after element i
// of the other was read.
struct Transformer {
  // y = x * weight / sqrt(mean x² + eps), of n elements.
  void (*rms_norm)(size_t n, const float* x, const float* weight, float eps, float* y);

  // dx = [dx +] r * (dn - x * r² * mean(dn * x))  with dn = dy * weight and r = 1 / sqrt(mean x² + eps).   dx may be dy.
  void (*rms_norm_backward)(size_t n, const float* dy, const float* x, const float* weight, float eps,
                            float* dx, bool accumulate);

  // The pairs (a, b) of x (heads, head_dim) become (a cos - b sin, b cos + a sin). A pair is elements i and half + i of a head, or
  // 2i and 2i + 1 where interleaved. The elements of a head after its first 2 * half are neither read nor written.
  // table is half cosines, then half sines; inverse: the sines count negative.
  void (*rotate)(size_t heads, size_t head_dim, size_t half, const float* table, bool interleaved,
                 bool inverse, float* x);

  // out = act(gate) * up, for each Activation.
  void (*gated[kActivations])(size_t n, const float* gate, const float* up, float* out);

  // dgate = dout * up * act'(gate);  dup = dout * act(gate).   dgate and dup may be any of the inputs.
  void (*gated_backward[kActivations])(size_t n, const float* dout, const float* gate, const float* up,
                                       float* dgate, float* dup);

  // The largest of n elements, the lowest float if n is 0. NaN may or may not count.
  float (*largest)(size_t n, const float* x);

  // The sum of y = exp(x - shift), in as many partial sums as there are lanes.   y may be null, or x.
  float (*exp_sum)(size_t n, const float* x, float shift, float* y);

  // y = [y +] factor * x.   y may be x.
  void (*scaled)(size_t n, float factor, const float* x, float* y, bool accumulate);

  // The sum of a * b, in as many partial sums as there are lanes.
  float (*dot)(size_t n, const float* a, const float* b);

  // The dot products of a query's heads with the keys that lie row after row: scores (heads, rows) = q (heads, dim) times, for head
  // h, columns h / group * dim ... of k (rows, heads / group * dim).
  void (*key_dots)(size_t rows, size_t heads, size_t group, size_t dim, const float* q, const float* k,
                   size_t k_stride, float* scores, size_t s_stride);

  // out (heads, dim) += weights (heads, rows) times those columns of v, row after row.
  void (*add_values)(size_t rows, size_t heads, size_t group, size_t dim, const float* weights,
                     size_t w_stride, const float* v, size_t v_stride, float* out);

  // x (rows, n) = x * factor (n).
  void (*scale_columns)(size_t rows, size_t n, const float* factor, float* x, size_t x_stride);

  // One step of a softmax down the columns of s (rows, n), whose rows come tile by tile (Milakov & Gimelshein 2018): what
  // multiplies all sums so far, for the largest element has grown; the exponentials; their sum.
  //   factor = exp(largest - new) where new = max(largest, max s);  s = exp(s - new);  sum = sum * factor + Σ s;  largest = new.
  // Elements of -Inf have no weight, even where all are, if largest begins as the lowest float.
  void (*softmax_step)(size_t rows, size_t n, float* s, size_t s_stride, float* largest, float* sum,
                       float* factor);

  // p = exp(min(s - lse, 0));  ds = p * (dp - delta), down the columns of s and dp (rows, n), in place.
  void (*softmax_backward)(size_t rows, size_t n, const float* lse, const float* delta, float* s, float* dp,
                           size_t stride);
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

  // Whether small_pairs.gemm_outputs_in_lanes pairs the rows of w in registers, rather than in a copy that each call makes anew.
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

// The table in use: the best one that this machine runs, or the one that NPLORA_ISA names. The first call chooses it. Linux is asked
// for the registers of AMX only where they would be used; where it refuses them, the next best table serves, unless amx was named.
// Throws std::invalid_argument, with the reason, if NPLORA_ISA names one that is unknown, not built in or not
// runnable.
const KernelTable& table();

// Every table that this build holds and this machine runs, best last; asks Linux for nothing. For tests and show_config.
size_t available_tables(const KernelTable** out, size_t capacity);

}  // namespace nplora::kernels
