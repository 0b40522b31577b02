// The matrix products, and the transposes that move their operands and results into and out of the SIMD
// lanes. One implementation serves every instruction set. Each kernel is documented in kernel_table.h.
//
// Each kernel unit (isa_*.cpp) defines the sizes of its tiles. All values that a tile uses must fit into the
// registers.
//   `kTileRows` is the number of rows of `w` in a tile of gemm_tokens_in_lanes. A tile of
//     gemm_tokens_in_lanes has kTileRows * 2 accumulators, 2 vectors of `x` and 1 broadcast element.
//   `kTileTokens` is the number of rows of `a` in a tile of gemm_outputs_in_lanes or of merge.
//   `kOutputVectors` is the number of vectors of `w` in a tile of gemm_outputs_in_lanes and merge. A tile of
//     gemm_outputs_in_lanes has kTileTokens * kOutputVectors accumulators, kOutputVectors vectors of `w` and
//     1 broadcast element.
//   `kPanelVectors` is the number of vectors of `w` in a tile of gemm_outputs_in_lanes for a dense panel.
//     `kPanelVectors` is either kOutputVectors or the number of vectors in a row of a panel of floats. If
//     `kPanelVectors` is larger than kOutputVectors, a tile for a dense panel has fewer than kTileTokens rows
//     of `a`, so that the accumulators fit into the registers.
//   `kNearRows` is the number of rows of `a` that gemm_outputs_in_lanes reads through one pointer: the
//     address of row i is the pointer plus i times the row stride. If one pointer served more rows, GCC would
//     run out of general registers and keep multiples of the stride in vector registers. Moving these
//     multiples back to general registers costs 3-4 % of the time.
// Full tiles have at least 8 independent accumulators, because an FMA has a latency of 4 cycles and 2 FMAs
// can start in each cycle.

namespace nplora::kernels::NPLORA_ISA {

// ---- gemm_tokens_in_lanes: the product yt = w xt ----

template <class E>
struct TokensInLanes {
  size_t depth;
  Panels<E> w;
  const E* xt;
  Sum<E>* yt;
  bool accumulate;
};

// Computes one tile of kRows rows of `yt`, with kVectors vectors in each row. If `w` is in full panels,
// `kStride` is the row stride of `w`, which is known at compile time. Otherwise, `kStride` is 0. In a full
// panel, the rows of the next tile directly follow the rows of this tile in memory, but the hardware does not
// prefetch the rows of the next tile. So each step along the depth prefetches the next kFetchStep bytes of
// these rows. Tiles of fewer than 24 accumulators prefetch into L2, and larger tiles prefetch into L1. On a
// Zen 4, with a W that is not in the cache, batches of 16 tokens are a quarter faster if the tiles prefetch
// into L2 instead of L1. With AVX2, prefetching into L2 makes batches of 32 tokens a tenth faster. Tiles of
// 24 accumulators gain nothing from prefetching into L2.
template <class E, size_t kVectors, size_t kRows, size_t kStride>
inline void gemm_tokens_in_lanes_fixed(TokensInLanes<E> p) {
  using T = Sum<E>;
  constexpr size_t kLanes = Vec<T>::kLanes, kWidth = kVectors * kLanes;
  constexpr size_t kFetchStep = smaller(kCacheLine, kRows * sizeof(E));
  constexpr int kLocality = kRows * kVectors < 24 ? 2 : 3;
  const size_t stride = kStride ? kStride : p.w.row_stride;
  Vec<T> c[kRows][kVectors];
#pragma GCC unroll 16
  for (size_t j = 0; j < kRows; ++j)
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v)
      c[j][v] = p.accumulate ? Vec<T>::load(p.yt + j * kWidth + v * kLanes) : Vec<T>::zero();

