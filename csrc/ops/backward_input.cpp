#include "ops/backward_input.h"

#include <algorithm>
#include <type_traits>

#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/merge_on_the_fly.h"
#include "ops/outer.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Fetch;
using kernels::Int8Quad;
using kernels::kPanelColumns;
using kernels::kValuesPerElement;
using kernels::Strided;

namespace {

// Returns the memory to prefetch while the first `tokens` tokens of a task are multiplied by a block of W.
// (When later tokens of the task are multiplied, the block is already in L2, and the caller prefetches its
// rows into L1.) Usually, the function returns the memory that is read after the block: the next rows of the
// same panel, or the next panel. There are three exceptions: W is not packed, all `tokens` tokens fit into
// one tile, or the kernel reads the block in place and divides it into L1 blocks. In these cases, the
// function returns Fetch::rows_ahead(), which prefetches later rows of the same block.
template <class E>
Fetch following(const WeightView& w, Range rows, Range panel, size_t tokens, const void* block) {
  const kernels::Tiles<E>& k = kernels::table().tiles<E>();
  const size_t tiles = ceil_div(tokens, k.tile_tokens) * ceil_div(kPanelColumns, k.tile_columns);
  if (rows.count == 0) return Fetch::none();
  if (!w.packed || tiles < 2) return Fetch::rows_ahead();
  if (k.l1_block_bytes > 0 && block == stored_at(w, rows.first, panel.first)) return Fetch::rows_ahead();
  const size_t lines = rows.count * kPanelColumns * bytes_per_element(w.storage) / kCacheLine;
  return Fetch::memory(stored_at(w, rows.first + rows.count, panel.first), lines,
                       std::clamp<size_t>(ceil_div(lines, tiles * depth_of<E>(rows.count)), 1, 3));
}

}  // namespace

template <class E, class W>
InputGradient<E, W>::InputGradient(const Stack& stack, std::optional<uint64_t> dither_key)
    : stack_(stack), dither_key_(dither_key) {
  for (const Part& p : stack.parts()) {
    merges_ |= stack.dx().data && p.update == Update::kMergedOnTheFly;
    if (makes_two_panels(p.arrays.w, is_shared())) group_ = kDecodedColumns;
    if (kInt8 && stack.dx().data) {
      p.arrays.w.int8->find_scales(p.arrays.w);
      int8_.push_back({{p.arrays.w.d_out, int8_depth_block(p.arrays.w.d_out)}, p.arrays.w.int8->codes()});
    }
  }
}

template <class E, class W>
size_t InputGradient<E, W>::code_bytes(size_t block_tokens) const {
  size_t sum = 0;
  for (const Int8Operands& each : int8_) sum += each.codes.bytes(block_tokens);
  return sum;
}

template <class E, class W>
void InputGradient<E, W>::place_codes(size_t block_tokens, void* memory) {
  for (Int8Operands& each : int8_) {
    each.codes.place(block_tokens, memory);
    memory = static_cast<char*>(memory) + each.codes.bytes(block_tokens);
  }
}

// Each row of W has its own scale. The product dy W is a sum over the rows of W, so the scales cannot be
// applied after the sum. Instead, column i of dy is multiplied by the scale of row i of W before dy is
// quantised.
template <class E, class W>
void InputGradient<E, W>::prepare(Range token_block, Range some) const {
  if constexpr (kInt8)
    for (size_t j = 0; j < int8_.size(); ++j) {
      const BackwardPart<T>& part = stack_.parts()[j].arrays;
      for (size_t i = some.first; i < some.first + some.count; ++i) {
        const size_t row = token_block.first + i;
        if (dither_key_)
          int8_[j].codes.dither(i, *dither_key_ + j, row, part.dy.row(row), part.w.int8->scales());
        else
          int8_[j].codes.quantize(i, part.dy.row(row), part.w.int8->scales());
      }
    }
}

template <class E, class W>
typename InputGradient<E, W>::Gradient InputGradient<E, W>::gradient_of(const Part& p, Range token_block,
                                                                        Range some) const {
  if constexpr (kInt8)
    return {{}, &int8_[static_cast<size_t>(&p - stack_.parts().data())], some.first};
  else
    return {stack_.dy_of(p, token_block, some), nullptr, 0};
}

