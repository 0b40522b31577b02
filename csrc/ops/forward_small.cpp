// The forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] for a batch of a few rows.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "base/pause.h"
#include "ops/elements.h"
#include "ops/fetch_list.h"
#include "ops/forward.h"

namespace nplora {

using kernels::Bf16;
using kernels::Fetch;
using kernels::kPanelColumns;
using kernels::Products;
using kernels::Sum;

namespace {

// Quantises x to int8.
kernels::Int8Rows quantized(Matrix<const float> x) {
  const size_t sub_blocks = x.cols / kSubBlock;
  auto* codes = scratch<int8_t>(Scratch::kCodes, x.rows * x.cols);
  float* scales = scratch<float>(Scratch::kCodeScales, 4 * x.rows * sub_blocks);
  float *sums = scales + x.rows * sub_blocks, *half_sums = sums + x.rows * sub_blocks;
  for (size_t t = 0; t < x.rows; ++t)
    kernels::table().int8.quantize_sub_blocks(x.cols, x.row(t), codes + t * x.cols, scales + t * sub_blocks,
                                              sums + t * sub_blocks, half_sums + t * 2 * sub_blocks);
  return {codes, scales, sums, half_sums};
}

// Returns x if each row begins at a multiple of the size of a vector, so that no vector lies in two cache
// lines. Otherwise, returns a copy whose rows begin at cache lines, because a vector in two cache lines is
// loaded slowly. NumPy aligns arrays only to 16 bytes. A vector has 32 bytes with AVX2, and 64 with AVX-512.
template <class T>
Matrix<const T> with_aligned_rows(Matrix<const T> x) {
  const size_t lanes = kernels::table().products<T>().lanes / 2;  // of one vector
  if (reinterpret_cast<uintptr_t>(x.data) % (lanes * sizeof(T)) == 0 &&
      (x.rows == 1 || x.stride % lanes == 0))
    return x;
  const size_t stride = round_up(x.cols, kCacheLine / sizeof(T));
  T* copy = scratch<T>(Scratch::kAligned, x.rows * stride);
  for (size_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), x.cols, copy + t * stride);
  return {copy, x.rows, x.cols, stride};
}

// The low-rank update that is added to the outputs of one group of rows of x. For these rows, `z`
// (rows.count, r) holds scale * drop(x) Bᵀ.
template <class T>
struct ProjectedUpdate {
  Range rows;
  const LowRank<T>* low;
  T* z;

  size_t rank() const { return low->rank(); }
};

// Lists the memory to prefetch before an update is added to some outputs y[:, rows]: A[rows] and a part of B.
// The size of this part is proportional to the number of rows, because other workers prefetch the other parts
// of B. The list has at most `max_bytes` bytes of A, and at most `max_bytes` bytes of B.
template <class T>
FetchList factors(const LowRank<T>& low, Range rows, size_t max_bytes) {
  if (low.rank() == 0 || rows.count == 0) return {Fetch::none(), Fetch::none()};
  const auto lines = [&]<class E>(const E* from, size_t n) {
    return Fetch::memory(from, ceil_div(std::min(n * sizeof(E), max_bytes), kCacheLine));
  };
  const size_t size = low.b.rows * low.b.stride, first = size * rows.first / low.a.rows;
  const size_t b_count = size * (rows.first + rows.count) / low.a.rows - first;
  const size_t a_first = rows.first * low.rank(), a_count = rows.count * low.rank();
  if (low.narrow_a) return {lines(low.narrow_b + first, b_count), lines(low.narrow_a + a_first, a_count)};
  return {lines(low.b.data + first, b_count), lines(low.a.data + a_first, a_count)};
}

// Prefetches all cache lines of the memory `some` into L2 at once.
void fetch(const Fetch& some) {
  for (size_t i = 0; i < some.lines; ++i) __builtin_prefetch(some.at + i * kCacheLine, 0, 2);
}

// Computes the outputs of one layer. The weight is read once, as elements of type W. If the weight is stored
// in panels, the panels are read one after the other, while the partial sums of the rows stay in the cache.
// The updates are added at the end, because their factors are prefetched during the products with the weight.
// The products are summed in type T, and the updates are computed in type T, too. The bits of the result for
// a row of x do not depend on the other rows of x.
template <class W>
class SmallForward {
 public:
  using T = Sum<W>;

