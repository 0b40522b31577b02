// Divides the matrix products into blocks and tasks. Block sizes do not change a result, because each output
// is summed over its whole depth in order, and the depth is cut only at multiples of kDepthUnitValues.
// However, the limits for small batches do change results, because a small batch is summed in a different
// order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/parallel.h"
#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

// The depth of a product (columns or rows of W, or tokens) may be cut only at multiples of this number of
// values: kDepthUnit pairs, or 2 * kDepthUnit single values.
inline constexpr size_t kDepthUnitValues =
    kernels::kValuesPerElement<kernels::Bf16Pair> * kernels::kDepthUnit;
// In products with tokens in the SIMD lanes, this number of rows of W is multiplied at a time. kRowBlock is a
// multiple of tile_rows on every instruction set.
inline constexpr size_t kRowBlock = 48;
// The largest depth of a block, counted in values, not in pairs. With this depth, each of the following fits
// into L2: a panel of W, a panel of a transposed block of W, and a block of x that was transposed into the
// SIMD lanes (1056 x 48 floats = 198 KB). The depth is cut into blocks of about equal size. The sums are
// loaded and stored once for each block.
inline constexpr size_t kDepthBlock = 22 * kernels::kPanelColumns;
// Blocks of W begin at multiples of this depth, which is the width of two panels: 96 is a multiple of
// kDepthUnitValues, but the width of a single panel, 48, is not.
inline constexpr size_t kDepthCut = 2 * kernels::kPanelColumns;
static_assert(kDepthBlock % kDepthCut == 0 && kDepthCut % kDepthUnitValues == 0);
inline size_t depth_block(size_t depth) {
  return round_up(ceil_div(depth, std::max<size_t>(1, ceil_div(depth, kDepthBlock))), kDepthCut);
}
// A task of forward_lanes multiplies at most kTaskTokens tokens, so that these tokens stay in L2 or L3. So
// does a task of the backward pass if blocks of W are one panel wide and no update is merged on the fly. A
// token block of x has at most kLanesBytes bytes after it is transposed into the SIMD lanes, unless
// 2 * kTokenUnit tokens take more.
inline constexpr size_t kTaskTokens = 256, kLanesBytes = size_t{8} << 20;
// In the backward pass, batches of up to this many tokens are not computed in bfloat16 or int8, because
// products in bfloat16 or int8 are not faster for so few tokens.
inline constexpr size_t kFloatBatch = 4;
// A limit for the backward pass. Batches of up to this many tokens read W in place. In larger batches, all
// tokens share one copy of each block of W. There are exceptions: a W that must be decoded into memory is
// never read in place, and any other W that is packed or in double is always read in place.
inline constexpr size_t kInPlaceBatch = 16;
// Two limits for the number of tokens in a backward pass with a W in bfloat16. Batches up to the limit read W
// in place, and each tile converts the values of W in registers. Larger batches use a converted copy of W.
// kWidenedBatch is the limit for products in float. kPairedBatch is the limit for products of pairs, if W is
// packed and pairs_in_registers is true.
inline constexpr size_t kWidenedBatch = 8, kPairedBatch = 256;
// While the panels of a packed W are read, the partial sums of this many rows of W stay in L2 (4128 x 16
// lanes of floats = 258 KB).
inline constexpr size_t kStreamedRows = round_up(4096, kRowBlock);
// Replaces kStreamedRows if W is in bfloat16 and the batch is a single token. The products of a single token
// would wait for partial sums from L2, so the sums of fewer rows are kept in L1 (128 x 16 lanes of floats = 8
// KB).
inline constexpr size_t kStreamedBf16Rows = 128;
// The size in bytes of the transposed blocks of W that are kept in L2 at the same time.
inline constexpr size_t kBlocksBytes = size_t{448} << 10;
// When the last block of W along the depth is multiplied, kFewTokens tokens are multiplied at a time. The
// outputs of these tokens in one panel (64 x 48 floats = 12 KB) are still in L1 when the update is added to
// the outputs.
inline constexpr size_t kFewTokens = 64;
// Replaces kFewTokens in int8 products, whose tiles have 7 or 9 tokens: 63 is a multiple of both.
inline constexpr size_t kFewInt8Tokens = 63;
// A task computes at most kColumnBlock columns of a gradient of A or B. The task sums over kSumDepth tokens
// at a time.
inline constexpr size_t kColumnBlock = 4 * kernels::kPanelColumns, kSumDepth = 128;
static_assert(kSumDepth % kDepthUnitValues == 0 && kTaskTokens % kDepthUnitValues == 0);
// A task may have at most this many floating-point operations. On the slowest instruction set, a task of this
// size takes 0.1 s. Ctrl-C is noticed only between tasks, so tasks must be short.
inline constexpr double kTaskFlops = 2e9;

inline double flops(size_t n, size_t d_out, size_t d_in) {
  return 2.0 * static_cast<double>(n) * static_cast<double>(d_out) * static_cast<double>(d_in);
}

