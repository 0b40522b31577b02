// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] with the outputs in the SIMD lanes: the backward product on blocks of Wᵀ.
#include <vector>

#include "base/parallel.h"
#include "ops/elements.h"
#include "ops/forward.h"
#include "ops/outer.h"
#include "ops/plan.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::kSteps;
using kernels::Panels;
using kernels::Strided;
using kernels::Sum;

namespace {

// A block of Wᵀ is made once for all tokens of a task, and the update may be folded in.
template <class E>
class RowsForward {
 public:
  using T = Sum<E>;

  RowsForward(std::span<const ForwardPart<T>> parts, Matrix<const T> x)
      : parts_(parts), x_(x), depth_(depth_of<E>(x.cols)) {
    for (const auto& part : parts) {
      const bool keep_z = part.z.data != nullptr;
      const LayerShape shape{x.rows,
                             part.w.d_out,
                             x.cols,
                             part.low.rank(),
                             sizeof(E) / kSteps<E>,
                             part.low.dropout > 0,
                             is_blocks(part.w.storage)};
      const Update update = forward_update(shape, keep_z);
      updates_.push_back({part, update, part.low.rank() && (keep_z || update == Update::kSteps)});
    }
  }

  void run(size_t threads) {
    pass_ = tokens_of_block(x_.rows, x_.cols, sizeof(E) / kSteps<E>);
    const bool projects = reserve();
    const StackRows<T> rows(parts_);
    for (size_t first = 0; first < x_.rows; first += pass_) {
      const Range pass{first, std::min(pass_, x_.rows - first)};
      const size_t units = ceil_div(pass.count, kPassUnit),
                   share = ceil_div(units, threads > 1 ? 4 * threads : 8);
      if (projects || kSteps<E> > 1)
        parallel_for(ceil_div(units, share), threads, Interruptible::kYes,
                     [&](size_t i) { prepare(pass, nth_block(pass.count, share * kPassUnit, i)); });
      const Grid grid({pass.count, kPassUnit, pass.count}, {rows.blocks(), 1, rows.blocks()},
                      flops_of(parts_, pass.count), threads);
      parallel_for(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
        rows.for_parts(grid.side(i), [&](PartRows piece) { multiply(pass, grid.tokens(i), piece); });
      });
    }
  }

 private:
  struct PartUpdate {
    const ForwardPart<T>& part;
    Update update;
    bool projects;
    Strided<E> b{};  // (r, depth)
    T* a = nullptr;  // scale * Aᵀ (r, d_out)
    T* z = nullptr;  // of a pass, (n, r)
  };

  // Divides scratch among the parts, transposes their factors; says whether there is a z to be computed.
  bool reserve() {
    size_t a_size = 0, b_size = 0, z_size = 0;
    for (const PartUpdate& u : updates_) {
      const size_t rank = u.part.low.rank();
      a_size += rank * u.part.w.d_out;
      b_size += u.projects && kSteps<E> > 1 ? rank * depth_ : 0;
      z_size += u.projects ? rank * pass_ : 0;
    }
    x_elements_ = kSteps<E> == 1 ? nullptr : scratch<E>(Scratch::kLanes, pass_ * depth_);
    T* a = scratch<T>(Scratch::kLowGradients, a_size + z_size);
    T* z = a + a_size;
    E* b = scratch<E>(Scratch::kLowLanes, b_size);
    for (PartUpdate& u : updates_) {
      const LowRank<T>& low = u.part.low;
      const size_t rank = low.rank();
      if (rank == 0) continue;
      u.a = a;
      transpose_scaled(low.a, low.scale, u.a);
      a += rank * u.part.w.d_out;
      if (!u.projects) continue;
      u.b = elements_or_self<E>(low.b, b);
      b += kSteps<E> > 1 ? rank * depth_ : 0;
      u.z = z;
      z += rank * pass_;
    }
    return z_size > 0;
  }

  // z, and x in elements E, of some tokens of a pass.
  void prepare(Range pass, Range some) const {
    const Range tokens{pass.first + some.first, some.count};
    if constexpr (kSteps<E> > 1)
      elements_of<E>(rows_of(x_, tokens), x_elements_ + some.first * depth_, depth_);
    for (const PartUpdate& u : updates_) {
      if (!u.projects) continue;
      const LowRank<T>& low = u.part.low;
      const size_t rank = low.rank();
      T* z = u.z + some.first * rank;
      for (size_t i = 0; i < some.count; i += kPassUnit) {
        const Range few{some.first + i, std::min(kPassUnit, some.count - i)};
        Strided<E> x = elements(pass, few.first);
        if (low.dropout > 0)
          x = elements_or_self<E>(
              dropped(low, x_, {pass.first + few.first, few.count}),
              kSteps<E> == 1 ? nullptr : scratch<E>(Scratch::kDroppedLanes, few.count * depth_));
        dot_product<E>(few.count, rank, depth_, x, u.b, z + i * rank);
      }
      if (u.part.z.data)
        for (size_t i = 0; i < some.count; ++i)
          std::copy_n(z + i * rank, rank, u.part.z.row(tokens.first + i));
    }
  }

  Strided<E> elements(Range pass, size_t first) const {
    if constexpr (kSteps<E> == 1)
      return {x_.row(pass.first + first), x_.stride, 1};
    else
      return {x_elements_ + first * depth_, depth_, 1};
  }

