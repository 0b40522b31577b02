// The third of three steps of a backward pass: the gradients of the factors, da += scale dyᵀ z and db += dzᵀ
// drop(x).
#pragma once

#include <vector>

#include "ops/backward_stack.h"

namespace nplora {

// Sums over the token blocks. They are added to the caller's gradients at the end.
template <class E>
class FactorGradients {
 public:
  using T = kernels::Sum<E>;
  using Stack = BackwardStack<E>;

  // Each task owns some columns of one gradient.
  explicit FactorGradients(const Stack& stack);
  size_t tasks() const { return tasks_.size(); }

  // Adds a token block to a task's sum.
  void add(Range token_block, size_t task) const;

  // Adds all sums to the caller's gradients. It cannot be interrupted, because nobody could tell half-added
  // gradients from whole ones.
  void finish() const;

 private:
  using Part = typename Stack::Part;
  using Joined = typename Stack::Joined;

  // Some columns of one gradient: either A's, of one part and transposed, or B's, of joined parts. The other
  // pointer is null.
  struct Task {
    const Part* part;
    const Joined* joined;
    Range cols;

    size_t rank() const { return part ? part->rank() : joined->rank; }
  };

  void cut(const Part* part, const Joined* joined, size_t cols);
  Matrix<const T> right_of(const Task& task, Range tokens) const;
  void add_rows(const Task& task, Range token_block, Range some, T* sum, size_t stride) const;

  const Stack& stack_;
  std::vector<Task> tasks_;
};

}  // namespace nplora