// The number of tokens in a token block (MC in BLIS). A token has `width` elements of `element_bytes` bytes.
// A token block takes at most `bytes` bytes, unless 2 * kTokenUnit tokens already take more. The token blocks
// of a batch have about equal size. A batch is cut into token blocks at multiples of kTokenUnit. Token blocks
// are cut into tasks at multiples of kTokenUnit too, except in forward_lanes, which cuts at multiples of the
// number of lanes.
inline constexpr size_t kTokenUnit = 32;
static_assert(kTokenUnit % kDepthUnitValues == 0);
inline size_t tokens_of_block(size_t tokens, size_t width, size_t element_bytes, size_t bytes = kLanesBytes) {
  const size_t most = bytes / element_bytes / std::max<size_t>(1, width) / kTokenUnit * kTokenUnit;
  const size_t blocks = ceil_div(tokens, std::max(2 * kTokenUnit, most));
  return round_up(ceil_div(tokens, std::max<size_t>(1, blocks)), kTokenUnit);
}
// The number of tokens in a token block if blocks of W are transposed, or if an update is added to blocks of
// W. All tokens of a token block must fit into a core's share of L3.
inline constexpr size_t kL3BlockBytes = size_t{4} << 20;
inline size_t tokens_of_l3_block(size_t tokens, size_t width, size_t element_bytes) {
  return tokens_of_block(tokens, width, element_bytes, kL3BlockBytes);
}

// The number of pieces into which work for `threads` threads is cut. The number of pieces is larger than the
// number of threads, so that a thread that starts late, or is slower, can take fewer pieces. Ctrl-C is
// noticed between pieces.
inline size_t pieces_for(size_t threads) {
  return 4 * std::max<size_t>(2, threads);
}

// Cuts n items into pieces that begin at multiples of `unit`, and calls body(Range) for each piece.
template <class Body>
void for_pieces(size_t n, size_t unit, size_t threads, const Body& body) {
  const size_t pieces = std::min(ceil_div(n, unit), pieces_for(threads));
  parallel_for(pieces, threads, Interruptible::kYes, [&](size_t i) { body(nth_piece(n, unit, pieces, i)); });
}

// Divides a product into tasks. Each task multiplies a range of tokens by a range of rows of W (or columns of
// W, in a backward pass). `side` is the range of rows or columns. Tokens are cut into few pieces, because W
// is read once for each piece of the tokens. W is cut so that no task takes too long. For several threads, W
// is cut into shorter and shorter pieces: each piece is 1 / (2 * threads) of the work that is left. (Guided
// self-scheduling, Polychronopoulos & Kuck 1987, would take 1 / threads.) The first pieces are long, because
// W is read in order within a piece. The last pieces are short, so that no thread waits long for another
// thread.
class Grid {
 public:
  struct Cut {
    // There are `count` items. Each piece begins at a multiple of `unit`. `most` limits the items of a piece.
    // For tokens, `most` is rounded up to a multiple of `unit`. For `side`, `most` is rounded down, but to
    // `unit` at least.
    size_t count, unit, most;
  };

  Grid(Cut tokens, Cut side, double operations, size_t threads) {
    if (tokens.count == 0) return;
    // W counts as at least one unit of rows or columns. So there are tasks even if W has no rows or columns.
    const size_t units = std::max<size_t>(1, ceil_div(side.count, side.unit));
    size_t pieces = ceil_div(tokens.count, std::max<size_t>(1, tokens.most));
    // W is cut at multiples of side.unit rows or columns. If W has too few of these units for all threads,
    // the tokens are cut into more pieces. There is one exception: if the number of units is a multiple of
    // the number of threads, all threads get equal work anyway. The tokens are then not cut into more pieces,
    // because W is read and decoded once for each piece.
    if (pieces * units < pieces_for(threads) && units % threads != 0)
      pieces = ceil_div(pieces_for(threads), units);
    // Reduces the number of token pieces, but only so far that the longest piece does not become longer.
    // Fewer pieces are better, because W is read once for each piece.
    const size_t token_units = ceil_div(tokens.count, tokens.unit);
    pieces = ceil_div(token_units, ceil_div(token_units, pieces));
    const size_t in_time = pieces * units / (static_cast<size_t>(operations / kTaskFlops) + 1);
    const size_t most = std::max<size_t>(1, std::min(side.most / side.unit, in_time));
    size_t left = pieces * units;
    for (size_t piece = 0; piece < pieces; ++piece)
      for (size_t first = 0, count = 0; first < units; first += count, left -= count) {
        const size_t share = threads > 1 ? ceil_div(left, 2 * threads) : left;
        count = std::min({share, most, units - first});
        const size_t start = first * side.unit, end = std::min(side.count, (first + count) * side.unit);
        tasks_.push_back({nth_piece(tokens.count, tokens.unit, pieces, piece), {start, end - start}});
      }
  }

  size_t tasks() const { return tasks_.size(); }
  Range tokens(size_t task) const { return tasks_[task].tokens; }
  Range side(size_t task) const { return tasks_[task].side; }

 private:
  struct Task {
    Range tokens, side;
  };
  std::vector<Task> tasks_;
};

}  // namespace nplora
