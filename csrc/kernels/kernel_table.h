// The whole interface between the kernels and the rest of the library: one table of function pointers for
// each instruction set. The library chooses its table when it first needs a kernel. The comment of a kernel
// gives the shapes of its arrays. The kernel reads and writes only elements within these shapes, unless its
// comment says otherwise. A kernel allocates no memory, throws no exceptions and starts no threads.
//
// In the comments, x (rows, cols) means that the array x has the shape (rows, cols). The argument `x_stride`
// is the distance from one row of `x` to the next, in elements. An array is dense if there are no gaps
// between its rows. The depth of a matrix product is the dimension that the product sums over. A token is a
// row of the activations `x`. A lane is one element of a SIMD vector.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cache_line.h"
#include "kernels/formats.h"

namespace nplora::kernels {

// The number of columns of a panel. A panel holds 48 neighbouring columns of a weight W, row by row. Because
// 48 floats are 3 AVX-512, 6 AVX2 or 12 NEON vectors, one layout serves every instruction set. A tile is the
// part of a result that a kernel keeps in registers while it computes that part. With AVX-512, a tile of 8
// rows x 48 columns takes 24 of the 32 registers. These 24 independent sums are enough to hide the latency of
// fused multiply-adds.
inline constexpr size_t kPanelColumns = 48;

// A matrix in panels. Let `width` be kPanelDepth<T>, which is 48 if an element is a single value. Element
// (row, col) is data[(col / width) * panel_stride + row * row_stride + col % width]. A row-major matrix is
// the special case panel_stride == width.
template <class T>
struct Panels {
  const T* data;
  size_t row_stride;
  size_t panel_stride;
};

// A matrix with two strides. Element (i, step) is data[i * row_stride + step * step_stride]. `step` is the
// index along the depth: a matrix product sums over `step`.
template <class T>
struct Strided {
  const T* data;
  size_t row_stride;
  size_t step_stride;
};

// One bfloat16 value of a weight. (A Bf16Pair holds two values.) With very few tokens, a product loads the
// values of the weight as Bf16 and converts them to float in registers. The product does not combine these
// values into pairs.
enum class Bf16 : uint16_t {};

// The element type of the bfloat16 products: two bfloat16 values that are neighbours along the depth. The low
// 16 bits are the first value.
enum class Bf16Pair : uint32_t {};

// The element type of W in the int8 products of large batches. One element packs four codes that are
// neighbours along the depth. The lowest byte is the first code.
enum class Int8Quad : uint32_t {};

// The type in which products of elements of type E are summed.
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

// The number of values in one element of type E. The values are neighbours along the depth.
template <class E>
inline constexpr size_t kValuesPerElement = 1;
template <>
inline constexpr size_t kValuesPerElement<Bf16Pair> = 2;
template <>
inline constexpr size_t kValuesPerElement<Int8Quad> = 4;

// The number of elements of type E that hold one row of a full panel, which has 48 values. The values of an
// element are neighbours in the row.
template <class E>
inline constexpr size_t kPanelDepth = kPanelColumns / kValuesPerElement<E>;

// What a kernel prefetches while it works: nothing, cache lines that the caller chooses, or rows of the
// operand `w` that the kernel reads later.
struct Fetch {
  const char* at = nullptr;
  size_t lines = 0, each = 0;

  static constexpr Fetch none() { return {}; }

  // Prefetches `lines` cache lines that begin at `from`. The kernels for low-bit blocks ignore `each` and
  // spread the prefetches evenly over the rows of W.
  //
  // gemm_outputs_in_lanes computes its result tile by tile. A tile takes one step for each element in a row
  // of `a`. When a tile begins, the number of lines that are not yet prefetched decides what each step of the
  // tile prefetches:
  //   If there are at least steps * each lines, a step prefetches `each` lines, but at most as many lines as
  //     the step reads from `w`.
  //   If there are fewer lines, but at least one for each step, a step prefetches one line.
  //   If there is less than one line for each step, a step prefetches later rows of `w` instead.
  // If `each` is 0, gemm_outputs_in_lanes prefetches nothing. In an L1 block (see l1_block_bytes), tiles of
  // full width prefetch at most one line in each step, and never a later row of `w`.
  static constexpr Fetch memory(const void* from, size_t lines, size_t each = 0) {
    return {static_cast<const char*>(from), lines, each};
  }

