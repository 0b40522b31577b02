// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].
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
using kernels::Panels;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;
using kernels::Tiles;

namespace {

template <class T>
struct Forward {
  const WeightView& w;
  Matrix<const T> x;
  const LowRank<T>& low;
  const T* bias;
  Matrix<T> y, z;

  size_t rank() const { return low.active() ? low.a.cols : 0; }
  Matrix<const T> x_rows(Range tokens) const { return {x.row(tokens.first), tokens.count, x.cols, x.stride}; }
  const T* bias_at(size_t row) const { return bias ? bias + row : nullptr; }
  Matrix<const T> dropped(Range tokens) const {
    const Matrix<T> out{scratch<T>(Scratch::kDropped, tokens.count * x.cols), tokens.count, x.cols, x.cols};
    drop_rows(low.dropout, low.key, tokens.first, 0, x.cols, x_rows(tokens), out);
    return out;
  }
};

// Tokens in the SIMD lanes, computed in elements E. The update z Aᵀ is added in the type of the sums.
template <class E>
class LanesForward {
 public:
  using T = Sum<E>;

  explicit LanesForward(const Forward<T>& all)
      : all_(all),
        w_(all.w),
        k_(kernels::table().products<T>()),
        tiles_(kernels::table().tiles<E>()),
        lanes_(all.x.rows <= tiles_.lanes / 2 ? tiles_.lanes / 2 : tiles_.lanes),
        depth_(depth_of<E>(w_.d_in)),
        rank_(all.rank()) {}

  void run(size_t threads) const {
    const size_t most = kLanesBytes / sizeof(E) / std::max<size_t>(1, depth_);
    const size_t most_tokens = std::clamp(most / lanes_ * lanes_, 2 * lanes_, kTokenBlock);
    const Grid grid({all_.x.rows, lanes_, most_tokens}, {w_.d_out, kRowBlock},
                    flops(all_.x.rows, w_.d_out, w_.d_in), threads);
    parallel_for(grid.tasks(), threads, Interruptible::kYes,
                 [&](size_t i) { task(grid.tokens(i), grid.side(i)); });
  }

 private:
  // y[tokens, rows]; the task with the first rows writes z too.
  void task(Range tokens, Range rows) const {
    const size_t blocks = ceil_div(tokens.count, lanes_);
    E* xt = scratch<E>(Scratch::kLanes, blocks * depth_ * lanes_);
    T* zt = scratch<T>(Scratch::kLowLanes, blocks * rank_ * lanes_);
    T* yt = scratch<T>(Scratch::kSums, blocks * kRowBlock * lanes_);
    const Strided<E> factor = rank_ ? elements_of<E>(all_.low.b, Scratch::kFactor) : Strided<E>{};
    for (size_t b = 0; b < blocks; ++b) {
      const Range block = lane_block(tokens, b);
      E* lanes = xt + b * depth_ * lanes_;
      lanes_of<E>(lanes_, all_.x_rows(block), lanes);
      if (rank_) project(block, factor, lanes, zt + b * rank_ * lanes_, rows.first == 0);
    }
    for (size_t r = 0; r < rows.count; r += kRowBlock) {
      const Range group{rows.first + r, std::min(kRowBlock, rows.count - r)};
      frozen(group, blocks, xt, yt);
      const Panels<T> a{all_.low.a.row(group.first), all_.low.a.stride, kPanelColumns};
      for (size_t b = 0; b < blocks; ++b) {
        const Range block = lane_block(tokens, b);
        T* out = yt + b * kRowBlock * lanes_;
        if (rank_) k_.lane_tile(lanes_, group.count, rank_, a, zt + b * rank_ * lanes_, out, true);
        k_.from_lanes(lanes_, block.count, group.count, out, all_.bias_at(group.first),
                      all_.y.row(block.first) + group.first, all_.y.stride);
      }
    }
  }

  Range lane_block(Range tokens, size_t b) const {
    const Range block = nth_block(tokens.count, lanes_, b);
    return {tokens.first + block.first, block.count};
  }

  // zt (r, lanes) = scale * B drop(x)ᵀ for one block of tokens; z (tokens, r) without the scale.
  void project(Range tokens, Strided<E> factor, const E* xt, T* zt, bool keep) const {
    if (all_.low.dropout > 0) {
      E* lanes = scratch<E>(Scratch::kDroppedLanes, depth_ * lanes_);
      lanes_of<E>(lanes_, all_.dropped(tokens), lanes);
      xt = lanes;
    }
    tiles_.lane_tile(lanes_, rank_, depth_, {factor.data, factor.row_stride, kPanelColumns / kSteps<E>}, xt,
                     zt, false);
    if (keep)
      k_.from_lanes(lanes_, tokens.count, rank_, zt, nullptr, all_.z.row(tokens.first), all_.z.stride);
    for (size_t i = 0; i < rank_ * lanes_; ++i) zt[i] *= T(all_.low.scale);
  }

  // yt (blocks, kRowBlock, lanes) = W[rows] xt for all blocks of tokens.
  void frozen(Range rows, size_t blocks, const E* xt, T* yt) const {
    if (w_.d_in == 0) std::fill_n(yt, blocks * kRowBlock * lanes_, T(0));
    E* decoded = scratch<E>(Scratch::kWeight, kRowBlock * kDepthBlock);
    const size_t full = full_columns(w_.d_in);
    for (size_t col = 0; col < w_.d_in;) {
      const size_t cols = std::min(kDepthBlock, (col < full ? full : w_.d_in) - col);
      const Panels<E> panels = row_block(w_, rows, {col, cols}, decoded);
      for (size_t b = 0; b < blocks; ++b)
        tiles_.lane_tile(lanes_, rows.count, depth_of<E>(cols), panels,
                         xt + (b * depth_ + col / kSteps<E>)*lanes_, yt + b * kRowBlock * lanes_, col > 0);
      col += cols;
    }
  }

