// The products and the transposes around them: one body for every instruction set. See kernel_table.h for the contract.
//
// The unit gives its tile sizes:
//   kTileRows    rows of w in lane_tile: kTileRows * 2 accumulators, 2 vectors of x and 1 broadcast fit the register file;
//   kTileTokens  rows of a in outer_tile: kTileTokens * 3 accumulators, 3 vectors of w and 1 broadcast do the same;
//   kDotRows, kDotTokens  of dot_panel: their product in accumulators, one vector of x for each token, and one of w.
// Full tiles have at least the 8 independent accumulators that FMA latency x throughput (4 x 2) asks for.

namespace nplora::kernels::NPLORA_ISA {

inline constexpr size_t kOuterVectors = 3;

// The elements of a full panel along the depth.
template <class E>
inline constexpr size_t kPanelDepth = kPanelColumns / kSteps<E>;

// The vector that a pointer to elements loads.
template <class Pointer>
struct VecOf;
template <class E>
struct VecOf<const E*> {
  using Type = Vec<E>;
};
template <class Pointer>
using VecAt = typename VecOf<Pointer>::Type;

// ---- lane_tile: yt (rows, lanes) = [yt +] w (rows, depth) xt (depth, lanes) ----

// Stride is the row stride of w where it is known while compiling (a full panel), else 0.
template <class E, size_t kVectors, size_t kRows, size_t kStride>
inline void lane_tile_fixed(size_t depth, Panels<E> w, const E* xt, Sum<E>* yt, bool accumulate) {
  using T = Sum<E>;
  constexpr size_t kLanes = Vec<T>::kLanes, kWidth = kVectors * kLanes;
  const size_t stride = kStride ? kStride : w.row_stride;
  Vec<T> c[kRows][kVectors];
#pragma GCC unroll 16
  for (size_t j = 0; j < kRows; ++j)
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v)
      c[j][v] = accumulate ? Vec<T>::load(yt + j * kWidth + v * kLanes) : Vec<T>::zero();

  for (; depth > 0; w.data += w.panel_stride) {
    const size_t width = smaller(depth, kPanelDepth<E>);
    depth -= width;
    const E* wk = w.data;
    for (const E* end = xt + width * kWidth; xt != end; xt += kWidth, ++wk) {
      Vec<E> x[kVectors];
#pragma GCC unroll 2
      for (size_t v = 0; v < kVectors; ++v) x[v] = Vec<E>::load(xt + v * kLanes);
#pragma GCC unroll 16
      for (size_t j = 0; j < kRows; ++j) {
        const Vec<E> b = Vec<E>::broadcast(wk[j * stride]);
#pragma GCC unroll 2
        for (size_t v = 0; v < kVectors; ++v) c[j][v] = fma(x[v], b, c[j][v]);
      }
    }
  }

#pragma GCC unroll 16
  for (size_t j = 0; j < kRows; ++j)
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v) c[j][v].store(yt + j * kWidth + v * kLanes);
}

// Picks the instance for rows <= kRows.
template <class E, size_t kVectors, size_t kRows, size_t kStride>
inline void lane_tile_upto(size_t rows, size_t depth, Panels<E> w, const E* xt, Sum<E>* yt, bool accumulate) {
  if (rows == kRows) return lane_tile_fixed<E, kVectors, kRows, kStride>(depth, w, xt, yt, accumulate);
  if constexpr (kRows > 1)
    lane_tile_upto<E, kVectors, kRows - 1, kStride>(rows, depth, w, xt, yt, accumulate);
}

template <class E, size_t kVectors, size_t kStride>
inline void lane_tile_rows(size_t rows, size_t depth, Panels<E> w, const E* xt, Sum<E>* yt, bool accumulate) {
  while (rows > 0) {
    const size_t tile = smaller(rows, kTileRows);
    lane_tile_upto<E, kVectors, kTileRows, kStride>(tile, depth, w, xt, yt, accumulate);
    rows -= tile;
    w.data += tile * w.row_stride;
    yt += tile * kVectors * Vec<E>::kLanes;
  }
}

template <class E>
void lane_tile(size_t n_lanes, size_t rows, size_t depth, Panels<E> w, const E* xt, Sum<E>* yt,
               bool accumulate) {
  const bool full_panel = w.row_stride == kPanelDepth<E>;
  if (n_lanes == Vec<E>::kLanes)
    full_panel ? lane_tile_rows<E, 1, kPanelDepth<E>>(rows, depth, w, xt, yt, accumulate)
               : lane_tile_rows<E, 1, 0>(rows, depth, w, xt, yt, accumulate);
  else
    full_panel ? lane_tile_rows<E, 2, kPanelDepth<E>>(rows, depth, w, xt, yt, accumulate)
               : lane_tile_rows<E, 2, 0>(rows, depth, w, xt, yt, accumulate);
}

// ---- outer_tile: c (m, n) = [c +] a (m, depth) w (depth, n) ----