  for (; p.depth > 0; p.w.data += p.w.panel_stride) {
    const size_t width = smaller(p.depth, kPanelDepth<E>);
    p.depth -= width;
    const E* wk = p.w.data;
    const char* next = reinterpret_cast<const char*>(p.w.data + kRows * stride);
    for (const E* end = p.xt + width * kWidth; p.xt != end; p.xt += kWidth, ++wk) {
      if (kStride) {
        __builtin_prefetch(next, 0, kLocality);
        next += kFetchStep;
      }
      const auto add = [&]<size_t kPart>() __attribute__((always_inline)) {
        decltype(part<kPart>(Vec<E>{})) x[kVectors];
#pragma GCC unroll 2
        for (size_t v = 0; v < kVectors; ++v) x[v] = part<kPart>(Vec<E>::load(p.xt + v * kLanes));
#pragma GCC unroll 16
        for (size_t j = 0; j < kRows; ++j) {
          const auto b = part<kPart>(Vec<E>::broadcast(wk[j * stride]));
#pragma GCC unroll 2
          for (size_t v = 0; v < kVectors; ++v) {
            c[j][v] = fma(x[v], b, c[j][v]);
            if constexpr (kParts<E> == 2) in_order(c[j][v]);
          }
        }
      };
      add.template operator()<0>();
      if constexpr (kParts<E> == 2) {
        // Without `keep`, the compiler would store what it has loaded, instead of loading it again.
        keep(wk);
        keep(p.xt);
        add.template operator()<1>();
      }
    }
  }

#pragma GCC unroll 16
  for (size_t j = 0; j < kRows; ++j)
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v) c[j][v].store(p.yt + j * kWidth + v * kLanes);
}

// Computes a tile of `rows` rows, where `rows` is at most kRows. The recursion finds the template instance
// for this number of rows.
template <class E, size_t kVectors, size_t kRows, size_t kStride>
inline void gemm_tokens_in_lanes_upto(size_t rows, TokensInLanes<E> p) {
  if (rows == kRows) return gemm_tokens_in_lanes_fixed<E, kVectors, kRows, kStride>(p);
  if constexpr (kRows > 1) gemm_tokens_in_lanes_upto<E, kVectors, kRows - 1, kStride>(rows, p);
}

template <class E, size_t kVectors, size_t kStride>
inline void gemm_tokens_in_lanes_rows(size_t rows, TokensInLanes<E> p) {
  while (rows > 0) {
    const size_t tile = smaller(rows, kTileRows);
    gemm_tokens_in_lanes_upto<E, kVectors, kTileRows, kStride>(tile, p);
    rows -= tile;
    p.w.data += tile * p.w.row_stride;
    p.yt += tile * kVectors * Vec<E>::kLanes;
  }
}

template <class E>
void gemm_tokens_in_lanes(size_t n_lanes, size_t rows, size_t depth, const Panels<E>& w, const E* xt,
                          Sum<E>* yt, bool accumulate) {
  const TokensInLanes<E> p{depth, w, xt, yt, accumulate};
  const bool full_panel = w.row_stride == kPanelDepth<E>;
  if (n_lanes == Vec<E>::kLanes)
    full_panel ? gemm_tokens_in_lanes_rows<E, 1, kPanelDepth<E>>(rows, p)
               : gemm_tokens_in_lanes_rows<E, 1, 0>(rows, p);
  else
    full_panel ? gemm_tokens_in_lanes_rows<E, 2, kPanelDepth<E>>(rows, p)
               : gemm_tokens_in_lanes_rows<E, 2, 0>(rows, p);
}

// ---- gemm_outputs_in_lanes: the product c = a w ----

// The number of rows of `w` that each element of `a` is multiplied by. If `a` holds pairs of bfloat16 values
// and `w` holds single values, the number is 2, and the kernel pairs two rows of `w` in registers. Otherwise,
// the number is 1.
template <class E, class W>
inline constexpr size_t kRowsOf = 1;
template <>
inline constexpr size_t kRowsOf<Bf16Pair, Bf16> = 2;

// Returns the number of rows of `a` in a full tile that has `vectors` vectors of `w`.
constexpr size_t rows_beside(size_t vectors) {
  return smaller(kTileTokens, kTileTokens * kOutputVectors / vectors);
}

