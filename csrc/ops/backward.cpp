// dz = scale dy A, dx = sum of dy W + undrop(dz B), da += scale dyᵀ z, db += dzᵀ drop(x).
#include <algorithm>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/elements.h"
#include "ops/fold.h"
#include "ops/lora.h"
#include "ops/plan.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Fetch;
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

template <class T>
Matrix<const T> at(Matrix<const T> m, Range rows, Range cols) {
  return {m.row(rows.first) + cols.first, rows.count, cols.count, m.stride};
}

// dz (n, r) = scale * dy A.
template <class T>
void project_back(Matrix<const T> dy, const LowRank<T>& low, T* dz) {
  const size_t rank = low.rank();
  for (size_t j = 0; j < rank; j += kPanelColumns)
    products<T>().outer_tile(dy.rows, std::min(kPanelColumns, rank - j), dy.cols, {dy.data, dy.stride, 1},
                             low.a.data + j, low.a.stride, dz + j, rank, false, {});
  for (size_t i = 0; i < dy.rows * rank; ++i) dz[i] *= T(low.scale);
}

// dx[:, cols] += undrop(dz B[:, cols]);   first_row is the place of dx's first row in the whole batch.
template <class T>
void low_rank_back(const LowRank<T>& low, const T* dz, size_t first_row, Range cols, Matrix<T> dx) {
  const Products<T>& k = products<T>();
  const size_t rank = low.rank();
  const auto product = [&](Range rows, size_t c, T* out, size_t stride, bool accumulate) {
    k.outer_tile(rows.count, std::min(kPanelColumns, cols.count - c), rank, {dz + rows.first * rank, rank, 1},
                 low.b.data + cols.first + c, low.b.stride, out, stride, accumulate, {});
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

template <class E, class W>
const auto& outer_tile() {
  if constexpr (std::is_same_v<E, W>)
    return kernels::table().tiles<E>().outer_tile;
  else
    return kernels::table().small<W>().outer_tile;
}

// dz of every part, and dx, computed in elements E from blocks of W in elements W.
template <class E, class W>
class InputGradients {
 public:
  using T = Sum<E>;

  // dz[i] (n, r) is written where it is not null.
  InputGradients(std::span<const BackwardPart<T>> parts, Matrix<T> dx, T* const* dz)
      : parts_(parts), dx_(dx), dz_(dz), tokens_(parts[0].dy.rows) {
    size_t depth = 0;
    for (const auto& part : parts) {
      depth += depth_of<E>(part.w.d_out);
      work_ += flops(tokens_, part.w.d_out, dx.data ? part.w.d_in : part.low.rank());
    }
    converted_ = kSteps<E> > 1 && dx.data ? depth : 0;
    pass_ = converted_ ? tokens_of_pass(tokens_, converted_, sizeof(E)) : tokens_;
  }

  void run() {
    const size_t threads = useful_threads(work_);
    elements_ = scratch<E>(Scratch::kLanes, pass_ * converted_);
    for (size_t first = 0; first < tokens_; first += pass_) {
      const Range pass{first, std::min(pass_, tokens_ - first)};
      const size_t units = ceil_div(pass.count, kPassUnit),
                   share = ceil_div(units, threads > 1 ? 4 * threads : 1);
      parallel_for(ceil_div(units, share), threads, Interruptible::kYes,
                   [&](size_t i) { prepare(pass, nth_block(pass.count, share * kPassUnit, i)); });
      if (!dx_.data) continue;
      const Grid grid({pass.count, products<T>().lanes, folded() ? pass.count : kTokenBlock},
                      {dx_.cols, kPanelColumns, std::max(dx_.cols, kPanelColumns)}, work_, threads);
      parallel_for(grid.tasks(), threads, Interruptible::kYes,
                   [&](size_t i) { multiply(pass, grid.tokens(i), grid.side(i)); });
    }
  }

 private:
  Update update_of(const BackwardPart<T>& part) const {
    return backward_update(
        {tokens_, part.w.d_out, part.w.d_in, part.low.rank(), sizeof(E) / kSteps<E>, part.low.dropout > 0});
  }

  bool folded() const {
    return std::any_of(parts_.begin(), parts_.end(),
                       [&](const auto& part) { return update_of(part) == Update::kFolded; });
  }

  // dz, and dy in elements E, of some tokens of a pass.
  void prepare(Range pass, Range some) const {
    const Range tokens{pass.first + some.first, some.count};
    E* elements = elements_ + some.first * converted_;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Matrix<const T> dy = at(parts_[i].dy, tokens, {0, parts_[i].dy.cols});
      if (dz_[i]) project_back(dy, parts_[i].low, dz_[i] + tokens.first * parts_[i].low.rank());
      if constexpr (kSteps<E> > 1)
        if (converted_) {
          elements_of<E>(dy, elements, converted_);
          elements += depth_of<E>(dy.cols);
        }
    }
  }

  // dx[tokens, cols], panel by panel.
  void multiply(Range pass, Range some, Range cols) const {
    const Range tokens{pass.first + some.first, some.count};
    const Matrix<T> dx{dx_.row(tokens.first), tokens.count, dx_.cols, dx_.stride};
    for (size_t c = 0; c < cols.count; c += kPanelColumns) {
      const Range panel{cols.first + c, std::min(kPanelColumns, cols.count - c)};
      const E* elements = elements_ + some.first * converted_;
      bool accumulate = false;
      for (const BackwardPart<T>& part : parts_) {
        Strided<E> dy;
        if constexpr (kSteps<E> == 1)
          dy = {part.dy.row(tokens.first), part.dy.stride, 1};
        else
          dy = {elements, converted_, 1};
        accumulate |= frozen(part, dy, panel, dx, accumulate);
        elements += depth_of<E>(part.w.d_out);
      }
      if (!accumulate)
        for (size_t i = 0; i < dx.rows; ++i) std::fill_n(dx.row(i) + panel.first, panel.count, T(0));
      for (size_t i = 0; i < parts_.size(); ++i)
        if (update_of(parts_[i]) == Update::kSteps)
          low_rank_back(parts_[i].low, dz_[i] + tokens.first * parts_[i].low.rank(), tokens.first, panel, dx);
    }
  }

  // dx[:, panel] = [dx +] dy W[:, panel]; says whether there was anything to add.
  bool frozen(const BackwardPart<T>& part, Strided<E> dy, Range panel, Matrix<T> dx, bool accumulate) const {
    const WeightView& w = part.w;
    W* decoded = scratch<W>(Scratch::kWeight, kOuterDepth * kPanelColumns);
    [[maybe_unused]] const bool folds = update_of(part) == Update::kFolded;
    for (size_t o = 0; o < w.d_out; o += kOuterDepth) {
      const Range rows{o, std::min(kOuterDepth, w.d_out - o)};
      ColumnBlock<W> block = column_block(w, rows, panel, decoded);
      if constexpr (std::is_same_v<W, T>)
        if (folds) {
          const kernels::Panels<T> sum =
              fold<T>(part.low, rows, panel, {block.data, block.row_stride, 0}, decoded);
          block = {sum.data, sum.row_stride};
        }
      outer_tile<E, W>()(dx.rows, panel.count, depth_of<E>(rows.count),
                         {dy.data + o / kSteps<E>, dy.row_stride, 1}, block.data, block.row_stride,
                         dx.data + panel.first, dx.stride, accumulate || o > 0, following(w, rows, panel));
    }
    return w.d_out > 0;
  }

  // The memory of packed W that is read after a block: the same panel's next rows, or the next panel.
  static Fetch following(const WeightView& w, Range rows, Range panel) {
    if (!w.packed) return {};
    const size_t next = rows.first + rows.count;
    const size_t bytes = kOuterDepth * kPanelColumns * bytes_per_element(w.storage);
    return {stored_at(w, next, panel.first), bytes / kCacheLine};
  }

  const std::span<const BackwardPart<T>> parts_;
  const Matrix<T> dx_;
  T* const* const dz_;
  const size_t tokens_;
  size_t converted_ = 0, pass_ = 0;  // elements of dy, of all parts, for each token; tokens of a pass
  double work_ = 0;
  E* elements_ = nullptr;
};

template <class T>
void input_gradients(std::span<const BackwardPart<T>> parts, Matrix<T> dx, T* const* dz) {
  const WeightView& w = parts[0].w;
  const size_t n = parts[0].dy.rows;
  if constexpr (std::is_same_v<T, float>) {
    const auto is_bf16 = [](const BackwardPart<T>& part) { return part.w.storage == Storage::kBfloat16; };
    if (n > kSmallBatch && w.compute == Compute::kBfloat16)
      return InputGradients<Bf16Pair, Bf16Pair>(parts, dx, dz).run();
    if (n <= kSmallBatch && std::all_of(parts.begin(), parts.end(), is_bf16))
      return InputGradients<float, Bf16>(parts, dx, dz).run();
  }
  InputGradients<T, T>(parts, dx, dz).run();
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
                               b.data + c, b.stride, out + c, out_stride, true, {});
  }
}

