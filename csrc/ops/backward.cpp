// The backward pass of LoRA layers. All layers have the same input x. From the gradients dy of their outputs,
// the backward pass computes:
//   dz = scale dy A, for each layer
//   dx = the sum of dy W + undrop(dz B) over all layers
//   da += scale dyᵀ z and db += dzᵀ drop(x), for each layer
// The array z = drop(x) Bᵀ comes from the forward pass. The function `drop` applies the dropout mask to x,
// and `undrop` applies the same mask to a gradient.
#include <algorithm>
#include <type_traits>

#include "base/parallel.h"
#include "ops/backward_factors.h"
#include "ops/backward_input.h"
#include "ops/backward_stack.h"
#include "ops/blocking.h"
#include "ops/outer.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Int8Quad;
using kernels::Sum;

namespace {

// Computes the gradients of a stack of layers. The template parameter E is the element type in the products
// with the factors A and B. The template parameter W is the element type of the weight blocks that the
// kernels read. For each token block, dz is computed first, and then dx and the sums of dA and dB. So dy and
// x are read from memory once. The sums are added to the caller's dA and dB at the end, so an interrupted
// call leaves dA and dB unchanged.
template <class E, class W>
void backward(std::span<const BackwardPart<Sum<E>>> parts, Matrix<const Sum<E>> x, Matrix<Sum<E>> dx,
              std::optional<uint64_t> dither_key = {}) {
  BackwardStack<E> stack(parts, x, dx, !std::is_same_v<W, Int8Quad>);
  InputGradient<E, W> input(stack, dither_key);
  const FactorGradients<E> factors(stack);
  const size_t threads = useful_threads(stack.work()), tokens = stack.tokens(), group = input.group();
  const size_t most = input.block_tokens(threads);
  input.place_codes(most, stack.reserve(most, input.code_bytes(most)));
  for (size_t first = 0; first < tokens; first += most) {
    const Range token_block{first, std::min(most, tokens - first)};
    if (stack.prepares())
      for_pieces(token_block.count, kTokenUnit, threads, [&](Range some) {
        for (size_t i = 0; i < some.count; i += kTokenUnit) {  // the dy of kTokenUnit tokens stays in L2
          const Range few{some.first + i, std::min(kTokenUnit, some.count - i)};
          stack.prepare(token_block, few);
          input.prepare(token_block, few);
        }
      });
    const double work = stack.work() * double(token_block.count) / double(tokens);
    const Grid grid({dx.data ? token_block.count : 0, kTokenUnit, input.task_tokens(token_block.count)},
                    {dx.cols, group, round_up(dx.cols, group)}, work, threads);
    const size_t products = dx.data ? grid.tasks() : 0;
    parallel_in_order(products + factors.tasks(), threads, Interruptible::kYes, [&](size_t i) {
      if (i < products)
        input.multiply(token_block, grid.tokens(i), grid.side(i));
      else
        factors.add(token_block, i - products);
    });
  }
  factors.finish();
}

// Reports the number of operations of a backward pass to `timed`. The number does not depend on whether
// updates are merged on the fly.
template <class T>
void count_operations(const Timed& timed, std::span<const BackwardPart<T>> parts, bool wants_dx, bool int8) {
  for (const BackwardPart<T>& part : parts) {
    const LayerArithmetic arithmetic = backward_arithmetic(part.w, part.dy.rows, int8);
    const size_t tokens = part.dy.rows, rank = part.low.rank(), d_out = part.w.d_out, d_in = part.w.d_in;
    const size_t of_dz = rank ? d_out : 0, of_dx = wants_dx ? d_in : 0, of_da = part.da.data ? d_out : 0,
                 of_db = part.db.data ? d_in : 0;
    if (wants_dx) timed.count(arithmetic.product, flops(tokens, d_out, d_in));
    timed.count(arithmetic.update, flops(tokens, rank, of_dz + of_dx + of_da + of_db));
  }
}

}  // namespace

