#include "ops/lora.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "base/parallel.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::kSteps;
using kernels::Panels;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;
using kernels::Tiles;

namespace {

// Blocking. None of these numbers changes a result: every sum runs over its whole depth in order.

// 240 columns x 32 lanes of floats = 30 KB: the lanes of x that stay in L1 ...
constexpr size_t kDepthBlock = 5 * kPanelColumns;
// ... while so many rows of W pass by. A multiple of every tile_rows.
constexpr size_t kRowBlock = 48;
// Tokens that one task keeps in L2 or L3, as long as their lanes take no more than kLanesBytes.
constexpr size_t kTokenBlock = 256, kLanesBytes = size_t{2} << 20;
// Batches up to this size take the path that transposes nothing, in passes of kDotParts outputs: 4096 x 16 lanes of floats =
// 256 KB of partial sums, which stay in L2.
constexpr size_t kDotTokens = 8, kDotParts = 4096;
// Rows of a panel of W that the backward product keeps in L2: 512 x 48 floats = 96 KB.
constexpr size_t kOuterDepth = 512;
// Columns of a gradient of A or B that one task owns, and tokens that it sums in one pass over them.
constexpr size_t kColumnBlock = 4 * kPanelColumns, kSumDepth = 128;

size_t ceil_div(size_t a, size_t b) {
  return (a + b - 1) / b;
}
size_t round_up(size_t a, size_t b) {
  return ceil_div(a, b) * b;
}

struct Range {
  size_t first, count;
};

// Part i of n items in blocks of `block`.
Range part(size_t n, size_t block, size_t i) {
  return {i * block, std::min(block, n - i * block)};
}

// A grid of tasks over tokens and over columns or rows of W. Tokens are split first; W is split too where
// that leaves threads without work (then each task of a token block repeats the little work that belongs to
// its tokens).
struct Grid {
  size_t token_block, token_parts, w_block, w_parts;

  Grid(size_t tokens, size_t lanes, size_t most_tokens, size_t w_size, size_t w_unit, size_t threads) {
    const size_t share = round_up(ceil_div(tokens, threads), lanes);
    token_block = std::max(lanes, std::min(most_tokens, threads > 1 ? std::max(share, 2 * lanes) : share));
    token_parts = ceil_div(tokens, token_block);
    const size_t wanted = token_parts >= threads ? 1 : ceil_div(2 * threads, token_parts);
    w_block = std::max(w_unit, round_up(ceil_div(w_size, wanted), w_unit));
    w_parts = std::max<size_t>(1, ceil_div(w_size, w_block));
  }
  size_t tasks() const { return token_parts * w_parts; }
  size_t token_part(size_t task) const { return task / w_parts; }
  size_t w_part(size_t task) const { return task % w_parts; }
};

double flops(double n, double d_out, double d_in) {
  return 2 * n * d_out * d_in;
}

template <class T>
void drop_rows(const Products<T>& k, const LowRank<T>& low, size_t first_row, size_t first_col, size_t width,
               Matrix<const T> x, T* out, size_t out_stride) {
  const Mask mask = mask_of(low.dropout);
  for (size_t i = 0; i < x.rows; ++i)
    k.dropout(x.cols, low.key, (first_row + i) * width + first_col, mask.threshold, T(mask.factor), x.row(i),
              out + i * out_stride);
}

// The elements of E that n steps of a depth fill.
template <class E>
size_t depth_of(size_t n) {
  return ceil_div(n, kSteps<E>);
}

// xt (depth, n_lanes) = x (rows, cols) transposed, in elements E.
template <class E>
void lanes_of(const Products<Sum<E>>& k, size_t n_lanes, Matrix<const Sum<E>> x, E* xt) {
  if constexpr (kSteps<E> == 1) {
    k.to_lanes(n_lanes, x.rows, x.cols, x.data, x.stride, xt);
  } else {
    float* chunk = scratch<float>(Scratch::kPairing, kPanelColumns * n_lanes);
    for (size_t c = 0; c < x.cols; c += kPanelColumns) {
      const size_t cols = std::min(kPanelColumns, x.cols - c);
      k.to_lanes(n_lanes, x.rows, cols, x.data + c, x.stride, chunk);
      kernels::table().convert.pair_rows(cols, n_lanes, chunk, n_lanes, xt + c / 2 * n_lanes);
    }
  }
}

// Row-major m (rows, cols) in elements E along its rows, an odd end paired with zero; converted into out, or as it is.
template <class E>
Strided<E> elements_of(Matrix<const Sum<E>> m, Scratch use) {
  if constexpr (kSteps<E> == 1) {
    return {m.data, m.stride, 1};
  } else {
    const size_t depth = depth_of<E>(m.cols);
    E* out = scratch<E>(use, m.rows * depth);
    for (size_t i = 0; i < m.rows; ++i) {
      if (m.cols % 2) out[(i + 1) * depth - 1] = E(0);
      kernels::table().convert.narrow_bfloat16(m.cols, m.row(i),
                                               reinterpret_cast<uint16_t*>(out + i * depth));
    }
    return {out, depth, 1};
  }
}

// One task of the forward product: tokens x rows of W, computed in elements E. The update z Aᵀ is added in the type of the sums.
template <class E>
class ForwardTask {
 public:
  using T = Sum<E>;

