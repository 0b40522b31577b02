// The forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] for a batch of a few rows.
#include <atomic>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "base/pause.h"
#include "ops/elements.h"
#include "ops/fetch_list.h"
#include "ops/forward.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Fetch;
using kernels::kPanelColumns;
using kernels::kValuesPerElement;
using kernels::Operand;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;

namespace {

// A small batch x, which is interleaved once for all parts of a stack (see kernels::interleave_factor).
template <class T>
struct SmallBatch {
  Matrix<const T> x;
  const Products<T>& k = kernels::table().products<T>();
  size_t lanes = k.lanes / 2, interleave_factor = kernels::interleave_factor(x.rows, lanes);

  // The number of elements E that `interleave` writes for rows of `cols` columns.
  template <class E>
  size_t size(size_t cols) const {
    return lanes * ceil_div(depth_of<E>(cols), interleave_factor);
  }

  // Interleaves m into `out`, in elements E. Pairs of bfloat16 are moved as if they were floats.
  template <class E>
  const E* interleave(Matrix<const T> m, E* out) const {
    const size_t depth = depth_of<E>(m.cols);
    const Strided<E> rows = elements_or_self<E>(
        m, kValuesPerElement<E> == 1 ? nullptr : scratch<E>(Scratch::kPairing, m.rows * depth));
    k.interleave(m.rows, interleave_factor, depth, reinterpret_cast<const T*>(rows.data), rows.row_stride,
                 reinterpret_cast<T*>(out));
    return out;
  }
};

// Quantises x to int8.
kernels::Int8Rows quantized(Matrix<const float> x) {
  const size_t sub_blocks = x.cols / kSubBlock;
  auto* codes = scratch<int8_t>(Scratch::kCodes, x.rows * x.cols);
  float* scales = scratch<float>(Scratch::kCodeScales, 4 * x.rows * sub_blocks);
  float *sums = scales + x.rows * sub_blocks, *half_sums = sums + x.rows * sub_blocks;
  for (size_t t = 0; t < x.rows; ++t)
    kernels::table().int8.quantize(x.cols, x.row(t), codes + t * x.cols, scales + t * sub_blocks,
                                   sums + t * sub_blocks, half_sums + t * 2 * sub_blocks);
  return {codes, scales, sums, half_sums};
}

// The parts of the factors to prefetch before the update of some rows of W: the same rows of A, and a
// proportional share of B. Other workers may prefetch the other shares of B.
template <class T>
FetchList factors(const LowRank<T>& low, Range rows) {
  if (low.rank() == 0 || rows.count == 0) return {Fetch::none(), Fetch::none()};
  constexpr size_t kMostBytes = 256 << 10;  // the limit for A, and for B, so that both stay in L2
  const auto lines = [&](const T* from, size_t n) {
    return Fetch::memory(from, ceil_div(std::min(n * sizeof(T), kMostBytes), kCacheLine));
  };
  const size_t size = low.b.rows * low.b.stride, first = size * rows.first / low.a.rows;
  return {lines(low.b.data + first, size * (rows.first + rows.count) / low.a.rows - first),
          lines(low.a.row(rows.first), rows.count * low.rank())};
}

// Prefetches a piece of memory into L2, all of it at once.
void fetch(const Fetch& some) {
  for (size_t i = 0; i < some.lines; ++i) __builtin_prefetch(some.at + i * kCacheLine, 0, 2);
}

// Computes one part of a stack. The weight is read once, as elements of type W. If the weight is stored in
// panels, the panels are read one after the other, while the partial sums of the rows stay in the cache. The
// update is added last, when its factors are in the cache. The update is computed in the type of the sums.
template <class W>
class SmallForward {
 public:
  using T = Sum<W>;
  using X = Operand<W>;

  SmallForward(const ForwardPart<T>& part, const SmallBatch<T>& batch, const X* xs,
               const kernels::Int8Rows& codes, T* z)
      : part_(part),
        batch_(batch),
        x_(batch.x),
        k_(batch.k),
        lanes_(batch.lanes),
        interleave_factor_(batch.interleave_factor),
        rank_(part.low.rank()),
        xs_(xs),
        codes_(codes),
        z_(z) {}

  size_t rank() const { return rank_; }

  // Multiplies x by some rows of W: y[:, rows] = x W[rows]ᵀ [+ bias]. Meanwhile, the factors of the update
  // are prefetched.
  void multiply(Range rows) const {
    if constexpr (std::is_same_v<W, float>)
      if (dots_blocks(part_.w)) {
        FetchList next = factors(part_.low, rows);
        size_t blocks = ceil_div(rows.count, kRowBlock);
        for_blocks(rows, kRowBlock, [&](Range some) {
          const auto [beside, before] = next.share(blocks--);
          fetch(before);
          multiply_blocks(some, beside);
        });
        return;
      }
    for (const Fetch& some : factors(part_.low, rows).share(1)) fetch(some);
    T* sums = scratch<T>(Scratch::kSums, rows.count * lanes_);
    frozen(rows, sums);
    k_.sum_parts(x_.rows, interleave_factor_, rows.count, sums, bias_at(part_, rows.first),
                 part_.y.data + rows.first, part_.y.stride);
  }

