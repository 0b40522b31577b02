// The forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] with the outputs in the SIMD lanes.
// forward_rows uses the same matrix product as the backward pass, on blocks of Wᵀ.
#include <cassert>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "ops/elements.h"
#include "ops/forward.h"
#include "ops/int8_weight.h"
#include "ops/kernel_plan.h"
#include "ops/outer.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::Int8Quad;
using kernels::kInt8PanelColumns;
using kernels::kPanelColumns;
using kernels::kValuesPerElement;
using kernels::Panels;
using kernels::Strided;
using kernels::Sum;

namespace {

// The forward pass with outputs in the SIMD lanes. Each block of the weight is transposed once for all tokens
// of a task. The update may be merged into the block on the fly. The template parameter E is the element type
// of the products with the factors. The template parameter W is the element type of blocks of the weight: E,
// or Int8Quad for products in int8.
template <class E, class W>
class RowsForward {
 public:
  using T = Sum<E>;

  RowsForward(std::span<const ForwardPart<T>> parts, Matrix<const T> x, size_t plan_tokens)
      : parts_(parts), x_(x), depth_(depth_of<E>(x.cols)) {
    joined_.reserve(parts.size());  // joined_ must not reallocate: updates_ points to its elements
    for (const auto& part : parts) {
      const bool keep_z = part.z.data != nullptr;
      const LayerShape shape{plan_tokens,
                             part.w.d_out,
                             x.cols,
                             part.low.rank(),
                             sizeof(E) / kValuesPerElement<E>,
                             part.low.dropout > 0,
                             is_blocks(part.w.storage)};
      const Update update = plan_forward(shape, keep_z).update;
      assert(!(part.multiplied && update == Update::kMergedOnTheFly));
      const bool projects = part.low.rank() && (keep_z || update == Update::kSeparate);
      updates_.push_back({part, update, projects ? join(part.low) : nullptr});
      if constexpr (kInt8) updates_.back().kept = part.w.int8->codes();
    }
  }

  void run(size_t threads) {
    block_tokens_ = tokens_of_l3_block(x_.rows, x_.cols, sizeof(W) / kValuesPerElement<W>);
    reserve();
    const StackRows<T> rows(parts_, kTaskRows);
    for (size_t first = 0; first < x_.rows; first += block_tokens_) {
      const Range token_block{first, std::min(block_tokens_, x_.rows - first)};
      if (!joined_.empty() || (kConverts && multiplies_x(parts_)))
        for_pieces(token_block.count, kTokenUnit, threads, [&](Range some) { prepare(token_block, some); });
      const Grid grid({token_block.count, kTokenUnit, token_block.count}, {rows.blocks(), 1, rows.blocks()},
                      flops_of(parts_, token_block.count), threads);
      parallel_in_order(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
        rows.for_parts(grid.side(i), [&](PartRows piece) { multiply(token_block, grid.tokens(i), piece); });
      });
    }
  }

 private:
  static constexpr bool kInt8 = std::is_same_v<W, Int8Quad>, kConverts = kValuesPerElement<W> > 1;
  // A transposed block contains kBlockRows rows of W. W is divided into tasks at multiples of kTaskRows rows.
  static constexpr size_t kBlockRows = kInt8 ? kInt8PanelColumns : kPanelColumns;
  static constexpr size_t kTaskRows = kInt8 ? 2 * kRowBlock : kRowBlock;
  static_assert(kTaskRows % kBlockRows == 0);

  // A group of layers. One product computes the z of all these layers, so that x is read once, and the z are
  // stored side by side. A layer with dropout is not joined with other layers, because each layer drops
  // different elements of x.
  struct Joined {
    const LowRank<T>* dropped = nullptr;  // the update of a layer with dropout; null without dropout
    size_t rank = 0;                      // the sum of the ranks of all joined layers
    E* b = nullptr;                       // the Bᵀ of all joined layers, side by side, (depth, rank)
    T* z = nullptr;                       // the z of a token block of n tokens, (n, rank)
  };

  struct PartUpdate {
    const ForwardPart<T>& part;
    Update update;
    Joined* joined;                           // null if z is not needed
    size_t column = 0;                        // the layer's first column in Joined::z
    T* a = nullptr;                           // scale * Aᵀ (r, d_out)
    Matrix<const E> a_pairs{};                // scale * Aᵀ, converted to type E
    E* z_elements = nullptr;                  // the layer's z of a token block, if z is converted to E
    std::shared_ptr<const KeptCodes> kept{};  // all of W in int8, if kept in memory; otherwise null

    size_t rank() const { return part.low.rank(); }
  };

  Joined* join(const LowRank<T>& low) {
    const bool drops = low.dropout > 0;
    for (Joined& each : joined_)
      if (!drops && !each.dropped) return &each;
    return &joined_.emplace_back(Joined{drops ? &low : nullptr});
  }