  // Prefetches later rows of `w`; only for gemm_outputs_in_lanes. Each step prefetches the rows of `w` that
  // are kFetchAhead bytes after the rows that the step reads. In L1 blocks (see l1_block_bytes), each step
  // prefetches one cache line of the next L1 block instead. The kernel reads each L1 block several times. If
  // all readings of a block together have fewer steps than the next block has cache lines, the kernel
  // prefetches nothing and relies on the hardware prefetcher.
  static constexpr Fetch rows_ahead() { return {nullptr, 0, 1}; }
};

// The prefetch distance, in bytes, for a weight that is read only once. The bytes of a prefetch arrive more
// than 500 cycles after the request, or more than 1000 cycles if other programs use the memory at the same
// time. Memory delivers about 10 bytes in each cycle, so a kernel reads about 10000 bytes while it waits for
// the prefetched bytes. kFetchAhead must be larger than this number.
inline constexpr size_t kFetchAhead = 12288;

// A matrix product may be split along the depth into several calls of a kernel. If every cut is at a multiple
// of kDepthUnit elements, the sums have the same bits as in a single call, because kDepthUnit is a multiple
// of the `depth_unit` of every instruction set (see Tiles). For floats, a cut may be at any panel:
// kPanelDepth is 48, a multiple of kDepthUnit. For bfloat16 pairs, kPanelDepth is 24, which is not a multiple
// of kDepthUnit. Therefore, a W of bfloat16 pairs is cut only at every second panel (see kDepthCut in
// ops/blocking.h): 48 pairs are a multiple of kDepthUnit.
inline constexpr size_t kDepthUnit = 16;
static_assert(kPanelDepth<float> % kDepthUnit == 0);

// Runs the multiply instructions of this table as fast as possible, with operands in registers or in L1, so
// that the caller can measure the peak speed. Returns the number of operations (multiplications and
// additions).
using Peak = double (*)(size_t iterations);

// The two matrix products from which larger products are computed, block by block. In both kernels, the
// argument `depth` counts elements of type E. If depth_unit is 1, the terms of a sum are added one by one, in
// the order of the depth. If depth_unit is above 1, each group of depth_unit elements is summed first, and
// then the sums of the groups are added in order. Both products use fused multiply-adds if the instruction
// set has them. If the depth is cut only at multiples of depth_unit, the result does not depend on tile
// sizes, blocking or threads, and both products give the same bits.
template <class E>
struct Tiles {
  // The number of tokens in a full tile of gemm_tokens_in_lanes, which is the number of lanes of two vectors.
  // For a batch of few tokens, a tile has only one vector and half as many tokens.
  size_t lanes;
  // The number of rows of `w` in a full tile of gemm_tokens_in_lanes. Any number of rows is allowed, but full
  // tiles are the fastest.
  size_t tile_rows;
  // The size of a full tile of gemm_outputs_in_lanes if `w` is not dense: the tile multiplies tile_tokens
  // rows of `a` by tile_columns columns of `w`. Each tile reads its columns of `w` once.
  size_t tile_tokens, tile_columns;
  // gemm_outputs_in_lanes cuts a dense panel along the depth into L1 blocks of at most l1_block_bytes bytes.
  // An L1 block stays in L1 while all rows of `a` are multiplied by it. If l1_block_bytes is 0, panels are
  // not cut.
  size_t l1_block_bytes;
  size_t depth_unit;  // kDepthUnit is a multiple of this number

  // Computes yt = w xt, or yt += w xt if `accumulate` is set, for yt (rows, n_lanes), w (rows, depth) and xt
  // (depth, n_lanes). Each SIMD lane holds one token, and the elements of `w` are broadcast to all lanes.
  // `n_lanes` must be `lanes` or lanes / 2. `xt` and `yt` are dense.
  void (*gemm_tokens_in_lanes)(size_t n_lanes, size_t rows, size_t depth, const Panels<E>& w, const E* xt,
                               Sum<E>* yt, bool accumulate);

  // Computes c = a w, or c += a w if `accumulate` is set, for c (m, n), a (m, depth) and w (depth, n) with n
  // <= kPanelColumns. Each SIMD lane holds one output, which is a column of `c`, and the elements of `a` are
  // broadcast to all lanes. `next` determines what the kernel prefetches (see Fetch).
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<E>& a, const E* w,
                                size_t w_stride, Sum<E>* c, size_t c_stride, bool accumulate,
                                const Fetch& next);

  Peak peak;
};

// The largest number of tokens in a small batch.
inline constexpr size_t kSmallBatch = 8;

// The element type of the operand `a` in SmallProducts<W>::gemm_outputs_in_lanes. If W is Bf16, the kernel
// converts the weight to float, so `a` holds floats. If W is Bf16Pair, the kernel multiplies pairs by pairs,
// so `a` holds pairs.
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

// The type in which the weight is stored when SmallProducts<W>::gemm_outputs_in_lanes reads it. If W is
// Bf16Pair, single bfloat16 values are stored, and gemm_outputs_in_lanes combines them into pairs.
template <class W>
struct StoredOf {
  using Type = W;
};
template <>
struct StoredOf<Bf16Pair> {
  using Type = Bf16;
};

