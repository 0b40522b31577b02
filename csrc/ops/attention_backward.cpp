#include <algorithm>
#include <optional>
#include <vector>

#include "base/parallel.h"
#include "ops/attention.h"
#include "ops/attention_tile.h"
#include "ops/elements.h"

namespace nplora {

namespace {

// Blocks of tokens are made smaller until the first diagonal (see attention_backward) has at least
// kFewestTasks tasks. kFewestTasks must not depend on the number of threads. Otherwise the results would
// depend on the number of threads, because the size of the blocks determines the order of the sums.
constexpr size_t kFewestTasks = 12;

const kernels::Transformer& kernel() {
  return kernels::table().transformer;
}

// The inputs and outputs of all tiles. For each token and head, delta (n, heads) holds the dot product of
// dout and out. The tiles of the first diagonal (see attention_backward) compute delta.
struct Operands {
  Matrix<const float> dout;
  AttentionSaved saved;
  Matrix<float> delta, dq, dk, dv;
};

struct BackwardBuffers {
  explicit BackwardBuffers(size_t dim) {
    float* at = scratch<float>(Scratch::kAttention, kTileLanes * (5 * dim + 2 * kTileKeys + 2));
    for (float** buffer : {&q_rows, &dout_rows, &q, &dout, &dq}) {
      *buffer = at;
      at += kTileLanes * dim;
    }
    scores = at;
    dp = scores + kTileKeys * kTileLanes;
    lse = dp + kTileKeys * kTileLanes;
    delta = lse + kTileLanes;
  }

  float *q_rows, *dout_rows;  // (lanes, head_dim)
  float *q, *dout, *dq;       // (head_dim, kTileLanes)
  float *scores, *dp;         // (kTileKeys, kTileLanes)
  float *lse, *delta;         // (kTileLanes)
};

// The operands of a tile, stored as pairs of bfloat16 numbers. In `q` and `dout`, a pair consists of two
// neighbouring values of one lane. In `ds_down`, a pair consists of the values of two neighbouring keys. In
// all other arrays, a pair consists of the values of two neighbouring lanes.
struct PairBuffers {
  static constexpr size_t kLanePairs = kTileLanes / 2;

  PairBuffers(size_t dim, size_t lanes, const BackwardBuffers& b) {
    const size_t half = kTileLanes * dim / 2, tile = kTileKeys * kLanePairs;
    kernels::Bf16Pair* at = scratch<kernels::Bf16Pair>(Scratch::kPairing, 4 * half + 3 * tile);
    for (kernels::Bf16Pair** buffer : {&q, &dout, &q_rows, &dout_rows}) {
      *buffer = at;
      at += half;
    }
    p = at;
    ds = p + tile;
    ds_down = ds + tile;
    pair_rows(dim, lanes, b.q, q);
    pair_rows(dim, lanes, b.dout, dout);
    kernels::table().convert.pair_rows(lanes, dim, b.q_rows, dim, q_rows);
    kernels::table().convert.pair_rows(lanes, dim, b.dout_rows, dim, dout_rows);
  }

  kernels::Bf16Pair *q, *dout;            // (head_dim / 2, lanes)
  kernels::Bf16Pair *q_rows, *dout_rows;  // (lanes / 2, head_dim)
  kernels::Bf16Pair *p, *ds;              // (kTileKeys, kLanePairs)
  kernels::Bf16Pair* ds_down;             // (kTileKeys / 2, lanes)
};

// Adds a matrix product: sums += weights rows, with sums (keys, head_dim), weights (keys, depth) and rows
// (depth, head_dim). The columns of `sums` are computed in groups of about equal width.
template <class E>
void add_outer(size_t keys, size_t depth, size_t dim, const E* weights, size_t w_stride, const E* rows,
               float* sums, size_t stride) {
  const size_t width = round_up(ceil_div(dim, ceil_div(dim, kernels::kPanelColumns)), 16);
  for (size_t j = 0; j < dim; j += width)
    kernels::table().tiles<E>().gemm_outputs_in_lanes(keys, std::min(width, dim - j), depth,
                                                      {weights, w_stride, 1}, rows + j, dim, sums + j, stride,
                                                      true, kernels::Fetch::none());
}

// Sets b.delta[i] to the delta of lane i of the tile (see Operands). On the first diagonal, delta is computed
// and stored in x.delta; on later diagonals, delta is copied from x.delta.
void find_delta(const QueryTile& tile, const Operands& x, bool first, const BackwardBuffers& b) {
  const size_t dim = tile.shape.head_dim;
  if (first) tile.gather(x.saved.out, 1, b.q_rows);
  for (size_t i = 0; first && i < tile.lanes; ++i)
    b.delta[i] = kernel().dot(dim, b.dout_rows + i * dim, b.q_rows + i * dim);
  tile.for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
    float* kept = x.delta.row(row) + head;
    first ? std::copy_n(b.delta + lane, heads, kept) : std::copy_n(kept, heads, b.delta + lane);
  });
}

