#include "ops/activation.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "base/profile.h"
#include "base/range.h"
#include "ops/dropout.h"

namespace nplora {

namespace {

constexpr size_t kElementsPerTask = 16384;

// The costs for one element, in floating-point operations: of erf, of Philox (which makes the random numbers
// of dropout), and of a conversion between float and a 16-bit format.
constexpr double kErfOperations = 40, kPhiloxOperations = 20, kConversionOperations = 8;

template <class Body>
void for_pieces(size_t n, double operations_per_element, const Body& body) {
  parallel_for(ceil_div(n, kElementsPerTask), useful_threads(operations_per_element * double(n)),
               Interruptible::kYes, [&](size_t task) {
                 const Range piece = nth_block(n, kElementsPerTask, task);
                 body(piece.first, piece.count);
               });
}

constexpr double kInverseRoot2 = 0.70710678118654752440, kInverseRoot2Pi = 0.39894228040143267794;
constexpr double kTanhFactor = 0.79788456080286535588, kTanhCubic = 0.044715;  // sqrt(2 / pi)

// The gate of GELU: gelu(x) = x * gate(x). The gate is the normal distribution function Phi(x) or, if `tanh`
// is true, (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x³). The code uses
// erfc and exp, because for x < 0, the sums 1 + erf and 1 + tanh would lose digits by cancellation.
template <class T>
T gate(T x, bool tanh) {
  if (!tanh) return T(0.5) * std::erfc(-x * T(kInverseRoot2));
  return 1 / (1 + std::exp(-2 * T(kTanhFactor) * (x + T(kTanhCubic) * x * x * x)));
}

// For |x| > 40 the gate is 0 or 1 in both float and double, but x² and x³ may overflow. So the gate is
// computed only for |x| <= 40.
template <class T>
T gelu_of(T x, bool tanh) {
  return x < T(-40) ? T(0) : x * gate(std::min(x, T(40)), tanh);
}

template <class T>
T gelu_slope(T x, bool tanh) {
  x = std::clamp(x, T(-40), T(40));
  const T g = gate(x, tanh);
  if (!tanh) return g + x * T(kInverseRoot2Pi) * std::exp(T(-0.5) * x * x);
  return g + x * g * (1 - g) * 2 * T(kTanhFactor) * (1 + 3 * T(kTanhCubic) * x * x);
}

}  // namespace

template <class T>
void gelu(size_t n, const T* x, bool tanh, T* out) {
  const Timed timed(Activity::kActivation);
  for_pieces(n, kErfOperations, [&](size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) out[i] = gelu_of(x[i], tanh);
  });
}

template <class T>
void gelu_backward(size_t n, const T* x, const T* dy, bool tanh, T* out) {
  const Timed timed(Activity::kActivation);
  for_pieces(n, kErfOperations, [&](size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) out[i] = dy[i] * gelu_slope(x[i], tanh);
  });
}

template <class T>
void dropout(size_t n, const T* x, double probability, uint64_t key, T* out) {
  const Timed timed(Activity::kActivation);
  for_pieces(n, kPhiloxOperations, [&](size_t first, size_t count) {
    drop_rows<T>(probability, key, 0, first, 0, {x + first, 1, count, count}, {out + first, 1, count, count});
  });
}

void widen_bits(size_t n, const uint16_t* from, Storage storage, float* to) {
  const Timed timed(Activity::kConversion);
  for_pieces(n, kConversionOperations,
             [&](size_t first, size_t count) { widen(storage, count, from + first, to + first); });
}

void narrow_bits(size_t n, const float* from, Storage storage, uint16_t* to) {
  const Timed timed(Activity::kConversion);
  for_pieces(n, kConversionOperations,
             [&](size_t first, size_t count) { narrow(storage, count, from + first, to + first); });
}

#define NPLORA_INSTANTIATE(T)                                        \
  template void gelu(size_t, const T*, bool, T*);                    \
  template void gelu_backward(size_t, const T*, const T*, bool, T*); \
  template void dropout(size_t, const T*, double, uint64_t, T*)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