  ForwardTask(const WeightView& w, Matrix<const T> x, const LowRank<T>& low, const T* bias, Matrix<T> y,
              Matrix<T> z)
      : w_(w),
        x_(x),
        low_(low),
        bias_(bias),
        y_(y),
        z_(z),
        k_(kernels::table().products<T>()),
        tiles_(kernels::table().tiles<E>()),
        lanes_(x.rows <= tiles_.lanes / 2 ? tiles_.lanes / 2 : tiles_.lanes),
        depth_(depth_of<E>(w.d_in)) {}

  size_t lanes() const { return lanes_; }

  void operator()(Range tokens, Range rows) const {
    const size_t blocks = ceil_div(tokens.count, lanes_), rank = low_.active() ? low_.a.cols : 0;
    E* xt = scratch<E>(Scratch::kLanesIn, blocks * depth_ * lanes_);
    T* zt = scratch<T>(Scratch::kLanesLow, blocks * rank * lanes_);
    T* yt = scratch<T>(Scratch::kLanesOut, blocks * kRowBlock * lanes_);
    const Strided<E> factor = rank ? elements_of<E>(low_.b, Scratch::kLowRank) : Strided<E>{};
    for (size_t b = 0; b < blocks; ++b) {
      const Range block = token_block(tokens, b);
      E* lanes = xt + b * depth_ * lanes_;
      lanes_of<E>(k_, lanes_, x_rows(block), lanes);
      if (rank) project(block, factor, lanes, zt + b * rank * lanes_, rows.first == 0);
    }
    for (size_t r = 0; r < rows.count; r += kRowBlock) {
      const Range group{rows.first + r, std::min(kRowBlock, rows.count - r)};
      frozen(group, blocks, xt, yt);
      for (size_t b = 0; b < blocks; ++b) {
        T* out = yt + b * kRowBlock * lanes_;
        if (rank)
          k_.lane_tile(lanes_, group.count, rank, {low_.a.row(group.first), low_.a.stride, kPanelColumns},
                       zt + b * rank * lanes_, out, w_.d_in > 0);
        else if (w_.d_in == 0)
          std::fill_n(out, group.count * lanes_, T(0));
        const Range block = token_block(tokens, b);
        k_.from_lanes(lanes_, block.count, group.count, out, bias_ ? bias_ + group.first : nullptr,
                      y_.row(block.first) + group.first, y_.stride);
      }
    }
  }

 private:
  Range token_block(Range tokens, size_t b) const {
    const Range block = part(tokens.count, lanes_, b);
    return {tokens.first + block.first, block.count};
  }

  Matrix<const T> x_rows(Range tokens) const {
    return {x_.row(tokens.first), tokens.count, x_.cols, x_.stride};
  }

  // zt (r, lanes) = scale * B drop(x)ᵀ for one block of tokens; z (tokens, r) without the scale.
  void project(Range tokens, Strided<E> factor, const E* xt, T* zt, bool keep) const {
    const size_t rank = low_.b.rows;
    if (low_.dropout > 0) {
      T* dropped = scratch<T>(Scratch::kDropped, tokens.count * w_.d_in);
      E* lanes = scratch<E>(Scratch::kDroppedLanes, depth_ * lanes_);
      drop_rows(k_, low_, tokens.first, 0, w_.d_in, x_rows(tokens), dropped, w_.d_in);
      lanes_of<E>(k_, lanes_, {dropped, tokens.count, w_.d_in, w_.d_in}, lanes);
      xt = lanes;
    }
    tiles_.lane_tile(lanes_, rank, depth_, {factor.data, factor.row_stride, kPanelColumns / kSteps<E>}, xt,
                     zt, false);
    if (keep) k_.from_lanes(lanes_, tokens.count, rank, zt, nullptr, z_.row(tokens.first), z_.stride);
    for (size_t i = 0; i < rank * lanes_; ++i) zt[i] *= T(low_.scale);
  }