// Computes the backward pass of the softmax in place: b.scores becomes p, and b.dp becomes ds (see
// attend_backward). If `whole` is true, b.scores must hold the scores of all keys to which the queries
// attend. If `whole` is false, the function also reads b.lse and b.delta. `n` is the number of keys.
void softmax_backward(size_t n, size_t lanes, bool whole, const BackwardBuffers& b) {
  if (whole)
    kernel().whole_softmax_backward(n, lanes, b.scores, b.dp, kTileLanes);
  else
    kernel().softmax_backward(n, lanes, b.lse, b.delta, b.scores, b.dp, kTileLanes);
}

// The keys that attend_backward multiplies with a tile of queries. If `whole` is true, the queries attend to
// no other keys, and all scores fit into one tile of scores. If `whole` is false, the keys are cut into tiles
// at multiples of kTileKeys.
struct Keys {
  Span span;
  bool whole;

  template <class Body>
  void for_tiles(const Body& body) const {
    whole ? body(span) : for_key_tiles(span, body);
  }
};

// Computes the scores and p, dp and ds for one tile of queries with the keys in `all` (see attend_backward).
// Sets b.dq to the sum of ds k over these keys, and adds the terms of this tile to dk and dv. All products
// are computed in float32.
void multiply(const QueryTile& tile, const Keys& all, const Operands& x, const BackwardBuffers& b) {
  const size_t dim = tile.shape.head_dim, lanes = tile.lanes, column = tile.kv_head * dim;
  bool add = false;
  all.for_tiles([&](Span keys) {
    const size_t n = keys.size(), row = tile.run.row + keys.first;
    const Matrix<const float> k = tile.run.keys(tile.kv_head, dim, keys),
                              v = tile.run.values(tile.kv_head, dim, keys);
    score(lanes, k, b.q, b.scores);
    tile.mask(keys, b.scores);
    score(lanes, v, b.dout, b.dp);
    softmax_backward(n, lanes, all.whole, b);
    add_outer(n, lanes, dim, b.scores, kTileLanes, b.dout_rows, x.dv.row(row) + column, x.dv.stride);
    add_outer(n, lanes, dim, b.dp, kTileLanes, b.q_rows, x.dk.row(row) + column, x.dk.stride);
    add_weighted(lanes, k, b.dp, b.dq, add);
    add = true;
  });
}

