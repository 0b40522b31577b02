// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].
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
using kernels::kPanelColumns;
using kernels::kSteps;
using kernels::Panels;
using kernels::Products;
using kernels::SmallProducts;
using kernels::Strided;
using kernels::Sum;
using kernels::Tiles;

namespace {

template <class T>
Matrix<const T> rows_of(Matrix<const T> m, Range rows) {
  return {m.row(rows.first), rows.count, m.cols, m.stride};
}

template <class T>
Matrix<const T> dropped(const LowRank<T>& low, Matrix<const T> x, Range tokens) {
  if (low.dropout == 0) return rows_of(x, tokens);
  const Matrix<T> out{scratch<T>(Scratch::kDropped, tokens.count * x.cols), tokens.count, x.cols, x.cols};
  drop_rows(low.dropout, low.key, tokens.first, 0, x.cols, rows_of(x, tokens), out);
  return out;
}

template <class T>
const T* bias_at(const ForwardPart<T>& part, size_t row) {
  return part.bias ? part.bias + row : nullptr;
}

// A range of rows of one part of a stack.
struct PartRows {
  size_t part;
  Range rows;
};

// The rows of all parts, counted one after the other in whole blocks of kRowBlock.
template <class T>
class StackRows {
 public:
  explicit StackRows(std::span<const ForwardPart<T>> parts) : parts_(parts) {}

  size_t blocks() const {
    size_t sum = 0;
    for (const auto& part : parts_) sum += ceil_div(part.w.d_out, kRowBlock);
    return sum;
  }

  // Calls body(PartRows) for the pieces of a range of blocks.
  template <class Body>
  void for_parts(Range blocks, const Body& body) const {
    size_t first = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const size_t d_out = parts_[i].w.d_out, count = ceil_div(d_out, kRowBlock);
      const size_t from = std::max(first, blocks.first),
                   to = std::min(first + count, blocks.first + blocks.count);
      if (from < to) {
        const size_t row = (from - first) * kRowBlock;
        body(PartRows{i, {row, std::min(d_out, (to - first) * kRowBlock) - row}});
      }
      first += count;
    }
  }

 private:
  std::span<const ForwardPart<T>> parts_;
};

template <class T>
double flops_of(std::span<const ForwardPart<T>> parts, size_t n) {
  double sum = 0;
  for (const auto& part : parts) sum += flops(n, part.w.d_out, part.w.d_in);
  return sum;
}

// Tokens in the SIMD lanes, computed in elements E. First x is brought into the lanes and z is computed, for as many tokens as
// a pass takes; then the rows of W go over all of them. The update z Aᵀ is added in the type of the sums.
template <class E>
class LanesForward {
 public:
  using T = Sum<E>;

  LanesForward(std::span<const ForwardPart<T>> parts, Matrix<const T> x)
      : parts_(parts),
        x_(x),
        k_(kernels::table().products<T>()),
        tiles_(kernels::table().tiles<E>()),
        lanes_(x.rows <= tiles_.lanes / 2 ? tiles_.lanes / 2 : tiles_.lanes),
        depth_(depth_of<E>(x.cols)),
        pass_(tokens_of_pass(x.rows, x.cols, sizeof(E) / kSteps<E>)) {
    size_t elements = 0;
    for (const auto& part : parts) {
      const LayerShape shape{x.rows,          part.w.d_out,          x.cols,
                             part.low.rank(), sizeof(E) / kSteps<E>, part.low.dropout > 0};
      const bool keep_z = part.z.data != nullptr;
      const Update update = forward_update(shape, keep_z);
      const bool projects = update == Update::kSteps || (update == Update::kFolded && keep_z);
      updates_.push_back({update, projects, {}, nullptr, elements});
      if (projects) elements += part.low.rank() * depth_;
      if (update == Update::kFolded) most_ = pass_;
    }
    factors_elements_ = elements;
  }

