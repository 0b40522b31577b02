// The second of three steps of a backward pass: dx = the sum of dy W + undrop(dz B) over all layers of a
// stack, where undrop applies the dropout mask of x to a gradient.
#pragma once

#include "ops/backward_stack.h"

namespace nplora {

// Computes dx. E is the element type of the products, and W the element type of the weight's blocks.
template <class E, class W>
class InputGradient {
 public:
  using T = kernels::Sum<E>;
  using Stack = BackwardStack<E>;

  explicit InputGradient(const Stack& stack);

  // The number of columns of dx that are computed at a time.
  size_t group() const { return group_; }

  // The largest number of tokens in a token block.
  size_t block_tokens(size_t threads) const;
  // The largest number of tokens in a task.
  size_t task_tokens(size_t block_tokens) const;

  // Computes the columns `cols` of dx for the tokens `some` of a token block.
  void multiply(Range token_block, Range some, Range cols) const;

 private:
  using Part = typename Stack::Part;
  using Joined = typename Stack::Joined;

  bool is_shared() const;
  template <class After>
  void add_frozen(const Part& p, kernels::Strided<E> dy, Range group, Matrix<T> dx, bool accumulate,
                  const After& after) const;
  template <class After>
  void add_block(const Part& p, kernels::Strided<E> dy, Range rows, Range panel, ColumnBlock<W> block,
                 Matrix<T> dx, bool accumulate, const After& after) const;
  void add_low_rank(const Joined& all, Range token_block, Range some, Range panel, Matrix<T> dx,
                    Range few) const;

  const Stack& stack_;
  size_t group_ = kernels::kPanelColumns;
  bool merges_ = false;  // whether an update is merged on the fly
};

}  // namespace nplora
