// Products of bfloat16 pairs in the tile registers of AMX (simd/tile_registers.h). Each kernel is documented
// in kernel_table.h.
//
// Six of the eight registers hold tiles of sums, which form a grid: 2 x 3 tiles (rows x columns) in
// gemm_outputs_in_lanes, and 3 x 2 tiles in gemm_tokens_in_lanes. The other two registers hold a tile of the
// first operand `a` and a tile of the second operand `b`. A step covers up to kTileSide pairs along the
// depth, and adds their products to all six tiles of sums. A step needs seven loads of 8 cycles and six
// products of 16 cycles. For each output, the products of a step are summed first, and then this sum is added
// to the sum of the earlier steps. Subnormal numbers count as zero.

namespace nplora::kernels::NPLORA_ISA {

inline constexpr int kA = 6, kB = 7;

// Sets the shapes of the tile registers. The six tiles of sums get the shape (rows, columns), the tile of `a`
// gets (rows, steps), and the tile of `b` gets (steps, columns). Here, `steps` is a number of pairs along the
// depth.
inline void set_shapes(size_t rows, size_t columns, size_t steps) {
  TileShapes shapes;
  for (int tile = 0; tile < kA; ++tile) shapes.set(tile, rows, columns);
  shapes.set(kA, rows, steps);
  shapes.set(kB, steps, columns);
  set_tile_shapes(shapes);
}

// Calls `body<row, column>()` for each tile of sums, row by row.
template <int kRows, int kColumns, int kNth = 0, class Body>
inline void for_sums(const Body& body) {
  if constexpr (kNth < kRows * kColumns) {
    body.template operator()<kNth / kColumns, kNth % kColumns>();
    for_sums<kRows, kColumns, kNth + 1>(body);
  }
}

template <int kRows, int kColumns>
inline void load_sums(const float* c, size_t c_stride, bool accumulate) {
  for_sums<kRows, kColumns>([&]<int kRow, int kColumn>() __attribute__((always_inline)) {
    constexpr int kSum = kRow * kColumns + kColumn;
    if (accumulate)
      load_tile<kSum>(c + kRow * kTileSide * c_stride + kColumn * kTileSide, c_stride);
    else
      zero_tile<kSum>();
  });
}
template <int kRows, int kColumns>
inline void store_sums(float* c, size_t c_stride) {
  for_sums<kRows, kColumns>([&]<int kRow, int kColumn>() __attribute__((always_inline)) {
    store_tile<kRow * kColumns + kColumn>(c + kRow * kTileSide * c_stride + kColumn * kTileSide, c_stride);
  });
}

// Adds the product of `a` and `b` to all sums. Rows of tiles with an odd index are processed from the last
// column to the first. So each row of tiles begins with the column that the previous row ended with, and the
// tile of `b` for this column is still loaded.
template <int kRows, int kColumns>
inline void tile_step(const Bf16Pair* a, size_t a_stride, const Bf16Pair* b, size_t b_stride) {
  for_sums<kRows, kColumns>([&]<int kRow, int kNth>() __attribute__((always_inline)) {
    constexpr int kColumn = kRow % 2 ? kColumns - 1 - kNth : kNth;
    if (kNth == 0) load_tile<kA>(a + kRow * kTileSide * a_stride, a_stride);
    if (kRow == 0 || kNth > 0) load_tile<kB>(b + kColumn * kTileSide, b_stride);
    multiply_tiles<kRow * kColumns + kColumn, kA, kB>();
  });
}

// A copy of the operands of a step. The copy is needed in two cases. In the first case, the elements of a row
// of `a` are not contiguous in memory, so they cannot be loaded as a tile. In the second case, fewer pairs
// are left than a step covers; the rest of the copy is filled with zeros.
struct CopiedStep {
  alignas(64) Bf16Pair a[kPanelColumns * kTileSide];
  alignas(64) Bf16Pair b[kTileSide * kPanelColumns];

  // Copies the first end - first elements of each row of `from` to the columns [first, end) of `a`, and sets
  // the later columns to zero.
  void copy_a(size_t rows, size_t first, size_t end, const Strided<Bf16Pair>& from) {
    for (size_t i = 0; i < rows; ++i) {
      Bf16Pair* to = a + i * kTileSide;
      const Bf16Pair* row = from.data + i * from.row_stride;
      if (from.step_stride == 1)
        Vec<Bf16Pair>::load_partial(row, end - first).store_partial(to + first, kTileSide - first);
      else
        for (size_t k = first; k < kTileSide; ++k)
          to[k] = k < end ? row[(k - first) * from.step_stride] : Bf16Pair(0);
    }
  }
  void copy_b(size_t depth, size_t columns, const Bf16Pair* from, size_t stride) {
    for (size_t k = 0; k < kTileSide; ++k)
      for (size_t j = 0; j < columns; ++j)
        b[k * kPanelColumns + j] = k < depth ? from[k * stride + j] : Bf16Pair(0);
  }
};

// ---- gemm_outputs_in_lanes: the product c = a w ----

struct OutputTiles {
  size_t depth;
  Strided<Bf16Pair> a;
  const Bf16Pair* w;
  size_t w_stride;
  float* c;
  size_t c_stride;
  bool accumulate;