// Matrix products for small batches. A product reads the weight once, in storage order, and does not
// transpose the weight.
template <class W>
struct SmallProducts {
  // Multiplies x (m, depth) with the rows of w (rows, depth). The result is part (m, rows, kLanes), where
  // kLanes is Tiles<Sum<W>>::lanes / 2, the number of lanes of one vector. part[t][r][i] is a partial sum:
  // the sum of x[t][k] * w[r][k] over all k with k % kLanes == i. If `accumulate` is set, the partial sums
  // are added to `part` instead. If `depth` is not 0, w.row_stride must be greater than 0. The order in which
  // the products of a row of `x` are added depends neither on `m` nor on whether `w` is stored in panels or
  // row-major. In SmallProducts<Bf16Pair>, `dots` is null.
  void (*dots)(size_t m, size_t rows, size_t depth, const Panels<W>& w, const Sum<W>* x, size_t x_stride,
               Sum<W>* part, bool accumulate);

  // Adds z aᵀ to `y` (m, rows), for z (m, depth) and a dense a (rows, depth). The product is the low-rank
  // term of a small batch: `m` is at most kSmallBatch, and `depth` is a rank. The bits of a row of `y` do not
  // depend on `m`. In SmallProducts<Bf16Pair>, `add_dots` is null.
  void (*add_dots)(size_t m, size_t rows, size_t depth, const W* a, const Sum<W>* z, size_t z_stride,
                   Sum<W>* y, size_t y_stride);

  // Computes c = a w, or c += a w, like Tiles::gemm_outputs_in_lanes, but `depth` is always the number of
  // rows of `w`. If `a` holds pairs of bfloat16 values, the first value of a pair is multiplied by one row of
  // `w`, and the second value by the next row. In this case, if `w` has an odd number of rows, the last row
  // is paired with a row of zeros.
  void (*gemm_outputs_in_lanes)(size_t m, size_t n, size_t depth, const Strided<Operand<W>>& a,
                                const typename StoredOf<W>::Type* w, size_t w_stride, Sum<W>* c,
                                size_t c_stride, bool accumulate, const Fetch& next);
};

// The products of bfloat16 pairs for AMX. The table for AMX is a copy of the table for avx512bf16, in which
// these products replace the products of bfloat16 pairs.
struct PairProducts {
  Tiles<Bf16Pair> tiles;
  decltype(SmallProducts<Bf16Pair>::gemm_outputs_in_lanes) small_gemm_outputs_in_lanes;
};

struct AdamWCoefficients {
  double lr, beta1, beta2, eps, weight_decay;
  double bias1, bias2;  // the bias corrections 1 - beta1^t and 1 - beta2^t at step t
  double grad_scale;
};

struct SgdCoefficients {
  double lr, momentum, weight_decay, grad_scale;
  bool nesterov;
};

template <class T>
struct Products : Tiles<T> {
  // Transposes `x` (rows, cols) into `xt` (cols, n_lanes), for rows <= n_lanes. If `rows` is less than
  // n_lanes, the remaining columns of `xt` are set to zero.
  void (*to_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* x, size_t x_stride, T* xt);

  // Transposes the first `rows` columns of `yt` (cols, n_lanes) into `y` (rows, cols), for rows <= n_lanes,
  // and adds `bias` (cols) to each row of `y`. `bias` may be null.
  void (*from_lanes)(size_t n_lanes, size_t rows, size_t cols, const T* yt, const T* bias, T* y,
                     size_t y_stride);

  // Transposes `x` (rows, cols) into `xt` (cols, rows).
  void (*transpose)(size_t rows, size_t cols, const T* x, size_t x_stride, T* xt, size_t xt_stride);

  // Sums each row of part (rows, lanes / 2) in a fixed order, adds `bias` (rows), which may be null, and
  // stores the sums in `y` (rows). `part` holds the partial sums of SmallProducts::dots.
  void (*sum_parts)(size_t rows, const T* part, const T* bias, T* y);

  // Does one AdamW step on `n` elements (Loshchilov & Hutter 2019, algorithm 2, as implemented in torch). The
  // gradient `g` is first multiplied by grad_scale.
  void (*adamw)(size_t n, T* p, const T* g, T* m, T* v, const AdamWCoefficients& k);

  // Does one SGD step on `n` elements. `buf` may be null if momentum is 0.
  //   d = grad_scale * g + weight_decay * p;  buf = momentum * buf + d;
  //   p -= lr * (nesterov ? d + momentum * buf : buf)
  void (*sgd)(size_t n, T* p, const T* g, T* buf, const SgdCoefficients& k);

  // Returns the sum of the squares of `x` (n). The squares are added in double, in a fixed order.
  double (*sum_of_squares)(size_t n, const T* x);

