// The loss of a language model over its vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"

namespace nplora {

inline constexpr int64_t kIgnoredTarget = -100;  // marks a row without a loss, as in torch and transformers

// The shapes are logits (n, vocab), targets (n) and losses (n). For each row, the loss is log Σ exp(logits) -
// logits[target], or 0 if the target is ignored. If `gradient` is true, the logits are overwritten by their
// gradient: factor * (softmax - one_hot), or 0 for ignored targets. If `gradient` is false, the logits do not
// change.
//
// To compute Σ exp(logits), the exponentials of each block of kBlockLogits logits are summed in float32, with
// one partial sum for each of the L lanes of a vector. The sums of the blocks are added in float64. The
// relative error of the total is below gamma(kBlockLogits / L + log2 L) plus the relative error of `exp`.
// Here gamma(m) = m u / (1 - m u), and u is the unit roundoff.
void cross_entropy(Matrix<float> logits, const int64_t* targets, double factor, double* losses,
                   bool gradient);

// The cost of one logit, in floating-point operations.
inline constexpr double kLogitCost = 24;

// The softmax of one row is exp(logits - largest) / sum.
struct RowSum {
  float largest;
  double sum;

  double loss(float logit) const;  // the loss if `logit` is the logit of the target
};

// Computes the sum of exponentials of one row block by block (Milakov & Gimelshein 2018), so that the row is
// read from memory once. For each block of kBlockLogits logits, the function computes exp(logit - largest),
// where `largest` is the largest logit from the start of the row to the end of the block. If `shifts` is not
// null, the exponentials overwrite the logits, and the number `largest` of block i is stored in shifts[i].
RowSum sum_of_row(size_t n, float* logits, float* shifts);

}  // namespace nplora
