// The forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias] with the tokens in the SIMD lanes.
#include <vector>

#include "base/parallel.h"
#include "ops/elements.h"
#include "ops/forward.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::kValuesPerElement;
using kernels::Panels;
using kernels::Products;
using kernels::Strided;
using kernels::Sum;
using kernels::Tiles;

namespace {

// The forward pass with tokens in the SIMD lanes and elements of type E. For each token block, x is first
// transposed into the lanes, and z is computed. Then the rows of W are multiplied with all tokens of the
// token block. A token block consists of lane blocks, which have as many tokens as there are lanes. The
// products x Wᵀ are summed in type T, and z Aᵀ is computed in type T, too.
template <class E>
class LanesForward {
 public:
  using T = Sum<E>;

  LanesForward(std::span<const ForwardPart<T>> parts, Matrix<const T> x)
      : parts_(parts),
        x_(x),
        k_(kernels::table().products<T>()),
        tiles_(kernels::table().tiles<E>()),
        lanes_(width(x.rows)),
        depth_(depth_of<E>(x.cols)) {
    for (const auto& part : parts) deltas_.push_back({part, {}, nullptr});
  }

  void run(size_t threads) {
    block_tokens_ = std::min(tokens_of_block(x_.rows, x_.cols, sizeof(E) / kValuesPerElement<E>),
                             kTaskTokens * ceil_div(threads, 2));
    reserve();
    const StackRows<T> rows(parts_);
    for (size_t first = 0; first < x_.rows; first += block_tokens_) {
      const Range token_block{first, std::min(block_tokens_, x_.rows - first)};
      const size_t blocks = ceil_div(token_block.count, lanes_);
      if (multiplies_x(parts_))
        for_pieces(blocks, 1, threads, [&](Range mine) {
          for (size_t b = 0; b < mine.count; ++b) prepare(token_block, mine.first + b);
        });
      const Grid grid({blocks, 1, kTaskTokens / lanes_}, {rows.blocks(), 1, rows.blocks()},
                      flops_of(parts_, token_block.count), threads);
      parallel_in_order(grid.tasks(), threads, Interruptible::kYes, [&](size_t i) {
        rows.for_parts(grid.side(i), [&](PartRows piece) { multiply(token_block, grid.tokens(i), piece); });
      });
    }
  }

 private:
  struct LoraDelta {
    const ForwardPart<T>& part;
    Strided<E> b;  // B, converted to type E
    T* zt;         // scale * zᵀ of a token block: (lane blocks, r, lanes)
  };

  void reserve() {
    size_t ranks = 0;
    for (const LoraDelta& delta : deltas_) ranks += delta.part.low.rank();
    xt_ = scratch<E>(Scratch::kLanes, block_tokens_ * depth_);
    T* zt = scratch<T>(Scratch::kLowLanes, block_tokens_ * ranks);
    E* b = kValuesPerElement<E> == 1 ? nullptr : scratch<E>(Scratch::kFactor, ranks * depth_);
    for (LoraDelta& delta : deltas_) {
      const size_t rank = delta.part.low.rank();
      if (rank == 0) continue;
      delta.zt = zt;
      delta.b = elements_or_self<E>(delta.part.low.b, b);
      zt += block_tokens_ * rank;
      b += kValuesPerElement<E> == 1 ? 0 : rank * depth_;
    }
  }

  // The number of lanes that are used for `tokens` tokens: half of all lanes if that is enough, otherwise
  // all lanes. The last tokens of a batch often fit into half of the lanes.
  size_t width(size_t tokens) const { return tokens <= tiles_.lanes / 2 ? tiles_.lanes / 2 : tiles_.lanes; }

  Range lane_block(Range token_block, size_t b) const {
    const Range block = nth_block(token_block.count, lanes_, b);
    return {token_block.first + block.first, block.count};
  }

  // Computes xt (x transposed) for lane block b of a token block. Also computes z and zt (z transposed, times
  // scale) of each layer.
  void prepare(Range token_block, size_t b) const {
    const Range tokens = lane_block(token_block, b);
    E* lanes = xt_ + b * depth_ * lanes_;
    lanes_of<E>(width(tokens.count), rows_of(x_, tokens), lanes);
    for (const LoraDelta& delta : deltas_)
      if (delta.part.low.rank()) project(delta, tokens, b, lanes);
  }

  // Multiplies B by one lane block of tokens: zt (r, lanes) = scale * B drop(x)ᵀ. If the caller needs z
  // (tokens, r), then z = drop(x) Bᵀ, without the scale, is also stored in the caller's array.
  void project(const LoraDelta& delta, Range tokens, size_t b, const E* xt) const {
    const ForwardPart<T>& part = delta.part;
    const size_t rank = part.low.rank(), lanes = width(tokens.count);
    if (part.low.dropout > 0) {
      E* dropped_xt = scratch<E>(Scratch::kDroppedLanes, depth_ * lanes);
      lanes_of<E>(lanes, dropped(part.low, x_, tokens), dropped_xt);
      xt = dropped_xt;
    }
    T* zt = delta.zt + b * rank * lanes_;
    tiles_.gemm_tokens_in_lanes(lanes, rank, depth_,
                                {delta.b.data, delta.b.row_stride, kPanelColumns / kValuesPerElement<E>}, xt,
                                zt, false);
    if (part.z.data)
      k_.from_lanes(lanes, tokens.count, rank, zt, nullptr, part.z.row(tokens.first), part.z.stride);
    for (size_t i = 0; i < rank * lanes; ++i) zt[i] *= T(part.low.scale);
  }