// n is kVectors full vectors, or, where kPartial, fewer by less than one vector.
template <class E, size_t kRows, size_t kVectors, bool kPartial>
inline void outer_tile_fixed(size_t n, size_t depth, Strided<E> a, const E* w, size_t w_stride, Sum<E>* c,
                             size_t c_stride, bool accumulate) {
  using T = Sum<E>;
  constexpr size_t kLanes = Vec<T>::kLanes;
  const size_t last = n - (kVectors - 1) * kLanes;
  const auto load = [&](const auto* p, size_t v) {
    using V = VecAt<decltype(p)>;
    return kPartial && v == kVectors - 1 ? V::load_partial(p + v * kLanes, last) : V::load(p + v * kLanes);
  };
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? load(c + i * c_stride, v) : Vec<T>::zero();

  for (size_t s = 0; s < depth; ++s, a.data += a.step_stride, w += w_stride) {
    Vec<E> b[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) b[v] = load(w, v);
#pragma GCC unroll 16
    for (size_t i = 0; i < kRows; ++i) {
      const Vec<E> x = Vec<E>::broadcast(a.data[i * a.row_stride]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) acc[i][v] = fma(x, b[v], acc[i][v]);
    }
  }

#pragma GCC unroll 16
  for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      T* p = c + i * c_stride + v * kLanes;
      if (kPartial && v == kVectors - 1)
        acc[i][v].store_partial(p, last);
      else
        acc[i][v].store(p);
    }
}

// Picks the instance for m <= kRows.
template <class E, size_t kRows, size_t kVectors, bool kPartial>
inline void outer_tile_upto(size_t m, size_t n, size_t depth, Strided<E> a, const E* w, size_t w_stride,
                            Sum<E>* c, size_t c_stride, bool accumulate) {
  if (m == kRows)
    return outer_tile_fixed<E, kRows, kVectors, kPartial>(n, depth, a, w, w_stride, c, c_stride, accumulate);
  if constexpr (kRows > 1)
    outer_tile_upto<E, kRows - 1, kVectors, kPartial>(m, n, depth, a, w, w_stride, c, c_stride, accumulate);
}

// Picks the instance for n <= kVectors full vectors.
template <class E, size_t kVectors>
inline void outer_tile_columns(size_t m, size_t n, size_t depth, Strided<E> a, const E* w, size_t w_stride,
                               Sum<E>* c, size_t c_stride, bool accumulate) {
  using T = Sum<E>;
  constexpr size_t kLanes = Vec<T>::kLanes;
  if (n == kVectors * kLanes)
    outer_tile_upto<E, kTileTokens, kVectors, false>(m, n, depth, a, w, w_stride, c, c_stride, accumulate);
  else if (n > (kVectors - 1) * kLanes)
    outer_tile_upto<E, kTileTokens, kVectors, true>(m, n, depth, a, w, w_stride, c, c_stride, accumulate);
  else if constexpr (kVectors > 1)
    outer_tile_columns<E, kVectors - 1>(m, n, depth, a, w, w_stride, c, c_stride, accumulate);
}

template <class E>
void outer_tile(size_t m, size_t n, size_t depth, Strided<E> a, const E* w, size_t w_stride, Sum<E>* c,
                size_t c_stride, bool accumulate) {
  constexpr size_t kGroup = kOuterVectors * Vec<E>::kLanes;
  for (size_t i = 0; i < m; i += kTileTokens) {
    const Strided<E> ai{a.data + i * a.row_stride, a.row_stride, a.step_stride};
    const size_t rows = smaller(m - i, kTileTokens);
    for (size_t j = 0; j < n; j += kGroup)
      outer_tile_columns<E, kOuterVectors>(rows, smaller(n - j, kGroup), depth, ai, w + j, w_stride,
                                           c + i * c_stride + j, c_stride, accumulate);
  }
}

// ---- dot_panel: part (m, rows, kLanes) = [part +] w (rows, width) * x (m, width), lane by lane ----

// A panel lies in memory in the order it is read here, but a tile of rows reads its lines out of step, which
// the hardware does not follow: W from memory came at 19 GB/s without, 36 with this distance in bytes (half a
// microsecond ahead).
inline constexpr size_t kDotPrefetch = 8192;

template <class T, size_t kRows, size_t kTokens>
inline void dot_tile(size_t width, const T* w, size_t w_stride, const T* x, size_t x_stride, T* part,
                     size_t part_stride, bool accumulate) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  Vec<T> acc[kTokens][kRows];
#pragma GCC unroll 4
  for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
    for (size_t j = 0; j < kRows; ++j)
      acc[t][j] = accumulate ? Vec<T>::load(part + t * part_stride + j * kLanes) : Vec<T>::zero();

  const auto add = [&](auto load) {
    Vec<T> xs[kTokens];
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) xs[t] = load(x + t * x_stride);
#pragma GCC unroll 8
    for (size_t j = 0; j < kRows; ++j) {
      const Vec<T> ws = load(w + j * w_stride);
      __builtin_prefetch(reinterpret_cast<const char*>(w + j * w_stride) + kDotPrefetch);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) acc[t][j] = fma(ws, xs[t], acc[t][j]);
    }
  };
  for (; width >= kLanes; width -= kLanes, x += kLanes, w += kLanes)
    add([](const T* p) { return Vec<T>::load(p); });
  if (width > 0) add([width](const T* p) { return Vec<T>::load_partial(p, width); });

