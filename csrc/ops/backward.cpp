// dz = scale dy A, dx = dy W + undrop(dz B), da += scale dyᵀ z, db += dzᵀ drop(x).
#include <algorithm>
#include <type_traits>

#include "base/parallel.h"
#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/elements.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::kSteps;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;
using kernels::Tiles;

namespace {

template <class T>
const Products<T>& products() {
  return kernels::table().products<T>();
}

// dx[:, cols] = dy W[:, cols], the first column a multiple of kPanelColumns; computed in elements E.
template <class E>
void frozen_back(const WeightView& w, Matrix<const Sum<E>> dy, Range cols, Matrix<Sum<E>> dx) {
  if (w.d_out == 0)
    for (size_t i = 0; i < dx.rows; ++i) std::fill_n(dx.row(i) + cols.first, cols.count, Sum<E>(0));
  const Tiles<E>& tiles = kernels::table().tiles<E>();
  E* decoded = scratch<E>(Scratch::kWeight, kOuterDepth * kPanelColumns);
  const Strided<E> rows = elements_of<E>(dy, Scratch::kLanes);
  for (size_t c = 0; c < cols.count; c += kPanelColumns) {
    const Range width{cols.first + c, std::min(kPanelColumns, cols.count - c)};
    for (size_t o = 0; o < w.d_out; o += kOuterDepth) {
      const size_t depth = std::min(kOuterDepth, w.d_out - o);
      const ColumnBlock<E> panel = column_block(w, {o, depth}, width, decoded);
      tiles.outer_tile(dy.rows, width.count, depth_of<E>(depth),
                       {rows.data + o / kSteps<E>, rows.row_stride, 1}, panel.data, panel.row_stride,
                       dx.data + width.first, dx.stride, o > 0);
    }
  }
}

// dz (n, r) = scale * dy A.
template <class T>
void project_back(Matrix<const T> dy, const LowRank<T>& low, T* dz) {
  const size_t rank = low.a.cols;
  for (size_t j = 0; j < rank; j += kPanelColumns)
    products<T>().outer_tile(dy.rows, std::min(kPanelColumns, rank - j), dy.cols, {dy.data, dy.stride, 1},
                             low.a.data + j, low.a.stride, dz + j, rank, false);
  for (size_t i = 0; i < dy.rows * rank; ++i) dz[i] *= T(low.scale);
}

// dx[:, cols] += undrop(dz B[:, cols]);   first_row is the place of dx's first row in the whole batch.
template <class T>
void low_rank_back(const LowRank<T>& low, const T* dz, size_t first_row, Range cols, Matrix<T> dx) {
  const Products<T>& k = products<T>();
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
    const Range rows{i, std::min(k.tile_tokens, dx.rows - i)};
    for (size_t c = 0; c < cols.count; c += kPanelColumns) product(rows, c, update + c, cols.count, false);
    const Matrix<T> all{update, rows.count, cols.count, cols.count};
    drop_rows<T>(low.dropout, low.key, first_row + i, cols.first, low.b.cols, all, all);
    for (size_t j = 0; j < rows.count; ++j)
      for (size_t c = 0; c < cols.count; ++c) dx.row(i + j)[cols.first + c] += all.row(j)[c];
  }
}

// out (p, cols) += aᵀ b[:, cols] for a (n, p), b (n, q), in passes over kSumDepth tokens that keep the rows of b in cache.
// load(pass) gives the rows of the pass of a and of b[:, cols].
template <class T, class Load>
void add_columns(size_t n, size_t p, Range cols, const Load& load, T* out, size_t out_stride) {
  for (size_t first = 0; first < n; first += kSumDepth) {
    const Range pass{first, std::min(kSumDepth, n - first)};
    const auto [a, b] = load(pass);
    for (size_t c = 0; c < cols.count; c += kPanelColumns)
      products<T>().outer_tile(p, std::min(kPanelColumns, cols.count - c), pass.count, {a.data, 1, a.stride},
                               b.data + c, b.stride, out + c, out_stride, true);
  }
}

template <class T>
struct Rows {
  Matrix<const T> a, b;
};

template <class T>
Matrix<const T> at(Matrix<const T> m, Range rows, Range cols) {
  return {m.row(rows.first) + cols.first, rows.count, cols.count, m.stride};
}

// da[rows] += scale * dy[:, rows]ᵀ z, by way of its transpose.
template <class T>
void add_da(Matrix<const T> dy, Matrix<const T> z, double scale, Range rows, Matrix<T> da) {
  const Range all{0, z.cols};
  T* sum = scratch<T>(Scratch::kSums, z.cols * kColumnBlock);
  std::fill_n(sum, z.cols * kColumnBlock, T(0));
  add_columns(
      dy.rows, z.cols, rows, [&](Range pass) { return Rows<T>{at(z, pass, all), at(dy, pass, rows)}; }, sum,
      kColumnBlock);
  for (size_t o = 0; o < rows.count; ++o)
    for (size_t j = 0; j < z.cols; ++j) da.row(rows.first + o)[j] += T(scale) * sum[j * kColumnBlock + o];
}