  // Computes y for some rows of the weight of a layer, and for the tokens of the lane blocks `blocks`.
  void multiply(Range token_block, Range blocks, PartRows piece) const {
    const LoraDelta& delta = deltas_[piece.part];
    const ForwardPart<T>& part = delta.part;
    const size_t rank = part.low.rank();
    if (part.multiplied && rank == 0 && !part.bias) return;  // y is complete
    T* yt = scratch<T>(Scratch::kSums, blocks.count * kRowBlock * lanes_);
    for (size_t r = 0; r < piece.rows.count; r += kRowBlock) {
      const Range rows{piece.rows.first + r, std::min(kRowBlock, piece.rows.count - r)};
      const auto add_update = [&](size_t b, T* out) {
        const Range tokens = lane_block(token_block, b);
        const size_t lanes = width(tokens.count);
        if (rank)
          k_.gemm_tokens_in_lanes(lanes, rows.count, rank,
                                  {part.low.a.row(rows.first), part.low.a.stride, kPanelColumns},
                                  delta.zt + b * rank * lanes_, out, true);
        k_.from_lanes(lanes, tokens.count, rows.count, out, bias_at(part, rows.first),
                      part.y.row(tokens.first) + rows.first, part.y.stride);
      };
      if (part.multiplied)
        multiplied(part, token_block, rows, blocks, yt, add_update);
      else
        frozen(part, token_block, rows, blocks, yt, add_update);
    }
  }

  // Replaces `frozen` if y already holds x Wᵀ: for each lane block b, copies some columns of y to yt (rows,
  // lanes), transposed, and calls after(b, yt).
  template <class After>
  void multiplied(const ForwardPart<T>& part, Range token_block, Range rows, Range blocks, T* yt,
                  const After& after) const {
    for (size_t b = blocks.first; b < blocks.first + blocks.count; ++b) {
      const Range tokens = lane_block(token_block, b);
      k_.to_lanes(width(tokens.count), tokens.count, rows.count, part.y.row(tokens.first) + rows.first,
                  part.y.stride, yt);
      after(b, yt);
    }
  }

  // Multiplies some rows of W by several lane blocks of tokens: yt (blocks, kRowBlock, lanes) = W[rows] xt,
  // where xt is x transposed. Calls after(b, yt[b]) as soon as the outputs of lane block b are complete,
  // while these outputs are still in L1.
  template <class After>
  void frozen(const ForwardPart<T>& part, Range token_block, Range rows, Range blocks, T* yt,
              const After& after) const {
    const WeightView& w = part.w;
    const size_t most = depth_block(w.d_in);
    // For pairs of bfloat16, the depth may only be cut at multiples of kDepthCut, which is the width of two
    // panels. All columns after the last multiple of kDepthCut are multiplied at once, even if they are a
    // full panel and a narrower one.
    const size_t full = kValuesPerElement<E> == 1 ? full_columns(w.d_in) : w.d_in / kDepthCut * kDepthCut;
    E* decoded = scratch<E>(Scratch::kWeight, kRowBlock * scratch_columns(most));
    size_t col = 0;
    do {  // if W has no columns, the only iteration sets yt to zero
      const size_t cols = std::min(most, (col < full ? full : w.d_in) - col);
      const Panels<E> panels = row_block(w, rows, {col, cols}, blocks.count > 1, decoded);
      for (size_t b = 0; b < blocks.count; ++b) {
        T* out = yt + b * kRowBlock * lanes_;
        const size_t lanes = width(lane_block(token_block, blocks.first + b).count);
        const E* xt = xt_ + (blocks.first + b) * depth_ * lanes_ + col / kValuesPerElement<E> * lanes;
        tiles_.gemm_tokens_in_lanes(lanes, rows.count, depth_of<E>(cols), panels, xt, out, col > 0);
        if (col + cols == w.d_in) after(blocks.first + b, out);
      }
      col += cols;
    } while (col < w.d_in);
  }

  const std::span<const ForwardPart<T>> parts_;
  const Matrix<const T> x_;
  const Products<T>& k_;
  const Tiles<E>& tiles_;
  const size_t lanes_, depth_;
  size_t block_tokens_ = 0;
  std::vector<LoraDelta> deltas_;
  E* xt_ = nullptr;
};

}  // namespace

template <class E>
void forward_lanes(std::span<const ForwardPart<Sum<E>>> parts, Matrix<const Sum<E>> x, size_t threads) {
  LanesForward<E>(parts, x).run(threads);
}

template void forward_lanes<float>(std::span<const ForwardPart<float>>, Matrix<const float>, size_t);
template void forward_lanes<double>(std::span<const ForwardPart<double>>, Matrix<const double>, size_t);
template void forward_lanes<Bf16Pair>(std::span<const ForwardPart<float>>, Matrix<const float>, size_t);

}  // namespace nplora
