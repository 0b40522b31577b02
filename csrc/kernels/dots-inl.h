// Matrix products for small batches. These products read the weight W once, in the order in which it is
// stored: panel by panel, or row by row if W is row-major. Each kernel is documented in kernel_table.h.
//
// Each kernel unit (isa_*.cpp) defines three constants.
//   `kDotResident` is the largest number of vectors of `x`, for one panel, that stay in registers while rows
//     of W are read.
//   `kDotRows` is the number of rows of W that share each load of `x` if `x` does not stay in registers.
//   `kDotSums` is the number of partial sums of a row: the latency of an FMA times its throughput (4 x 2),
//     divided by the number of rows that are summed at once.

namespace nplora::kernels::NPLORA_ISA {

// The number of groups of kInterleave elements in a row of a full panel.
template <class W, size_t kInterleave>
inline constexpr size_t kGroups = kPanelDepth<W> / kInterleave;

// Loads the first `n` elements of a group, sets its other elements to zero, and repeats the group until all
// lanes are full.
template <class E, class W, size_t kInterleave>
inline Vec<E> load_group_partial(const W* from, size_t n) {
  if constexpr (kInterleave == Vec<E>::kLanes) return Vec<E>::load_partial(from, n);
  W group[kInterleave] = {};
  for (size_t i = 0; i < n; ++i) group[i] = from[i];
  return Vec<E>::template load_group<kInterleave>(group);
}

// The number of partial sums of a row of W. If a panel has few groups, the products of a row are all added,
// in order, to a single sum.
template <class W, size_t kInterleave>
inline constexpr size_t kSideSums = kGroups<W, kInterleave> >= 2 * kDotSums ? kDotSums : 1;

// Whether dots_zipped multiplies full panels: it does if the interleave factor is two and the instruction set
// can interleave (zip) two vectors.
template <class W, size_t kInterleave>
inline constexpr bool kZipped =
#if defined(NPLORA_SIMD_AVX512)
    kInterleave == 2 && sizeof(Operand<W>) == 4;
#else
    false;
#endif

// The partial sums of kRows rows of W.
template <class W, size_t kInterleave, size_t kRows>
using RowSums = Vec<Sum<W>>[kRows][kSideSums<W, kInterleave>];

// Adds the product of row w[r] of a full panel with `x` to sums[r][0]. The order of the additions does not
// depend on how W is stored. `x_at(s)` returns the vector of `x` for group s.
template <class W, size_t kInterleave, size_t kRows, class XAt>
[[gnu::always_inline]] inline void add_panel(const W* const (&w)[kRows], const XAt& x_at,
                                             RowSums<W, kInterleave, kRows>& sums) {
  using T = Sum<W>;
  constexpr size_t kSums = kSideSums<W, kInterleave>;
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (size_t i = 1; i < kSums; ++i) sums[r][i] = Vec<T>::zero();
#pragma GCC unroll 48
  for (size_t s = 0; s < kGroups<W, kInterleave>; ++s) {
    const auto x = x_at(s);
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
      sums[r][s % kSums] = fma(Vec<Operand<W>>::template load_group<kInterleave>(w[r] + s * kInterleave), x,
                               sums[r][s % kSums]);
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (size_t half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (size_t i = 0; i < half; ++i) sums[r][i] = sums[r][i] + sums[r][i + half];
}

// Prefetches one row of a panel into L2.
template <class W>
inline void fetch_panel(const W* at) {
#pragma GCC unroll 8
  for (size_t line = 0; line < kPanelDepth<W> * sizeof(W); line += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + line, 0, 2);
}

template <class W>
struct Dots {
  size_t rows;
  const W* w;
  size_t row_stride;
  const Operand<W>* xs;
  Sum<W>* part;
  bool accumulate;
  const W* next;  // later rows of W, which are prefetched
};

// Multiplies a full panel, kRows rows of W at a time, until fewer than kRows rows are left.
template <class W, size_t kInterleave, size_t kRows>
inline void dots_rows(Dots<W>& p) {
  using T = Sum<W>;
  using X = Operand<W>;
  constexpr size_t kLanes = Vec<T>::kLanes, kPanelGroups = kGroups<W, kInterleave>;
  constexpr bool kResident = kPanelGroups <= kDotResident;
  Vec<X> x[kResident ? kPanelGroups : 1];
  if constexpr (kResident)
#pragma GCC unroll 48
    for (size_t s = 0; s < kPanelGroups; ++s) {
      x[s] = Vec<X>::load(p.xs + s * kLanes);
      keep(x[s]);
    }
  const auto x_at = [&](size_t s) __attribute__((always_inline)) {
    if constexpr (kResident)
      return x[s];
    else
      return Vec<X>::load(p.xs + s * kLanes);
  };
  for (; p.rows >= kRows; p.rows -= kRows, p.w += kRows * p.row_stride, p.part += kRows * kLanes) {
    const W* w[kRows];
    RowSums<W, kInterleave, kRows> sums;
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r, p.next += p.row_stride) {
      fetch_panel(p.next);
      w[r] = p.w + r * p.row_stride;
      keep(w[r]);  // without `keep`, GCC loads an offset for each element from the stack
      sums[r][0] = p.accumulate ? Vec<T>::load(p.part + r * kLanes) : Vec<T>::zero();
    }
    add_panel<W, kInterleave, kRows>(w, x_at, sums);
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) sums[r][0].store(p.part + r * kLanes);
  }
}

// Multiplies a full panel if the interleave factor is two and two vectors can be zipped. A vector of `x`
// holds two elements for each token. Zipping rearranges two neighbouring vectors so that each holds four
// elements for half of the tokens. One load of four elements of W then serves two products.
template <class W>
inline void dots_zipped(Dots<W>& p) {
  using T = Sum<W>;
  using X = Operand<W>;
  constexpr size_t kLanes = Vec<T>::kLanes, kPanelGroups = kGroups<W, 4>, kSums = kDotSums / 2;
  Vec<X> x[kPanelGroups][2];
#pragma GCC unroll 12
  for (size_t s = 0; s < kPanelGroups; ++s) {
    for (size_t i = 0; i < 2; ++i) x[s][i] = Vec<X>::load(p.xs + (2 * s + i) * kLanes);
    zip_pairs(x[s][0], x[s][1]);
    for (size_t i = 0; i < 2; ++i) keep(x[s][i]);
  }
  for (; p.rows > 0; --p.rows, p.w += p.row_stride, p.part += kLanes, p.next += p.row_stride) {
    fetch_panel(p.next);
    Vec<T> sums[kSums][2];
#pragma GCC unroll 4
    for (size_t j = 0; j < kSums; ++j) sums[j][0] = sums[j][1] = Vec<T>::zero();
#pragma GCC unroll 12
    for (size_t s = 0; s < kPanelGroups; ++s) {
      const auto w = Vec<X>::template load_group<4>(p.w + 4 * s);
      for (size_t i = 0; i < 2; ++i) sums[s % kSums][i] = fma(w, x[s][i], sums[s % kSums][i]);
    }
#pragma GCC unroll 4
    for (size_t j = 1; j < kSums; ++j)
      for (size_t i = 0; i < 2; ++i) sums[0][i] = sums[0][i] + sums[j][i];
    unzip_pairs(sums[0][0], sums[0][1]);
    const Vec<T> sum = sums[0][0] + sums[0][1];
    (p.accumulate ? Vec<T>::load(p.part) + sum : sum).store(p.part);
  }
}

template <class W, size_t kInterleave>
inline void dots_panel(Dots<W>& p) {
  if constexpr (kZipped<W, kInterleave>) return dots_zipped<W>(p);
  if constexpr (kGroups<W, kInterleave> > kDotResident) dots_rows<W, kInterleave, kDotRows>(p);
  dots_rows<W, kInterleave, 1>(p);
}

// Multiplies a panel, or a whole matrix, that has fewer columns than a full panel.
template <class W, size_t kInterleave>
inline void dots_narrow(Dots<W> p, size_t width) {
  using T = Sum<W>;
  using X = Operand<W>;
  constexpr size_t kLanes = Vec<T>::kLanes;
  const size_t groups = width / kInterleave, rest = width % kInterleave;
  for (; p.rows > 0; --p.rows, p.w += p.row_stride, p.part += kLanes) {
    Vec<T> sum = p.accumulate ? Vec<T>::load(p.part) : Vec<T>::zero();
    const W* w = p.w;
    const X* xs = p.xs;
    for (size_t s = 0; s < groups; ++s, w += kInterleave, xs += kLanes)
      sum = fma(Vec<X>::template load_group<kInterleave>(w), Vec<X>::load(xs), sum);
    if (rest > 0) sum = fma(load_group_partial<X, W, kInterleave>(w, rest), Vec<X>::load(xs), sum);
    sum.store(p.part);
  }
}

// Multiplies the full panels of a row-major W, kRows rows at a time, until fewer than kRows rows are left.
// The sums of the kRows rows stay in registers for all panels. The code also prefetches the same columns of
// later rows, at least kFetchAhead bytes and at least kRows rows ahead.
template <class W, size_t kInterleave, size_t kRows>
inline void dots_row_major(Dots<W>& p, size_t panels) {
  using T = Sum<W>;
  using X = Operand<W>;
  constexpr size_t kLanes = Vec<T>::kLanes, kPanelGroups = kGroups<W, kInterleave>;
  const size_t step = kRows * p.row_stride;
  const size_t rows_ahead = ceil_div(kFetchAhead / sizeof(W), step) * kRows;
  for (; p.rows >= kRows; p.rows -= kRows, p.w += step, p.part += kRows * kLanes) {
    const size_t ahead = p.rows > rows_ahead ? rows_ahead * p.row_stride : 0;
    RowSums<W, kInterleave, kRows> sums;
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
      sums[r][0] = p.accumulate ? Vec<T>::load(p.part + r * kLanes) : Vec<T>::zero();
    const W* first = p.w;
    const X* xs = p.xs;
    for (size_t panel = 0; panel < panels; ++panel, first += kPanelDepth<W>, xs += kPanelGroups * kLanes) {
      const W* w[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        w[r] = first + r * p.row_stride;
        keep(w[r]);
        fetch_panel(w[r] + ahead);
      }
      add_panel<W, kInterleave, kRows>(
          w, [&](size_t s) __attribute__((always_inline)) { return Vec<X>::load(xs + s * kLanes); }, sums);
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) sums[r][0].store(p.part + r * kLanes);
  }
}

template <class W, size_t kInterleave>
inline void dots_interleaved(size_t rows, size_t depth, Panels<W> w, const Operand<W>* xs, Sum<W>* part,
                             bool accumulate) {
  constexpr size_t kLanes = Vec<Sum<W>>::kLanes;
  // If W is row-major or has a single row, its full panels are multiplied here. Two kinds of products use the
  // loop over panels below instead: zipped products, because they keep the part of `x` for one panel in
  // registers, and products of bfloat16 pairs, because they are used only for batches of more tokens.
  if constexpr (kValuesPerElement<W> == 1 && !kZipped<W, kInterleave>)
    if (const size_t panels = depth / kPanelDepth<W>; panels > 0 && w.panel_stride == kPanelDepth<W>) {
      Dots<W> p{rows, w.data, w.row_stride, xs, part, accumulate, nullptr};
      dots_row_major<W, kInterleave, kDotRows>(p, panels);
      dots_row_major<W, kInterleave, 1>(p, panels);
      depth -= panels * kPanelDepth<W>;
      if (depth == 0) return;
      w.data += panels * kPanelDepth<W>;
      xs += panels * kGroups<W, kInterleave> * kLanes;
      accumulate = true;
    }
  do {  // runs once even if `depth` is 0, to set `part` to zero
    const size_t width = smaller(depth, kPanelDepth<W>);
    // The last rows of a panel prefetch the first rows of the next panel.
    const size_t last = smaller(rows, kFetchAhead / (kPanelDepth<W> * sizeof(W)));
    Dots<W> p{rows - last, w.data, w.row_stride, xs, part, accumulate, w.data + last * w.row_stride};
    if (width == kPanelDepth<W>) {
      if (p.rows > 0) dots_panel<W, kInterleave>(p);
      p.rows += last;
      p.next = w.data + w.panel_stride;
      dots_panel<W, kInterleave>(p);
    } else {
      p.rows = rows;
      dots_narrow<W, kInterleave>(p, width);
    }
    depth -= width;
    w.data += w.panel_stride;
    xs += width / kInterleave * kLanes;
    accumulate = true;
  } while (depth > 0);
}

// Makes the interleave factor a template argument: calls `body.operator()<interleave_factor>()`.
template <class T, size_t kInterleave = Vec<T>::kLanes, class Body>
inline void for_interleave_factor(size_t interleave_factor, const Body& body) {
  if (interleave_factor == kInterleave) return body.template operator()<kInterleave>();
  if constexpr (kInterleave > 1 && kInterleave * kMostSmallBatch > Vec<T>::kLanes)
    for_interleave_factor<T, kInterleave / 2>(interleave_factor, body);
}

template <class W>
void dots(size_t interleave_factor, size_t rows, size_t depth, const Panels<W>& w, const Operand<W>* xs,
          Sum<W>* part, bool accumulate) {
  for_interleave_factor<Sum<W>>(interleave_factor, [&]<size_t kInterleave>() {
    if constexpr (kPanelDepth<W> % kInterleave == 0)
      dots_interleaved<W, kInterleave>(rows, depth, w, xs, part, accumulate);
  });
}

// Rearranges `x` (m, cols) into `xs` (groups, lanes), where kInterleave neighbouring lanes belong to one
// token. Missing rows and columns of `x` are replaced by zeros.
template <class T, size_t kInterleave>
inline void interleave_groups(size_t m, size_t cols, const T* x, size_t x_stride, T* xs) {
  constexpr size_t kLanes = Vec<T>::kLanes, kTokens = kLanes / kInterleave;
  for (size_t c = 0; c < cols; c += kInterleave, xs += kLanes)
    for (size_t t = 0; t < kTokens; ++t) {
      const size_t n = t < m ? smaller(cols - c, kInterleave) : 0;
      const T* from = x + t * x_stride + c;
      if (n == kInterleave)
        __builtin_memcpy(xs + t * kInterleave, from, kInterleave * sizeof(T));
      else
        for (size_t i = 0; i < kInterleave; ++i) xs[t * kInterleave + i] = i < n ? from[i] : T(0);
    }
}

// Does the same as interleave_groups if a group is as large as one element of type U. A transpose of
// elements of type U then moves whole groups. The function also prefetches the next `m` rows of `x`, which
// are used soon.
template <class T, class U>
inline void interleave_transposed(size_t m, size_t cols, const T* x, size_t x_stride, T* xs) {
  constexpr size_t kLanes = Vec<T>::kLanes, kTokens = Vec<U>::kLanes, kInterleave = kLanes / kTokens;
  for (size_t c = 0; c < cols; c += kLanes) {
    const size_t width = smaller(cols - c, kLanes);
    Vec<U> block[kTokens];
#pragma GCC unroll 16
    for (size_t t = 0; t < kTokens; ++t) {
      const T* from = x + t * x_stride + c;
      __builtin_prefetch(from + m * x_stride, 0, 2);
      block[t] = __builtin_bit_cast(Vec<U>, t >= m            ? Vec<T>::zero()
                                            : width == kLanes ? Vec<T>::load(from)
                                                              : Vec<T>::load_partial(from, width));
    }
    transpose(block);
#pragma GCC unroll 16
    for (size_t g = 0; g < kTokens; ++g, xs += kLanes) {
      if (g * kInterleave >= width) return;
      __builtin_bit_cast(Vec<T>, block[g]).store(xs);
    }
  }
}

template <class T>
void interleave(size_t m, size_t interleave_factor, size_t cols, const T* x, size_t x_stride, T* xs) {
  for_interleave_factor<T>(interleave_factor, [&]<size_t kInterleave>() {
    if constexpr (kInterleave == 1)
      interleave_transposed<T, T>(m, cols, x, x_stride, xs);
    else if constexpr (kInterleave * sizeof(T) == sizeof(double))
      interleave_transposed<T, double>(m, cols, x, x_stride, xs);
    else
      interleave_groups<T, kInterleave>(m, cols, x, x_stride, xs);
  });
}

// Adds up the lanes of each token pairwise, as a tree; adds `bias` (rows) unless it is null; stores the sums
// in `y` (m, rows). `part` (rows, lanes) has the lanes of all tokens, one token after another. A block of
// kLanes rows is transposed, so that all its rows are summed at once.
template <class T>
void sum_parts(size_t m, size_t interleave_factor, size_t rows, const T* part, const T* bias, T* y,
               size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for_interleave_factor<T>(interleave_factor, [&]<size_t kInterleave>() {
    for (size_t j = 0; j < rows; j += kLanes) {
      const size_t count = smaller(rows - j, kLanes);
      Vec<T> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        block[i] = i < count ? Vec<T>::load(part + (j + i) * kLanes) : Vec<T>::zero();
      transpose(block);
      const Vec<T> offset = bias ? Vec<T>::load_partial(bias + j, count) : Vec<T>::zero();
#pragma GCC unroll 16
      for (size_t t = 0; t < kLanes / kInterleave; ++t) {
        if (t >= m) break;
        Vec<T>* lanes = block + t * kInterleave;
#pragma GCC unroll 4
        for (size_t half = kInterleave / 2; half > 0; half /= 2)
#pragma GCC unroll 8
          for (size_t i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
        const Vec<T> sum = bias ? lanes[0] + offset : lanes[0];
        sum.store_partial(y + t * y_stride + j, count);
      }
    }
  });
}

// ---- add_dots: y += z aᵀ, where the depth is the rank of an adapter ----

// Divides the lanes of each of the kCount vectors `v` into groups of kCount neighbours, and sums each group.
// The result has the sums of the first vector, followed by those of the other vectors in order.
template <size_t kCount, class T>
inline Vec<T> sums_of_neighbours(Vec<T> (&v)[kCount]) {
#pragma GCC unroll 4
  for (size_t half = kCount / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (size_t i = 0; i < half; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
  return v[0];
}

template <class T>
inline void add_first(Vec<T> sums, size_t n, T* y) {
  if (n == Vec<T>::kLanes)
    (Vec<T>::load(y) + sums).store(y);
  else
    (Vec<T>::load_partial(y, n) + sums).store_partial(y, n);
}

// Adds the product of `a` (rows, kDepth) and `z` to `y` (rows), for at most kLanes rows. Each vector holds
// several rows of `a`, because kDepth is less than kLanes.
template <size_t kDepth, class T>
inline void add_packed_rows(size_t rows, const T* a, Vec<T> z, T* y) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  Vec<T> products[kDepth];
#pragma GCC unroll 8
  for (size_t i = 0; i < kDepth; ++i) {
    const size_t first = i * kLanes, n = rows * kDepth;
    const Vec<T> some = rows == kLanes ? Vec<T>::load(a + first)
                        : first < n    ? Vec<T>::load_partial(a + first, smaller(n - first, kLanes))
                                       : Vec<T>::zero();
    products[i] = fma(some, z, Vec<T>::zero());
  }
  add_first(sums_of_neighbours(products), rows, y);
}

// Adds z aᵀ to `y` (m, rows), where `z` is (m, kDepth) and `a` is (rows, kDepth). A block of kLanes rows of
// `a` is used for all tokens before the next block is loaded.
template <size_t kDepth, class T>
inline void add_packed_dots(size_t m, size_t rows, const T* a, const T* z, size_t z_stride, T* y,
                            size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  Vec<T> zs[kMostSmallBatch];
  for (size_t t = 0; t < m; ++t) zs[t] = Vec<T>::template load_group<kDepth>(z + t * z_stride);
  for (size_t r = 0; r < rows; r += kLanes)
    for (size_t t = 0; t < m; ++t)
      add_packed_rows<kDepth>(smaller(rows - r, kLanes), a + r * kDepth, zs[t], y + t * y_stride + r);
}

// Adds z aᵀ to `y` (kTokens, rows) for at most kLanes / kTokens rows, where `z` is (kTokens, depth) and `a`
// is (rows, depth). If `rows` is less than kLanes / kTokens, the last row is repeated and its additional
// sums are dropped.
template <size_t kTokens, class T>
inline void add_few_dots(size_t rows, size_t depth, const T* a, const T* z, size_t z_stride, T* y,
                         size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes, kRows = kLanes / kTokens;
  Vec<T> sums[kLanes];
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes; ++i) sums[i] = Vec<T>::zero();
  const T* at[kRows];
#pragma GCC unroll 16
  for (size_t r = 0; r < kRows; ++r) at[r] = a + smaller(r, rows - 1) * depth;
  const auto step = [&](size_t k, const auto& load) {
    Vec<T> zs[kTokens];
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) zs[t] = load(z + t * z_stride + k);
#pragma GCC unroll 16
    for (size_t r = 0; r < kRows; ++r) {
      const Vec<T> some = load(at[r] + k);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) sums[t * kRows + r] = fma(some, zs[t], sums[t * kRows + r]);
    }
  };
  size_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) step(k, [](const T* p) { return Vec<T>::load(p); });
  if (k < depth) step(k, [n = depth - k](const T* p) { return Vec<T>::load_partial(p, n); });
  const Vec<T> total = sums_of_neighbours(sums);
  if constexpr (kTokens == 1) {
    add_first(total, rows, y);
  } else {
    T values[kLanes];
    total.store(values);
    for (size_t t = 0; t < kTokens; ++t)
      for (size_t r = 0; r < rows; ++r) y[t * y_stride + r] += values[t * kRows + r];
  }
}