// Does the same as `multiply`, but multiplies pairs of bfloat16. The keys at positions 2i and 2i + 1 form a
// pair. If the span begins at an odd position, it begins with the second key of a pair. The function then
// also computes scores for the first key of this pair. `mask` sets these scores to -Inf, because the first
// key is before the window of every query of the tile.
void multiply_pairs(const QueryTile& tile, const Keys& all, const Operands& x, const BackwardBuffers& b) {
  const size_t dim = tile.shape.head_dim, lanes = tile.lanes, column = tile.kv_head * dim;
  const PairBuffers pairs(dim, lanes, b);
  const Run& run = tile.run;
  bool add = false;
  Keys{{round_down(all.span.first, 2), all.span.end}, all.whole}.for_tiles([&](Span keys) {
    const size_t n = keys.size(), row = run.row + keys.first;
    score(lanes, n, dim / 2, run.k_pairs->over_dim(row, column), pairs.q, lanes, b.scores);
    tile.mask(keys, b.scores);
    score(lanes, n, dim / 2, run.v_pairs->over_dim(row, column), pairs.dout, lanes, b.dp);
    softmax_backward(n, lanes, all.whole, b);
    constexpr size_t kStride = PairBuffers::kLanePairs;
    elements_of<kernels::Bf16Pair>({b.scores, n, lanes, kTileLanes}, pairs.p, kStride);
    elements_of<kernels::Bf16Pair>({b.dp, n, lanes, kTileLanes}, pairs.ds, kStride);
    pair_rows(n, lanes, b.dp, pairs.ds_down);
    const size_t depth = ceil_div(lanes, 2);
    add_outer(n, depth, dim, pairs.p, kStride, pairs.dout_rows, x.dv.row(row) + column, x.dv.stride);
    add_outer(n, depth, dim, pairs.ds, kStride, pairs.q_rows, x.dk.row(row) + column, x.dk.stride);
    add_weighted(lanes, dim, ceil_div(n, 2), run.k_pairs->over_keys(run.pair_row + keys.first / 2, column),
                 pairs.ds_down, lanes, b.dq, add);
    add = true;
  });
}

// Algorithm 2 of Dao 2023 (FlashAttention-2) for one tile of queries and one block of keys, with the queries
// in the SIMD lanes of all products. With the scores s:
//   p = exp(s - lse);  dv += p dout;  dp = dout vᵀ;  ds = p ∘ (dp - delta);
//   dq = scale ds k;  dk += ds (scale q).
// For a tile of queries, the first block of keys sets dq, and later blocks add to dq. If one tile of scores
// holds all keys to which the queries attend, p and delta are computed from these scores, and not from lse
// and `out`. The reason is that with few keys, dp and delta can be nearly equal. The rounding errors of `out`
// would then be large in comparison with dp - delta.
void attend_backward(const QueryTile& tile, Span block, const Operands& x, bool first) {
  const size_t dim = tile.shape.head_dim, lanes = tile.lanes;
  const Span seen = tile.visible(),
             keys_of_tile{std::max(seen.first, block.first), std::min(seen.end, block.end)};
  if (keys_of_tile.first >= keys_of_tile.end) return;
  const BackwardBuffers b(dim);
  const bool sees_all = keys_of_tile.first == seen.first && keys_of_tile.end == seen.end &&
                        seen.end - round_down(seen.first, 2) <= kTileKeys;
  tile.gather(x.dout, 1, b.dout_rows);
  if (!sees_all) {
    find_delta(tile, x, first, b);
    tile.for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
      std::copy_n(x.saved.lse.row(row) + head, heads, b.lse + lane);
    });
  }
  tile.gather(x.saved.q, tile.shape.scale, b.q_rows);
  kernels::table().f32.transpose(lanes, dim, b.q_rows, dim, b.q, kTileLanes);
  kernels::table().f32.transpose(lanes, dim, b.dout_rows, dim, b.dout, kTileLanes);

  const Keys keys{keys_of_tile, sees_all};
  if (tile.shape.pairs)
    multiply_pairs(tile, keys, x, b);
  else
    multiply(tile, keys, x, b);
  kernels::table().f32.transpose(dim, lanes, b.dq, kTileLanes, b.q_rows, dim);
  tile.scatter(b.q_rows, tile.shape.scale, x.dq, !first);
}

// Returns the number of tokens in a block. A task reads or writes four arrays of a block of keys, for one
// key-value head: the keys, the values and their gradients. If head_dim is at most 512, each array takes at
// most 128 KB, so that all four stay in L2. If the first diagonal has fewer than kFewestTasks tasks, the
// number of tokens is halved repeatedly, but not below kTileKeys.
size_t block_tokens(const AttentionShape& shape, const std::vector<Run>& runs) {
  size_t block = std::clamp<size_t>(32768 / shape.head_dim / kTileKeys, 1, 8) * kTileKeys;
  const auto tasks = [&] {
    size_t blocks = 0;
    for (const Run& run : runs) blocks += ceil_div(run.count, block);
    return blocks * shape.kv_heads;
  };
  while (block > kTileKeys && tasks() < kFewestTasks) block /= 2;
  return block;
}

