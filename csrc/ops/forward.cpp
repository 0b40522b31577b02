// Chooses the method for the forward pass z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias].
#include "ops/forward.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "ops/kernel_plan.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Int8Quad;

namespace {

bool reads_bf16(const WeightView& w) {
  return w.storage == Storage::kBfloat16;
}

// Computes the outputs of a small batch. Successive layers share one call of forward_small if it reads their
// weights as the same element type: Bf16 for weights in bfloat16, T for all other weights. Small batches
// never use pairs of bfloat16, even if larger batches use them.
template <class T>
void small_stack(std::span<const ForwardPart<T>> parts, Matrix<const T> x) {
  while (!parts.empty()) {
    const bool bf16 = reads_bf16(parts[0].w);
    size_t count = 1;
    while (count < parts.size() && reads_bf16(parts[count].w) == bf16) ++count;
    const auto alike = parts.first(count);
    parts = parts.subspan(count);
    if constexpr (std::is_same_v<T, float>)
      if (bf16) {
        forward_small<Bf16>(alike, x);
        continue;
      }
    forward_small<T>(alike, x);
  }
}

template <class E, class T>
void large_stack(std::span<const ForwardPart<T>> parts, Matrix<const T> x, size_t plan_tokens) {
  const size_t threads = useful_threads(flops_of(parts, x.rows));
  size_t outputs = 0;
  bool decoded = true;
  for (const ForwardPart<T>& part : parts) {
    outputs += part.w.d_out;
    decoded &= is_blocks(part.w.storage);
  }
  forward_path(plan_tokens, outputs, x.cols, sizeof(E) / kernels::kValuesPerElement<E>, decoded) ==
          ForwardPath::kLanes
      ? forward_lanes<E>(parts, x, threads)
      : forward_rows<E, E>(parts, x, threads, plan_tokens);
}

bool same_weight(const WeightView& a, const WeightView& b) {
  return a.data == b.data && a.storage == b.storage && a.compute == b.compute && a.d_out == b.d_out &&
         a.d_in == b.d_in && a.nf4.codes == b.nf4.codes;
}

// Whether two layers with the same weight have the same bias. The biases may be at different addresses,
// because a copy of a layer has its own copy of the bias.
template <class T>
bool same_bias(const ForwardPart<T>& a, const ForwardPart<T>& b) {
  if (a.bias == b.bias) return true;
  return a.bias && b.bias && std::memcmp(a.bias, b.bias, a.w.d_out * sizeof(T)) == 0;
}

// Whether all groups have the same weights and biases: layer i of each group must have the weight and the
// bias of layer i of the first group.
template <class T>
bool share_weights(std::span<const GroupParts<T>> groups) {
  for (const GroupParts<T>& group : groups)
    for (size_t i = 0; i < group.parts.size(); ++i)
      if (!same_weight(group.parts[i].w, groups[0].parts[i].w) ||
          !same_bias(group.parts[i], groups[0].parts[i]))
        return false;
  return true;
}

// Reports the number of operations of a forward pass to `timed`. The number of operations of an update does
// not depend on whether the update is merged on the fly.
template <class T>
void count_operations(const Timed& timed, std::span<const ForwardPart<T>> parts, size_t rows,
                      size_t plan_tokens, bool int8) {
  for (const ForwardPart<T>& part : parts) {
    const LayerArithmetic arithmetic = forward_arithmetic(part.w, plan_tokens, int8);
    if (!part.multiplied) timed.count(arithmetic.product, flops(rows, part.w.d_out, part.w.d_in));
    for_groups(part, rows, [&](Range some, const LowRank<T>& low) {
      timed.count(arithmetic.update, flops(some.count, low.rank(), part.w.d_in + part.w.d_out));
    });
  }
}

// Computes the outputs for x, but chooses the methods as if x had `plan_tokens` rows.
template <class T>
void forward_as(std::span<const ForwardPart<T>> parts, Matrix<const T> x, size_t plan_tokens, bool int8) {
  for (const ForwardPart<T>& part : parts)
    if (part.low.rank() == 0 && part.z.data)
      for (size_t i = 0; i < part.z.rows; ++i) std::fill_n(part.z.row(i), part.z.cols, T(0));
  if (x.rows == 0 || parts.empty()) return;
  const Timed timed(Activity::kForward);
  if (timed) count_operations(timed, parts, x.rows, plan_tokens, int8);
  if (plan_tokens <= kernels::kSmallBatch) return small_stack(parts, x);
  if constexpr (std::is_same_v<T, float>) {
    if (int8 && forward_in_int8(parts[0].w, plan_tokens))
      return forward_rows<Bf16Pair, Int8Quad>(parts, x, useful_threads(flops_of(parts, x.rows)), plan_tokens);
    if (computes_pairs(parts[0].w, plan_tokens)) return large_stack<Bf16Pair>(parts, x, plan_tokens);
  }
  large_stack<T>(parts, x, plan_tokens);
}

// Computes the outputs of a small batch whose groups share the weights and biases.
template <class T>
void small_groups(std::span<const GroupParts<T>> groups, Matrix<const T> x) {
  std::vector<ForwardPart<T>> parts(groups[0].parts);
  std::vector<std::vector<GroupUpdate<T>>> updates(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    for (const GroupParts<T>& group : groups) updates[i].push_back({group.rows, group.parts[i].low});
    parts[i].y.rows = x.rows;
    parts[i].groups = updates[i];
  }
  lora_infer<T>(parts, x, x.rows);
}

// Whether all updates of a large batch are computed separately. If the result is false, at least one update
// is merged on the fly.
template <class T>
bool updates_are_separate(std::span<const GroupParts<T>> groups) {
  for (const GroupParts<T>& group : groups)
    for (const ForwardPart<T>& part : group.parts) {
      const WeightView& w = part.w;
      const bool pairs = sizeof(T) == sizeof(float) && computes_pairs(w, kInferenceTokens);
      const LayerShape shape{
          kInferenceTokens,    w.d_out, w.d_in, part.low.rank(), pairs ? 2 : sizeof(T), part.low.dropout > 0,
          is_blocks(w.storage)};
      if (plan_forward(shape, false).update == Update::kMergedOnTheFly) return false;
    }
  return true;
}

// Whether y = x Wᵀ, without an update or a bias, for all layers of a group.
template <class T>
bool adds_nothing(const GroupParts<T>& group) {
  return std::all_of(group.parts.begin(), group.parts.end(),
                     [](const ForwardPart<T>& part) { return part.low.rank() == 0 && !part.bias; });
}

// Computes x Wᵀ for each layer of a stack and all rows of a large batch, without updates and biases.
template <class T>
void multiply_all(const GroupParts<T>& group, Matrix<const T> x) {
  std::vector<ForwardPart<T>> parts(group.parts);
  for (ForwardPart<T>& part : parts) {
    part.y.rows = x.rows;
    part.low = {};
    part.bias = nullptr;
  }
  lora_infer<T>(parts, x, x.rows);
}

}  // namespace