  // Divides the scratch memory among the layers, and converts their factors to elements of type E.
  void reserve() {
    for (PartUpdate& u : updates_)
      if (u.joined) u.column = std::exchange(u.joined->rank, u.joined->rank + u.rank());
    divide_scratch<T, E>(Scratch::kLowGradients, Scratch::kLowLanes,
                         [this](Arena<T>& t, Arena<E>& e) { divide(t, e); });
    if constexpr (kInt8)
      x_codes_.place(block_tokens_, scratch<char>(Scratch::kLanes, x_codes_.bytes(block_tokens_)));
    else if constexpr (kConverts)
      x_elements_ = scratch<E>(Scratch::kLanes, block_tokens_ * depth_);
    for (PartUpdate& u : updates_)
      if (u.rank()) bring(u);
  }
  void divide(Arena<T>& t, Arena<E>& e) {
    for (Joined& each : joined_) {
      each.z = t.take(block_tokens_ * each.rank);
      each.b = e.take(depth_ * each.rank);
    }
    for (PartUpdate& u : updates_) {
      u.a = t.take(u.rank() * u.part.w.d_out);
      if (kValuesPerElement<E> == 1 || !u.joined) continue;
      u.z_elements = e.take(block_tokens_ * depth_of<E>(u.rank()));
      u.a_pairs.data = e.take(depth_of<E>(u.rank()) * u.part.w.d_out);
    }
  }
  // Computes scale * Aᵀ of a layer, and stores Bᵀ of the layer beside the Bᵀ of the other layers of its
  // group.
  void bring(PartUpdate& u) const {
    const LowRank<T>& low = u.part.low;
    const size_t rank = u.rank(), d_out = u.part.w.d_out;
    transpose(low.a, u.a, d_out);
    for (size_t i = 0; i < rank * d_out; ++i) u.a[i] *= T(low.scale);
    if (!u.joined) return;
    u.a_pairs = pairs_down_columns<E>({u.a, rank, d_out, d_out}, const_cast<E*>(u.a_pairs.data));
    const Strided<E> b = elements_or_self<E>(
        low.b, kValuesPerElement<E> == 1 ? nullptr : scratch<E>(Scratch::kFactor, rank * depth_));
    // If E is Bf16Pair, `transpose` moves each pair as if it were one float.
    transpose<T>({reinterpret_cast<const T*>(b.data), rank, depth_, b.row_stride},
                 reinterpret_cast<T*>(u.joined->b + u.column), u.joined->rank);
  }

  // Computes z, and converts x to elements of type E, for some tokens of a token block. Only a few tokens are
  // processed at a time, so that x is in L2 when it is multiplied with Bᵀ.
  void prepare(Range token_block, Range some) const {
    for (size_t i = 0; i < some.count; i += kTokenUnit) {
      const Range few{some.first + i, std::min(kTokenUnit, some.count - i)};
      const Strided<E> x = convert(rows_of(x_, {token_block.first + few.first, few.count}), few.first);
      for (const Joined& each : joined_) project(each, x, token_block, few);
      for (const PartUpdate& u : updates_)
        if (u.joined) keep(u, token_block, few);
    }
  }

  // Converts the x of a few tokens to the type of the products with W, and stores the result. Returns the x
  // of these tokens as elements of type E, for the products with B. `first` is the first token, counted from
  // the start of the token block.
  Strided<E> convert(Matrix<const T> x, size_t first) const {
    if constexpr (kInt8) {
      for (size_t i = 0; i < x.rows; ++i) x_codes_.quantize(first + i, x.row(i), nullptr);
      if (joined_.empty()) return {};
      return elements_or_self<E>(x, scratch<E>(Scratch::kPairing, x.rows * depth_));
    } else {
      return elements_or_self<E>(x, kConverts ? x_elements_ + first * depth_ : nullptr);
    }
  }

  // Computes the z of a few tokens of a token block.
  void project(const Joined& all, Strided<E> x, Range token_block, Range few) const {
    const Range tokens{token_block.first + few.first, few.count};
    if (all.dropped)
      x = elements_or_self<E>(
          dropped(*all.dropped, x_, tokens),
          kValuesPerElement<E> == 1 ? nullptr : scratch<E>(Scratch::kDroppedLanes, few.count * depth_));
    add_product<E>(few.count, all.rank, depth_, x, all.b, all.rank, all.z + few.first * all.rank, all.rank,
                   false, rows_after(x_, tokens));
  }

