// The loss of a language model over its vocabulary, and a gradient that skips the products with unlikely
// words.
#pragma once

#include <cstdint>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// The gradient of a row of x is a weighted sum of rows of W, one for each word. The target and the words with
// a probability of at least `bound` use their own rows of W. For all other words, `mean`, the mean of the
// rows of W, replaces the row of the word.
struct WordFilter {
  double bound;       // must be greater than 0
  const float* mean;  // (d_in)
};

// The results for each row: the loss, the total probability of the skipped words, and the number of kept
// words. If too many words of a row are likely, the row is flat (see filtered_cross_entropy), and its number
// of kept words is the size of the vocabulary.
struct FilteredRows {
  double *losses, *skipped;  // (n)
  int64_t* kept;             // (n)
};

// The input and the output of the gradient of a trained W. The gradient is added to `dw`.
struct HeadGradient {
  Matrix<const float> x;  // (n, d_in), the input of the product with W
  Matrix<float> dw;       // (vocab, d_in)
};

// For logits = x Wᵀ, computes the losses, with the same bits as `cross_entropy`, and an approximate
// gradient dx. With p = softmax(logits), the exact gradient is factor (Σ p_w W_w - W_target). The words w
// with p_w >= bound are kept, and so is the target; all other words are skipped (gradient filtering of
// Wijmans et al. 2024, word by word). The mean row μ of W replaces the row of each skipped word:
//   dx = factor (Σ_kept p_w W_w + m μ - W_target),  where m = Σ_skipped p_w.
// The error of a row of dx is `factor` · Σ_skipped p_w (W_w - μ). By the triangle inequality, the norm of
// this error is at most `factor` · m · max_w ‖W_w - μ‖, whatever μ is. The mass m is at most `bound` ·
// (number of skipped words). The float32 sums in dx add their rounding errors to this error.
//
// If W is trained, `head` is not null, and the gradient of W is added to dw. The exact gradient is
//   factor Σ_i (p_i - one_hot_i) x_iᵀ,  where x_i is row i of x.
// For a word w, only the rows i that keep w are added:
//   dw_w += factor Σ_i (p_iw - [w is the target of i]) x_i.
// The error of dw is factor · Σ_i q_i x_iᵀ, where q_i holds the probabilities of the words that row i skips.
// The sum of these probabilities is m_i, and none of them is above `bound`, so ‖q_i‖² <= bound · m_i. The
// Frobenius norm of the error is therefore at most factor · Σ_i √(bound · m_i) ‖x_i‖.
//
// A row is flat if more than a quarter of all words have p_w >= bound. For flat rows, the caller can compute
// the gradients faster with dense products. So for a flat row, the function computes only the loss: the
// logits and dx of the row do not change, the row adds nothing to dw, `skipped` is 0, and `kept` is the size
// of the vocabulary. The logits of all other rows are overwritten with undefined values. For a row with an
// ignored target, the loss, `skipped`, `kept` and dx are 0.
//
// The terms of Σ_kept are added in ascending order of the word ids. The terms of dw are added in ascending
// order of the rows of x. Both sums are in float32, even if other products with W are in bfloat16. W must not
// be float64.
void filtered_cross_entropy(const WeightView& w, Matrix<float> logits, const int64_t* targets, double factor,
                            const WordFilter& filter, const FilteredRows& rows, Matrix<float> dx,
                            const HeadGradient* head);

}  // namespace nplora