// The size of an L1 block in bytes, or 0 if products use no wide tiles. A wide tile has kPanelVectors vectors
// of `w`, which is more than kOutputVectors. Wide tiles have few rows and read `w` so fast that `w` must be
// in L1: on AVX2, tiles of 2 x 6 accumulators read 192 bytes of `w` every 6 cycles. So a dense panel is cut
// into L1 blocks, which are groups of rows of `w`. All rows of `a` are multiplied by one block before the
// next block is read. A block has about 24 KB, because L1 has 32 KB or more and must also hold the rows of
// `a` and `c`. Products of pairs use no wide tiles: on AVX2, a wide tile would have to split the same pairs
// of `w` again for each row of `a`.
template <class E>
inline constexpr size_t kL1BlockBytes =
    kValuesPerElement<E> == 1 && kPanelVectors > kOutputVectors ? size_t{24} << 10 : 0;

// Returns a Fetch for wide tiles. Wide tiles prefetch one cache line at each step, at most `lines` lines in
// all. The first line is at `from`, and each next line is `bytes` bytes after the previous line. In a Fetch
// for wide tiles, the member `each` holds this distance in bytes, instead of a number of lines.
inline Fetch lines_apart(const void* from, size_t lines, size_t bytes) {
  return Fetch::memory(from, lines, bytes);
}

// The cache lines that a tile prefetches at each step. At step i, the first of these lines is at the address
// at + i * step, and each next line is `line` bytes after the previous line. Usually, these are the next
// lines of a Fetch. If the Fetch has too few lines left, the tile prefetches lines of later rows of `w`
// instead. In a full dense panel, the later rows are kFetchAhead bytes after the rows that the step reads. In
// later rows, a tile prefetches only the columns that it multiplies: prefetching other columns would gain
// nothing, because they are in L2 already.
struct FetchSteps {
  const char* at;
  size_t step, line;
};
// kFetched is the largest number of cache lines that a tile prefetches at each step. This limit is the number
// of cache lines that one step reads from `w`. A step reads kRowBytes bytes from each row of `w`. If
// kRowBytes is less than a cache line, a row counts as one line.
template <class W>
inline constexpr size_t kRowBytes = kOutputVectors * Vec<Sum<W>>::kLanes * sizeof(W);
template <class E, class W>
inline constexpr size_t kFetched =
    kRowBytes<W> > kCacheLine ? ceil_div(kRowsOf<E, W> * kRowBytes<W>, kCacheLine) : kRowsOf<E, W>;
// Returns the cache lines that a tile of `steps` steps prefetches. If these lines come from `next`, they are
// removed from `next`. `w` is the first row that the tile reads.
template <class E, bool kWide, class W>
inline FetchSteps take(Fetch& next, size_t steps, const W* w, size_t w_stride) {
  constexpr size_t kRowsAhead = kFetchAhead / (kPanelColumns * sizeof(W));
  if (next.each == 0 || steps == 0 || (kWide && next.lines < steps))
    return {reinterpret_cast<const char*>(w), 0, 0};
  if (next.lines < steps)
    return {reinterpret_cast<const char*>(w + kRowsAhead * w_stride), kRowsOf<E, W> * w_stride * sizeof(W),
            kRowBytes<W> > kCacheLine ? kCacheLine : w_stride * sizeof(W)};
  if constexpr (kWide) {
    const FetchSteps taken{next.at, next.each, 0};
    next.at += steps * next.each;
    next.lines -= steps;
    return taken;
  }
  const size_t each = next.lines < steps * next.each ? 1 : smaller(next.each, kFetched<E, W>);
  const FetchSteps taken{next.at, each * kCacheLine, each > 1 ? kCacheLine : 0};
  next.at += steps * each * kCacheLine;
  next.lines -= steps * each;
  return taken;
}

// The operands of a product. The elements of `a` have type E. The elements of `w` have type W, which is E or
// Bf16. The kernel converts elements of type Bf16 to the type E: to floats, or to pairs of bfloat16. `depth`
// is the number of rows of `w`.
template <class E, class W>
struct OutputsInLanes {
  size_t n, depth;
  Strided<E> a;
  const W* w;
  size_t w_stride;
  Sum<E>* c;
  size_t c_stride;
  bool accumulate;
};