  // Dropout: element i of `out` is x[i] * factor, or 0 if the element is dropped. Element i is dropped if the
  // 32 random bits that Philox4x32-10 gives for `seed` and first + i are below `threshold`.
  void (*dropout)(size_t n, uint64_t seed, uint64_t first, uint32_t threshold, T factor, const T* x, T* out);

  // Adds the product of a dense `a` (m, depth) and w (depth, n) to `c` (m, n). The order of the additions is
  // the same as in gemm_outputs_in_lanes. `panels` holds w in dense panels of kPanelColumns columns. The last
  // panel has only the remaining columns, without padding. If `streams` is set, the kernel prefetches `c`.
  // The caller sets `streams` unless `c` is already in the cache.
  void (*merge)(size_t m, size_t n, size_t depth, const T* a, const T* panels, T* c, size_t c_stride,
                bool streams);
};

// Conversions between float and 16-bit formats. Numbers that are converted from float are rounded to nearest,
// with ties to even. NaN stays NaN, subnormal numbers are not replaced by zero, and numbers that are too
// large become Inf.
struct Conversions {
  void (*widen_bfloat16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_bfloat16)(size_t n, const float* from, uint16_t* to);
  void (*widen_float16)(size_t n, const uint16_t* from, float* to);
  void (*narrow_float16)(size_t n, const float* from, uint16_t* to);

  // Rounds stochastically: each x[i] is rounded up or down to a number of the 16-bit format. The
  // probabilities are such that the expected value of the result is x[i]. There is one exception: if the
  // format is float16 and |x[i]| is below 2^-14, the expected value differs from x[i] by at most 2^-48.
  // Element i uses the same random bits as element i of `dropout`. If x[i] is NaN or |x[i]| is at least the
  // largest finite number of the format, x[i] does not change.
  void (*dither_bfloat16)(size_t n, uint64_t seed, uint64_t first, float* x);
  void (*dither_float16)(size_t n, uint64_t seed, uint64_t first, float* x);

  // Pairs rows 2i and 2i + 1 of `x` (rows, cols), element by element, and stores the pairs in row i of `out`
  // (ceil(rows / 2), cols). If the number of rows is odd, the last row is paired with zeros. Before pairing,
  // pair_rows converts floats to bfloat16; for pair_bits, `x` already holds the bits of bfloat16 values.
  void (*pair_rows)(size_t rows, size_t cols, const float* x, size_t x_stride, Bf16Pair* out);
  void (*pair_bits)(size_t rows, size_t cols, const uint16_t* x, size_t x_stride, Bf16Pair* out);
};

// A weight in NF4: the 4-bit codes of the flattened tensor, and a scale for each block of 64 elements.
// If `absmax` is not null, the scale of a block is absmax[block]. If `absmax` is null, the scales are
// themselves quantised: the scale of a block is absmax_book[absmax_codes[block]] * absmax_scales[block /
// kNf4Group] + absmax_offset, where the product and the sum are both rounded.
struct Nf4 {
  const uint8_t* codes;
  const float* absmax;
  const uint8_t* absmax_codes = nullptr;
  const float *absmax_book = nullptr, *absmax_scales = nullptr;
  float absmax_offset = 0;
};

// The memory for rows of decoded floats. A row may cover two panels, which are stored one after the other. If
// `apart` is 0 or col < kPanelColumns, element (row, col) is data[row * stride + col]. Otherwise, the element
// is in the second panel, at data[row * stride + col + apart].
struct DecodedRows {
  float* data;
  size_t stride, apart = 0;
};

// Conversions of low-bit blocks (kernels/formats) to float. All instruction sets give the same bits. Some
// kernels use fused multiply-adds, but each value is the same as without them; blocks-inl.h says why.
struct BlockDecoders {
  // Decodes the columns [first, first + cols) of `rows` rows that are stored in blocks, and stores the floats
  // in `to` (rows, cols). The rows of blocks begin `row_bytes` bytes apart. `first` and `cols` are multiples
  // of kSubBlock. There is one kernel for each row format, in the order of BlockFormat.
  void (*decode[kRowFormats])(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                              const DecodedRows& to);

  // Decodes like `decode`, then converts the values to `codes` (rows, cols) with the same bits as
  // Int8Gemm::encode. A code is round(value * inverses[row]) + offset, where ties are rounded to even.
  void (*encode[kRowFormats])(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                              const float* inverses, uint8_t offset, uint8_t* codes, size_t codes_stride);

  // Decodes NF4 into `to` (rows, cols). Element (i, j) of `to` is set to element first + i * row_step + j of
  // the flattened tensor. Decoding is faster if `first` and `row_step` are even. If `to.apart` is not 0 (see
  // DecodedRows), `first` and `row_step` must be multiples of 16.
  void (*decode_nf4)(size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const DecodedRows& to);
};

