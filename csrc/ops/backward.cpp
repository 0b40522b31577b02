// dz = scale dy A, dx = sum of dy W + undrop(dz B), da += scale dyᵀ z, db += dzᵀ drop(x).
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "ops/blocking.h"
#include "ops/dropout.h"
#include "ops/elements.h"
#include "ops/kernel_plan.h"
#include "ops/lora.h"
#include "ops/merge_on_the_fly.h"
#include "ops/outer.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::Fetch;
using kernels::kPanelColumns;
using kernels::kValuesPerElement;
using kernels::Strided;
using kernels::Sum;

namespace {

template <class T>
Matrix<const T> at(Matrix<const T> m, Range rows, Range cols) {
  return {m.row(rows.first) + cols.first, rows.count, cols.count, m.stride};
}

// The gradients of a stack, computed in elements E from blocks of W in elements W, a token block at a time: dz, then dx and the
// sums of dA and dB, so that dy and x are read from memory once. The sums of all token blocks are added to dA and dB at the end:
// a call that is interrupted adds nothing.
template <class E, class W>
class Backward {
 public:
  using T = Sum<E>;

  Backward(std::span<const BackwardPart<T>> stack, Matrix<const T> x, Matrix<T> dx)
      : x_(x), dx_(dx), tokens_(stack[0].dy.rows), d_in_(stack[0].w.d_in) {
    joined_.reserve(stack.size());  // they stay where they are
    for (const BackwardPart<T>& p : stack) {
      const size_t rank = p.low.rank();
      const Update update =
          plan_backward({tokens_, p.w.d_out, p.w.d_in, rank, sizeof(E) / kValuesPerElement<E>,
                         p.low.dropout > 0, is_blocks(p.w.storage)})
              .update;
      const bool adds = rank && dx.data && update == Update::kSeparate, wants_db = rank && p.db.data;
      parts_.push_back(
          {p, update, adds || wants_db ? join(p.low, adds, wants_db) : nullptr, rank && p.da.data});
      work_ += flops(tokens_, p.w.d_out, dx.data ? p.w.d_in : 2 * rank);
      merges_ |= dx.data && update == Update::kMergedOnTheFly;
      if (makes_two_panels(p.w, is_shared())) group_ = kDecodedColumns;
    }
  }

  void run() {
    const size_t threads = useful_threads(work_);
    // A block of W that is added to serves all tokens; else more threads take more tokens at a time.
    block_tokens_ = std::min(tokens_, (group_ > kPanelColumns ? 2 : 1) * kTaskTokens * ceil_div(threads, 2));
    for (const Part& p : parts_)
      if (dx_.data && p.update == Update::kMergedOnTheFly)
        block_tokens_ = std::max(
            block_tokens_, tokens_of_l3_block(tokens_, p.arrays.w.d_out, sizeof(E) / kValuesPerElement<E>));
    reserve();
    std::vector<FactorTask> factor_tasks = cut_factors();
    for (size_t first = 0; first < tokens_; first += block_tokens_) {
      const Range token_block{first, std::min(block_tokens_, tokens_ - first)};
      if (!joined_.empty() || kValuesPerElement<E> > 1)
        for_pieces(token_block.count, kTokenUnit, threads, [&](Range some) { prepare(token_block, some); });
      const double work = work_ * double(token_block.count) / double(tokens_);
      const Grid grid({dx_.data ? token_block.count : 0, kTokenUnit,
                       merges_ || group_ > kPanelColumns ? token_block.count : kTaskTokens},
                      {dx_.cols, group_, round_up(dx_.cols, group_)}, work, threads);
      const size_t products = dx_.data ? grid.tasks() : 0;
      parallel_for(products + factor_tasks.size(), threads, Interruptible::kYes, [&](size_t i) {
        if (i < products)
          multiply(token_block, grid.tokens(i), grid.side(i));
        else
          add_factor(token_block, factor_tasks[i - products]);
      });
    }
    add_sums();
  }

