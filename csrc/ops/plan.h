// How an update enters the product with its frozen weight: decided by counting operations, never by timing, and never by the
// number of threads or the instruction set, so that results do not change with them.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ops/blocking.h"
#include "ops/weight.h"

namespace nplora {

enum class ForwardPath {
  kSmall,  // up to small_batch rows: nothing is transposed
  kLanes,  // x and y are
  kRows,   // W is, which pays for large batches
};

// A piece of W that was decoded is in L1 when it is transposed: so many times cheaper than x and y are.
inline constexpr size_t kDecodedGain = 6;

inline ForwardPath forward_path(size_t tokens, size_t d_out, size_t d_in, size_t element_bytes,
                                bool decoded) {
  const size_t most_small = element_bytes == sizeof(double) ? small_batch<double>() : small_batch<float>();
  if (tokens <= most_small) return ForwardPath::kSmall;
  const size_t shared = std::min(tokens, tokens_of_block(tokens, d_in, element_bytes));
  return (decoded ? kDecodedGain : 1) * shared * (d_in + d_out) > d_in * d_out ? ForwardPath::kRows
                                                                               : ForwardPath::kLanes;
}

// Whether a product of so many rows runs in pairs of bfloat16.
inline bool computes_pairs(const WeightView& w, size_t tokens) {
  return w.compute != Compute::kFloat && tokens > kFloatBatch;
}

enum class Update {
  kNone,   // there is none
  kSteps,  // a few more steps of the product's depth: z (backward: dz) is computed, then multiplied with A (B)
  kFolded,  // scale A B is added to each block of W while it is in cache, and the product runs as without an update
};

struct LayerShape {
  size_t tokens, d_out, d_in, rank;
  size_t element_bytes;  // of what it is computed in: 8, 4, or 2 for bfloat16
  bool dropout;          // the update reads another x than W does
  bool decoded;          // W lies in low-bit blocks
};

// A block of W is copied before the update is added to it: worth about so many operations for each element.
inline constexpr double kCopyOperations = 8;

// What the two ways to apply the update cost, in floating-point operations beyond the bare product.
struct UpdateCost {
  double steps, folded;
};

// For tokens with rows of so many elements.
inline double fold_cost(const LayerShape& s, size_t width) {
  const size_t blocks = ceil_div(s.tokens, tokens_of_block(s.tokens, width, s.element_bytes));
  return double(blocks) *
         (flops(s.d_out, s.rank, s.d_in) + kCopyOperations * double(s.d_out) * double(s.d_in));
}

// Blocks of W are added to where they are transposed. z = x Bᵀ and z Aᵀ; folding saves both, or, where z is wanted for a backward pass, the second only.
inline UpdateCost forward_cost(const LayerShape& s, bool keep_z) {
  const double project = flops(s.tokens, s.rank, s.d_in), expand = flops(s.tokens, s.rank, s.d_out);
  return {project + expand, fold_cost(s, s.d_in) + (keep_z ? project : 0)};
}

// dz = dy A and dz B; dz is wanted for the gradient of B.
inline UpdateCost backward_cost(const LayerShape& s) {
  const double project = flops(s.tokens, s.rank, s.d_out), expand = flops(s.tokens, s.rank, s.d_in);
  return {project + expand, project + fold_cost(s, s.d_out)};
}

// The cheaper way. Folding is for float and double: in bfloat16 the rounding of W + scale A B would drown a young update.
inline Update choose_update(const LayerShape& s, const UpdateCost& cost) {
  if (s.rank == 0) return Update::kNone;
  const bool can_fold = s.element_bytes >= 4 && !s.dropout && s.tokens > kernels::kMostSmallBatch;
  return can_fold && cost.folded < cost.steps ? Update::kFolded : Update::kSteps;
}

inline Update forward_update(const LayerShape& s, bool keep_z) {
  const Update update = choose_update(s, forward_cost(s, keep_z));
  const bool kept = forward_path(s.tokens, s.d_out, s.d_in, s.element_bytes, s.decoded) != ForwardPath::kRows;
  return kept && update == Update::kFolded ? Update::kSteps : update;
}
inline Update backward_update(const LayerShape& s) {
  return choose_update(s, backward_cost(s));
}

}  // namespace nplora
