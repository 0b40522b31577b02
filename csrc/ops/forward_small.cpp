// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] for a handful of rows.
#include <type_traits>

#include "base/parallel.h"
#include "ops/elements.h"
#include "ops/forward.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::kSteps;
using kernels::Operand;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;

namespace {

// W is read once, as elements W, panel after panel; the partial sums of its rows stay in cache meanwhile. The update is
// computed in the type of the sums.
template <class W>
class SmallForward {
 public:
  using T = Sum<W>;
  using X = Operand<W>;

  SmallForward(const ForwardPart<T>& part, Matrix<const T> x)
      : part_(part),
        x_(x),
        k_(kernels::table().products<T>()),
        lanes_(k_.lanes / 2),
        phases_(kernels::small_phases(x.rows, lanes_)),
        rank_(part.low.rank()) {}

  void run(size_t threads) {
    if constexpr (std::is_same_v<W, float>)
      if (dots_int8(part_.w)) codes_ = quantized();
    if (!codes_.codes || rank_) xs_ = interleaved<X>(x_, Scratch::kLanes);
    if (rank_) project();
    const Grid grid({1, 1, 1}, {part_.w.d_out, kRowBlock, kStreamedRows},
                    flops(x_.rows, part_.w.d_out, part_.w.d_in), threads);
    parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) { multiply(grid.side(i)); });
  }

 private:
  // zs = scale * drop(x) Bᵀ by token and phase; z without the scale.
  void project() {
    const size_t n = x_.rows;
    const X* xs =
        part_.low.dropout > 0 ? interleaved<X>(dropped(part_.low, x_, {0, n}), Scratch::kDroppedLanes) : xs_;
    const Strided<X> b = elements_or_self<X>(
        part_.low.b, kSteps<X> == 1 ? nullptr : scratch<X>(Scratch::kFactor, rank_ * depth_of<X>(x_.cols)));
    T* scaled = scratch<T>(Scratch::kLowLanes, n * rank_);
    T* part = scratch<T>(Scratch::kSums, rank_ * lanes_);
    add_dots<X>(b, {0, rank_}, depth_of<X>(x_.cols), xs, part, false);
    k_.sum_parts(n, phases_, rank_, part, nullptr, scaled, rank_);
    if (part_.z.data)
      for (size_t t = 0; t < n; ++t) std::copy_n(scaled + t * rank_, rank_, part_.z.row(t));
    for (size_t i = 0; i < n * rank_; ++i) scaled[i] *= T(part_.low.scale);
    zs_ = interleaved<T>({scaled, n, rank_, rank_}, Scratch::kDropped);
  }

  // x in int8.
  kernels::Int8Rows quantized() const {
    const size_t strips = x_.cols / kStrip;
    auto* codes = scratch<int8_t>(Scratch::kCodes, x_.rows * x_.cols);
    float* scales = scratch<float>(Scratch::kCodeScales, 2 * x_.rows * strips);
    float* sums = scales + x_.rows * strips;
    for (size_t t = 0; t < x_.rows; ++t)
      kernels::table().int8.quantize(x_.cols, x_.row(t), codes + t * x_.cols, scales + t * strips,
                                     sums + t * strips);
    return {codes, scales, sums};
  }

  // m by token and phase, in elements E. Pairs are moved as floats are.
  template <class E>
  const E* interleaved(Matrix<const T> m, Scratch use) const {
    const size_t depth = depth_of<E>(m.cols);
    const Strided<E> rows =
        elements_or_self<E>(m, kSteps<E> == 1 ? nullptr : scratch<E>(Scratch::kPairing, m.rows * depth));
    E* out = scratch<E>(use, lanes_ * ceil_div(depth, phases_));
    k_.interleave(m.rows, phases_, depth, reinterpret_cast<const T*>(rows.data), rows.row_stride,
                  reinterpret_cast<T*>(out));
    return out;
  }

  // y[:, rows].
  void multiply(Range rows) const {
    if constexpr (std::is_same_v<W, float>)
      if (dots_blocks(part_.w)) {
        for (size_t r = 0; r < rows.count; r += kRowBlock)
          multiply_blocks({rows.first + r, std::min(kRowBlock, rows.count - r)});
        return;
      }
    T* part = scratch<T>(Scratch::kSums, rows.count * lanes_);
    frozen(rows, part);
    if (rank_) add_dots<T>({part_.low.a.data, part_.low.a.stride, 1}, rows, rank_, zs_, part, true);
    k_.sum_parts(x_.rows, phases_, rows.count, part, bias_at(part_, rows.first), part_.y.data + rows.first,
                 part_.y.stride);
  }

  // The same, of blocks that are decoded in registers, or met in int8.
  void multiply_blocks(Range rows) const {
    const size_t n = x_.rows;
    T* part = scratch<T>(Scratch::kSums, n * rows.count * lanes_);
    T* sums = scratch<T>(Scratch::kWeight, n * rows.count);
    const T* bias = bias_at(part_, rows.first);
    if (rank_) {
      add_dots<T>({part_.low.a.data, part_.low.a.stride, 1}, rows, rank_, zs_, part, false);
      k_.sum_parts(n, phases_, rows.count, part, bias, part_.y.data + rows.first, part_.y.stride);
    }
    if (codes_.codes) {
      int8_dots_of_blocks(part_.w, rows, n, codes_, sums);
    } else {
      dots_of_blocks(part_.w, rows, x_, part);
      k_.sum_parts(1, lanes_, n * rows.count, part, nullptr, sums, 0);
    }
    for (size_t t = 0; t < n; ++t, sums += rows.count) {
      T* y = part_.y.row(t) + rows.first;
      for (size_t r = 0; r < rows.count; ++r) y[r] = (rank_ ? y[r] : bias ? bias[r] : 0) + sums[r];
    }
  }

  // part (rows, lanes) = [part +] m[rows] xs for a row-major m.
  template <class E>
  void add_dots(Strided<E> m, Range rows, size_t depth, const E* xs, T* part, bool accumulate) const {
    kernels::table().small<E>().dots(
        phases_, rows.count, depth,
        {m.data + rows.first * m.row_stride, m.row_stride, kernels::kPanelDepth<E>}, xs, part, accumulate);
  }

  // part (rows, lanes) = W[rows] xs. What is decoded, for a few rows at a time, stays in L2.
  void frozen(Range rows, T* part) const {
    const bool decodes = !in_place<W>(part_.w);
    const size_t step = decodes ? kRowBlock : rows.count;
    const size_t most = decodes ? depth_block(part_.w.d_in) : full_columns(part_.w.d_in);
    W* decoded = scratch<W>(Scratch::kWeight, step * (decodes ? scratch_columns(most) : kPanelColumns));
    for (size_t r = 0; r < rows.count; r += step)
      stream({rows.first + r, std::min(step, rows.count - r)}, most, decoded, part + r * lanes_);
  }

  // The same, at most so many columns at a time.
  void stream(Range rows, size_t most, W* decoded, T* part) const {
    const WeightView& w = part_.w;
    const size_t full = full_columns(w.d_in);
    most = std::max(most, kPanelColumns);
    size_t c = 0;
    do {  // once without columns, too: part is set to zero
      const size_t cols = std::min(most, (c < full ? full : w.d_in) - c);
      kernels::table().small<W>().dots(phases_, rows.count, depth_of<X>(cols),
                                       row_block(w, rows, {c, cols}, decoded),
                                       xs_ + c / kSteps<X> / phases_ * lanes_, part, c > 0);
      c += cols;
    } while (c < w.d_in);
  }

  const ForwardPart<T>& part_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const size_t lanes_, phases_, rank_;
  const X* xs_ = nullptr;      // x, by token and phase
  const T* zs_ = nullptr;      // scale * z, likewise
  kernels::Int8Rows codes_{};  // x in int8, where W meets it so
};

}  // namespace

template <class W>
void forward_small(const ForwardPart<Sum<W>>& part, Matrix<const Sum<W>> x, size_t threads) {
  SmallForward<W>(part, x).run(threads);
}

template void forward_small<float>(const ForwardPart<float>&, Matrix<const float>, size_t);
template void forward_small<double>(const ForwardPart<double>&, Matrix<const double>, size_t);
template void forward_small<Bf16>(const ForwardPart<float>&, Matrix<const float>, size_t);
template void forward_small<Bf16Pair>(const ForwardPart<float>&, Matrix<const float>, size_t);

}  // namespace nplora