  // yt (blocks, kRowBlock, lanes) = W[rows] xt for all blocks of tokens.
  void frozen(Range rows, size_t blocks, const E* xt, T* yt) const {
    E* decoded = scratch<E>(Scratch::kWeight, kRowBlock * kDepthBlock);
    const size_t full = full_columns(w_.d_in);
    for (size_t col = 0; col < w_.d_in;) {
      const size_t cols = std::min(kDepthBlock, (col < full ? full : w_.d_in) - col);
      const Panels<E> panels = block(w_, rows.first, rows.count, col, cols, decoded);
      for (size_t b = 0; b < blocks; ++b)
        tiles_.lane_tile(lanes_, rows.count, depth_of<E>(cols), panels,
                         xt + (b * depth_ + col / kSteps<E>)*lanes_, yt + b * kRowBlock * lanes_, col > 0);
      col += cols;
    }
  }

  const WeightView& w_;
  Matrix<const T> x_;
  const LowRank<T>& low_;
  const T* bias_;
  Matrix<T> y_, z_;
  const Products<T>& k_;
  const Tiles<E>& tiles_;
  size_t lanes_, depth_;
};

// One task of the forward product of a small batch: rows of W, read once and in the order they lie in.
template <class T>
class SmallForwardTask {
 public:
  SmallForwardTask(const WeightView& w, Matrix<const T> x, const LowRank<T>& low, const T* bias, Matrix<T> y,
                   Matrix<T> z)
      : w_(w),
        x_(x),
        low_(low),
        bias_(bias),
        y_(y),
        z_(z),
        k_(kernels::table().products<T>()),
        lanes_(k_.lanes / 2) {}

  // Rows of W that one pass takes.
  size_t group() const { return kDotParts / x_.rows; }

  void operator()(Range rows) const {
    const size_t rank = low_.active() ? low_.a.cols : 0;
    T* part = scratch<T>(Scratch::kLanesOut, x_.rows * group() * lanes_);
    T* scaled = scratch<T>(Scratch::kLanesLow, x_.rows * rank);
    if (rank) project(part, scaled, rows.first == 0);
    for (size_t r = 0; r < rows.count; r += group()) {
      const Range pass{rows.first + r, std::min(group(), rows.count - r)};
      frozen(pass, part);
      if (rank)
        add_dots(low_.a.row(pass.first), low_.a.stride, pass.count, rank, scaled, rank, part, w_.d_in > 0);
      if (!rank && w_.d_in == 0) std::fill_n(part, x_.rows * pass.count * lanes_, T(0));
      k_.sum_parts(x_.rows, pass.count, part, bias_ ? bias_ + pass.first : nullptr, y_.data + pass.first,
                   y_.stride);
    }
  }

 private:
  // part (m, rows, lanes) = [part +] w (rows, cols) * x (m, cols) for a row-major w.
  void add_dots(const T* w, size_t w_stride, size_t rows, size_t cols, const T* x, size_t x_stride, T* part,
                bool accumulate) const {
    for (size_t c = 0; c < cols; c += kPanelColumns)
      k_.dot_panel(x_.rows, rows, std::min(kPanelColumns, cols - c), w + c, w_stride, x + c, x_stride, part,
                   accumulate || c > 0);
  }

  void frozen(Range rows, T* part) const {
    T* decoded = scratch<T>(Scratch::kWeight, rows.count * kPanelColumns);
    for (size_t c = 0; c < w_.d_in; c += kPanelColumns) {
      const size_t width = std::min(kPanelColumns, w_.d_in - c);
      const Panels<T> panel = block(w_, rows.first, rows.count, c, width, decoded);
      k_.dot_panel(x_.rows, rows.count, width, panel.data, panel.row_stride, x_.data + c, x_.stride, part,
                   c > 0);
    }
  }

