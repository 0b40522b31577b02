#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "base/parallel.h"
#include "base/profile.h"
#include "base/range.h"

namespace nplora {

namespace {

constexpr size_t kBlockElements = 16384;
constexpr double kOperationsPerElement = 16;

// A task consists of 1 to kTaskBlocks neighbouring blocks. It has more than one block only if each thread
// still gets at least kTasksPerThread tasks. Long tasks are faster, because after each jump to another
// place in memory, the hardware must detect the access pattern again before it can prefetch.
constexpr size_t kTaskBlocks = 8, kTasksPerThread = 8;

struct ElementBlock {
  size_t parameter;
  Range range;
  double sum;
};

// Cuts the parameters into blocks of at most kBlockElements elements, and calls body(parameter, block) for
// each block. The blocks of all parameters are distributed to the threads together, so each thread has about
// the same work, even if one parameter is much larger than the others. Returns the blocks, which are valid
// until the next call on this thread. The loop cannot be interrupted: after an interrupt, the caller could
// not know which parameters have changed.
template <class Body>
const std::vector<ElementBlock>& for_blocks(const std::vector<Trained>& parameters, const Body& body) {
  static thread_local std::vector<ElementBlock> kept;
  std::vector<ElementBlock>& blocks = kept;  // on another thread, `kept` would be another vector
  blocks.clear();
  double elements = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const size_t n = parameters[i].n;
    elements += double(n);
    for (size_t j = 0; j < ceil_div(n, kBlockElements); ++j)
      blocks.push_back({i, nth_block(n, kBlockElements, j), 0});
  }
  const size_t threads = useful_threads(kOperationsPerElement * elements);
  const size_t step = std::clamp(blocks.size() / (kTasksPerThread * threads), size_t{1}, kTaskBlocks);
  parallel_for(ceil_div(blocks.size(), step), threads, Interruptible::kNo, [&](size_t task) {
    const Range range = nth_block(blocks.size(), step, task);
    for (ElementBlock& block : std::span(blocks).subspan(range.first, range.count))
      body(parameters[block.parameter], block);
  });
  return blocks;
}

template <class T>
T* at(void* buffer, size_t first) {
  return buffer ? static_cast<T*>(buffer) + first : nullptr;
}

template <class T>
const T* at(const void* buffer, size_t first) {
  return static_cast<const T*>(buffer) + first;
}

template <class T>
void adamw(const Trained& p, Range r, const kernels::AdamWCoefficients& k) {
  kernels::table().products<T>().adamw(r.count, at<T>(p.value, r.first), at<T>(p.grad, r.first),
                                       at<T>(p.first, r.first), at<T>(p.second, r.first), k);
}

template <class T>
void sgd(const Trained& p, Range r, const kernels::SgdCoefficients& k) {
  kernels::table().products<T>().sgd(r.count, at<T>(p.value, r.first), at<T>(p.grad, r.first),
                                     at<T>(p.first, r.first), k);
}

template <class T>
double squares(const Trained& p, Range r) {
  return kernels::table().products<T>().sum_of_squares(r.count, at<T>(p.grad, r.first));
}

}  // namespace

void adamw_step(const std::vector<Trained>& parameters, kernels::AdamWCoefficients shared) {
  const Timed timed(Activity::kOptimizer);
  for_blocks(parameters, [&](const Trained& p, const ElementBlock& block) {
    kernels::AdamWCoefficients k = shared;
    k.lr = p.lr;
    p.is_double ? adamw<double>(p, block.range, k) : adamw<float>(p, block.range, k);
  });
}

void sgd_step(const std::vector<Trained>& parameters, kernels::SgdCoefficients shared) {
  const Timed timed(Activity::kOptimizer);
  for_blocks(parameters, [&](const Trained& p, const ElementBlock& block) {
    kernels::SgdCoefficients k = shared;
    k.lr = p.lr;
    p.is_double ? sgd<double>(p, block.range, k) : sgd<float>(p, block.range, k);
  });
}

// Each block has its own sum, and these sums are added in the order of the blocks. So the result does not
// depend on the number of threads.
double sum_of_squares(const std::vector<Trained>& parameters) {
  const Timed timed(Activity::kOptimizer);
  const std::vector<ElementBlock>& blocks = for_blocks(parameters, [](const Trained& p, ElementBlock& block) {
    block.sum = p.is_double ? squares<double>(p, block.range) : squares<float>(p, block.range);
  });
  double floats = 0, doubles = 0;
  for (const ElementBlock& block : blocks)
    (parameters[block.parameter].is_double ? doubles : floats) += block.sum;
  return floats + doubles;
}

double clip(const std::vector<Trained>& parameters, double max_norm, double* scale) {
  const double norm = std::sqrt(sum_of_squares(parameters)) * std::abs(*scale);
  if (norm > max_norm) *scale *= max_norm / norm;
  return norm;
}

}  // namespace nplora
