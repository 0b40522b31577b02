#include "ops/activation.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "kernels/kernel_table.h"
#include "ops/lora.h"

namespace nplora {

namespace {

constexpr size_t kElementsPerTask = 16384;

template <class Body>
void for_pieces(size_t n, double operations_per_element, const Body& body) {
  parallel_for((n + kElementsPerTask - 1) / kElementsPerTask,
               useful_threads(operations_per_element * double(n)), Interruptible::kYes, [&](size_t task) {
                 const size_t first = task * kElementsPerTask;
                 body(first, std::min(kElementsPerTask, n - first));
               });
}

constexpr double kErfOperations = 40;
constexpr double kInverseRoot2 = 0.70710678118654752440, kInverseRoot2Pi = 0.39894228040143267794;
constexpr double kTanhFactor = 0.79788456080286535588, kTanhCubic = 0.044715;  // sqrt(2 / pi)

template <class T>
T gelu_of(T x, bool tanh) {
  if (!tanh) return T(0.5) * x * (1 + std::erf(x * T(kInverseRoot2)));
  return T(0.5) * x * (1 + std::tanh(T(kTanhFactor) * (x + T(kTanhCubic) * x * x * x)));
}

// Beyond |x| = 40 the slope is 0 or 1 in float and double alike, while x² may overflow.
template <class T>
T gelu_slope(T x, bool tanh) {
  x = std::clamp(x, T(-40), T(40));
  if (!tanh)
    return T(0.5) * (1 + std::erf(x * T(kInverseRoot2))) + x * T(kInverseRoot2Pi) * std::exp(T(-0.5) * x * x);
  const T t = std::tanh(T(kTanhFactor) * (x + T(kTanhCubic) * x * x * x));
  return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * T(kTanhFactor) * (1 + 3 * T(kTanhCubic) * x * x);
}

}  // namespace

template <class T>
void gelu(size_t n, const T* x, bool tanh, T* out) {
  for_pieces(n, kErfOperations, [&](size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) out[i] = gelu_of(x[i], tanh);
  });
}

template <class T>
void gelu_backward(size_t n, const T* x, const T* dy, bool tanh, T* out) {
  for_pieces(n, kErfOperations, [&](size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) out[i] = dy[i] * gelu_slope(x[i], tanh);
  });
}

template <class T>
void dropout(size_t n, const T* x, double probability, uint64_t key, T* out) {
  const Mask mask = mask_of(probability);
  for_pieces(n, kErfOperations, [&](size_t first, size_t count) {
    kernels::table().products<T>().dropout(count, key, first, mask.threshold, T(mask.factor), x + first,
                                           out + first);
  });
}

void widen_bits(size_t n, const uint16_t* from, bool bfloat16, float* to) {
  const kernels::Conversions& convert = kernels::table().convert;
  (bfloat16 ? convert.widen_bfloat16 : convert.widen_float16)(n, from, to);
}

void narrow_bits(size_t n, const float* from, bool bfloat16, uint16_t* to) {
  const kernels::Conversions& convert = kernels::table().convert;
  (bfloat16 ? convert.narrow_bfloat16 : convert.narrow_float16)(n, from, to);
}

#define NPLORA_INSTANTIATE(T)                                        \
  template void gelu(size_t, const T*, bool, T*);                    \
  template void gelu_backward(size_t, const T*, const T*, bool, T*); \
  template void dropout(size_t, const T*, double, uint64_t, T*)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