// Products of small batches with a weight in low-bit blocks. The blocks are decoded in registers. A product
// reads the weight once, in storage order.
struct BlockDots {
  // Multiplies x (m, cols) with a weight W (rows, cols), whose rows are stored in blocks. The result is part
  // (m, rows, kLanes), where kLanes is Tiles<float>::lanes / 2. part[t][r][i] is a partial sum: the sum of
  // x[t][k] * W[r][k] over all columns k with k % kLanes == i. `cols` is a multiple of the number of elements
  // in a block. There is one kernel for each row format, in the order of BlockFormat. The bits of the sums
  // for a row of `x` do not depend on `m`. A kernel may multiply the codes of a sub-block by `x` and sum the
  // products before it multiplies the sum by the scale. If `x` has elements above 1e34, this sum can
  // overflow.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const float* x, size_t x_stride, float* part, const Fetch& next);

  // Does the same as `dots` for NF4. Row i of the weight begins with element first + i * row_step of the
  // flattened tensor. `first`, `row_step` and `cols` are multiples of 64.
  void (*dots_nf4)(size_t m, size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const float* x,
                   size_t x_stride, float* part, const Fetch& next);
};

// Rows of `x` in int8. Element i of a row is approximately codes[i] * scale, with one scale for each
// sub-block. `sums` holds the sum of the 32 products codes[i] * scale of each sub-block. `half_sums` holds
// the sum of the 16 products of each half of a sub-block. The shapes are codes (m, cols), scales (m, cols /
// kSubBlock), sums (m, cols / kSubBlock) and half_sums (m, 2 * cols / kSubBlock).
struct Int8Rows {
  const int8_t* codes;
  const float *scales, *sums, *half_sums;
};

// Products of small batches with a weight in low-bit blocks, in integer arithmetic.
struct Int8Products {
  // Quantises a row of `n` elements, where `n` is a multiple of kSubBlock. The scale of a sub-block is the
  // largest magnitude in the sub-block divided by 127. A code is x * (1 / scale), rounded to nearest. If all
  // magnitudes in a sub-block are below 2^-119, the scale, the sums and the codes are 0. If a sub-block
  // contains NaN or infinity, the scale and the sums are NaN, and the codes are 0.
  void (*quantize_sub_blocks)(size_t n, const float* x, int8_t* codes, float* scales, float* sums,
                              float* half_sums);

  // Stores the products of x (m, cols) with the rows of a weight W (rows, cols) in `y` (m, rows). The rows of
  // W are stored in blocks. `cols` is a multiple of the number of elements in a block. There is one kernel
  // for each row format, in the order of BlockFormat. The bits of a row of `y` do not depend on `m`.
  void (*dots[kRowFormats])(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes,
                            const Int8Rows& x, float* y, const Fetch& next);
};

// Rows in int8 for the products of large batches. Each row is divided into groups of `group` values along the
// depth. The last group may be shorter. Each group has one scale: element i of a row is about codes[i] *
// scales[i / group]. The codes of W are stored with an offset (see Int8Gemm). For each group, `corrections`
// holds -offset * (sum of the codes of the group), which cancels the offset in a sum of products. The rows of
// `codes` begin `stride` bytes apart. Each row is padded with zeros to a multiple of four codes. The rows of
// `scales` and `corrections` begin `groups` elements apart.
struct CodedRows {
  const int8_t* codes;
  size_t stride;
  const float* scales;
  const int32_t* corrections;
  size_t group, groups;
};

// The number of neighbouring values in a row of x that share one scale. In activations, a few columns have
// much larger values than the other columns. If a whole row had one scale, these large values would make the
// scale so large that most codes in the row would be near 0.
inline constexpr size_t kInt8Group = 64;

// The number of columns of a panel of W in forward products. Backward products use kPanelColumns instead.
inline constexpr size_t kInt8PanelColumns = 32;

// The largest depth of one int8 product. With this depth, a sum of products of codes fits into 32 bits: a
// product of two codes is at most 255 * 127, and 4096 * 255 * 127 < 2^27. A correction (see CodedRows) is
// smaller: at most 4096 * 128 * 127 < 2^26. A longer depth is cut into several products, which are added in
// float, so the integer sums never overflow. 4032 is the largest multiple of both kPanelColumns and
// kInt8Group that is at most 4096.
inline constexpr size_t kInt8Depth = 4032;
static_assert(kInt8Depth % kPanelColumns == 0 && kInt8Depth % kInt8Group == 0 && kInt8Depth <= 4096);
static_assert(int64_t{255 + 128} * 127 * 4096 < int64_t{1} << 31);

