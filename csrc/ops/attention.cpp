#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "base/parallel.h"
#include "ops/attention_tile.h"
#include "ops/blocking.h"

namespace nplora {

namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// The largest number of tiles in a task. If tasks had more tiles, a short sequence would have fewer tasks
// than there are threads.
constexpr size_t kTilesPerTask = 4;

// With at least this many tasks for each thread, a single task is a small part of the work, so no thread
// waits long at the end.
constexpr size_t kManyTasks = 16;

// A run consists of neighbouring queries of one sequence. A lane is one head of one query. A tile has room
// for kTileLanes lanes, which must all use the same key-value head. If a run has fewer than kFewestLanes
// lanes for each key-value head, its tiles would be mostly empty. The attention of this run is then computed
// without tiles.
constexpr size_t kFewestLanes = 12;

// The keys of a single query are cut into pieces of at most this many keys.
constexpr size_t kPieceKeys = 256;

// Attention for single queries takes kReadingCost times as long as a matrix product with the same number of
// floating-point operations, because each key and value is read from memory for only a few operations.
constexpr double kReadingCost = 4;

const kernels::Transformer& kernel() {
  return kernels::table().transformer;
}

struct Outputs {
  Matrix<float> out, lse;  // if lse.data is null, lse is not computed
};

struct ForwardBuffers {
  explicit ForwardBuffers(size_t dim) {
    float* at = scratch<float>(Scratch::kAttention, kTileLanes * (3 * dim + kTileKeys + 3));
    pairs = scratch<kernels::Bf16Pair>(Scratch::kPairing, kTileLanes * (ceil_div(dim, 2) + kTileKeys / 2));
    weights = pairs + kTileLanes * ceil_div(dim, 2);
    for (float** buffer : {&rows, &queries, &sums}) {
      *buffer = at;
      at += kTileLanes * dim;
    }
    scores = at;
    largest = scores + kTileKeys * kTileLanes;
    sum = largest + kTileLanes;
    factor = sum + kTileLanes;
  }

  float* rows;                    // (lanes, head_dim)
  float *queries, *sums;          // (head_dim, kTileLanes)
  float* scores;                  // (kTileKeys, kTileLanes)
  float *largest, *sum, *factor;  // (kTileLanes)
  // These two arrays are used only if the products are in bfloat16, because these products multiply pairs of
  // values. `pairs` (head_dim / 2, lanes) holds the queries, and `weights` (kTileKeys / 2, lanes) holds the
  // softmax weights of a tile of keys.
  kernels::Bf16Pair *pairs, *weights;
};

// Algorithm 1 of Dao 2023 (FlashAttention-2) for one tile of queries. Each key is read from memory only once.
// The softmax weights of a lane are computed relative to the largest score so far. Whenever a tile of keys
// raises this largest score, the sums over the earlier tiles are scaled down.
void attend(const QueryTile& tile, Matrix<const float> q, const Outputs& to) {
  const size_t dim = tile.shape.head_dim, lanes = tile.lanes;
  const ForwardBuffers b(dim);
  tile.gather(q, tile.shape.scale, b.rows);
  kernels::table().f32.transpose(lanes, dim, b.rows, dim, b.queries, kTileLanes);
  std::fill_n(b.largest, lanes, kLowest);
  std::fill_n(b.sum, lanes, 0.0f);

  const size_t column = tile.kv_head * dim;
  if (tile.shape.pairs) pair_rows(dim, lanes, b.queries, b.pairs);

  // The sums over keys must begin at a multiple of kKeyUnit, so they may include a few keys before the
  // window. The scores of these keys are masked.
  const Span visible = tile.visible();
  bool accumulate = false;
  for_key_tiles({round_down(visible.first, kKeyUnit), visible.end}, [&](Span keys) {
    const auto scores_of = [&](Span part) { return b.scores + (part.first - keys.first) * kTileLanes; };
    if (tile.shape.pairs)
      score(lanes, keys.size(), dim / 2, tile.run.k_pairs->over_dim(tile.run.row + keys.first, column),
            b.pairs, lanes, b.scores);
    else
      tile.run.for_parts(keys, [&](Span part) {
        score(lanes, tile.run.keys(tile.kv_head, dim, part), b.queries, scores_of(part));
      });
    tile.mask(keys, b.scores);
    kernel().softmax_step(keys.size(), lanes, b.scores, kTileLanes, b.largest, b.sum, b.factor);
    if (accumulate) kernel().scale_columns(dim, lanes, b.factor, b.sums, kTileLanes);
    if (tile.shape.pairs) {
      pair_rows(keys.size(), lanes, b.scores, b.weights);
      add_weighted(lanes, dim, ceil_div(keys.size(), 2),
                   tile.run.v_pairs->over_keys(tile.run.pair_row + keys.first / 2, column), b.weights, lanes,
                   b.sums, accumulate);
      accumulate = true;
      return;
    }
    tile.run.for_parts(keys, [&](Span part) {
      add_weighted(lanes, tile.run.values(tile.kv_head, dim, part), scores_of(part), b.sums, accumulate);
      accumulate = true;
    });
  });

  for (size_t i = 0; i < lanes; ++i) b.factor[i] = 1 / b.sum[i];
  kernel().scale_columns(dim, lanes, b.factor, b.sums, kTileLanes);
  kernels::table().f32.transpose(dim, lanes, b.sums, kTileLanes, b.rows, dim);
  tile.scatter(b.rows, 1, to.out, false);
  if (to.lse.data)
    tile.for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
      for (size_t i = 0; i < heads; ++i)
        to.lse.row(row)[head + i] = b.largest[lane + i] + std::log(b.sum[lane + i]);
    });
}

