// The loss of a language model over its vocabulary, and a gradient that skips the products with unlikely
// words.
#pragma once

#include <cstdint>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// The gradient of a row of x is a weighted sum of rows of W. For the target and for each word with a
// probability of at least `bound`, the row of the word is used. For every other word, the array `mean` is
// used instead of the row of the word.
struct WordFilter {
  double bound;       // must be greater than 0
  const float* mean;  // (d_in)
};

// The results for each row: the loss, the total probability of the skipped words, and whether the row is flat
// (has too many likely words for the filter).
struct FilteredRows {
  double *losses, *skipped;  // (n)
  uint8_t* is_flat;          // (n)
};

// For logits = x Wᵀ, computes the losses, with the same bits as `cross_entropy`, and an approximate
// gradient dx. With p = softmax(logits), the exact gradient is factor (Σ p_w W_w - W_target). The words w
// with p_w >= bound are kept, and so is the target; all other words are skipped (gradient filtering of
// Wijmans et al. 2024, word by word). The mean row μ of W replaces the row of each skipped word:
//   dx = factor (Σ_kept p_w W_w + m μ - W_target),  where m = Σ_skipped p_w = 1 - Σ_kept p_w.
// The error of a row of dx is `factor` · Σ_skipped p_w (W_w - μ). By the triangle inequality, the norm of
// this error is at most `factor` · m · max_w ‖W_w - μ‖. The mass m is at most `bound` · (number of skipped
// words).
// Rounding in float32 adds two more errors. One is the error of the sums in dx. The other is the error of m,
// which is computed from the sum of exponentials in `cross_entropy`.
//
// A row is flat if more than a quarter of all words have p_w >= bound. For flat rows, the caller can compute
// dx faster with a dense product. So for a flat row, the function computes only the loss: the logits and dx
// of the row do not change, and `skipped` is 0. The logits of all other rows are overwritten with undefined
// values. For a row with an ignored target, the loss, `skipped` and dx are 0.
//
// The terms of Σ_kept are added in ascending order of the word ids, in float32, even if W is multiplied in
// bfloat16 elsewhere. W must not be float64.
void filtered_cross_entropy(const WeightView& w, Matrix<float> logits, const int64_t* targets, double factor,
                            const WordFilter& filter, const FilteredRows& rows, Matrix<float> dx);

}  // namespace nplora