  void run(size_t threads) {
    xt_ = scratch<E>(Scratch::kLanes, pass_ * depth_);
    size_t ranks = 0;
    for (size_t i = 0; i < parts_.size(); ++i) ranks += parts_[i].low.rank();
    T* zt = scratch<T>(Scratch::kLowLanes, pass_ * ranks);
    E* factors = scratch<E>(Scratch::kFactor, kSteps<E> == 1 ? 0 : factors_elements_);
    for (size_t i = 0; i < parts_.size(); ++i) {
      updates_[i].zt = zt;
      zt += pass_ * parts_[i].low.rank();
      if (updates_[i].projects)
        updates_[i].factor = elements_or_self<E>(parts_[i].low.b, factors + updates_[i].factor_at);
    }
    const StackRows<T> rows(parts_);
    for (size_t first = 0; first < x_.rows; first += pass_) {
      const Range pass{first, std::min(pass_, x_.rows - first)};
      const size_t blocks = ceil_div(pass.count, lanes_),
                   share = ceil_div(blocks, threads > 1 ? 4 * threads : 1);
      parallel_for(ceil_div(blocks, share), threads, Interruptible::kYes, [&](size_t i) {
        const Range mine = nth_block(blocks, share, i);
        for (size_t b = 0; b < mine.count; ++b) prepare(pass, mine.first + b);
      });
      const Grid grid({blocks, 1, most_ / lanes_}, {rows.blocks(), 1, rows.blocks()},
                      flops_of(parts_, pass.count), threads);
      parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
        rows.for_parts(grid.side(i), [&](PartRows piece) { multiply(pass, grid.tokens(i), piece); });
      });
    }
  }

 private:
  struct PartUpdate {
    Update update;
    bool projects;
    Strided<E> factor;  // B in elements E
    T* zt;              // (blocks, r, lanes)
    size_t factor_at;
  };

  Range lane_block(Range pass, size_t b) const {
    const Range block = nth_block(pass.count, lanes_, b);
    return {pass.first + block.first, block.count};
  }

  // xt and, of all parts, zt and z for one block of tokens.
  void prepare(Range pass, size_t b) const {
    const Range tokens = lane_block(pass, b);
    E* lanes = xt_ + b * depth_ * lanes_;
    lanes_of<E>(lanes_, rows_of(x_, tokens), lanes);
    for (size_t i = 0; i < parts_.size(); ++i)
      if (updates_[i].projects) project(parts_[i], updates_[i], tokens, b, lanes);
  }

  // zt (r, lanes) = scale * B drop(x)ᵀ for one block of tokens; z (tokens, r) without the scale.
  void project(const ForwardPart<T>& part, const PartUpdate& update, Range tokens, size_t b,
               const E* xt) const {
    const size_t rank = part.low.rank();
    if (part.low.dropout > 0) {
      E* lanes = scratch<E>(Scratch::kDroppedLanes, depth_ * lanes_);
      lanes_of<E>(lanes_, dropped(part.low, x_, tokens), lanes);
      xt = lanes;
    }
    T* zt = update.zt + b * rank * lanes_;
    tiles_.lane_tile(lanes_, rank, depth_,
                     {update.factor.data, update.factor.row_stride, kPanelColumns / kSteps<E>}, xt, zt,
                     false);
    if (part.z.data)
      k_.from_lanes(lanes_, tokens.count, rank, zt, nullptr, part.z.row(tokens.first), part.z.stride);
    for (size_t i = 0; i < rank * lanes_; ++i) zt[i] *= T(part.low.scale);
  }

  // y of some rows of a part, for a range of the lane blocks of a pass.
  void multiply(Range pass, Range blocks, PartRows piece) const {
    const ForwardPart<T>& part = parts_[piece.part];
    const PartUpdate& update = updates_[piece.part];
    const size_t rank = part.low.rank();
    T* yt = scratch<T>(Scratch::kSums, blocks.count * kRowBlock * lanes_);
    for (size_t r = 0; r < piece.rows.count; r += kRowBlock) {
      const Range rows{piece.rows.first + r, std::min(kRowBlock, piece.rows.count - r)};
      frozen(part, update.update == Update::kFolded, rows, blocks, yt);
      for (size_t b = 0; b < blocks.count; ++b) {
        const Range tokens = lane_block(pass, blocks.first + b);
        T* out = yt + b * kRowBlock * lanes_;
        if (update.update == Update::kSteps)
          k_.lane_tile(lanes_, rows.count, rank,
                       {part.low.a.row(rows.first), part.low.a.stride, kPanelColumns},
                       update.zt + (blocks.first + b) * rank * lanes_, out, true);
        k_.from_lanes(lanes_, tokens.count, rows.count, out, bias_at(part, rows.first),
                      part.y.row(tokens.first) + rows.first, part.y.stride);
      }
    }
  }

  // yt (blocks, kRowBlock, lanes) = W[rows] xt, or (W + scale A B)[rows] xt.
  void frozen(const ForwardPart<T>& part, bool folded, Range rows, Range blocks, T* yt) const {
    const WeightView& w = part.w;
    if (w.d_in == 0) std::fill_n(yt, blocks.count * kRowBlock * lanes_, T(0));
    const size_t full = full_columns(w.d_in);
    // A single block of lanes goes once over each row: it reads a whole row at a time, as W streams by.
    const size_t most =
        blocks.count > 1 || folded || !in_place<E>(w) ? kDepthBlock : std::max(full, kPanelColumns);
    E* decoded = scratch<E>(Scratch::kWeight, kRowBlock * kDepthBlock);
    for (size_t col = 0; col < w.d_in;) {
      const size_t cols = std::min(most, (col < full ? full : w.d_in) - col);
      Panels<E> panels = row_block(w, rows, {col, cols}, decoded);
      if constexpr (kSteps<E> == 1)
        if (folded) panels = fold(part.low, rows, {col, cols}, panels, decoded);
      for (size_t b = 0; b < blocks.count; ++b)
        tiles_.lane_tile(lanes_, rows.count, depth_of<E>(cols), panels,
                         xt_ + ((blocks.first + b) * depth_ + col / kSteps<E>)*lanes_,
                         yt + b * kRowBlock * lanes_, col > 0);
      col += cols;
    }
  }

  const std::span<const ForwardPart<T>> parts_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const Tiles<E>& tiles_;
  const size_t lanes_, depth_, pass_;
  size_t most_ = kTokenBlock, factors_elements_ = 0;
  std::vector<PartUpdate> updates_;
  E* xt_ = nullptr;
};