// A task computes the outputs of some lanes of one run, tile by tile. All these lanes use the key-value head
// kv_head. The lanes of the run that use this head are numbered from 0, and the task has the lanes first_lane
// to end_lane - 1.
struct TileTask {
  size_t run, kv_head, first_lane, end_lane;
};

void attend_tiles(const AttentionShape& shape, const std::vector<Run>& runs, Matrix<const float> q,
                  const Outputs& to) {
  std::vector<TileTask> tasks;
  double operations = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const size_t lanes = runs[i].count * shape.group();
    const double per_lane = 4.0 * double(runs[i].first_position + runs[i].count) * double(shape.head_dim);
    const double tiles = std::clamp(kTaskFlops / (per_lane * kTileLanes), 1.0, double(kTilesPerTask));
    const size_t per_task = size_t(tiles) * kTileLanes;
    operations += per_lane * double(runs[i].count * shape.heads);
    for (size_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head)
      for (size_t end = lanes; end > 0;) {  // the longest tasks come first: late queries have the most keys
        const size_t first = (end - 1) / per_task * per_task;
        tasks.push_back({i, kv_head, first, end});
        end = first;
      }
  }
  const size_t threads = useful_threads(operations);
  const auto attend_lanes = [&](size_t i) {
    const TileTask& task = tasks[i];
    for (size_t lane = task.first_lane; lane < task.end_lane; lane += kTileLanes)
      attend({shape, runs[task.run], task.kv_head, lane, task.end_lane}, q, to);
  };
  // parallel_for gives each thread a share of neighbouring tasks. A thread then reads about the same rows as
  // in the preceding operation, so most of these rows are in its cache. But if there are only a few runs and
  // a few tasks, the shares take unequal times, because a run begins with long tasks and ends with short
  // ones. In this case, all threads take their tasks from one list.
  if (runs.size() >= threads || tasks.size() >= kManyTasks * threads)
    parallel_for(tasks.size(), threads, Interruptible::kYes, attend_lanes);
  else
    parallel_in_order(tasks.size(), threads, Interruptible::kYes, attend_lanes);
}

// ---- single queries ----