  SmallForward(const ForwardPart<T>& part, Matrix<const T> x, const kernels::Int8Rows& codes)
      : part_(part), x_(x), k_(kernels::table().products<T>()), lanes_(k_.lanes / 2), codes_(codes) {}

  // Adds the update of some rows of x to the list of updates. `z` is memory for the z of these rows.
  void add(Range rows, const LowRank<T>& low, T* z) {
    if (rows.count > 0 && low.rank() > 0) groups_.push_back({rows, &low, z});
  }

  const std::vector<ProjectedUpdate<T>>& groups() const { return groups_; }

  // Multiplies x by some rows of W: y[:, rows] = x W[rows]ᵀ [+ bias]. During this product, the factors of the
  // updates are prefetched.
  void multiply(Range rows) const {
    std::vector<FetchList> next;
    // At most this many bytes of A are prefetched for all groups together, and at most this many bytes of B.
    constexpr size_t kMaxBytes = 256 << 10;
    for (const auto& group : groups_) next.push_back(factors(*group.low, rows, kMaxBytes / groups_.size()));
    if constexpr (std::is_same_v<W, float>)
      if (dots_blocks(part_.w)) {
        size_t blocks = ceil_div(rows.count, kRowBlock);
        for_blocks(rows, kRowBlock, [&](Range some) {
          Fetch beside = Fetch::none();
          for (size_t i = 0; i < next.size(); ++i) {
            const auto [longer, shorter] = next[i].share(blocks);
            i == 0 ? void(beside = longer) : fetch(longer);
            fetch(shorter);
          }
          --blocks;
          multiply_blocks(some, beside);
        });
        return;
      }
    for (FetchList& list : next)
      for (const Fetch& some : list.share(1)) fetch(some);
    multiply_rows(rows);
  }

  // Multiplies one group of rows of x by the rows `ranks` of B: z[:, ranks] = scale * drop(x) B[ranks]ᵀ. If
  // the caller needs z, then drop(x) B[ranks]ᵀ, without the scale, is also stored in the caller's array.
  void project(size_t group, Range ranks) const {
    const auto& [rows, low, z] = groups_[group];
    const size_t n = rows.count, rank = low->rank();
    const Matrix<const T> x = dropped(*low, x_, rows);
    T* sums = scratch<T>(Scratch::kSums, n * ranks.count * lanes_);
    const auto dots = [&]<class E>(const E* b) {
      kernels::table().small<E>().dots(n, ranks.count, x.cols,
                                       {b + ranks.first * low->b.stride, low->b.stride, kPanelColumns},
                                       x.data, x.stride, sums, false);
    };
    if constexpr (std::is_same_v<T, float>)
      low->narrow_b ? dots(low->narrow_b) : dots(low->b.data);
    else
      dots(low->b.data);
    for (size_t t = 0; t < n; ++t, sums += ranks.count * lanes_) {
      T* row = z + t * rank + ranks.first;
      k_.sum_parts(ranks.count, sums, nullptr, row);
      if (part_.z.data) std::copy_n(row, ranks.count, part_.z.row(t) + ranks.first);
      for (size_t i = 0; i < ranks.count; ++i) row[i] *= T(low->scale);
    }
  }

  // Adds the updates to the outputs of some rows of W: y[:, rows] += z A[rows]ᵀ.
  void update(Range rows) const {
    for (const auto& [tokens, low, z] : groups_) {
      const size_t rank = low->rank();
      T* y = part_.y.row(tokens.first) + rows.first;
      const auto add = [&]<class E>(const E* a) {
        kernels::table().small<E>().add_dots(tokens.count, rows.count, rank, a + rows.first * rank, z, rank,
                                             y, part_.y.stride);
      };
      if constexpr (std::is_same_v<T, float>)
        low->narrow_a ? add(low->narrow_a) : add(low->a.data);
      else
        add(low->a.data);
    }
  }

 private:
  // Cuts the rows into ranges of `most` rows, and calls body(range) for each range. The last range may be
  // shorter.
  template <class Body>
  static void for_blocks(Range rows, size_t most, const Body& body) {
    for (size_t r = 0; r < rows.count; r += most) body(Range{rows.first + r, std::min(most, rows.count - r)});
  }