// A small batch: W is read once, in the order it lies in, and nothing is transposed. W is its element in memory.
template <class W>
class SmallForward {
 public:
  using T = Sum<W>;

  SmallForward(const ForwardPart<T>& part, Matrix<const T> x)
      : part_(part),
        x_(x),
        k_(kernels::table().products<T>()),
        small_(kernels::table().small<W>()),
        lanes_(k_.lanes / 2),
        pass_(kDotParts / x.rows / kRowBlock * kRowBlock),
        rank_(part.low.rank()) {}

  void run(size_t threads) {
    xs_ = interleaved(x_, Scratch::kLanes);
    if (rank_) project();
    const Grid grid({1, 1, 1}, {part_.w.d_out, kRowBlock, part_.w.d_out},
                    flops(x_.rows, part_.w.d_out, part_.w.d_in), threads);
    parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) { multiply(grid.side(i)); });
  }

 private:
  // scaled_ (m, r) = scale * drop(x) Bᵀ; z without the scale.
  void project() {
    const size_t n = x_.rows;
    const T* xs =
        part_.low.dropout > 0 ? interleaved(dropped(part_.low, x_, {0, n}), Scratch::kDroppedLanes) : xs_;
    T* scaled = scratch<T>(Scratch::kLowLanes, n * rank_);
    T* part = scratch<T>(Scratch::kSums, n * pass_ * lanes_);
    for (size_t j = 0; j < rank_; j += pass_) {
      const Range rows{j, std::min(pass_, rank_ - j)};
      if (x_.cols == 0) std::fill_n(part, n * rows.count * lanes_, T(0));
      add_dots(part_.low.b, rows, xs, part, false);
      k_.sum_parts(n, rows.count, part, nullptr, scaled + j, rank_);
    }
    if (part_.z.data)
      for (size_t t = 0; t < n; ++t) std::copy_n(scaled + t * rank_, rank_, part_.z.row(t));
    for (size_t i = 0; i < n * rank_; ++i) scaled[i] *= T(part_.low.scale);
    zs_ = interleaved({scaled, n, rank_, rank_}, Scratch::kDropped);
  }

  const T* interleaved(Matrix<const T> m, Scratch use) const {
    T* out = scratch<T>(use, m.rows * round_up(m.cols, lanes_));
    k_.interleave(m.rows, m.cols, m.data, m.stride, out);
    return out;
  }

  // y[:, rows].
  void multiply(Range rows) const {
    const size_t n = x_.rows;
    T* part = scratch<T>(Scratch::kSums, n * pass_ * lanes_);
    for (size_t r = 0; r < rows.count; r += pass_) {
      const Range group{rows.first + r, std::min(pass_, rows.count - r)};
      if (x_.cols == 0) std::fill_n(part, n * group.count * lanes_, T(0));
      frozen(group, part);
      if (rank_) add_dots(part_.low.a, group, zs_, part, true);
      k_.sum_parts(n, group.count, part, bias_at(part_, group.first), part_.y.data + group.first,
                   part_.y.stride);
    }
  }

  // part (m, rows, lanes) = [part +] m[rows] * x (tokens, cols) for a row-major m and interleaved x.
  void add_dots(Matrix<const T> m, Range rows, const T* x, T* part, bool accumulate) const {
    const size_t most = dot_columns(x_.rows);
    for (size_t c = 0; c < m.cols; c += most)
      kernels::table().small<T>().dots(x_.rows, rows.count, std::min(most, m.cols - c),
                                       {m.row(rows.first) + c, m.stride, kPanelColumns}, x + c * x_.rows,
                                       part, accumulate || c > 0);
  }

  // part (m, rows, lanes) = W[rows] * x.
  void frozen(Range rows, T* part) const {
    const WeightView& w = part_.w;
    const size_t full = full_columns(w.d_in), most = in_place<W>(w) ? dot_columns(x_.rows) : kPanelColumns;
    W* decoded = scratch<W>(Scratch::kWeight, rows.count * kPanelColumns);
    for (size_t c = 0; c < w.d_in;) {
      const size_t cols = std::min(most, (c < full ? full : w.d_in) - c);
      small_.dots(x_.rows, rows.count, cols, row_block(w, rows, {c, cols}, decoded), xs_ + c * x_.rows, part,
                  c > 0);
      c += cols;
    }
  }

  const ForwardPart<T>& part_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const SmallProducts<W>& small_;
  const size_t lanes_, pass_, rank_;
  const T *xs_ = nullptr, *zs_ = nullptr;  // x, and scale * z, interleaved
};

