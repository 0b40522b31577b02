#include "ops/backward_factors.h"

#include <algorithm>

#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/outer.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::Fetch;
using kernels::kValuesPerElement;

template <class E>
FactorGradients<E>::FactorGradients(const Stack& stack) : stack_(stack) {
  for (const Part& p : stack.parts())
    if (p.wants_da) cut(&p, nullptr, p.arrays.w.d_out);
  for (const Joined& each : stack.joined())
    if (each.wants_db) cut(nullptr, &each, stack.d_in());
}

template <class E>
void FactorGradients<E>::cut(const Part* part, const Joined* joined, size_t cols) {
  for (size_t c = 0; c < cols; c += kColumnBlock)
    tasks_.push_back({part, joined, {c, std::min(kColumnBlock, cols - c)}});
}

// Computes the matrix product of a task for one token block, and adds it to the sums of the task. If the task
// computes columns of dAᵀ (r, d_out), the product is zᵀ dy. If the task computes columns of dB (r, d_in), the
// product is dzᵀ drop(x). Only a few tokens are multiplied at a time, so that the rows of dy or x stay in the
// cache.
template <class E>
void FactorGradients<E>::add(Range token_block, size_t task) const {
  const Task& t = tasks_[task];
  const size_t stride = t.part ? t.part->arrays.w.d_out : stack_.d_in();
  T* sum = (t.part ? t.part->da : t.joined->db) + t.cols.first;
  for (size_t i = 0; i < token_block.count; i += kSumDepth)
    add_rows(t, token_block, {i, std::min(kSumDepth, token_block.count - i)}, sum, stride);
}

// Returns the right operand of the product: dy[tokens, cols] if the task computes dA, and drop(x)[tokens,
// cols] if the task computes dB, where `cols` are the columns of the task. The range `tokens` is counted from
// the start of the batch, not from the start of a token block.
template <class E>
Matrix<const typename FactorGradients<E>::T> FactorGradients<E>::right_of(const Task& task,
                                                                          Range tokens) const {
  const Matrix<const T> right = block_of(task.part ? task.part->arrays.dy : stack_.x(), tokens, task.cols);
  const LowRank<T>* low = task.joined ? task.joined->dropped : nullptr;
  if (!low) return right;
  const Matrix<T> dropped{scratch<T>(Scratch::kDropped, tokens.count * right.cols), tokens.count, right.cols,
                          right.cols};
  drop_rows(low->dropout, low->key, tokens.first, task.cols.first, stack_.d_in(), right, dropped);
  return dropped;
}

template <class E>
void FactorGradients<E>::add_rows(const Task& task, Range token_block, Range some, T* sum,
                                  size_t stride) const {
  const Part* part = task.part;
  const Joined* joined = task.joined;
  const size_t rank = task.rank();
  const Range tokens{token_block.first + some.first, some.count};
  const Matrix<const T> right = right_of(task, tokens);
  const bool accumulate = tokens.first > 0;
  if constexpr (kValuesPerElement<E> == 1) {
    const Matrix<const T> left =
        part ? block_of(part->arrays.z, tokens, {0, rank})
             : Matrix<const T>{joined->dz + some.first * rank, some.count, rank, rank};
    add_product<E>(rank, right.cols, some.count, {left.data, 1, left.stride}, right.data, right.stride, sum,
                   stride, accumulate, Fetch::rows_ahead());
  } else {
    const kernels::Conversions& convert = kernels::table().convert;
    const size_t depth = depth_of<E>(some.count);
    E* pairs = scratch<E>(Scratch::kWeight, depth * right.cols);
    if (part && part->dy)  // dy was already converted to bfloat16
      convert.pair_bits(
          some.count, right.cols,
          reinterpret_cast<const uint16_t*>(part->dy + some.first * part->dy_depth()) + task.cols.first,
          kValuesPerElement<E> * part->dy_depth(), pairs);
    else
      convert.pair_rows(some.count, right.cols, right.data, right.stride, pairs);
    const E* rows = (part ? part->z_rows : joined->rows) + some.first / kValuesPerElement<E>;
    add_product<E>(rank, right.cols, depth, {rows, depth_of<E>(stack_.block_tokens()), 1}, pairs, right.cols,
                   sum, stride, accumulate);
  }
}

template <class E>
void FactorGradients<E>::finish() const {
  const size_t d_in = stack_.d_in();
  for (const Part& p : stack_.parts()) {
    const T scale = T(p.arrays.low.scale);
    if (const Matrix<T> da = p.arrays.da; p.wants_da)
      for_transposed(da.rows, p.rank(),
                     [&](size_t o, size_t j) { da.row(o)[j] += scale * p.da[j * da.rows + o]; });
    if (!p.joined || !p.joined->wants_db) continue;
    const T* sums = p.joined->db + p.column * d_in;
    for (size_t j = 0; j < p.rank(); ++j)
      for (size_t c = 0; c < d_in; ++c) p.arrays.db.row(j)[c] += sums[j * d_in + c];
  }
}

template class FactorGradients<float>;
template class FactorGradients<double>;
template class FactorGradients<Bf16Pair>;

}  // namespace nplora
