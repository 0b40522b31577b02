// Matrix products for small batches. These products read the weight W once, in the order in which it is
// stored: panel by panel, or row by row if W is row-major. Each kernel is documented in kernel_table.h.
//
// A token is a row of the left operand, such as `x`. For each token and each row of W, lane i of a vector
// sums the products in all columns k with k % kLanes == i. The lanes are added at the end. The order of these
// additions does not depend on the other tokens, so the results of a token have the same bits in every batch.
//
// Each kernel unit (isa_*.cpp) defines three constants.
//   `kDotResident` is the largest number of vectors of `x` that stay in registers while the rows of a panel
//     of W are multiplied by a single token. The sums of the token take kDotSums more registers.
//   `kDotRows` is used for a single token whose row of `x` does not stay in registers. Each vector of `x` is
//     then loaded once for kDotRows rows of W.
//   `kDotSums` is the number of vectors in which the products of a row of W are summed, if a row of a panel
//     has at least 2 * kDotSums vectors. kDotRows * kDotSums is at least 8: an FMA has a latency of 4 cycles
//     and 2 FMAs can start in each cycle, so 8 independent sums are needed.

namespace nplora::kernels::NPLORA_ISA {

// The number of vectors in a row of a full panel.
template <class W>
inline constexpr size_t kVectorsOfPanel = kPanelColumns / Vec<Sum<W>>::kLanes;

// The number of vectors in which the products of a row of W are summed. The number is 1 if a row of a panel
// has fewer than 2 * kDotSums vectors, else kDotSums.
template <class W>
inline constexpr size_t kSideSums = kVectorsOfPanel<W> >= 2 * kDotSums ? kDotSums : 1;

// The number of rows of W that are multiplied by a vector of `x` each time the vector is loaded. For a single
// token, this number is kDotRows. For several tokens, this number is the largest number of rows whose sums
// take at most eight vectors, but at least 1. Eight vectors hide the latency of an FMA, and more rows could
// need too many registers.
template <class W, size_t kTokens>
inline constexpr size_t kSharingRows =
    kTokens == 1 ? kDotRows : (kTokens * kSideSums<W> < 8 ? 8 / (kTokens * kSideSums<W>) : 1);

// Whether the registers have room for the sums and for the part of kTokens rows of `x` that is multiplied by
// one panel of W.
template <class W, size_t kTokens>
inline constexpr bool kStaysInRegisters =
    kTokens * (kVectorsOfPanel<W> + kSideSums<W>) <= kDotResident + kDotSums;

// kSideSums vectors of partial sums for each of kRows rows of W and each of kTokens tokens.
template <class W, size_t kTokens, size_t kRows>
using RowSums = Vec<Sum<W>>[kRows][kTokens][kSideSums<W>];

// Multiplies each row w[r] of a full panel by each row t of `x`, element by element. Row t of `x` begins at
// the column that belongs to the first column of the panel. The products of w[r] and row t are added to the
// lanes of sums[r][t][0]. The order of the additions depends neither on the number of tokens nor on whether W
// is stored in panels or row-major. `x_at(t, s)` returns the vector that begins s * kLanes elements after the
// start of row t of `x`.
template <class W, size_t kTokens, size_t kRows, class XAt>
[[gnu::always_inline]] inline void add_panel(const W* const (&w)[kRows], const XAt& x_at,
                                             RowSums<W, kTokens, kRows>& sums) {
  using V = Vec<Sum<W>>;
  constexpr size_t kSums = kSideSums<W>;
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows * kTokens; ++i)
#pragma GCC unroll 4
    for (size_t j = 1; j < kSums; ++j) sums[i / kTokens][i % kTokens][j] = V::zero();
#pragma GCC unroll 48
  for (size_t s = 0; s < kVectorsOfPanel<W>; ++s) {
    V x[kTokens];
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) x[t] = x_at(t, s);
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) {
      const V some = V::load(w[r] + s * V::kLanes);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) sums[r][t][s % kSums] = fma(some, x[t], sums[r][t][s % kSums]);
    }
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows * kTokens; ++i)
#pragma GCC unroll 4
    for (size_t half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (size_t j = 0; j < half; ++j) {
        V(&side)[kSums] = sums[i / kTokens][i % kTokens];
        side[j] = side[j] + side[j + half];
      }
}

// Prefetches one row of a panel into L2.
template <class W>
inline void fetch_panel(const W* at) {
#pragma GCC unroll 8
  for (size_t line = 0; line < kPanelColumns * sizeof(W); line += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + line, 0, 2);
}

