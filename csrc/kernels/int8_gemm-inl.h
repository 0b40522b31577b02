// Products of many rows of `x` with W, where both `x` and W are in int8. One implementation serves every
// instruction set. Each kernel is documented in kernel_table.h.
//
// Each kernel unit (isa_*.cpp) defines the sizes of its tiles. The operand `a` holds the codes of `x`. A row
// of `a` consists of groups, and all values of a group have the same scale (see CodedRows).
//   If a row of `a` has a single group, a tile has kTokenTileRows rows of `a` and kTokenTileVectors vectors
//     of `w`. Such a tile needs registers for kTokenTileRows * kTokenTileVectors integer accumulators,
//     kTokenTileVectors vectors of `w` and 1 broadcast element of `a`.
//   If a row of `a` has several groups, a tile has kGroupTileRows rows of `a` and kGroupTileVectors vectors
//     of `w`. Such a tile needs registers for kGroupTileRows * kGroupTileVectors integer accumulators and the
//     same number of float accumulators.

#include "kernels/philox-inl.h"

namespace nplora::kernels::NPLORA_ISA {

// ---- conversion of x and W to int8 ----

// Loads one vector from the array `from`, starting at element i, and widens it to float. The array has `n`
// elements. Lanes after the last element are set to zero. The caller may set `whole` if the vector ends
// within the array. The function then skips the test for the end of the array.
template <class E>
[[gnu::always_inline]] inline Vec<float> load_upto(size_t n, const E* from, size_t i, bool whole) {
  return whole || n - i >= kIntLanes ? Vec<float>::load(from + i) : Vec<float>::load_partial(from + i, n - i);
}

// Returns the largest of `least` and the magnitudes of `n` elements. load(i, whole) loads one vector of
// elements, starting at element i (see load_upto). NaN counts as larger than all numbers. The function
// compares the bits of the magnitudes as integers, because a larger magnitude has larger bits.
template <class Load>
inline float largest_magnitude(size_t n, const Load& load, float least) {
  LaneInts most = broadcast_int(__builtin_bit_cast(int32_t, least)), other = most;
  const auto raise = [&load](LaneInts& largest, size_t i, bool whole) __attribute__((always_inline)) {
    const LaneInts bits = (LaneInts)load(i, whole).v & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  };
  size_t i = 0;
  for (; i + 2 * kIntLanes <= n; i += 2 * kIntLanes) {
    raise(most, i, true);
    raise(other, i + kIntLanes, true);
  }
  for (; i < n; i += kIntLanes) raise(most, i, false);
  most = other > most ? other : most;
  return __builtin_bit_cast(float, largest_lane(most));
}

// Rounds to the nearest integers, ties to even.
struct Nearest {
  LaneInts operator()(size_t, Vec<float> x) const { return to_ints(x); }
};

// Rounds elements stochastically. The random bits of element i depend on first + i (see
// Int8Gemm::dither_groups). The random bits are computed for kDithered elements at a time, so the calls must
// have ascending i, beginning with 0.
struct Stochastic {
  static constexpr int kFraction = 23;  // 127 * 2^23 plus 23 random bits fits into int32
  uint64_t seed, first;
  mutable uint32_t words[4][kPhiloxBlocks];

