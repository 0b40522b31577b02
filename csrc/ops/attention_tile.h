// Code that forward and backward attention share: tiles of queries in the SIMD lanes, and the range of keys
// that a query attends to.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "base/matrix.h"
#include "base/profile.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/attention.h"
#include "ops/scratch.h"

namespace nplora {

// The number of lanes in a tile. A lane is one head of one query. All lanes of a tile use the same key-value
// head. The lanes of a run that use the same key-value head are ordered by token, then by head, and are cut
// into tiles of kTileLanes lanes. Most arrays of a tile have the shape (n, kTileLanes), so that neighbouring
// lanes are neighbours in memory.
inline constexpr size_t kTileLanes = kernels::kPanelColumns;
// The number of keys in a tile. The scores of a tile are 64 keys x 48 lanes of floats = 12 KB.
inline constexpr size_t kTileKeys = 64;

// The positions from `first` to end - 1.
struct Span {
  size_t first, end;

  size_t size() const { return end - first; }
};

// The sums over keys are split only at multiples of kKeyUnit positions, so that the results do not depend on
// the size of the pages. kKeyUnit must be a multiple of kDepthUnit, because a product may split its depth
// only at multiples of kDepthUnit. kKeyUnit must also be a multiple of the number of keys that key_dots
// multiplies at a time, which is at most 8.
inline constexpr size_t kKeyUnit = kernels::kDepthUnit;
static_assert(kPageUnit % kKeyUnit == 0 && kTileKeys % kKeyUnit == 0);

// The keys of all runs, or the values of all runs, in pairs of bfloat16.
struct PairedRows {
  const kernels::Bf16Pair* along;  // a pair holds two neighbouring values of a row
  const kernels::Bf16Pair* down;   // a pair holds two values of a column, at positions 2i and 2i + 1
  size_t width;                    // the number of columns of k (or v) before pairing

  // Returns the left operand of a product that sums over head_dim. It is the part of the array `along` that
  // begins with the pair of element (row, column). In a PairedRows of keys, this is an element of k; in a
  // PairedRows of values, an element of v.
  kernels::Strided<kernels::Bf16Pair> over_dim(size_t row, size_t column) const {
    return {along + (row * width + column) / 2, width / 2, 1};
  }
  // Returns the left operand of a product that sums over keys: the transpose of the array `down`, beginning
  // with element (row, column) of `down`.
  kernels::Strided<kernels::Bf16Pair> over_keys(size_t row, size_t column) const {
    return {down + row * width + column, 1, width};
  }
};

// A run: neighbouring queries, and the keys of their sequence. The positions of the queries are
// first_position, first_position + 1, and so on.
struct Run {
  size_t row, count;      // the run's queries are the rows `row` to row + count - 1 of q
  size_t first_position;  // the position of the first query in its sequence
  const float *k, *v;     // the address of position 0 or, with pages, the address of page 0
  size_t stride;          // the row stride of k and v
  // pages[i] is the page of the positions i * page_tokens to (i + 1) * page_tokens - 1. `pages` is null if
  // page 0 holds all positions.
  const int64_t* pages = nullptr;
  size_t page_tokens = 0;
  const PairedRows* k_pairs = nullptr;  // null if products are in float32 or k and v are in pages
  const PairedRows* v_pairs = nullptr;
  size_t pair_row = 0;  // the row of `down` that pairs positions 0 and 1 of the sequence