  // Stores the z of a layer, for a few tokens, in the array of the caller. If E is Bf16Pair, also converts
  // this z to pairs for the product with A.
  void keep(const PartUpdate& u, Range token_block, Range few) const {
    const size_t stride = u.joined->rank;
    const Matrix<const T> z{u.joined->z + few.first * stride + u.column, few.count, u.rank(), stride};
    if constexpr (kValuesPerElement<E> > 1)
      elements_of<E>(z, u.z_elements + few.first * depth_of<E>(z.cols), depth_of<E>(z.cols));
    if (u.part.z.data)
      for (size_t i = 0; i < few.count; ++i)
        std::copy_n(z.row(i), z.cols, u.part.z.row(token_block.first + few.first + i));
  }

  Strided<E> elements(Range token_block, size_t first) const {
    if constexpr (kValuesPerElement<E> == 1)
      return {x_.row(token_block.first + first), x_.stride, 1};
    else
      return {x_elements_ + first * depth_, depth_, 1};
  }

  // Returns the rows of z for token `first` and all later tokens, as elements of type E.
  Strided<E> z_of(const PartUpdate& u, size_t first) const {
    const size_t depth = depth_of<E>(u.rank()), stride = u.joined->rank;
    if constexpr (kValuesPerElement<E> == 1)
      return {u.joined->z + first * stride + u.column, stride, 1};
    else
      return {u.z_elements + first * depth, depth, 1};
  }

  // Computes the outputs y of some rows of a layer's weight, for some tokens of a token block. Several blocks
  // of W are transposed at a time, so that x is loaded into L2 once for all these blocks.
  void multiply(Range token_block, Range some, PartRows piece) const {
    const PartUpdate& u = updates_[piece.part];
    constexpr size_t kFew = kInt8 ? kFewInt8Tokens : kFewTokens;
    if (u.part.multiplied) {
      for (size_t i = 0; i < some.count; i += kFew)
        add_update(u, token_block, {some.first + i, std::min(kFew, some.count - i)}, piece.rows);
      return;
    }
    const size_t depth = kInt8 ? int8_depth_block(x_.cols) : depth_block(x_.cols);
    const size_t block_size = depth_of<W>(depth) * kBlockRows;
    const size_t most =
        std::max<size_t>(1, kBlocksBytes / sizeof(W) / std::max<size_t>(1, block_size)) * kBlockRows;
    W* blocks = scratch<W>(Scratch::kWeight, most / kBlockRows * block_size);
    for (size_t r = 0; r < piece.rows.count; r += most) {
      const Range rows{piece.rows.first + r, std::min(most, piece.rows.count - r)};
      size_t col = 0;
      do {  // if W has no columns, the only iteration sets y to zero
        const Range cols{col, std::min(depth, x_.cols - col)};
        for_blocks_of(rows, [&](size_t i, Range block) {
          if (!kept_block(u, block, cols)) make_block(u, block, cols, blocks + i * block_size);
        });
        for (size_t i = 0; i < some.count; i += kFew) {
          const Range few{some.first + i, std::min(kFew, some.count - i)};
          for_blocks_of(rows, [&](size_t b, Range block) {
            const W* kept = kept_block(u, block, cols);
            multiply(u, token_block, few, block, cols, kept ? kept : blocks + b * block_size);
          });
        }
        col += cols.count;
      } while (col < x_.cols);
    }
  }

  // Cuts the rows of W into blocks of kBlockRows rows, and calls body(index, rows) for each block. The rows
  // of a block become the columns of a block of Wᵀ.
  template <class Body>
  static void for_blocks_of(Range rows, const Body& body) {
    for (size_t i = 0; i * kBlockRows < rows.count; ++i) {
      const Range block = nth_block(rows.count, kBlockRows, i);
      body(i, {rows.first + block.first, block.count});
    }
  }

  // Multiplies a few tokens by a block of Wᵀ: y[few, rows] = x[few, cols] W[rows, cols]ᵀ for the first
  // columns of W. For later columns, adds this product to y. After the last columns, adds the update.
  void multiply(const PartUpdate& u, Range token_block, Range few, Range rows, Range cols,
                const W* block) const {
    T* y = u.part.y.row(token_block.first + few.first) + rows.first;
    if constexpr (kInt8)
      kernels::table().int8_gemm.multiply(
          few.count, rows.count, cols.count, x_codes_.from(few.first, cols.first), block, kBlockRows,
          u.part.w.int8->scales() + rows.first, y, u.part.y.stride, cols.first > 0);
    else
      multiply(elements(token_block, few.first), few.count, rows, cols, block, y, u.part.y.stride);
    if (cols.first + cols.count == x_.cols) add_update(u, token_block, few, rows);
  }
  static void multiply(Strided<E> x, size_t tokens, Range rows, Range cols, const E* block, T* y,
                       size_t y_stride) {
    gemm_outputs_in_lanes<E, E>()(tokens, rows.count, depth_of<E>(cols.count),
                                  {x.data + cols.first / kValuesPerElement<E>, x.row_stride, 1}, block,
                                  kPanelColumns, y, y_stride, cols.first > 0, kernels::Fetch::rows_ahead());
  }

