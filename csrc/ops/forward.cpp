// Chooses the method for the forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].
#include "ops/forward.h"

#include <type_traits>

#include "base/parallel.h"
#include "ops/kernel_plan.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;

namespace {

// The element type in which a small batch reads W.
enum class SmallElement { kOwn, kBf16, kPair };

SmallElement small_element(const WeightView& w, size_t tokens) {
  if (computes_pairs(w, tokens) && !dots_blocks(w)) return SmallElement::kPair;
  return w.storage == Storage::kBfloat16 ? SmallElement::kBf16 : SmallElement::kOwn;
}

// Neighbouring parts that read W in the same element type are computed together.
template <class T>
void small_stack(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  while (!parts.empty()) {
    const SmallElement element = small_element(parts[0].w, x.rows);
    size_t count = 1;
    while (count < parts.size() && small_element(parts[count].w, x.rows) == element) ++count;
    const auto alike = parts.first(count);
    parts = parts.subspan(count);
    if constexpr (std::is_same_v<T, float>) {
      if (element == SmallElement::kPair) {
        forward_small<Bf16Pair>(alike, x);
        continue;
      }
      if (element == SmallElement::kBf16) {
        forward_small<Bf16>(alike, x);
        continue;
      }
    }
    forward_small<T>(alike, x);
  }
}

template <class E, class T>
void large_stack(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  const size_t threads = useful_threads(flops_of(parts, x.rows));
  size_t outputs = 0;
  bool decoded = true;
  for (const ForwardPart<T>& part : parts) {
    outputs += part.w.d_out;
    decoded &= is_blocks(part.w.storage);
  }
  forward_path(x.rows, outputs, x.cols, sizeof(E) / kernels::kValuesPerElement<E>, decoded) ==
          ForwardPath::kLanes
      ? forward_lanes<E>(parts, x, threads)
      : forward_rows<E>(parts, x, threads);
}

}  // namespace

template <class T>
void lora_forward(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  for (const ForwardPart<T>& part : parts)
    if (part.low.rank() == 0 && part.z.data)
      for (size_t i = 0; i < part.z.rows; ++i) std::fill_n(part.z.row(i), part.z.cols, T(0));
  if (x.rows == 0 || parts.empty()) return;
  if (x.rows <= small_batch<T>()) return small_stack(parts, x);
  if constexpr (std::is_same_v<T, float>)
    if (computes_pairs(parts[0].w, x.rows)) return large_stack<Bf16Pair>(parts, x);
  large_stack<T>(parts, x);
}

template void lora_forward(std::span<const ForwardPart<float>>, Matrix<const float>);
template void lora_forward(std::span<const ForwardPart<double>>, Matrix<const double>);

}  // namespace nplora