  Matrix<const float> keys(size_t head, size_t dim, Span part) const {
    return {k + row_of(part.first) * stride + head * dim, part.size(), dim, stride};
  }
  Matrix<const float> values(size_t head, size_t dim, Span part) const {
    return {v + row_of(part.first) * stride + head * dim, part.size(), dim, stride};
  }
  // The row of `k` and `v` that holds the key and the value of a position.
  size_t row_of(size_t position) const {
    return pages ? size_t(pages[position / page_tokens]) * page_tokens + position % page_tokens : position;
  }
  // Cuts a span of positions into parts that are contiguous in memory, and calls body(part) for each part.
  // With pages, each part is inside one page. Without pages, the whole span is one part.
  template <class Body>
  void for_parts(Span span, const Body& body) const {
    while (span.first < span.end) {
      const size_t end = pages ? (span.first / page_tokens + 1) * page_tokens : span.end;
      const Span part{span.first, std::min(end, span.end)};
      body(part);
      span.first = part.end;
    }
  }
};

inline AttentionShape in_floats(AttentionShape shape) {
  shape.pairs = false;
  return shape;
}

// Pairs of bfloat16 values need an even head_dim. Otherwise, all products are in float32.
inline AttentionShape in_pairs_if_even(const AttentionShape& shape) {
  return shape.head_dim % 2 == 0 ? shape : in_floats(shape);
}

// Returns the smallest range that contains all keys to which the queries at the positions first_position to
// last_position of a run attend.
inline Span visible_keys(const AttentionShape& shape, const Run& run, size_t first_position,
                         size_t last_position) {
  const size_t window = shape.window, keys = run.first_position + run.count;
  const size_t first = window > 0 && first_position + 1 > window ? first_position + 1 - window : 0;
  if (shape.causal) return {first, last_position + 1};
  return {first, window > 0 ? std::min(last_position + window, keys) : keys};
}

// Adds the number of floating-point operations of attention to `timed`. `products` is the number of matrix
// products: 2 in the forward pass, and 5 in the backward pass. For each product, each head of a query and
// each key to which the query attends, there are head_dim multiply-adds.
inline void count_operations(const Timed& timed, const AttentionShape& shape, const std::vector<Run>& runs,
                             double products) {
  double attended = 0;
  for (const Run& run : runs)
    for (size_t i = run.first_position; i < run.first_position + run.count; ++i)
      attended += double(visible_keys(shape, run, i, i).size());
  timed.count(shape.pairs ? Arithmetic::kBfloat16 : Arithmetic::kFloat32,
              products * attended * 2.0 * double(shape.heads * shape.head_dim));
}

// A tile: the lanes `first` to first + lanes - 1 of a run. Only the lanes that use the key-value head kv_head
// are counted, from 0.
struct QueryTile {
  const AttentionShape& shape;
  const Run& run;
  size_t kv_head, first, lanes;

  // The tile begins with lane first_lane. It ends before lane end_lane, or earlier if it already has
  // kTileLanes lanes.
  QueryTile(const AttentionShape& s, const Run& r, size_t head, size_t first_lane, size_t end_lane)
      : shape(s),
        run(r),
        kv_head(head),
        first(first_lane),
        lanes(std::min(kTileLanes, end_lane - first_lane)) {}

  size_t position(size_t lane) const { return run.first_position + (first + lane) / shape.group(); }

  // The range of all keys to which the queries of the tile attend.
  Span visible() const { return visible_keys(shape, run, position(0), position(lanes - 1)); }

  // For each token of the tile, calls body(row, head, heads, lane). `row` is the token's row of q. The tile
  // contains the query heads `head` to head + heads - 1 of this token, in the lanes `lane` to lane + heads -
  // 1.
  template <class Body>
  void for_tokens(const Body& body) const {
    const size_t group = shape.group();
    for (size_t lane = 0; lane < lanes;) {
      const size_t head = (first + lane) % group, heads = std::min(group - head, lanes - lane);
      body(run.row + (first + lane) / group, kv_head * group + head, heads, lane);
      lane += heads;
    }
  }

  // Copies the lanes of the tile from x (n, heads * head_dim) to `to` (lanes, head_dim), and multiplies them
  // by `factor`. Lane i of the tile is one head of one row of x, and becomes row i of `to`.
  void gather(Matrix<const float> x, float factor, float* to) const {
    const size_t dim = shape.head_dim;
    for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
      kernels::table().transformer.scaled(heads * dim, factor, x.row(row) + head * dim, to + lane * dim,
                                          false);
    });
  }
  // The reverse of `gather`: copies row i of `from` (lanes, head_dim), times `factor`, to the head of x (n,
  // heads * head_dim) that belongs to lane i of the tile. If `accumulate` is true, the rows are added to x
  // instead of copied.
  void scatter(const float* from, float factor, Matrix<float> x, bool accumulate) const {
    const size_t dim = shape.head_dim;
    for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
      kernels::table().transformer.scaled(heads * dim, factor, from + lane * dim, x.row(row) + head * dim,
                                          accumulate);
    });
  }

  // Adds the bias to the scores, and sets the score of a lane and a key to -Inf if the query of the lane does
  // not attend to the key. `scores` is (keys.end - keys.first, kTileLanes).
  void mask(Span keys, float* scores) const {
    const size_t window = shape.window;
    if (shape.bias) add_bias(keys, scores);
    const bool sees_later =
        shape.causal ? keys.end <= position(0) + 1 : window == 0 || keys.end <= position(0) + window;
    if (sees_later && (window == 0 || keys.first + window > position(lanes - 1))) return;
    for (size_t key = keys.first; key < keys.end; ++key, scores += kTileLanes) {
      const size_t later = shape.causal ? 0 : window - 1;  // how many later keys a query also attends to
      const size_t begin = lane_at(key > later ? key - later : 0),
                   end = window > 0 ? lane_at(key + window) : lanes;
      std::fill(scores, scores + begin, -std::numeric_limits<float>::infinity());
      std::fill(scores + end, scores + lanes, -std::numeric_limits<float>::infinity());
    }
  }

 private:
  void add_bias(Span keys, float* scores) const {
    for (size_t lane = 0; lane < lanes; ++lane) {
      const size_t head = kv_head * shape.group() + (first + lane) % shape.group();
      const float* bias = shape.bias_of(head, position(lane));
      for (size_t key = keys.first; key < keys.end; ++key)
        scores[(key - keys.first) * kTileLanes + lane] += bias[key];
    }
  }
  // The first lane that holds a query at position `at` or at a later position.
  size_t lane_at(size_t at) const {
    if (at <= run.first_position) return 0;
    const size_t lane = (at - run.first_position) * shape.group();
    return lane <= first ? 0 : std::min(lane - first, lanes);
  }
};