// The operands of a product of several tokens (rows of `x`) with `rows` rows of `w`. The kLanes partial sums
// for the product of token t with row r of `w` begin at part + t * part_stride + r * kLanes.
template <class W>
struct Dots {
  size_t rows;
  const W* w;
  size_t row_stride;
  const Sum<W>* x;
  size_t x_stride;
  Sum<W>* part;
  size_t part_stride;
  bool accumulate;
  const W* next;  // later rows of W to prefetch

  template <size_t kTokens, size_t kRows>
  [[gnu::always_inline]] void load_sums(RowSums<W, kTokens, kRows>& sums) const {
    using V = Vec<Sum<W>>;
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t)
        sums[r][t][0] = accumulate ? V::load(part + t * part_stride + r * V::kLanes) : V::zero();
  }
  template <size_t kTokens, size_t kRows>
  [[gnu::always_inline]] void store_sums(const RowSums<W, kTokens, kRows>& sums) const {
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t)
        sums[r][t][0].store(part + t * part_stride + r * Vec<Sum<W>>::kLanes);
  }
};

// Multiplies kTokens tokens by the rows of a full panel, kRows rows at a time, until fewer than kRows rows
// are left. Afterwards, `p` describes the product with the remaining rows.
template <class W, size_t kTokens, size_t kRows>
inline void dots_rows(Dots<W>& p) {
  using V = Vec<Sum<W>>;
  constexpr size_t kVectors = kVectorsOfPanel<W>;
  constexpr bool kResident = kStaysInRegisters<W, kTokens>;
  V x[kResident ? kTokens * kVectors : 1];
  if constexpr (kResident)
#pragma GCC unroll 48
    for (size_t i = 0; i < kTokens * kVectors; ++i) {
      x[i] = V::load(p.x + i / kVectors * p.x_stride + i % kVectors * V::kLanes);
      keep(x[i]);
    }
  const auto x_at = [&](size_t t, size_t s) __attribute__((always_inline)) {
    if constexpr (kResident)
      return x[t * kVectors + s];
    else
      return V::load(p.x + t * p.x_stride + s * V::kLanes);
  };
  for (; p.rows >= kRows; p.rows -= kRows, p.w += kRows * p.row_stride, p.part += kRows * V::kLanes) {
    const W* w[kRows];
    RowSums<W, kTokens, kRows> sums;
    p.template load_sums<kTokens, kRows>(sums);
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r, p.next += p.row_stride) {
      fetch_panel(p.next);
      w[r] = p.w + r * p.row_stride;
      keep(w[r]);  // without `keep`, GCC would load an offset from the stack for each load of W
    }
    add_panel<W, kTokens, kRows>(w, x_at, sums);
    p.template store_sums<kTokens, kRows>(sums);
  }
}

template <class W, size_t kTokens>
inline void dots_panel(Dots<W>& p) {
  if constexpr (!kStaysInRegisters<W, kTokens> && kSharingRows<W, kTokens> > 1)
    dots_rows<W, kTokens, kSharingRows<W, kTokens>>(p);
  dots_rows<W, kTokens, 1>(p);
}

// Multiplies one token by the last `width` columns of W, which are fewer columns than a full panel has.
template <class W>
inline void dots_narrow(Dots<W> p, size_t width) {
  using V = Vec<Sum<W>>;
  constexpr size_t kLanes = V::kLanes;
  for (; p.rows > 0; --p.rows, p.w += p.row_stride, p.part += kLanes) {
    V sum = p.accumulate ? V::load(p.part) : V::zero();
    size_t c = 0;
    for (; c + kLanes <= width; c += kLanes) sum = fma(V::load(p.w + c), V::load(p.x + c), sum);
    if (c < width) sum = fma(V::load_partial(p.w + c, width - c), V::load_partial(p.x + c, width - c), sum);
    sum.store(p.part);
  }
}

// Multiplies kTokens tokens by the full panels of a row-major W, kRows rows at a time, until fewer than kRows
// rows are left. A panel of a row-major W is a group of kPanelColumns columns. The sums of the kRows rows
// stay in registers for all panels. While an element of W is read, the element `ahead` elements later is
// prefetched.
template <class W, size_t kTokens, size_t kRows>
inline void dots_row_major(Dots<W>& p, size_t panels, size_t ahead) {
  using V = Vec<Sum<W>>;
  const size_t step = kRows * p.row_stride;
  for (; p.rows >= kRows; p.rows -= kRows, p.w += step, p.part += kRows * V::kLanes) {
    RowSums<W, kTokens, kRows> sums;
    p.template load_sums<kTokens, kRows>(sums);
    const W* first = p.w;
    const Sum<W>* x = p.x;
    for (size_t panel = 0; panel < panels; ++panel, first += kPanelColumns, x += kPanelColumns) {
      const W* w[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        w[r] = first + r * p.row_stride;
        keep(w[r]);
        fetch_panel(w[r] + ahead);
      }
      add_panel<W, kTokens, kRows>(
          w,
          [&](size_t t, size_t s)
              __attribute__((always_inline)) { return V::load(x + t * p.x_stride + s * V::kLanes); },
          sums);
    }
    p.template store_sums<kTokens, kRows>(sums);
  }
}