  Stochastic(uint64_t seed, uint64_t first) : seed(seed), first(first) {}
  LaneInts operator()(size_t i, Vec<float> x) const {
    static_assert(sizeof words == kDithered * sizeof(uint32_t) && kDithered % kIntLanes == 0);
    if (i % kDithered == 0) philox(seed, (first + i) / 4, words);
    LaneInts random;
    __builtin_memcpy(&random, &words[0][0] + i % kDithered, sizeof random);
    constexpr int32_t kMost = 127 << kFraction;
    LaneInts fixed = __builtin_convertvector((x * all_lanes(0x1p23f)).v, LaneInts);
    fixed = fixed > kMost ? broadcast_int(kMost) : fixed;
    fixed = fixed < -kMost ? broadcast_int(-kMost) : fixed;
    return (fixed + (random & ((1 << kFraction) - 1))) >> kFraction;
  }
};

// Quantises one group of `n` elements. `codes` is padded with zeros to a multiple of four codes. `correction`
// is explained at CodedRows. `load(i, whole)` loads one vector of elements, starting at element i (see
// load_upto). `round(i, v)` rounds the vector `v`, which holds the elements from element i on, multiplied by
// the inverse of the scale.
template <class Load, class Round>
inline void quantize_group(size_t n, const Load& load, const Round& round, int8_t* codes, float& scale,
                           int32_t& correction) {
  const size_t padded = ceil_div(n, 4) * 4;
  const CodeScale found = code_scale(largest_magnitude(n, load, 0));
  scale = found.scale;
  correction = 0;
  if (found.inverse == 0) {
    __builtin_memset(codes, 0, padded);
    return;
  }
  const Vec<float> inverse = all_lanes(found.inverse);
  LaneInts total{};
  const auto code = [&](size_t i, bool whole) __attribute__((always_inline)) {
    const LaneInts numbers = round(i, load(i, whole) * inverse);
    total += numbers;
    return low_bytes(numbers);
  };
  size_t i = 0;
  for (; i + kIntLanes <= n; i += kIntLanes) {
    const LaneCodes some = code(i, true);
    __builtin_memcpy(codes + i, &some, sizeof some);
  }
  if (i < n) {
    const LaneCodes some = code(i, false);
    __builtin_memcpy(codes + i, &some, padded - i);
  }
  correction = -static_cast<int32_t>(kCodeOffset) * sum_of_lanes(total);
}

template <class RoundFrom>
inline void quantize_all_groups(size_t n, size_t group, const float* x, const float* w_scales,
                                const RoundFrom& round_from, int8_t* codes, float* scales,
                                int32_t* corrections) {
  for (size_t first = 0; first < n; first += group, ++scales, ++corrections, codes += group) {
    const size_t count = smaller(group, n - first);
    const auto plain = [&](size_t i, bool whole)
                           __attribute__((always_inline)) { return load_upto(count, x + first, i, whole); };
    const auto folded = [&](size_t i, bool whole) __attribute__((always_inline)) {
      return plain(i, whole) * load_upto(count, w_scales + first, i, whole);
    };
    const auto round = round_from(first);
    w_scales ? quantize_group(count, folded, round, codes, *scales, *corrections)
             : quantize_group(count, plain, round, codes, *scales, *corrections);
  }
}

inline void quantize_groups(size_t n, size_t group, const float* x, const float* w_scales, int8_t* codes,
                            float* scales, int32_t* corrections) {
  quantize_all_groups(n, group, x, w_scales, [](size_t) { return Nearest{}; }, codes, scales, corrections);
}

inline void dither_groups(size_t n, size_t group, uint64_t seed, uint64_t first, const float* x,
                          const float* w_scales, int8_t* codes, float* scales, int32_t* corrections) {
  quantize_all_groups(
      n, group, x, w_scales, [&](size_t i) { return Stochastic(seed, first + i); }, codes, scales,
      corrections);
}

inline void largest_of_rows(size_t rows, size_t cols, const float* w, size_t w_stride, float* largest) {
  for (size_t row = 0; row < rows; ++row, w += w_stride)
    largest[row] = largest_magnitude(
        cols, [&](size_t i, bool whole) { return load_upto(cols, w, i, whole); }, largest[row]);
}

template <class E>
inline void encode(size_t rows, size_t cols, const E* w, size_t w_stride, const float* inverses,
                   uint8_t* codes, size_t codes_stride) {
  for (size_t row = 0; row < rows; ++row, w += w_stride, codes += codes_stride) {
    const Vec<float> inverse = all_lanes(inverses[row]);
    const auto code = [&](size_t i, bool whole) __attribute__((always_inline)) {
      const LaneInts numbers = to_ints(load_upto(cols, w, i, whole) * inverse);
      return low_bytes(numbers + static_cast<int32_t>(kCodeOffset));
    };
    size_t i = 0;
    for (; i + kIntLanes <= cols; i += kIntLanes) {
      const LaneCodes some = code(i, true);
      __builtin_memcpy(codes + i, &some, sizeof some);
    }
    if (i < cols) {
      const LaneCodes some = code(i, false);
      __builtin_memcpy(codes + i, &some, cols - i);
    }
  }
}

// Interleaves four rows of sixteen bytes, so that the four bytes of each column are neighbours. The function
// first interleaves the bytes of `a` and `b`, and the bytes of `c` and `d`. It then interleaves the resulting
// pairs of bytes.
inline void quad_sixteen(Bytes a, Bytes b, Bytes c, Bytes d, void* out) {
  const BytePair first = interleave(a, b), second = interleave(c, d);
  const BytePair low = interleave_words(first.low, second.low),
                 high = interleave_words(first.high, second.high);
  auto* to = static_cast<uint8_t*>(out);
  __builtin_memcpy(to, &low.low, kBytes);
  __builtin_memcpy(to + kBytes, &low.high, kBytes);
  __builtin_memcpy(to + 2 * kBytes, &high.low, kBytes);
  __builtin_memcpy(to + 3 * kBytes, &high.high, kBytes);
}

inline void quad_rows(size_t rows, size_t cols, const uint8_t* codes, size_t codes_stride, Int8Quad* out,
                      size_t out_stride) {
  for (size_t row = 0; row < rows; row += 4, codes += 4 * codes_stride, out += out_stride) {
    const auto at = [&](size_t i, size_t col) { return codes + i * codes_stride + col; };
    size_t col = 0;
    if (row + 4 <= rows)
      for (; col + kBytes <= cols; col += kBytes)
        quad_sixteen(load_bytes(at(0, col)), load_bytes(at(1, col)), load_bytes(at(2, col)),
                     load_bytes(at(3, col)), out + col);
    for (; col < cols; col += kBytes) {
      const size_t width = smaller(kBytes, cols - col);
      Bytes some[4] = {}, quads[4];
      for (size_t i = 0; i < 4 && row + i < rows; ++i) __builtin_memcpy(&some[i], at(i, col), width);
      quad_sixteen(some[0], some[1], some[2], some[3], quads);
      __builtin_memcpy(out + col, quads, 4 * width);
    }
  }
}

inline void turn_quads(size_t rows, size_t quads, const Int8Quad* w, size_t w_stride, Int8Quad* out,
                       size_t out_stride) {
  // A lookup with these indices transposes a matrix of four by four bytes.
  const Bytes turned = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  for (size_t q = 0; q < quads; ++q, w += w_stride, out += 4) {
    Int8Quad* to = out;
    for (size_t row = 0; row < rows; row += 4, to += out_stride) {
      const Bytes some = lookup(load_bytes(w + row), turned);
      __builtin_memcpy(to, &some, sizeof some);
    }
  }
}

// ---- the product ----

// The operands of a product (see Int8Gemm::multiply).
struct Int8Product {
  size_t n, depth;
  CodedRows a;
  const Int8Quad* w;
  size_t columns;
  const float* scales;
  float* c;
  size_t c_stride;
  bool accumulate;
};

// Multiplies one vector of sums by the scales of W, and stores the products in `c` or adds them to `c`. The
// vector begins at element (row, column) of `c`. If `kPartial` is set, the vector may extend beyond the last
// column of `c`; the additional lanes are not stored.
template <bool kPartial>
[[gnu::always_inline]] inline void store_outputs(const Int8Product& p, Vec<float> sums, size_t row,
                                                 size_t column) {
  float* c = p.c + row * p.c_stride + column;
  const size_t count = !kPartial ? kIntLanes : smaller(kIntLanes, p.n - column);
  const auto load = [&](const float* from) __attribute__((always_inline)) {
    return kPartial ? load_upto(count, from, 0, false) : Vec<float>::load(from);
  };
  if (p.scales) sums = sums * load(p.scales + column);
  if (p.accumulate) sums = load(c) + sums;
  if (!kPartial || count == kIntLanes)
    sums.store(c);
  else
    sums.store_partial(c, count);
}

// Multiplies kRows rows of `a` by kVectors vectors of `w`, and adds the integer products to `sums`. There are
// `quads` steps. Each step covers four codes that are neighbours along the depth.
template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void int8_steps(size_t quads, const int8_t* a, size_t a_stride,
                                              const Int8Quad* w, size_t columns,
                                              LaneInts (&sums)[kRows][kVectors]) {
  constexpr size_t kNear = kRows < 4 ? kRows : 4;
  const int8_t* far = a + kNear * a_stride;
  const int8_t* farther = far + kNear * a_stride;
  keep(far);
  keep(farther);
  for (; quads > 0; --quads, w += columns) {
    LaneInts b[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) b[v] = load_quads(w + v * kIntLanes);
#pragma GCC unroll 16
    for (size_t i = 0; i < kRows; ++i) {
      const int8_t* at = i < kNear       ? a + i * a_stride
                         : i < 2 * kNear ? far + (i - kNear) * a_stride
                                         : farther + (i - 2 * kNear) * a_stride;
      const LaneInts x = broadcast_int(bits_at<int32_t>(at));
      dot_vectors(sums[i], b, x);
    }
    a += 4;
    far += 4;
    farther += 4;
  }
}

#if defined(NPLORA_SIMD_I8MM)

// The number of operations (multiplications and additions) of one smmla instruction in int8_peak.
inline constexpr double kPeakOperations = 16 * kIntLanes;
[[gnu::always_inline]] inline void peak_step(LaneInts (&sums)[3], const LaneInts (&w)[3], LaneInts x) {
#pragma GCC unroll 3
  for (size_t v = 0; v < 3; ++v)
    sums[v] = (LaneInts)vmmlaq_s32((int32x4_t)sums[v], (int8x16_t)x, (int8x16_t)w[v]);
}

// Exchanges the high half of `first` and the low half of `second`. Before the exchange, each vector holds the
// sums of one row in four columns. After the exchange, each vector holds the sums of two rows in two columns,
// as the instruction smmla requires. A second exchange restores the original vectors.
[[gnu::always_inline]] inline void exchange_halves(LaneInts& first, LaneInts& second) {
  const auto a = (int64x2_t)first, b = (int64x2_t)second;
  first = (LaneInts)vzip1q_s64(a, b);
  second = (LaneInts)vzip2q_s64(a, b);
}

// Does the same as int8_steps, but two steps at a time. An smmla instruction multiplies two rows of `a` by
// two columns of `w`, with eight codes of each row and of each column. If the number of steps or rows is odd,
// int8_steps computes the last step or row.
template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void int8_double_steps(size_t quads, const int8_t* a, size_t a_stride,
                                                     const Int8Quad* w, size_t columns,
                                                     LaneInts (&sums)[kRows][kVectors]) {
  if constexpr (kRows == 1) return int8_steps(quads, a, a_stride, w, columns, sums);
  constexpr size_t kPaired = kRows / 2 * 2;
#pragma GCC unroll 8
  for (size_t i = 0; i < kPaired; i += 2)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) exchange_halves(sums[i][v], sums[i + 1][v]);
  const int8_t* at = a;
  const Int8Quad* quad = w;
  for (size_t left = quads / 2; left > 0; --left, at += 8, quad += 2 * columns) {
    int8x16_t x[ceil_div(kRows, size_t{2})];
#pragma GCC unroll 8
    for (size_t i = 0; i < kPaired; i += 2)
      x[i / 2] = vcombine_s8(vld1_s8(at + i * a_stride), vld1_s8(at + (i + 1) * a_stride));
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      const auto near = (int32x4_t)load_quads(quad + v * kIntLanes),
                 far = (int32x4_t)load_quads(quad + columns + v * kIntLanes);
      const auto low = (int8x16_t)vzip1q_s32(near, far), high = (int8x16_t)vzip2q_s32(near, far);
#pragma GCC unroll 8
      for (size_t i = 0; i < kPaired; i += 2) {
        sums[i][v] = (LaneInts)vmmlaq_s32((int32x4_t)sums[i][v], x[i / 2], low);
        sums[i + 1][v] = (LaneInts)vmmlaq_s32((int32x4_t)sums[i + 1][v], x[i / 2], high);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kPaired; i += 2)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) exchange_halves(sums[i][v], sums[i + 1][v]);
  if constexpr (kRows % 2 != 0) {
    LaneInts last[1][kVectors];
    for (size_t v = 0; v < kVectors; ++v) last[0][v] = sums[kRows - 1][v];
    int8_steps(quads / 2 * 2, a + (kRows - 1) * a_stride, a_stride, w, columns, last);
    for (size_t v = 0; v < kVectors; ++v) sums[kRows - 1][v] = last[0][v];
  }
  if (quads % 2 != 0) int8_steps(1, at, a_stride, quad, columns, sums);
}