// One query and a range of its keys. attend_piece stores three results for a piece, one after the other: the
// outputs (heads, head_dim), which are not yet divided by the sums; the largest scores (heads); and the sums
// (heads) of exp(score - largest score).
struct Piece {
  const Run* run;
  size_t row;
  Span keys;
};

void attend_piece(const AttentionShape& shape, const Piece& piece, Matrix<const float> q, float* part) {
  const Run& run = *piece.run;
  const size_t dim = shape.head_dim, heads = shape.heads, n = piece.keys.size();
  const auto at = [&](Span part) { return part.first - piece.keys.first; };
  float *largest = part + heads * dim, *sum = largest + heads;
  float *scaled = scratch<float>(Scratch::kAttention, heads * (dim + n)), *scores = scaled + heads * dim;
  kernel().scaled(heads * dim, shape.scale, q.row(piece.row), scaled, false);
  // key_dots multiplies the query with several keys at a time. If too few keys are left at the end of a call,
  // they are multiplied one by one, and the terms of their scores are added in a different order. So the
  // results depend on how the keys are divided among the calls. To make the results independent of the size
  // of the pages, every call except the last one ends at a multiple of kKeyUnit.
  const size_t aligned = std::min(round_up(piece.keys.first, kKeyUnit), piece.keys.end);
  for (const Span half : {Span{piece.keys.first, aligned}, Span{aligned, piece.keys.end}})
    run.for_parts(half, [&](Span part) {
      kernel().key_dots(part.size(), heads, shape.group(), dim, scaled, run.keys(0, dim, part).data,
                        run.stride, scores + at(part), n);
    });
  for (size_t h = 0; h < heads; ++h) {
    float* s = scores + h * n;
    if (shape.bias) {
      const float* bias = shape.bias_of(h, run.first_position + piece.row - run.row) + piece.keys.first;
      for (size_t i = 0; i < n; ++i) s[i] += bias[i];
    }
    largest[h] = kernel().largest(n, s);
    sum[h] = kernel().exp_sum(n, s, largest[h], s);
  }
  std::fill_n(part, heads * dim, 0.0f);
  run.for_parts(piece.keys, [&](Span keys) {
    kernel().add_values(keys.size(), heads, shape.group(), dim, scores + at(keys), n,
                        run.values(0, dim, keys).data, run.stride, part);
  });
}

// Combines the results of all pieces of one query, which is row `row` of q, and stores its outputs and lse.
// The sum of a piece is Σ exp(score - largest score of the piece). Each sum is multiplied by exp(largest
// score of the piece - largest score of all pieces) before it is added to the total.
void join_pieces(const AttentionShape& shape, size_t row, size_t pieces, const float* parts,
                 const Outputs& to) {
  const size_t dim = shape.head_dim, heads = shape.heads, stride = heads * (dim + 2);
  for (size_t h = 0; h < heads; ++h) {
    float* out = to.out.row(row) + h * dim;
    const float *largest = parts + heads * dim + h, *sums = largest + heads;
    float top = kLowest, sum = 0;
    for (size_t i = 0; i < pieces; ++i) top = std::max(top, largest[i * stride]);
    for (size_t i = 0; i < pieces; ++i) {
      const float factor = std::exp(largest[i * stride] - top);
      sum += factor * sums[i * stride];
      kernel().scaled(dim, factor, parts + i * stride + h * dim, out, i > 0);
    }
    kernel().scaled(dim, 1 / sum, out, out, false);
    if (to.lse.data) to.lse.row(row)[h] = top + std::log(sum);
  }
}