  // Multiplies x by some rows of B: z[:, ranks] = scale * drop(x) B[ranks]ᵀ. The caller's z is stored without
  // the scale.
  void project(Range ranks) const {
    const size_t n = x_.rows;
    const X* xs = xs_;
    if (part_.low.dropout > 0)
      xs =
          batch_.template interleave<X>(dropped(part_.low, x_, {0, n}),
                                        scratch<X>(Scratch::kDroppedLanes, batch_.template size<X>(x_.cols)));
    const Strided<X> b = elements_or_self<X>(
        rows_of(part_.low.b, ranks), kValuesPerElement<X> == 1
                                         ? nullptr
                                         : scratch<X>(Scratch::kFactor, ranks.count * depth_of<X>(x_.cols)));
    T* sums = scratch<T>(Scratch::kSums, ranks.count * lanes_);
    dots<X>(b, {0, ranks.count}, depth_of<X>(x_.cols), xs, sums);
    k_.sum_parts(n, interleave_factor_, ranks.count, sums, nullptr, z_ + ranks.first, rank_);
    for (size_t t = 0; t < n; ++t) {
      T* row = z_ + t * rank_ + ranks.first;
      if (part_.z.data) std::copy_n(row, ranks.count, part_.z.row(t) + ranks.first);
      for (size_t i = 0; i < ranks.count; ++i) row[i] *= T(part_.low.scale);
    }
  }

  // Adds the update to the outputs of some rows of W: y[:, rows] += z A[rows]ᵀ.
  void update(Range rows) const {
    k_.add_dots(x_.rows, rows.count, rank_, part_.low.a.row(rows.first), z_, rank_, part_.y.data + rows.first,
                part_.y.stride);
  }

 private:
  // Cuts the rows into ranges of at most `most` rows, and calls body(range) for each.
  template <class Body>
  static void for_blocks(Range rows, size_t most, const Body& body) {
    for (size_t r = 0; r < rows.count; r += most) body(Range{rows.first + r, std::min(most, rows.count - r)});
  }

  // Does the work of `multiply` if W is in low-bit blocks. The blocks are decoded in registers or multiplied
  // in int8.
  void multiply_blocks(Range rows, const Fetch& next) const {
    const size_t n = x_.rows;
    T* part = scratch<T>(Scratch::kSums, n * rows.count * lanes_);
    T* sums = scratch<T>(Scratch::kWeight, n * rows.count);
    const T* bias = bias_at(part_, rows.first);
    if (dots_int8(part_.w)) {
      int8_dots_of_blocks(part_.w, rows, n, codes_, sums, next);
    } else {
      dots_of_blocks(part_.w, rows, x_, part, next);
      k_.sum_parts(1, lanes_, n * rows.count, part, nullptr, sums, 0);
    }
    for (size_t t = 0; t < n; ++t, sums += rows.count) {
      T* y = part_.y.row(t) + rows.first;
      for (size_t r = 0; r < rows.count; ++r) y[r] = (bias ? bias[r] : 0) + sums[r];
    }
  }

  // sums (rows, lanes) = m[rows] times xs, the interleaved x. m is row-major.
  template <class E>
  void dots(Strided<E> m, Range rows, size_t depth, const E* xs, T* sums) const {
    kernels::table().small<E>().dots(
        interleave_factor_, rows.count, depth,
        {m.data + rows.first * m.row_stride, m.row_stride, kernels::kPanelDepth<E>}, xs, sums, false);
  }

  // part (rows, lanes) = W[rows] times xs, the interleaved x. If W must be decoded, a few rows are decoded at
  // a time and stay in L2.
  void frozen(Range rows, T* part) const {
    const bool decodes = !in_place<W>(part_.w);
    const bool sums_in_l1 = std::is_same_v<W, Bf16> && part_.w.packed && x_.rows == 1;
    const size_t step = decodes ? kRowBlock : sums_in_l1 ? kStreamedBf16Rows : rows.count;
    const size_t most = decodes ? depth_block(part_.w.d_in) : full_columns(part_.w.d_in);
    W* decoded = scratch<W>(Scratch::kWeight, step * (decodes ? scratch_columns(most) : kPanelColumns));
    for_blocks(rows, step,
               [&](Range some) { stream(some, most, decoded, part + (some.first - rows.first) * lanes_); });
  }

  // part (rows, lanes) = W[rows] times xs, the interleaved x. At most `most` columns of W are multiplied at a
  // time.
  void stream(Range rows, size_t most, W* decoded, T* part) const {
    const WeightView& w = part_.w;
    const size_t full = full_columns(w.d_in);
    most = std::max(most, kPanelColumns);
    size_t c = 0;
    do {  // runs once even if W has no columns, to set `part` to zero
      const size_t cols = std::min(most, (c < full ? full : w.d_in) - c);
      kernels::table().small<W>().dots(
          interleave_factor_, rows.count, depth_of<X>(cols), row_block(w, rows, {c, cols}, false, decoded),
          xs_ + c / kValuesPerElement<X> / interleave_factor_ * lanes_, part, c > 0);
      c += cols;
    } while (c < w.d_in);
  }