#else

inline constexpr double kPeakOperations = 8 * kIntLanes;
[[gnu::always_inline]] inline void peak_step(LaneInts (&sums)[3], const LaneInts (&w)[3], LaneInts x) {
  dot_vectors(sums, w, x);
}

template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void int8_double_steps(size_t quads, const int8_t* a, size_t a_stride,
                                                     const Int8Quad* w, size_t columns,
                                                     LaneInts (&sums)[kRows][kVectors]) {
  int8_steps(quads, a, a_stride, w, columns, sums);
}

#endif

template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void begin_sums(const int32_t* corrections, size_t groups,
                                              LaneInts (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[i][v] = broadcast_int(corrections[i * groups]);
}

// Prefetches the outputs of a tile. Without the prefetch, the stores at the end of the tile would wait for
// memory, and the next tile would wait for the stores.
template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void fetch_outputs(const Int8Product& p, size_t column) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v)
      __builtin_prefetch(p.c + i * p.c_stride + column + v * kIntLanes, 1);
}

// Computes one tile for rows of `a` that have one group. `column` is the first column of the tile.
template <size_t kRows, size_t kVectors, bool kPartial>
inline void int8_token_tile(const Int8Product& p, size_t column) {
  fetch_outputs<kRows, kVectors>(p, column);
  LaneInts sums[kRows][kVectors];
  begin_sums(p.a.corrections, p.a.groups, sums);
  int8_double_steps(ceil_div(p.depth, 4), p.a.codes, p.a.stride, p.w + column, p.columns, sums);
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v)
      store_outputs<kPartial>(p, floats_of(sums[i][v]) * all_lanes(p.a.scales[i * p.a.groups]), i,
                              column + v * kIntLanes);
}