// Returns the scale of values whose largest magnitude is `largest`, and its inverse 1 / scale, which turns
// these values into codes: a code is value * inverse, rounded. The scale and the inverse are 0 if the
// magnitudes are so small that 1 / scale could be infinite. If a value is NaN or infinite, the scale is NaN
// and the inverse is 0.
struct CodeScale {
  float scale, inverse;
};
static inline CodeScale code_scale(float largest) {
  constexpr float kLargestCode = 127, kLeast = 0x1p-119f, kLargestFloat = 0x1.fffffep127f;
  if (!(largest <= kLargestFloat)) return {__builtin_nanf(""), 0};
  if (largest < kLeast) return {0, 0};
  const float scale = largest / kLargestCode;
  return {scale, 1 / scale};
}

// The number of elements for which Int8Gemm::dither_groups computes random bits at a time.
inline constexpr size_t kDithered = 64;

// The products of large batches in int8. W has one scale for each row. The codes of W and of `x` are from
// -127 to 127. In memory, each code of W is stored as code + offset. The offset depends on the instruction
// set.
struct Int8Gemm {
  size_t code_offset;  // the offset of the codes of W, at most 128

  // Quantises a row of `n` elements in groups of `group` elements. Element i is x[i] * w_scales[i], or x[i]
  // if `w_scales` is null. The function code_scale gives the scale of each group. A code is the element times
  // (1 / scale), rounded to nearest, ties to even. The codes are 0 if the scale is 0 or NaN. The codes are
  // padded with zeros to a multiple of four.
  void (*quantize_groups)(size_t n, size_t group, const float* x, const float* w_scales, int8_t* codes,
                          float* scales, int32_t* corrections);

  // Quantises like quantize_groups, but rounds stochastically. The value v = element * (1 / scale) is rounded
  // up or down, and the expected value of the code differs from v by at most 2^-23. `first` and `group` must
  // be multiples of kDithered. The random bits of element i depend on `seed` and e = first + i. From each
  // counter, Philox makes four words. Element i uses the low 23 bits of word floor(e / 16) % 4 for the
  // counter floor(e / kDithered) * 16 + e % 16.
  void (*dither_groups)(size_t n, size_t group, uint64_t seed, uint64_t first, const float* x,
                        const float* w_scales, int8_t* codes, float* scales, int32_t* corrections);

  // For each row i of w (rows, cols), sets largest[i] to the maximum of largest[i] and the magnitudes of the
  // elements of row i. NaN counts as larger than all numbers.
  void (*largest)(size_t rows, size_t cols, const float* w, size_t w_stride, float* largest);

  // Converts floats w (rows, cols) to `codes` (rows, cols). A code is w * inverses[row], rounded to nearest,
  // ties to even, plus the offset. The product w * inverses[row] must lie strictly between -127.5 and 127.5,
  // or be NaN. encode_bf16 does the same with numbers in bfloat16.
  void (*encode)(size_t rows, size_t cols, const float* w, size_t w_stride, const float* inverses,
                 uint8_t* codes, size_t codes_stride);
  void (*encode_bf16)(size_t rows, size_t cols, const Bf16* w, size_t w_stride, const float* inverses,
                      uint8_t* codes, size_t codes_stride);

  // Packs `codes` (rows, cols) into out (ceil(rows / 4), cols): element (i, j) of `out` holds the codes of
  // rows 4i to 4i + 3 in column j. If `rows` is not a multiple of four, zeros replace the missing rows. The
  // rows of `out` are `out_stride` elements apart.
  void (*quad_rows)(size_t rows, size_t cols, const uint8_t* codes, size_t codes_stride, Int8Quad* out,
                    size_t out_stride);

  // Converts codes from the layout of forward products to the layout of backward products. Element (q, i)
  // of w (quads, rows) holds the codes of columns 4q to 4q + 3 in row i of W. Element (i, j) of out
  // (ceil(rows / 4), 4 * quads) holds the codes of rows 4i to 4i + 3 in column j. If `rows` is not a multiple
  // of four, each row of `w` is read up to the next multiple of four elements.
  void (*turn_quads)(size_t rows, size_t quads, const Int8Quad* w, size_t w_stride, Int8Quad* out,
                     size_t out_stride);

  // Computes c = a w diag(scales), or c += a w diag(scales) if `accumulate` is set. The shapes are c (m, n),
  // a (m, depth) and w (ceil(depth / 4), n). The rows of `w` are `columns` elements apart: `w` consists of
  // the first n columns of a panel, which has kInt8PanelColumns or kPanelColumns columns. The kernel may read
  // all columns of the panel. `depth` counts values and is at most kInt8Depth. The first column of `a` must
  // be the start of a group. If `scales` is null, all scales are 1. Within a group, products of codes are
  // summed in integers. The sums of the groups are multiplied by the scales of the groups and added in order,
  // in float. The total is multiplied by `scales` at the end. The magnitude of a total before this last step
  // is at most kInt8Depth * 127 times the largest magnitude in `a`. So a total does not overflow if all
  // magnitudes in `a` are below 2^109. With larger magnitudes, a result can be infinite or NaN even if
  // `scales` would make it finite.
  void (*multiply)(size_t m, size_t n, size_t depth, const CodedRows& a, const Int8Quad* w, size_t columns,
                   const float* scales, float* c, size_t c_stride, bool accumulate);