  // Returns the number of pairs in a step. If the whole depth is less than kTileSide, as for a small rank,
  // one shorter step covers the whole depth. If the elements of a row of `a` are not contiguous, steps always
  // have kTileSide pairs, because CopiedStep pads them.
  size_t steps() const { return a.step_stride == 1 && 0 < depth && depth < kTileSide ? depth : kTileSide; }
};

// Computes kRows x kColumns tiles of `c`. Each tile has the shape (rows, columns), which the caller must have
// set with set_shapes. `rows` must be kTileSide if kRows is above 1, and `columns` must be kTileSide if
// kColumns is above 1.
template <int kRows, int kColumns>
inline void output_tiles(size_t rows, size_t columns, OutputTiles p) {
  const auto advance = [&p](size_t steps) {
    p.depth -= steps;
    p.a.data += steps * p.a.step_stride;
    p.w += steps * p.w_stride;
  };
  load_sums<kRows, kColumns>(p.c, p.c_stride, p.accumulate);
  if (p.a.step_stride == 1)
    for (const size_t steps = p.steps(); p.depth >= steps; advance(steps))
      tile_step<kRows, kColumns>(p.a.data, p.a.row_stride, p.w, p.w_stride);
  while (p.depth > 0) {
    const size_t all_rows = (kRows - 1) * kTileSide + rows,
                 all_columns = (kColumns - 1) * kTileSide + columns;
    const size_t steps = smaller(p.depth, kTileSide);
    CopiedStep step;
    step.copy_a(all_rows, 0, steps, p.a);
    step.copy_b(steps, all_columns, p.w, p.w_stride);
    tile_step<kRows, kColumns>(step.a, kTileSide, step.b, kPanelColumns);
    advance(steps);
  }
  store_sums<kRows, kColumns>(p.c, p.c_stride);
}

// Computes all `m` rows of `c`, in kColumns tiles of `columns` columns each.
template <int kColumns>
inline void output_rows(size_t m, size_t columns, OutputTiles p) {
  const auto advance = [&](size_t rows) {
    m -= rows;
    p.a.data += rows * p.a.row_stride;
    p.c += rows * p.c_stride;
  };
  if (m >= kTileSide) set_shapes(kTileSide, columns, p.steps());
  for (; m >= 2 * kTileSide; advance(2 * kTileSide)) output_tiles<2, kColumns>(kTileSide, columns, p);
  for (; m >= kTileSide; advance(kTileSide)) output_tiles<1, kColumns>(kTileSide, columns, p);
  if (m == 0) return;
  set_shapes(m, columns, p.steps());
  output_tiles<1, kColumns>(m, columns, p);
}

inline void gemm_outputs_in_lanes(size_t m, size_t n, size_t depth, const Strided<Bf16Pair>& a,
                                  const Bf16Pair* w, size_t w_stride, float* c, size_t c_stride,
                                  bool accumulate, const Fetch&) {
  OutputTiles p{depth, a, w, w_stride, c, c_stride, accumulate};
  const size_t full = n / kTileSide, rest = n % kTileSide;
  if (full == 3) output_rows<3>(m, kTileSide, p);
  if (full == 2) output_rows<2>(m, kTileSide, p);
  if (full == 1) output_rows<1>(m, kTileSide, p);
  p.w += full * kTileSide;
  p.c += full * kTileSide;
  if (rest > 0) output_rows<1>(m, rest, p);
  release_tiles();
}

// Does the same as gemm_outputs_in_lanes, but `w` holds single bfloat16 values. The function pairs
// kPairedRows rows of `w` at a time, and stores the pairs in a buffer that fits into L1.
inline constexpr size_t kPairedRows = 256;

inline void paired_gemm_outputs_in_lanes(size_t m, size_t n, size_t depth, const Strided<Bf16Pair>& a,
                                         const Bf16* w, size_t w_stride, float* c, size_t c_stride,
                                         bool accumulate, const Fetch&) {
  constexpr size_t kLanes = Vec<Bf16>::kLanes;
  alignas(64) Bf16Pair pairs[kPairedRows / 2 * kPanelColumns];
  size_t k = 0;
  do {  // if `depth` is 0, the only iteration sets `c` to zero
    const size_t rows = smaller(depth - k, kPairedRows);
    for (size_t i = 0; i < rows; i += 2)
      for (size_t j = 0; j < n; j += kLanes) {
        const Bf16* at = w + (k + i) * w_stride + j;
        const size_t count = smaller(n - j, kLanes);
        const auto second = i + 1 < rows ? Vec<Bf16>::load_partial(at + w_stride, count) : Vec<Bf16>::zero();
        Vec<Bf16Pair>::pair_rows(Vec<Bf16>::load_partial(at, count), second)
            .store(pairs + i / 2 * kPanelColumns + j);
      }
    gemm_outputs_in_lanes(m, n, (rows + 1) / 2, {a.data + k / 2 * a.step_stride, a.row_stride, a.step_stride},
                          pairs, kPanelColumns, c, c_stride, accumulate || k > 0, Fetch::none());
    k += rows;
  } while (k < depth);
}

// ---- gemm_tokens_in_lanes: the product yt = w xt ----

// Computes kRows x kColumns tiles of `yt`. Each tile has the shape (rows, kTileSide), where `rows` must be
// kTileSide if kRows is above 1. If `w` is in panels, every third step needs elements of `w` from two panels.
// Such a step copies these elements into a CopiedStep.
template <int kRows, int kColumns>
inline void token_tiles(size_t rows, size_t depth, const Panels<Bf16Pair>& w, const Bf16Pair* xt, float* yt,
                        bool accumulate) {
  constexpr size_t kLanes = kColumns * kTileSide, kPanel = kPanelDepth<Bf16Pair>, kHalf = kTileSide / 2;
  static_assert(kPanel == kTileSide + kHalf);
  const size_t all_rows = (kRows - 1) * kTileSide + rows;
  const auto at = [&w](size_t k) {
    return Strided<Bf16Pair>{w.data + k / kPanel * w.panel_stride + k % kPanel, w.row_stride, 1};
  };
  CopiedStep step;
  load_sums<kRows, kColumns>(yt, kLanes, accumulate);
  size_t k = 0;
  for (; k + kTileSide <= depth; k += kTileSide) {
    Strided<Bf16Pair> a = at(k);
    if (w.panel_stride != kPanel && k % kPanel == kTileSide) {
      step.copy_a(all_rows, 0, kHalf, a);
      step.copy_a(all_rows, kHalf, kTileSide, at(k + kHalf));
      a = {step.a, kTileSide, 1};
    }
    tile_step<kRows, kColumns>(a.data, a.row_stride, xt + k * kLanes, kLanes);
  }
  if (const size_t steps = depth - k) {
    const size_t first = smaller(steps, kHalf);
    step.copy_a(all_rows, 0, first, at(k));
    if (first < steps) step.copy_a(all_rows, first, steps, at(k + first));
    step.copy_b(steps, kLanes, xt + k * kLanes, kLanes);
    tile_step<kRows, kColumns>(step.a, kTileSide, step.b, kPanelColumns);
  }
  store_sums<kRows, kColumns>(yt, kLanes);
}

template <int kColumns>
inline void token_rows(size_t rows, size_t depth, Panels<Bf16Pair> w, const Bf16Pair* xt, float* yt,
                       bool accumulate) {
  const auto advance = [&](size_t done) {
    rows -= done;
    w.data += done * w.row_stride;
    yt += done * kColumns * kTileSide;
  };
  if (rows >= kTileSide) set_shapes(kTileSide, kTileSide, kTileSide);
  for (; rows >= 3 * kTileSide; advance(3 * kTileSide))
    token_tiles<3, kColumns>(kTileSide, depth, w, xt, yt, accumulate);
  for (; rows >= kTileSide; advance(kTileSide))
    token_tiles<1, kColumns>(kTileSide, depth, w, xt, yt, accumulate);
  if (rows == 0) return;
  set_shapes(rows, kTileSide, kTileSide);
  token_tiles<1, kColumns>(rows, depth, w, xt, yt, accumulate);
}

inline void gemm_tokens_in_lanes(size_t n_lanes, size_t rows, size_t depth, const Panels<Bf16Pair>& w,
                                 const Bf16Pair* xt, float* yt, bool accumulate) {
  n_lanes == kTileSide ? token_rows<1>(rows, depth, w, xt, yt, accumulate)
                       : token_rows<2>(rows, depth, w, xt, yt, accumulate);
  release_tiles();
}

// Measures the peak speed. Each iteration multiplies the tiles of `a` and `b` six times, once for each
// register that holds sums.
inline double peak(size_t iterations) {
  alignas(64) const Bf16Pair operand[kTileSide * kTileSide] = {};
  set_shapes(kTileSide, kTileSide, kTileSide);
  load_tile<kA>(operand, kTileSide);
  load_tile<kB>(operand, kTileSide);
  for_sums<2, 3>([&]<int kRow, int kColumn>() { zero_tile<kRow * 3 + kColumn>(); });
  for (size_t k = 0; k < iterations; ++k)
    for_sums<2, 3>([&]<int kRow, int kColumn>()
                       __attribute__((always_inline)) { multiply_tiles<kRow * 3 + kColumn, kA, kB>(); });
  release_tiles();
  return 2.0 * double(iterations) * 6.0 * double(kTileSide * kTileSide * 2 * kTileSide);
}

}  // namespace nplora::kernels::NPLORA_ISA