 private:
  // Parts whose dz lie side by side, so that dz B, and dB, are one product for all, which reads x once. They want the same of these;
  // those with dropout stand alone: each drops other elements of x.
  struct Joined {
    bool adds, wants_db;                  // whether dz B is added to dx; whether dB is wanted
    const LowRank<T>* dropped = nullptr;  // the part that drops elements
    size_t rank = 0;                      // of all parts
    Matrix<const E> b{};                  // their B one below the other, (rank, d_in), or its rows in pairs
    T* dz = nullptr;                      // of a token block, (n, rank)
    E *elements = nullptr, *rows = nullptr;  // dz, and dz transposed, (rank, n / 2), where E is pairs
    T* db = nullptr;                         // sums, (rank, d_in)
  };

  struct Part {
    BackwardPart<T> arrays;
    Update update;
    Joined* joined;  // null where nobody wants dz
    bool wants_da;
    size_t column = 0;    // of the joined dz, the part's first
    E* dy = nullptr;      // of a token block, where E is not the type of the arrays
    E* z_rows = nullptr;  // of a token block, transposed (r, n / 2), where E is pairs
    Matrix<const E> a{};  // A (d_out, r), or its rows in pairs
    T* da = nullptr;      // sums, (r, d_out)

    size_t rank() const { return arrays.low.rank(); }
    size_t dy_depth() const { return depth_of<E>(arrays.w.d_out); }
  };

  // Some columns of the gradient of A of a part (transposed), or of B of joined ones; the other is null.
  struct FactorTask {
    const Part* part;
    const Joined* joined;
    Range cols;
  };

  Joined* join(const LowRank<T>& low, bool adds, bool wants_db) {
    const bool drops = low.dropout > 0;
    for (Joined& each : joined_)
      if (!drops && !each.dropped && each.adds == adds && each.wants_db == wants_db) return &each;
    return &joined_.emplace_back(Joined{adds, wants_db, drops ? &low : nullptr});
  }

  // Divides scratch among the parts, and brings their factors into elements E.
  void reserve() {
    for (Part& p : parts_)
      if (p.joined) p.column = std::exchange(p.joined->rank, p.joined->rank + p.rank());
    divide_scratch<T, E>(Scratch::kLowGradients, Scratch::kLanes,
                         [this](Arena<T>& t, Arena<E>& e) { divide(t, e); });
    for (Part& p : parts_)
      if (p.joined) p.a = pairs_down_columns<E>(p.arrays.low.a, const_cast<E*>(p.a.data));
    for (Joined& each : joined_)
      if (each.adds) bring_b(each);
  }
  void divide(Arena<T>& t, Arena<E>& e) {
    constexpr bool kPairs = kValuesPerElement<E> > 1;
    for (Joined& each : joined_) {
      each.dz = t.take(block_tokens_ * each.rank);
      if (each.wants_db) each.db = t.take(each.rank * d_in_);
      if (each.adds) each.b.data = e.take(depth_of<E>(each.rank) * d_in_);
      if (kPairs && each.adds) each.elements = e.take(block_tokens_ * depth_of<E>(each.rank));
      if (kPairs && each.wants_db) each.rows = e.take(each.rank * depth_of<E>(block_tokens_));
    }
    for (Part& p : parts_) {
      if (p.wants_da) p.da = t.take(p.rank() * p.arrays.w.d_out);
      if (!kPairs) continue;
      if (p.joined) p.a.data = e.take(p.dy_depth() * p.rank());
      if (p.joined || dx_.data) p.dy = e.take(block_tokens_ * p.dy_depth());
      if (p.wants_da) p.z_rows = e.take(p.rank() * depth_of<E>(block_tokens_));
    }
  }

  // B of all joined parts, one below the other. That of a single one is used as it lies.
  void bring_b(Joined& all) const {
    E* room = const_cast<E*>(all.b.data);  // divide took it, for this to write
    T* stack = nullptr;
    for (const Part& p : parts_) {
      if (p.joined != &all) continue;
      const Matrix<const T>& its = p.arrays.low.b;
      if (its.rows == all.rank) {
        all.b = pairs_down_columns<E>(its, room);
        return;
      }
      if constexpr (kValuesPerElement<E> == 1)
        stack = room;
      else if (!stack)
        stack = scratch<T>(Scratch::kFactor, all.rank * d_in_);
      for (size_t i = 0; i < its.rows; ++i) std::copy_n(its.row(i), d_in_, stack + (p.column + i) * d_in_);
    }
    all.b = pairs_down_columns<E>({stack, all.rank, d_in_, d_in_}, room);
  }

