// The first of three steps of a backward pass. It computes dz = scale dy A, and converts dy, z and dz to the
// element type of the other two steps if that differs.
#pragma once

#include <span>
#include <vector>

#include "ops/elements.h"
#include "ops/kernel_plan.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// A block of rows of m.
template <class T>
Matrix<const T> block_of(Matrix<const T> m, Range rows, Range cols) {
  return {m.row(rows.first) + cols.first, rows.count, cols.count, m.stride};
}

// The parts of a stack whose gradients are computed in elements E, one token block at a time. Tokens are
// counted in the token block unless stated otherwise. All pointers into scratch are valid after `reserve`.
template <class E>
class BackwardStack {
 public:
  using T = kernels::Sum<E>;

  // Parts whose dz are side by side. Then dz B and dB are one product for all parts, and x is read once. All
  // these parts need the same results. A part with dropout has its own Joined, because it drops different
  // elements of x.
  struct Joined {
    bool adds, wants_db;                  // whether dz B is added to dx; whether dB is wanted
    const LowRank<T>* dropped = nullptr;  // the part that uses dropout, or null
    size_t rank = 0;                      // of all parts
    Matrix<const E> b{};  // the B of all parts, one below the other, (rank, d_in), or its rows in pairs
    T* dz = nullptr;      // of a token block, (n, rank)
    E *elements = nullptr, *rows = nullptr;  // dz, and dz transposed, (rank, n / 2), if E is pairs
    T* db = nullptr;                         // sums, (rank, d_in)
  };

  struct Part {
    BackwardPart<T> arrays;
    Update update;
    Joined* joined;  // null if dz is not needed
    bool wants_da;
    size_t column = 0;    // the part's first column in the joined dz
    E* dy = nullptr;      // of a token block, if E is not the type of the arrays
    E* z_rows = nullptr;  // of a token block, transposed (r, n / 2), if E is pairs
    Matrix<const E> a{};  // A (d_out, r), or its rows in pairs
    T* da = nullptr;      // sums, (r, d_out)

    size_t rank() const { return arrays.low.rank(); }
    size_t dy_depth() const { return depth_of<E>(arrays.w.d_out); }
  };

  BackwardStack(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx);
  BackwardStack(const BackwardStack&) = delete;
  BackwardStack& operator=(const BackwardStack&) = delete;

  // Takes scratch for token blocks of at most this many tokens, and converts the factors to elements E.
  void reserve(size_t block_tokens);

  // Whether `prepare` has anything to do.
  bool prepares() const { return !joined_.empty() || kernels::kValuesPerElement<E> > 1; }

  // Computes dz for some tokens. If E is pairs, also converts dy, z and dz.
  void prepare(Range token_block, Range some) const;

  // The dy of some tokens, and the dz of the tokens from `first` on, in elements E.
  kernels::Strided<E> dy_of(const Part& p, Range token_block, Range some) const;
  kernels::Strided<E> dz_of(const Joined& all, size_t first) const;

  const std::vector<Part>& parts() const { return parts_; }
  const std::vector<Joined>& joined() const { return joined_; }
  Matrix<const T> x() const { return x_; }
  Matrix<T> dx() const { return dx_; }  // the pointer may be null
  size_t tokens() const { return tokens_; }
  size_t d_in() const { return d_in_; }
  size_t block_tokens() const { return block_tokens_; }
  double work() const { return work_; }  // in floating-point operations

 private:
  Joined* join(const LowRank<T>& low, bool adds, bool wants_db);
  void divide(Arena<T>& t, Arena<E>& e);
  void bring_b(Joined& all) const;
  void prepare(const Part& p, Range token_block, Range few) const;
  void transpose_pairs(Matrix<const T> z, E* out, Range few) const;

  const Matrix<const T> x_;
  const Matrix<T> dx_;
  const size_t tokens_, d_in_;
  size_t block_tokens_ = 0;
  double work_ = 0;
  std::vector<Joined> joined_;
  std::vector<Part> parts_;
};

}  // namespace nplora