// Divides the `m` tokens into groups of 4, and the remaining tokens into groups of 2 and 1. For each group,
// calls body.operator()<kTokens>(t), where kTokens is the size of the group and t is the first token of the
// group.
template <size_t kTokens = 4, class Body>
[[gnu::always_inline]] inline void for_tokens(size_t m, const Body& body, size_t first = 0) {
  for (; first + kTokens <= m; first += kTokens) body.template operator()<kTokens>(first);
  if constexpr (kTokens > 1) for_tokens<kTokens / 2>(m, body, first);
}

// Returns the operands of the product `p` without the tokens before token `first`.
template <class W>
inline Dots<W> from_token(Dots<W> p, size_t first) {
  p.x += first * p.x_stride;
  p.part += first * p.part_stride;
  return p;
}

// Multiplies the full panels of a row-major W. All `m` tokens are multiplied by kFew rows of W before the
// next rows of W are read. Meanwhile, the same columns of later rows are prefetched. The later rows begin at
// least kFetchAhead bytes after the rows that are read.
template <class W>
inline void dots_row_major(size_t m, Dots<W> p, size_t panels) {
  constexpr size_t kFew = 8;
  const size_t rows_ahead = ceil_div(kFetchAhead / sizeof(W), kFew * p.row_stride) * kFew;
  for (size_t left = p.rows; left > 0; left -= p.rows) {
    p.rows = smaller(kFew, left);
    for_tokens(m, [&]<size_t kTokens>(size_t first) {
      Dots<W> some = from_token(p, first);
      const size_t ahead = first == 0 && left > rows_ahead ? rows_ahead * p.row_stride : 0;
      if constexpr (kSharingRows<W, kTokens> > 1)
        dots_row_major<W, kTokens, kSharingRows<W, kTokens>>(some, panels, ahead);
      dots_row_major<W, kTokens, 1>(some, panels, ahead);
    });
    p.w += p.rows * p.row_stride;
    p.part += p.rows * Vec<Sum<W>>::kLanes;
  }
}

template <class W>
void dots(size_t m, size_t rows, size_t depth, const Panels<W>& w, const Sum<W>* x, size_t x_stride,
          Sum<W>* part, bool accumulate) {
  constexpr size_t kLanes = Vec<Sum<W>>::kLanes;
  Dots<W> p{rows, w.data, w.row_stride, x, x_stride, part, rows * kLanes, accumulate, w.data};
  // If W is row-major or has a single row, dots_row_major multiplies all full panels of W, and the loop below
  // multiplies only the remaining columns.
  if (const size_t panels = depth / kPanelColumns; panels > 0 && w.panel_stride == kPanelColumns) {
    dots_row_major(m, p, panels);
    depth -= panels * kPanelColumns;
    if (depth == 0) return;
    p.w += panels * kPanelColumns;
    p.x += panels * kPanelColumns;
    p.accumulate = true;
  }
  do {  // if `depth` is 0, the only iteration sets `part` to zero
    const size_t width = smaller(depth, kPanelColumns);
    // While the last rows of a panel are multiplied, the first rows of the next panel are prefetched.
    const size_t last = smaller(rows, kFetchAhead / (kPanelColumns * sizeof(W)));
    if (width == kPanelColumns) {
      for_tokens(m, [&]<size_t kTokens>(size_t first) {
        Dots<W> some = from_token(p, first);
        some.rows = rows - last;
        some.next = first == 0 ? p.w + last * p.row_stride : p.w;
        if (some.rows > 0) dots_panel<W, kTokens>(some);
        some.rows += last;
        if (first == 0) some.next = p.w + w.panel_stride;
        dots_panel<W, kTokens>(some);
      });
    } else {
      for (size_t t = 0; t < m; ++t) dots_narrow<W>(from_token(p, t), width);
    }
    depth -= width;
    p.w += w.panel_stride;
    p.x += width;
    p.accumulate = true;
  } while (depth > 0);
}