  // dz, and, where E is pairs, dy, z and dz in them, of some tokens of a token block: a few at a time, which are in L2 when they are projected.
  void prepare(Range token_block, Range some) const {
    for (size_t i = 0; i < some.count; i += kTokenUnit) {
      const Range few{some.first + i, std::min(kTokenUnit, some.count - i)};
      for (const Part& p : parts_) prepare(p, token_block, few);
      if constexpr (kValuesPerElement<E> > 1)
        for (const Joined& each : joined_) {
          const size_t rank = each.rank, depth = depth_of<E>(rank);
          const Matrix<T> dz{each.dz + few.first * rank, few.count, rank, rank};
          if (each.elements) elements_of<E>(dz, each.elements + few.first * depth, depth);
          if (each.rows) transpose_pairs(dz, each.rows, few);
        }
    }
  }
  void prepare(const Part& p, Range token_block, Range few) const {
    const Range tokens{token_block.first + few.first, few.count};
    if constexpr (kValuesPerElement<E> > 1) {
      if (p.dy)
        elements_of<E>(at(p.arrays.dy, tokens, {0, p.arrays.dy.cols}), p.dy + few.first * p.dy_depth(),
                       p.dy_depth());
      if (p.z_rows) transpose_pairs(at(p.arrays.z, tokens, {0, p.rank()}), p.z_rows, few);
    }
    if (!p.joined) return;
    const size_t stride = p.joined->rank;
    const Matrix<T> dz{p.joined->dz + few.first * stride + p.column, few.count, p.rank(), stride};
    add_product<E>(few.count, dz.cols, p.dy_depth(), dy_of(p, token_block, few), p.a.data, p.a.stride,
                   dz.data, stride, false, rows_behind(p.arrays.dy, tokens));
    for (size_t i = 0; i < dz.rows; ++i)
      for (size_t j = 0; j < dz.cols; ++j) dz.row(i)[j] *= T(p.arrays.low.scale);
  }

  // Columns `few` of out (r, n), in pairs, = the rows of z or dz.
  void transpose_pairs(Matrix<const T> z, E* out, Range few) const {
    T* rows = scratch<T>(Scratch::kFactor, z.cols * few.count);
    transpose(z, rows, few.count);
    elements_of<E>({rows, z.cols, few.count, few.count}, out + few.first / kValuesPerElement<E>,
                   depth_of<E>(block_tokens_));
  }

  // dy, and dz, of some tokens of a token block, in elements E.
  Strided<E> dy_of(const Part& p, Range token_block, Range some) const {
    if constexpr (kValuesPerElement<E> > 1)
      return {p.dy + some.first * p.dy_depth(), p.dy_depth(), 1};
    else
      return {p.arrays.dy.row(token_block.first + some.first), p.arrays.dy.stride, 1};
  }
  Strided<E> dz_of(const Joined& all, size_t first) const {
    const size_t depth = depth_of<E>(all.rank);
    if constexpr (kValuesPerElement<E> > 1)
      return {all.elements + first * depth, depth, 1};
    else
      return {all.dz + first * depth, depth, 1};
  }

  // dx[tokens, cols], a group of panels at a time.
  void multiply(Range token_block, Range some, Range cols) const {
    const Matrix<T> dx{dx_.row(token_block.first + some.first), some.count, dx_.cols, dx_.stride};
    for (size_t c = 0; c < cols.count; c += group_) {
      const Range group{cols.first + c, std::min(group_, cols.count - c)};
      const auto add_low_rank = [&](Range panel, Range few) {
        for (const Joined& each : joined_)
          if (each.adds) low_rank(each, token_block, {some.first + few.first, few.count}, panel, dx, few);
      };
      bool accumulate = false;
      for (const Part& p : parts_) {
        const bool last = &p == &parts_.back();
        frozen(p, dy_of(p, token_block, some), group, dx, accumulate, [&](Range panel, Range few) {
          if (last) add_low_rank(panel, few);
        });
        accumulate = true;
      }
    }
  }

