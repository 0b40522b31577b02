// The frozen product, with or without a low-rank update: forward, backward, and the gradients' outer sums.
#pragma once

#include <cstdint>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// scale * A B with A (d_out, r) and B (r, d_in). Absent where r = 0; scale 0 leaves a and b unread.
template <class T>
struct LowRank {
  Matrix<const T> a, b;
  double scale = 0;
  double dropout = 0;  // the probability that an element of x is dropped on the low-rank path
  uint64_t key = 0;    // of the mask

  bool active() const { return scale != 0 && a.cols > 0; }
};

// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].   x (n, d_in), y (n, d_out), z (n, r).
template <class T>
void lora_forward(const WeightView& w, Matrix<const T> x, const LowRank<T>& low, const T* bias, Matrix<T> y,
                  Matrix<T> z);

// dz = scale dy A, dx = dy W + undrop(dz B), da += scale dyᵀ z, db += dzᵀ drop(x).
// dx, da and db are not computed where their data is null.
template <class T>
void lora_backward(const WeightView& w, Matrix<const T> dy, Matrix<const T> x, Matrix<const T> z,
                   const LowRank<T>& low, Matrix<T> dx, Matrix<T> da, Matrix<T> db);

// out (p, q) += scale aᵀ b.   a (n, p), b (n, q).
template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out);

}  // namespace nplora