// Computes `tiles` tiles of kRows rows, one below the other. If rows of `w` are paired, only one tile is
// computed, because no register is left for a loop over tiles. The `n` columns fill kVectors vectors. If
// `kPartial` is set, the last vector is only partly filled.
template <class E, class W, size_t kRows, size_t kVectors, bool kPartial>
inline void gemm_outputs_in_lanes_fixed(size_t tiles, const OutputsInLanes<E, W>& tile, Fetch& fetch) {
  using T = Sum<E>;
  OutputsInLanes<E, W> p = tile;  // a copy, because GCC would keep the caller's object in memory
  constexpr size_t kLanes = Vec<T>::kLanes;
  const size_t last = p.n - (kVectors - 1) * kLanes;
  constexpr bool kWide = kVectors > kOutputVectors;
  constexpr int kLocality = kWide ? 2 : 3;  // 2 means L2: L1 has no room for the next block
  static_assert(kRows <= 2 * kNearRows);
  const auto load = [last]<class V>(V, const auto* from, size_t v) __attribute__((always_inline)) {
    const auto* at = from + v * kLanes;
    return kPartial && v == kVectors - 1 ? V::load_partial(at, last) : V::load(at);
  };
  if constexpr (kRowsOf<E, W> > 1) tiles = 1;
  for (; tiles > 0; --tiles) {
    // Calls `body(c, i, v)` for each row i and each vector v of the row, where `c` points to the row. A
    // single pointer moves from row to row, because GCC would otherwise keep one address for each vector.
    const auto for_vectors = [&p](const auto& body) __attribute__((always_inline)) {
      T* c = p.c;
#pragma GCC unroll 16
      for (size_t i = 0; i < kRows; ++i, c += p.c_stride) {
        keep(c);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) body(c, i, v);
      }
    };
    Vec<T> acc[kRows][kVectors];
    if (p.accumulate)
      for_vectors([&](T* c, size_t i, size_t v)
                      __attribute__((always_inline)) { acc[i][v] = load(Vec<T>{}, c, v); });
    else
      for_vectors([&](T* c, size_t i, size_t v) __attribute__((always_inline)) {
        // Prefetches the outputs: if the final store of an output misses the cache, later stores wait for
        // this store.
        __builtin_prefetch(c + v * kLanes, 1);
        acc[i][v] = Vec<T>::zero();
      });

    FetchSteps lines = take<E, kWide>(fetch, p.depth / kRowsOf<E, W>, p.w, p.w_stride);
    const E* a = p.a.data;
    const E* far = a + kNearRows * p.a.row_stride;
    if constexpr (kRows > kNearRows) keep(far);
    const W* w = p.w;
    const auto prefetch = [&]() __attribute__((always_inline)) {
      static_assert(kFetched<E, W> <= 3);
      __builtin_prefetch(lines.at, 0, kLocality);
      if constexpr (kFetched<E, W> > 1) __builtin_prefetch(lines.at + lines.line, 0, kLocality);
      if constexpr (kFetched<E, W> > 2) __builtin_prefetch(lines.at + 2 * lines.line, 0, kLocality);
      lines.at += lines.step;
    };
    // A step prefetches after its loads: in the other order, products of a few rows with a large W took 1.15
    // times as long when compiled with Clang. If rows of `w` are paired, a step prefetches before its loads:
    // in the other order, GCC stored vectors on the stack.
    const auto step = [&](const auto& load_w) __attribute__((always_inline)) {
      if constexpr (kRowsOf<E, W> > 1) prefetch();
      const auto load_a = [&](size_t i) __attribute__((always_inline)) {
        return Vec<E>::broadcast(i < kNearRows ? a[i * p.a.row_stride]
                                               : far[(i - kNearRows) * p.a.row_stride]);
      };
      // If a wide tile has fewer rows of `a` than vectors of `w`, a step first loads all elements of `a` that
      // it needs into registers, and then loads one vector of `w` at a time.
      if constexpr (kWide && kRows < kVectors) {
        decltype(load_a(0)) x[kRows];
#pragma GCC unroll 16
        for (size_t i = 0; i < kRows; ++i) x[i] = load_a(i);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          Vec<E> b = load_w.template operator()<0>(v);
          keep(b);  // without `keep`, GCC would load the vector once for each row
#pragma GCC unroll 16
          for (size_t i = 0; i < kRows; ++i) acc[i][v] = fma(x[i], b, acc[i][v]);
        }
      } else {
        const auto add = [&]<size_t kPart>() __attribute__((always_inline)) {
          decltype(part<kPart>(Vec<E>{})) b[kVectors];
#pragma GCC unroll 4
          for (size_t v = 0; v < kVectors; ++v) b[v] = load_w.template operator()<kPart>(v);
#pragma GCC unroll 16
          for (size_t i = 0; i < kRows; ++i) {
            const auto x = part<kPart>(load_a(i));
#pragma GCC unroll 4
            for (size_t v = 0; v < kVectors; ++v) {
              acc[i][v] = fma(x, b[v], acc[i][v]);
              if constexpr (kParts<E> == 2) in_order(acc[i][v]);
            }
          }
        };
        add.template operator()<0>();
        if constexpr (kParts<E> == 2) {
          keep(a);
          keep(w);
          add.template operator()<1>();
        }
      }
      if constexpr (kRowsOf<E, W> == 1) prefetch();
      a += p.a.step_stride;
      far += p.a.step_stride;
      w += kRowsOf<E, W> * p.w_stride;
    };
    size_t left = p.depth;
    for (; left >= kRowsOf<E, W>; left -= kRowsOf<E, W>)
      step([&]<size_t kPart>(size_t v) __attribute__((always_inline)) {
        if constexpr (kRowsOf<E, W> == 1)
          return part<kPart>(load(Vec<E>{}, w, v));
        else if constexpr (kParts<E> == 2)
          return load(Vec<T>{}, w + kPart * p.w_stride, v);
        else
          return Vec<E>::pair_rows(load(Vec<W>{}, w, v), load(Vec<W>{}, w + p.w_stride, v));
      });
    if constexpr (kRowsOf<E, W> == 2)
      if (left > 0)
        step([&]<size_t kPart>(size_t v) __attribute__((always_inline)) {
          return part<kPart>(Vec<E>::pair_rows(load(Vec<W>{}, w, v), Vec<W>::zero()));
        });

    for_vectors([&](T* c, size_t i, size_t v) __attribute__((always_inline)) {
      if (kPartial && v == kVectors - 1)
        acc[i][v].store_partial(c + v * kLanes, last);
      else
        acc[i][v].store(c + v * kLanes);
    });
    p.a.data += kRows * p.a.row_stride;
    p.c += kRows * p.c_stride;
  }
}