  // dx[:, group] = [dx +] dy W[:, group]. Calls after(panel, tokens) for some tokens at a time, when they are done but still in L1.
  template <class After>
  void frozen(const Part& p, Strided<E> dy, Range group, Matrix<T> dx, bool accumulate,
              const After& after) const {
    const WeightView& w = p.arrays.w;
    const size_t width = makes_two_panels(w, is_shared()) ? kDecodedColumns : kPanelColumns;
    W* made = scratch<W>(Scratch::kWeight, kDepthBlock * width);
    for (size_t g = 0; g < group.count; g += width) {
      const Range cols{group.first + g, std::min(width, group.count - g)};
      size_t o = 0;
      do {  // once without rows, too: dx is set to zero
        const Range rows{o, std::min(depth_block(w.d_out), w.d_out - o)};
        const ColumnBlock<W> block = column_block(w, rows, cols, is_shared(), made);
        for (size_t c = 0; c < cols.count; c += kPanelColumns) {
          const Range panel{cols.first + c, std::min(kPanelColumns, cols.count - c)};
          const ColumnBlock<W> its{block.data + c / kPanelColumns * block.panel_stride, block.row_stride};
          multiply(p, dy, rows, panel, its, dx, accumulate || o > 0, after);
        }
        o += rows.count;
      } while (o < w.d_out);
    }
  }

  // double's two panels would not stay in L2.
  bool is_shared() const { return sizeof(W) <= sizeof(float) && tokens_ > kInPlaceBatch; }

  // dx[:, panel] = [dx +] dy[:, rows] block.
  template <class After>
  void multiply(const Part& p, Strided<E> dy, Range rows, Range panel, ColumnBlock<W> block, Matrix<T> dx,
                bool accumulate, const After& after) const {
    if constexpr (std::is_same_v<W, T>)
      if (p.update == Update::kMergedOnTheFly)
        block = merged_block<T>(p.arrays.low, rows, panel, block,
                                scratch<T>(Scratch::kDecoded, kDepthBlock * kPanelColumns));
    const bool last = rows.first + rows.count == p.arrays.w.d_out;
    const size_t chunk = last ? kFewTokens : dx.rows;
    for (size_t i = 0; i < dx.rows; i += chunk) {
      const Range few{i, std::min(chunk, dx.rows - i)};
      const size_t depth = std::is_same_v<E, W> ? depth_of<E>(rows.count) : rows.count;
      gemm_outputs_in_lanes<E, W>()(
          few.count, panel.count, depth,
          {dy.data + i * dy.row_stride + rows.first / kValuesPerElement<E>, dy.row_stride, 1}, block.data,
          block.row_stride, dx.row(i) + panel.first, dx.stride, accumulate,
          i == 0 ? following(p.arrays.w, rows, panel, few.count, block.data) : Fetch::rows_ahead());
      if (last) after(panel, few);
    }
  }

  // The memory of packed W that is read after a block: the same panel's next rows, or the next panel. The first tokens fetch it in
  // tiles (a single tile streams through its own block, and of pieces in place the next one is fetched); those behind fetch rows of the
  // block, which is in L2, into L1.
  static Fetch following(const WeightView& w, Range rows, Range panel, size_t tokens, const void* block) {
    const kernels::Tiles<E>& k = kernels::table().tiles<E>();
    const size_t tiles = ceil_div(tokens, k.tile_tokens) * ceil_div(kPanelColumns, k.tile_columns);
    if (rows.count == 0) return Fetch::none();
    if (!w.packed || tiles < 2) return Fetch::rows_ahead();
    if (k.l1_block_bytes > 0 && block == stored_at(w, rows.first, panel.first)) return Fetch::rows_ahead();
    const size_t lines = rows.count * kPanelColumns * bytes_per_element(w.storage) / kCacheLine;
    return Fetch::memory(stored_at(w, rows.first + rows.count, panel.first), lines,
                         std::clamp<size_t>(ceil_div(lines, tiles * depth_of<E>(rows.count)), 1, 3));
  }