  // scaled (m, r) = scale * drop(x) Bᵀ; z without the scale.
  void project(T* part, T* scaled, bool keep) const {
    const size_t rank = low_.b.rows;
    Matrix<const T> x = x_;
    if (low_.dropout > 0) {
      T* dropped = scratch<T>(Scratch::kDropped, x.rows * w_.d_in);
      drop_rows(k_, low_, 0, 0, w_.d_in, x_, dropped, w_.d_in);
      x = {dropped, x_.rows, w_.d_in, w_.d_in};
    }
    for (size_t j = 0; j < rank; j += group()) {
      const size_t rows = std::min(group(), rank - j);
      if (w_.d_in == 0) std::fill_n(part, x_.rows * rows * lanes_, T(0));
      add_dots(low_.b.row(j), low_.b.stride, rows, w_.d_in, x.data, x.stride, part, false);
      k_.sum_parts(x_.rows, rows, part, nullptr, scaled + j, rank);
    }
    for (size_t t = 0; t < x_.rows && keep; ++t) std::copy_n(scaled + t * rank, rank, z_.row(t));
    for (size_t i = 0; i < x_.rows * rank; ++i) scaled[i] *= T(low_.scale);
  }

  const WeightView& w_;
  Matrix<const T> x_;
  const LowRank<T>& low_;
  const T* bias_;
  Matrix<T> y_, z_;
  const Products<T>& k_;
  size_t lanes_;
};

// dz (n, r) = scale * dy A for the rows of dy given.
template <class T>
void project_back(const Products<T>& k, Matrix<const T> dy, const LowRank<T>& low, T* dz) {
  const size_t rank = low.a.cols;
  for (size_t j = 0; j < rank; j += kPanelColumns)
    k.outer_tile(dy.rows, std::min(kPanelColumns, rank - j), dy.cols, {dy.data, dy.stride, 1}, low.a.data + j,
                 low.a.stride, dz + j, rank, false);
  for (size_t i = 0; i < dy.rows * rank; ++i) dz[i] *= T(low.scale);
}

// dx (n, cols) = dy W[:, cols] for the columns given, first a multiple of kPanelColumns; computed in elements E.
template <class E>
void frozen_back(const WeightView& w, Matrix<const Sum<E>> dy, Range cols, Matrix<Sum<E>> dx) {
  const Tiles<E>& tiles = kernels::table().tiles<E>();
  E* decoded = scratch<E>(Scratch::kWeight, kOuterDepth * kPanelColumns);
  const Strided<E> rows = elements_of<E>(dy, Scratch::kLanesIn);
  for (size_t c = 0; c < cols.count; c += kPanelColumns) {
    const size_t width = std::min(kPanelColumns, cols.count - c);
    for (size_t o = 0; o < w.d_out; o += kOuterDepth) {
      const size_t depth = std::min(kOuterDepth, w.d_out - o);
      const Panel<E> panel = column_block(w, o, depth, cols.first + c, width, decoded);
      tiles.outer_tile(dy.rows, width, depth_of<E>(depth), {rows.data + o / kSteps<E>, rows.row_stride, 1},
                       panel.data, panel.row_stride, dx.data + cols.first + c, dx.stride, o > 0);
    }
  }
}

// dx (n, cols) += undrop(dz B[:, cols]);   first_row is the place of dx's first row in the whole batch.
template <class T>
void low_rank_back(const Products<T>& k, const LowRank<T>& low, const T* dz, size_t first_row, Range cols,
                   Matrix<T> dx) {
  const size_t rank = low.b.rows;
  const auto product = [&](Range rows, size_t c, T* out, size_t stride, bool accumulate) {
    k.outer_tile(rows.count, std::min(kPanelColumns, cols.count - c), rank, {dz + rows.first * rank, rank, 1},
                 low.b.data + cols.first + c, low.b.stride, out, stride, accumulate);
  };
  if (low.dropout == 0) {
    for (size_t c = 0; c < cols.count; c += kPanelColumns)
      product({0, dx.rows}, c, dx.data + cols.first + c, dx.stride, true);
    return;
  }
  T* update = scratch<T>(Scratch::kDropped, k.tile_tokens * cols.count);
  for (size_t i = 0; i < dx.rows; i += k.tile_tokens) {
    const Range rows = {i, std::min(k.tile_tokens, dx.rows - i)};
    for (size_t c = 0; c < cols.count; c += kPanelColumns) product(rows, c, update + c, cols.count, false);
    drop_rows<T>(k, low, first_row + i, cols.first, low.b.cols, {update, rows.count, cols.count, cols.count},
                 update, cols.count);
    for (size_t j = 0; j < rows.count; ++j)
      for (size_t c = 0; c < cols.count; ++c) dx.row(i + j)[cols.first + c] += update[j * cols.count + c];
  }
}

// out (p, q)[:, cols] += aᵀ b[:, cols], in passes over kSumDepth tokens that keep the rows of b in cache.   a
// (n, p), b (n, q). low: b is dropped on the way.
template <class T>
void sum_columns(const Products<T>& k, Matrix<const T> a, Matrix<const T> b, const LowRank<T>* low,
                 Range cols, T* out, size_t out_stride) {
  for (size_t n = 0; n < a.rows; n += kSumDepth) {
    const size_t depth = std::min(kSumDepth, a.rows - n);
    const T* from = b.row(n) + cols.first;
    size_t stride = b.stride;
    if (low) {
      T* dropped = scratch<T>(Scratch::kDropped, kSumDepth * kColumnBlock);
      drop_rows(k, *low, n, cols.first, b.cols, {from, depth, cols.count, b.stride}, dropped, kColumnBlock);
      from = dropped;
      stride = kColumnBlock;
    }
    for (size_t c = 0; c < cols.count; c += kPanelColumns)
      k.outer_tile(a.cols, std::min(kPanelColumns, cols.count - c), depth, {a.row(n), 1, a.stride}, from + c,
                   stride, out + c, out_stride, true);
  }
}

// da (d_out, r)[rows] += scale * dy[:, rows]ᵀ z, by way of its transpose.
template <class T>
void add_da(const Products<T>& k, Matrix<const T> dy, Matrix<const T> z, double scale, Range rows,
            Matrix<T> da) {
  T* sum = scratch<T>(Scratch::kLanesOut, z.cols * kColumnBlock);
  std::fill_n(sum, z.cols * kColumnBlock, T(0));
  sum_columns<T>(k, z, dy, nullptr, rows, sum, kColumnBlock);
  for (size_t o = 0; o < rows.count; ++o)
    for (size_t j = 0; j < z.cols; ++j) da.row(rows.first + o)[j] += T(scale) * sum[j * kColumnBlock + o];
}

}  // namespace