template <class T>
void small_forward(const ForwardPart<T>& part, Matrix<const T> x) {
  const size_t threads = useful_threads(flops(x.rows, part.w.d_out, part.w.d_in));
  if constexpr (std::is_same_v<T, float>)
    if (part.w.storage == Storage::kBfloat16) return SmallForward<Bf16>(part, x).run(threads);
  SmallForward<T>(part, x).run(threads);
}

}  // namespace

template <class T>
void lora_forward(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  for (const ForwardPart<T>& part : parts)
    if (part.low.rank() == 0 && part.z.data)
      for (size_t i = 0; i < part.z.rows; ++i) std::fill_n(part.z.row(i), part.z.cols, T(0));
  if (x.rows == 0 || parts.empty()) return;
  if (x.rows <= kSmallBatch) {
    for (const ForwardPart<T>& part : parts) small_forward(part, x);
    return;
  }
  const size_t threads = useful_threads(flops_of(parts, x.rows));
  if constexpr (std::is_same_v<T, float>)
    if (parts[0].w.compute == Compute::kBfloat16) return LanesForward<Bf16Pair>(parts, x).run(threads);
  LanesForward<T>(parts, x).run(threads);
}

template void lora_forward(std::span<const ForwardPart<float>>, Matrix<const float>);
template void lora_forward(std::span<const ForwardPart<double>>, Matrix<const double>);

}  // namespace nplora