  // dx[few, panel] += undrop(dz B[:, panel]); `some` are the same tokens, counted in the token_block.
  void low_rank(const Joined& all, Range token_block, Range some, Range panel, Matrix<T> dx,
                Range few) const {
    const size_t depth = depth_of<E>(all.rank);
    T* out = dx.row(few.first) + panel.first;
    if (!all.dropped)
      return add_product<E>(few.count, panel.count, depth, dz_of(all, some.first), all.b.data + panel.first,
                            all.b.stride, out, dx.stride, true);
    const Matrix<T> update{scratch<T>(Scratch::kDropped, few.count * panel.count), few.count, panel.count,
                           panel.count};
    add_product<E>(few.count, panel.count, depth, dz_of(all, some.first), all.b.data + panel.first,
                   all.b.stride, update.data, panel.count, false);
    drop_rows<T>(all.dropped->dropout, all.dropped->key, token_block.first + some.first, panel.first,
                 dx_.cols, update, update);
    for (size_t j = 0; j < few.count; ++j)
      for (size_t c = 0; c < panel.count; ++c) out[j * dx.stride + c] += update.row(j)[c];
  }

  std::vector<FactorTask> cut_factors() const {
    std::vector<FactorTask> tasks;
    const auto cut = [&tasks](const Part* part, const Joined* joined, size_t count) {
      for (size_t c = 0; c < count; c += kColumnBlock)
        tasks.push_back({part, joined, {c, std::min(kColumnBlock, count - c)}});
    };
    for (const Part& p : parts_)
      if (p.wants_da) cut(&p, nullptr, p.arrays.w.d_out);
    for (const Joined& each : joined_)
      if (each.wants_db) cut(nullptr, &each, d_in_);
    return tasks;
  }

  // The sum of dA transposed, (r, cols) += zᵀ dy[:, cols], or of dB, (r, cols) += dzᵀ drop(x)[:, cols], over a token block, in steps
  // that keep the rows of dy or x in cache.
  void add_factor(Range token_block, const FactorTask& task) const {
    const Part* part = task.part;
    const Joined* joined = task.joined;
    const size_t rank = part ? part->rank() : joined->rank, stride = part ? part->arrays.w.d_out : d_in_;
    T* sum = (part ? part->da : joined->db) + task.cols.first;
    for (size_t i = 0; i < token_block.count; i += kSumDepth) {
      const Range some{i, std::min(kSumDepth, token_block.count - i)},
          tokens{token_block.first + i, some.count};
      Matrix<const T> right = at(part ? part->arrays.dy : x_, tokens, task.cols);
      if (joined && joined->dropped) {
        const Matrix<T> dropped{scratch<T>(Scratch::kDropped, some.count * right.cols), some.count,
                                right.cols, right.cols};
        drop_rows(joined->dropped->dropout, joined->dropped->key, tokens.first, task.cols.first, d_in_, right,
                  dropped);
        right = dropped;
      }
      const bool accumulate = tokens.first > 0;
      if constexpr (kValuesPerElement<E> == 1) {
        const Matrix<const T> left = part ? at(part->arrays.z, tokens, {0, rank})
                                          : Matrix<const T>{joined->dz + i * rank, some.count, rank, rank};
        add_product<E>(rank, right.cols, some.count, {left.data, 1, left.stride}, right.data, right.stride,
                       sum, stride, accumulate, Fetch::rows_ahead());
      } else {
        const kernels::Conversions& convert = kernels::table().convert;
        const size_t depth = depth_of<E>(some.count);
        E* w = scratch<E>(Scratch::kWeight, depth * right.cols);
        if (part && part->dy)  // is narrowed already
          convert.pair_bits(
              some.count, right.cols,
              reinterpret_cast<const uint16_t*>(part->dy + i * part->dy_depth()) + task.cols.first,
              kValuesPerElement<E> * part->dy_depth(), w);
        else
          convert.pair_rows(some.count, right.cols, right.data, right.stride, w);
        const E* rows = (part ? part->z_rows : joined->rows) + i / kValuesPerElement<E>;
        add_product<E>(rank, right.cols, depth, {rows, depth_of<E>(block_tokens_), 1}, w, right.cols, sum,
                       stride, accumulate);
      }
    }
  }