template <class T>
void lora_backward(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx, bool int8,
                   std::optional<uint64_t> dither_key) {
  if (parts.empty() || parts[0].dy.rows == 0) return;
  const Timed timed(Activity::kBackward);
  if (timed) count_operations(timed, parts, dx.data != nullptr, int8);
  if constexpr (std::is_same_v<T, float>) {
    const size_t tokens = parts[0].dy.rows;
    const auto is_bf16 = [](const BackwardPart<T>& part) { return part.w.storage == Storage::kBfloat16; };
    const auto is_packed = [](const BackwardPart<T>& part) { return part.w.packed; };
    const bool all_bf16 = std::all_of(parts.begin(), parts.end(), is_bf16);
    const bool all_packed = std::all_of(parts.begin(), parts.end(), is_packed);
    // Products of pairs can read a W in bfloat16 in two ways. In batches of up to `most_paired` tokens,
    // gemm_outputs_in_lanes reads the rows of W and pairs them during the product. In larger batches, the
    // rows are first copied to memory in pairs, and all tokens of a task share this copy. If
    // pairs_in_registers is false, each call of gemm_outputs_in_lanes makes its own copy. Batches of more
    // than kFewTokens tokens would need several calls, and thus several copies, for the same rows. A W that
    // is not packed is read in the first way for up to kInPlaceBatch tokens.
    const size_t most_paired = !all_packed                           ? kInPlaceBatch
                               : kernels::table().pairs_in_registers ? kPairedBatch
                                                                     : kFewTokens;
    if (int8 && backward_in_int8(parts[0].w, tokens))
      return backward<Bf16Pair, Int8Quad>(parts, x, dx, dither_key);
    if (computes_pairs(parts[0].w, tokens))
      return all_bf16 && tokens <= most_paired ? backward<Bf16Pair, Bf16>(parts, x, dx)
                                               : backward<Bf16Pair, Bf16Pair>(parts, x, dx);
    if (all_bf16 && tokens <= kWidenedBatch) return backward<float, Bf16>(parts, x, dx);
  }
  backward<T, T>(parts, x, dx);
}

template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out) {
  if (scale == 0 || a.rows == 0) return;
  const Timed timed(Activity::kBackward);
  if (timed)
    timed.count(sizeof(T) == 8 ? Arithmetic::kFloat64 : Arithmetic::kFloat32,
                flops(a.rows, out.rows, out.cols));
  const size_t row_tasks = ceil_div(out.rows, kRowBlock), col_tasks = ceil_div(out.cols, kColumnBlock);
  const double work = flops(a.rows, out.rows, out.cols);
  parallel_for(row_tasks * col_tasks, useful_threads(work), Interruptible::kYes, [&](size_t i) {
    const Range rows = nth_block(out.rows, kRowBlock, i / col_tasks);
    const Range cols = nth_block(out.cols, kColumnBlock, i % col_tasks);
    T* scaled = scratch<T>(Scratch::kFactor, kSumDepth * kRowBlock);
    // The product is summed over all tokens in separate memory, and is then added to `out` in one step. So
    // the rounding of the product does not depend on the old values of `out`.
    const Matrix<T> product{scratch<T>(Scratch::kWeight, rows.count * cols.count), rows.count, cols.count,
                            cols.count};
    for (size_t first = 0; first < a.rows; first += kSumDepth) {
      const Range tokens{first, std::min(kSumDepth, a.rows - first)};
      for (size_t n = 0; n < tokens.count; ++n)
        for (size_t j = 0; j < rows.count; ++j)
          scaled[n * kRowBlock + j] = T(scale) * a.row(tokens.first + n)[rows.first + j];
      add_product<T>(rows.count, cols.count, tokens.count, {scaled, 1, kRowBlock},
                     block_of(b, tokens, cols).data, b.stride, product.data, product.stride, first > 0);
    }
    for (size_t j = 0; j < rows.count; ++j) {
      T* sum = out.row(rows.first + j) + cols.first;
      for (size_t c = 0; c < cols.count; ++c) sum[c] += product.row(j)[c];
    }
  });
}

#define NPLORA_INSTANTIATE(T)                                                                     \
  template void lora_backward(std::span<const BackwardPart<T>>, Matrix<const T>, Matrix<T>, bool, \
                              std::optional<uint64_t>);                                           \
  template void add_outer(Matrix<const T>, Matrix<const T>, double, Matrix<T>)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