template <class T>
void lora_forward(std::span<const ForwardPart<T>> parts, Matrix<const T> x, bool int8) {
  forward_as(parts, x, x.rows, int8);
}

template <class T>
void lora_infer(std::span<const ForwardPart<T>> parts, Matrix<const T> x, size_t batch) {
  forward_as(parts, x, inference_tokens(std::max(batch, x.rows)), false);
}

// If the groups share weights and biases, and no update is merged on the fly, x Wᵀ is computed once for all
// groups, and each group adds its own update. Otherwise, each group is computed alone. The method depends on
// the size of the whole batch, not on the size of the group. So the bits of an output row do not depend on
// the size of its group.
template <class T>
void lora_forward_groups(std::span<const GroupParts<T>> groups, Matrix<const T> x) {
  if (groups.size() == 1) return lora_infer<T>(groups[0].parts, x, x.rows);
  const bool shared = share_weights(groups);
  if (shared && x.rows <= kernels::kSmallBatch) return small_groups(groups, x);
  const bool multiplied = shared && updates_are_separate(groups);
  if (multiplied) multiply_all(groups[0], x);
  size_t first = 0;
  for (const GroupParts<T>& group : groups) {
    const Matrix<const T> rows = rows_of(x, {first, group.rows});
    first += group.rows;
    if (multiplied && adds_nothing(group)) continue;
    std::vector<ForwardPart<T>> parts(group.parts);
    for (ForwardPart<T>& part : parts) part.multiplied = multiplied;
    lora_infer<T>(parts, rows, x.rows);
  }
}

template void lora_forward(std::span<const ForwardPart<float>>, Matrix<const float>, bool);
template void lora_forward(std::span<const ForwardPart<double>>, Matrix<const double>, bool);
template void lora_infer(std::span<const ForwardPart<float>>, Matrix<const float>, size_t);
template void lora_infer(std::span<const ForwardPart<double>>, Matrix<const double>, size_t);
template void lora_forward_groups(std::span<const GroupParts<float>>, Matrix<const float>);
template void lora_forward_groups(std::span<const GroupParts<double>>, Matrix<const double>);

}  // namespace nplora
