// How the products cut their work. None of the block sizes changes a result, for every sum runs over its whole depth in
// order, and is cut at multiples of kStepUnit; the bounds of small batches do, for those are summed in another order.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

// Cuts of the depth at multiples of so many steps (columns of W, or tokens) are cuts at multiples of kDepthUnit elements, even where
// an element is a pair of steps.
inline constexpr size_t kStepUnit = kernels::kSteps<kernels::Bf16Pair> * kernels::kDepthUnit;
// Rows of W that pass by the lanes of x at a time. A multiple of every tile_rows.
inline constexpr size_t kRowBlock = 48;
// Steps of the depth for which a panel of W (or of blocks of its transpose), or the lanes of x, are kept in L2, in blocks of about
// one size: at most 1056 x 48 floats = 198 KB. Longer ones leave less time for the sums, which are loaded and stored for each.
inline constexpr size_t kDepthBlock = 22 * kernels::kPanelColumns;
// Two panels: one, of 48 steps, is no multiple of kStepUnit.
inline constexpr size_t kDepthCut = 2 * kernels::kPanelColumns;
static_assert(kDepthBlock % kDepthCut == 0 && kDepthCut % kStepUnit == 0);
inline size_t depth_block(size_t depth) {
  return round_up(ceil_div(depth, std::max<size_t>(1, ceil_div(depth, kDepthBlock))), kDepthCut);
}
// Tokens that one task keeps in L2 or L3, of all those whose lanes are kept at a time: as many as take kLanesBytes.
inline constexpr size_t kTokenBlock = 256, kLanesBytes = size_t{8} << 20;
// Batches that leave no lane without a token take the path that transposes nothing.
template <class T>
size_t small_batch() {
  return std::min(kernels::kMostSmallBatch, kernels::table().products<T>().lanes / 2);
}
// Batches up to this size compute in the weight's own float type: for so few rows, bfloat16 products gain no time.
inline constexpr size_t kFloatBatch = 4;
// Backward, batches above this size share a copy of what is not packed (but of double).
inline constexpr size_t kInPlaceBatch = 16;
// Backward, batches up to these sizes widen, or pair, the bfloat16 values of W in registers for each tile, without a copy.
inline constexpr size_t kWidenedBatch = 8, kPairedBatch = 256;
// Rows of a packed W whose partial sums are kept in L2 (4096 x 16 lanes of floats = 256 KB) while its panels stream by.
inline constexpr size_t kStreamedRows = 4096;
// Of bfloat16 for a single token, which would wait for sums in L2: they stay in L1 (128 x 16 lanes of floats = 8 KB).
inline constexpr size_t kStreamedBf16Rows = 128;
// Transposed blocks of W that are kept in L2 at a time.
inline constexpr size_t kBlocksBytes = size_t{448} << 10;
// Tokens whose panel of outputs stays in L1 (64 x 48 floats = 12 KB) from the last block of W to the update.
inline constexpr size_t kFewTokens = 64;
// Columns of a gradient of A or B that one task owns, and tokens that it sums in one pass over them.
inline constexpr size_t kColumnBlock = 4 * kernels::kPanelColumns, kSumDepth = 128;
static_assert(kSumDepth % kStepUnit == 0 && kTokenBlock % kStepUnit == 0);
// Floating-point operations of one task: 0.1 s on the slowest instruction set, so that Ctrl-C is heard between tasks.
inline constexpr double kTaskFlops = 2e9;

inline double flops(size_t n, size_t d_out, size_t d_in) {
  return 2.0 * static_cast<double>(n) * static_cast<double>(d_out) * static_cast<double>(d_in);
}

// The tokens of one pass, in passes of about one size: as many as have `width` elements each in `bytes`.
inline constexpr size_t kPassUnit = 32;
static_assert(kPassUnit % kStepUnit == 0);
inline size_t tokens_of_pass(size_t tokens, size_t width, size_t element_bytes, size_t bytes = kLanesBytes) {
  const size_t most = bytes / element_bytes / std::max<size_t>(1, width) / kPassUnit * kPassUnit;
  const size_t passes = ceil_div(tokens, std::max(2 * kPassUnit, most));
  return round_up(ceil_div(tokens, std::max<size_t>(1, passes)), kPassUnit);
}
// Where a block of W is transposed or added to: its tokens stay in a core's share of L3.
inline size_t tokens_of_block(size_t tokens, size_t width, size_t element_bytes) {
  return tokens_of_pass(tokens, width, element_bytes, size_t{4} << 20);
}

// A grid of tasks over tokens and over one side of W. Tokens are cut as finely as their reuse of W allows; W is cut where that
// leaves threads without work or makes tasks too long.
class Grid {
 public:
  struct Cut {
    size_t count, unit, most;  // into blocks that are multiples of unit, up to most
  };

  Grid(Cut tokens, Cut side, double operations, size_t threads)
      : tokens_(tokens.count), side_(side.count), token_block_(even_block(tokens, 1)) {
    const size_t token_blocks = std::max<size_t>(1, ceil_div(tokens_, token_block_));
    const size_t wanted = threads > 1 ? 4 * threads : 1;  // a thread that starts late takes fewer
    const size_t for_length = static_cast<size_t>(operations / kTaskFlops) + 1;
    side_block_ = even_block(side, ceil_div(std::max(wanted, for_length), token_blocks));
    side_blocks_ = std::max<size_t>(1, ceil_div(side_, side_block_));
    // Too few columns for so many threads; where they share these evenly, W is not read, and decoded, again for more tasks.
    if (token_blocks * side_blocks_ < wanted && side_blocks_ % threads != 0)
      token_block_ = even_block(tokens, ceil_div(wanted, side_blocks_));
    tasks_ = ceil_div(tokens_, token_block_) * side_blocks_;
  }

  size_t tasks() const { return tasks_; }
  Range tokens(size_t task) const { return nth_block(tokens_, token_block_, task / side_blocks_); }
  Range side(size_t task) const { return nth_block(side_, side_block_, task % side_blocks_); }

 private:
  // Blocks of about one size, at least `blocks` of them where units allow.
  static size_t even_block(Cut cut, size_t blocks) {
    blocks = std::max({blocks, ceil_div(cut.count, std::max<size_t>(1, cut.most)), size_t{1}});
    return std::max(cut.unit, round_up(ceil_div(cut.count, blocks), cut.unit));
  }

  size_t tokens_, side_, token_block_, side_block_, side_blocks_, tasks_;
};

}  // namespace nplora