  Peak peak;
};

// The number of elements that the kernel Transformer::select tests at a time.
inline constexpr size_t kSelected = 64;

// The activation functions: silu(g) = g / (1 + exp(-g)), GELU in its tanh form, and the exact GELU, which is
// g Phi(g) with the normal distribution function Phi.
enum class Activation : uint8_t { kSilu, kGeluTanh, kGelu };
inline constexpr size_t kActivations = 3;

// The operations of a language model other than matrix products with weights. If the comment of a kernel says
// that an output may be the same array as an input, the kernel reads element i of the input before it writes
// element i of the output.
struct Transformer {
  // RMSNorm of `n` elements: y = x * weight / sqrt(mean x² + eps).
  void (*rms_norm)(size_t n, const float* x, const float* weight, float eps, float* y);

  // The backward pass of RMSNorm. If `accumulate` is set, the gradient is added to `dx`. `dx` may be the same
  // array as `dy`.
  //   dx = r * (dn - x * r² * mean(dn * x)) with dn = dy * weight and r = 1 / sqrt(mean x² + eps)
  void (*rms_norm_backward)(size_t n, const float* dy, const float* x, const float* weight, float eps,
                            float* dx, bool accumulate);

  // LayerNorm of `n` elements. If `bias` is null, nothing is added.
  //   y = (x - mean x) * r * weight + bias with r = 1 / sqrt(variance x + eps)
  void (*layer_norm)(size_t n, const float* x, const float* weight, const float* bias, float eps, float* y);

  // The backward pass of LayerNorm. If `accumulate` is set, the gradient is added to `dx`. `dx` may be the
  // same array as `dy`. The formula uses dn = dy * weight, xn = (x - mean x) * r, and r as in layer_norm.
  //   dx = r * (dn - mean(dn) - xn * mean(dn * xn))
  void (*layer_norm_backward)(size_t n, const float* dy, const float* x, const float* weight, float eps,
                              float* dx, bool accumulate);

  // Rotary position encoding of `x` (heads, head_dim). The elements of a head form pairs: a pair consists of
  // elements i and half + i, or of elements 2i and 2i + 1 if `interleaved` is set. Each pair (a, b) is
  // rotated: it becomes (a * cos - b * sin, b * cos + a * sin). Only the first 2 * half elements of a head
  // are read or written. `table` holds `half` cosines, then `half` sines, one of each for each pair. If
  // `inverse` is set, the sines are negated, so that the pairs are rotated back.
  void (*rotate)(size_t heads, size_t head_dim, size_t half, const float* table, bool interleaved,
                 bool inverse, float* x);

  // A gated unit: out = act(gate) * up, or out = act(gate) if `up` is null. There is one kernel for each
  // Activation.
  void (*gated[kActivations])(size_t n, const float* gate, const float* up, float* out);

  // The backward pass of a gated unit: dgate = dout * up * act'(gate) and dup = dout * act(gate). `dgate` and
  // `dup` may be the same arrays as two of the inputs. If `up` is null, `dup` must be null too, and dgate =
  // dout * act'(gate).
  void (*gated_backward[kActivations])(size_t n, const float* dout, const float* gate, const float* up,
                                       float* dgate, float* dup);

  // Returns the largest of `n` elements, or the lowest finite float if `n` is 0. If an element is NaN, the
  // result may or may not be NaN.
  float (*largest)(size_t n, const float* x);

  // Stores y = exp(x - shift) and returns the sum of `y`. The sum is computed as partial sums, one for each
  // SIMD lane, which are added at the end. `y` may be null, or the same array as `x`.
  float (*exp_sum)(size_t n, const float* x, float shift, float* y);

  // Computes y = factor * x, or y += factor * x if `accumulate` is set. `y` may be the same array as `x`.
  void (*scaled)(size_t n, float factor, const float* x, float* y, bool accumulate);

  // Returns the dot product of `a` and `b`. The sum is computed as partial sums, one for each SIMD lane,
  // which are added at the end.
  float (*dot)(size_t n, const float* a, const float* b);

  // Computes the dot products of one query q (heads, dim) with `rows` keys k (rows, heads / group * dim),
  // head by head. The results are stored in `scores` (heads, rows). The keys have fewer heads than the query
  // if `group` is above 1: head h of the query uses head j = floor(h / group) of the keys. Head j of the keys
  // is in the `dim` columns of `k` that begin at column j * dim.
  void (*key_dots)(size_t rows, size_t heads, size_t group, size_t dim, const float* q, const float* k,
                   size_t k_stride, float* scores, size_t s_stride);