// Computes a tile of `rows` rows, where `rows` is at most kRows. The recursion finds the template instance
// for this number of rows.
template <class E, class W, size_t kRows, size_t kVectors, bool kPartial>
inline void gemm_outputs_in_lanes_upto(size_t rows, const OutputsInLanes<E, W>& p, Fetch& fetch) {
  if (rows == kRows) return gemm_outputs_in_lanes_fixed<E, W, kRows, kVectors, kPartial>(1, p, fetch);
  if constexpr (kRows > 1) gemm_outputs_in_lanes_upto<E, W, kRows - 1, kVectors, kPartial>(rows, p, fetch);
}

// Computes all `m` rows of `c`: first full tiles of rows_beside(kVectors) rows, then one smaller tile for the
// remaining rows.
template <class E, class W, size_t kVectors, bool kPartial>
inline void gemm_outputs_in_lanes_rows(size_t m, OutputsInLanes<E, W> p, Fetch& fetch) {
  constexpr size_t kRows = rows_beside(kVectors);
  const size_t step = kRowsOf<E, W> > 1 ? 1 : m / kRows;
  for (size_t left = m / kRows; left > 0; left -= step) {
    gemm_outputs_in_lanes_fixed<E, W, kRows, kVectors, kPartial>(step, p, fetch);
    p.a.data += step * kRows * p.a.row_stride;
    p.c += step * kRows * p.c_stride;
  }
  if constexpr (kRows > 1)
    gemm_outputs_in_lanes_upto<E, W, kRows - 1, kVectors, kPartial>(m % kRows, p, fetch);
}