Mask mask_of(double probability) {
  return {static_cast<uint32_t>(std::floor(probability * 4294967296.0)), 1 / (1 - probability)};
}

namespace {

template <class E>
void forward_in_lanes(const ForwardTask<E>& task, const WeightView& w, size_t tokens, size_t threads) {
  const size_t most = kLanesBytes / sizeof(E) / std::max<size_t>(1, depth_of<E>(w.d_in));
  const size_t token_block = std::clamp(most / task.lanes() * task.lanes(), 2 * task.lanes(), kTokenBlock);
  const Grid grid(tokens, task.lanes(), token_block, w.d_out, kRowBlock, threads);
  parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
    task(part(tokens, grid.token_block, grid.token_part(i)), part(w.d_out, grid.w_block, grid.w_part(i)));
  });
}

}  // namespace

template <class T>
void lora_forward(const WeightView& w, Matrix<const T> x, const LowRank<T>& low, const T* bias, Matrix<T> y,
                  Matrix<T> z) {
  for (size_t i = 0; i < z.rows && !low.active(); ++i) std::fill_n(z.row(i), z.cols, T(0));
  if (x.rows == 0) return;
  const size_t threads = useful_threads(flops(double(x.rows), double(w.d_out), double(w.d_in)));
  if (x.rows <= kDotTokens) {
    const SmallForwardTask<T> task(w, x, low, bias, y, z);
    const Grid grid(1, 1, 1, w.d_out, kRowBlock, threads);
    return parallel_for(grid.tasks(), threads, Interruptible::kYes,
                        [&](size_t i) { task(part(w.d_out, grid.w_block, i)); });
  }
  if constexpr (std::is_same_v<T, float>)
    if (w.compute == Compute::kBfloat16)
      return forward_in_lanes(ForwardTask<Bf16Pair>(w, x, low, bias, y, z), w, x.rows, threads);
  forward_in_lanes(ForwardTask<T>(w, x, low, bias, y, z), w, x.rows, threads);
}