// Cuts a range of keys at multiples of kTileKeys, and calls body(keys) for each tile. The places of the cuts
// do not depend on the start of the range. So the result of a query does not depend on the other queries of
// its tile, although those queries may attend to different keys.
template <class Body>
void for_key_tiles(Span keys, const Body& body) {
  while (keys.first < keys.end) {
    const Span tile{keys.first, std::min((keys.first / kTileKeys + 1) * kTileKeys, keys.end)};
    body(tile);
    keys.first = tile.end;
  }
}

// Computes the matrix product scores = k queries, with k (keys, depth), queries (depth, lanes) and scores
// (keys, lanes). The rows of `queries` are q_stride elements apart, and the rows of `scores` are kTileLanes
// elements apart. The queries are in the SIMD lanes.
template <class E>
void score(size_t lanes, size_t keys, size_t depth, kernels::Strided<E> k, const E* queries, size_t q_stride,
           float* scores) {
  kernels::table().tiles<E>().gemm_outputs_in_lanes(keys, lanes, depth, k, queries, q_stride, scores,
                                                    kTileLanes, false, kernels::Fetch::none());
}

// Computes weighted sums of the rows of v: sums = vᵀ weights, or sums += vᵀ weights if `accumulate` is true.
// The shapes are sums (head_dim, kTileLanes), v (depth, head_dim) and weights (depth, kTileLanes). The rows
// of `weights` are w_stride elements apart.
template <class E>
void add_weighted(size_t lanes, size_t dim, size_t depth, kernels::Strided<E> v, const E* weights,
                  size_t w_stride, float* sums, bool accumulate) {
  kernels::table().tiles<E>().gemm_outputs_in_lanes(dim, lanes, depth, v, weights, w_stride, sums, kTileLanes,
                                                    accumulate, kernels::Fetch::none());
}

inline void score(size_t lanes, Matrix<const float> k, const float* queries, float* scores) {
  score<float>(lanes, k.rows, k.cols, {k.data, k.stride, 1}, queries, kTileLanes, scores);
}
inline void add_weighted(size_t lanes, Matrix<const float> v, const float* weights, float* sums,
                         bool accumulate) {
  add_weighted<float>(lanes, v.cols, v.rows, {v.data, 1, v.stride}, weights, kTileLanes, sums, accumulate);
}

// Pairs rows 2i and 2i + 1 of x (rows, lanes), element by element, and stores the pairs in row i of out
// (ceil(rows / 2), lanes). The rows of `x` are kTileLanes elements apart.
inline void pair_rows(size_t rows, size_t lanes, const float* x, kernels::Bf16Pair* out) {
  kernels::table().convert.pair_rows(rows, lanes, x, kTileLanes, out);
}

// The keys and values of some runs, as pairs of bfloat16 in scratch memory of the calling thread.
class PairedKeysAndValues {
 public:
  // Converts k and v (n, width), and sets the pointers in `runs` to the results. v_.along and k_.down are
  // null unless `backward` is true, because only a backward pass reads them.
  PairedKeysAndValues(std::vector<Run>& runs, Matrix<const float> k, Matrix<const float> v, bool backward);
  PairedKeysAndValues(const PairedKeysAndValues&) = delete;
  PairedKeysAndValues& operator=(const PairedKeysAndValues&) = delete;

 private:
  PairedRows k_, v_;
};

}  // namespace nplora