  // Not interrupted: gradients that are half added could not be told from whole ones.
  void add_sums() const {
    for (const Part& p : parts_) {
      const T scale = T(p.arrays.low.scale);
      if (const Matrix<T> da = p.arrays.da; p.wants_da)
        for_transposed(da.rows, p.rank(),
                       [&](size_t o, size_t j) { da.row(o)[j] += scale * p.da[j * da.rows + o]; });
      if (!p.joined || !p.joined->wants_db) continue;
      const T* sums = p.joined->db + p.column * d_in_;
      for (size_t j = 0; j < p.rank(); ++j)
        for (size_t c = 0; c < d_in_; ++c) p.arrays.db.row(j)[c] += sums[j * d_in_ + c];
    }
  }

  const Matrix<const T> x_;
  const Matrix<T> dx_;
  const size_t tokens_, d_in_;
  size_t block_tokens_ = 0, group_ = kPanelColumns;  // tokens and columns at a time
  double work_ = 0;
  bool merges_ = false;
  std::vector<Joined> joined_;
  std::vector<Part> parts_;
};

}  // namespace

template <class T>
void lora_backward(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx) {
  if (parts.empty() || parts[0].dy.rows == 0) return;
  if constexpr (std::is_same_v<T, float>) {
    const size_t tokens = parts[0].dy.rows;
    const auto is_bf16 = [](const BackwardPart<T>& part) { return part.w.storage == Storage::kBfloat16; };
    const auto is_packed = [](const BackwardPart<T>& part) { return part.w.packed; };
    const bool all_bf16 = std::all_of(parts.begin(), parts.end(), is_bf16);
    const bool all_packed = std::all_of(parts.begin(), parts.end(), is_packed);
    // So many tokens leave it to gemm_outputs_in_lanes to pair the rows of W. Where it does so in a copy, each kFewTokens would need their own:
    // more tokens share one that is made before.
    const size_t most_paired = !all_packed                           ? kInPlaceBatch
                               : kernels::table().pairs_in_registers ? kPairedBatch
                                                                     : kFewTokens;
    if (computes_pairs(parts[0].w, tokens))
      return all_bf16 && tokens <= most_paired ? Backward<Bf16Pair, Bf16>(parts, x, dx).run()
                                               : Backward<Bf16Pair, Bf16Pair>(parts, x, dx).run();
    if (all_bf16 && tokens <= kWidenedBatch) return Backward<float, Bf16>(parts, x, dx).run();
  }
  Backward<T, T>(parts, x, dx).run();
}

template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out) {
  if (scale == 0 || a.rows == 0) return;
  const size_t row_tasks = ceil_div(out.rows, kRowBlock), col_tasks = ceil_div(out.cols, kColumnBlock);
  const double work = flops(a.rows, out.rows, out.cols);
  parallel_for(row_tasks * col_tasks, useful_threads(work), Interruptible::kYes, [&](size_t i) {
    const Range rows = nth_block(out.rows, kRowBlock, i / col_tasks);
    const Range cols = nth_block(out.cols, kColumnBlock, i % col_tasks);
    T* scaled = scratch<T>(Scratch::kFactor, kSumDepth * kRowBlock);
    for (size_t first = 0; first < a.rows; first += kSumDepth) {
      const Range token_block{first, std::min(kSumDepth, a.rows - first)};
      for (size_t n = 0; n < token_block.count; ++n)
        for (size_t j = 0; j < rows.count; ++j)
          scaled[n * kRowBlock + j] = T(scale) * a.row(token_block.first + n)[rows.first + j];
      add_product<T>(rows.count, cols.count, token_block.count, {scaled, 1, kRowBlock},
                     at(b, token_block, cols).data, b.stride, out.row(rows.first) + cols.first, out.stride,
                     true);
    }
  });
}

#define NPLORA_INSTANTIATE(T)                                                                \
  template void lora_backward(std::span<const BackwardPart<T>>, Matrix<const T>, Matrix<T>); \
  template void add_outer(Matrix<const T>, Matrix<const T>, double, Matrix<T>)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
