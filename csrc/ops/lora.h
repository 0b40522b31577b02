// Frozen products with low-rank updates, for one layer or a stack: forward, backward, and the gradients'
// outer products.
#pragma once

#include <cstdint>
#include <span>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// scale * A B with A (d_out, r) and B (r, d_in). There is no update if r = 0. If scale is 0, a and b are not
// read.
template <class T>
struct LowRank {
  Matrix<const T> a, b;
  double scale = 0;
  double dropout = 0;  // the probability of dropping an element of x on the low-rank path
  uint64_t key = 0;    // of the dropout mask

  size_t rank() const { return scale == 0 ? 0 : a.cols; }
};

// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].   x (n, d_in), y (n, d_out), z (n, r).
// bias may be null. The data of z may be null if the caller does not want z.
template <class T>
struct ForwardPart {
  WeightView w;
  LowRank<T> low;
  const T* bias;
  Matrix<T> y, z;
};

// All parts of a stack read the same x (n, d_in).
template <class T>
void lora_forward(std::span<const ForwardPart<T>> parts, Matrix<const T> x);

// dz = scale dy A, da += scale dyᵀ z, db += dzᵀ drop(x).   The data of da and db may be null.
template <class T>
struct BackwardPart {
  WeightView w;
  LowRank<T> low;
  Matrix<const T> dy, z;
  Matrix<T> da, db;
};

// dx = the sum over the parts of dy W + undrop(dz B).   The data of dx may be null.
template <class T>
void lora_backward(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx);

// out (p, q) += scale aᵀ b.   a (n, p), b (n, q).
template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out);

}  // namespace nplora