// Whether blocks of a row-major W are copied even if W could be read in place. This is the case if many
// tokens use each block. Blocks of double are not copied, because a copy of two panels of doubles would not
// stay in L2.
template <class E, class W>
bool InputGradient<E, W>::is_shared() const {
  return sizeof(W) <= sizeof(float) && stack_.tokens() > kInPlaceBatch;
}

// The largest number of tokens in a token block. If an update is merged on the fly (added to blocks of W), a
// token block is as large as L3 allows, so that each merged block of W is multiplied with many tokens.
template <class E, class W>
size_t InputGradient<E, W>::block_tokens(size_t threads) const {
  const size_t tokens = stack_.tokens();
  size_t most = std::min(tokens, (group_ > kPanelColumns ? 2 : 1) * kTaskTokens * ceil_div(threads, 2));
  for (const Part& p : stack_.parts())
    if (stack_.dx().data && p.update == Update::kMergedOnTheFly)
      most = std::max(most, tokens_of_l3_block(tokens, p.arrays.w.d_out, sizeof(E) / kValuesPerElement<E>));
  return most;
}

// The largest number of tokens in a task. If blocks of W are two panels wide, or if an update is merged into
// blocks of W, a task multiplies all tokens of the token block, so that each block of W is decoded or merged
// only once for all these tokens. Otherwise tasks have fewer tokens, so that more threads have work.
template <class E, class W>
size_t InputGradient<E, W>::task_tokens(size_t block_tokens) const {
  return merges_ || group_ > kPanelColumns ? block_tokens : kTaskTokens;
}

// Computes a group of panels of dx at a time. As soon as a panel of dx holds the products dy W of all layers,
// the product dz B is added to it.
template <class E, class W>
void InputGradient<E, W>::multiply(Range token_block, Range some, Range cols) const {
  const Matrix<T> all = stack_.dx();
  const Matrix<T> dx{all.row(token_block.first + some.first), some.count, all.cols, all.stride};
  for (size_t c = 0; c < cols.count; c += group_) {
    const Range group{cols.first + c, std::min(group_, cols.count - c)};
    bool accumulate = false;
    for (const Part& p : stack_.parts()) {
      const bool last = &p == &stack_.parts().back();
      add_frozen(p, gradient_of(p, token_block, some), group, dx, accumulate, [&](Range panel, Range few) {
        if (!last) return;
        for (const Joined& each : stack_.joined())
          if (each.adds) add_low_rank(each, token_block, {some.first + few.first, few.count}, panel, dx, few);
      });
      accumulate = true;
    }
  }
}

template <class E, class W>
ColumnBlock<W> InputGradient<E, W>::block_at(const WeightView& w, const Gradient& dy, Range rows, Range cols,
                                             W* made) const {
  if constexpr (kInt8)
    return column_quads(w, dy.int8->kept.get(), rows, cols, made);
  else
    return column_block(w, rows, cols, is_shared(), made);
}

// Multiplies dy by a group of columns of W: dx[:, group] = dy W[:, group]. If `accumulate` is true, adds the
// product to dx[:, group] instead. Calls after(panel, tokens) as soon as the outputs of a few tokens in one
// panel are complete, while these outputs are still in L1.
template <class E, class W>
template <class After>
void InputGradient<E, W>::add_frozen(const Part& p, const Gradient& dy, Range group, Matrix<T> dx,
                                     bool accumulate, const After& after) const {
  const WeightView& w = p.arrays.w;
  const size_t width = makes_two_panels(w, is_shared()) ? kDecodedColumns : kPanelColumns;
  const size_t depth = kInt8 ? int8_depth_block(w.d_out) : depth_block(w.d_out);
  W* made = scratch<W>(Scratch::kWeight, (kInt8 ? depth_of<W>(depth) : kDepthBlock) * width);
  for (size_t g = 0; g < group.count; g += width) {
    const Range cols{group.first + g, std::min(width, group.count - g)};
    size_t o = 0;
    do {  // if W has no rows, the only iteration sets dx to zero
      const Range rows{o, std::min(depth, w.d_out - o)};
      const ColumnBlock<W> block = block_at(w, dy, rows, cols, made);
      for (size_t c = 0; c < cols.count; c += kPanelColumns) {
        const Range panel{cols.first + c, std::min(kPanelColumns, cols.count - c)};
        const ColumnBlock<W> its{block.data + c / kPanelColumns * block.panel_stride, block.row_stride};
        add_block(p, dy, rows, panel, its, dx, accumulate || o > 0, after);
      }
      o += rows.count;
    } while (o < w.d_out);
  }
}