// A task: one block of queries and one block of keys, for all query heads that share a key-value head.
struct Task {
  size_t run, kv_head, query_block;
};

}  // namespace

// The queries and the keys of a sequence are cut into blocks of tokens. A task multiplies one block of
// queries with one block of keys. It computes the scores only once, for dq, dk and dv. dq is a sum over keys,
// and dk and dv are sums over queries. So two tasks for the same key-value head may run at the same time only
// if they have neither the query block nor the key block in common.
//
// Therefore, the tasks are arranged in a matrix whose rows are query blocks and whose columns are key blocks.
// The tasks of one diagonal of this matrix run in parallel, and no task of a diagonal waits for another. The
// diagonals are computed one after the other, so every sum has one fixed order. Diagonal d consists of the
// tasks of query block i and key block i - d, for i >= d. Without causality, if a sequence has n blocks,
// diagonal d also contains the tasks of query block i < d and key block i - d + n.
void attention_backward(const AttentionShape& given, Sequences sequences, Matrix<const float> dout,
                        const AttentionSaved& saved, Matrix<float> dq, Matrix<float> dk, Matrix<float> dv) {
  const Timed timed(Activity::kAttentionBackward);
  const AttentionShape shape = in_pairs_if_even(given);
  std::vector<Run> runs;
  size_t longest = 0;
  for (size_t i = 0; i < sequences.count; ++i) {
    const size_t row = size_t(sequences.starts[i]), count = size_t(sequences.starts[i + 1]) - row;
    if (count > 0) runs.push_back({row, count, 0, saved.k.row(row), saved.v.row(row), saved.k.stride});
    longest = std::max(longest, count);
  }
  if (timed) count_operations(timed, shape, runs, 5);
  std::optional<PairedKeysAndValues> paired;
  if (shape.pairs) paired.emplace(runs, saved.k, saved.v, true);
  const size_t block = block_tokens(shape, runs), group = shape.group(), dim = shape.head_dim;
  float* delta = scratch<float>(Scratch::kAttentionParts, dout.rows * shape.heads);
  const Operands x{dout, saved, {delta, dout.rows, shape.heads, shape.heads}, dq, dk, dv};
  std::vector<Task> tasks;
  for (size_t diagonal = 0; diagonal * block < longest; ++diagonal) {
    if (shape.causal && shape.window > 0 && diagonal > 0 && (diagonal - 1) * block + 1 >= shape.window)
      break;  // on this diagonal and on all later ones, no key is in the window of any query
    tasks.clear();
    for (size_t i = 0; i < runs.size(); ++i)
      for (size_t b = shape.causal || diagonal * block >= runs[i].count ? diagonal : 0;
           b * block < runs[i].count; ++b)
        for (size_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) tasks.push_back({i, kv_head, b});
    const double operations = 10.0 * double(tasks.size()) * double(block * block) * double(group * dim);
    parallel_for(tasks.size(), useful_threads(operations), Interruptible::kYes, [&](size_t i) {
      const Task& task = tasks[i];
      const Run& run = runs[task.run];
      const Range queries = nth_block(run.count, block, task.query_block),
                  keys = nth_block(run.count, block,
                                   task.query_block < diagonal
                                       ? task.query_block + ceil_div(run.count, block) - diagonal
                                       : task.query_block - diagonal);
      const Span span{keys.first, keys.first + keys.count};
      for (size_t key = span.first; diagonal == 0 && key < span.end; ++key) {
        std::fill_n(dk.row(run.row + key) + task.kv_head * dim, dim, 0.0f);
        std::fill_n(dv.row(run.row + key) + task.kv_head * dim, dim, 0.0f);
      }
      const size_t end = (queries.first + queries.count) * group;
      for (size_t lane = queries.first * group; lane < end; lane += kTileLanes)
        attend_backward({shape, run, task.kv_head, lane, end}, span, x, diagonal == 0);
    });
  }
}

}  // namespace nplora