// Computes one tile for rows of `a` that have several groups.
template <size_t kRows, size_t kVectors, bool kPartial>
inline void int8_group_tile(const Int8Product& p, size_t column) {
  fetch_outputs<kRows, kVectors>(p, column);
  const size_t groups = p.a.groups;
  Vec<float> totals[kRows][kVectors];
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) totals[i][v] = Vec<float>::zero();
  const Int8Quad* w = p.w + column;
  const int8_t* codes = p.a.codes;
  const float* scales = p.a.scales;
  const int32_t* corrections = p.a.corrections;
  for (size_t left = p.depth; left > 0; ++scales, ++corrections) {
    const size_t count = smaller(left, p.a.group), quads = ceil_div(count, 4);
    LaneInts sums[kRows][kVectors];
    begin_sums(corrections, groups, sums);
    int8_double_steps(quads, codes, p.a.stride, w, p.columns, sums);
#pragma GCC unroll 16
    for (size_t i = 0; i < kRows; ++i) {
      const auto scale = Vec<float>::broadcast(scales[i * groups]);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) totals[i][v] = fma(floats_of(sums[i][v]), scale, totals[i][v]);
    }
    codes += count;
    w += quads * p.columns;
    left -= count;
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) store_outputs<kPartial>(p, totals[i][v], i, column + v * kIntLanes);
}