  // Computes the same as `multiply`, for a W in low-bit blocks. The blocks are decoded in registers or
  // multiplied in int8. At the same time, the memory `next` is prefetched.
  void multiply_blocks(Range rows, const Fetch& next) const {
    const size_t n = x_.rows;
    if (!dots_int8(part_.w)) {
      T* sums = scratch<T>(Scratch::kSums, n * rows.count * lanes_);
      dots_of_blocks(part_.w, rows, x_, sums, next);
      return sum_lanes(rows, sums);
    }
    T* sums = scratch<T>(Scratch::kWeight, n * rows.count);
    const T* bias = bias_at(part_, rows.first);
    int8_dots_of_blocks(part_.w, rows, n, codes_, sums, next);
    for (size_t t = 0; t < n; ++t, sums += rows.count) {
      T* y = part_.y.row(t) + rows.first;
      for (size_t r = 0; r < rows.count; ++r) y[r] = (bias ? bias[r] : 0) + sums[r];
    }
  }

  // Adds up `sums` (n, rows, lanes) over the lanes, and stores the totals [+ bias] in y[:, rows].
  void sum_lanes(Range rows, const T* sums) const {
    for (size_t t = 0; t < x_.rows; ++t, sums += rows.count * lanes_)
      k_.sum_parts(rows.count, sums, bias_at(part_, rows.first), part_.y.row(t) + rows.first);
  }

  // Computes the same as `multiply`, for a W that is not in low-bit blocks. If W must be decoded, kRowBlock
  // rows are decoded at a time, so that the decoded rows stay in L2. If x has several rows, kRowBlock rows of
  // W are multiplied at a time, so that the partial sums stay in L1.
  void multiply_rows(Range rows) const {
    const bool decodes = !in_place<W>(part_.w);
    const bool sums_in_l1 = std::is_same_v<W, Bf16> && part_.w.packed;
    const size_t step = decodes || x_.rows > 1 ? kRowBlock : sums_in_l1 ? kStreamedBf16Rows : rows.count;
    const size_t most = decodes ? depth_block(part_.w.d_in) : full_columns(part_.w.d_in);
    W* decoded = scratch<W>(Scratch::kWeight, step * (decodes ? scratch_columns(most) : kPanelColumns));
    T* sums = scratch<T>(Scratch::kSums, x_.rows * std::min(step, rows.count) * lanes_);
    for_blocks(rows, step, [&](Range some) {
      stream(some, most, decoded, sums);
      sum_lanes(some, sums);
    });
  }

  // Multiplies the given rows of W with x, and stores the partial sums in `sums` (n, rows, lanes). At most
  // `max_cols` columns of W are multiplied at a time.
  void stream(Range rows, size_t max_cols, W* decoded, T* sums) const {
    const WeightView& w = part_.w;
    const size_t full = full_columns(w.d_in);
    max_cols = std::max(max_cols, kPanelColumns);
    size_t c = 0;
    do {  // if W has no columns, the only iteration sets `sums` to zero
      const size_t cols = std::min(max_cols, (c < full ? full : w.d_in) - c);
      kernels::table().small<W>().dots(x_.rows, rows.count, cols,
                                       row_block(w, rows, {c, cols}, false, decoded), x_.data + c, x_.stride,
                                       sums, c > 0);
      c += cols;
    } while (c < w.d_in);
  }

