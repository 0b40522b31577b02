#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

namespace {

constexpr size_t kPiece = 2048;
constexpr double kOperations = 24;  // of one logit, as useful_threads counts them

// Σ exp(x - shift) over n elements; the exponentials are kept in y where it is given.
double sum_of_exponentials(size_t n, const float* x, float shift, float* y) {
  double sum = 0;
  for (size_t i = 0; i < n; i += kPiece)
    sum += kernels::table().transformer.exp_sum(std::min(kPiece, n - i), x + i, shift, y ? y + i : nullptr);
  return sum;
}

double row_loss(size_t n, float* logits, size_t target, double factor, bool gradient) {
  const float logit = logits[target], largest = kernels::table().transformer.largest(n, logits);
  const double sum = sum_of_exponentials(n, logits, largest, gradient ? logits : nullptr);
  if (gradient) {
    kernels::table().transformer.scaled(n, float(factor / sum), logits, logits, false);
    logits[target] -= float(factor);
  }
  return std::log(sum) + (double(largest) - double(logit));
}

}  // namespace

void cross_entropy(Matrix<float> logits, const int64_t* targets, double factor, double* losses,
                   bool gradient) {
  const size_t vocab = logits.cols;
  parallel_for(logits.rows, useful_threads(kOperations * double(logits.rows) * double(vocab)),
               Interruptible::kYes, [&](size_t i) {
                 if (targets[i] != kIgnoredTarget) {
                   losses[i] = row_loss(vocab, logits.row(i), size_t(targets[i]), factor, gradient);
                   return;
                 }
                 losses[i] = 0;
                 if (gradient) std::fill_n(logits.row(i), vocab, 0.0f);
               });
}

}  // namespace nplora