// Computes a tile of `rows` rows, where `rows` is at most kRows. The recursion finds the template instance
// for this number of rows.
template <bool kOneGroup, size_t kRows, size_t kVectors, bool kPartial>
inline void int8_tile_upto(size_t rows, const Int8Product& p, size_t column) {
  if (rows == kRows) {
    if constexpr (kOneGroup)
      return int8_token_tile<kRows, kVectors, kPartial>(p, column);
    else
      return int8_group_tile<kRows, kVectors, kPartial>(p, column);
  }
  if constexpr (kRows > 1) int8_tile_upto<kOneGroup, kRows - 1, kVectors, kPartial>(rows, p, column);
}

// Computes kVectors vectors of columns of the product, in all `m` rows. The first of these columns is
// `column`.
template <bool kOneGroup, size_t kRows, size_t kVectors, bool kPartial>
inline void int8_rows(size_t m, Int8Product p, size_t column) {
  for (size_t rows; m > 0; m -= rows) {
    rows = smaller(m, kRows);
    int8_tile_upto<kOneGroup, kRows, kVectors, kPartial>(rows, p, column);
    p.a.codes += rows * p.a.stride;
    p.a.scales += rows * p.a.groups;
    p.a.corrections += rows * p.a.groups;
    p.c += rows * p.c_stride;
  }
}

