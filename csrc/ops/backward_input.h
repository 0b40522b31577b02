// The second of three steps of a backward pass: dx = the sum of dy W + undrop(dz B) over all layers of a
// stack, where undrop applies the dropout mask of x to a gradient.
#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "ops/backward_stack.h"
#include "ops/int8_weight.h"

namespace nplora {

// Computes dx. The template parameter E is the element type in the products with the factors A and B. The
// template parameter W is the element type of the weight blocks that the kernels read. If W is Int8Quad, dy
// is multiplied with the weight in int8.
template <class E, class W>
class InputGradient {
 public:
  using T = kernels::Sum<E>;
  using Stack = BackwardStack<E>;

  InputGradient(const Stack& stack, std::optional<uint64_t> dither_key);

  // The number of columns of dx that are computed at a time.
  size_t group() const { return group_; }

  // The largest number of tokens in a token block.
  size_t block_tokens(size_t threads) const;
  // The largest number of tokens in a task.
  size_t task_tokens(size_t block_tokens) const;

  // The size in bytes of the int8 copies of dy of all layers, if a token block has at most `block_tokens`
  // tokens. The size is 0 if W is not Int8Quad.
  size_t code_bytes(size_t block_tokens) const;

  // Sets the memory for the int8 copies of dy. It must have code_bytes(block_tokens) bytes.
  void place_codes(size_t block_tokens, void* memory);

  // If W is Int8Quad, quantises the dy of some tokens of a token block. With a dither key, dy is rounded
  // stochastically.
  void prepare(Range token_block, Range some) const;

  // Computes dx[some, cols]. The range `some` is counted from the start of the token block.
  void multiply(Range token_block, Range some, Range cols) const;

 private:
  using Part = typename Stack::Part;
  using Joined = typename Stack::Joined;

  static constexpr bool kInt8 = std::is_same_v<W, kernels::Int8Quad>;

  // The operands of a layer's product in int8.
  struct Int8Operands {
    CodedBlock codes;                       // dy in int8
    std::shared_ptr<const KeptCodes> kept;  // all of W in int8, if kept in memory; otherwise null
  };

  // The dy of some tokens, for a product with W. In int8 products, dy is in `int8`, and `elements` is empty.
  // In all other products, dy is in `elements`, and `int8` is null.
  struct Gradient {
    kernels::Strided<E> elements;
    const Int8Operands* int8;
    size_t first;  // the row of int8->codes that holds the first of these tokens
  };

  bool is_shared() const;
  Gradient gradient_of(const Part& p, Range token_block, Range some) const;
  ColumnBlock<W> block_at(const WeightView& w, const Gradient& dy, Range rows, Range cols, W* made) const;
  template <class After>
  void add_frozen(const Part& p, const Gradient& dy, Range group, Matrix<T> dx, bool accumulate,
                  const After& after) const;
  template <class After>
  void add_block(const Part& p, const Gradient& dy, Range rows, Range panel, ColumnBlock<W> block,
                 Matrix<T> dx, bool accumulate, const After& after) const;
  void add_low_rank(const Joined& all, Range token_block, Range some, Range panel, Matrix<T> dx,
                    Range few) const;

  const Stack& stack_;
  const std::optional<uint64_t> dither_key_;
  size_t group_ = kernels::kPanelColumns;
  bool merges_ = false;             // whether the update of any layer is merged on the fly
  std::vector<Int8Operands> int8_;  // the operands of each layer, if products are in int8
};

}  // namespace nplora
