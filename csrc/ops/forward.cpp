// z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias]: picks the way.
#include "ops/forward.h"

#include <type_traits>

#include "base/parallel.h"
#include "ops/plan.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;

namespace {

// Each part in its turn: with so few rows, reading W is all of the work.
template <class T>
void small_stack(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  for (const ForwardPart<T>& part : parts) {
    const size_t threads = useful_threads(flops(x.rows, part.w.d_out, part.w.d_in));
    if constexpr (std::is_same_v<T, float>) {
      if (computes_pairs(part.w, x.rows)) {
        forward_small<Bf16Pair>(part, x, threads);
        continue;
      }
      if (part.w.storage == Storage::kBfloat16) {
        forward_small<Bf16>(part, x, threads);
        continue;
      }
    }
    forward_small<T>(part, x, threads);
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
  forward_path(x.rows, outputs, x.cols, sizeof(E) / kernels::kSteps<E>, decoded) == ForwardPath::kLanes
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
