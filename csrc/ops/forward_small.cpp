// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] for a handful of rows.
#include "base/parallel.h"
#include "ops/elements.h"
#include "ops/forward.h"

namespace nplora {

using kernels::Bf16;
using kernels::kPanelColumns;
using kernels::Products;
using kernels::SmallProducts;
using kernels::Sum;

namespace {

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

}  // namespace

template <class W>
void forward_small(const ForwardPart<Sum<W>>& part, Matrix<const Sum<W>> x, size_t threads) {
  SmallForward<W>(part, x).run(threads);
}

template void forward_small<float>(const ForwardPart<float>&, Matrix<const float>, size_t);
template void forward_small<double>(const ForwardPart<double>&, Matrix<const double>, size_t);
template void forward_small<Bf16>(const ForwardPart<float>&, Matrix<const float>, size_t);

}  // namespace nplora
