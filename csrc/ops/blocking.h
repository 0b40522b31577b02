// How the products cut their work. None of the block sizes changes a result, for every sum runs over its whole depth in
// order; kDotTokens does, for batches up to that size are summed in another order.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

// 240 columns x 32 lanes of floats = 30 KB: the lanes of x that stay in L1 ...
inline constexpr size_t kDepthBlock = 5 * kernels::kPanelColumns;
// ... while so many rows of W pass by. A multiple of every tile_rows.
inline constexpr size_t kRowBlock = 48;
// Tokens that one task keeps in L2 or L3, as long as their lanes take no more than kLanesBytes.
inline constexpr size_t kTokenBlock = 256, kLanesBytes = size_t{2} << 20;
// Batches up to this size take the path that transposes nothing and always computes in the weight's own float type, in
// passes of kDotParts outputs: 4096 x 16 lanes of floats = 256 KB of partial sums, which stay in L2.
inline constexpr size_t kDotTokens = 8, kDotParts = 4096;
// Rows of a panel of W that the backward product keeps in L2: 512 x 48 floats = 96 KB.
inline constexpr size_t kOuterDepth = 512;
// Columns of a gradient of A or B that one task owns, and tokens that it sums in one pass over them.
inline constexpr size_t kColumnBlock = 4 * kernels::kPanelColumns, kSumDepth = 128;
// Floating-point operations of one task: 0.1 s on the slowest instruction set, so that Ctrl-C is heard between tasks.
inline constexpr double kTaskFlops = 2e9;

inline double flops(size_t n, size_t d_out, size_t d_in) {
  return 2.0 * static_cast<double>(n) * static_cast<double>(d_out) * static_cast<double>(d_in);
}

// A grid of tasks over tokens and over one side of W. Tokens are cut first; W is cut too where that leaves threads without
// work or makes tasks too long (then each task of a token block repeats the little work that belongs to its tokens).
class Grid {
 public:
  struct Tokens {
    size_t count, unit, most;  // cut into multiples of unit, up to most
  };
  struct Side {
    size_t count, unit;  // of W: rows or columns, cut into multiples of unit
  };

  Grid(Tokens tokens, Side side, double operations, size_t threads)
      : tokens_(tokens.count), side_(side.count) {
    const size_t shares = threads > 1 ? 4 * threads : 1;  // a thread that starts late takes fewer
    const size_t share = round_up(ceil_div(tokens.count, shares), tokens.unit);
    token_block_ =
        std::max(tokens.unit, std::min(tokens.most, threads > 1 ? std::max(share, 2 * tokens.unit) : share));
    token_blocks_ = ceil_div(tokens.count, token_block_);
    const double per_block = operations / static_cast<double>(std::max<size_t>(1, token_blocks_));
    const size_t for_length = static_cast<size_t>(per_block / kTaskFlops) + 1;
    const size_t for_threads = token_blocks_ >= threads ? 1 : ceil_div(2 * threads, token_blocks_);
    side_block_ =
        std::max(side.unit, round_up(ceil_div(side.count, std::max(for_length, for_threads)), side.unit));
    side_blocks_ = std::max<size_t>(1, ceil_div(side.count, side_block_));
  }

  size_t tasks() const { return token_blocks_ * side_blocks_; }
  Range tokens(size_t task) const { return nth_block(tokens_, token_block_, task / side_blocks_); }
  Range side(size_t task) const { return nth_block(side_, side_block_, task % side_blocks_); }

 private:
  size_t tokens_, side_, token_block_, token_blocks_, side_block_, side_blocks_;
};

}  // namespace nplora
