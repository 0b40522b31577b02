// Chooses the methods to compute a product with W and its low-rank update. The functions of this file compare
// estimates of the work that each method takes. The choice of a method can change the rounding of a result.
// So the choice does not depend on timing, the number of threads or the instruction set.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/profile.h"
#include "ops/blocking.h"
#include "ops/weight.h"

namespace nplora {

enum class ForwardPath {
  kSmall,  // nothing is transposed; used for up to kSmallBatch rows
  kLanes,  // x and y are transposed
  kRows,   // W is transposed, which is fastest for large batches
};

// A block of W that was just decoded is still in L1. Transposing an element of x or y takes kDecodedGain
// times as long as transposing an element of such a block.
inline constexpr size_t kDecodedGain = 6;

// Chooses the path that spends less time on transposing. For each token block, kLanes transposes the rows of
// x and y, and kRows transposes all of W. `decoded` is true if W is in low-bit blocks.
inline ForwardPath forward_path(size_t tokens, size_t d_out, size_t d_in, size_t element_bytes,
                                bool decoded) {
  if (tokens <= kernels::kSmallBatch) return ForwardPath::kSmall;
  const size_t shared = std::min(tokens, tokens_of_l3_block(tokens, d_in, element_bytes));
  return (decoded ? kDecodedGain : 1) * shared * (d_in + d_out) > d_in * d_out ? ForwardPath::kRows
                                                                               : ForwardPath::kLanes;
}

// For every batch of more than kSmallBatch rows, inference uses the methods for a batch of kInferenceTokens
// rows. A row of the result then has the same bits in all these batches. So a prompt may be cut into pieces
// of any length above kSmallBatch without a change of the result.
inline constexpr size_t kInferenceTokens = 64;

inline size_t inference_tokens(size_t batch) {
  return batch <= kernels::kSmallBatch ? batch : kInferenceTokens;
}

// Whether a product with `tokens` rows is computed with pairs of bfloat16 values. This function is not for
// small batches in a forward pass, and not for products in int8.
inline bool computes_pairs(const WeightView& w, size_t tokens) {
  return w.compute != Compute::kFloat && tokens > kFloatBatch;
}

// Whether the int8 kernels for large batches compute a product with `tokens` rows: forward_in_int8 for a
// forward pass, and backward_in_int8 for a backward pass. (For small batches in a forward pass, dots_int8
// decides whether the product is computed in int8.)
inline bool forward_in_int8(const WeightView& w, size_t tokens) {
  return w.compute == Compute::kInt8 && tokens > kernels::kSmallBatch;
}
inline bool backward_in_int8(const WeightView& w, size_t tokens) {
  return w.compute == Compute::kInt8 && tokens > kFloatBatch;
}

// The arithmetic of a layer's product with W, and of its low-rank update.
struct LayerArithmetic {
  Arithmetic product, update;
};

inline LayerArithmetic arithmetic_of_floats(const WeightView& w, bool pairs) {
  const Arithmetic both = w.storage == Storage::kFloat64 ? Arithmetic::kFloat64
                          : pairs                        ? Arithmetic::kBfloat16
                                                         : Arithmetic::kFloat32;
  return {both, both};
}

// These two functions return the arithmetic of a forward pass and of a backward pass. `int8` is true if the
// caller permits int8 for large batches.
inline LayerArithmetic forward_arithmetic(const WeightView& w, size_t tokens, bool int8) {
  const bool small = tokens <= kernels::kSmallBatch;
  if (small && dots_int8(w)) return {Arithmetic::kInt8, Arithmetic::kFloat32};
  if (int8 && forward_in_int8(w, tokens)) return {Arithmetic::kInt8, Arithmetic::kBfloat16};
  return arithmetic_of_floats(w, !small && computes_pairs(w, tokens));
}
inline LayerArithmetic backward_arithmetic(const WeightView& w, size_t tokens, bool int8) {
  if (int8 && backward_in_int8(w, tokens)) return {Arithmetic::kInt8, Arithmetic::kBfloat16};
  return arithmetic_of_floats(w, computes_pairs(w, tokens));
}

enum class Update {
  kNone,            // the layer has no update
  kSeparate,        // z Aᵀ (in a backward pass: dz B) is computed and added to the product
  kMergedOnTheFly,  // scale A B is added to a copy of each block of W, and the product uses the copy
};

struct LayerShape {
  size_t tokens, d_out, d_in, rank;
  size_t element_bytes;  // the size of a value in the product, in bytes: double 8, float 4, bfloat16 2
  bool dropout;          // whether the update uses drop(x) instead of x
  bool decoded;          // whether W is in low-bit blocks
};

// Before an update is added to a block of W, the block is copied. The copy costs about this many operations
// for each element.
inline constexpr double kCopyOperations = 8;

// The cost of a separate update, and of an update that is merged on the fly, in floating-point operations.
// The product with W itself is not counted.
struct UpdateCost {
  double separate, merged;
};

// The cost of merging the update on the fly. The update is added to all of W once for each token block. The
// number of token blocks depends on `width`, the number of elements of one token: d_in in a forward pass,
// d_out in a backward pass.
inline double merge_cost(const LayerShape& s, size_t width) {
  const size_t blocks = ceil_div(s.tokens, tokens_of_l3_block(s.tokens, width, s.element_bytes));
  return double(blocks) *
         (flops(s.d_out, s.rank, s.d_in) + kCopyOperations * double(s.d_out) * double(s.d_in));
}

// How the update of one layer is applied, and the costs of both possible methods.
struct KernelPlan {
  Update update;
  UpdateCost cost;
};

// Chooses the cheaper of the two methods to apply the update. An update is merged on the fly only in float
// and double. In bfloat16, the sum W + scale A B would be rounded to bfloat16, and a small update would be
// lost, for example at the start of training. With dropout, an update is never merged, because the update
// multiplies drop(x) but W multiplies x. In small batches (up to kSmallBatch rows), no update is merged
// either.
inline KernelPlan cheaper(const LayerShape& s, const UpdateCost& cost) {
  if (s.rank == 0) return {Update::kNone, cost};
  const bool can_merge = s.element_bytes >= 4 && !s.dropout && s.tokens > kernels::kSmallBatch;
  return {can_merge && cost.merged < cost.separate ? Update::kMergedOnTheFly : Update::kSeparate, cost};
}

// If the update is separate, the products z = x Bᵀ and z Aᵀ are computed. If the update is merged on the fly,
// z Aᵀ is not computed, and z is computed only if a backward pass will need it (keep_z). Only
// ForwardPath::kRows can merge an update on the fly.
inline KernelPlan plan_forward(const LayerShape& s, bool keep_z) {
  const double project = flops(s.tokens, s.rank, s.d_in), expand = flops(s.tokens, s.rank, s.d_out);
  KernelPlan plan = cheaper(s, {project + expand, merge_cost(s, s.d_in) + (keep_z ? project : 0)});
  const bool kept = forward_path(s.tokens, s.d_out, s.d_in, s.element_bytes, s.decoded) != ForwardPath::kRows;
  if (kept && plan.update == Update::kMergedOnTheFly) plan.update = Update::kSeparate;
  return plan;
}

// If the update is separate, two products are computed: dy A, called dz, and then dz B. If the update is
// merged on the fly, dz B is not computed. The cost then still includes dz, because the gradient of B needs
// dz.
inline KernelPlan plan_backward(const LayerShape& s) {
  const double project = flops(s.tokens, s.rank, s.d_out), expand = flops(s.tokens, s.rank, s.d_in);
  return cheaper(s, {project + expand, project + merge_cost(s, s.d_out)});
}

}  // namespace nplora
