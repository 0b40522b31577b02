#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "base/profile.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora {

namespace {

constexpr size_t kBlockLogits = 2048;

double row_loss(size_t n, float* logits, size_t target, double factor, bool gradient) {
  const auto& kernel = kernels::table().transformer;
  const size_t blocks = ceil_div(n, kBlockLogits);
  float* shifts = gradient ? scratch<float>(Scratch::kSums, blocks) : nullptr;
  const float logit = logits[target];
  const RowSum row = sum_of_row(n, logits, shifts);
  if (gradient) {
    for (size_t i = 0; i < blocks; ++i) {
      const Range block = nth_block(n, kBlockLogits, i);
      float* x = logits + block.first;
      const double shrunk = std::exp(double(shifts[i]) - double(row.largest));
      kernel.scaled(block.count, float(factor / row.sum * shrunk), x, x, false);
    }
    logits[target] -= float(factor);
  }
  return row.loss(logit);
}

}  // namespace

double RowSum::loss(float logit) const {
  return std::log(sum) + (double(largest) - double(logit));
}

RowSum sum_of_row(size_t n, float* logits, float* shifts) {
  const auto& kernel = kernels::table().transformer;
  RowSum row{std::numeric_limits<float>::lowest(), 0};
  for (size_t i = 0; i < ceil_div(n, kBlockLogits); ++i) {
    const Range block = nth_block(n, kBlockLogits, i);
    float* x = logits + block.first;
    const float before = row.largest;
    row.largest = std::max(before, kernel.largest(block.count, x));
    if (shifts) shifts[i] = row.largest;
    row.sum = row.sum * std::exp(double(before) - double(row.largest)) +
              kernel.exp_sum(block.count, x, row.largest, shifts ? x : nullptr);
  }
  return row;
}

void cross_entropy(Matrix<float> logits, const int64_t* targets, double factor, double* losses,
                   bool gradient) {
  const Timed timed(Activity::kLoss);
  const size_t vocab = logits.cols;
  parallel_for(logits.rows, useful_threads(kLogitCost * double(logits.rows) * double(vocab)),
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