// Some columns of the gradient of A (transposed) or of B of one part.
struct FactorTask {
  size_t part;
  bool is_da;
  Range cols;
};

template <class T>
struct Rows {
  Matrix<const T> a, b;
};

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

}  // namespace

template <class T>
void lora_backward(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx) {
  if (parts.empty() || parts[0].dy.rows == 0) return;
  const size_t n = parts[0].dy.rows;
  size_t ranks = 0;
  for (const auto& part : parts) ranks += part.low.rank();
  T* dz = scratch<T>(Scratch::kLowGradients, n * ranks);
  std::vector<T*> dzs;
  for (const auto& part : parts) {
    dzs.push_back(part.low.rank() && (dx.data || part.db.data) ? dz : nullptr);
    dz += n * part.low.rank();
  }
  if (dx.data || std::any_of(dzs.begin(), dzs.end(), [](const T* p) { return p != nullptr; }))
    input_gradients(parts, dx, dzs.data());

  // Columns of da and db, cut over all parts. Not interrupted: gradients that are half added could not be told from whole ones.
  std::vector<FactorTask> tasks;
  double work = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const BackwardPart<T>& part = parts[i];
    if (!part.low.rank()) continue;
    const auto cut = [&](bool is_da, size_t count) {
      work += flops(n, count, part.low.rank());
      for (size_t c = 0; c < count; c += kColumnBlock)
        tasks.push_back({i, is_da, {c, std::min(kColumnBlock, count - c)}});
    };
    if (part.da.data) cut(true, part.w.d_out);
    if (part.db.data) cut(false, part.w.d_in);
  }
  parallel_for(tasks.size(), useful_threads(work), Interruptible::kNo, [&](size_t i) {
    const BackwardPart<T>& part = parts[tasks[i].part];
    const size_t rank = part.low.rank();
    if (tasks[i].is_da)
      add_da(part.dy, part.z, part.low.scale, tasks[i].cols, part.da);
    else
      add_db<T>({dzs[tasks[i].part], n, rank, rank}, x, part.low, tasks[i].cols, part.db);
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

#define NPLORA_INSTANTIATE(T)                                                                \
  template void lora_backward(std::span<const BackwardPart<T>>, Matrix<const T>, Matrix<T>); \
  template void add_outer(Matrix<const T>, Matrix<const T>, double, Matrix<T>)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
