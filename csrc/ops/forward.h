// The three methods for the forward pass, and the code that all three use. kernel_plan.h chooses the method.
#pragma once

#include <algorithm>
#include <span>

#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// The method for batches of up to kSmallBatch rows. The weight is read once, in the order in which it is
// stored, as elements of type W. Nothing is transposed.
template <class W>
void forward_small(std::span<const ForwardPart<kernels::Sum<W>>> parts, Matrix<const kernels::Sum<W>> x);

// The method with tokens in the SIMD lanes. forward_lanes transposes x and y. The products with W and B have
// elements of type E.
template <class E>
void forward_lanes(std::span<const ForwardPart<kernels::Sum<E>>> parts, Matrix<const kernels::Sum<E>> x,
                   size_t threads);

// The method with outputs in the SIMD lanes. forward_rows transposes blocks of W. The low-rank update may be
// merged on the fly: it is then added to these blocks. plan_forward decides this for a batch of `plan_tokens`
// rows, even if x has more or fewer rows. Blocks of the weight have elements of type W, which is E or
// Int8Quad.
template <class E, class W>
void forward_rows(std::span<const ForwardPart<kernels::Sum<E>>> parts, Matrix<const kernels::Sum<E>> x,
                  size_t threads, size_t plan_tokens);

template <class T>
Matrix<const T> rows_of(Matrix<const T> m, Range rows) {
  return {m.row(rows.first), rows.count, m.cols, m.stride};
}

// Returns drop(x[tokens]) in scratch memory. Without dropout, returns x[tokens] itself.
template <class T>
Matrix<const T> dropped(const LowRank<T>& low, Matrix<const T> x, Range tokens) {
  if (low.dropout == 0) return rows_of(x, tokens);
  const Matrix<T> out{scratch<T>(Scratch::kDropped, tokens.count * x.cols), tokens.count, x.cols, x.cols};
  drop_rows(low.dropout, low.key, tokens.first, 0, x.cols, rows_of(x, tokens), out);
  return out;
}

template <class T>
const T* bias_at(const ForwardPart<T>& part, size_t row) {
  return part.bias ? part.bias + row : nullptr;
}

// Calls body(rows, low) for each group of rows of x, where `low` is the update of the group. If the layer has
// no groups, all n rows form one group, and `low` is the update of the layer.
template <class T, class Body>
void for_groups(const ForwardPart<T>& part, size_t n, const Body& body) {
  if (part.groups.empty()) return body(Range{0, n}, part.low);
  size_t first = 0;
  for (const GroupUpdate<T>& group : part.groups) {
    body(Range{first, group.rows}, group.low);
    first += group.rows;
  }
}

// Some rows of the weight of one layer. `part` is the index of the layer in a stack.
struct PartRows {
  size_t part;
  Range rows;
};

// The weights of all layers of a stack, divided into blocks of `block_rows` rows. Each layer begins with a
// new block, and the blocks of all layers are numbered consecutively.
template <class T>
class StackRows {
 public:
  explicit StackRows(std::span<const ForwardPart<T>> parts, size_t block_rows = kRowBlock)
      : parts_(parts), block_rows_(block_rows) {}

  size_t blocks() const {
    size_t sum = 0;
    for (const auto& part : parts_) sum += ceil_div(part.w.d_out, block_rows_);
    return sum;
  }

  // Calls body(PartRows) for each layer that has rows in the range `blocks`. The PartRows are the rows of the
  // layer in this range.
  template <class Body>
  void for_parts(Range blocks, const Body& body) const {
    size_t first = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const size_t d_out = parts_[i].w.d_out, count = ceil_div(d_out, block_rows_);
      const size_t from = std::max(first, blocks.first),
                   to = std::min(first + count, blocks.first + blocks.count);
      if (from < to) {
        const size_t row = (from - first) * block_rows_;
        body(PartRows{i, {row, std::min(d_out, (to - first) * block_rows_) - row}});
      }
      first += count;
    }
  }

 private:
  std::span<const ForwardPart<T>> parts_;
  size_t block_rows_;
};

// Whether a product x Wᵀ or x Bᵀ must be computed for any part.
template <class T>
bool multiplies_x(std::span<const ForwardPart<T>> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [](const ForwardPart<T>& part) { return !part.multiplied || part.low.rank() > 0; });
}

template <class T>
double flops_of(std::span<const ForwardPart<T>> parts, size_t n) {
  double sum = 0;
  for (const auto& part : parts)
    sum += part.multiplied ? flops(n, std::max<size_t>(1, part.low.rank()), part.w.d_in + part.w.d_out)
                           : flops(n, part.w.d_out, part.w.d_in);
  return sum;
}

}  // namespace nplora
