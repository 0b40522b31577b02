// The operations of a transformer between its matrix products: RMSNorm, LayerNorm, rotary position
// embeddings, activations and gated units. Rows are tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"
#include "kernels/kernel_table.h"

namespace nplora {

// y = x ∘ weight / sqrt(mean(x²) + eps) for each row (Zhang & Sennrich 2019). The shapes are x (n, d), y (n,
// d) and weight (d). The squares are summed in float32, with one partial sum for each of the L lanes of a
// vector. The relative error of the sum is below gamma(d / L + log2 L). Here gamma(m) = m u / (1 - m u), and
// u is the unit roundoff.
void rms_norm(Matrix<const float> x, const float* weight, float eps, Matrix<float> y);

// Stores the gradient of x in `dx`, or adds it to `dx` if `accumulate` is set. The weight is frozen, so its
// gradient is not computed.
void rms_norm_backward(Matrix<const float> dy, Matrix<const float> x, const float* weight, float eps,
                       Matrix<float> dx, bool accumulate);

// y = (x - mean x) / sqrt(variance x + eps) ∘ weight + bias for each row (Ba et al. 2016). The shapes are x
// (n, d), y (n, d), weight (d) and bias (d); `bias` may be null. The mean and the variance are summed in the
// same way as the squares in `rms_norm`.
void layer_norm(Matrix<const float> x, const float* weight, const float* bias, float eps, Matrix<float> y);

// Adds x to `sum`, and then applies `layer_norm` to `sum`: sum += x, y = layer_norm(sum).
void add_layer_norm(Matrix<const float> x, Matrix<float> sum, const float* weight, const float* bias,
                    float eps, Matrix<float> y);

// Stores the gradient of x in `dx`, or adds it to `dx` if `accumulate` is set. Weight and bias are frozen, so
// their gradients are not computed.
void layer_norm_backward(Matrix<const float> dy, Matrix<const float> x, const float* weight, float eps,
                         Matrix<float> dx, bool accumulate);

// The cosines and sines of rotary position embeddings. Row p of `data` is for position p, and holds
// rotary_dim / 2 cosines and then rotary_dim / 2 sines. The embedding rotates pairs of elements of a head. If
// `interleaved` is true, the two elements of a pair are neighbours. If `interleaved` is false, they are
// rotary_dim / 2 elements apart.
struct RotaryTable {
  const float* data;
  size_t rotary_dim;
  bool interleaved;
};

// Rotates pairs of elements in place (Su et al. 2021, equation 34). In row i of x (n, heads * head_dim), each
// pair (a, b) of each head becomes (a cos - b sin, b cos + a sin). The cosines and sines are in row
// positions[i] of the table. The pairs are in the first rotary_dim elements of a head; the other elements do
// not change. If `inverse` is true, the pairs are rotated in the opposite direction. The backward pass
// rotates the gradient in this way.
void rope(Matrix<float> x, size_t head_dim, const int64_t* positions, RotaryTable table, bool inverse);

using kernels::Activation;

// A gated unit: out (n) = act(gate) ∘ up (Shazeer 2020). If `up` is null, out = act(gate).
void gated(Activation act, size_t n, const float* gate, const float* up, float* out);

// Computes the gradients of `gated`. `dgate` may be the same array as `dout` or `gate`, and `dup` the same
// array as `up`. If `up` is null, `dup` must be null too.
void gated_backward(Activation act, size_t n, const float* dout, const float* gate, const float* up,
                    float* dgate, float* dup);

// These two functions do the same as `gated` and `gated_backward` above, for `gate` and `up` in bfloat16. A
// few elements at a time are converted to float32, so that the converted elements stay in L1.
void gated(Activation act, size_t n, const uint16_t* gate, const uint16_t* up, float* out);
void gated_backward(Activation act, size_t n, const float* dout, const uint16_t* gate, const uint16_t* up,
                    float* dgate, float* dup);

// Does the same as `gated`, and also stores `gate` and `up` in bfloat16. If `up` is null, `up_bits` must be
// null too. `out` may be the same array as `gate`.
void gated_narrow(Activation act, size_t n, const float* gate, const float* up, float* out,
                  uint16_t* gate_bits, uint16_t* up_bits);

}  // namespace nplora