  // For each head h, adds a weighted sum of the rows of v (rows, heads / group * dim) to row h of out (heads,
  // dim). The weight of row i of `v` is element (h, i) of weights (heads, rows). Head h uses only the `dim`
  // columns of `v` that begin at column j * dim, with j = floor(h / group).
  void (*add_values)(size_t rows, size_t heads, size_t group, size_t dim, const float* weights,
                     size_t w_stride, const float* v, size_t v_stride, float* out);

  // Selects the elements of `x` that are at least `least`. The indices of the selected elements are stored in
  // `ids`, in ascending order, and their values in `values`. Returns the number of selected elements. If this
  // number is above `limit`, the kernel returns `limit` + 1, and the contents of `ids` and `values` are
  // undefined. The caller must provide memory for `limit` + kSelected elements in `ids` and in `values`. `n`
  // is below 2^31. NaN is not selected.
  size_t (*select)(size_t n, const float* x, float least, size_t limit, int32_t* ids, float* values);

  // Adds `count` weighted rows to `out` (n), one after the other: out += weights[i] * (row ids[i] of `rows`),
  // for i = 0 to count - 1. The matrix `rows` is stored in panels, and its last panel may have fewer columns
  // than the other panels.
  void (*add_rows)(size_t count, size_t n, const uint8_t* ids, const float* weights,
                   const Panels<float>& rows, float* out);

  // Multiplies each column j of `x` (rows, n) by factor[j].
  void (*scale_columns)(size_t rows, size_t n, const float* factor, float* x, size_t x_stride);

  // Does one step of a softmax over each column of a matrix (Milakov & Gimelshein 2018). A step processes one
  // tile s (rows, n), which holds the next `rows` rows of the matrix. `largest`, `sum` and `factor` have one
  // element for each column. For each column, the step computes:
  //   new = max(largest, max s);  factor = exp(largest - new);  s = exp(s - new);
  //   sum = sum * factor + Σ s;  largest = new.
  // Before the first tile, the caller must set `sum` to 0, and `largest` to the lowest finite float. An
  // element -Inf then becomes 0, even in a column in which all elements are -Inf. The caller may use the
  // results s as weights, for example to sum the values in attention. After each step, such a caller must
  // multiply its weighted sums over the earlier tiles by `factor`.
  void (*softmax_step)(size_t rows, size_t n, float* s, size_t s_stride, float* largest, float* sum,
                       float* factor);

  // The backward pass of a softmax over each column of `s`: p = exp(min(s - lse, 0)) and ds = p * (dp -
  // delta). `lse` and `delta` have one element for each column. The kernel works in place: `s` (rows, n)
  // becomes p, and `dp` (rows, n) becomes ds.
  void (*softmax_backward)(size_t rows, size_t n, const float* lse, const float* delta, float* s, float* dp,
                           size_t stride);

  // Does the same as softmax_backward, but each column must hold the scores of all keys. This kernel computes
  // p = softmax(s) and delta = Σ p * dp itself.
  void (*whole_softmax_backward)(size_t rows, size_t n, float* s, float* dp, size_t stride);
};

// The kernels for 16-bit values and for bytes. Some processors have special instructions for these kernels.
struct NarrowKernels {
  Tiles<Bf16Pair> bf16;
  SmallProducts<Bf16Pair> small_pairs;
  Conversions convert;
  Int8Products int8;
  Int8Gemm int8_gemm;

  // If true, small_pairs.gemm_outputs_in_lanes combines the rows of `w` into pairs in registers. If false,
  // the kernel first writes a copy of the rows of `w`, combined into pairs, to memory.
  bool pairs_in_registers = true;
};

struct KernelTable : NarrowKernels {
  const char* isa;
  Products<float> f32;
  Products<double> f64;
  SmallProducts<float> small_f32;
  SmallProducts<double> small_f64;
  SmallProducts<Bf16> small_bf16;
  BlockDecoders blocks;
  BlockDots block_dots;
  Transformer transformer;

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

// Returns the table in use: the best table that this machine can run, or the table that the environment
// variable NPLORA_ISA names. The first call chooses the table. Before the function chooses the table for AMX,
// it asks Linux for the AMX registers. If Linux refuses, the function chooses the next best table. Throws
// std::invalid_argument, with the reason, if NPLORA_ISA names a table that is unknown, is not in this build,
// or cannot run on this machine (for example, because Linux refuses the AMX registers).
const KernelTable& table();

// Fills `out` with the tables of this build that this machine can run, but with at most `capacity` tables.
// Returns the number of tables in `out`. The tables are in ascending order, with the best table last. This
// function does not ask Linux for the AMX registers. Tests and show_config use this function.
size_t available_tables(const KernelTable** out, size_t capacity);

}  // namespace nplora::kernels
