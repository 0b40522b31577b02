// The parts of a transformer between its products: RMSNorm, rotary positions, gated units. Rows are tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"
#include "kernels/kernel_table.h"

namespace nplora {

// y = x ∘ weight / sqrt(mean x² + eps) (Zhang & Sennrich 2019).   x, y are (n, d), weight is (d).
// Sums run in float32, in as many partial sums as there are lanes L. Their relative error is below gamma(d /
// L + log2 L).
void rms_norm(Matrix<const float> x, const float* weight, float eps, Matrix<float> y);

// dx = [dx +] the gradient of x; weight is frozen.
void rms_norm_backward(Matrix<const float> dy, Matrix<const float> x, const float* weight, float eps,
                       Matrix<float> dx, bool accumulate);

// The cosines and sines of rotary positions. Row p of data is rotary_dim / 2 cosines, then as many sines.
// interleaved: the elements of a pair are neighbours; otherwise they are rotary_dim / 2 apart.
struct RotaryTable {
  const float* data;
  size_t rotary_dim;
  bool interleaved;
};

// Each pair (a, b) of each head of x (n, heads * head_dim) becomes (a cos - b sin, b cos + a sin), with row
// positions[i] of the table (Su et al. 2021, equation 34). The pairs are in the first rotary_dim elements of
// a head; the rest do not change. inverse rotates backwards, which gives the gradient.
void rope(Matrix<float> x, size_t head_dim, const int64_t* positions, RotaryTable table, bool inverse);

using kernels::Activation;

// out (n) = act(gate) ∘ up (Shazeer 2020).
void gated(Activation act, size_t n, const float* gate, const float* up, float* out);

// dgate may be gate and dup may be up.
void gated_backward(Activation act, size_t n, const float* dout, const float* gate, const float* up,
                    float* dgate, float* dup);

}  // namespace nplora
