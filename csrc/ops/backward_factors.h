// The third of three steps of a backward pass: the gradients of the factors, da += scale dyᵀ z and db += dzᵀ
// drop(x).
#pragma once

#include <vector>

#include "ops/backward_stack.h"

namespace nplora {

// The gradients of the factors A and B, summed over the token blocks. The sums are added to the caller's
// gradients at the end.
template <class E>
class FactorGradients {
 public:
  using T = kernels::Sum<E>;
  using Stack = BackwardStack<E>;

  // Divides the gradients among tasks. Each task computes some columns of one gradient.
  explicit FactorGradients(const Stack& stack);
  size_t tasks() const { return tasks_.size(); }

  // Computes the matrix product of a task for one token block, and adds it to the sums of the task.
  void add(Range token_block, size_t task) const;

  // Adds all sums to the caller's gradients. The addition cannot be interrupted: after an interrupt, the
  // caller could not know which gradients are complete.
  void finish() const;

 private:
  using Part = typename Stack::Part;
  using Joined = typename Stack::Joined;

  // A task computes some columns of dAᵀ for one layer, or of dB for a group of layers whose dB are computed
  // by one matrix product. For dAᵀ, `part` is the layer, and `joined` is null. For dB, `joined` is the group,
  // and `part` is null.
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