// The `n` columns of `c` fill at most kVectors vectors. The recursion finds the template instance for this
// number of vectors.
template <class E, class W, size_t kVectors>
inline void gemm_outputs_in_lanes_columns(size_t m, const OutputsInLanes<E, W>& p, Fetch& fetch) {
  constexpr size_t kLanes = Vec<E>::kLanes;
  if (p.n == kVectors * kLanes)
    gemm_outputs_in_lanes_rows<E, W, kVectors, false>(m, p, fetch);
  else if (p.n > (kVectors - 1) * kLanes)
    gemm_outputs_in_lanes_rows<E, W, kVectors, true>(m, p, fetch);
  else if constexpr (kVectors > 1)
    gemm_outputs_in_lanes_columns<E, W, kVectors - 1>(m, p, fetch);
}

// Computes all columns, kVectors vectors at a time.
template <class E, class W, size_t kVectors>
inline void gemm_outputs_in_lanes_groups(size_t m, OutputsInLanes<E, W> p, Fetch& fetch) {
  for (size_t left = p.n; left > 0; left -= p.n, p.w += p.n, p.c += p.n) {
    p.n = smaller(left, kVectors * Vec<E>::kLanes);
    gemm_outputs_in_lanes_columns<E, W, kVectors>(m, p, fetch);
  }
}

// Multiplies `a` with a dense panel, which is split into L1 blocks of about equal size. Each block is read
// several times: once for each tile of rows and each group of kPanelVectors vectors. If the caller passes
// Fetch::rows_ahead, each of these readings also prefetches an equal part of the next block.
template <class E, class W>
inline void gemm_outputs_in_lanes_l1_blocks(size_t m, OutputsInLanes<E, W> p, Fetch fetch) {
  constexpr size_t kLanes = Vec<E>::kLanes;
  const size_t vectors = smaller(kPanelVectors, ceil_div(p.n, kLanes)), row_bytes = p.n * sizeof(W);
  const size_t readings = ceil_div(m, rows_beside(vectors)) * ceil_div(p.n, kPanelVectors * kLanes);
  size_t left = p.depth, blocks = left > 0 ? ceil_div(left * row_bytes, kL1BlockBytes<E>) : 1;
  bool streams = readings > 0 && fetch.each > 0 && fetch.lines == 0;  // whether `fetch` is rows_ahead()
  if (fetch.each > 0) fetch = lines_apart(fetch.at, fetch.lines, kCacheLine);
  // Each time a block is read, one cache line of each row of the next block is prefetched. If a block is read
  // fewer times than a row has cache lines, only part of the next block can be prefetched in this way. In
  // this case, the code prefetches nothing and relies on the hardware. The hardware prefetches best in blocks
  // of 6 KB: on a Zen 4, products with 4 rows are a quarter faster in blocks of 6 KB than in blocks of 12 KB.
  // A panel that is read only once needs no blocks.
  if (streams && readings * kCacheLine < row_bytes) {
    streams = false;
    fetch = Fetch::none();
    blocks = readings == 1 ? 1 : 4 * blocks;
  }
  const size_t rows = ceil_div(left, blocks);
  do {  // if `depth` is 0, the only iteration sets `c` to zero
    p.depth = smaller(left, rows);
    left -= p.depth;
    const W* next = p.w + p.depth * p.w_stride;
    if (streams) fetch = lines_apart(next, readings * p.depth, ceil_div(row_bytes, readings));
    gemm_outputs_in_lanes_groups<E, W, kPanelVectors>(m, p, fetch);
    p.a.data += p.depth * p.a.step_stride;
    p.w = next;
    p.accumulate = true;
  } while (left > 0);
}