#pragma GCC unroll 4
  for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
    for (size_t j = 0; j < kRows; ++j) acc[t][j].store(part + t * part_stride + j * kLanes);
}

// Picks the instance for tokens <= kTokens.
template <class T, size_t kRows, size_t kTokens>
inline void dot_tile_upto(size_t tokens, size_t width, const T* w, size_t w_stride, const T* x,
                          size_t x_stride, T* part, size_t part_stride, bool accumulate) {
  if (tokens == kTokens)
    return dot_tile<T, kRows, kTokens>(width, w, w_stride, x, x_stride, part, part_stride, accumulate);
  if constexpr (kTokens > 1)
    dot_tile_upto<T, kRows, kTokens - 1>(tokens, width, w, w_stride, x, x_stride, part, part_stride,
                                         accumulate);
}

template <class T>
void dot_panel(size_t m, size_t rows, size_t width, const T* w, size_t w_stride, const T* x, size_t x_stride,
               T* part, bool accumulate) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  const size_t part_stride = rows * kLanes;
  for (size_t j = 0; j < rows;) {
    const size_t tile = rows - j >= kDotRows ? kDotRows : 1;
    for (size_t t = 0; t < m; t += kDotTokens) {
      const size_t tokens = smaller(m - t, kDotTokens);
      const T *wj = w + j * w_stride, *xt = x + t * x_stride;
      T* to = part + t * part_stride + j * kLanes;
      if (tile == kDotRows)
        dot_tile_upto<T, kDotRows, kDotTokens>(tokens, width, wj, w_stride, xt, x_stride, to, part_stride,
                                               accumulate);
      else
        dot_tile_upto<T, 1, kDotTokens>(tokens, width, wj, w_stride, xt, x_stride, to, part_stride,
                                        accumulate);
    }
    j += tile;
  }
}

// Transposed, the vectors of kLanes outputs add up lane by lane, in a tree.
template <class T>
void sum_parts(size_t m, size_t rows, const T* part, const T* bias, T* y, size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for (size_t t = 0; t < m; ++t)
    for (size_t j = 0; j < rows; j += kLanes) {
      const size_t count = smaller(rows - j, kLanes);
      Vec<T> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        block[i] = i < count ? Vec<T>::load(part + ((t * rows) + j + i) * kLanes) : Vec<T>::zero();
      transpose(block);
#pragma GCC unroll 4
      for (size_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (size_t i = 0; i < half; ++i) block[i] = block[i] + block[i + half];
      const Vec<T> sum = bias ? block[0] + Vec<T>::load_partial(bias + j, count) : block[0];
      sum.store_partial(y + t * y_stride + j, count);
    }
}

// ---- transposes into and out of the lanes ----

// xt (cols, n_lanes) = x (rows, cols) transposed; lanes behind rows are zero.
template <class T>
void to_lanes(size_t n_lanes, size_t rows, size_t cols, const T* x, size_t x_stride, T* xt) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for (size_t c = 0; c < cols; c += kLanes) {
    const size_t width = smaller(cols - c, kLanes);
    for (size_t first = 0; first < n_lanes; first += kLanes) {
      Vec<T> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        const T* p = x + (first + i) * x_stride + c;
        block[i] = first + i >= rows ? Vec<T>::zero()
                   : width == kLanes ? Vec<T>::load(p)
                                     : Vec<T>::load_partial(p, width);
      }
      transpose(block);
      T* out = xt + c * n_lanes + first;
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        if (i < width) block[i].store(out + i * n_lanes);
    }
  }
}

// y (rows, cols) = yt (cols, n_lanes) transposed [+ bias (cols)].
template <class T>
void from_lanes(size_t n_lanes, size_t rows, size_t cols, const T* yt, const T* bias, T* y, size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for (size_t c = 0; c < cols; c += kLanes) {
    const size_t width = smaller(cols - c, kLanes);
    const Vec<T> offset = bias ? Vec<T>::load_partial(bias + c, width) : Vec<T>::zero();
    for (size_t first = 0; first < rows; first += kLanes) {
      Vec<T> block[kLanes];
      const T* in = yt + c * n_lanes + first;
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        block[i] = i < width ? Vec<T>::load(in + i * n_lanes) : Vec<T>::zero();
      transpose(block);
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        if (first + i >= rows) break;
        const Vec<T> sum = bias ? block[i] + offset : block[i];
        T* p = y + (first + i) * y_stride + c;
        if (width == kLanes)
          sum.store(p);
        else
          sum.store_partial(p, width);
      }
    }
  }
}

}  // namespace nplora::kernels::NPLORA_ISA