  // y of some rows of a part, for some tokens of a pass. The blocks of a few panels are made at a time, so that x is brought into L2
  // once for all of them.
  void multiply(Range pass, Range some, PartRows piece) const {
    const PartUpdate& u = updates_[piece.part];
    const size_t depth = depth_block(x_.cols), block_size = depth_of<E>(depth) * kPanelColumns;
    const size_t most =
        std::max<size_t>(1, kBlocksBytes / sizeof(E) / std::max<size_t>(1, block_size)) * kPanelColumns;
    E* blocks = scratch<E>(Scratch::kWeight, most / kPanelColumns * block_size);
    for (size_t r = 0; r < piece.rows.count; r += most) {
      const Range rows{piece.rows.first + r, std::min(most, piece.rows.count - r)};
      size_t col = 0;
      do {  // once without columns, too: y is set to zero
        const Range cols{col, std::min(depth, x_.cols - col)};
        for_panels_of(rows,
                      [&](size_t i, Range panel) { transpose(u, panel, cols, blocks + i * block_size); });
        for (size_t i = 0; i < some.count; i += kFewTokens) {
          const Range few{some.first + i, std::min(kFewTokens, some.count - i)};
          for_panels_of(rows, [&](size_t p, Range panel) {
            multiply(u, pass, few, panel, cols, blocks + p * block_size);
          });
        }
        col += cols.count;
      } while (col < x_.cols);
    }
  }

  // Calls body(index, rows) for each kPanelColumns rows.
  template <class Body>
  static void for_panels_of(Range rows, const Body& body) {
    for (size_t i = 0; i * kPanelColumns < rows.count; ++i) {
      const Range panel = nth_block(rows.count, kPanelColumns, i);
      body(i, {rows.first + panel.first, panel.count});
    }
  }

  // y (few, rows) = [y +] x[:, cols] block, and the update behind the last columns.
  void multiply(const PartUpdate& u, Range pass, Range few, Range rows, Range cols, const E* block) const {
    const Strided<E> x = elements(pass, few.first);
    T* y = u.part.y.row(pass.first + few.first) + rows.first;
    outer_tile<E, E>()(few.count, rows.count, depth_of<E>(cols.count),
                       {x.data + cols.first / kSteps<E>, x.row_stride, 1}, block, kPanelColumns, y,
                       u.part.y.stride, cols.first > 0, kernels::kFetchRowsAhead);
    if (cols.first + cols.count == x_.cols) add_update(u, few, rows, y);
  }

  // y (few, rows) += z (scale A)ᵀ [+ bias].
  void add_update(const PartUpdate& u, Range few, Range rows, T* y) const {
    const ForwardPart<T>& part = u.part;
    const size_t rank = part.low.rank();
    if (u.update == Update::kSteps)
      add_product<T>(few.count, rows.count, rank, {u.z + few.first * rank, rank, 1}, u.a + rows.first,
                     part.w.d_out, y, part.y.stride, true);
    static constexpr T kOne = 1;
    if (part.bias)
      add_product<T>(few.count, rows.count, 1, {&kOne, 0, 0}, part.bias + rows.first, 0, y, part.y.stride,
                     true);
  }

  // block (cols, kPanelColumns) = W[rows, cols] transposed, in elements E, with the update folded in where it is to be.
  void transpose(const PartUpdate& u, Range rows, Range cols, E* block) const {
    const auto& k = kernels::table().products<T>();
    const WeightView& w = u.part.w;
    // What is read as it lies need not be cut.
    const size_t most = is_blocks(w.storage)          ? kDecodedColumns
                        : !w.packed && in_place<E>(w) ? std::max<size_t>(1, cols.count)
                                                      : kPanelColumns;
    E* decoded = scratch<E>(Scratch::kDecoded, kPanelColumns * scratch_columns(kDecodedColumns));
    for (size_t c = 0; c < cols.count; c += most) {
      const size_t width = std::min(most, cols.count - c);
      const Panels<E> panel = row_block(w, rows, {cols.first + c, width}, false, decoded);
      E* out = block + c / kSteps<E> * kPanelColumns;
      k.to_lanes(kPanelColumns, rows.count, depth_of<E>(width), reinterpret_cast<const T*>(panel.data),
                 panel.row_stride, reinterpret_cast<T*>(out));  // pairs are moved as floats are
    }
    if constexpr (kSteps<E> == 1)
      if (u.update == Update::kFolded) {
        const LowRank<T>& low = u.part.low;
        outer_tile<E, E>()(cols.count, rows.count, low.rank(), {low.b.data + cols.first, 1, low.b.stride},
                           u.a + rows.first, u.part.w.d_out, block, kPanelColumns, true, {});
      }
  }

  const std::span<const ForwardPart<T>> parts_;
  const Matrix<const T> x_;
  const size_t depth_;
  size_t pass_ = 0;
  std::vector<PartUpdate> updates_;
  E* x_elements_ = nullptr;
};

}  // namespace

template <class E>
void forward_rows(std::span<const ForwardPart<Sum<E>>> parts, Matrix<const Sum<E>> x, size_t threads) {
  RowsForward<E>(parts, x).run(threads);
}

template void forward_rows<float>(std::span<const ForwardPart<float>>, Matrix<const float>, size_t);
template void forward_rows<double>(std::span<const ForwardPart<double>>, Matrix<const double>, size_t);
template void forward_rows<Bf16Pair>(std::span<const ForwardPart<float>>, Matrix<const float>, size_t);

}  // namespace nplora