template <class E, class W>
void gemm_outputs_in_lanes(size_t m, size_t n, size_t depth, const Strided<E>& a, const W* w, size_t w_stride,
                           Sum<E>* c, size_t c_stride, bool accumulate, const Fetch& following) {
  const OutputsInLanes<E, W> p{n, depth, a, w, w_stride, c, c_stride, accumulate};
  Fetch fetch = following;
  if constexpr (kL1BlockBytes<E> > 0)
    if (w_stride == n && n > kOutputVectors * Vec<E>::kLanes)
      return gemm_outputs_in_lanes_l1_blocks(m, p, fetch);
  gemm_outputs_in_lanes_groups<E, W, kOutputVectors>(m, p, fetch);
}

// ---- merge: adds the product a w to c ----

// If `streams` is set, the code prefetches `c`, up to kPanelsAhead panels ahead of the panel that it
// computes. The code prefetches into L2 instead of L1. If the distance between the rows of `c` is a multiple
// of 4 KB, the rows evict each other from L1.
inline constexpr size_t kPanelsAhead = 8;

// Computes kRows rows of `c` in the columns of `count` full panels, tile by tile. If `streams` is set, each
// step along the depth prefetches one row of a later tile of `c`. If all rows of the later tile were
// prefetched at once, the requests would wait for each other. The depth is the rank, and with a small rank a
// tile has too few steps to hide this wait. For the last panels, the later tile belongs to the next kRows
// rows of `c`. The sizes are template parameters so that tests/inner_loops.py can read them in the function's
// name.
template <class T, size_t kRows, size_t kVectors>
inline void merge_tiles(size_t count, size_t depth, const T* a, const T* panels, T* c, size_t c_stride,
                        bool streams) {
  constexpr size_t kLanes = Vec<T>::kLanes, kGroup = kVectors * kLanes;
  static_assert(kPanelColumns % kGroup == 0);
  const size_t ahead = smaller(count, kPanelsAhead);
  // The distance from the end of the last full panel to the start of the next kRows rows, in elements.
  const size_t to_next_rows = kRows * c_stride - count * kPanelColumns;
  for (; count > 0; --count, panels += depth * kPanelColumns)
    for (size_t j = 0; j < kPanelColumns; j += kGroup, c += kGroup) {
      Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 16
      for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) acc[i][v] = Vec<T>::load(c + i * c_stride + v * kLanes);
      const T* next = c + ahead * kPanelColumns + (count > ahead ? 0 : to_next_rows);
      size_t to_fetch = streams ? kRows : 0;
      const auto fetch_row = [&]() __attribute__((always_inline)) {
        if (to_fetch == 0) return;
        --to_fetch;
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v)
          if (v * sizeof(Vec<T>) % kCacheLine == 0) __builtin_prefetch(next + v * kLanes, 0, 2);
        next += c_stride;
      };
      const T* b = panels + j;
      for (size_t k = 0; k < depth; ++k, b += kPanelColumns) {
        fetch_row();
        Vec<T> w[kVectors];
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) w[v] = Vec<T>::load(b + v * kLanes);
#pragma GCC unroll 16
        for (size_t i = 0; i < kRows; ++i) {
          const auto x = Vec<T>::broadcast(a[i * depth + k]);
#pragma GCC unroll 4
          for (size_t v = 0; v < kVectors; ++v) acc[i][v] = fma(x, w[v], acc[i][v]);
        }
      }
      while (to_fetch > 0) fetch_row();
#pragma GCC unroll 16
      for (size_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) acc[i][v].store(c + i * c_stride + v * kLanes);
    }
}

template <class T>
void merge(size_t m, size_t n, size_t depth, const T* a, const T* panels, T* c, size_t c_stride,
           bool streams) {
  for (size_t rows; m > 0; m -= rows, a += rows * depth, c += rows * c_stride) {
    rows = smaller(m, kTileTokens);
    const size_t full = rows == kTileTokens ? n / kPanelColumns : 0;
    merge_tiles<T, kTileTokens, kOutputVectors>(full, depth, a, panels, c, c_stride, streams);
    for (size_t j = full * kPanelColumns; j < n; j += kPanelColumns) {
      const size_t width = smaller(n - j, kPanelColumns);
      gemm_outputs_in_lanes<T, T>(rows, width, depth, {a, depth, 1}, panels + j * depth, width, c + j,
                                  c_stride, true, Fetch::none());
    }
  }
}