// Attention for runs of only a few queries. A few queries do not fill a tile, and memory bandwidth limits the
// speed. Therefore, each query is processed for all heads at once, and its keys and values are read once. The
// keys of a query are cut into pieces, and several threads may process the pieces (Dao et al. 2023,
// Flash-Decoding).
void attend_rows(const AttentionShape& shape, const std::vector<Run>& runs, Matrix<const float> q,
                 const Outputs& to) {
  std::vector<Piece> pieces;
  std::vector<size_t> first_piece;  // for each row, its first piece; the last element is the number of pieces
  double operations = 0;
  for (const Run& run : runs)
    for (size_t i = 0; i < run.count; ++i) {
      const Span keys = visible_keys(shape, run, run.first_position + i, run.first_position + i);
      const size_t first = round_down(keys.first, kKeyUnit), n = keys.end - first,
                   size = round_up(ceil_div(n, ceil_div(n, kPieceKeys)), kKeyUnit);
      operations += kReadingCost * 4.0 * double(n) * double(shape.heads * shape.head_dim);
      first_piece.push_back(pieces.size());
      for (size_t key = first; key < keys.end; key += size)
        pieces.push_back({&run, run.row + i, {std::max(key, keys.first), std::min(key + size, keys.end)}});
    }
  first_piece.push_back(pieces.size());
  const size_t stride = shape.heads * (shape.head_dim + 2), threads = useful_threads(operations);
  float* parts = scratch<float>(Scratch::kAttentionParts, pieces.size() * stride);
  const size_t rows = first_piece.size() - 1;
  const bool whole = pieces.size() == rows;  // whether each query has a single piece
  const auto join = [&](size_t i) {
    const size_t first = first_piece[i];
    join_pieces(shape, pieces[first].row, first_piece[i + 1] - first, parts + first * stride, to);
  };
  parallel_for(pieces.size(), threads, Interruptible::kYes, [&](size_t i) {
    attend_piece(shape, pieces[i], q, parts + i * stride);
    if (whole) join(i);
  });
  if (!whole) parallel_for(rows, threads, Interruptible::kYes, join);
}

void attend_runs(const Timed& timed, const AttentionShape& shape, const std::vector<Run>& runs,
                 Matrix<const float> q, const Outputs& to) {
  std::vector<Run> long_runs, short_runs;
  for (const Run& run : runs)
    (run.count * shape.group() < kFewestLanes ? short_runs : long_runs).push_back(run);
  if (timed) {
    count_operations(timed, shape, long_runs, 2);
    count_operations(timed, in_floats(shape), short_runs, 2);
  }
  attend_tiles(shape, long_runs, q, to);
  if (!short_runs.empty()) attend_rows(shape, short_runs, q, to);
}

}  // namespace

void attention(const AttentionShape& given, Sequences sequences, Matrix<const float> q, Matrix<const float> k,
               Matrix<const float> v, Matrix<float> out, Matrix<float> lse) {
  const Timed timed(Activity::kAttention);
  const AttentionShape shape = in_pairs_if_even(given);
  std::vector<Run> runs;
  for (size_t i = 0; i < sequences.count; ++i) {
    const size_t row = size_t(sequences.starts[i]), count = size_t(sequences.starts[i + 1]) - row;
    if (count > 0) runs.push_back({row, count, 0, k.row(row), v.row(row), k.stride});
  }
  std::optional<PairedKeysAndValues> paired;
  if (shape.pairs) paired.emplace(runs, k, v, false);
  attend_runs(timed, shape, runs, q, {out, lse});
}

void attention_cached(const AttentionShape& shape, Matrix<const float> q, KeyValueCache cache,
                      const int64_t* slots, const int64_t* lengths, Matrix<float> out) {
  const Timed timed(Activity::kAttention);
  std::vector<Run> runs;
  for (size_t i = 0; i < q.rows; ++i) {
    // If the token of row i directly follows the token of row i - 1 in the same slot, both rows belong to one
    // run.
    if (i > 0 && slots[i] == slots[i - 1] && lengths[i] == lengths[i - 1] + 1) {
      ++runs.back().count;
      continue;
    }
    runs.push_back({i, 1, size_t(lengths[i]) - 1, cache.keys, cache.values, shape.kv_heads * shape.head_dim,
                    cache.table + size_t(slots[i]) * cache.slot_pages, cache.page_tokens});
  }
  attend_runs(timed, shape, runs, q, {out, {}});
}

}  // namespace nplora