  const ForwardPart<T>& part_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const size_t lanes_;
  const kernels::Int8Rows& codes_;  // x in int8, if the product with W is in int8
  std::vector<ProjectedUpdate<T>> groups_;
};

// The rows of B are cut into tasks of at least this many rows (the last task may have fewer), because kernels
// compute up to four rows at a time.
constexpr size_t kLeastRanks = 4;

// A task of the products with B. The task multiplies one group of rows of x by some rows of B of one layer.
struct Projection {
  size_t part, group;
  Range ranks;
};

// Adds one to a counter when a product with rows of B ends. Other threads wait until all these products have
// ended, so a product that throws an exception is counted, too.
class Counted {
 public:
  explicit Counted(std::atomic<size_t>& count) : count_(count) {}
  ~Counted() { ++count_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<size_t>& count_;
};

// The time of a product with W, divided by the time of its floating-point operations alone. The product takes
// longer, because W must be read and decoded.
constexpr double kReadingCost = 2;

}  // namespace

template <class W>
void forward_small(std::span<const ForwardPart<Sum<W>>> parts, Matrix<const Sum<W>> x) {
  using T = Sum<W>;
  x = with_aligned_rows(x);
  kernels::Int8Rows codes{};
  size_t z_size = 0;
  for (const ForwardPart<T>& part : parts) {
    for_groups(part, x.rows, [&](Range rows, const LowRank<T>& low) { z_size += rows.count * low.rank(); });
    if constexpr (std::is_same_v<W, float>)
      if (dots_int8(part.w) && !codes.codes) codes = quantized(x);
  }
  T* z = scratch<T>(Scratch::kLowGradients, z_size);
  const size_t threads = useful_threads(kReadingCost * flops_of(parts, x.rows));
  std::vector<SmallForward<W>> products;
  std::vector<PartRows> tasks;
  std::vector<Projection> projections;
  size_t rows = 0;
  products.reserve(parts.size());
  for (const ForwardPart<T>& part : parts) {
    const size_t product = products.size();
    products.emplace_back(part, x, codes);
    for_groups(part, x.rows, [&](Range tokens, const LowRank<T>& low) {
      products.back().add(tokens, low, z);
      z += tokens.count * low.rank();
    });
    rows += part.w.d_out;
    const Grid grid({1, 1, 1}, {part.w.d_out, kRowBlock, kStreamedRows},
                    flops(x.rows, part.w.d_out, part.w.d_in), threads);
    for (size_t i = 0; i < grid.tasks(); ++i) tasks.push_back({product, grid.side(i)});
    const auto& groups = products.back().groups();
    for (size_t i = 0; i < groups.size(); ++i) {
      // A group becomes one task, with all rows of B, in two cases: if there are at least as many groups as
      // threads, or if the group has dropout. (If a group with dropout became several tasks, each task would
      // apply dropout to the same rows of x again.)
      const size_t rank = groups[i].rank();
      const bool whole = groups.size() >= threads || groups[i].low->dropout > 0;
      const size_t step = whole ? rank : std::max(kLeastRanks, ceil_div(rank, threads));
      for (size_t r = 0; r < rank; r += step)
        projections.push_back({product, i, {r, std::min(step, rank - r)}});
    }
  }
  // Each worker first multiplies rows of W, one task after the other, and then rows of B. When no rows of B
  // are left to take, the worker waits until z is complete, and then adds the updates to the outputs that it
  // has computed. So a worker waits only while other workers still multiply rows of B. A worker is a task of
  // parallel_for. For large weights there are more workers than threads, so that each worker ends soon:
  // Ctrl-C is noticed whenever a worker has ended.
  const size_t in_time = static_cast<size_t>(flops_of(parts, x.rows) / kTaskFlops);
  const size_t workers = round_up(std::max(threads, in_time), threads);
  const size_t most_rows = workers > threads ? ceil_div(rows, workers) : rows;
  std::atomic<size_t> next = 0, next_projection = 0, projected = 0;
  parallel_for(workers, threads, Interruptible::kYes, [&](size_t) {
    std::vector<PartRows> taken;
    for (size_t i = 0, n = 0; n < most_rows && (i = next++) < tasks.size(); n += tasks[i].rows.count) {
      const SmallForward<W>& product = products[tasks[i].part];
      product.multiply(tasks[i].rows);
      if (!product.groups().empty()) taken.push_back(tasks[i]);
    }
    for (size_t i = 0; (i = next_projection++) < projections.size();) {
      const Counted counted(projected);
      products[projections[i].part].project(projections[i].group, projections[i].ranks);
    }
    if (taken.empty()) return;
    wait_until([&] { return projected == projections.size(); });
    for (const PartRows& task : taken) products[task.part].update(task.rows);
  });
}

template void forward_small<float>(std::span<const ForwardPart<float>>, Matrix<const float>);
template void forward_small<double>(std::span<const ForwardPart<double>>, Matrix<const double>);
template void forward_small<Bf16>(std::span<const ForwardPart<float>>, Matrix<const float>);

}  // namespace nplora
