// Products of many rows of `x` with W, both in int8. One implementation serves every instruction set. Each
// kernel is documented in kernel_table.h.
//
// Each kernel unit (isa_*.cpp) defines the sizes of its tiles.
//   `kTokenTileRows` x `kTokenTileVectors` is the tile if a row of `a` has one group. The tile has as many
//     integer accumulators, kTokenTileVectors vectors of `w` and 1 broadcast element.
//   `kGroupTileRows` x `kGroupTileVectors` is the tile if a row of `a` has several groups. The tile has as
//     many integer and as many float accumulators.

namespace nplora::kernels::NPLORA_ISA {

// ---- x and W to int8 ----

// Loads the elements of `from` from i on, with zeros after the last of the `n`. If `whole` is set, there are
// enough for all lanes.
[[gnu::always_inline]] inline Vec<float> load_upto(size_t n, const float* from, size_t i, bool whole) {
  return whole || n - i >= kIntLanes ? Vec<float>::load(from + i) : Vec<float>::load_partial(from + i, n - i);
}

// Returns the largest magnitude of `n` elements and `least`, where NaN is above all numbers. The bits of
// magnitudes, read as integers, have this order.
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

// Quantises one group. `load(i, whole)` returns the elements from i on, as load_upto does.
template <class Load>
inline void quantize_group(size_t n, const Load& load, int8_t* codes, float& scale, int32_t& correction) {
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
    const LaneInts numbers = to_ints(load(i, whole) * inverse);
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

inline void quantize_groups(size_t n, size_t group, const float* x, const float* factors, int8_t* codes,
                            float* scales, int32_t* corrections) {
  for (size_t first = 0; first < n; first += group, ++scales, ++corrections, codes += group) {
    const size_t count = smaller(group, n - first);
    const auto plain = [&](size_t i, bool whole)
                           __attribute__((always_inline)) { return load_upto(count, x + first, i, whole); };
    const auto folded = [&](size_t i, bool whole) __attribute__((always_inline)) {
      return plain(i, whole) * load_upto(count, factors + first, i, whole);
    };
    factors ? quantize_group(count, folded, codes, *scales, *corrections)
            : quantize_group(count, plain, codes, *scales, *corrections);
  }
}

inline void largest_of_rows(size_t rows, size_t cols, const float* w, size_t w_stride, float* largest) {
  for (size_t row = 0; row < rows; ++row, w += w_stride)
    largest[row] = largest_magnitude(
        cols, [&](size_t i, bool whole) { return load_upto(cols, w, i, whole); }, largest[row]);
}

inline void encode(size_t rows, size_t cols, const float* w, size_t w_stride, const float* inverses,
                   uint8_t* codes, size_t codes_stride) {
  for (size_t row = 0; row < rows; ++row, w += w_stride, codes += codes_stride) {
    const Vec<float> inverse = all_lanes(inverses[row]);
    for (size_t i = 0; i < cols; i += kIntLanes) {
      const LaneInts whole =
          to_ints(load_upto(cols, w, i, false) * inverse) + static_cast<int32_t>(kCodeOffset);
      const LaneCodes some = low_bytes(whole);
      if (cols - i >= kIntLanes)
        __builtin_memcpy(codes + i, &some, sizeof some);
      else
        __builtin_memcpy(codes + i, &some, cols - i);
    }
  }
}

// Interleaves sixteen columns of four rows: first as pairs of rows, then as pairs of pairs.
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

// ---- the product ----

// The operands of a product.
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

// Stores the sums of one vector of outputs, times the scales of W. If `kPartial` is set, the outputs may be
// fewer than a vector has.
template <bool kPartial>
[[gnu::always_inline]] inline void store_outputs(const Int8Product& p, Vec<float> sums, size_t row,
                                                 size_t column) {
  float* c = p.c + row * p.c_stride + column;
  const size_t count = !kPartial ? kIntLanes : smaller(kIntLanes, p.n - column);
  const auto load = [count](const float* from) __attribute__((always_inline)) {
    return kPartial ? load_upto(count, from, 0, false) : Vec<float>::load(from);
  };
  if (p.scales) sums = sums * load(p.scales + column);
  if (p.accumulate) sums = load(c) + sums;
  if (!kPartial || count == kIntLanes)
    sums.store(c);
  else
    sums.store_partial(c, count);
}

// Adds the products of `quads` steps of the depth to integer sums.
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

template <size_t kRows, size_t kVectors>
[[gnu::always_inline]] inline void begin_sums(const int32_t* corrections, size_t groups,
                                              LaneInts (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[i][v] = broadcast_int(corrections[i * groups]);
}

// Computes one tile for rows of `a` that have one group. `column` is the first column of the tile.
template <size_t kRows, size_t kVectors, bool kPartial>
inline void int8_token_tile(const Int8Product& p, size_t column) {
  LaneInts sums[kRows][kVectors];
  begin_sums(p.a.corrections, p.a.groups, sums);
  int8_steps(ceil_div(p.depth, 4), p.a.codes, p.a.stride, p.w + column, p.columns, sums);
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
    int8_steps(quads, codes, p.a.stride, w, p.columns, sums);
#pragma GCC unroll 16
    for (size_t i = 0; i < kRows; ++i) {
      const Vec<float> scale = all_lanes(scales[i * groups]);
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

// Calls the template instance for a tile of `rows` rows, where rows <= kRows.
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

// Computes all `m` rows, for kVectors vectors of columns.
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

// Columns that are not kVectors whole vectors are computed one vector at a time, in tiles of fewer rows.
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

constexpr Int8Gemm make_int8_gemm() {
  return {quantize_groups, largest_of_rows, encode, quad_rows, int8_multiply};
}

}  // namespace nplora::kernels::NPLORA_ISA