// Sums each row of `part` (rows, kLanes), adds `bias` (rows) if it is not null, and stores the results in `y`
// (rows). To sum a row, the second half of the row is added to the first half. Then the second half of the
// result is added to the first half of the result, and so on. The function transposes blocks of kLanes rows,
// so that all rows of a block are summed at once.
template <class T>
void sum_parts(size_t rows, const T* part, const T* bias, T* y) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for (size_t j = 0; j < rows; j += kLanes) {
    const size_t count = smaller(rows - j, kLanes);
    Vec<T> block[kLanes];
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i)
      block[i] = i < count ? Vec<T>::load(part + (j + i) * kLanes) : Vec<T>::zero();
    transpose(block);
#pragma GCC unroll 4
    for (size_t half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (size_t i = 0; i < half; ++i) block[i] = block[i] + block[i + half];
    const Vec<T> sum = bias ? block[0] + Vec<T>::load_partial(bias + j, count) : block[0];
    sum.store_partial(y + j, count);
  }
}

// ---- add_dots: y += z aᵀ, where `depth` is the rank of an adapter ----

// Divides each of the kCount vectors in `v` into groups of kCount neighbouring lanes, and sums each group.
// The result is one vector: first the sums of vector v[0], then the sums of vector v[1], and so on.
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

// Adds the product of `a` (rows, kDepth) and one row of kDepth elements to `y` (rows). `z` holds this row,
// repeated until all lanes are full. `rows` is at most kLanes. Each loaded vector holds several rows of `a`,
// because kDepth is less than kLanes.
template <size_t kDepth, class A, class T>
inline void add_packed_rows(size_t rows, const A* a, Vec<T> z, T* y) {
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
template <size_t kDepth, class A, class T>
inline void add_packed_dots(size_t m, size_t rows, const A* a, const T* z, size_t z_stride, T* y,
                            size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  Vec<T> zs[kSmallBatch];
  for (size_t t = 0; t < m; ++t) zs[t] = Vec<T>::template load_group<kDepth>(z + t * z_stride);
  for (size_t r = 0; r < rows; r += kLanes)
    for (size_t t = 0; t < m; ++t)
      add_packed_rows<kDepth>(smaller(rows - r, kLanes), a + r * kDepth, zs[t], y + t * y_stride + r);
}

// Adds z aᵀ to `y` (kTokens, rows), where `z` is (kTokens, depth) and `a` is (rows, depth). `rows` is at most
// kLanes / kTokens. If `rows` is less, the last row of `a` is computed several times, but its sums are added
// to `y` only once.
template <size_t kTokens, class A, class T>
inline void add_few_dots(size_t rows, size_t depth, const A* a, const T* z, size_t z_stride, T* y,
                         size_t y_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes, kRows = kLanes / kTokens;
  Vec<T> sums[kLanes];
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes; ++i) sums[i] = Vec<T>::zero();
  const A* at[kRows];
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
  for (; k + kLanes <= depth; k += kLanes) step(k, [](const auto* p) { return Vec<T>::load(p); });
  if (k < depth) step(k, [n = depth - k](const auto* p) { return Vec<T>::load_partial(p, n); });
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

// Adds z aᵀ to `y` (m, rows), where `rows` is at most kLanes. The tokens are processed in groups of kTokens,
// and the remaining tokens in smaller groups. The first group brings the rows of `a` into L1, and the later
// groups read the rows from L1.
template <size_t kTokens, class A, class T>
inline void add_block_dots(size_t m, size_t rows, size_t depth, const A* a, const T* z, size_t z_stride, T* y,
                           size_t y_stride) {
  constexpr size_t kRows = Vec<T>::kLanes / kTokens;
  for (; m >= kTokens; m -= kTokens, z += kTokens * z_stride, y += kTokens * y_stride)
    for (size_t r = 0; r < rows; r += kRows)
      add_few_dots<kTokens>(smaller(rows - r, kRows), depth, a + r * depth, z, z_stride, y + r, y_stride);
  if constexpr (kTokens > 1) add_block_dots<kTokens / 2>(m, rows, depth, a, z, z_stride, y, y_stride);
}

// Adds z aᵀ to `y` (m, rows). If `depth` is a power of two from 2 to kLanes / 2, add_packed_dots computes the
// product, with `depth` as a template argument.
template <size_t kDepth, class A, class T>
inline void add_dots_of_depth(size_t m, size_t rows, size_t depth, const A* a, const T* z, size_t z_stride,
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

template <class W>
void add_dots(size_t m, size_t rows, size_t depth, const W* a, const Sum<W>* z, size_t z_stride, Sum<W>* y,
              size_t y_stride) {
  add_dots_of_depth<2>(m, rows, depth, a, z, z_stride, y, y_stride);
}

}  // namespace nplora::kernels::NPLORA_ISA
