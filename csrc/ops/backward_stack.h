// The first of three steps of a backward pass. This step computes dz = scale dy A. If the other two steps use
// bfloat16 pairs, this step also converts dy, z and dz to pairs.
#pragma once

#include <span>
#include <vector>

#include "ops/elements.h"
#include "ops/kernel_plan.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// Returns a view of the block m[rows, cols] of a matrix m.
template <class T>
Matrix<const T> block_of(Matrix<const T> m, Range rows, Range cols) {
  return {m.row(rows.first) + cols.first, rows.count, cols.count, m.stride};
}

// A stack of layers that all have the same input x. In the code, a layer of the stack is called a part. The
// gradients of the layers are computed with elements of type E, one token block at a time. Tokens are counted
// from the start of the token block unless a comment says otherwise. All pointers into scratch memory are
// valid after `reserve`.
template <class E>
class BackwardStack {
 public:
  using T = kernels::Sum<E>;

  // A group of layers whose dz are stored side by side. For the whole group, one product computes dz B, and
  // one product computes dB, so that x is read once. All layers of a group have the same value of `adds` and
  // the same value of `wants_db`. A layer with dropout forms its own group, because each layer drops
  // different elements of x.
  struct Joined {
    bool adds, wants_db;                  // adds: dz B is added to dx; wants_db: dB must be computed
    const LowRank<T>* dropped = nullptr;  // the layer's update if the update uses dropout, else null
    size_t rank = 0;                      // the sum of the ranks of all layers of the group
    Matrix<const E> b{};    // B of all layers, one below the other: (rank, d_in), or (rank / 2, d_in) pairs
    T* dz = nullptr;        // the dz of a token block of n tokens, (n, rank)
    E* elements = nullptr;  // if E is Bf16Pair: dz in pairs, (n, rank / 2)
    E* rows = nullptr;      // if E is Bf16Pair: dz transposed, in pairs, (rank, n / 2)
    T* db = nullptr;        // the sums of dB, (rank, d_in)
  };

  struct Part {
    BackwardPart<T> arrays;
    Update update;
    Joined* joined;  // the group of the layer; null if dz is not needed
    bool wants_da;
    size_t column = 0;    // the layer's first column in the joined dz
    E* dy = nullptr;      // the dy of a token block, if it is converted to type E
    E* z_rows = nullptr;  // only for pairs: z of a token block, transposed (r, n / 2)
    Matrix<const E> a{};  // the factor A (d_out, r), or its rows in pairs (d_out / 2, r)
    T* da = nullptr;      // the sums of dA, transposed (r, d_out)

    size_t rank() const { return arrays.low.rank(); }
    size_t dy_depth() const { return depth_of<E>(arrays.w.d_out); }
  };

  // `multiplies_elements` is true if dy W is computed with elements of type E, and false if dy W is computed
  // in int8.
  BackwardStack(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx,
                bool multiplies_elements);
  BackwardStack(const BackwardStack&) = delete;
  BackwardStack& operator=(const BackwardStack&) = delete;

  // Reserves scratch memory for token blocks of at most `block_tokens` tokens, and converts the factors to
  // elements of type E. Also reserves `more` bytes for the caller, and returns their address, which is
  // aligned for elements of type E.
  void* reserve(size_t block_tokens, size_t more);

  // Whether `prepare` has anything to compute.
  bool prepares() const { return !joined_.empty() || kernels::kValuesPerElement<E> > 1; }

  // Computes dz for some tokens. If E is Bf16Pair, also converts dy, z and dz to pairs.
  void prepare(Range token_block, Range some) const;

  // Both functions return an operand with elements of type E: dy_of returns the rows of dy for the tokens
  // `some`, and dz_of returns the rows of dz for token `first` and all later tokens.
  kernels::Strided<E> dy_of(const Part& p, Range token_block, Range some) const;
  kernels::Strided<E> dz_of(const Joined& all, size_t first) const;

  const std::vector<Part>& parts() const { return parts_; }
  const std::vector<Joined>& joined() const { return joined_; }
  Matrix<const T> x() const { return x_; }
  Matrix<T> dx() const { return dx_; }  // dx().data is null if dx is not needed
  size_t tokens() const { return tokens_; }
  size_t d_in() const { return d_in_; }
  size_t block_tokens() const { return block_tokens_; }
  double work() const { return work_; }  // the number of floating-point operations

 private:
  Joined* join(const LowRank<T>& low, bool adds, bool wants_db);
  E* divide(Arena<T>& t, Arena<E>& e, size_t more);
  void bring_b(Joined& all) const;
  void prepare(const Part& p, Range token_block, Range few) const;
  void transpose_pairs(Matrix<const T> z, E* out, Range few) const;

  const Matrix<const T> x_;
  const Matrix<T> dx_;
  const bool multiplies_elements_;
  const size_t tokens_, d_in_;
  size_t block_tokens_ = 0;
  double work_ = 0;
  std::vector<Joined> joined_;
  std::vector<Part> parts_;
};

}  // namespace nplora