  // Completes the outputs of a few tokens. If the update is not merged on the fly, y[few, rows] += z (scale
  // A[rows])ᵀ. If the layer has a bias, the bias is added too.
  void add_update(const PartUpdate& u, Range token_block, Range few, Range rows) const {
    const ForwardPart<T>& part = u.part;
    T* y = part.y.row(token_block.first + few.first) + rows.first;
    const size_t rank = part.low.rank();
    if (u.update == Update::kSeparate)
      add_product<E>(few.count, rows.count, depth_of<E>(rank), z_of(u, few.first),
                     u.a_pairs.data + rows.first, u.a_pairs.stride, y, part.y.stride, true);
    static constexpr T kOne = 1;
    if (part.bias)
      add_product<T>(few.count, rows.count, 1, {&kOne, 0, 0}, part.bias + rows.first, 0, y, part.y.stride,
                     true);
  }

  // Returns the int8 codes of W[rows, cols], transposed, or null if the codes of W are not kept in memory.
  static const W* kept_block(const PartUpdate& u, Range rows, Range cols) {
    if constexpr (kInt8)
      if (u.kept) return u.kept->at(rows.first, cols.first);
    return nullptr;
  }

  // Stores the transpose of W[rows, cols] in `block` (cols, kBlockRows), as elements of type W. If the update
  // is merged on the fly, it is added to the block.
  void make_block(const PartUpdate& u, Range rows, Range cols, W* block) const {
    if constexpr (kInt8)
      transposed_quads(u.part.w, rows, cols, block);
    else
      make_float_block(u, rows, cols, block);
  }
  void make_float_block(const PartUpdate& u, Range rows, Range cols, E* block) const {
    const auto& k = kernels::table().products<T>();
    const WeightView& w = u.part.w;
    // The number of columns to transpose at a time. If W is row-major and is read in place, all columns are
    // transposed at once.
    const size_t most = is_blocks(w.storage)          ? kDecodedColumns
                        : !w.packed && in_place<E>(w) ? std::max<size_t>(1, cols.count)
                                                      : kPanelColumns;
    E* decoded = scratch<E>(Scratch::kDecoded, kPanelColumns * scratch_columns(kDecodedColumns));
    for (size_t c = 0; c < cols.count; c += most) {
      const size_t width = std::min(most, cols.count - c);
      const Panels<E> panel = row_block(w, rows, {cols.first + c, width}, false, decoded);
      E* out = block + c / kValuesPerElement<E> * kPanelColumns;
      k.to_lanes(kPanelColumns, rows.count, depth_of<E>(width), reinterpret_cast<const T*>(panel.data),
                 panel.row_stride, reinterpret_cast<T*>(out));  // each pair is moved as one float
    }
    if constexpr (kValuesPerElement<E> == 1)
      if (u.update == Update::kMergedOnTheFly) {
        const LowRank<T>& low = u.part.low;
        gemm_outputs_in_lanes<E, E>()(cols.count, rows.count, low.rank(),
                                      {low.b.data + cols.first, 1, low.b.stride}, u.a + rows.first,
                                      u.part.w.d_out, block, kPanelColumns, true, kernels::Fetch::none());
      }
  }

  const std::span<const ForwardPart<T>> parts_;
  const Matrix<const T> x_;
  const size_t depth_;
  size_t block_tokens_ = 0;
  std::vector<Joined> joined_;
  std::vector<PartUpdate> updates_;
  E* x_elements_ = nullptr;  // x of a token block, converted to pairs for the products with W, or null
  CodedBlock x_codes_{x_.cols, kernels::kInt8Group};
};

}  // namespace

template <class E, class W>
void forward_rows(std::span<const ForwardPart<Sum<E>>> parts, Matrix<const Sum<E>> x, size_t threads,
                  size_t plan_tokens) {
  if constexpr (std::is_same_v<W, Int8Quad>)
    for (const ForwardPart<Sum<E>>& part : parts) part.w.int8->find_scales(part.w);
  RowsForward<E, W>(parts, x, plan_tokens).run(threads);
}

template void forward_rows<float, float>(std::span<const ForwardPart<float>>, Matrix<const float>, size_t,
                                         size_t);
template void forward_rows<double, double>(std::span<const ForwardPart<double>>, Matrix<const double>, size_t,
                                           size_t);
template void forward_rows<Bf16Pair, Bf16Pair>(std::span<const ForwardPart<float>>, Matrix<const float>,
                                               size_t, size_t);
template void forward_rows<Bf16Pair, Int8Quad>(std::span<const ForwardPart<float>>, Matrix<const float>,
                                               size_t, size_t);

}  // namespace nplora