template <class T>
void lora_backward(const WeightView& w, Matrix<const T> dy, Matrix<const T> x, Matrix<const T> z,
                   const LowRank<T>& low, Matrix<T> dx, Matrix<T> da, Matrix<T> db) {
  if (dy.rows == 0) return;
  const Products<T>& k = kernels::table().products<T>();
  const size_t rank = low.active() ? low.a.cols : 0;
  const bool need_dz = rank && (dx.data || db.data);
  AlignedBuffer dz_buffer(need_dz && db.data ? dy.rows * rank * sizeof(T) : 0);
  T* shared_dz = dz_buffer.as<T>();

  if (dx.data || (need_dz && db.data)) {
    const size_t threads =
        useful_threads(flops(double(dy.rows), double(w.d_out), double(dx.data ? w.d_in : rank)));
    const Grid grid(dy.rows, k.lanes, kTokenBlock, dx.data ? w.d_in : 1, kPanelColumns, threads);
    parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
      const Range tokens = part(dy.rows, grid.token_block, grid.token_part(i));
      const size_t w_part = grid.w_part(i);
      const Matrix<const T> rows{dy.row(tokens.first), tokens.count, dy.cols, dy.stride};
      T* dz = nullptr;
      if (need_dz) {
        const bool keep = shared_dz && w_part == 0;
        dz = keep ? shared_dz + tokens.first * rank : scratch<T>(Scratch::kLowRank, tokens.count * rank);
        project_back(k, rows, low, dz);
      }
      if (!dx.data || w.d_in == 0) return;
      const Range cols = part(w.d_in, grid.w_block, w_part);
      const Matrix<T> out{dx.row(tokens.first), tokens.count, dx.cols, dx.stride};
      if (w.d_out == 0)
        for (size_t t = 0; t < out.rows; ++t) std::fill_n(out.row(t) + cols.first, cols.count, T(0));
      if constexpr (std::is_same_v<T, float>) {
        if (w.compute == Compute::kBfloat16)
          frozen_back<Bf16Pair>(w, rows, cols, out);
        else
          frozen_back<float>(w, rows, cols, out);
      } else {
        frozen_back<T>(w, rows, cols, out);
      }
      if (rank) low_rank_back(k, low, dz, tokens.first, cols, out);
    });
  }

  if (!rank) return;
  const size_t a_parts = da.data ? ceil_div(w.d_out, kColumnBlock) : 0,
               b_parts = db.data ? ceil_div(w.d_in, kColumnBlock) : 0;
  const double work = flops(double(dy.rows), double(a_parts + b_parts) * kColumnBlock, double(rank));
  parallel_for(a_parts + b_parts, useful_threads(work), Interruptible::kYes, [&](size_t i) {
    if (i < a_parts) return add_da(k, dy, z, low.scale, part(w.d_out, kColumnBlock, i), da);
    const Range cols = part(w.d_in, kColumnBlock, i - a_parts);
    sum_columns<T>(k, {shared_dz, dy.rows, rank, rank}, x, low.dropout > 0 ? &low : nullptr, cols,
                   db.data + cols.first, db.stride);
  });
}

template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out) {
  if (scale == 0 || a.rows == 0) return;
  const Products<T>& k = kernels::table().products<T>();
  const size_t row_parts = ceil_div(out.rows, kRowBlock), col_parts = ceil_div(out.cols, kColumnBlock);
  const size_t threads = useful_threads(flops(double(a.rows), double(out.rows), double(out.cols)));
  parallel_for(row_parts * col_parts, threads, Interruptible::kYes, [&](size_t i) {
    const Range rows = part(out.rows, kRowBlock, i / col_parts),
                cols = part(out.cols, kColumnBlock, i % col_parts);
    T* scaled = scratch<T>(Scratch::kLanesIn, a.rows * rows.count);
    for (size_t n = 0; n < a.rows; ++n)
      for (size_t j = 0; j < rows.count; ++j)
        scaled[n * rows.count + j] = T(scale) * a.row(n)[rows.first + j];
    sum_columns<T>(k, {scaled, a.rows, rows.count, rows.count}, b, nullptr, cols,
                   out.row(rows.first) + cols.first, out.stride);
  });
}

#define NPLORA_INSTANTIATE(T)                                                                            \
  template void lora_forward(const WeightView&, Matrix<const T>, const LowRank<T>&, const T*, Matrix<T>, \
                             Matrix<T>);                                                                 \
  template void lora_backward(const WeightView&, Matrix<const T>, Matrix<const T>, Matrix<const T>,      \
                              const LowRank<T>&, Matrix<T>, Matrix<T>, Matrix<T>);                       \
  template void add_outer(Matrix<const T>, Matrix<const T>, double, Matrix<T>)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
