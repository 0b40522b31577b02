#include "ops/backward_stack.h"

#include <algorithm>
#include <utility>

#include "ops/blocking.h"
#include "ops/outer.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kValuesPerElement;
using kernels::Strided;

template <class E>
BackwardStack<E>::BackwardStack(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx,
                                bool multiplies_elements)
    : x_(x),
      dx_(dx),
      multiplies_elements_(multiplies_elements),
      tokens_(parts[0].dy.rows),
      d_in_(parts[0].w.d_in) {
  joined_.reserve(parts.size());  // joined_ must not reallocate: parts_ points to its elements
  for (const BackwardPart<T>& p : parts) {
    const size_t rank = p.low.rank();
    const LayerShape shape{tokens_,
                           p.w.d_out,
                           p.w.d_in,
                           rank,
                           sizeof(E) / kValuesPerElement<E>,
                           p.low.dropout > 0,
                           is_blocks(p.w.storage)};
    const Update update = plan_backward(shape).update;
    const bool adds = rank && dx.data && update == Update::kSeparate, wants_db = rank && p.db.data;
    parts_.push_back(
        {p, update, adds || wants_db ? join(p.low, adds, wants_db) : nullptr, rank && p.da.data});
    work_ += flops(tokens_, p.w.d_out, dx.data ? p.w.d_in : 2 * rank);
  }
}

template <class E>
typename BackwardStack<E>::Joined* BackwardStack<E>::join(const LowRank<T>& low, bool adds, bool wants_db) {
  const bool drops = low.dropout > 0;
  for (Joined& each : joined_)
    if (!drops && !each.dropped && each.adds == adds && each.wants_db == wants_db) return &each;
  return &joined_.emplace_back(Joined{adds, wants_db, drops ? &low : nullptr});
}

template <class E>
void* BackwardStack<E>::reserve(size_t block_tokens, size_t more) {
  block_tokens_ = block_tokens;
  for (Part& p : parts_)
    if (p.joined) p.column = std::exchange(p.joined->rank, p.joined->rank + p.rank());
  void* free = nullptr;
  divide_scratch<T, E>(Scratch::kLowGradients, Scratch::kLanes,
                       [&](Arena<T>& t, Arena<E>& e) { free = divide(t, e, more); });
  for (Part& p : parts_)
    if (p.joined) p.a = pairs_down_columns<E>(p.arrays.low.a, const_cast<E*>(p.a.data));
  for (Joined& each : joined_)
    if (each.adds) bring_b(each);
  return free;
}

// Divides the scratch memory among the layers of the stack, and reserves `more` bytes for the caller. Returns
// the address of the reserved bytes.
template <class E>
E* BackwardStack<E>::divide(Arena<T>& t, Arena<E>& e, size_t more) {
  constexpr bool kPairs = kValuesPerElement<E> > 1;
  for (Joined& each : joined_) {
    each.dz = t.take(block_tokens_ * each.rank);
    if (each.wants_db) each.db = t.take(each.rank * d_in_);
    if (each.adds) each.b.data = e.take(depth_of<E>(each.rank) * d_in_);
    if (kPairs && each.adds) each.elements = e.take(block_tokens_ * depth_of<E>(each.rank));
    if (kPairs && each.wants_db) each.rows = e.take(each.rank * depth_of<E>(block_tokens_));
  }
  for (Part& p : parts_) {
    if (p.wants_da) p.da = t.take(p.rank() * p.arrays.w.d_out);
    if (!kPairs) continue;
    if (p.joined) p.a.data = e.take(p.dy_depth() * p.rank());
    if (p.joined || (dx_.data && multiplies_elements_)) p.dy = e.take(block_tokens_ * p.dy_depth());
    if (p.wants_da) p.z_rows = e.take(p.rank() * depth_of<E>(block_tokens_));
  }
  return e.take(ceil_div(more, sizeof(E)));
}

