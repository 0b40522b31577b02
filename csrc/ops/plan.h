// How an update enters the product with its frozen weight: decided by counting operations, never by timing, and never by the
// number of threads, so that it does not change from run to run.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ops/blocking.h"
#include "ops/weight.h"

namespace nplora {

enum class Update {
  kNone,   // there is none
  kSteps,  // r more steps of the product's depth: z by B, then A
  kFolded,  // scale A B is added to each block of W while it is in cache, and the product runs as without an update
};

struct Product {
  size_t tokens, d_out, d_in, rank;
  Compute compute;
  bool dropout;    // the update reads another x than W does
  bool projected;  // forward: z is wanted; backward: dz is. Then folding saves one of two thin products only.
};

// The tokens that share one block of W in cache: as many as one pass keeps lanes of.
inline size_t tokens_of_pass(size_t tokens, size_t d_in, size_t lanes, size_t element_bytes) {
  const size_t most = kLanesBytes / element_bytes / std::max<size_t>(1, d_in) / lanes * lanes;
  const size_t passes = ceil_div(tokens, std::max(2 * lanes, most));
  return round_up(ceil_div(tokens, std::max<size_t>(1, passes)), lanes);
}

// `shared` tokens share a block of W; `inner` is the side that the saved product with z (forward: d_out) or dz (d_in) has.
// Folding is for float: in bfloat16 the rounding of W + scale A B would drown a young update.
inline Update plan_update(const Product& p, size_t shared, size_t inner) {
  if (p.rank == 0) return Update::kNone;
  if (p.compute != Compute::kFloat || p.dropout || p.tokens <= kSmallBatch) return Update::kSteps;
  const double copy = 8;  // a block of W is copied first: worth about so many operations for each element
  const double folded = (2.0 * double(p.rank) + copy) * double(p.d_out) * double(p.d_in);
  const double side = double(p.projected ? inner : p.d_out + p.d_in);
  return folded < 2.0 * double(shared) * double(p.rank) * side ? Update::kFolded : Update::kSteps;
}

}  // namespace nplora