// Computes all columns, kVectors vectors at a time. If the last columns do not fill kVectors vectors, they
// are computed one vector at a time, in tiles of at most four rows.
template <bool kOneGroup, size_t kRows, size_t kVectors>
inline void int8_columns(size_t m, const Int8Product& p) {
  constexpr size_t kWidth = kVectors * kIntLanes, kFewRows = kRows < 4 ? kRows : 4;
  size_t column = 0;
  for (; column + kWidth <= p.n; column += kWidth) int8_rows<kOneGroup, kRows, kVectors, false>(m, p, column);
  for (; column < p.n; column += kIntLanes) int8_rows<kOneGroup, kFewRows, 1, true>(m, p, column);
}

inline void int8_multiply(size_t m, size_t n, size_t depth, const CodedRows& a, const Int8Quad* w,
                          size_t columns, const float* scales, float* c, size_t c_stride, bool accumulate) {
  const Int8Product p{n, depth, a, w, columns, scales, c, c_stride, accumulate};
  if (depth > 0 && depth <= a.group)
    int8_columns<true, kTokenTileRows, kTokenTileVectors>(m, p);
  else
    int8_columns<false, kGroupTileRows, kGroupTileVectors>(m, p);
}

// Measures the speed of int8 products. The twelve sums are independent, so no product waits for the result of
// another product. Each of the twelve products multiplies a different pair of operands, as in a matrix
// product. If two pairs were equal, the compiler could compute one product instead of two.
inline double int8_peak(size_t iterations) {
  constexpr size_t kRows = 4, kVectors = 3;
  LaneInts operands[kVectors + kRows];
  for (LaneInts& operand : operands) operand = broadcast_int(0x01010101);
  const LaneInts* at = operands;
  LaneInts sums[kRows][kVectors] = {};
  for (size_t k = 0; k < iterations; ++k) {
    keep(at);  // hides the operands from the compiler, so that every product is computed
    const LaneInts w[kVectors] = {load_quads(at), load_quads(at + 1), load_quads(at + 2)};
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) peak_step(sums[i], w, load_quads(at + kVectors + i));
  }
  LaneInts total{};
#pragma GCC unroll 4
  for (size_t i = 0; i < kRows; ++i) total += sums[i][0] + sums[i][1] + sums[i][2];
  int32_t sum = sum_of_lanes(total);
  __asm__ volatile("" : "+r"(sum));  // uses the sums, so that the compiler keeps the products
  return double(iterations) * double(kRows * kVectors) * kPeakOperations;
}

constexpr Int8Gemm make_int8_gemm() {
  return {kCodeOffset, quantize_groups, dither_groups, largest_of_rows, encode,
          encode,      quad_rows,       turn_quads,    int8_multiply,   int8_peak};
}

}  // namespace nplora::kernels::NPLORA_ISA