// db[:, cols] += dzᵀ drop(x)[:, cols].
template <class T>
void add_db(Matrix<const T> dz, Matrix<const T> x, const LowRank<T>& low, Range cols, Matrix<T> db) {
  const auto load = [&](Range pass) {
    Rows<T> rows{at(dz, pass, {0, dz.cols}), at(x, pass, cols)};
    if (low.dropout > 0) {
      const Matrix<T> dropped{scratch<T>(Scratch::kDropped, kSumDepth * kColumnBlock), pass.count, cols.count,
                              kColumnBlock};
      drop_rows(low.dropout, low.key, pass.first, cols.first, x.cols, rows.b, dropped);
      rows.b = dropped;
    }
    return rows;
  };
  add_columns(dz.rows, dz.cols, cols, load, db.data + cols.first, db.stride);
}

// dx, and dz where it is asked for.
template <class T>
void input_gradients(const WeightView& w, Matrix<const T> dy, const LowRank<T>& low, Matrix<T> dx,
                     T* shared_dz) {
  const size_t rank = low.active() ? low.a.cols : 0, width = dx.data ? w.d_in : rank;
  const double work = flops(dy.rows, w.d_out, width);
  const size_t threads = useful_threads(work);
  const Grid grid({dy.rows, products<T>().lanes, kTokenBlock}, {dx.data ? w.d_in : 1, kPanelColumns}, work,
                  threads);
  parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
    const Range tokens = grid.tokens(i), cols = grid.side(i);
    const Matrix<const T> rows = at(dy, tokens, {0, dy.cols});
    T* dz = nullptr;
    if (rank) {
      dz = shared_dz && cols.first == 0 ? shared_dz + tokens.first * rank
                                        : scratch<T>(Scratch::kFactor, tokens.count * rank);
      project_back(rows, low, dz);
    }
    if (!dx.data) return;
    const Matrix<T> out{dx.row(tokens.first), tokens.count, dx.cols, dx.stride};
    const bool in_pairs = std::is_same_v<T, float> && w.compute == Compute::kBfloat16 && dy.rows > kDotTokens;
    if constexpr (std::is_same_v<T, float>)
      if (in_pairs) frozen_back<Bf16Pair>(w, rows, cols, out);
    if (!in_pairs) frozen_back<T>(w, rows, cols, out);
    if (rank) low_rank_back(low, dz, tokens.first, cols, out);
  });
}

}  // namespace

template <class T>
void lora_backward(const WeightView& w, Matrix<const T> dy, Matrix<const T> x, Matrix<const T> z,
                   const LowRank<T>& low, Matrix<T> dx, Matrix<T> da, Matrix<T> db) {
  if (dy.rows == 0) return;
  const size_t rank = low.active() ? low.a.cols : 0;
  const bool need_dz = rank && db.data;
  const AlignedBuffer dz(need_dz ? dy.rows * rank * sizeof(T) : 0);
  if (dx.data || need_dz) input_gradients(w, dy, low, dx, dz.as<T>());
  if (!rank) return;

  // Not interrupted: gradients that are half added could not be told from whole ones.
  const size_t a_tasks = da.data ? ceil_div(w.d_out, kColumnBlock) : 0,
               b_tasks = db.data ? ceil_div(w.d_in, kColumnBlock) : 0;
  const double work = flops(dy.rows, (a_tasks + b_tasks) * kColumnBlock, rank);
  parallel_for(a_tasks + b_tasks, useful_threads(work), Interruptible::kNo, [&](size_t i) {
    if (i < a_tasks)
      add_da(dy, z, low.scale, nth_block(w.d_out, kColumnBlock, i), da);
    else
      add_db<T>({dz.as<T>(), dy.rows, rank, rank}, x, low, nth_block(w.d_in, kColumnBlock, i - a_tasks), db);
  });
}

template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out) {
  if (scale == 0 || a.rows == 0) return;
  const size_t row_tasks = ceil_div(out.rows, kRowBlock), col_tasks = ceil_div(out.cols, kColumnBlock);
  const double work = flops(a.rows, out.rows, out.cols);
  parallel_for(row_tasks * col_tasks, useful_threads(work), Interruptible::kYes, [&](size_t i) {
    const Range rows = nth_block(out.rows, kRowBlock, i / col_tasks);
    const Range cols = nth_block(out.cols, kColumnBlock, i % col_tasks);
    T* scaled = scratch<T>(Scratch::kFactor, kSumDepth * kRowBlock);
    const auto load = [&](Range pass) {
      for (size_t n = 0; n < pass.count; ++n)
        for (size_t j = 0; j < rows.count; ++j)
          scaled[n * kRowBlock + j] = T(scale) * a.row(pass.first + n)[rows.first + j];
      return Rows<T>{{scaled, pass.count, rows.count, kRowBlock}, at(b, pass, cols)};
    };
    add_columns(a.rows, rows.count, cols, load, out.row(rows.first) + cols.first, out.stride);
  });
}

#define NPLORA_INSTANTIATE(T)                                                                       \
  template void lora_backward(const WeightView&, Matrix<const T>, Matrix<const T>, Matrix<const T>, \
                              const LowRank<T>&, Matrix<T>, Matrix<T>, Matrix<T>);                  \
  template void add_outer(Matrix<const T>, Matrix<const T>, double, Matrix<T>)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