  const Forward<T>& all_;
  const WeightView& w_;
  const Products<T>& k_;
  const Tiles<E>& tiles_;
  const size_t lanes_, depth_, rank_;
};

// A small batch: W is read once, in the order it lies in, and nothing is transposed.
template <class T>
class SmallForward {
 public:
  explicit SmallForward(const Forward<T>& all)
      : all_(all),
        w_(all.w),
        k_(kernels::table().products<T>()),
        tokens_(all.x.rows),
        pass_(kDotParts / tokens_),
        rank_(all.rank()) {}

  void run(size_t threads) const {
    const Grid grid({1, 1, 1}, {w_.d_out, kRowBlock}, flops(tokens_, w_.d_out, w_.d_in), threads);
    parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) { task(grid.side(i)); });
  }

 private:
  // y[:, rows]; the task with the first rows writes z too.
  void task(Range rows) const {
    const size_t lanes = k_.lanes / 2;
    T* part = scratch<T>(Scratch::kSums, tokens_ * pass_ * lanes);
    T* scaled = scratch<T>(Scratch::kLowLanes, tokens_ * rank_);
    if (rank_) project(part, scaled, rows.first == 0);
    for (size_t r = 0; r < rows.count; r += pass_) {
      const Range group{rows.first + r, std::min(pass_, rows.count - r)};
      if (w_.d_in == 0) std::fill_n(part, tokens_ * group.count * lanes, T(0));
      frozen(group, part);
      if (rank_) add_dots(all_.low.a, group, {scaled, tokens_, rank_, rank_}, part, true);
      k_.sum_parts(tokens_, group.count, part, all_.bias_at(group.first), all_.y.data + group.first,
                   all_.y.stride);
    }
  }

  // part (m, rows, lanes) = [part +] m[rows] * x (tokens, cols) for a row-major m.
  void add_dots(Matrix<const T> m, Range rows, Matrix<const T> x, T* part, bool accumulate) const {
    for (size_t c = 0; c < m.cols; c += kPanelColumns)
      k_.dot_panel(tokens_, rows.count, std::min(kPanelColumns, m.cols - c), m.row(rows.first) + c, m.stride,
                   x.data + c, x.stride, part, accumulate || c > 0);
  }

  // part (m, rows, lanes) = W[rows] * x.
  void frozen(Range rows, T* part) const {
    T* decoded = scratch<T>(Scratch::kWeight, rows.count * kPanelColumns);
    for (size_t c = 0; c < w_.d_in; c += kPanelColumns) {
      const size_t width = std::min(kPanelColumns, w_.d_in - c);
      const Panels<T> panel = row_block(w_, rows, {c, width}, decoded);
      k_.dot_panel(tokens_, rows.count, width, panel.data, panel.row_stride, all_.x.data + c, all_.x.stride,
                   part, c > 0);
    }
  }

  // scaled (m, r) = scale * drop(x) Bᵀ; z without the scale.
  void project(T* part, T* scaled, bool keep) const {
    const Matrix<const T> x = all_.low.dropout > 0 ? all_.dropped({0, tokens_}) : all_.x;
    for (size_t j = 0; j < rank_; j += pass_) {
      const Range rows{j, std::min(pass_, rank_ - j)};
      if (w_.d_in == 0) std::fill_n(part, tokens_ * rows.count * k_.lanes / 2, T(0));
      add_dots(all_.low.b, rows, x, part, false);
      k_.sum_parts(tokens_, rows.count, part, nullptr, scaled + j, rank_);
    }
    for (size_t t = 0; t < tokens_ && keep; ++t) std::copy_n(scaled + t * rank_, rank_, all_.z.row(t));
    for (size_t i = 0; i < tokens_ * rank_; ++i) scaled[i] *= T(all_.low.scale);
  }

  const Forward<T>& all_;
  const WeightView& w_;
  const Products<T>& k_;
  const size_t tokens_, pass_, rank_;
};

}  // namespace

template <class T>
void lora_forward(const WeightView& w, Matrix<const T> x, const LowRank<T>& low, const T* bias, Matrix<T> y,
                  Matrix<T> z) {
  if (!low.active() && z.cols > 0)
    for (size_t i = 0; i < z.rows; ++i) std::fill_n(z.row(i), z.cols, T(0));
  if (x.rows == 0) return;
  const Forward<T> all{w, x, low, bias, y, z};
  const size_t threads = useful_threads(flops(x.rows, w.d_out, w.d_in));
  if (x.rows <= kDotTokens) return SmallForward<T>(all).run(threads);
  if constexpr (std::is_same_v<T, float>)
    if (w.compute == Compute::kBfloat16) return LanesForward<Bf16Pair>(all).run(threads);
  LanesForward<T>(all).run(threads);
}

template void lora_forward(const WeightView&, Matrix<const float>, const LowRank<float>&, const float*,
                           Matrix<float>, Matrix<float>);
template void lora_forward(const WeightView&, Matrix<const double>, const LowRank<double>&, const double*,
                           Matrix<double>, Matrix<double>);

}  // namespace nplora