// ---- transposes into and out of the SIMD lanes ----

// Transposes `x` (rows, cols) into `xt` (cols, n_lanes). If there are fewer rows than lanes, the other lanes
// are set to zero. The hardware prefetcher cannot follow all rows of `x`, so the code prefetches each row,
// kAhead columns ahead of the columns that it reads. When the code reads the last kAhead columns, it
// prefetches the first columns of the next n_lanes rows.
template <class T>
void to_lanes(size_t n_lanes, size_t rows, size_t cols, const T* x, size_t x_stride, T* xt) {
  constexpr size_t kLanes = Vec<T>::kLanes, kAhead = 8 * kCacheLine / sizeof(T);
  for (size_t c = 0; c < cols; c += kLanes) {
    const size_t width = smaller(cols - c, kLanes);
    const size_t ahead = c + kAhead < cols ? kAhead : n_lanes * x_stride + kAhead - cols;
    for (size_t first = 0; first < n_lanes; first += kLanes) {
      Vec<T> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        const T* p = x + (first + i) * x_stride + c;
        __builtin_prefetch(p + ahead, 0, 2);
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

// Transposes `yt` (cols, n_lanes) into `y` (rows, cols) and adds `bias` (cols) if it is not null.
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

// Transposes `x` (rows, cols) into `xt` (cols, rows).
template <class T>
void transpose(size_t rows, size_t cols, const T* x, size_t x_stride, T* xt, size_t xt_stride) {
  constexpr size_t kLanes = Vec<T>::kLanes;
  for (size_t r = 0; r < rows; r += kLanes)
    for (size_t c = 0; c < cols; c += kLanes) {
      const size_t height = smaller(rows - r, kLanes), width = smaller(cols - c, kLanes);
      const T* from = x + r * x_stride + c;
      T* to = xt + c * xt_stride + r;
      Vec<T> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        block[i] = i >= height       ? Vec<T>::zero()
                   : width == kLanes ? Vec<T>::load(from + i * x_stride)
                                     : Vec<T>::load_partial(from + i * x_stride, width);
      transpose(block);
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        if (i >= width) break;
        if (height == kLanes)
          block[i].store(to + i * xt_stride);
        else
          block[i].store_partial(to + i * xt_stride, height);
      }
    }
}

// Measures the peak speed. A fused multiply-add has a latency of 4 cycles, and two of them can start in each
// cycle. So at least 8 independent sums are needed. The code uses 12 sums.
template <class E>
double peak(size_t iterations) {
  constexpr size_t kSums = 12, kLanes = Vec<E>::kLanes;
  alignas(64) E operand[kLanes] = {};
  const E* at = operand;
  keep(at);  // hides the operand from the compiler, so that every product is computed
  const Vec<E> x = Vec<E>::load(at);
  const auto factor = Vec<E>::broadcast(*at);
  Vec<Sum<E>> sums[kSums];
#pragma GCC unroll 12
  for (size_t i = 0; i < kSums; ++i) sums[i] = Vec<Sum<E>>::broadcast(Sum<E>(i));
  for (size_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 12
    for (size_t i = 0; i < kSums; ++i)
      if constexpr (kValuesPerElement<E> == 1)
        sums[i] = fma(sums[i], factor, x);  // no two sums are equal, so each must be computed
      else
        sums[i] = fma(x, factor, sums[i]);
  }
  Vec<Sum<E>> total = sums[0];
#pragma GCC unroll 12
  for (size_t i = 1; i < kSums; ++i) total = total + sums[i];
  Sum<E> lanes[Vec<Sum<E>>::kLanes];
  total.store(lanes);
  __asm__ volatile("" : : "m"(lanes));  // uses the sums, so that the compiler keeps the products
  return 2.0 * double(iterations) * double(kSums * kLanes * kValuesPerElement<E>);
}

}  // namespace nplora::kernels::NPLORA_ISA