  const ForwardPart<T>& part_;
  const SmallBatch<T>& batch_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const size_t lanes_, interleave_factor_, rank_;
  const X* const xs_;               // x, interleaved
  const kernels::Int8Rows& codes_;  // x in int8, if W is multiplied in int8
  T* const z_;                      // z (n, r), times the scale
};

// Each worker takes at least this many rows of B, because kernels compute up to four rows side by side.
constexpr size_t kLeastRanks = 4;

// Adds one to a counter when a piece of work ends. Other threads wait until the counter reaches the number of
// all pieces. Work that ends with an exception counts too.
class Counted {
 public:
  explicit Counted(std::atomic<size_t>& count) : count_(count) {}
  ~Counted() { ++count_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<size_t>& count_;
};

// The time to read and decode W, divided by the time of the floating-point operations with W.
constexpr double kReadingCost = 2;

}  // namespace

template <class W>
void forward_small(std::span<const ForwardPart<Sum<W>>> parts, Matrix<const Sum<W>> x) {
  using T = Sum<W>;
  using X = Operand<W>;
  const SmallBatch<T> batch{x};
  kernels::Int8Rows codes{};
  bool every_int8 = true;
  size_t ranks = 0;
  for (const ForwardPart<T>& part : parts) {
    every_int8 &= dots_int8(part.w);
    ranks += part.low.rank();
    if constexpr (std::is_same_v<W, float>)
      if (dots_int8(part.w) && !codes.codes) codes = quantized(x);
  }
  const X* xs =
      every_int8 && ranks == 0
          ? nullptr
          : batch.template interleave<X>(x, scratch<X>(Scratch::kLanes, batch.template size<X>(x.cols)));
  T* z = scratch<T>(Scratch::kLowGradients, x.rows * ranks);
  const size_t threads = useful_threads(kReadingCost * flops_of(parts, x.rows));
  std::vector<SmallForward<W>> products;
  std::vector<PartRows> tasks, projections;
  size_t rows = 0;
  products.reserve(parts.size());
  for (const ForwardPart<T>& part : parts) {
    const size_t product = products.size(), rank = part.low.rank();
    products.emplace_back(part, batch, xs, codes, z);
    z += x.rows * rank;
    rows += part.w.d_out;
    const Grid grid({1, 1, 1}, {part.w.d_out, kRowBlock, kStreamedRows},
                    flops(x.rows, part.w.d_out, part.w.d_in), threads);
    for (size_t i = 0; i < grid.tasks(); ++i) tasks.push_back({product, grid.side(i)});
    // With dropout, all rows of B are one task, because each of several tasks would have to apply dropout to
    // all of x.
    const size_t step = part.low.dropout > 0 ? rank : std::max(kLeastRanks, ceil_div(rank, threads));
    for (size_t r = 0; r < rank; r += step) projections.push_back({product, {r, std::min(step, rank - r)}});
  }
  // Each worker multiplies rows of W, one task after the other, and then rows of B. When no rows of B are
  // left to take, the worker waits until z is complete. The worker then adds the update to the outputs of its
  // own rows of W. So a worker only waits for rows of B that another worker is computing. For large weights
  // there are more workers than threads, so that each thread runs several workers, and Ctrl-C is noticed
  // between them.
  const size_t in_time = static_cast<size_t>(flops_of(parts, x.rows) / kTaskFlops);
  const size_t workers = round_up(std::max(threads, in_time), threads);
  const size_t most_rows = workers > threads ? ceil_div(rows, workers) : rows;
  std::atomic<size_t> next = 0, next_projection = 0, projected = 0;
  parallel_for(workers, threads, Interruptible::kYes, [&](size_t) {
    std::vector<PartRows> taken;
    for (size_t i = 0, n = 0; n < most_rows && (i = next++) < tasks.size(); n += tasks[i].rows.count) {
      const SmallForward<W>& product = products[tasks[i].part];
      product.multiply(tasks[i].rows);
      if (product.rank() > 0) taken.push_back(tasks[i]);
    }
    for (size_t i = 0; (i = next_projection++) < projections.size();) {
      const Counted counted(projected);
      products[projections[i].part].project(projections[i].rows);
    }
    if (taken.empty()) return;
    wait_until([&] { return projected == projections.size(); });
    for (const PartRows& task : taken) products[task.part].update(task.rows);
  });
}

template void forward_small<float>(std::span<const ForwardPart<float>>, Matrix<const float>);
template void forward_small<double>(std::span<const ForwardPart<double>>, Matrix<const double>);
template void forward_small<Bf16>(std::span<const ForwardPart<float>>, Matrix<const float>);
template void forward_small<Bf16Pair>(std::span<const ForwardPart<float>>, Matrix<const float>);

}  // namespace nplora