// Processes the `m` tokens in groups of 4, then 2, then 1. After the first group, the rows of `a` are in L1.
template <size_t kTokens, class T>
inline void add_block_dots(size_t m, size_t rows, size_t depth, const T* a, const T* z, size_t z_stride, T* y,
                           size_t y_stride) {
  constexpr size_t kRows = Vec<T>::kLanes / kTokens;
  for (; m >= kTokens; m -= kTokens, z += kTokens * z_stride, y += kTokens * y_stride)
    for (size_t r = 0; r < rows; r += kRows)
      add_few_dots<kTokens>(smaller(rows - r, kRows), depth, a + r * depth, z, z_stride, y + r, y_stride);
  if constexpr (kTokens > 1) add_block_dots<kTokens / 2>(m, rows, depth, a, z, z_stride, y, y_stride);
}

template <size_t kDepth, class T>
inline void add_dots_of_depth(size_t m, size_t rows, size_t depth, const T* a, const T* z, size_t z_stride,
                              T* y, size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  if constexpr (kDepth < kLanes) {
    if (depth == kDepth) return add_packed_dots<kDepth>(m, rows, a, z, z_stride, y, y_stride);
    return add_dots_of_depth<2 * kDepth>(m, rows, depth, a, z, z_stride, y, y_stride);
  }
  for (size_t r = 0; r < rows; r += kLanes)
    add_block_dots<smaller(4, kLanes)>(m, smaller(rows - r, kLanes), depth, a + r * depth, z, z_stride, y + r,
                                       y_stride);
}

template <class T>
void add_dots(size_t m, size_t rows, size_t depth, const T* a, const T* z, size_t z_stride, T* y,
              size_t y_stride) {
  add_dots_of_depth<2>(m, rows, depth, a, z, z_stride, y, y_stride);
}

}  // namespace nplora::kernels::NPLORA_ISA
