// The loss of a language model over its vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"

namespace nplora {

inline constexpr int64_t kIgnoredTarget = -100;  // as in torch and transformers

// losses (n) = log Σ exp(logits) - logits[target], 0 if the target is ignored. logits is (n, vocab), targets
// is (n). If `gradient` is true, the logits become factor * (softmax - one_hot), 0 for ignored targets.
// Otherwise they do not change. Σ runs in float32 over kPiece elements, in as many partial sums as there are
// lanes L, and in float64 over the pieces. Its relative error is below gamma(kPiece / L + log2 L), plus the
// error of one exponential.
void cross_entropy(Matrix<float> logits, const int64_t* targets, double factor, double* losses,
                   bool gradient);

}  // namespace nplora