// Multiplies some columns of dy by one block of W: dx[:, panel] = dy[:, rows] W[rows, panel]. If `accumulate`
// is true, adds the product to dx[:, panel] instead. If the update is merged on the fly, the update is first
// added to the block of W.
template <class E, class W>
template <class After>
void InputGradient<E, W>::add_block(const Part& p, const Gradient& dy, Range rows, Range panel,
                                    ColumnBlock<W> block, Matrix<T> dx, bool accumulate,
                                    const After& after) const {
  if constexpr (std::is_same_v<W, T>)
    if (p.update == Update::kMergedOnTheFly)
      block = merged_block<T>(p.arrays.low, rows, panel, block,
                              scratch<T>(Scratch::kDecoded, kDepthBlock * kPanelColumns));
  const bool last = rows.first + rows.count == p.arrays.w.d_out;
  const size_t chunk = !last ? dx.rows : kInt8 ? kFewInt8Tokens : kFewTokens;
  for (size_t i = 0; i < dx.rows; i += chunk) {
    const Range few{i, std::min(chunk, dx.rows - i)};
    T* out = dx.row(i) + panel.first;
    if constexpr (kInt8) {
      kernels::table().int8_gemm.multiply(few.count, panel.count, rows.count,
                                          dy.int8->codes.from(dy.first + i, rows.first), block.data,
                                          kPanelColumns, nullptr, out, dx.stride, accumulate);
    } else {
      const Strided<E>& a = dy.elements;
      const size_t depth = std::is_same_v<E, W> ? depth_of<E>(rows.count) : rows.count;
      gemm_outputs_in_lanes<E, W>()(
          few.count, panel.count, depth,
          {a.data + i * a.row_stride + rows.first / kValuesPerElement<E>, a.row_stride, 1}, block.data,
          block.row_stride, out, dx.stride, accumulate,
          i == 0 ? following<E>(p.arrays.w, rows, panel, few.count, block.data) : Fetch::rows_ahead());
    }
    if (last) after(panel, few);
  }
}

// Adds the low-rank part of the gradient for a few tokens: dx[few, panel] += undrop(dz B[:, panel]), where
// `undrop` applies the dropout mask of x. The ranges `few` and `some` are the same tokens, counted from
// different starts: `few` counts from the first row of dx, and `some` from the first token of the token
// block.
template <class E, class W>
void InputGradient<E, W>::add_low_rank(const Joined& all, Range token_block, Range some, Range panel,
                                       Matrix<T> dx, Range few) const {
  const size_t depth = depth_of<E>(all.rank);
  const Strided<E> dz = stack_.dz_of(all, some.first);
  T* out = dx.row(few.first) + panel.first;
  if (!all.dropped)
    return add_product<E>(few.count, panel.count, depth, dz, all.b.data + panel.first, all.b.stride, out,
                          dx.stride, true);
  const Matrix<T> update{scratch<T>(Scratch::kDropped, few.count * panel.count), few.count, panel.count,
                         panel.count};
  add_product<E>(few.count, panel.count, depth, dz, all.b.data + panel.first, all.b.stride, update.data,
                 panel.count, false);
  drop_rows<T>(all.dropped->dropout, all.dropped->key, token_block.first + some.first, panel.first,
               stack_.dx().cols, update, update);
  for (size_t j = 0; j < few.count; ++j)
    for (size_t c = 0; c < panel.count; ++c) out[j * dx.stride + c] += update.row(j)[c];
}

template class InputGradient<float, float>;
template class InputGradient<float, Bf16>;
template class InputGradient<double, double>;
template class InputGradient<Bf16Pair, Bf16>;
template class InputGradient<Bf16Pair, Bf16Pair>;
template class InputGradient<Bf16Pair, Int8Quad>;

}  // namespace nplora