// Stacks the B matrices of the layers of a group, one below the other, and sets all.b to the result. If the
// group has only one layer, its B is not copied. If E is Bf16Pair, the rows of the result are converted to
// pairs.
template <class E>
void BackwardStack<E>::bring_b(Joined& all) const {
  E* room = const_cast<E*>(all.b.data);  // memory that `divide` reserved for the stacked B
  T* stack = nullptr;
  for (const Part& p : parts_) {
    if (p.joined != &all) continue;
    const Matrix<const T>& its = p.arrays.low.b;
    if (its.rows == all.rank) {
      all.b = pairs_down_columns<E>(its, room);
      return;
    }
    if constexpr (kValuesPerElement<E> == 1)
      stack = room;
    else if (!stack)
      stack = scratch<T>(Scratch::kFactor, all.rank * d_in_);
    for (size_t i = 0; i < its.rows; ++i) std::copy_n(its.row(i), d_in_, stack + (p.column + i) * d_in_);
  }
  all.b = pairs_down_columns<E>({stack, all.rank, d_in_, d_in_}, room);
}

// Processes kTokenUnit tokens at a time. If E is Bf16Pair, dy and z are converted before dz is computed, and
// dz is converted afterwards. For so few tokens, the converted dy is still in L2 when it is multiplied by A.
template <class E>
void BackwardStack<E>::prepare(Range token_block, Range some) const {
  for (size_t i = 0; i < some.count; i += kTokenUnit) {
    const Range few{some.first + i, std::min(kTokenUnit, some.count - i)};
    for (const Part& p : parts_) prepare(p, token_block, few);
    if constexpr (kValuesPerElement<E> > 1)
      for (const Joined& each : joined_) {
        const size_t rank = each.rank, depth = depth_of<E>(rank);
        const Matrix<T> dz{each.dz + few.first * rank, few.count, rank, rank};
        if (each.elements) elements_of<E>(dz, each.elements + few.first * depth, depth);
        if (each.rows) transpose_pairs(dz, each.rows, few);
      }
  }
}

template <class E>
void BackwardStack<E>::prepare(const Part& p, Range token_block, Range few) const {
  const Range rows{token_block.first + few.first, few.count};
  if constexpr (kValuesPerElement<E> > 1) {
    if (p.dy)
      elements_of<E>(block_of(p.arrays.dy, rows, {0, p.arrays.dy.cols}), p.dy + few.first * p.dy_depth(),
                     p.dy_depth());
    if (p.z_rows) transpose_pairs(block_of(p.arrays.z, rows, {0, p.rank()}), p.z_rows, few);
  }
  if (!p.joined) return;
  const size_t stride = p.joined->rank;
  const Matrix<T> dz{p.joined->dz + few.first * stride + p.column, few.count, p.rank(), stride};
  add_product<E>(few.count, dz.cols, p.dy_depth(), dy_of(p, token_block, few), p.a.data, p.a.stride, dz.data,
                 stride, false, rows_after(p.arrays.dy, rows));
  for (size_t i = 0; i < dz.rows; ++i)
    for (size_t j = 0; j < dz.cols; ++j) dz.row(i)[j] *= T(p.arrays.low.scale);
}

// Transposes z (or dz) for the tokens `few` and converts it to pairs of neighbouring tokens. `out` is (r, n /
// 2), where n is the number of tokens of the token block; the function writes only the columns of the tokens
// `few`.
template <class E>
void BackwardStack<E>::transpose_pairs(Matrix<const T> z, E* out, Range few) const {
  if constexpr (kValuesPerElement<E> > 1) {
    T* rows = scratch<T>(Scratch::kFactor, z.cols * few.count);
    transpose(z, rows, few.count);
    elements_of<E>({rows, z.cols, few.count, few.count}, out + few.first / kValuesPerElement<E>,
                   depth_of<E>(block_tokens_));
  }
}

template <class E>
Strided<E> BackwardStack<E>::dy_of(const Part& p, Range token_block, Range some) const {
  if constexpr (kValuesPerElement<E> > 1)
    return {p.dy + some.first * p.dy_depth(), p.dy_depth(), 1};
  else
    return {p.arrays.dy.row(token_block.first + some.first), p.arrays.dy.stride, 1};
}

template <class E>
Strided<E> BackwardStack<E>::dz_of(const Joined& all, size_t first) const {
  const size_t depth = depth_of<E>(all.rank);
  if constexpr (kValuesPerElement<E> > 1)
    return {all.elements + first * depth, depth, 1};
  else
    return {all.dz + first * depth, depth, 1};
}

template class BackwardStack<float>;
template class BackwardStack<double>;
template class BackwardStack<Bf16Pair>;

}  // namespace nplora
