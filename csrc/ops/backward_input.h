// The second of three steps of a backward pass: dx = the sum over the parts of dy W + undrop(dz B).
#pragma once

#include "ops/backward_stack.h"

namespace nplora {

// dx in elements E, from blocks of W in elements W.
template <class E, class W>
class InputGradient {
 public:
  using T = kernels::Sum<E>;
  using Stack = BackwardStack<E>;

  explicit InputGradient(const Stack& stack);

  // The number of columns that are computed at a time.
  size_t group() const { return group_; }

  // The most tokens of a token block and of a task.
  size_t block_tokens(size_t threads) const;
  size_t task_tokens(size_t block_tokens) const;

  // dx[some tokens of a token block, cols].
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
  bool merges_ = false;  // an update is merged on the fly
};

}  // namespace nplora
