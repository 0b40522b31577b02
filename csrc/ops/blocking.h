// How the products cut their work. None of the block sizes changes a result, for every sum runs over its whole depth in
// order, and is cut at multiples of kStepUnit; the bounds of small batches do, for those are summed in another order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/parallel.h"
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
// Rows of a packed W whose partial sums are kept in L2 (4128 x 16 lanes of floats = 258 KB) while its panels stream by.
inline constexpr size_t kStreamedRows = round_up(4096, kRowBlock);
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

// Pieces of what is shared out evenly: a thread that starts late, or is slower, takes fewer, and Ctrl-C is heard between them.
inline size_t pieces_for(size_t threads) {
  return 4 * std::max<size_t>(2, threads);
}

// Calls body(Range) for pieces of n items, which begin at multiples of `unit`.
template <class Body>
void for_pieces(size_t n, size_t unit, size_t threads, const Body& body) {
  const size_t pieces = std::min(ceil_div(n, unit), pieces_for(threads));
  parallel_for(pieces, threads, Interruptible::kYes, [&](size_t i) { body(nth_piece(n, unit, pieces, i)); });
}

// Tasks over tokens and over one side of W. Tokens are cut as finely as their reuse of W allows. W is cut where a task would be
// too long, and for several threads into shorter and shorter pieces: each takes half of a thread's share of what is left (guided
// self-scheduling, Polychronopoulos & Kuck 1987, with half shares). Long ones come first, for W streams by; short ones last, so that
// no thread waits for long.
class Grid {
 public:
  struct Cut {
    size_t count, unit, most;  // into pieces that are multiples of unit, up to most
  };

  Grid(Cut tokens, Cut side, double operations, size_t threads) {
    if (tokens.count == 0) return;
    const size_t units = std::max<size_t>(1, ceil_div(side.count, side.unit));  // a task without columns, too
    size_t pieces = ceil_div(tokens.count, std::max<size_t>(1, tokens.most));
    // Too few columns for so many threads; where they share these evenly, W is not read, and decoded, again for more tasks.
    if (pieces * units < pieces_for(threads) && units % threads != 0)
      pieces = ceil_div(pieces_for(threads), units);
    // As few as keep the longest one as short: W is read for each.
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
