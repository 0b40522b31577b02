#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora {

namespace {

constexpr size_t kPiece = 2048;
constexpr double kOperations = 24;  // the cost of one logit, in floating-point operations

// Computes the loss of one row piece by piece (Milakov & Gimelshein 2018), so that the row is read from
// memory once. The exponentials of a piece are relative to the largest logit so far, which `shifts` stores
// for each piece.
double row_loss(size_t n, float* logits, size_t target, double factor, bool gradient) {
  const auto& kernel = kernels::table().transformer;
  const size_t pieces = ceil_div(n, kPiece);
  float* shifts = scratch<float>(Scratch::kSums, pieces);
  const float logit = logits[target];
  float largest = std::numeric_limits<float>::lowest();
  double sum = 0;
  for (size_t i = 0; i < pieces; ++i) {
    const Range piece = nth_block(n, kPiece, i);
    float* x = logits + piece.first;
    const float before = largest;
    shifts[i] = largest = std::max(before, kernel.largest(piece.count, x));
    sum = sum * std::exp(double(before) - double(largest)) +
          kernel.exp_sum(piece.count, x, largest, gradient ? x : nullptr);
  }
  if (gradient) {
    for (size_t i = 0; i < pieces; ++i) {
      const Range piece = nth_block(n, kPiece, i);
      float* x = logits + piece.first;
      kernel.scaled(piece.count, float(factor / sum * std::exp(double(shifts[i]) - double(largest))), x, x,
                    false);
    }
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
